"""Which operators can a graph hold beside the local affine maps? The vocabulary that the front end lifts into."""

from __future__ import annotations

import copy
import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rgc.algebra import Conv, Linear, Scale, Size, unit
from rgc.errors import GraphError, require
from rgc.ir import Operator, TensorType, Value


@dataclass(frozen=True, eq=False)
class Constant(Operator):
    """A tensor that does not depend on the inputs."""

    tensor: Tensor
    affine: ClassVar[bool] = True
    fresh: ClassVar[bool] = False

    def evaluate(self, *inputs: Any) -> Any:
        return self.tensor

    def infer(self, *types: TensorType | None) -> TensorType | None:
        return TensorType(tuple(self.tensor.shape), self.tensor.dtype)


@dataclass(frozen=True, eq=False)
class Identity(Linear):
    """Returns its very input: ``nn.Identity``, dropout in evaluation.

    copies: in memory of its own, as ``x.clone()``. In a graph, where nothing is overwritten, that is no difference.
    """

    reason: str = "identity"
    copies: bool = False
    fresh: ClassVar[bool] = False

    @property
    def label(self) -> str:
        return self.reason

    def as_linear(self) -> Linear:
        return unit()

    def as_conv(self, channels: int, spatial: int) -> Conv:
        return self.as_linear().as_conv(channels, spatial)

    def evaluate(self, *inputs: Any) -> Any:
        return inputs[0].clone() if self.copies else inputs[0]

    def infer(self, *types: TensorType | None) -> TensorType | None:
        return types[0]


