"""Are calls lifted to what they are: arithmetic with constants, stacks, means, batch norms, reshapes of any size?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rgc
from rgc.algebra import Scale
from rgc.compiler import trace
from rgc.example import output_difference
from rgc.operators import Activation, BatchNorm, ChannelMean, Clamp, Opaque, Structural
from rgc.testing import randomize

Body = Callable[[Any, Tensor], Any]


class Model(nn.Module):
    """Two parallel layers, constants per channel, and a function that ends what is linear."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.c = nn.Parameter(torch.tensor([0.5, -1.5, 2.0, 0.25]).reshape(4, 1, 1))
        self.s = nn.Parameter(torch.tensor(-1.75))
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return torch.sigmoid(self.body(self, x))


def compiled_equal(body: Body, **options: Any) -> rgc.Report:
    torch.manual_seed(0)
    model = randomize(Model(body))
    compiled = rgc.compile(model, torch.randn(2, 4, 9, 8), objective="depth", **options)
    for shape in ((2, 4, 9, 8), (1, 4, 5, 6), (5, 4, 9, 8)):
        x = torch.randn(shape)
        with torch.no_grad():
            assert output_difference(model(x.clone()), compiled(x.clone())) < 1e-5
    return compiled.report


def lifted(body: Body) -> list[Any]:
    """The operators up to the sigmoid, inputs left out."""
    return [value.op for value in trace(randomize(Model(body)), torch.randn(2, 4, 9, 8)).graph.nodes()][1:-1]


ONE_CONVOLUTION = {"Conv2d": 1, "Sigmoid": 1}


def _updated_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y += x
    y -= m.b(x)
    y *= m.c
    y /= 3
    return y  # type: ignore[no-any-return]


def _updated_by_methods(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).add_(x, alpha=2).sub_(m.b(x), alpha=0.5).mul_(m.s).div_(m.c).neg_()
    return y.addcmul_(x, m.c, value=-2).addcdiv_(x, m.c, value=3).lerp_(x, 0.25)  # type: ignore[no-any-return]


@pytest.mark.parametrize("body", [
    lambda m, x: sum([m.a(x), m.b(x), x]),
    lambda m, x: sum(conv(x) for conv in (m.a, m.b)) / 2,
    lambda m, x: torch.stack([m.a(x), m.b(x), x]).sum(0),
    lambda m, x: torch.stack((m.a(x), m.b(x)), -1).sum(-1),
    lambda m, x: torch.stack([m.a(x), m.b(x)], dim=1).mean(1),
    lambda m, x: torch.sum(torch.stack([m.a(x), m.b(x), x], dim=2), dim=[2]),
    lambda m, x: torch.mean(torch.stack([m.a(x), m.b(x), x]), dim=0),
    lambda m, x: torch.stack([m.a(x)]).sum(0) + m.b(x),
    lambda m, x: (torch.stack([m.a(x), m.b(x), x]) * m.c[1:].reshape(3, 1, 1, 1, 1)).sum(0),
    lambda m, x: (m.c[:3, 0, 0] * torch.stack([m.a(x), m.b(x), x], -1)).sum(-1),
    lambda m, x: torch.mul(torch.stack([m.a(x), m.b(x)], 1), m.c[2:].view(2, 1, 1, 1)).mean(1),
    lambda m, x: (torch.stack([m.a(x), m.b(x)]) * m.c[:2].reshape(2, 1, 1, 1, 1) * m.c[2:].view(2, 1, 1, 1, 1)).sum(0),
    lambda m, x: (torch.stack([m.a(x), m.b(x)]) / 3 * m.c[:2].reshape(2, 1, 1, 1, 1)).sum(0),
    lambda m, x: (torch.stack([m.a(x), m.b(x)]) * torch.tensor([0.0, 1.0]).view(2, 1, 1, 1, 1)).sum(0),
    lambda m, x: m.a(x) + m.a(x) + x + x,
    lambda m, x: m.a(x + x) - (x - x),
    lambda m, x: torch.add(m.a(x), m.b(x), alpha=-2.5),
    lambda m, x: torch.sub(m.a(x), m.b(x), alpha=0.5),
    lambda m, x: torch.rsub(m.a(x), m.b(x), alpha=3),
    lambda m, x: torch.add(m.s, m.a(x), alpha=2),
    lambda m, x: torch.rsub(m.a(x), 1.5),
    lambda m, x: 2 - m.a(x),
    lambda m, x: m.c - m.a(x) * m.s,
    lambda m, x: torch.neg(m.a(x)) - -x,
    lambda m, x: m.a(-x).negative(),
    lambda m, x: m.a(x) / m.c + torch.true_divide(x, 4) + torch.divide(m.b(x), m.s),
    lambda m, x: torch.addcmul(m.a(x), x, m.c, value=0.5),
    lambda m, x: torch.addcmul(m.c, m.a(x), m.s),
    lambda m, x: torch.addcmul(m.a(x), m.c, m.s, value=2),
    lambda m, x: torch.addcdiv(m.a(x), m.b(x), m.c),
    lambda m, x: torch.lerp(m.a(x), m.b(x), 0.3),
    lambda m, x: torch.lerp(m.a(x), x, m.c),
    lambda m, x: torch.lerp(m.c, m.a(x), 0.3),
    _updated_in_place,
    _updated_by_methods,
])  # fmt: skip
def test_sums_and_multiples_of_one_source_are_one_convolution(body: Body) -> None:
    report = compiled_equal(body)
    assert report.ops_after == ONE_CONVOLUTION and report.tier == "torch.fx"


