"""What do PyTorch's normalisations by the sample's own statistics mean? A `Normalize`, and a `Scale` for the weights.

Apart, the scale folds into the linear operator behind it; what does not fold is one layer again on emission.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rgc.algebra import Scale
from rgc.functions import Handler, Lifting, batch_norm
from rgc.ir import Value
from rgc.operators import Normalize


def layer_norm(lifter: Lifting, x: Any, normalized_shape: Any, weight: Any = None, bias: Any = None,
               eps: float = 1e-5, *, module: nn.Module | None = None) -> Value | None:  # fmt: skip
    shape = _as_shape(normalized_shape)
    if shape is None or (len(shape) > 1 and (weight is not None or bias is not None)):
        return None  # weights for several axes are no scale per channel
    return _normalized(lifter, x, Normalize("layer", shape, eps), weight, bias, 0, module)


def rms_norm(lifter: Lifting, x: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None,
             *, module: nn.Module | None = None) -> Value | None:  # fmt: skip
    shape = _as_shape(normalized_shape)
    if shape is None or (len(shape) > 1 and weight is not None):
        return None
    return _normalized(lifter, x, Normalize("rms", shape, eps), weight, None, 0, module)


def group_norm(lifter: Lifting, x: Any, num_groups: int, weight: Any = None, bias: Any = None,
               eps: float = 1e-5, *, module: nn.Module | None = None) -> Value | None:  # fmt: skip
    if not isinstance(x, Value) or not isinstance(num_groups, int) or len(lifter.shape(x)) < 2:
        return None
    shape = lifter.shape(x)
    op = Normalize("group", (shape[1],), eps, num_groups)
    return _normalized(lifter, x, op, weight, bias, len(shape) - 2, module)


def instance_norm(lifter: Lifting, x: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None,
                  bias: Any = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
                  *, module: nn.Module | None = None) -> Value | None:  # fmt: skip
    """With running statistics in evaluation it is a batch norm."""
    if not isinstance(x, Value) or len(lifter.shape(x)) < 3:
        return None
    if not use_input_stats:
        return batch_norm(lifter, x, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None or running_var is not None:
        return None  # it would update them
    shape = lifter.shape(x)
    return _normalized(lifter, x, Normalize("instance", (shape[1],), eps), weight, bias, len(shape) - 2, module)


NORMALIZATIONS: dict[str, Handler] = {
    "layer_norm": layer_norm, "rms_norm": rms_norm, "group_norm": group_norm, "instance_norm": instance_norm,
}  # fmt: skip


def _aten_layer_norm(lifter: Lifting, x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5,
                     cudnn: bool = True) -> Value | None:  # fmt: skip
    return layer_norm(lifter, x, shape, weight, bias, eps)


def _aten_native_layer_norm(lifter: Lifting, x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    result = layer_norm(lifter, x, shape, weight, bias, eps)
    return None if result is None else (result, None, None)


def _aten_group_norm(lifter: Lifting, x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5,
                     cudnn: bool = True) -> Value | None:  # fmt: skip
    return group_norm(lifter, x, groups, weight, bias, eps)


def _aten_native_group_norm(lifter: Lifting, x: Any, weight: Any, bias: Any, n: Any, c: Any, positions: Any,
                            groups: int, eps: float) -> Any:  # fmt: skip
    result = group_norm(lifter, x, groups, weight, bias, eps)
    return None if result is None else (result, None, None)


def _aten_instance_norm(lifter: Lifting, x: Any, weight: Any, bias: Any, mean: Any, var: Any, use_input_stats: bool,
                        momentum: float, eps: float, cudnn: bool = True) -> Value | None:  # fmt: skip
    return instance_norm(lifter, x, mean, var, weight, bias, use_input_stats, momentum, eps)


ATEN_NORMALIZATIONS: dict[str, Handler] = {
    "layer_norm": _aten_layer_norm, "native_layer_norm": _aten_native_layer_norm, "group_norm": _aten_group_norm,
    "native_group_norm": _aten_native_group_norm, "instance_norm": _aten_instance_norm,
}  # fmt: skip


def _normalized(
    lifter: Lifting, x: Any, op: Normalize, weight: Any, bias: Any, axes: int, module: nn.Module | None
) -> Value | None:
    given = [tensor for tensor in (weight, bias) if tensor is not None]
    if not isinstance(x, Value) or not all(isinstance(tensor, Tensor) for tensor in given):
        return None
    if not isinstance(lifter.real.get(x), Tensor) or not lifter.real[x].is_floating_point():
        return None
    shared = op if module is None else lifter.shared(module, lambda: op)
    y = lifter.emit(shared, x)
    if not given:
        return y
    affine = _affine(weight, bias, axes)
    if module is not None:
        known = lifter.shared(shared, lambda: affine)
        assert isinstance(known, Scale)
        affine = known if known.axes == axes else affine
    return lifter.emit(affine, y)


def _affine(weight: Tensor | None, bias: Tensor | None, axes: int) -> Scale:
    like = weight if weight is not None else bias
    assert like is not None
    return Scale(torch.ones_like(like[:1]) if weight is None else weight,
                 torch.zeros_like(like[:1]) if bias is None else bias, axes)  # fmt: skip


def _as_shape(given: Any) -> tuple[int, ...] | None:
    sizes = (given,) if isinstance(given, int) else given
    if not isinstance(sizes, list | tuple) or not all(isinstance(n, int) for n in sizes):
        return None
    return tuple(sizes)