@dataclass(frozen=True, eq=False)
class BatchNorm(Linear):
    """Batch norm over the channel axis before ``axes`` spatial axes: weight (x - mean) / sqrt(var + eps) + bias.

    mean, var, weight, bias: [C]. ``training`` means that it normalises by the statistics of the batch.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    axes: int
    training: bool = False

    def __post_init__(self) -> None:
        for name in ("var", "weight", "bias"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != self.mean.shape:
                raise GraphError(f"BatchNorm: {name} {list(tensor.shape)} does not fit mean {list(self.mean.shape)}")

    @property
    def channels(self) -> tuple[int, int]:
        return self.mean.numel(), self.mean.numel()

    @property
    def spatial(self) -> int:
        return self.axes

    @property
    def label(self) -> str:
        return f"batch norm {self.mean.numel()}"

    def as_linear(self) -> Linear:
        """s x + t with s = weight / sqrt(var + eps), t = bias - s mean."""
        require(not self.training, "batch norm still uses batch statistics; call model.eval() first")
        scale = torch.rsqrt(self.var.double() + self.eps)
        if self.weight is not None:
            scale = scale * self.weight.double()
        shift = -scale * self.mean.double()
        return Scale(scale, shift if self.bias is None else shift + self.bias.double(), self.axes)

    def as_conv(self, channels: int, spatial: int) -> Conv:
        return self.as_linear().as_conv(channels, spatial)

    def evaluate(self, *inputs: Any) -> Any:
        (x,) = inputs
        if self.training:
            return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        return F.batch_norm(x, self.mean, self.var, self.weight, self.bias, False, 0.0, self.eps)

    def infer(self, *types: TensorType | None) -> TensorType | None:
        return types[0]


@dataclass(frozen=True, eq=False)
class AvgPool(Linear):
    """Average pooling; the same box for each channel. Fields as in ``torch.nn.AvgPool2d``."""

    window: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None
    size: Size | None = None  # the only spatial input size at which it stands for what the user wrote

    geometry: ClassVar[dict[str, Any]] = {
        "stride": 1, "padding": 0, "ceil_mode": False, "count_include_pad": True, "divisor_override": None,
        "size": None,
    }  # fmt: skip

    def __post_init__(self) -> None:
        if self.divisor_override is not None and len(self.window) == 1:
            raise GraphError("AvgPool: a one-dimensional average pool has no divisor_override")

    @property
    def spatial(self) -> int:
        return len(self.window)

    @property
    def label(self) -> str:
        return f"avg pool {'x'.join(map(str, self.window))}"

    @property
    def reach(self) -> tuple[int, int]:
        return max(self.window) - 1, max(self.stride)

    @property
    def any_size(self) -> bool:
        return self.size is None

    def resampled(self, given: TensorType) -> int | None:
        return self.spatial

    def at(self, size: Size | None) -> AvgPool:
        """Without ``ceil_mode`` and with padding that counts, where that says the same at the size.

        >>> pool = AvgPool((2,), (2,), (0,), ceil_mode=True)
        >>> pool.at((6,)).ceil_mode, pool.at((7,)).ceil_mode, pool.at(None).ceil_mode
        (False, True, True)
        """
        ceil = self.ceil_mode and set(self.stride) != {1}  # a stride of 1 leaves nothing to round
        counts = self.count_include_pad or not any(self.padding) or self.divisor_override is not None
        plain = replace(self, ceil_mode=False, count_include_pad=True)
        if not ceil and counts:
            return plain if self.ceil_mode or not self.count_include_pad else self
        if size is None or not counts or any(map(_rounds_up, size, self.window, self.stride, self.padding)):
            return self
        return replace(plain, size=size)

    @property
    def keeps_constants(self) -> bool:
        counts_padding = self.count_include_pad and any(self.padding)
        return self.divisor_override is None and not counts_padding

    def as_conv(self, channels: int, spatial: int) -> Conv:
        require(spatial == self.spatial, f"{self.label} and its neighbour act on different axes")
        require(not self.ceil_mode, f"{self.label} has ceil_mode, so its last windows average fewer elements")
        uniform = self.count_include_pad or not any(self.padding) or self.divisor_override is not None
        require(uniform, f"{self.label} has count_include_pad=False: its border windows average fewer elements")
        count = self.divisor_override
        if count is None:
            count = int(torch.tensor(self.window).prod())
        weight = torch.full((channels, 1, *self.window), 1.0 / count, dtype=torch.float64)
        return Conv(weight, stride=self.stride, padding=self.padding, groups=channels, size=self.size)

    def evaluate(self, *inputs: Any) -> Any:
        (x,) = inputs
        if self.size is not None and tuple(x.shape[x.dim() - self.spatial :]) != self.size:
            raise GraphError(f"{self.label}: holds at {self.size} only, got {list(x.shape)}")
        options = (self.window, self.stride, self.padding, self.ceil_mode, self.count_include_pad)
        if self.spatial == 1:
            return F.avg_pool1d(x, *options)
        return (F.avg_pool2d if self.spatial == 2 else F.avg_pool3d)(x, *options, self.divisor_override)

    def infer(self, *types: TensorType | None) -> TensorType | None:
        return _meta(self, *types)


@dataclass(frozen=True, eq=False)
class Activation(Operator):
    """An elementwise function of ``torch.nn.functional`` (or ``torch``) by name, with its options.

    ``weight`` is PReLU's slopes.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    weight: Tensor | None = None
    inplace: bool = field(default=False, compare=False)  # the user's wish, honoured on emission where it is safe

    @property
    def label(self) -> str:
        return self.name

    def spatial_axes(self, given: TensorType) -> int | None:
        has_slopes = self.weight is not None and self.weight.numel() > 1
        return len(given.shape) - 2 if has_slopes else None  # slopes along axis 1

    def option(self, name: str, default: Any) -> Any:
        """An option's value, or PyTorch's default where the model leaves it out."""
        return dict(self.options).get(name, default)

    def evaluate(self, *inputs: Any) -> Any:
        (x,) = inputs
        if self.weight is not None:
            return F.prelu(x, self.weight)
        return self.function(x, **dict(self.options))

    @property
    def function(self) -> Callable[..., Any]:
        """PyTorch's function of the name."""
        found: Callable[..., Any] = getattr(F, self.name, None) or getattr(torch, self.name)
        return found

    def infer(self, *types: TensorType | None) -> TensorType | None:
        return types[0]


