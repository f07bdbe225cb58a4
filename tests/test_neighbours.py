"""Are the next linear operators and the branches of sums found, past what lies between?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rgc.compiler import trace
from rgc.ir import Graph, Value
from rgc.neighbours import after, before, between, blend_at, branches, is_linear
from rgc.nn import DecayedActivation


def graph_of(model: nn.Module) -> tuple[Graph, dict[str, Value]]:
    """The traced graph, and its values by path."""
    graph = trace(model.eval(), torch.randn(1, 2, 8, 8)).graph
    return graph, {value.where: value for value in graph.nodes()}


def pointwise() -> nn.Module:
    return nn.Conv2d(2, 2, 1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.act, self.conv2, self.last = pointwise(), nn.ReLU(), pointwise(), pointwise()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.tanh(x + self.conv2(self.act(self.conv1(x)))))
        return y


def test_neighbours_are_found_past_what_is_not_linear() -> None:
    graph, found = graph_of(Block())
    assert after(graph, found["conv1"]) == [((found["act"],), found["conv2"])]
    assert before(found["conv2"]) == ((found["act"],), found["conv1"])
    assert after(graph, found["conv2"]) == [((), found["add"])]
    assert before(found["last"]) == ((found["tanh"],), found["add"])
    assert before(found["conv1"]) is None and after(graph, found["last"]) == []


def test_a_blend_of_an_activation_with_its_input_is_one_step() -> None:
    graph, found = graph_of(nn.Sequential(pointwise(), DecayedActivation(nn.ReLU(), 0.25), pointwise()))
    add = found["1.add"]
    blend = blend_at(add)
    assert blend is not None and blend[0] is found["0"] and blend[1][-1] is add and len(blend[1]) == 4
    assert after(graph, found["0"]) == [(blend[1], found["2"])]
    assert before(found["2"]) == (blend[1], found["0"])


def test_a_residual_around_an_activation_is_no_blend() -> None:
    class Around(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * torch.relu(x) + 2.0 * x

    _, found = graph_of(Around())
    assert blend_at(found["add"]) is None and blend_at(found["relu"]) is None


def test_branches_are_followed_to_their_source_through_activations() -> None:
    graph, found = graph_of(Block())
    order = {value: index for index, value in enumerate(graph.nodes())}
    part, blocker = branches(found["add"], order)
    assert blocker is None and part is not None
    assert part == (graph.inputs[0], tuple(found[name] for name in ("conv1", "act", "conv2", "add")))


def test_branches_that_never_meet_name_what_ends_the_search() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sort(x)[0] + torch.cumsum(x, 1).exp()

    graph, found = graph_of(Two())
    order = {value: index for index, value in enumerate(graph.nodes())}
    part, blocker = branches(found["add"], order)
    assert part is None and blocker is not None and not blocker.op.affine


def test_what_lies_between_two_layers_is_on_the_ways_from_one_to_the_other() -> None:
    graph, found = graph_of(Block())
    inner = between(graph, {found["conv1"]}, {found["last"]})
    assert inner == {found[name] for name in ("act", "conv2", "add", "tanh")}
    assert between(graph, {found["last"]}, {found["conv1"]}) is None


def test_an_identity_is_no_linear_operator_to_merge_with() -> None:
    _, found = graph_of(nn.Sequential(pointwise(), nn.Identity(), pointwise()))
    assert is_linear(found["0"]) and not is_linear(found["1"])
    assert before(found["2"]) == ((found["1"],), found["0"])
