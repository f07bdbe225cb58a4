"""Does each operator of the vocabulary compute what PyTorch's own layer or function computes?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from rgc.algebra import Scale
from rgc.errors import GraphError, Refusal
from rgc.ir import Operator, TensorType, Value
from rgc.operators import (
    Activation,
    AdaptiveMaxPool,
    Add,
    AvgPool,
    BatchNorm,
    ChannelMean,
    Clamp,
    Concat,
    Constant,
    Flatten,
    Identity,
    MaxPool,
    Multiply,
    Normalize,
    Opaque,
    Slot,
    Structural,
    Unflatten,
    Upsample,
    average_pool_at,
    completes,
    is_adaptive_average,
)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def type_of(x: Tensor) -> TensorType:
    return TensorType(tuple(x.shape), x.dtype)


def assert_infers_its_result(op: Operator, *inputs: Tensor) -> None:
    assert op.infer(*map(type_of, inputs)) == type_of(op.evaluate(*inputs))


def random_batch_norm(rank: int, channels: int, affine: bool = True, eps: float = 1e-3) -> Any:
    norm = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[rank](
        channels, eps, affine=affine
    )
    norm = norm.double().eval()
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.copy_(random(channels, seed=1))
    norm.running_var.copy_(random(channels, seed=2).abs() + 0.1)
    if affine:
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(3))  # both signs
        nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(4))
    return norm


def lifted(norm: Any, rank: int, training: bool = False) -> BatchNorm:
    weight, bias = (None if p is None else p.detach() for p in (norm.weight, norm.bias))
    return BatchNorm(norm.running_mean, norm.running_var, weight, bias, norm.eps, rank, training)


# --- batch norm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("rank", "shape"), [(0, (3, 4)), (1, (3, 4, 5)), (2, (2, 4, 3, 5)), (3, (2, 4, 3, 2, 3))])
def test_a_batch_norm_and_its_linear_form_equal_the_layer(affine: bool, rank: int, shape: tuple[int, ...]) -> None:
    layer = random_batch_norm(rank, 4, affine)
    op = lifted(layer, rank)
    assert op.weight is None or ((op.weight > 0).any() and (op.weight < 0).any())
    x = random(*shape)
    expected = layer(x).detach()
    assert torch.equal(op.evaluate(x), expected)
    torch.testing.assert_close(op.as_linear().evaluate(x), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(op.as_conv(4, rank).evaluate(x), expected, rtol=1e-13, atol=1e-13)
    assert_infers_its_result(op, x)


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.5])
def test_the_linear_form_of_a_batch_norm_uses_its_own_eps(eps: float) -> None:
    layer = random_batch_norm(2, 4, eps=eps)
    x = random(2, 4, 3, 3)
    torch.testing.assert_close(lifted(layer, 2).as_linear().evaluate(x), layer(x).detach(), rtol=1e-13, atol=1e-13)


def test_a_batch_norm_without_gamma_but_with_beta_is_linear_too() -> None:
    mean, var, beta = random(3), random(3, seed=1).abs(), random(3, seed=2)
    x = random(2, 3, 4)
    op = BatchNorm(mean, var, None, beta, 1e-5, 1)
    expected = F.batch_norm(x, mean, var, None, beta, eps=1e-5)
    torch.testing.assert_close(op.as_linear().evaluate(x), expected, rtol=1e-13, atol=1e-13)


def test_a_batch_norm_in_training_uses_the_batch_and_is_not_linear() -> None:
    layer = random_batch_norm(2, 4)
    op = lifted(layer, 2, training=True)
    x = random(3, 4, 2, 2)
    torch.testing.assert_close(op.evaluate(x), layer.train()(x).detach())
    for linear_form in (op.as_linear, lambda: op.as_conv(4, 2)):
        with pytest.raises(Refusal, match=r"still uses batch statistics; call model.eval\(\) first"):
            linear_form()


@pytest.mark.parametrize("name", ["var", "weight", "bias"])
def test_a_batch_norm_of_unequal_lengths_cannot_be_built(name: str) -> None:
    fields = {"var": torch.ones(3), "weight": torch.ones(3), "bias": torch.ones(3)} | {name: torch.ones(4)}
    with pytest.raises(GraphError, match=rf"BatchNorm: {name} \[4\] does not fit mean \[3\]"):
        BatchNorm(torch.zeros(3), **fields, eps=1e-5, axes=2)


# --- average pooling -----------------------------------------------------------------------------------------------


@given(data=st.data())
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_average_pooling_and_its_convolution_equal_the_layer(rank: int, data: st.DataObject) -> None:
    window = tuple(data.draw(st.integers(1, 3)) for _ in range(rank))
    stride = tuple(data.draw(st.integers(1, 3)) for _ in range(rank))
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in window)
    ceil_mode, count_include_pad = data.draw(st.booleans()), data.draw(st.booleans())
    divisor = data.draw(st.sampled_from((None, 1, 5))) if rank > 1 else None
    options = (window, stride, padding, ceil_mode, count_include_pad)
    op = AvgPool(*options, divisor)
    layer = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[rank](*options, *([divisor] if rank > 1 else []))
    for n in (4, 5):
        x = random(2, 3, *[n + axis for axis in range(rank)])
        assert torch.equal(op.evaluate(x), layer(x))
        assert_infers_its_result(op, x)
        if ceil_mode or (not count_include_pad and any(padding) and divisor is None):
            with pytest.raises(Refusal, match="average fewer elements"):
                op.as_conv(3, rank)
            continue
        torch.testing.assert_close(op.as_conv(3, rank).evaluate(x), layer(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("op", "spatial", "reason"),
    [
        (AvgPool((2, 2), (2, 2), (0, 0), ceil_mode=True), 2, "avg pool 2x2 has ceil_mode, so its last windows"),
        (AvgPool((3, 3), (1, 1), (1, 1), count_include_pad=False), 2, "avg pool 3x3 has count_include_pad=False"),
        (AvgPool((3,), (1,), (1,)), 2, "avg pool 3 and its neighbour act on different axes"),
    ],
)
def test_average_pooling_that_is_no_convolution_is_refused(op: AvgPool, spatial: int, reason: str) -> None:
    with pytest.raises(Refusal, match=reason):
        op.as_conv(3, spatial)


# --- elementwise operators, constants, structure -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "eager"),
    [
        (Activation("relu"), nn.ReLU()),
        (Activation("relu6"), nn.ReLU6()),
        (Activation("gelu"), nn.GELU()),
        (Activation("gelu", (("approximate", "tanh"),)), nn.GELU(approximate="tanh")),
        (Activation("leaky_relu", (("negative_slope", 0.3),)), nn.LeakyReLU(0.3)),
        (Activation("silu"), nn.SiLU()),
        (Activation("hardswish"), nn.Hardswish()),
        (Activation("hardtanh", (("min_val", -0.5), ("max_val", 0.7))), nn.Hardtanh(-0.5, 0.7)),
        (Activation("elu", (("alpha", 0.4),)), nn.ELU(0.4)),
        (Activation("softplus", (("beta", 2.0),)), nn.Softplus(2.0)),
        (Activation("sigmoid"), nn.Sigmoid()),
        (Activation("tanh"), nn.Tanh()),
        (Activation("exp"), torch.exp),
        (Activation("clamp", (("max", 0.5), ("min", -0.25))), lambda x: x.clamp(-0.25, 0.5)),
        (Activation("square"), lambda x: x * x),
        (Activation("prelu", weight=torch.tensor([0.1, -0.2, 0.3]).double()), None),
        (Identity(), nn.Identity()),
        (Identity("dropout"), nn.Dropout(0.5).eval()),
    ],
    ids=lambda each: each.label if isinstance(each, Operator) else "",
)
def test_an_elementwise_operator_equals_the_layer(op: Operator, eager: Callable[[Tensor], Tensor] | None) -> None:
    x = 3 * random(2, 3, 5)
    weight = getattr(op, "weight", None)
    expected = F.prelu(x, weight) if eager is None else eager(x)
    assert torch.equal(op.evaluate(x), expected)
    assert_infers_its_result(op, x)


@pytest.mark.parametrize("axes", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_clamp_bounds_each_channel_by_itself_and_no_other_by_one_bit(axes: int, dtype: torch.dtype) -> None:
    inf = math.inf
    op = Clamp(torch.tensor([-inf, 0.0, -inf, 0.0]), torch.tensor([inf, 6.0, -1.0, inf]), axes).cast(dtype)
    x = random(2, 5, 4, *(3, 2, 3)[:axes], dtype=dtype) * 10000
    expected = x.clone().movedim(-1 - axes, 0)
    expected[1], expected[2], expected[3] = F.relu6(expected[1]), expected[2].clamp(max=-1), expected[3].relu()
    assert torch.equal(op.evaluate(x), expected.movedim(0, -1 - axes))
    assert_infers_its_result(op, x)
    assert op.spatial_axes(type_of(x)) == axes and op.label == "clamp 4"


def test_a_clamp_says_on_which_sides_it_bounds() -> None:
    none, some = torch.full((2,), math.inf), torch.tensor([1.0, math.inf])
    assert [bound is not None for bound in Clamp(-none, some, 0).bounds] == [False, True]
    assert [bound is not None for bound in Clamp(-some, none, 0).bounds] == [True, False]


@pytest.mark.parametrize(
    ("lower", "upper", "message"),
    [
        (torch.zeros(2), torch.zeros(3), r"a lower and an upper bound for each channel, got \[2\] and \[3\]"),
        (torch.zeros(2, 1), torch.zeros(2, 1), "for each channel"),
        (torch.tensor([math.nan]), torch.zeros(1), "not a number"),
        (torch.tensor([-math.inf]), torch.tensor([math.inf]), "bounds nothing"),
    ],
)
def test_a_clamp_without_sense_cannot_be_built(lower: Tensor, upper: Tensor, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        Clamp(lower, upper, 2)


def test_a_clamp_of_other_channels_is_refused() -> None:
    with pytest.raises(GraphError, match="expects 2 channels before 2 axes, got"):
        Clamp(torch.zeros(2), torch.ones(2), 2).infer(TensorType((1, 3, 4, 4), torch.float32))


def test_an_option_left_out_is_the_default() -> None:
    op = Activation("leaky_relu", (("negative_slope", 0.3),))
    assert op.option("negative_slope", 0.01) == 0.3
    assert op.option("other", 7) == 7


@pytest.mark.parametrize(("a", "b"), [((2, 3, 4), (2, 3, 4)), ((2, 3, 4), (3, 1)), ((1, 4), (2, 3, 1)), ((), (2,))])
def test_sums_and_products_broadcast_like_the_functions(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    x, y = random(*a), random(*b, seed=1)
    for op, expected in ((Add(), x + y), (Add(-1), x - y), (Multiply(), x * y)):
        assert torch.equal(op.evaluate(x, y), expected)
        assert_infers_its_result(op, x, y)
    assert [Add().label, Add(-1).label] == ["add", "sub"]


def test_the_type_of_a_sum_promotes_and_stays_fixed() -> None:
    half, single = TensorType((2,), torch.float16, fixed=True), TensorType((3, 1), torch.float32)
    assert Add().infer(half, single) == TensorType((3, 2), torch.float32, fixed=True)
    assert Multiply().infer(half, None) is None


@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_a_concatenation_equals_the_function_and_does_not_mind_a_batch_axis(axis: int) -> None:
    x, y = random(2, 2, 2), random(2, 2, 2, seed=1)
    assert torch.equal(Concat(axis).evaluate(x, y, x), torch.cat((x, y, x), axis))
    assert torch.equal(Concat(axis).evaluate(x[None], y[None])[0], torch.cat((x, y), axis))
    assert_infers_its_result(Concat(axis), x, y)


def test_a_constant_is_its_tensor() -> None:
    tensor = random(2, 3)
    assert Constant(tensor).evaluate() is tensor
    assert_infers_its_result(Constant(tensor))
    assert Constant(tensor).cast(torch.float16).evaluate().dtype == torch.float16
    assert Constant(torch.tensor([1, 2])).cast(torch.float16).evaluate().dtype == torch.int64


def test_flattening_and_unflattening_undo_each_other() -> None:
    x = random(2, 3, 4, 5)
    flatten, unflatten = Flatten((3, 4, 5)), Unflatten((3, 4, 5))
    assert torch.equal(flatten.evaluate(x), x.flatten(1))
    assert torch.equal(unflatten.evaluate(flatten.evaluate(x)), x)
    assert not flatten.any_size
    assert_infers_its_result(flatten, x)
    assert_infers_its_result(unflatten, x.flatten(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Add(2), "Add: sign must be 1 or -1, got 2"),
        (lambda: Concat(1), r"Concat: axis 1 must be counted from the end \(negative\)"),
        (lambda: Flatten((3, 4)).evaluate(random(2, 3, 5)), r"flatten: holds for samples of \[3, 4\], got \[3, 5\]"),
        (
            lambda: Flatten((3, 4)).infer(type_of(random(2, 3, 5))),
            r"flatten: holds for samples of \[3, 4\], got float64\[2, 3, 5\]",
        ),
        (lambda: Flatten((3, 4)).infer(None), r"flatten: holds for samples of \[3, 4\], got None"),
        (
            lambda: Unflatten((3, 4)).infer(type_of(random(2, 11))),
            r"unflatten: float64\[2, 11\] does not hold samples of \[3, 4\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        call()


# --- calls ---------------------------------------------------------------------------------------------------------


def test_the_inputs_of_a_call_stand_in_their_slots_however_deep() -> None:
    call = Opaque("target", (Slot(1), [Slot(0), {"deep": (Slot(1), 5)}]), (("other", Slot(0)), ("flag", True)))
    args, kwargs = call.arguments(("zero", "one"))
    assert args == ("one", ["zero", {"deep": ("one", 5)}])
    assert kwargs == {"other": "zero", "flag": True}


@pytest.mark.parametrize(
    ("op", "eager", "label"),
    [
        (Structural("reshape", (Slot(0), 2, -1)), lambda x: x.reshape(2, -1), "reshape"),
        (Structural("mean", (Slot(0), (2, 3)), (("keepdim", True),)), lambda x: x.mean((2, 3), keepdim=True), "mean"),
        (Structural(F.pad, (Slot(0), (1, 2)), (("value", 0.0),)), lambda x: F.pad(x, (1, 2)), "pad"),
        (Opaque(torch.softmax, (Slot(0),), (("dim", 1),)), lambda x: x.softmax(1), "softmax"),
        (Opaque(F.max_pool2d, (Slot(0), 2)), nn.MaxPool2d(2), "max_pool2d"),
        (Opaque(nn.Softmax(dim=1), (Slot(0),)), nn.Softmax(dim=1), "Softmax"),
        (Opaque(torch.cat, ([Slot(0), Slot(0)], 1)), lambda x: torch.cat([x, x], 1), "cat"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_call_equals_the_call(op: Operator, eager: Callable[[Tensor], Tensor], label: str) -> None:
    x = random(2, 3, 4, 6)
    assert torch.equal(op.evaluate(x), eager(x))
    assert op.label == label
    assert_infers_its_result(op, x)


def test_a_call_that_returns_no_tensor_has_no_type() -> None:
    assert Opaque("chunk", (Slot(0), 2)).infer(type_of(random(2, 4))) is None
    assert Opaque("relu", (Slot(0),)).infer(None) is None


def test_casting_a_call_converts_a_copy_of_its_module_and_its_tensors_and_dtypes() -> None:
    layer = nn.Linear(2, 3)
    cast = Opaque(layer, (Slot(0),)).cast(torch.float64)
    assert cast.evaluate(random(1, 2)).dtype == torch.float64
    assert layer.weight.dtype == torch.float32
    assert [t.dtype for t in cast.tensors()] == [torch.float64] * 2
    traced_in_float64 = Opaque("to", (Slot(0), torch.float64)).cast(torch.float32)
    assert traced_in_float64.evaluate(random(2)).dtype == torch.float32
    as_written = Opaque("to", (Slot(0), torch.float32)).cast(torch.float16)
    assert as_written.evaluate(random(2)).dtype == torch.float32
    embed = Opaque(F.embedding, (Slot(0), torch.ones(4, 2)), (("padding_idx", 0),)).cast(torch.float64)
    assert embed.evaluate(torch.tensor([1])).dtype == torch.float64
    assert [t.dtype for t in embed.tensors()] == [torch.float64]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_casting_converts_parameters_and_leaves_the_operator_alone(dtype: torch.dtype) -> None:
    norm = lifted(random_batch_norm(2, 3), 2).cast(torch.float32)
    cast = norm.cast(dtype)
    assert {t.dtype for t in cast.tensors()} == {dtype}
    assert {t.dtype for t in norm.tensors()} == {torch.float32}
    assert (cast.eps, cast.axes) == (norm.eps, norm.axes)


def test_applying_an_operator_makes_a_value_of_the_inferred_type() -> None:
    x = Value(Constant(torch.ones(2, 3)), (), TensorType((2, 3), torch.float32))
    total = Add()(x, x)
    assert total.inputs == (x, x) and total.type == TensorType((2, 3), torch.float32)


def test_labels_are_what_a_user_would_say() -> None:
    assert lifted(random_batch_norm(2, 3), 2).label == "batch norm 3"
    assert AvgPool((2, 3), (2, 2), (0, 0)).label == "avg pool 2x3"
    assert [Concat(-1).label, Multiply().label, Identity("dropout").label] == ["concat", "multiply", "dropout"]


# --- resamplings ---------------------------------------------------------------------------------------------------


@given(data=st.data())
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_max_pooling_equals_the_layer_and_commutes_with_what_increases(rank: int, data: st.DataObject) -> None:
    window = tuple(data.draw(st.integers(1, 3)) for _ in range(rank))
    stride = tuple(data.draw(st.integers(1, 3)) for _ in range(rank))
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in window)
    dilation = tuple(data.draw(st.integers(1, 2)) for _ in range(rank))
    ceil_mode = data.draw(st.booleans())
    op = MaxPool(window, stride, padding, dilation, ceil_mode)
    layer = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[rank](
        window, stride, padding, dilation, False, ceil_mode
    )
    x = random(2, 3, *[6 + axis for axis in range(rank)])
    assert torch.equal(op.evaluate(x), layer(x))
    assert_infers_its_result(op, x)
    assert op.resampled(type_of(x)) == rank and op.keeps_constants
    assert torch.equal(op.evaluate(x**3 + x), op.evaluate(x) ** 3 + op.evaluate(x))
    assert torch.equal(op.evaluate(torch.ones_like(x)), torch.ones_like(op.evaluate(x)))


UPSAMPLES = [
    {"scale_factor": 2.0},
    {"scale_factor": (1.5, 0.5), "mode": "nearest-exact"},
    {"size": (5, 9), "mode": "bilinear", "align_corners": True},
    {"scale_factor": 1.7, "mode": "bilinear", "recompute_scale_factor": True},
    {"scale_factor": 2.0, "mode": "bicubic"},
    {"size": (3, 2), "mode": "area"},
]


@pytest.mark.parametrize("options", UPSAMPLES, ids=str)
def test_upsampling_equals_the_layer_is_linear_and_keeps_constants(options: dict[str, Any]) -> None:
    given = {
        name: (value, value) if name == "scale_factor" and isinstance(value, float) else value
        for name, value in options.items()
    }
    op, layer = Upsample(2, **given), nn.Upsample(**options)
    x, y = random(2, 3, 4, 6), random(2, 3, 4, 6, seed=1)
    assert torch.equal(op.evaluate(x), layer(x))
    assert_infers_its_result(op, x)
    assert op.affine and op.keeps_constants and op.resampled(type_of(x)) == 2
    torch.testing.assert_close(op.evaluate(2 * x - y), 2 * op.evaluate(x) - op.evaluate(y), rtol=1e-12, atol=1e-12)
    ones = torch.ones_like(x)
    torch.testing.assert_close(op.evaluate(ones), torch.ones_like(op.evaluate(x)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("op", "axes"),
    [
        (AvgPool((2, 2), (2, 2), (0, 0)), 2),
        (Structural(nn.AdaptiveAvgPool2d(1), (Slot(0),)), 2),
        (Structural(F.adaptive_avg_pool2d, (Slot(0), (2, 1))), 2),
        (Structural(torch.ops.aten.adaptive_avg_pool2d.default, (Slot(0), [1, 1])), 2),
        (Structural("mean", (Slot(0), (2, 3))), 2),
        (Structural("mean", (Slot(0), -1, True)), 1),
        (Structural("mean", (Slot(0),), (("dim", (-2,)), ("keepdim", True))), 2),
        (Structural("mean", (Slot(0), 1)), 3),
        (Structural(torch.ops.aten.mean.dim, (Slot(0), [-1, -2], True)), 2),
        (Structural(torch.flip, (Slot(0), (2,))), 2),
        (Structural("flip", (Slot(0), 2, -1)), 2),
        (Structural(torch.flip, (Slot(0),), (("dims", [3]),)), 1),
        (Structural("mean", (Slot(0),)), None),
        (Structural("mean", (Slot(0), (2, 3)), (("dtype", torch.float32),)), None),
        (Structural("sum", (Slot(0), (2, 3))), None),
        (Structural(torch.flatten, (Slot(0), 1)), None),
        (Activation("relu"), None),
        (Scale(torch.ones(1), torch.zeros(1)), None),
    ],
)
def test_an_operator_knows_which_axes_it_resamples(op: Operator, axes: int | None) -> None:
    x = random(2, 3, 4, 6)
    assert op.resampled(type_of(x)) == axes
    if axes is None or axes > 2:
        return
    mix = random(3, 3, seed=5)
    mixed = torch.einsum("oc,nc...->no...", mix, op.evaluate(x))
    torch.testing.assert_close(op.evaluate(torch.einsum("oc,nc...->no...", mix, x)), mixed, rtol=1e-12, atol=1e-12)
    ones = torch.ones_like(x)
    assert op.keeps_constants == torch.allclose(op.evaluate(ones), torch.ones_like(op.evaluate(x)))


@pytest.mark.parametrize(
    ("options", "keeps"),
    [
        ({"padding": (0, 0)}, True),
        ({"padding": (1, 0)}, False),
        ({"padding": (1, 0), "count_include_pad": False}, True),
        ({"padding": (0, 0), "divisor_override": 3}, False),
        ({"padding": (1, 1), "count_include_pad": False, "divisor_override": 3}, False),
        ({"padding": (0, 0), "ceil_mode": True}, True),
        ({"padding": (1, 1), "ceil_mode": True, "count_include_pad": False}, True),
    ],
)
def test_average_pooling_keeps_constants_unless_it_counts_padding(options: dict[str, Any], keeps: bool) -> None:
    op = AvgPool((2, 2), (2, 2), **options)
    ones = torch.ones(1, 1, 5, 4, dtype=torch.float64)
    assert op.keeps_constants == keeps == bool((op.evaluate(ones) == 1).all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaxPool((2, 2), (2,), (0, 0), (1, 1)), "must name the same axes, 1 to 3 of them"),
        (lambda: MaxPool((), (), (), ()), "must name the same axes, 1 to 3 of them"),
        (lambda: Upsample(2), "Upsample: needs either a size or a scale factor, got None, None"),
        (lambda: Upsample(2, (2, 2), (2.0, 2.0)), "Upsample: needs either a size or a scale factor"),
        (lambda: Upsample(2, (2,)), r"Upsample: \(2,\) does not name 2 axes, 1 to 3 of them"),
    ],
)
def test_a_resampling_that_fits_no_layer_cannot_be_built(make: Callable[[], object], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        make()


def test_labels_of_resamplings() -> None:
    assert MaxPool((3, 2), (1, 1), (0, 0), (1, 1)).label == "max pool 3x2"
    assert Upsample(2, (8, 9), mode="bilinear").label == "upsample bilinear to 8x9"
    assert Upsample(2, scale_factor=(2.0, 1.5)).label == "upsample nearest by 2x1.5"


def test_a_call_has_one_name_however_it_is_written() -> None:
    targets = ("mean", torch.mean, torch.ops.aten.mean.dim)
    assert {Structural(target, (Slot(0),)).name for target in targets} == {"mean"}
    assert Structural(nn.Flatten(), (Slot(0),)).name == "Flatten"


# --- means over channels, and normalisations ---------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "axes"), [((3, 4), 0), ((2, 5, 4), 0), ((2, 4, 5), 1), ((2, 4, 3, 5), 2)])
def test_a_mean_over_channels_and_its_convolution_equal_torchs_mean(shape: tuple[int, ...], axes: int) -> None:
    op, x = ChannelMean(4, axes), random(*shape)
    expected = x.mean(len(shape) - 1 - axes, keepdim=True)
    assert torch.equal(op.evaluate(x), expected)
    torch.testing.assert_close(op.as_conv(4, axes).evaluate(x), expected, rtol=1e-14, atol=1e-14)
    assert (op.channels, op.spatial) == ((4, 1), axes)
    assert_infers_its_result(op, x)


def test_a_mean_over_channels_names_what_does_not_fit() -> None:
    with pytest.raises(Refusal, match="act on different axes"):
        ChannelMean(4, 2).as_conv(4, 1)
    with pytest.raises(GraphError, match="4 channels meet a tensor of 5 channels"):
        ChannelMean(4, 2).as_conv(5, 2)
    with pytest.raises(GraphError, match=r"expects 4 channels before 2 axes, got float64\[2, 5, 3, 3\]"):
        ChannelMean(4, 2).infer(type_of(random(2, 5, 3, 3)))


@pytest.mark.parametrize(("op", "shape", "expected"), [
    (Normalize("layer", (4,), 0.1), (2, 3, 4), lambda x: F.layer_norm(x, (4,), eps=0.1)),
    (Normalize("layer", (3, 4), 0.1), (2, 3, 4), lambda x: F.layer_norm(x, (3, 4), eps=0.1)),
    (Normalize("rms", (4,), None), (2, 3, 4), lambda x: F.rms_norm(x, (4,))),
    (Normalize("group", (4,), 0.1, 2), (2, 4, 3, 5), lambda x: F.group_norm(x, 2, eps=0.1)),
    (Normalize("instance", (4,), 0.1), (2, 4, 3, 5), lambda x: F.instance_norm(x, eps=0.1)),
])  # fmt: skip
def test_a_normalisation_equals_torchs_without_weights(op: Normalize, shape: tuple[int, ...], expected: Any) -> None:
    x = random(*shape) + 3
    assert torch.equal(op.evaluate(x), expected(x))
    assert_infers_its_result(op, x)


def test_a_normalisation_that_makes_no_sense_cannot_be_built() -> None:
    with pytest.raises(GraphError, match="group norm takes a number of channels"):
        Normalize("group", (4, 4), 0.1, 2)
    with pytest.raises(GraphError, match="4 channels do not divide into 3 groups"):
        Normalize("group", (4,), 0.1, 3)


def test_one_layer_does_a_normalisation_with_weights_along_its_own_axis_only() -> None:
    per_channel = [Scale(random(4), random(4, seed=1), axes) for axes in (0, 2)]
    layer, group, rms = Normalize("layer", (4,), 0.1), Normalize("group", (4,), 0.1, 2), Normalize("rms", (4,), 0.1)
    assert [layer.takes(scale, 4) for scale in per_channel] == [True, False]
    assert [group.takes(scale, 4) for scale in per_channel] == [False, True]
    assert [group.takes(scale, 2) for scale in per_channel] == [True, False]
    assert not Normalize("layer", (3, 4), 0.1).takes(per_channel[0], 3)
    assert not rms.takes(per_channel[0], 3) and rms.takes(Scale(random(4), torch.zeros(4), 0), 3)
    x = Value(Identity(), (), type_of(random(2, 3, 4)))
    assert completes(per_channel[0](layer(x)))
    assert not completes(per_channel[0](x)) and not completes(Identity()(layer(x)))


@given(
    n=st.integers(1, 12), window=st.integers(1, 4), stride=st.integers(1, 4), padding=st.integers(0, 2),
    ceil_mode=st.booleans(), count=st.booleans(), divisor=st.sampled_from([None, None, 3]), plane=st.booleans(),
)  # fmt: skip
def test_an_average_pooling_is_plain_at_just_the_sizes_where_a_plain_one_gives_the_same(
    n: int, window: int, stride: int, padding: int, ceil_mode: bool, count: bool, divisor: int | None, plane: bool
) -> None:
    """Padding that is not counted is refused at every size, although some size may hide it."""
    assume(2 * padding <= window <= n + 2 * padding)
    rank = 2 if plane or divisor is not None else 1
    pool = AvgPool((window,) * rank, (stride,) * rank, (padding,) * rank, ceil_mode, count, divisor)
    x = random(1, 2, *[n] * rank)
    plain = dataclasses.replace(pool, ceil_mode=False, count_include_pad=True)
    given_, wanted = pool.evaluate(x), plain.evaluate(x)
    same = given_.shape == wanted.shape and torch.allclose(given_, wanted, atol=1e-12)
    there = pool.at((n,) * rank)
    uneven = padding > 0 and not count and divisor is None
    if uneven or not same:
        with pytest.raises(Refusal, match="average fewer elements"):
            there.as_conv(2, rank)
        return
    assert torch.allclose(there.as_conv(2, rank).evaluate(x), given_, atol=1e-12)
    assert there.any_size == (not ceil_mode or stride == 1)
    assert pool.at(None).ceil_mode == (ceil_mode and stride > 1)


def test_an_average_pooling_that_was_made_plain_at_a_size_holds_there_only() -> None:
    pool = AvgPool((2,), (2,), (0,), ceil_mode=True).at((6,))
    assert pool.size == (6,) and not pool.any_size and pool.as_conv(3, 1).size == (6,)
    with pytest.raises(GraphError, match=r"avg pool 2: holds at \(6,\) only, got \[1, 3, 7\]"):
        pool.evaluate(random(1, 3, 7))
    stride_of_one = AvgPool((2,), (1,), (0,), ceil_mode=True).at(None)
    assert stride_of_one.any_size and not stride_of_one.ceil_mode


@pytest.mark.parametrize(
    ("call", "size", "wanted"),
    [
        (Structural(F.adaptive_avg_pool1d, (Slot(0), 3)), (12,), (4,)),
        (Structural(F.adaptive_avg_pool2d, (Slot(0), (3, None))), (9, 5), (3, 1)),
        (Structural(nn.AdaptiveAvgPool2d((1, 2)), (Slot(0),)), (7, 6), (7, 3)),
        (Structural(nn.AdaptiveAvgPool3d(2), (Slot(0),)), (4, 6, 2), (2, 3, 1)),
    ],
)
def test_an_adaptive_average_pooling_to_a_divisor_is_a_plain_one(
    call: Structural, size: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    x = random(2, 3, *size)
    pool = average_pool_at(call, TensorType(tuple(x.shape), x.dtype, fixed=True))
    assert is_adaptive_average(call) and pool.window == pool.stride == wanted and pool.size == size
    assert torch.allclose(pool.evaluate(x), call.evaluate(x), atol=1e-12)


@pytest.mark.parametrize(
    ("call", "fixed", "reason"),
    [
        (Structural(F.adaptive_avg_pool1d, (Slot(0), 5)), True, r"windows of several sizes: \[12\] is no multiple of"),
        (Structural(F.adaptive_avg_pool1d, (Slot(0), 3)), False, "windows of one size at a fixed size only"),
        (Structural("mean", (Slot(0), -1)), True, "mean is no adaptive average pooling"),
    ],
)
def test_an_adaptive_average_pooling_of_uneven_windows_is_no_plain_one(
    call: Structural, fixed: bool, reason: str
) -> None:
    with pytest.raises(Refusal, match=reason):
        average_pool_at(call, TensorType((2, 3, 12), torch.float64, fixed))


@pytest.mark.parametrize("layer", [
    nn.AdaptiveMaxPool1d(3), nn.AdaptiveMaxPool2d((2, 5)), nn.AdaptiveMaxPool2d((None, 3)), nn.AdaptiveMaxPool3d(2),
], ids=str)  # fmt: skip
def test_an_adaptive_max_pool_is_the_layer_of_its_name(layer: nn.Module) -> None:
    rank = int(type(layer).__name__[-2])
    given_: Any = layer.output_size
    op = AdaptiveMaxPool(given_ if isinstance(given_, tuple) else (given_,) * rank)
    x = random(2, 3, *(7, 9, 8)[:rank])
    assert torch.equal(op.evaluate(x), layer(x))
    made = op.infer(TensorType(tuple(x.shape), x.dtype))
    assert made is not None and made.shape == tuple(layer(x).shape)
    assert op.resampled(made) == rank and op.keeps_constants and op.label.startswith("max pool to ")


def test_an_adaptive_max_pool_names_one_to_three_axes() -> None:
    with pytest.raises(GraphError, match=r"\(\) must name 1 to 3 axes"):
        AdaptiveMaxPool(())


def test_a_copy_has_memory_of_its_own_and_other_identities_have_not() -> None:
    x = random(2, 3)
    assert Identity("clone", copies=True).evaluate(x).data_ptr() != x.data_ptr()
    assert Identity("detach").evaluate(x) is x
