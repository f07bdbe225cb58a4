"""How far can rounding take a compiled model from its original? A running error analysis, for any order of summation.

Three runs of one graph are followed together: as it is computed, each sum in whatever order; with its stored weights in
the reals; and with the weights as they were before they were stored. Every value carries a bound, element by element,
on the distance between any two of them (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sections 3.1
and 3.3). With u the unit roundoff and gamma_n = n u / (1 - n u), a linear operator takes a distance e to

    |W| e + (gamma_{K+1} + u) (|W| (|x| + e) + |b|),

where |W| is the same operator with the absolute values of its weights, K the terms of a sum, and the last u the one
rounding of the stored weights. An elementwise function takes e to L e, with L its Lipschitz constant on [x - e, x + e],
and what only moves elements moves their bounds. A function without a rule ends the analysis of what depends on it, and
its name is the reason that is given. Over many layers such bounds multiply, far beyond what rounding does; so each
layer is also held against its own bound by itself, on the inputs that it really got (e = 0), sharp at any depth.

What is taken for granted, and cannot be proved from outside of the kernels:

- Sums are sums of products in some order, fused or not. Winograd, FFT and Strassen kernels are not. On the CPU, PyTorch
  asks oneDNN for direct convolutions; cuDNN chooses for itself.
- float16 and bfloat16 are summed in float32 and rounded when they are stored, at most twice a call (a product, then its
  bias). float32 is not cut to TF32 on the way, unless PyTorch's switches allow it: then that is counted.
- The elementwise functions of the kernels are within `UNITS` units in the last place of the terms of their formulas,
  those of softmax within `EXP_UNITS` (PyTorch's CPU kernel says 20 of its exponential).
- Results below the smallest normal number may be flushed to zero, except in float16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_map

from rgc.algebra import Conv, Scale
from rgc.errors import NotEquivalentError, TraceError
from rgc.example import Example
from rgc.ir import Input, Operator, Value, evaluate_value
from rgc.lift import Source, lift
from rgc.operators import (
    Activation,
    AdaptiveMaxPool,
    Add,
    AvgPool,
    BatchNorm,
    Call,
    ChannelMean,
    Clamp,
    Concat,
    Constant,
    Flatten,
    Identity,
    MaxPool,
    Multiply,
    Normalize,
    Slot,
    Unflatten,
    Upsample,
)
from rgc.precision import in_float64
from rgc.rearrange import Assign, BorderFill, Pad, PixelShuffle, Rearrangement
from rgc.report import ErrorBound, OutputBound

#: Units in the last place by which an elementwise function of a kernel may be off, on the terms of its formula.
UNITS = 8
#: The same for the exponential inside of a softmax.
EXP_UNITS = 32

_DOUBLE = 2.0**-53
_TF32 = 2.0**-11


class _Unbounded(Exception):  # noqa: N818 - a reason as much as an error
    """There is no rule for a call, or none that holds for its arguments."""


@dataclass(frozen=True)
class Arithmetic:
    """How a dtype rounds: ``unit`` when a value is stored, ``sums`` inside of a kernel.

    >>> Arithmetic.of(torch.float32).gamma(10) < 10.1 * 2.0**-24
    True
    """

    dtype: torch.dtype
    unit: float
    sums: float
    tiny: float
    products: float = 0.0  # the rounding of both factors of a product on their way in (TF32)

    @staticmethod
    def of(dtype: torch.dtype, device: torch.device | None = None) -> Arithmetic:
        """The arithmetic of PyTorch's kernels for ``dtype``."""
        info = torch.finfo(dtype)
        is_half = dtype in (torch.float16, torch.bfloat16)
        tiny = info.smallest_normal * (info.eps if dtype == torch.float16 else 1.0)
        on_cuda = device is not None and device.type == "cuda" and dtype == torch.float32
        cuts = on_cuda and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
        sums = torch.finfo(torch.float32).eps / 2 if is_half else info.eps / 2
        return Arithmetic(dtype, info.eps / 2, sums, tiny, 2 * _TF32 + _TF32**2 if cuts else 0.0)

    def gamma(self, count: float, stored: int = 0, calls: int = 1) -> float:
        """Relative rounding of ``count`` operations in ``calls`` kernels, of factors of which ``stored`` are rounded.

        Includes what the float64 evaluation, by which the bound itself is computed, may be off.
        """
        if count * self.sums >= 1:
            return math.inf
        inside = count * self.sums / (1 - count * self.sums)
        outside = (1 + self.unit) ** (calls if self.unit > self.sums else 0) / (1 - self.unit) ** stored
        return ((1 + inside) * outside - 1 + 2 * count * _DOUBLE) * (1 + 1e-9)

    def rounding(self, count: float, magnitude: Tensor, stored: int = 0, calls: int = 1) -> Tensor:
        """The absolute rounding of ``count`` operations on terms of this total magnitude."""
        return self.gamma(count, stored, calls) * magnitude + (count + stored + calls) * self.tiny