@dataclass(frozen=True, eq=False)
class Clamp(Operator):
    """min(max(x, lower), upper) with bounds of each channel's own; an infinite bound leaves its side alone.

    lower, upper: [C], for the channel axis before ``axes`` spatial axes.
    """

    lower: Tensor
    upper: Tensor
    axes: int

    def __post_init__(self) -> None:
        if self.lower.dim() != 1 or self.lower.shape != self.upper.shape:
            shapes = f"{list(self.lower.shape)} and {list(self.upper.shape)}"
            raise GraphError(f"Clamp: needs a lower and an upper bound for each channel, got {shapes}")
        if bool(self.lower.isnan().any() | self.upper.isnan().any()):
            raise GraphError("Clamp: a bound is not a number")
        if self.bounds == (None, None):
            raise GraphError("Clamp: bounds nothing")

    @property
    def label(self) -> str:
        return f"clamp {self.lower.numel()}"

    @property
    def bounds(self) -> tuple[Tensor | None, Tensor | None]:
        """The lower and the upper bounds as they broadcast, or None for a side on which no channel is bounded."""
        shape = (-1, *[1] * self.axes)
        return (
            None if bool((self.lower == -math.inf).all()) else self.lower.view(shape),
            None if bool((self.upper == math.inf).all()) else self.upper.view(shape),
        )

    def spatial_axes(self, given: TensorType) -> int | None:
        return self.axes

    def evaluate(self, *inputs: Any) -> Any:
        (x,) = inputs
        lower, upper = self.bounds
        x = x if lower is None else torch.maximum(x, lower)
        return x if upper is None else torch.minimum(x, upper)

    def infer(self, *types: TensorType | None) -> TensorType | None:
        (given,) = types
        count = self.lower.numel()
        if given is None or len(given.shape) <= self.axes or given.shape[-1 - self.axes] != count:
            raise GraphError(f"Clamp: expects {count} channels before {self.axes} axes, got {given}")
        return given


@dataclass(frozen=True, eq=False)
class Add(Operator):
    """x + sign * y with broadcasting; ``sign`` is 1 or -1."""

    sign: int = 1
    affine: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.sign not in (1, -1):
            raise GraphError(f"Add: sign must be 1 or -1, got {self.sign}")

    @property
    def label(self) -> str:
        return "add" if self.sign == 1 else "sub"

    def evaluate(self, *inputs: Any) -> Any:
        x, y = inputs
        return x + y if self.sign == 1 else x - y

    def infer(self, *types: TensorType | None) -> TensorType | None:
        return _broadcast(*types)


@dataclass(frozen=True, eq=False)
class Multiply(Operator):
    """x * y with broadcasting, where both depend on the inputs."""

    def evaluate(self, *inputs: Any) -> Any:
        x, y = inputs
        return x * y

    def infer(self, *types: TensorType | None) -> TensorType | None:
        return _broadcast(*types)


@dataclass(frozen=True, eq=False)
class Concat(Operator):
    """Concatenation along ``axis``, counted from the end so that a batch axis in front does not matter."""

    axis: int
    affine: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.axis >= 0:
            raise GraphError(f"Concat: axis {self.axis} must be counted from the end (negative)")

    def evaluate(self, *inputs: Any) -> Any:
        return torch.cat(inputs, dim=self.axis)

    def infer(self, *types: TensorType | None) -> TensorType | None:
        return _meta(self, *types)


@dataclass(frozen=True, eq=False)
class Flatten(Operator):
    """Samples of just this ``shape`` (batch axis left out) as vectors."""

    shape: tuple[int, ...]
    affine: ClassVar[bool] = True
    fresh: ClassVar[bool] = False

    @property
    def any_size(self) -> bool:
        return False

    def evaluate(self, *inputs: Any) -> Any:
        (x,) = inputs
        if tuple(x.shape[1:]) != self.shape:
            raise GraphError(f"flatten: holds for samples of {list(self.shape)}, got {list(x.shape[1:])}")
        return x.flatten(1)

    def infer(self, *types: TensorType | None) -> TensorType | None:
        (given,) = types
        if given is None or given.shape[1:] != self.shape:
            raise GraphError(f"flatten: holds for samples of {list(self.shape)}, got {given}")
        return given.with_shape((given.shape[0], math.prod(self.shape)))