def test_a_python_sum_starts_at_zero_and_leaves_no_trace() -> None:
    report = compiled_equal(lambda m, x: sum([torch.relu(m.a(x)), torch.relu(m.b(x))]))
    assert report.ops_after == {"Conv2d": 2, "ReLU": 2, "add": 1, "Sigmoid": 1}


def test_a_zero_added_in_place_of_a_copy_does_not_let_later_writes_through() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        z = 0 + y
        z += 1
        return torch.relu(z) * torch.relu(y)

    compiled_equal(body)


def test_a_write_to_the_sum_of_a_stack_of_one_leaves_the_part_alone() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        z = torch.stack([y]).sum(0)
        z += 1
        return torch.relu(z) * torch.relu(y)

    compiled_equal(body)


def test_a_write_to_a_part_of_a_weighted_stack_does_not_change_what_was_stacked() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        z = torch.stack([y, m.b(x)]) * m.c[:2].reshape(2, 1, 1, 1, 1)
        y *= 3
        return torch.relu(z.sum(0)) * torch.relu(y)

    compiled_equal(body)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_adaptive_max_pooling_is_one_operator_as_a_function_and_as_a_layer(rank: int) -> None:
    function = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)[rank - 1]
    layer = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)[rank - 1](2)
    shape = (2, 4, *(7, 6, 5)[:rank])

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return function(torch.relu(x), [2] * rank) + self.layer(torch.sigmoid(x))  # type: ignore[arg-type, operator]

    x = torch.randn(shape)
    compiled = rgc.compile(Pooled().eval(), x)
    assert compiled.report.ops_after[f"AdaptiveMaxPool{rank}d"] == 2 and torch.equal(compiled(x), Pooled().eval()(x))
    indices = rgc.compile(nn.Sequential(nn.ReLU(), type(layer)(2, return_indices=True)).eval(), x)
    assert len(indices(x)) == 2


def test_a_value_added_to_itself_is_twice_the_value() -> None:
    (_, double) = lifted(lambda m, x: (lambda y: y + y)(m.a(x)))
    assert isinstance(double, Scale) and double.scale.tolist() == [2.0]
    (_, nothing) = lifted(lambda m, x: (lambda y: y - y)(m.a(x)))
    assert isinstance(nothing, Scale) and nothing.scale.tolist() == [0.0]


@pytest.mark.parametrize("body", [
    lambda m, x: torch.stack([m.a(x), m.b(x)]).sum(),
    lambda m, x: torch.stack([m.a(x), m.b(x)]).sum(1),
    lambda m, x: torch.stack([m.a(x), m.b(x)]).sum((0, 1)),
    lambda m, x: torch.stack([m.a(x), m.b(x)]).sum(0, keepdim=True),
    lambda m, x: (torch.stack([m.a(x), m.b(x)]) + 1).sum(0),
    lambda m, x: (torch.stack([m.a(x), m.b(x)]) * m.c[:2].reshape(2, 1, 1, 1, 1)).sum(2),
    lambda m, x: (torch.stack([m.a(x), m.b(x)]) * m.c[:2].reshape(2, 1, 1, 1, 1) * torch.relu(x)).sum(0),
    lambda m, x: (torch.stack([m.a(x), m.b(x)]) * torch.linspace(1, 2, 9).reshape(9, 1)).sum(0),
    lambda m, x: torch.stack([m.a(x), m.b(x)]).mean(0, dtype=torch.float64).to(x.dtype),
    lambda m, x: torch.stack([m.a(x), torch.zeros_like(m.c.detach()).expand(4, 9, 8).expand(2, 4, 9, 8)]).amax(0),
])  # fmt: skip
def test_other_reductions_of_stacks_are_kept(body: Body) -> None:
    ops = lifted(body)
    assert any(isinstance(op, Opaque) and op.label == "stack" for op in ops)
    model = randomize(Model(body))
    x = torch.randn(2, 4, 9, 8)
    assert output_difference(model(x).detach(), rgc.compile(model, x)(x)) < 1e-5


