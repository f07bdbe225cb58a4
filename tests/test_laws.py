"""Is every built-in rewrite a law, and is a wrong one refuted? Planted faults, of kinds known from other tools."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import rgc
from rgc import (
    Activation,
    BatchNorm,
    Conv,
    Graph,
    MaxPool,
    Rewrite,
    Scale,
    Value,
    graph_pass,
    laws,
    passes,
    rewrite,
)
from rgc.algebra import _linear_part, _pushed_bias
from rgc.instances import Range
from rgc.laws import SMALL, LawError, degree_on_a_line, prove
from rgc.rewrite import Pass

EVERY = (*passes.ALL, *passes.OPT_IN)
PIECEWISE = {"drop_dead_channels", "remove_linear_activation", "exchange_max_pool", "single_path"}


@pytest.fixture(autouse=True)
def one_variation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer forms of graph than in ``benchmarks/laws.py``, to be quick; no fewer instances of each than are enough."""
    monkeypatch.setattr(laws, "VARIATIONS", 1)
    monkeypatch.setattr(laws, "ATTEMPTS", 6)


@pytest.mark.parametrize("each", EVERY, ids=lambda each: each.name)
def test_every_built_in_pass_is_a_law(each: Pass) -> None:
    law = prove(each, instances=1)
    assert law.rewrite == each.name and law.forms >= sum(example.fires for example in each.examples)
    assert law.firings >= law.forms * law.instances
    assert (law.chance is None) == (each.name in PIECEWISE)
    assert law.chance is None or 0 < law.chance <= SMALL


@pytest.mark.parametrize("each", [passes.fold_batchnorm, passes.fold_scale, passes.merge_stage], ids=lambda e: e.name)
def test_the_replacement_has_no_higher_degree_than_the_bound_along_a_line(each: Rewrite) -> None:
    for example in (example for example in each.examples if example.fires):
        found = degree_on_a_line(each, example)
        assert found is not None and 1 <= found[0] <= found[1]


def test_a_degree_above_the_bound_is_measured() -> None:
    @rewrite(lambda x, conv, bn: bn(conv(x)))
    def cubes(x: Value, conv: Conv, bn: BatchNorm) -> Value:
        merged = bn.as_linear().as_conv(conv.out_channels, conv.spatial) @ conv
        assert isinstance(merged, Conv)
        return merged.changed(weight=merged.weight * conv.weight**4)(x)

    cubes.fires_on(shape=(2, 3, 5, 5))(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval())
    found = degree_on_a_line(cubes, cubes.examples[0])
    assert found is not None and found[0] == found[1] + 1  # or more: there are no more points


def test_an_activation_leaves_no_degree_to_measure() -> None:
    example = next(example for example in passes.remove_linear_activation.examples if example.fires)
    assert degree_on_a_line(passes.remove_linear_activation, example) is None


# --- planted faults ----------------------------------------------------------------------------------------------

Factory = Callable[[], nn.Module]


def _conv_and_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=(1, 2), groups=2), nn.BatchNorm2d(4)).eval()


def _two_convs() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 6, 1), nn.Conv2d(6, 2, 3, padding=1)).eval()


def _grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1, groups=2)).eval()


def _transposed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(3, 3, 3, stride=2), nn.BatchNorm2d(3)).eval()


def _folded(bn: BatchNorm, conv: Conv) -> Conv:
    merged = bn.as_linear() @ conv
    assert isinstance(merged, Conv)
    return merged


@rewrite(lambda x, conv, bn: bn(conv(x)))
def wrong_sign(x: Value, conv: Conv, bn: BatchNorm) -> Value:
    scale = bn.as_linear()
    assert isinstance(scale, Scale)
    return (Scale(scale.scale, -scale.shift, scale.axes) @ conv)(x)


@rewrite(lambda x, conv, bn: bn(conv(x)))
def transposed_padding(x: Value, conv: Conv, bn: BatchNorm) -> Value:
    merged = _folded(bn, conv)
    return merged.changed(padding=tuple((b, a) if i else (a + 1, b - 1) for i, (b, a) in enumerate(merged.padding)))(x)