@dataclass(frozen=True, eq=False)
class Unflatten(Operator):
    """Vectors as samples of this ``shape``."""

    shape: tuple[int, ...]
    affine: ClassVar[bool] = True
    fresh: ClassVar[bool] = False

    def evaluate(self, *inputs: Any) -> Any:
        (x,) = inputs
        return x.unflatten(1, self.shape)

    def infer(self, *types: TensorType | None) -> TensorType | None:
        (given,) = types
        if given is None or len(given.shape) != 2 or given.shape[1] != math.prod(self.shape):
            raise GraphError(f"unflatten: {given} does not hold samples of {list(self.shape)}")
        return given.with_shape((given.shape[0], *self.shape))


def pytorch_name(target: Any) -> str:
    """The name by which PyTorch documents a function, a method (a string) or an ATen overload.

    A function of somebody else that has such a name is another one; it gets a name with its module in front.

    >>> pytorch_name(torch.relu), pytorch_name("relu"), pytorch_name(torch.ops.aten.relu.default)
    ('relu', 'relu', 'relu')
    """
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return target._opname if target.namespace in ("aten", "prims") else str(target)
    if isinstance(target, nn.Module):
        return type(target).__name__
    name, home = getattr(target, "__name__", str(target)), getattr(target, "__module__", None)
    known = home is None or home.split(".")[0] in ("torch", "_operator", "operator", "builtins", "math")
    return name if known else f"{home}.{name}"


@dataclass(frozen=True)
class Slot:
    """In the arguments of a `Call`: the place of the input with this index."""

    index: int


