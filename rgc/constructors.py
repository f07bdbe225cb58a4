"""How was a layer of torch.nn made? The arguments of its constructor, and the call as source code."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
MAXIMA = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
LINEAR = (nn.Linear,)

#: What a constructor is told, by class: the attributes have the names of the arguments.
_ARGUMENTS: dict[tuple[type[nn.Module], ...], tuple[str, ...]] = {
    CONVOLUTIONS: (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias", "padding_mode"
    ),
    TRANSPOSED: (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "output_padding", "groups", "bias",
        "dilation",
    ),
    NORMS: ("num_features", "eps", "momentum", "affine", "track_running_stats"),
    AVERAGES: ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
    MAXIMA: ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode"),
    LINEAR: ("in_features", "out_features", "bias"),
}  # fmt: skip


def kinds_of(layer: nn.Module) -> tuple[type[nn.Module], ...] | None:
    """The classes, one per number of axes, of which the layer's is one; None for another class, subclasses included."""
    return next((kinds for kinds in _ARGUMENTS if type(layer) in kinds), None)


def arguments_of(layer: nn.Module) -> dict[str, Any]:
    """The arguments that make a layer like this one, of a class that `kinds_of` knows.

    >>> arguments_of(nn.Linear(3, 4, bias=False))
    {'in_features': 3, 'out_features': 4, 'bias': False}
    """
    kinds = kinds_of(layer)
    assert kinds is not None
    given = {name: getattr(layer, name) for name in _ARGUMENTS[kinds]}
    return {name: value is not None if name == "bias" else value for name, value in given.items()}


def constructor(layer: nn.Module) -> str | None:
    """The call that makes a layer like this one; None where its class is not one of torch.nn, or does not tell.

    >>> constructor(nn.Conv2d(3, 4, 3, padding=1)), constructor(nn.GELU())
    ('nn.Conv2d(3, 4, 3, padding=1)', "nn.GELU(approximate='none')")
    """
    name = type(layer).__name__
    if kinds_of(layer) is not None:
        return f"nn.{name}({', '.join(_told(layer))})"
    text = f"nn.{layer!r}"
    if getattr(nn, name, None) is not type(layer) or "\n" in text:
        return None
    try:
        made = eval(text, {"nn": nn})  # the text is what torch.nn says of itself
    except (SyntaxError, NameError, TypeError, ValueError):
        return None
    return text if repr(made) == repr(layer) else None


def _told(layer: nn.Module) -> Iterator[str]:
    """The arguments as they are written: those that must be given by position, and what is not as it is by default."""
    parameters = inspect.signature(type(layer)).parameters
    for name, value in arguments_of(layer).items():
        plain = value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value
        default = parameters[name].default
        if default is inspect.Parameter.empty:
            yield repr(plain)
        elif plain != default:
            yield f"{name}={plain!r}"


__all__ = [
    "AVERAGES", "CONVOLUTIONS", "LINEAR", "MAXIMA", "NORMS", "TRANSPOSED", "arguments_of", "constructor", "kinds_of",
]  # fmt: skip