@pytest.mark.parametrize("body", [
    lambda m, x: m.a(x) / torch.relu(x),
    lambda m, x: torch.div(m.a(x), 3, rounding_mode="floor"),
    lambda m, x: torch.addcdiv(m.a(x), x, torch.relu(x) + 1),
    lambda m, x: torch.lerp(m.a(x), x, torch.relu(x)),
    lambda m, x: m.a(x) + torch.linspace(0, 1, 8, dtype=torch.float64).expand(4, 9, 8).contiguous(),
    lambda m, x: 1 / (m.a(x).square() + 1),
])  # fmt: skip
def test_what_is_no_multiple_by_a_constant_is_kept(body: Body) -> None:
    assert any(isinstance(op, Opaque) for op in lifted(body))


# --- means over channels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [
    lambda m, x: m.a(x).mean(1, keepdim=True),
    lambda m, x: torch.mean(m.a(x), dim=-3, keepdim=True),
    lambda m, x: m.a(x).mean(dim=[1], keepdim=True),
    lambda m, x: m.a(x).mean((1,), True),
])  # fmt: skip
def test_a_mean_over_the_channels_is_linear_and_merges(body: Body) -> None:
    assert isinstance(lifted(body)[-1], ChannelMean)
    assert compiled_equal(body).ops_after == ONE_CONVOLUTION


def test_a_mean_over_the_last_axis_of_tokens_is_over_channels_too() -> None:
    linear = nn.Linear(8, 6)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.linear(x).mean(-1, keepdim=True))

    x = torch.randn(2, 5, 8)
    compiled = rgc.compile(Tokens().eval(), x, objective="depth")
    assert compiled.report.ops_after == {"Linear": 1, "Sigmoid": 1}
    torch.testing.assert_close(compiled(x), torch.sigmoid(linear(x).mean(-1, keepdim=True)))


def test_a_mean_that_stays_is_emitted_as_a_mean() -> None:
    report = compiled_equal(lambda m, x: torch.relu(x).mean(1, keepdim=True))
    assert report.ops_before == report.ops_after == {"ReLU": 1, "mean": 1, "Sigmoid": 1}


@pytest.mark.parametrize("body", [
    lambda m, x: m.a(x).mean(1),
    lambda m, x: m.a(x).mean((2, 3), keepdim=True),
    lambda m, x: m.a(x).mean((1, 2), keepdim=True),
    lambda m, x: m.a(x).mean(2, keepdim=True),
    lambda m, x: m.a(x).mean(3, keepdim=True),
    lambda m, x: m.a(x).mean(0, keepdim=True),
    lambda m, x: m.a(x).sum(1, keepdim=True),
    lambda m, x: m.a(x).mean(),
    lambda m, x: m.a(x).mean(1, keepdim=True, dtype=torch.float64),
])  # fmt: skip
def test_other_means_are_structural(body: Body) -> None:
    assert isinstance(lifted(body)[-1], Structural)


# --- batch norms ---------------------------------------------------------------------------------------------------

MEAN, VAR = torch.linspace(-1, 1, 4, dtype=torch.float64), torch.linspace(0.2, 2, 4, dtype=torch.float64)