@dataclass(frozen=True, eq=False)
class Call(Operator):
    """A call that rgc does not look into: a function, a method by name, or a module, with its argument structure."""

    target: Any
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    fresh: ClassVar[bool] = False

    @property
    def label(self) -> str:
        if isinstance(self.target, nn.Module):
            return type(self.target).__name__
        return self.target if isinstance(self.target, str) else getattr(self.target, "__name__", str(self.target))

    @property
    def name(self) -> str:
        """PyTorch's name of what is called, the same for a function, a method and an ATen overload."""
        return pytorch_name(self.target)

    @abstractmethod
    def _is_final(self) -> None:
        """Only `Structural` and `Opaque` are calls."""

    def arguments(self, inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's positional and keyword arguments with ``inputs`` in their places."""

        def fill(leaf: Any) -> Any:
            return inputs[leaf.index] if isinstance(leaf, Slot) else leaf

        return tree_map(fill, self.args, is_leaf=_is_slot), tree_map(fill, dict(self.kwargs), is_leaf=_is_slot)

    def evaluate(self, *inputs: Any) -> Any:
        args, kwargs = self.arguments(inputs)
        if isinstance(self.target, str):
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)

    def infer(self, *types: TensorType | None) -> TensorType | None:
        return _meta(self, *types)

    def cast(self, dtype: torch.dtype) -> Self:
        def convert(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                return leaf.to(dtype)
            return dtype if leaf is torch.float64 else leaf  # burned in by a trace in float64; others are the user's

        target = self.target
        if isinstance(target, nn.Module):
            target = copy.deepcopy(target).to(dtype)
        args, kwargs = tree_map(convert, (self.args, self.kwargs), is_leaf=_is_slot)
        return replace(self, target=target, args=args, kwargs=kwargs)

    def tensors(self) -> list[Tensor]:
        if isinstance(self.target, nn.Module):
            return list(self.target.parameters())
        leaves: list[Tensor] = []
        tree_map(lambda leaf: leaves.append(leaf) if isinstance(leaf, Tensor) else None, (self.args, self.kwargs))
        return leaves


@dataclass(frozen=True, eq=False)
class Structural(Call):
    """A call that is affine in its inputs: reshapes, permutations, slices, means, zero pads."""

    affine: ClassVar[bool] = True

    def resampled(self, given: TensorType) -> int | None:
        return _resampled_by(self, len(given.shape))

    @property
    def keeps_constants(self) -> bool:
        return self.name in _RESAMPLINGS

    def _is_final(self) -> None: ...


@dataclass(frozen=True, eq=False)
class Opaque(Call):
    """A call that nothing rewrites and nothing loses."""

    def _is_final(self) -> None: ...


def is_adaptive_average(call: Structural) -> bool:
    """Does it average over windows that follow the size?"""
    return call.name.startswith(("adaptive_avg_pool", "AdaptiveAvgPool"))


def average_pool_at(call: Structural, given: TensorType) -> AvgPool:
    """The average pooling that an adaptive one is at the size of its input: all windows equal, side by side.

    A `Refusal` where the size is free, or is no multiple of the output's.

    >>> pool = Structural(F.adaptive_avg_pool1d, (Slot(0), 3))
    >>> average_pool_at(pool, TensorType((1, 2, 12), torch.float32, fixed=True)).window
    (4,)
    """
    spatial, made = call.resampled(given), call.infer(given)
    require(is_adaptive_average(call) and spatial is not None, f"{call.label} is no adaptive average pooling")
    assert spatial is not None and made is not None
    size = given.size(spatial)
    require(size is not None, f"{call.label} has windows of one size at a fixed size only (--passes all)")
    assert size is not None
    wanted = made.shape[len(made.shape) - spatial :]
    require(
        not any(n % o for n, o in zip(size, wanted, strict=True)),
        f"{call.label} has windows of several sizes: {list(size)} is no multiple of {list(wanted)}",
    )
    window = tuple(n // o for n, o in zip(size, wanted, strict=True))
    return AvgPool(window, window, (0,) * spatial, size=size)


def _rounds_up(size: int, window: int, stride: int, padding: int) -> bool:
    """Is there one more window with ``ceil_mode``? Not if it would start behind the padded input."""
    rest = size + 2 * padding - window
    return bool(rest % stride) and (rest // stride + 1) * stride < size + padding


def _is_slot(leaf: object) -> bool:
    return isinstance(leaf, Slot)


def _broadcast(*types: TensorType | None) -> TensorType | None:
    known = [given for given in types if given is not None]
    if not known or len(known) < len(types):
        return None
    shape = torch.broadcast_shapes(*(given.shape for given in known))  # type: ignore[no-untyped-call]  # torch's own
    dtype = known[0].dtype
    for given in known[1:]:
        dtype = torch.promote_types(dtype, given.dtype)
    return TensorType(tuple(shape), dtype, fixed=any(given.fixed for given in known))


def _meta(op: Operator, *types: TensorType | None) -> TensorType | None:
    """The result type by running the operator on tensors without data."""
    known = [given for given in types if given is not None]
    if not known or len(known) < len(types):
        return None
    result = op.evaluate(*(torch.empty(given.shape, dtype=given.dtype, device="meta") for given in known))
    if not isinstance(result, Tensor):
        return None
    return dataclasses.replace(known[0], shape=tuple(result.shape), dtype=result.dtype)


#: Structural calls that resample, with how many of the last axes; None: what their arguments say.
_RESAMPLINGS: dict[str, int | None] = {
    **{f"{name}{rank}d": rank for rank in (1, 2, 3) for name in ("adaptive_avg_pool", "AdaptiveAvgPool")},
    "mean": None,
    "flip": None,
}


def _resampled_by(call: Call, rank: int) -> int | None:
    if call.args[:1] != (Slot(0),) or call.name not in _RESAMPLINGS:
        return None
    known = _RESAMPLINGS[call.name]
    if known is not None:
        return known
    options = dict(call.kwargs)
    given = options.pop("dims", options.pop("dim", call.args[1] if len(call.args) > 1 else None))
    if call.name == "flip" and not isinstance(given, tuple | list):
        given = call.args[1:]  # x.flip(2, 3)
    axes = (given,) if isinstance(given, int) else given
    if options.get("dtype") is not None or not axes or not all(isinstance(axis, int) for axis in axes):
        return None
    return rank - min(axis % rank for axis in axes)


@dataclass(frozen=True, eq=False)
class MaxPool(Operator):
    """The maximum of each window, the same window for each channel. Fields as in ``torch.nn.MaxPool2d``.

    It commutes with every increasing function of its input; the padding is never the maximum.
    """

    window: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool = False

    geometry: ClassVar[dict[str, Any]] = {"stride": 1, "padding": 0, "dilation": 1, "ceil_mode": False}

    def __post_init__(self) -> None:
        ranks = {len(each) for each in (self.window, self.stride, self.padding, self.dilation)}
        if len(ranks) > 1 or self.spatial not in (1, 2, 3):
            raise GraphError(
                f"MaxPool: window {self.window}, stride {self.stride}, padding {self.padding} and dilation "
                f"{self.dilation} must name the same axes, 1 to 3 of them"
            )

    @property
    def spatial(self) -> int:
        """The number of axes of the window."""
        return len(self.window)

    @property
    def label(self) -> str:
        return f"max pool {'x'.join(map(str, self.window))}"

    def spatial_axes(self, given: TensorType) -> int | None:
        return self.spatial

    @property
    def reach(self) -> tuple[int, int]:
        return max(d * (k - 1) for d, k in zip(self.dilation, self.window, strict=True)), max(self.stride)

    def resampled(self, given: TensorType) -> int | None:
        return self.spatial

    @property
    def keeps_constants(self) -> bool:
        return True

    def evaluate(self, *inputs: Any) -> Any:
        (x,) = inputs
        pool: Any = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[self.spatial]
        return pool(x, self.window, self.stride, self.padding, self.dilation, self.ceil_mode)

    def infer(self, *types: TensorType | None) -> TensorType | None:
        return _meta(self, *types)


@dataclass(frozen=True, eq=False)
class AdaptiveMaxPool(Operator):
    """The maximum of each of so many windows, as ``torch.nn.AdaptiveMaxPool2d``; None keeps the size of an axis."""

    output_size: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if self.spatial not in (1, 2, 3):
            raise GraphError(f"AdaptiveMaxPool: {self.output_size} must name 1 to 3 axes")

    @property
    def spatial(self) -> int:
        """The number of axes of the windows."""
        return len(self.output_size)

    @property
    def label(self) -> str:
        return f"max pool to {'x'.join('all' if n is None else str(n) for n in self.output_size)}"

    def resampled(self, given: TensorType) -> int | None:
        return self.spatial

    @property
    def keeps_constants(self) -> bool:
        return True

    def evaluate(self, *inputs: Any) -> Any:
        (x,) = inputs
        pool: Any = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}[self.spatial]
        return pool(x, self.output_size if self.spatial > 1 else self.output_size[0])

    def infer(self, *types: TensorType | None) -> TensorType | None:
        return _meta(self, *types)


@dataclass(frozen=True, eq=False)
class Upsample(Operator):
    """Interpolation of the last ``spatial`` axes, to a ``size`` or by a ``scale_factor``, as ``torch.nn.Upsample``.

    Linear, the same for each channel, with weights that sum to one.
    """

    spatial: int
    size: tuple[int, ...] | None = None
    scale_factor: tuple[float, ...] | None = None
    mode: str = "nearest"
    align_corners: bool | None = None
    recompute_scale_factor: bool | None = None
    affine: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.size is None) == (self.scale_factor is None):
            raise GraphError(f"Upsample: needs either a size or a scale factor, got {self.size}, {self.scale_factor}")
        given = self.size or self.scale_factor or ()
        if len(given) != self.spatial or self.spatial not in (1, 2, 3):
            raise GraphError(f"Upsample: {given} does not name {self.spatial} axes, 1 to 3 of them")

    @property
    def label(self) -> str:
        target = self.size or self.scale_factor or ()
        return f"upsample {self.mode} {'to' if self.size else 'by'} {'x'.join(f'{each:g}' for each in target)}"

    def spatial_axes(self, given: TensorType) -> int | None:
        return self.spatial

    def resampled(self, given: TensorType) -> int | None:
        return self.spatial

    @property
    def keeps_constants(self) -> bool:
        return True

    def evaluate(self, *inputs: Any) -> Any:
        (x,) = inputs
        return F.interpolate(
            x, self.size, self.scale_factor, self.mode, self.align_corners, self.recompute_scale_factor
        )  # fmt: skip

    def infer(self, *types: TensorType | None) -> TensorType | None:
        return _meta(self, *types)


@dataclass(frozen=True, eq=False)
class ChannelMean(Linear):
    """The mean over all ``count`` channels, as one channel, on the axis before ``axes`` spatial ones."""

    count: int
    axes: int

    @property
    def channels(self) -> tuple[int, int]:
        return self.count, 1

    @property
    def spatial(self) -> int:
        return self.axes

    @property
    def label(self) -> str:
        return "mean"

    def as_conv(self, channels: int, spatial: int) -> Conv:
        require(spatial == self.axes, "a mean over channels and its neighbour act on different axes")
        if channels != self.count:
            raise GraphError(f"ChannelMean: {self.count} channels meet a tensor of {channels} channels")
        return Conv(torch.full((1, channels, *[1] * spatial), 1.0 / channels, dtype=torch.float64))

    def evaluate(self, *inputs: Any) -> Any:
        (x,) = inputs
        return x.mean(-1 - self.axes, keepdim=True)

    def infer(self, *types: TensorType | None) -> TensorType | None:
        (given,) = types
        if given is None or len(given.shape) <= self.axes or given.shape[-1 - self.axes] != self.count:
            raise GraphError(f"ChannelMean: expects {self.count} channels before {self.axes} axes, got {given}")
        shape = list(given.shape)
        shape[-1 - self.axes] = 1
        return given.with_shape(shape)


@dataclass(frozen=True, eq=False)
class Normalize(Operator):
    """Mean 0 and variance 1 over a part of each sample, by its own statistics and without weights.

    kind: "layer" and "rms" (which keeps the mean) take the last axes, of just this ``shape``; "group" takes ``groups``
    of channels with all their positions, "instance" each channel; for these two ``shape`` is (channels,).
    """

    kind: Literal["layer", "rms", "group", "instance"]
    shape: tuple[int, ...]
    eps: float | None
    groups: int = 1

    def __post_init__(self) -> None:
        if self.kind in ("group", "instance") and (len(self.shape) != 1 or self.groups < 1):
            raise GraphError(f"Normalize: {self.kind} norm takes a number of channels, got {list(self.shape)}")
        if self.kind == "group" and self.shape[0] % self.groups:
            raise GraphError(f"Normalize: {self.shape[0]} channels do not divide into {self.groups} groups")

    @property
    def label(self) -> str:
        return f"{self.kind} norm"

    def evaluate(self, *inputs: Any) -> Any:
        (x,) = inputs
        if self.kind == "rms":
            return F.rms_norm(x, self.shape, None, self.eps)
        assert self.eps is not None
        if self.kind == "layer":
            return F.layer_norm(x, self.shape, None, None, self.eps)
        if self.kind == "instance":
            return F.instance_norm(x, eps=self.eps)
        return F.group_norm(x, self.groups, None, None, self.eps)

    def infer(self, *types: TensorType | None) -> TensorType | None:
        return types[0]

    def takes(self, scale: Scale, rank: int) -> bool:
        """Can one layer do this normalisation, of a tensor with ``rank`` axes, and then ``scale``?"""
        axes = rank - 2 if self.kind in ("group", "instance") else 0
        if len(self.shape) != 1 or scale.spatial not in (None, axes):
            return False
        return self.kind != "rms" or not bool(scale.shift.any())


def completes(value: Value) -> bool:
    """Is ``value`` the affine part of the normalisation before it, so that the two are one layer?"""
    if not isinstance(value.op, Scale) or not isinstance(value.inputs[0].op, Normalize) or value.type is None:
        return False
    return value.inputs[0].op.takes(value.op, len(value.type.shape))


__all__ = [
    "Activation", "AdaptiveMaxPool", "Add", "AvgPool", "BatchNorm", "Call", "ChannelMean", "Clamp", "Concat",
    "Constant", "Flatten", "Identity", "MaxPool", "Multiply", "Normalize", "Opaque", "Slot", "Structural", "Unflatten",
    "Upsample", "average_pool_at", "completes", "is_adaptive_average",
]  # fmt: skip