@rewrite(lambda x, conv, bn: bn(conv(x)))
def forgotten_bias(x: Value, conv: Conv, bn: BatchNorm) -> Value:
    return (bn.as_linear() @ conv.changed(bias=None))(x)


@rewrite(lambda x, conv, bn: bn(conv(x)))
def forgotten_eps(x: Value, conv: Conv, bn: BatchNorm) -> Value:
    return (replace(bn, eps=0.0).as_linear() @ conv)(x)


@rewrite(lambda x, conv, bn: bn(conv(x)))
def variance_for_deviation(x: Value, conv: Conv, bn: BatchNorm) -> Value:
    return (replace(bn, var=(bn.var + bn.eps) ** 2 - bn.eps).as_linear() @ conv)(x)


@rewrite(lambda x, conv, bn: bn(conv(x)))
def nearly_right(x: Value, conv: Conv, bn: BatchNorm) -> Value:
    merged = _folded(bn, conv)
    return merged.changed(weight=merged.weight * (1 + 2.0**-40))(x)


@rewrite(lambda x, first, second: second(first(x)))
def wrong_ring(x: Value, first: Conv, second: Conv) -> Value:
    """The bias of the first as if it stood in the padding of the second too: right inside, wrong on the border."""
    return _linear_part(second, first).changed(bias=_pushed_bias(second, first))(x)


@rewrite(lambda x, first, second: second(first(x)))
def wrong_group(x: Value, first: Conv, second: Conv) -> Value:
    merged = second @ first
    assert isinstance(merged, Conv)
    return merged.changed(weight=merged.weight.roll(merged.out_channels // merged.groups, 0))(x)


@rewrite(lambda x, conv, bn: bn(conv(x)))
def wrong_axis(x: Value, conv: Conv, bn: BatchNorm) -> Value:
    """A batch norm folded into the input channels of a transposed convolution, as into a square one."""
    scale = bn.as_linear()
    assert isinstance(scale, Scale)
    factor = scale.scale.reshape(-1, 1, *[1] * conv.spatial)
    bias = scale.shift if conv.bias is None else scale.shift + scale.scale * conv.bias
    return conv.changed(weight=conv.weight * factor, bias=bias)(x)


@pytest.mark.parametrize(
    ("planted", "model", "shape", "says"),
    [
        (wrong_sign, _conv_and_norm, (2, 2, 6, 5), "zeros)"),  # which is the smallest input that shows it
        (transposed_padding, _conv_and_norm, (2, 2, 6, 5), "zeros but for"),
        (forgotten_bias, _conv_and_norm, (2, 2, 6, 5), "zeros)"),
        (forgotten_eps, _conv_and_norm, (2, 2, 6, 5), "no law"),
        (variance_for_deviation, _conv_and_norm, (2, 2, 6, 5), "no law"),
        (nearly_right, _conv_and_norm, (2, 2, 6, 5), "zeros but for"),
        (wrong_ring, _two_convs, (2, 2, 6, 5), "zeros)"),
        (wrong_group, _grouped, (2, 4, 6, 5), "no law"),
        (wrong_axis, _transposed, (2, 3, 6, 5), "no law"),
    ],
    ids=lambda value: value.name if isinstance(value, Rewrite) else "",
)
def test_a_wrong_rewrite_is_refuted_with_a_small_instance(
    planted: Rewrite, model: Factory, shape: tuple[int, ...], says: str
) -> None:
    tried = replace(planted, examples=[])
    tried.fires_on(shape=shape)(model)
    with pytest.raises(LawError) as caught:
        prove(tried)
    message = str(caught.value)
    assert message.startswith(f"{planted.name} on the example {model.__name__.replace('_', ' ')!r}")
    assert says in message and re.search(
        r"at \[[\d, ]+\] gives -?[\d.e+-]+ instead of -?[\d.e+-]+ \(input of ", message
    )


def test_one_wrong_element_of_a_bias_map_is_found() -> None:
    @rewrite(lambda x, first, second: second(first(x)))
    def wrong_corner(x: Value, first: Conv, second: Conv) -> Value:
        merged = rgc.compose(second, first, x.tensor_type.size(2))
        assert isinstance(merged, Conv) and merged.bias is not None
        bias = merged.bias.clone()
        bias[0, -1, -1] += 1
        return merged.changed(bias=bias)(x)

    wrong_corner.fires_on(shape=(2, 2, 5, 6), fixed_size=True)(_two_convs)
    with pytest.raises(LawError, match=r"at \[0, 0, 4, 5\] gives -?\d+ instead of -?\d+ \(input of 2x2x5x6: zeros\)"):
        prove(wrong_corner)


def test_a_rewrite_that_holds_in_one_geometry_only_is_refuted_in_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laws, "VARIATIONS", 20)
    monkeypatch.setattr(laws, "ATTEMPTS", 60)

    @rewrite(lambda x, conv, bn: bn(conv(x)))
    def reads_no_geometry(x: Value, conv: Conv, bn: BatchNorm) -> Value:
        merged = _folded(bn, conv)
        _ = conv.stride, conv.dilation, conv.padding
        return merged.changed(dilation=1)(x) if max(conv.dilation) > 1 and set(conv.stride) == {1} else merged(x)

    plain = lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)).eval()  # noqa: E731
    reads_no_geometry.fires_on(shape=(2, 2, 9, 9))(plain)
    with pytest.raises(LawError, match=r"reads_no_geometry on the example .* in another geometry: "):
        prove(reads_no_geometry, instances=1)


