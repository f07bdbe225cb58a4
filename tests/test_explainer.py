"""Does an explanation say what became of a layer, and does each change that it promises really merge the model?"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rgc
from rgc.compiler import trace
from rgc.cost import CPU
from rgc.errors import InputError
from rgc.explanation import Cost, Explanation, Gap, Remedy
from rgc.ir import Input, Value
from rgc.models import reducenet20, repvgg_a0
from rgc.nn import DecayedActivation
from rgc.testing import randomize


def named(**layers: nn.Module) -> nn.Module:
    """A chain of named layers with random statistics and biases."""
    torch.manual_seed(0)
    return randomize(nn.Sequential(OrderedDict(layers)))


def images(channels: int = 8, size: int = 12) -> Tensor:
    return torch.randn(1, channels, size, size + 1, generator=torch.Generator().manual_seed(0))


def the_gap(explanation: Explanation) -> Gap:
    (gap,) = explanation.gaps
    return gap


def changed(model: nn.Module, remedy: Remedy) -> tuple[nn.Module, dict[str, Any]]:
    """The model and the options of `rgc.compile` after the changes in the words of a remedy; fails on other words."""
    torch.manual_seed(1)
    model, options = copy.deepcopy(model), dict[str, Any]()
    for words in remedy.changes:
        if found := re.fullmatch(r"padding=(.+) of (\S+) moved to (\S+) \(padding=(.+), then padding=0\)", words):
            assert str(_padding(model.get_submodule(found[2]))) == found[1]
            model.get_submodule(found[2]).padding = _pair("0")  # type: ignore[assignment]  # as a user would
            model.get_submodule(found[3]).padding = _pair(found[4])  # type: ignore[assignment]
        elif found := re.fullmatch(r"nn\.ZeroPad2d\((.+)\) before (\S+), then padding=0 of (\S+)", words):
            model.get_submodule(found[3]).padding = _pair("0")  # type: ignore[assignment]
            sides = tuple(int(side) for side in re.findall(r"\d+", found[1]))
            zeros = nn.ZeroPad2d(sides[0] if len(sides) == 1 else sides)  # type: ignore[arg-type]
            model.set_submodule(found[2], nn.Sequential(zeros, model.get_submodule(found[2])).eval())
        elif found := re.fullmatch(r"bias=False for (\S+)", words):
            model.get_submodule(found[1]).bias = None
        elif found := re.fullmatch(r"replace \w+ (\S+) by rgc\.nn\.DecayedActivation and decay it to 1", words):
            model.set_submodule(found[1], DecayedActivation(nn.ReLU(), 1.0).eval())
        elif found := re.fullmatch(r"decay (\S+) to 1 \(now .+\)", words):
            faded = model.get_submodule(found[1])
            assert isinstance(faded, DecayedActivation)
            faded.set_decay(1.0)
        elif found := re.fullmatch(r"negative_slope=1 for LeakyReLU (\S+) \(now .+\)", words):
            model.set_submodule(found[1], nn.LeakyReLU(1.0).eval())
        elif found := re.fullmatch(r"slopes of 1 for PReLU (\S+)", words):
            model.set_submodule(found[1], nn.PReLU(init=1.0).eval())
        elif found := re.fullmatch(r"track_running_stats=True for (\S+)", words):
            old = model.get_submodule(found[1])
            assert isinstance(old, nn.BatchNorm2d)
            model.set_submodule(found[1], randomize(nn.BatchNorm2d(old.num_features)))
        elif words == "fixed size: --passes all":
            options["passes"] = "all"
        elif found := re.fullmatch(r"--passes (\S+)", words):
            options["passes"] = found[1]
        else:
            assert words == "--objective depth", words
    if not remedy.pays:
        options["objective"] = "depth"
    return model, options


def _padding(module: nn.Module) -> Any:
    padding = module.padding
    assert isinstance(padding, tuple)
    return padding[0] if len(set(padding)) == 1 else padding


def _pair(text: str) -> tuple[int, int]:
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    return numbers[0], numbers[-1]


def assert_kept_promise(
    model: nn.Module, x: Tensor, remedy: Remedy, paths: tuple[str, ...] = ("first", "second"), **given: Any
) -> None:
    """After the changes the layers are the one operator that was promised, at the cost that was promised."""
    other, options = changed(model, remedy)
    graph = trace(other, x, **{"passes": "default", **given, **options}).graph
    made = [
        value for value in graph.nodes() if not isinstance(value.op, Input) and all(_holds(value, p) for p in paths)
    ]
    labels = " and ".join(value.op.label for value in made)
    assert labels == remedy.result.split(" in place of ")[0], (remedy, str(graph))
    assert Cost.of(made, CPU) == remedy.gain.after


def _holds(value: Value, path: str) -> bool:
    return any(each == path or each.startswith(f"{path}.") for each in value.origin.paths)


# --- promises ----------------------------------------------------------------------------------------------------


def biased_pointwise_that_pads() -> nn.Module:
    return named(first=nn.Conv2d(8, 32, 1, padding=1), second=nn.Conv2d(32, 8, 3, padding=1))


def padded_twice() -> nn.Module:
    return named(first=nn.Conv2d(1, 8, 3, padding=1), second=nn.Conv2d(8, 1, 3, padding=1))


PROMISES: list[tuple[Callable[[], nn.Module], int, str, list[tuple[str, ...]]]] = [
    (
        biased_pointwise_that_pads,
        8,
        "its bias: exact only with a bias map at a fixed size",
        [
            ("fixed size: --passes all",),
            ("padding=1 of second moved to first (padding=2, then padding=0)",),
            ("bias=False for first",),
        ],
    ),
    (
        padded_twice,
        1,
        "border ring: conv 3x3 8->1 reads a ring 1 wide",
        [("padding=1 of second moved to first (padding=2, then padding=0)",)],
    ),
    (
        lambda: named(
            first=nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False), bn=nn.BatchNorm2d(8), act=nn.ReLU(),
            second=nn.Conv2d(8, 8, 3, padding=(1, 2)),
        ),
        8,
        "relu at act is not linear",
        [
            (
                "replace ReLU act by rgc.nn.DecayedActivation and decay it to 1",
                "padding=(1, 2) of second moved to first (padding=(3, 5), then padding=0)",
            )
        ],
    ),
    (
        lambda: named(first=nn.Conv2d(8, 8, 3), act=nn.LeakyReLU(0.5), second=nn.Conv2d(8, 8, 1)),
        8,
        "leaky_relu is not the identity: its negative slope is 0.5, not 1 (at act)",
        [("negative_slope=1 for LeakyReLU act (now 0.5)",)],
    ),
    (
        lambda: named(first=nn.Conv2d(8, 8, 3), act=nn.PReLU(init=0.5), second=nn.Conv2d(8, 8, 1)),
        8,
        "prelu is not the identity: its negative slope is 0.5, not 1 (at act)",
        [("slopes of 1 for PReLU act",)],
    ),
    (
        lambda: named(first=nn.Conv2d(8, 8, 3), act=DecayedActivation(nn.GELU(), 0.25), second=nn.Conv2d(8, 8, 1)),
        8,
        "its weight in the blend is 0.75, not 0",
        [("decay act to 1 (now 0.25)",)],
    ),
    (
        lambda: named(first=nn.AvgPool2d(2, 1), second=nn.Conv2d(8, 8, 3, padding=1)),
        8,
        "border ring: conv 3x3 8->8 reads a ring 1 wide",
        [("nn.ZeroPad2d(1) before first, then padding=0 of second",)],
    ),
    (
        lambda: named(first=nn.BatchNorm2d(2, track_running_stats=False), second=nn.Conv2d(2, 64, 3, padding=1)),
        2,
        "batch norm still uses batch statistics",
        [("track_running_stats=True for first",)],
    ),
    (
        lambda: named(first=nn.Conv2d(64, 4, 1), second=nn.Conv2d(4, 64, 1)),
        64,
        "estimated slower on cpu",
        [("--objective depth",)],
    ),
    (
        lambda: named(
            first=nn.Conv2d(64, 64, 3, padding=1, groups=64), act=nn.ReLU(), second=nn.Conv2d(64, 64, 1)
        ),
        64,
        "estimated slower on cpu",
        [("replace ReLU act by rgc.nn.DecayedActivation and decay it to 1",)],
    ),
    (
        lambda: named(first=nn.Conv2d(8, 8, 3), second=nn.BatchNorm2d(8, track_running_stats=False)),
        8,
        "batch norm still uses batch statistics",
        [("track_running_stats=True for second",)],
    ),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(PROMISES)))
def test_what_is_promised_merges_once_it_is_done(number: int) -> None:
    build, channels, reason, changes = PROMISES[number]
    model, x = build(), images(channels, 16)
    gap = the_gap(rgc.explain(model, x, "first,second"))
    assert gap.layers == ("first", "second") and gap.kind == "chain"
    assert any(reason in each for each in gap.reasons), gap.reasons
    assert sorted(remedy.changes for remedy in gap.remedies) == sorted(changes)
    assert not any(firing.result and "first" in firing.sources and "second" in firing.sources
                   for firing in rgc.compile(model, x).report.rewrites)  # fmt: skip
    for remedy in gap.remedies:
        assert_kept_promise(model, x, remedy)
        other, options = changed(model, remedy)
        assert remedy.result in [label for each in rgc.compile(other, x, **options).report.rewrites
                                 for label in each.result]  # fmt: skip


@given(st.data())
def test_no_promise_is_untrue(data: st.DataObject) -> None:
    """Any two convolutions, with or without an activation between: what is promised is done, merged and counted."""

    def draw_convolution(inputs: int, outputs: int) -> nn.Module:
        kernel = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
        padding = data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
        options = {
            "stride": data.draw(st.sampled_from([1, 1, 2])),
            "dilation": data.draw(st.sampled_from([1, 1, 2])),
            "groups": data.draw(st.sampled_from([1, 1, 2])),
            "bias": data.draw(st.booleans()),
        }
        return nn.Conv2d(inputs, outputs, kernel, padding=padding, **options)

    layers: dict[str, nn.Module] = {"first": draw_convolution(2, 4)}
    if data.draw(st.booleans()):
        layers["bn"] = nn.BatchNorm2d(4)
    activation = data.draw(st.sampled_from([None, nn.ReLU(), nn.LeakyReLU(0.5), DecayedActivation(nn.ReLU(), 0.5)]))
    if activation is not None:
        layers["act"] = activation
    layers["second"] = draw_convolution(4, 2)
    model = named(**layers)
    x = torch.randn(1, 2, 15, 16, generator=torch.Generator().manual_seed(0))
    objective = data.draw(st.sampled_from(["latency", "macs", "params", "depth"]))
    for gap in rgc.explain(model, x, "first,second", objective=objective).gaps:
        for remedy in gap.remedies:
            assert_kept_promise(model, x, remedy, objective=objective)


@given(st.data())
def test_a_promise_in_a_longer_chain_is_what_the_plan_makes_of_it(data: st.DataObject) -> None:
    """Three or four layers in a row, of which any two neighbours are asked about: the others compete for them."""
    count = data.draw(st.integers(3, 4))
    widths = [data.draw(st.sampled_from((4, 16, 48))) for _ in range(count + 1)]
    layers: dict[str, nn.Module] = {}
    for index, name in enumerate("abcd"[:count]):
        kernel = data.draw(st.sampled_from((1, 1, 3)))
        padding = data.draw(st.integers(0, kernel // 2))
        layers[name] = nn.Conv2d(widths[index], widths[index + 1], kernel, padding=padding)
        if data.draw(st.integers(0, 4)) == 0:
            layers[f"act_{name}"] = nn.ReLU()
    model = named(**layers)
    x = torch.randn(1, widths[0], 15, 16, generator=torch.Generator().manual_seed(0))
    for gap in rgc.explain(model, x, "b").gaps:
        for remedy in gap.remedies:
            assert_kept_promise(model, x, remedy, gap.layers)


class Residual(nn.Module):
    def __init__(self, padding: tuple[int, int] = (1, 1)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 2, 3, padding=padding[0], bias=False)
        self.act = nn.ReLU()
        self.conv2 = nn.Conv2d(2, 2, 3, padding=padding[1])
        self.out = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv2(self.act(self.conv1(x))))


def test_a_residual_names_its_activation_and_what_the_whole_block_would_become() -> None:
    model, x = randomize(Residual()), images(2)
    explanation = rgc.explain(model, x, "conv2")
    chain, total = sorted(explanation.gaps, key=lambda gap: gap.kind)
    assert total.layers == ("input x", "conv2") and total.kind == "sum" and chain.kind == "chain"
    assert total.reasons[0] == "relu at act is not linear" and total.reasons[1].startswith("border ring")
    single_path, remedy = total.remedies
    assert single_path.changes == ("--passes default,single_path",)
    assert remedy.changes == (
        "replace ReLU act by rgc.nn.DecayedActivation and decay it to 1",
        "padding=1 of conv2 moved to conv1 (padding=2, then padding=0)",
    )
    assert remedy.result == "conv 5x5 2->2" and remedy.gain.before.operators == 4
    other, options = changed(model, remedy)
    assert rgc.compile(other, x, **options).report.ops_after == {"Conv2d": 1, "ReLU": 1}


def test_a_residual_that_already_pads_once_only_has_to_fade() -> None:
    remedy = next(
        gap for gap in rgc.explain(randomize(Residual((2, 0))), images(2), "conv2").gaps if gap.kind == "sum"
    ).remedies[0]
    assert remedy.changes == ("replace ReLU act by rgc.nn.DecayedActivation and decay it to 1",)


# --- what became of layers ---------------------------------------------------------------------------------------


def test_a_repvgg_block_says_into_what_it_was_merged_by_which_rewrites_and_what_it_gained() -> None:
    explanation = rgc.explain(randomize(repvgg_a0()), torch.randn(1, 3, 32, 32), "stage1.1.rbr_1x1.conv")
    (place,) = explanation.places
    assert place.fate == "merged" and place.result == ("conv 3x3 48->48",)
    assert {"stage1.1.rbr_dense.conv", "stage1.1.rbr_identity", "stage1.1.rbr_1x1.bn"} <= set(place.layers)
    assert [step.rewrite for step in place.steps][:2] == ["fold_batchnorm", "fold_batchnorm"]
    assert place.steps[-1].rewrite == "merge_branches" and all(step.evidence == "exact" for step in place.steps)
    assert place.gain is not None
    before, after = place.gain.before, place.gain.after
    assert (before.operators, after.operators) == (7, 1)
    assert after.parameters == 48 * 48 * 9 + 48 and before.parameters == 48 * 48 * 10 + 3 * 96
    assert after.macs == 8 * 8 * 48 * 48 * 9 and before.macs == 8 * 8 * 48 * 48 * 10
    assert 0 < after.milliseconds < before.milliseconds


def test_each_layer_of_a_part_is_explained_once() -> None:
    explanation = rgc.explain(randomize(reducenet20()), None, "stage1.0")
    fates = {place.layers: place.fate for place in explanation.places}
    assert fates == {
        ("stage1.0.conv1", "stage1.0.bn1"): "merged",
        ("stage1.0.activation.mul", "stage1.0.activation.add"): "removed",
        ("stage1.0.conv2", "stage1.0.bn2"): "merged",
    }
    assert len({gap.layers for gap in explanation.gaps}) == len(explanation.gaps) == 3
    assert explanation.gaps[0].remedies[0].changes == ("decay stage1.0.activation to 1 (now 0)",)


def test_a_decayed_activation_is_counted_into_the_merge_around_it() -> None:
    model = named(first=nn.Conv2d(2, 2, 1), act=DecayedActivation(nn.ReLU(), 1.0), drop=nn.Dropout(),
                  second=nn.Conv2d(2, 2, 1))  # fmt: skip
    (place,) = rgc.explain(model, images(2), "second").places
    assert place.layers == ("first", "act.activation", "act.mul", "act.add", "drop", "second")
    assert "remove_linear_activation" in [step.rewrite for step in place.steps]
    (removed,) = rgc.explain(model, images(2), "drop").places
    assert removed.fate == "removed" and removed.layers == ("drop",) and removed.steps[0].rewrite == "drop_identity"


def test_a_layer_that_nobody_reads_any_more_says_so() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x) + 0.0 * torch.sigmoid(self.conv(x))

    (place,) = rgc.explain(Gated().eval(), images(2), "conv").places
    assert place.fate == "removed" and place.steps == ()


def test_a_pair_that_was_merged_is_told_as_merged_however_it_is_written() -> None:
    model = named(conv=nn.Conv2d(2, 2, 1), bn=nn.BatchNorm2d(2), act=nn.ReLU())
    for where in ("conv,bn", "conv + bn", "bn, conv"):
        explanation = rgc.explain(model, images(2), where)
        assert [place.fate for place in explanation.places] == ["merged"] and explanation.gaps == ()


def test_three_layers_of_one_operator_are_what_reports_print() -> None:
    model = named(conv=nn.Conv2d(2, 2, 1), bn=nn.BatchNorm2d(2), last=nn.Conv2d(2, 2, 1))
    (place,) = rgc.explain(model, images(2), "last + conv + bn").places
    assert place.layers == ("conv", "bn", "last")
    with pytest.raises(InputError, match="a pair is two layers; these 3 layers are not one operator"):
        rgc.explain(named(a=nn.Conv2d(2, 2, 1), b=nn.ReLU(), c=nn.Conv2d(2, 2, 1)), images(2), "a,b,c")


# --- pairs that are no neighbours --------------------------------------------------------------------------------


def test_a_pair_is_named_in_either_order() -> None:
    model = padded_twice()
    assert rgc.explain(model, images(1), "second,first").gaps == rgc.explain(model, images(1), "first,second").gaps


def test_layers_that_are_no_neighbours_are_told_what_lies_between() -> None:
    layers = {name: nn.Conv2d(2, 2, 3, padding=1) for name in "abcdef"}
    (gap,) = rgc.explain(named(**layers), images(2), "f,a").gaps
    assert gap.kind == "apart" and gap.layers == ("a", "f")
    assert gap.reasons == ("they are not neighbours: b, c, d and 1 more lie between; ask about two that are",)


def test_an_activation_merges_with_nothing() -> None:
    (gap,) = rgc.explain(named(a=nn.Conv2d(2, 2, 1), b=nn.ReLU()), images(2), "a,b").gaps
    assert gap.reasons == ("relu at b is no linear operator, so it merges with nothing",)


def test_layers_that_never_meet_are_told_apart() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    (gap,) = rgc.explain(Heads().eval(), images(2), "a,b").gaps
    assert gap.reasons == ("neither reads what the other computes, and they do not meet in a sum",)


# --- a wrong WHERE -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("stage1.0.conv3", "has no layer 'stage1.0.conv3'; did you mean stage1.0.conv"),
        ("zzz", "has no layer 'zzz'; `rgc inspect MODEL` lists every layer"),
        ("", "name a layer .* a part .* or a pair"),
        ("stage1.0.conv1,", "name a layer"),
    ],
)
def test_a_wrong_name_is_answered_with_close_ones(where: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rgc.explain(reducenet20().eval(), None, where)


def test_a_module_that_is_never_called_is_named_as_such() -> None:
    with pytest.raises(InputError, match=r"explain 'out': out \(ReLU\) makes no operator of the traced model"):
        rgc.explain(Residual().eval(), images(2), "out")


def test_a_model_that_cannot_be_traced_says_what_to_explain_instead() -> None:
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(x)
            return y * float(y.detach().numpy().max() > 0)

    with pytest.raises(InputError, match="Untraceable cannot be traced as a whole.*explain the part that holds them"):
        rgc.explain(Untraceable().eval(), images(2), "body.0")
    model: nn.Module = Untraceable().eval().get_submodule("body")
    assert rgc.explain(model, images(2), "0").places[0].fate == "merged"


def test_explaining_changes_nothing_in_the_model() -> None:
    model = randomize(reducenet20())
    before = copy.deepcopy(model.state_dict())
    rgc.explain(model, None, "stage1")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