@dataclass(frozen=True)
class Bounded:
    """A value in float64 and, in the same structure, the distance bounds of its elements.

    A bound is None for what holds no floating-point numbers, and a sentence where there is none.
    """

    value: Any
    error: Any

    @property
    def size(self) -> Tensor:
        """|x| + e: no run is larger."""
        return cast(Tensor, self.value.abs() + self.error)


def bound_errors(module: fx.GraphModule, example: Example, expected: Any, difference: float) -> ErrorBound:
    """Bounds and measured distances of ``module`` on ``example``: of each layer by itself, and of each output.

    example: in the dtype of the module and on its device. expected: what the original makes of it in float64.
    difference: the distance of the two in float64, relative to the scale of an output, which is added. Raises
    `NotEquivalentError` where a measured distance is beyond its bound, with the name of the layer.
    """
    floats = [each for each in [*module.parameters(), *module.buffers(), *example.tensors] if each.is_floating_point()]
    dtype, device = next(((each.dtype, each.device) for each in floats), (torch.float32, None))
    analysis = _Analysis(Arithmetic.of(dtype, device))
    found, references = _tensors(example.run(module)), _tensors(expected)
    try:
        bounds = analysis.run(module, example)
    except TraceError as error:
        bounds = [f"no bound: the result cannot be traced ({error})"] * len(found)
    if not len(found) == len(references) == len(bounds):
        bounds = [f"no bound: it returns {len(found)} tensors, the original {len(references)}"] * len(found)
        references = found
    results = [
        _held_against(index, output, reference, bound, difference)
        for index, (output, reference, bound) in enumerate(zip(found, references, bounds, strict=True))
        if bound is not None and output.is_floating_point() and output.numel()
    ]
    return ErrorBound(tuple(results), analysis.layers, analysis.share, analysis.layer)


def _held_against(index: int, output: Tensor, reference: Tensor, bound: Any, difference: float) -> OutputBound:
    reference = reference.to(output.device).double()
    scale = float(reference.abs().max()) or 1.0
    distance = (output.double() - reference).abs()
    measured = float(distance.max()) / scale
    if isinstance(bound, str):
        return OutputBound(index, None, measured, bound)
    total = bound + difference * scale
    if not bool((distance <= total).all()):
        raise NotEquivalentError(f"output {index} {_beyond(float((distance - total).max()) / scale)}")
    return OutputBound(index, float(total.max()) / scale, measured)


def _beyond(excess: float) -> str:
    return (
        f"is off by {excess:.1e} of its scale more than rounding explains in any order of summation; that is a fault, "
        "unless a kernel does not sum the products themselves (Winograd, FFT, reduced precision: see docs/proof.md)"
    )


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]