@pytest.mark.parametrize("body", [
    lambda m, x: F.batch_norm(m.a(x), MEAN, VAR, MEAN + 0.3, VAR),
    lambda m, x: F.batch_norm(m.a(x), running_mean=MEAN, running_var=VAR, weight=None, eps=0.5),
    lambda m, x: F.batch_norm(m.a(x), MEAN, VAR, bias=MEAN, training=False),
    lambda m, x: (m.a(x) - MEAN.view(4, 1, 1)) * torch.rsqrt(VAR + 1e-3).view(1, 4, 1, 1) + MEAN.view(4, 1, 1),
    lambda m, x: (m.a(x) - MEAN.view(4, 1, 1)) / math.sqrt(2) / VAR[:, None, None].sqrt(),
])  # fmt: skip
def test_a_batch_norm_by_constants_is_folded(body: Body) -> None:
    model = Model(body).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    compiled = rgc.compile(randomize(model), x, objective="depth")
    assert compiled.report.ops_after == ONE_CONVOLUTION
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("body", [
    lambda m, x: F.batch_norm(m.a(x), None, None, training=True),
    lambda m, x: torch.batch_norm(m.a(x), MEAN, MEAN, MEAN, VAR, False, 0.1, 0.5, False),  # another order
])  # fmt: skip
def test_a_batch_norm_by_statistics_of_the_batch_or_in_an_unknown_form_is_kept(body: Body) -> None:
    ops = lifted(body)
    assert isinstance(ops[-1], Opaque) and not any(isinstance(op, BatchNorm) for op in ops)


# --- reshapes ------------------------------------------------------------------------------------------------------


class _Calls(nn.Module):
    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def _labels(forward: Callable[[Tensor], Tensor], *shape: int) -> list[str]:
    return [value.op.label for value in trace(_Calls(forward).eval(), torch.randn(shape)).graph.nodes()]


@pytest.mark.parametrize(
    "reshaped",
    [
        lambda x: torch.relu(x).reshape(x.shape[0], -1),
        lambda x: (y := torch.relu(x)).reshape(y.shape[0], y.shape[1], -1),
        lambda x: (y := torch.sigmoid(x)).view(y.size(0), y.size(1), -1),
        lambda x: torch.relu(y := torch.tanh(x)).reshape(y.shape[0], y.shape[1], -1),
        lambda x: (y := torch.relu(x)).reshape((*y.shape[:1], y.shape[1], y.shape[2], -1)),
    ],
)
def test_a_reshape_that_keeps_the_leading_axes_is_a_flatten(reshaped: Callable[[Tensor], Tensor]) -> None:
    assert "flatten" in _labels(reshaped, 2, 3, 4, 5)
    x = torch.randn(3, 3, 6, 7)
    compiled = rgc.compile(_Calls(reshaped).eval(), torch.randn(2, 3, 4, 5))
    assert torch.equal(compiled(x), reshaped(x))


@pytest.mark.parametrize(
    "reshaped",
    [
        lambda x: torch.relu(x).reshape(x.shape[1], x.shape[0], -1),
        lambda x: torch.relu(x).reshape(x.shape[0], x.shape[2], -1),
        lambda x: torch.relu(x).reshape(x.shape[0], 3, -1),
        lambda x: torch.relu(x).transpose(2, 3).reshape(x.shape[0], x.shape[1], x.shape[2], -1),
        lambda x: torch.relu(x[:, :, :3]).reshape(x.shape[0], x.shape[2], -1),
    ],
)
def test_a_reshape_by_other_lengths_is_none(reshaped: Callable[[Tensor], Tensor]) -> None:
    """Lengths that agree at the example (3 x 3 x 3 x 3) and differ elsewhere must not be taken for each other."""
    assert "flatten" not in _labels(reshaped, 3, 3, 3, 3)
    x = torch.randn(2, 3, 6, 4)
    assert torch.equal(rgc.compile(_Calls(reshaped).eval(), torch.randn(3, 3, 3, 3))(x), reshaped(x))


@pytest.mark.parametrize("leading", [lambda x: x.shape[0], lambda x: torch.relu(x).shape[0]])
def test_a_reshape_of_tokens_to_an_image_splits_the_last_axis_alone(leading: Callable[[Tensor], Any]) -> None:
    linear = nn.Linear(3, 6).eval().requires_grad_(False)

    def image(x: Tensor) -> Tensor:
        y: Tensor = linear(x.flatten(2).transpose(1, 2)).transpose(1, 2)
        return y.reshape(leading(x), 6, x.shape[2], x.shape[3])

    assert "unflatten" in _labels(image, 2, 3, 4, 5)
    compiled = rgc.compile(_Calls(image).eval(), torch.randn(2, 3, 4, 5))
    x = torch.randn(3, 3, 5, 2)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), image(x))