def test_an_activation_that_takes_part_is_not_removed() -> None:
    @rewrite(lambda x, relu: relu(x))
    def drop_relu(x: Value, relu: rgc.Activation) -> Value:
        return x

    drop_relu.fires_on(shape=(2, 3, 4, 4))(lambda: nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU()).eval())
    with pytest.raises(LawError, match=r"\[relu\] became \[nothing\], and at .* gives -\d+ instead of 0"):
        prove(drop_relu)


def test_a_factor_of_either_sign_does_not_pass_a_max_pooling() -> None:
    @rewrite(lambda x, conv, pool, scale: scale(pool(conv(x))))
    def exchange(x: Value, conv: Conv, pool: rgc.MaxPool, scale: BatchNorm) -> Value:
        _ = pool.stride, pool.padding, pool.dilation, pool.ceil_mode
        return pool((scale.as_linear() @ conv)(x))

    exchange.fires_on(shape=(2, 3, 9, 8))(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.BatchNorm2d(4)).eval()
    )
    with pytest.raises(LawError, match=r"became \[conv 3x3 3->4, max pool 2x2\]"):
        prove(exchange)


class _Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.first(x)) * torch.tanh(self.second(x))


def test_a_wrong_graph_pass_is_refuted() -> None:
    @graph_pass
    def confuse_twins(graph: Graph) -> Graph:
        """Convolutions of one form are taken for one."""
        first, *others = (value for value in graph.nodes() if isinstance(value.op, Conv))
        for other in others:
            graph.replace(other, first)
        return graph

    confuse_twins.fires_on(shape=(2, 3, 7, 6))(lambda: _Twins().eval())
    with pytest.raises(LawError, match=r"confuse_twins on the example .*: no law: "):
        prove(confuse_twins)


def test_a_wrong_graph_pass_before_an_activation_is_refuted_though_the_activation_hides_it() -> None:
    """The ReLU of -|x| - 1 is 0 whatever comes before it; an unknown function would tell."""

    @graph_pass
    def halve_first(graph: Graph) -> Graph:
        """The first convolution gets half of its weight."""
        value = next(value for value in graph.nodes() if isinstance(value.op, Conv))
        conv = value.op
        assert isinstance(conv, Conv)
        if float(conv.weight.abs().max()) >= 1:
            smaller = conv.changed(weight=torch.full_like(conv.weight, 0.5))
            graph.replace(value, Value(smaller, value.inputs, value.type, value.origin, value.name))
        return graph

    halve_first.fires_on(shape=(2, 3, 7, 6))(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid()).eval())
    with pytest.raises(LawError, match="no law"):
        prove(halve_first)


