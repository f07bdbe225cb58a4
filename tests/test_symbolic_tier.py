"""What does the first tier refuse to trace, and what does it make of parameters?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from rgc.errors import TraceError
from rgc.example import Example
from rgc.symbolic_tier import trace_symbolically

X = Example((torch.randn(2, 3, 6, 6),))


class Model(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 4, 3), nn.Parameter(torch.tensor(1.0))
        self.token = nn.Parameter(torch.randn(1, 3, 6, 6))
        self.register_buffer("count", torch.zeros(()))
        self.body = forward

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def _counts(m: Any, x: Tensor) -> Tensor:
    m.count += 1
    return m.conv(x)


def _clamps_its_weight(m: Any, x: Tensor) -> Tensor:
    m.conv.weight.data.clamp_(-0.01, 0.01)
    return m.conv(x)


def _grows(m: Any, x: Tensor) -> Tensor:
    m.register_buffer("extra", torch.ones(1))
    return m.conv(x)


def _autocasts(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.conv(x)


@pytest.mark.parametrize(("forward", "message"), [
    (_counts, "forward overwrites count of the model"),
    (_clamps_its_weight, "forward overwrites conv.weight of the model"),
    (_grows, "forward adds extra to the model"),
    (_autocasts, "forward turns autocast on or off, which a graph cannot hold"),
])  # fmt: skip
def test_what_a_graph_would_lose_is_refused_by_name(forward: Callable[[Any, Tensor], Tensor], message: str) -> None:
    model = Model(forward).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TraceError) as caught:
        trace_symbolically(model, X)
    assert str(caught.value) == message
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_hook_on_the_model_itself_is_refused() -> None:
    model = Model(lambda m, x: m.conv(x)).eval()
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(TraceError, match="the model itself has forward hooks, which tracing would lose"):
        trace_symbolically(model, X)


def test_parameters_are_constants_that_steer_control_flow() -> None:
    source = trace_symbolically(Model(lambda m, x: m.conv(x) if m.scale == 1.0 else x).eval(), X)
    assert [node.target for node in source.graph.nodes if node.op == "call_module"] == ["conv"]


def test_a_parameter_expanded_to_the_batch_becomes_a_symbol() -> None:
    source = trace_symbolically(Model(lambda m, x: x + m.token.expand(x.shape[0], -1, -1, -1)).eval(), X)
    assert [node.target for node in source.graph.nodes if node.op == "get_attr"] == ["token"]


def test_an_assignment_to_items_is_recorded_where_it_happens() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        z = y * 2
        y[:, :1] = z[:, 1:2]
        return y + z

    nodes = list(trace_symbolically(Model(forward).eval(), X).graph.nodes)
    names = [getattr(node.target, "__name__", node.target) for node in nodes]
    assert names[names.index("mul") :] == ["mul", "getitem", "setitem", "add", "output"]


def test_an_error_of_the_first_attempt_is_the_one_that_is_told() -> None:
    with pytest.raises(
        fx.proxy.TraceError, match="symbolically traced variables cannot be used as inputs to control flow"
    ):
        trace_symbolically(Model(lambda m, x: x if x.sum() > 0 else m.token).eval(), X)