@pytest.mark.parametrize(
    "image",
    [
        lambda x: x.flatten(2).reshape(x.shape[0], x.shape[2], 3, x.shape[3]),
        lambda x: x.flatten(2).transpose(1, 2).reshape(x.shape[0], 9, x.shape[1], 1),
        lambda x: x.reshape(x.shape[0], 9, x.shape[3]),
    ],
)
def test_a_reshape_that_splits_other_axes_is_what_it_was(image: Callable[[Tensor], Tensor]) -> None:
    assert "unflatten" not in _labels(image, 3, 3, 3, 3)


def test_a_sum_of_a_stack_of_what_cannot_merge_stays_one_call() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(x)
            return torch.stack([self.a(x), self.b(y), self.c(torch.tanh(y))]).sum(0)

    report = rgc.compile(randomize(Heads()), torch.randn(2, 4), objective="depth").report
    assert report.ops_after["add"] == 0 and report.ops_after["stack"] == 1 and report.ops_after["sum"] == 1


@pytest.mark.parametrize(
    ("body", "calls"),
    [
        (lambda m, x: torch.minimum(m.a(x), m.c), 1),
        (lambda m, x: torch.minimum(m.c, m.a(x)), 1),
        (lambda m, x: torch.maximum(m.a(x), m.c), 1),
        (lambda m, x: m.a(x).clamp(min=m.c), 1),
        (lambda m, x: torch.clamp_max(m.a(x), m.c), 1),
        (lambda m, x: torch.clamp(m.a(x), m.c, m.c.abs() + 1), 2),
        (lambda m, x: torch.clamp(m.a(x), m.s, m.c), 2),
        (lambda m, x: torch.clamp(m.a(x), m.c, m.s), 2),  # the upper bound wins where they cross
        (lambda m, x: m.a(x).clamp_(-1.0, 1.0).clamp_min_(m.c), 2),
    ],
)
def test_bounds_along_the_channels_are_a_clamp(body: Body, calls: int) -> None:
    clamps = [op for op in lifted(body) if isinstance(op, Clamp)]
    assert len(clamps) == 1 and clamps[0].axes == 2
    counts = compiled_equal(body).ops_after
    assert counts["maximum"] + counts["minimum"] + counts["clamp"] == calls and not compiled_equal(body).opaque


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: torch.minimum(m.a(x), m.b(x)),
        lambda m, x: torch.maximum(
            m.a(x), torch.linspace(-1, 1, 9)[:, None].expand(9, 8)[:1, :1] * torch.ones(4, 1, 8)
        ),
        lambda m, x: m.a(x).clamp(m.c, m.b(x)),
        lambda m, x: m.a(x).clamp(m.c, torch.linspace(1, 2, 8)),
        lambda m, x: torch.minimum(m.a(x), m.c * math.nan),
        lambda m, x: torch.minimum(m.a(x), m.c.abs() * math.inf),
        lambda m, x: torch.minimum(m.a(x)[:, :1], m.c),  # which makes four channels of one
    ],
)
def test_bounds_that_are_none_along_the_channels_are_kept(body: Body) -> None:
    assert not [op for op in lifted(body) if isinstance(op, Clamp)]


def test_a_constant_bound_of_one_element_is_the_bound_of_all() -> None:
    assert [type(op) for op in lifted(lambda m, x: torch.minimum(m.a(x), m.s))][1:] == [Activation]


def test_a_mean_over_the_last_of_three_axes_is_one_over_channels_only_behind_a_layer_that_counts_them() -> None:
    class Mean(nn.Module):
        def __init__(self, first: nn.Module) -> None:
            super().__init__()
            self.first = first

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.first(x)
            return y + y.mean(2, keepdim=True)

    for first, is_over_channels in ((nn.Linear(6, 6), True), (nn.Conv1d(5, 5, 1), False), (nn.Identity(), False)):
        model = randomize(Mean(first))
        x = torch.randn(2, 5, 6)
        found = {type(value.op) for value in trace(model, x).graph.nodes()}
        assert (ChannelMean in found) == is_over_channels
        compiled = rgc.compile(model, x, passes="all")
        assert not compiled.report.failures
        if not is_over_channels and not compiled.report.fixed_size:
            torch.testing.assert_close(compiled(torch.ones(2, 5, 9)), model(torch.ones(2, 5, 9)))