class _Analysis:
    """One walk over a graph; afterwards ``layers``, ``share`` and ``layer`` say how layers did by themselves."""

    def __init__(self, arithmetic: Arithmetic) -> None:
        self.arithmetic = arithmetic
        self.layers, self.share, self.layer = 0, 0.0, ""

    def run(self, module: fx.GraphModule, example: Example) -> list[Any]:
        """For each tensor that ``module`` returns its bounds, None, or why there are none."""
        wide = example.cast(torch.float64)
        with torch.no_grad(), in_float64():
            source = Source(module.graph, module, wide.bind(module), {}, lambda output: output)
            graph = lift(source, self.arithmetic.dtype, fixed=True)
        order = graph.nodes()
        last_use = {used: index for index, value in enumerate(order) for used in value.inputs}
        keep = set(graph.output_values)
        known: dict[Value, Bounded] = {}
        computed: dict[Value, Any] = {}
        precise, deployed = wide.bind(module), example.cloned().bind(module)
        for index, value in enumerate(order):
            with torch.no_grad(), in_float64():
                known[value] = self._bounded(value, [known[used] for used in value.inputs], precise)
            given = [computed[used] for used in value.inputs]
            with torch.no_grad():
                computed[value] = evaluate_value(value, given, deployed, self.arithmetic.dtype)
            if _rounds(value.op):
                self._check_layer(value, given, computed[value])
            for used in set(value.inputs):
                if last_use[used] == index and used not in keep:
                    del known[used], computed[used]
        leaves = [known[leaf] for leaf in graph.output_values]
        return [each for leaf in leaves for each in _spread(leaf.error, len(_tensors(leaf.value)))]

    def _bounded(self, value: Value, inputs: list[Bounded], named: Mapping[str, Any]) -> Bounded:
        result = evaluate_value(value, [each.value for each in inputs], named)
        if not _floats(result):
            asks_for_form = isinstance(value.op, Call) and value.op.name in _FORM
            if asks_for_form or all(each.error is None for each in inputs):
                return Bounded(result, None)
            return Bounded(result, _no_bound(value, "compares or counts what is rounded"))
        beyond = next((each.error for each in inputs if isinstance(each.error, str)), None)
        if beyond is not None:
            return Bounded(result, beyond)
        try:
            error = self._error(value.op, inputs, result)
        except _Unbounded as reason:
            return Bounded(result, _no_bound(value, str(reason)))
        largest = torch.finfo(self.arithmetic.dtype).max
        for tensor, bound in zip(_floats(result), _floats(error), strict=True):
            is_masked = tensor.isinf() & (bound == 0)  # infinite in every run, as in the mask of a softmax
            if not bool(((tensor.abs() + bound <= largest) | is_masked).all()):
                name = str(self.arithmetic.dtype).removeprefix("torch.")
                return Bounded(result, _no_bound(value, f"cannot be shown to stay in the range of {name}"))
        return Bounded(result, error)

    def _check_layer(self, value: Value, given: list[Any], result: Any) -> None:
        """Hold one layer, on the inputs that it really got, against its own bound."""
        with torch.no_grad(), in_float64():
            wide = [tree_map(_widened, each) for each in given]
            exact = evaluate_value(value, wide, {})
            if not _floats(exact):
                return
            inputs = [Bounded(each, tree_map(_zeros, each) if _floats(each) else None) for each in wide]
            try:
                error = self._error(value.op, inputs, exact)
            except _Unbounded:
                return
        self.layers += 1
        for found, expected, bound in zip(_floats(result), _floats(exact), _floats(error), strict=True):
            if not found.numel():
                continue
            distance = (found.double() - expected).abs()
            if not bool((distance <= bound).all()):
                scale = float(expected.abs().max()) or 1.0
                raise NotEquivalentError(f"{value.where} {_beyond(float((distance - bound).max()) / scale)}")
            share = float((distance / bound).nan_to_num(0.0).max())
            if share > self.share and not isinstance(value.op, Add | Multiply | Scale):  # one rounding can be all of it
                self.share, self.layer = share, value.where

    def _error(self, op: Operator, inputs: list[Bounded], y: Any) -> Any:
        """The bounds of the result ``y`` of an operator."""
        match op:
            case Input():
                return tree_map(_zeros, y)
            case Constant():
                return self._stored(y)
            case Conv():
                return self._convolution(op, inputs[0])
            case Scale():
                return self._scale(op, inputs[0])
            case BatchNorm():
                return self._batch_norm(op, inputs[0])
            case AvgPool() | ChannelMean():
                count = math.prod(op.window) if isinstance(op, AvgPool) else op.count
                return self._average(op, inputs[0], count)
            case Upsample():
                return self._upsample(op, inputs[0])
            case Activation():
                return self._activation(op, inputs[0], y)
            case Clamp():
                finite = [b.abs().double() for b in (op.lower, op.upper)]
                bound = torch.stack([b.where(b.isfinite(), b.new_zeros(())) for b in finite]).amax(0)
                moved = self.arithmetic.rounding(0, bound, stored=1).reshape(-1, *[1] * op.axes)
                return torch.maximum(inputs[0].error, moved.expand_as(inputs[0].error))
            case MaxPool() | AdaptiveMaxPool():
                return op.evaluate(inputs[0].error)  # |max a - max b| <= max |a - b|
            case Add():
                return self._sum(inputs[0], inputs[1], y)
            case Multiply():
                return self._product(inputs[0], inputs[1])
            case Normalize():
                return _Normalization(op, self.arithmetic).error(inputs[0])
            case Pad() | BorderFill():
                filling = op.value
                if filling is None:
                    return op.evaluate(inputs[0].error)
                return replace(op, value=self._stored(filling)).evaluate(inputs[0].error)
            case Assign():
                return self._assigned(op, inputs)
            case Rearrangement() | PixelShuffle() | Concat() | Flatten() | Unflatten() | Identity():
                return op.evaluate(*(each.error for each in inputs))
            case Call():
                return self._call(op, inputs, y)
        raise _Unbounded("has no rule")

    # --- linear operators ------------------------------------------------------------------------------------------

    def _convolution(self, op: Conv, x: Bounded) -> Tensor:
        """|W| e + g (|W| (|x| + e) + |b|), as one convolution: |W| (e + g (|x| + e)) + g |b|."""
        assert op.ones is None and op.pad_value is None  # no layer of PyTorch has them
        count = op.in_channels // op.groups * math.prod(op.kernel)
        g = self.arithmetic.gamma(count + 1, stored=1, calls=2) + self.arithmetic.products
        bias = None if op.bias is None else g * op.bias.double().abs()
        absolute = op.changed(weight=op.weight.double().abs(), bias=bias)
        # a weight that is not normal is rounded by a part of the smallest number, not of itself
        lost = count * (1 + float(x.size.max())) * self.arithmetic.tiny if x.size.numel() else 0.0
        error: Tensor = absolute.evaluate(x.error + g * x.size)
        return error + lost + (count + 3) * self.arithmetic.tiny

    def _scale(self, op: Scale, x: Bounded) -> Tensor:
        shape = (-1, *[1] * (op.axes or 0)) if x.value.dim() else ()
        s, t = op.scale.double().abs().view(shape), op.shift.double().abs().view(shape)
        result: Tensor = s * x.error + self.arithmetic.rounding(3, s * x.size + t, stored=1, calls=2)
        return result

    def _batch_norm(self, op: BatchNorm, x: Bounded) -> Tensor:
        """s (|x| + |mean|) + |b| are the terms, also where a kernel computes s x + (b - s mean); s itself rounds."""
        if op.training:
            raise _Unbounded("normalises by the statistics of the batch")
        shape = (-1, *[1] * op.axes)
        s = torch.rsqrt(op.var.double() + op.eps)
        s = (s if op.weight is None else s * op.weight.double().abs()).view(shape)
        offset = 0.0 if op.bias is None else op.bias.double().abs().view(shape)
        terms = s * (x.size + op.mean.double().abs().view(shape)) + offset
        result: Tensor = s * x.error + self.arithmetic.rounding(12, terms, stored=3)
        return result

    def _average(self, op: Operator, x: Bounded, count: int) -> Tensor:
        error: Tensor = op.evaluate(x.error)
        return error + self.arithmetic.rounding(count + 2, op.evaluate(x.size))

    def _upsample(self, op: Upsample, x: Bounded) -> Tensor:
        """Positions are computed in the precision of sums; an output moves with them by a difference of neighbours."""
        error: Tensor = op.evaluate(x.error)
        if op.mode.startswith("nearest"):
            return error
        if op.mode not in ("linear", "bilinear", "trilinear"):
            raise _Unbounded(f"has no rule for the mode {op.mode}")
        axes = tuple(range(-op.spatial, 0))
        off = sum(4 * self.arithmetic.sums * (x.value.shape[axis] + 1) for axis in axes)
        rounding = self.arithmetic.rounding(6 * op.spatial, op.evaluate(x.size))
        result: Tensor = error + rounding + 2 * off * x.size.amax(axes, keepdim=True)
        return result

    # --- of two values ---------------------------------------------------------------------------------------------

    def _sum(self, x: Bounded, y: Bounded, result: Tensor) -> Tensor:
        moved = x.error + y.error
        total: Tensor = moved + self.arithmetic.rounding(1, result.abs() * (1 + 2 * self.arithmetic.unit) + moved)
        return total

    def _product(self, x: Bounded, y: Bounded) -> Tensor:
        result: Tensor = x.size * y.error + y.size * x.error + self.arithmetic.rounding(1, x.size * y.size)
        return result

    def _quotient(self, x: Bounded, y: Bounded) -> Tensor:
        least = y.value.abs() - y.error
        if not bool((least > 0).all()):
            raise _Unbounded("may divide by zero")
        error = (x.error + x.size / least * y.error) / least
        return cast(Tensor, error) + self.arithmetic.rounding(1, x.size / least)

    def _matrix_product(self, x: Bounded, y: Bounded) -> Tensor:
        g = self.arithmetic.gamma(x.value.shape[-1] + 1) + self.arithmetic.products
        error = x.size @ (y.error + g * y.size) + x.error @ y.size
        result: Tensor = cast(Tensor, error) + (x.value.shape[-1] + 2) * self.arithmetic.tiny
        return result

    def _softmax(self, x: Bounded, dim: int, blocks: int = 1) -> Tensor:
        """exp(x_i) / sum exp(x_j) moves by a factor exp(e_i + max e); the arguments x - max x round as well."""
        highest = x.error.amax(dim, keepdim=True)
        p = (torch.softmax(x.value, dim) * torch.exp(x.error + highest)).clamp(max=1.0)
        below = (x.value.amax(dim, keepdim=True) - x.value) + x.error + highest
        argument = below + (p * below).sum(dim, keepdim=True)
        count = 2 * EXP_UNITS * 2 * blocks + x.value.shape[dim] + 4
        # in half precision a kernel may keep the exponentials and their sum in the memory of the result
        rounding = self.arithmetic.gamma(count, calls=3) + 2 * self.arithmetic.sums * argument
        moved = torch.expm1(x.error + highest) + torch.exp(x.error + highest) * rounding
        result: Tensor = (p * moved).clamp(max=1.0) + count * self.arithmetic.tiny
        return result

    # --- elementwise functions -------------------------------------------------------------------------------------

    def _activation(self, op: Activation, x: Bounded, y: Tensor) -> Tensor:
        if op.weight is not None:
            shape = (-1, *[1] * (x.value.dim() - 2)) if op.weight.numel() > 1 else (-1,)
            slopes = op.weight.double().abs().clamp(min=1.0).view(shape)
            return self._units(slopes * x.error, slopes * x.size)
        rule = _RULES.get(op.name)
        if rule is None:
            raise _Unbounded("has no rule")
        moved, terms = rule(op, x, y)
        return self._units(moved, terms)

    def _units(self, moved: Tensor, terms: Tensor) -> Tensor:
        return moved + self.arithmetic.rounding(2 * UNITS, terms, stored=1)

    # --- calls -----------------------------------------------------------------------------------------------------

    def _assigned(self, op: Assign, inputs: list[Bounded]) -> Tensor:
        y = inputs[0].error.clone()
        index, value = op.filled(tuple(each.value if each.error is None else each.error for each in inputs))
        if isinstance(op.value, Slot):
            if inputs[op.value.index].error is None:
                raise _Unbounded("assigns what is no floating-point tensor")
            y[index] = value
        else:
            y[index] = self._stored(torch.as_tensor(value, dtype=torch.float64))
        return cast(Tensor, y)

    def _call(self, op: Call, inputs: list[Bounded], y: Any) -> Any:
        if op.name in _MOVES:
            # Numbers among the inputs (sizes) are what they are; a tensor gives its bounds instead.
            args, kwargs = tree_map(self._stored, (op.args, op.kwargs), is_leaf=_is_slot)
            moving = replace(op, args=args, kwargs=kwargs)
            return moving.evaluate(*(each.value if each.error is None else each.error for each in inputs))
        args, kwargs = self._operands(op, inputs)
        if kwargs.get("dtype") is not None:
            raise _Unbounded("casts to another dtype")
        match op.name, args:
            case (("mean" | "sum"), [Bounded() as x, *_]) if x.value.numel():
                return self._average(op, x, x.value.numel() // max(y.numel(), 1))
            case name, [Bounded() as x, *_] if name.lower().startswith("adaptive") and "avg" in name.lower():
                spatial = int(name.rstrip("d")[-1])
                sizes = zip(x.value.shape[-spatial:], y.shape[-spatial:], strict=True)
                return self._average(op, x, math.prod(-(-n // m) + 1 for n, m in sizes))
            case "pad", [Bounded() as x, amounts, *rest] if not (len(rest) > 2 or kwargs):
                filling = {} if len(rest) < 2 else {"value": float(self._number(rest[1]).error)}
                return op.target(x.error, amounts, *rest[:1], **filling)
            case (("add" | "sub" | "radd" | "rsub"), [Bounded() as a, Bounded() as b]) if not kwargs:
                return self._sum(a, b, y)
            case (("mul" | "multiply" | "rmul"), [Bounded() as a, Bounded() as b]) if not kwargs:
                return self._product(a, b)
            case (("truediv" | "div" | "divide" | "true_divide"), [Bounded() as a, Bounded() as b]) if not kwargs:
                return self._quotient(a, b)
            case (("matmul" | "bmm"), [Bounded() as a, Bounded() as b]) if min(a.value.dim(), b.value.dim()) > 1:
                return self._matrix_product(a, b)
            case "softmax", [Bounded() as x, *rest] if len(rest) < 2 and isinstance(
                rest or kwargs.get("dim"), int | list
            ):
                return self._softmax(x, rest[0] if rest else kwargs["dim"])
            case "Softmax", [Bounded() as x] if op.target.dim is not None:
                return self._softmax(x, op.target.dim)
            case "scaled_dot_product_attention", [Bounded() as q, Bounded() as k, Bounded() as v]:
                return self._attention(q, k, v, kwargs)
            case "Embedding", _ if op.target.max_norm is None:
                return self._stored(y)
        raise _Unbounded("has no rule")

    def _operands(self, op: Call, inputs: list[Bounded]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments with their bounds; a constant has that of the rounding with which it is stored."""

        def operand(leaf: Any) -> Any:
            if isinstance(leaf, Slot):
                given = inputs[leaf.index]
                return given if isinstance(given.error, Tensor) else given.value
            stored = self._stored(leaf)
            return leaf if stored is leaf else Bounded(leaf.double(), stored)

        args, kwargs = tree_map(operand, (op.args, dict(op.kwargs)), is_leaf=_is_slot)
        if op.name in _ARITHMETIC:
            args = [self._number(each) if isinstance(each, int | float) else each for each in args]
        return list(args), kwargs

    def _stored(self, leaf: Any) -> Any:
        """The bounds of a constant, which is rounded once; anything else as it is."""
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return self.arithmetic.rounding(0, leaf.double().abs(), stored=1)

    def _number(self, number: float) -> Bounded:
        value = torch.tensor(float(number), dtype=torch.float64)
        return Bounded(value, self._stored(value))

    def _attention(self, q: Bounded, k: Bounded, v: Bounded, options: Mapping[str, Any]) -> Tensor:
        """The product, softmax and product that it is; kernels that go block by block rescale once for each block."""
        plain = {"attn_mask": None, "is_causal": False, "dropout_p": 0.0, "enable_gqa": False}
        if any(options.get(name, default) not in (default, 0) for name, default in plain.items()):
            raise _Unbounded("has no rule for these options")
        factor = options.get("scale") or 1 / math.sqrt(q.value.shape[-1])
        turned = Bounded(k.value.mT * factor, k.error.mT * factor + self.arithmetic.rounding(2, k.size.mT * factor))
        scores = Bounded(q.value @ turned.value, self._matrix_product(q, turned))
        blocks = 1 + scores.value.shape[-1] // 16
        weights = Bounded(torch.softmax(scores.value, -1), self._softmax(scores, -1, blocks))
        return self._matrix_product(weights, v)


class _Normalization:
    """The distance that a normalisation by a sample's own statistics makes of a distance of its inputs.

    Over the n elements that share statistics, d = x - mean moves by at most e_d = e + mean(e), and s = sqrt(mean(d^2) +
    eps), a norm, by at most e_s = sqrt(mean(e_d^2)), so d / s by (e_d + |d / s| e_s) / s. Kernels compute the variance
    as mean(x^2) - mean(x)^2 at worst.
    """

    def __init__(self, op: Normalize, arithmetic: Arithmetic) -> None:
        if op.eps is None:
            raise _Unbounded("takes the eps of its dtype, and so is another function in each")
        self.op, self.arithmetic, self.eps = op, arithmetic, float(op.eps)

    def error(self, x: Bounded) -> Tensor:
        """The bounds of the result."""
        given, error = self._grouped(x.value), self._grouped(x.error)
        n, eps, size = given.shape[-1], self.eps, given.abs() + error
        keeps_mean = self.op.kind == "rms"
        mean = size.mean(-1, keepdim=True) * (0.0 if keeps_mean else 1.0)
        d = given if keeps_mean else given - given.mean(-1, keepdim=True)
        e_d = error if keeps_mean else error + error.mean(-1, keepdim=True)
        e_s = e_d.square().mean(-1, keepdim=True).sqrt()
        s = (d.square().mean(-1, keepdim=True) + eps).sqrt()
        least = torch.clamp(s - e_s, min=math.sqrt(eps)) if eps > 0 else s - e_s
        if not bool((least > 0).all()):
            raise _Unbounded("may divide by a variance of zero")
        y = torch.clamp((d.abs() + e_d) / least, max=math.sqrt(n))
        moved = (e_d + y * e_s) / least
        variance = self.arithmetic.gamma(2 * n + 8, calls=0) * 2 * size.square().mean(-1, keepdim=True)
        computed = torch.clamp(least.square() - variance, min=eps).sqrt()
        if not bool((computed > 0).all()):
            raise _Unbounded("may divide by a variance of zero")
        of_mean = self.arithmetic.gamma(n + 2, calls=0) * mean
        rounding = y * variance / (computed * least) + of_mean / computed
        rounding = rounding + self.arithmetic.gamma(8, stored=1) * (size + mean + of_mean) / computed
        return self._back(moved + rounding, x.value) + 8 * self.arithmetic.tiny

    def _grouped(self, x: Tensor) -> Tensor:
        """[..., n]: elements that share statistics along the last axis."""
        if self.op.kind in ("layer", "rms"):
            return x.flatten(x.dim() - len(self.op.shape))
        groups = self.op.groups if self.op.kind == "group" else x.shape[1]
        return x.reshape(x.shape[0], groups, -1)

    def _back(self, x: Tensor, like: Tensor) -> Tensor:
        return x.reshape(like.shape)


def _zeros(leaf: Any) -> Tensor | None:
    is_float = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return torch.zeros_like(leaf, dtype=torch.float64) if is_float else None


def _widened(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _is_slot(leaf: object) -> bool:
    return isinstance(leaf, Slot)


def _rounds(op: Operator) -> bool:
    """Does it compute, where others only move and compare?"""
    if isinstance(op, Call):
        return op.name not in _MOVES | _FORM
    return isinstance(
        op, Conv | Scale | BatchNorm | AvgPool | ChannelMean | Upsample | Activation | Add | Multiply | Normalize
    )


def _floats(structure: Any) -> list[Tensor]:
    return [tensor for tensor in _tensors(structure) if tensor.is_floating_point()]


def _no_bound(value: Value, reason: str) -> str:
    return f"no bound beyond {value.op.label} at {value.where}: it {reason}"


def _spread(error: Any, count: int) -> list[Any]:
    """The bounds of the tensors of one output value: one each, or the same reason for all."""
    return [error] * count if error is None or isinstance(error, str) else _tensors(error)


# --- elementwise functions: what a distance becomes, and the terms whose units in the last place are off -------------

Rule = Callable[[Activation, Bounded, Tensor], tuple[Tensor, Tensor]]


def _lipschitz(constant: float, terms: Callable[[Bounded, Tensor], Tensor]) -> Rule:
    return lambda op, x, y: (constant * x.error, terms(x, y.abs() + constant * x.error))


def _of_input(x: Bounded, _: Tensor) -> Tensor:
    return x.size


def _of_output(_: Bounded, y: Tensor) -> Tensor:
    return y


def _nothing(x: Bounded, _: Tensor) -> Tensor:
    return torch.zeros_like(x.error)


def _relu(op: Activation, x: Bounded, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.error * (x.value + x.error > 0), torch.zeros_like(x.error)


def _sigmoid(op: Activation, x: Bounded, y: Tensor) -> tuple[Tensor, Tensor]:
    """The slope s (1 - s) is even, and falls away from zero."""
    s = torch.sigmoid(torch.clamp(x.value.abs() - x.error, min=0.0))
    moved = x.error * s * (1 - s)
    return moved, y + moved


def _tanh(op: Activation, x: Bounded, y: Tensor) -> tuple[Tensor, Tensor]:
    moved = x.error * (1 - torch.tanh(torch.clamp(x.value.abs() - x.error, min=0.0)).square())
    return moved, y.abs() + moved


def _leaky_relu(op: Activation, x: Bounded, y: Tensor) -> tuple[Tensor, Tensor]:
    moved = max(1.0, abs(op.option("negative_slope", 0.01))) * x.error
    return moved, y.abs() + moved


def _elu(op: Activation, x: Bounded, y: Tensor) -> tuple[Tensor, Tensor]:
    """Kernels compute alpha (exp(x) - 1), whose terms do not shrink with it."""
    alpha = abs(op.option("alpha", 1.0))
    moved = (max(1.0, alpha) if op.name == "elu" else 1.0) * x.error
    return moved, y.abs() + moved + alpha


def _softplus(op: Activation, x: Bounded, y: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's jumps by log(1 + exp(-threshold)) / beta where it becomes the identity."""
    beta, threshold = abs(op.option("beta", 1.0)), op.option("threshold", 20.0)
    return x.error + math.log1p(math.exp(-threshold)) / beta, y.abs() + x.error


def _exp(op: Activation, x: Bounded, y: Tensor) -> tuple[Tensor, Tensor]:
    highest = torch.exp(x.value + x.error)
    return x.error * highest, highest


def _sqrt(op: Activation, x: Bounded, y: Tensor) -> tuple[Tensor, Tensor]:
    """|sqrt p - sqrt q| is at most sqrt|p - q|, and |p - q| / sqrt of the smaller one."""
    least = torch.clamp(x.value - x.error, min=0.0).sqrt()
    moved = torch.minimum(x.error.sqrt(), torch.where(least > 0, x.error / least, math.inf))
    return moved, y + moved


def _square(op: Activation, x: Bounded, y: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * x.size * x.error, x.size.square()


#: Largest slopes: of GELU and its tanh form 1.129, of SiLU 1.0999, of Mish 1.0885, of Hardswish 1.5, of SELU 1.758.
_RULES: dict[str, Rule] = {
    "relu": _relu, "relu6": _relu, "abs": _lipschitz(1.0, _nothing), "hardtanh": _lipschitz(1.0, _of_output),
    "clamp": _lipschitz(1.0, _of_output), "leaky_relu": _leaky_relu, "elu": _elu, "celu": _elu,
    "selu": _lipschitz(1.759, lambda x, y: y + 1.759), "gelu": _lipschitz(1.13, _of_input),
    "silu": _lipschitz(1.1, _of_input), "mish": _lipschitz(1.09, _of_input), "sigmoid": _sigmoid, "tanh": _tanh,
    "hardswish": _lipschitz(1.5, _of_input), "hardsigmoid": _lipschitz(1 / 6, lambda x, y: torch.ones_like(y)),
    "softplus": _softplus, "logsigmoid": _lipschitz(1.0, _of_output), "softsign": _lipschitz(1.0, _of_output),
    "tanhshrink": _lipschitz(1.0, lambda x, y: 2 * x.size), "exp": _exp, "sqrt": _sqrt, "square": _square,
}  # fmt: skip

#: Calls that ask for the form of a tensor, which no rounding changes.
_FORM = frozenset({"getattr", "size", "sym_size", "len", "dim", "ndimension", "numel"})

_ARITHMETIC = frozenset({
    "add", "sub", "radd", "rsub", "mul", "multiply", "rmul", "truediv", "div", "divide", "true_divide",
})  # fmt: skip

#: Calls that move elements, or hand tensors on: they do to the bounds what they do to the values.
_MOVES = frozenset({
    "flatten", "reshape", "view", "permute", "transpose", "t", "swapaxes", "movedim", "contiguous", "clone", "squeeze",
    "unsqueeze", "unflatten", "flip", "roll", "narrow", "select", "slice", "getitem", "chunk", "split", "unbind",
    "tensor_split", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "expand", "expand_as", "repeat", "getattr",
    "stack", "cat", "OrderedDict", "Flatten", "Unflatten", "_unsafe_view", "detach", "view_as",
    "reshape_as",
})  # fmt: skip

__all__ = ["EXP_UNITS", "UNITS", "Arithmetic", "Bounded", "bound_errors"]
