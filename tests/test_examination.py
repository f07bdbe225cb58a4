"""Is somebody told in plain words what is wrong with a pass, whatever it is?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from rgc import (
    Activation,
    BatchNorm,
    Conv,
    Graph,
    GraphPass,
    Rewrite,
    Value,
    graph_pass,
    passes,
    range_of,
    require,
    rewrite,
)
from rgc.examination import Examination, Finding, examine, own_passes, problem_of_example
from rgc.passbook import load_passes

SHAPE = (2, 4, 6, 6)


def conv_bn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))


def linear_bn() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def with_examples(pass_: Rewrite | GraphPass, fires: Callable[[], nn.Module] = conv_bn) -> Rewrite | GraphPass:
    pass_.fires_on((5, 4) if fires is linear_bn else SHAPE)(fires)
    pass_.leaves_alone((5, 4), because="")(nn.Identity)
    return pass_


def of(build: Callable[..., Value], fires: Callable[[], nn.Module] = linear_bn) -> Rewrite | GraphPass:
    """A rewrite of a linear layer before a batch norm, with examples."""
    return with_examples(rewrite(lambda x, conv, bn: bn(conv(x)))(build), fires)


def words(found: Examination) -> str:
    return "\n".join(f"{finding.check}: {finding}" for finding in found.findings)


def examples_only(pass_: Rewrite | GraphPass) -> str:
    return words(examine(pass_, thorough=False))


def test_nothing_is_wrong_with_a_pass_that_is_right() -> None:
    def right(x: Value, conv: Conv, bn: BatchNorm) -> Value:
        """s(Wx + b) + t = (sW)x + sb + t."""
        return (bn.as_linear() @ conv)(x)

    found = examine(of(right), models=4)
    assert found.ok and not found.notes, words(found)
    assert [line.check for line in found.lines] == ["examples", "laws", "fuzzing", "mutation"]
    assert {line.status for line in found.lines} == {"ok"}
    assert "4 random; it fired on " in found.lines[2].tried and "a wrong rewrite passes with" in found.lines[1].tried


def test_a_pass_that_never_fires_is_told_where_its_pattern_stops_fitting() -> None:
    @rewrite(lambda x, bn, conv: conv(bn(x)))
    def turned_round(x: Value, bn: BatchNorm, conv: Conv) -> Value:
        return (conv @ bn.as_linear())(x)

    said = examples_only(with_examples(turned_round))
    assert "it must fire, but its pattern does not match" in said
    assert "the pattern has bn: BatchNorm, where the model has the input" in said


def test_what_is_wrong_only_with_another_geometry_is_told_with_that_geometry_and_a_program() -> None:
    def without_stride(x: Value, conv: Conv, bn: BatchNorm) -> Value:
        merged = bn.as_linear() @ conv
        assert conv.stride and conv.padding and conv.dilation and conv.groups and conv.padding_mode
        return Conv(
            merged.weight, merged.bias, stride=conv.stride, padding=conv.padding, dilation=conv.dilation,
            groups=conv.groups,
        )(x)  # fmt: skip

    pass_ = of(without_stride, conv_bn)
    assert not examples_only(pass_)
    found = examine(pass_, models=14, mutation=False)
    (finding,) = (each for each in found.findings if each.check == "fuzzing" and "like" not in each.problem)
    assert (
        "with padding_mode='circular', padding=1 in its layer '0' (Conv2d): the result is not equal" in finding.problem
    )
    assert "refuse such models with `require(condition, reason)`" in finding.advice
    assert (
        "with padding_mode='" in finding.problem and "nn.Conv2d(4, 4, 3, padding=1, padding_mode='" in finding.program
    )


def test_a_pass_that_raises_is_told_in_which_line_and_on_what() -> None:
    def needs_bias(x: Value, conv: Conv, bn: BatchNorm) -> Value:
        assert conv.bias is not None
        return (bn.as_linear() @ conv)(x)

    found = examine(of(needs_bias), models=16, mutation=False)
    said = words(found)
    assert (
        "with bias=False in its layer '0' (Linear): it raised AssertionError" in said and "test_examination.py:" in said
    )
    assert "say with `require` what the rewrite needs" in said


def test_a_pass_that_makes_its_own_pattern_again_is_stopped_and_told() -> None:
    @rewrite(lambda x, conv: conv(x))
    def again(x: Value, conv: Conv) -> Value:
        return conv(x)

    said = examples_only(with_examples(again))
    assert "still fires at" in said and "must not match its own pattern" in said


def test_a_graph_pass_that_never_comes_to_rest_is_stopped_and_told() -> None:
    @graph_pass
    def anew(graph: Graph) -> Graph:
        for value in graph.nodes():
            if isinstance(value.op, Activation):
                graph.replace(value, value.op(*value.inputs))
        return graph

    assert "anew still fires at model after" in examples_only(with_examples(anew, nn.ReLU))


def test_a_pass_that_writes_to_a_weight_is_told_not_to() -> None:
    def in_place(x: Value, conv: Conv, bn: BatchNorm) -> Value:
        conv.weight.mul_(2)
        return (bn.as_linear() @ conv)(x)

    said = examples_only(of(in_place))
    assert "overwrites a weight" in said and "make a new tensor" in said


def test_a_pass_that_decides_by_chance_is_told_so() -> None:
    calls = iter(range(10_000))

    def by_chance(x: Value, conv: Conv, bn: BatchNorm) -> Value:
        require(next(calls) < 3, "bad luck")  # one call for each of three draws, then one that is compared
        return (bn.as_linear() @ conv)(x)

    said = words(examine(of(by_chance), models=0, mutation=False))
    assert "by_chance does one thing and then another on the same model" in said


def test_a_range_that_is_relied_on_has_to_be_declared() -> None:
    @rewrite(lambda x, act: act(x))
    def drop_relu(x: Value, act: Activation) -> Value:
        require(act.name == "relu" and range_of(x).lower >= 0, "it may be negative")
        return x

    fires = lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.Sigmoid(), nn.ReLU())  # noqa: E731
    assert "declare that with @rewrite(..., relies_on_range=True)" in examples_only(with_examples(drop_relu, fires))


def test_a_guard_without_a_reason_a_taken_name_and_a_private_name_are_told() -> None:
    def fold_batchnorm(x: Value, conv: Conv, bn: BatchNorm) -> Value:
        require(conv.groups == 1, "")
        require(x._inputs is not None, "never")
        return (bn.as_linear() @ conv)(x)

    found = examine(of(fold_batchnorm), thorough=False)
    said = words(found)
    assert "gives no reason: `require(conv.groups == 1, '')`" in said
    assert "has the name of a built-in pass, which it would silently replace" in said
    assert any("reads `x._inputs`, which is private" in note for note in found.notes)


def test_what_costs_more_and_is_made_all_the_same_is_noted() -> None:
    @rewrite(lambda x, conv: conv(x), weighed=False)
    def widen(x: Value, conv: Conv) -> Value:
        """A 3x3 in a 5x5."""
        require(conv.kernel == (3, 3) and conv.groups == 1, "not 3x3")
        return Conv(nn.functional.pad(conv.weight, (1, 1, 1, 1)), conv.bias, padding=1)(x)

    widen.fires_on(SHAPE)(lambda: nn.Sequential(nn.Conv2d(4, 4, 3)))
    widen.leaves_alone(SHAPE, because="not 3x3")(lambda: nn.Sequential(nn.Conv2d(4, 4, 1)))
    found = examine(widen, thorough=False)
    assert found.ok, words(found)
    assert any(note.startswith("it costs more: ") for note in found.notes)


def test_a_graph_pass_that_is_wrong_beyond_its_examples_is_found() -> None:
    @graph_pass
    def drop_second_relu(graph: Graph) -> Graph:
        """relu(relu(x)) = relu(x), but any activation is taken for the first."""
        for value in graph.nodes():
            if (
                isinstance(value.op, Activation)
                and value.op.name == "relu"
                and isinstance(value.inputs[0].op, Activation)
            ):
                graph.replace(value, value.inputs[0])
        return graph

    pass_ = with_examples(drop_second_relu, lambda: nn.Sequential(nn.ReLU(), nn.ReLU()))
    found = examine(pass_, models=14, mutation=False)
    assert any("in its layer '0' (ReLU): the result is not equal" in finding.problem for finding in found.findings)


PASS = '''
from torch import nn

from rgc import BatchNorm, Conv, Value, require, rewrite
from rgc.passes import fold_scale


@rewrite(lambda x, conv, bn: bn(conv(x)))
def mine(x: Value, conv: Conv, bn: BatchNorm) -> Value:
    """s(Wx + b) + t = (sW)x + sb + t."""
    require(conv.bias is not None, "no bias")
    return (bn.as_linear() @ conv)(x)


@mine.fires_on(shape=(5, 4))
def linear_bn() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


@mine.leaves_alone(shape=(5, 4), because="")
def nothing() -> nn.Module:
    return nn.Identity()
'''


def test_a_guard_that_no_example_is_about_is_told_with_the_example_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PASS)
    (pass_,) = own_passes(load_passes(str(tmp_path / "mine.py")))
    found = examine(pass_, models=16)
    assert all(finding.check == "mutation" for finding in found.findings)
    said = words(found)
    assert "line 11 of mine.py: `require(conv.bias is not None, 'no bias')` is dropped" in said
    assert "with bias=False in its layer '0' (Linear) (@mine.leaves_alone, because 'no bias')" in said


def test_faults_are_planted_only_in_what_is_right_without_them(tmp_path: Path) -> None:
    def wrong(x: Value, conv: Conv, bn: BatchNorm) -> Value:
        return (bn.as_linear() @ bn.as_linear() @ conv)(x)

    found = examine(of(wrong), models=0)
    assert [line.status for line in found.lines][-1] == "not tried" and "mend the examples" in found.lines[-1].tried
    assert "the result is not equal" in words(found)


def test_only_passes_of_their_own_are_taken_from_a_file_that_imports_others() -> None:
    own = rewrite(lambda x, conv: conv(x))(_identity)
    assert own_passes([passes.fold_scale, own]) == (own,)
    assert own_passes([passes.fold_scale]) == (passes.fold_scale,)


def _identity(x: Value, conv: Conv) -> Value:
    return x


def test_a_built_in_pass_and_a_built_in_graph_pass_have_nothing_wrong_with_their_examples() -> None:
    for each in (passes.hygiene, passes.fold_border):
        assert examine(each, thorough=False).ok
        assert not any(problem_of_example(each, example, 1, torch.float64) for example in each.examples)


def test_a_finding_reads_as_one_sentence() -> None:
    assert str(Finding("laws", "it is wrong", "mend it")) == "it is wrong; mend it"
    assert str(Finding("laws", "it is wrong")) == "it is wrong"


@pytest.mark.parametrize("name", ["default", "all"])
def test_a_pass_may_not_have_the_name_of_a_set(name: str) -> None:
    pass_ = of(_named(name))
    assert "has the name of a set of passes" in examples_only(pass_)


def _named(name: str) -> Callable[..., Value]:
    def build(x: Value, conv: Conv, bn: BatchNorm) -> Value:
        return (bn.as_linear() @ conv)(x)

    build.__name__ = name
    return build