# --- what cannot be concluded --------------------------------------------------------------------------------------


def test_a_pass_without_examples_has_no_instances() -> None:
    with pytest.raises(LawError, match=r"wrong_sign: .* no example with @wrong_sign\.fires_on"):
        prove(replace(wrong_sign, examples=[]))


def test_no_instances_prove_nothing() -> None:
    with pytest.raises(LawError, match="0 instances prove nothing"):
        prove(passes.fold_border, instances=0)


def test_an_example_on_which_the_rewrite_does_not_fire_is_named() -> None:
    tried = replace(passes.fold_batchnorm, examples=[])
    tried.fires_on(shape=(2, 3, 8, 8))(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval())
    with pytest.raises(LawError, match="it does not fire on integers .its pattern does not occur., so nothing can be"):
        prove(tried)


def test_averages_over_three_cannot_be_exact() -> None:
    tried = replace(passes.merge_pointwise, examples=[])
    tried.fires_on(shape=(2, 3, 9))(lambda: nn.Sequential(nn.AvgPool1d(3), nn.Conv1d(3, 4, 1)).eval())
    with pytest.raises(LawError, match="its averages are over no power of two at any size that was tried"):
        prove(tried)


def test_equality_that_rounding_could_explain_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """With numbers so large that sums of products round, the two sides are never compared."""
    monkeypatch.setattr(laws, "RANGES", (Range(2**30, 1),))
    with pytest.raises(LawError, match="some number rounds in float64, .* so nothing can be concluded"):
        prove(passes.merge_pointwise, instances=1)


def test_smaller_numbers_are_drawn_where_the_first_round_and_the_chances_add_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = replace(passes.merge_pointwise, examples=passes.merge_pointwise.examples[:1])
    monkeypatch.setattr(laws, "RANGES", (Range(16, 1),))
    small = prove(tried, instances=10).chance
    monkeypatch.setattr(laws, "RANGES", (Range(2**30, 1), Range(16, 1)))
    both = prove(tried, instances=10).chance
    assert small is not None and both is not None
    assert both == pytest.approx(small + (5 / 2**31) ** 10, rel=1e-12)
    assert small == pytest.approx((5 / 32) ** 10)  # 1 for x, 2 for each layer


def test_a_chance_that_is_not_small_takes_more_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = replace(passes.merge_pointwise, examples=passes.merge_pointwise.examples[:1])
    monkeypatch.setattr(laws, "RANGES", (Range(8, 1),))
    law = prove(tried, instances=2)
    assert law.instances == 12 and law.chance == pytest.approx((5 / 16) ** 12) and law.chance < SMALL


def test_a_law_is_told_in_two_lines() -> None:
    first, second = str(prove(passes.fold_border, instances=3)).splitlines()
    assert re.fullmatch(r"\d forms of graph, 2 of 2 patterns, 3 integer instances of each: equal, no rounding", first)
    assert re.fullmatch(
        r"a wrong rewrite passes with a chance of at most \de-\d\d \(degree 3, .* 1024 or more\)", second
    )
    assert "not polynomial" in str(prove(passes.remove_linear_activation, instances=1))


def test_a_law_of_gelu_alone_is_neither_proved_nor_refuted() -> None:
    @rewrite(lambda x, act, pool: pool(act(x)), relies_on_range=True)
    def pool_first(x: Value, act: Activation, pool: MaxPool) -> Value:
        return act(pool(x))

    pool_first.fires_on((2, 3, 8, 8))(lambda: nn.Sequential(nn.Sigmoid(), nn.GELU(), nn.MaxPool2d(2)))
    with pytest.raises(LawError, match="gelu would round, .*, so nothing can be concluded"):
        prove(pool_first, instances=1)
