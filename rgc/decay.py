"""Which activations can a training loop turn linear, step by step, so that the layers around them become mergeable?"""

from __future__ import annotations

from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgc.errors import InputError


@final
class DecayedActivation(nn.Module):
    """An activation that a training loop fades out: ``(1 - decay) * activation(x) + decay * x``.

    At ``decay`` 0 it is the activation, at 1 it is exactly the identity and the layers around it can be merged.
    This is the deep training strategy of VanillaNet (arXiv 2305.12972, section 3.1, equation 1).

    ``x`` may have any shape; the result has the same one. ``decay`` is a 0-dim float buffer: it is saved in the
    state dict and moves with the module. The input is never overwritten. An activation that works in place is
    refused: ``activation(x)`` would replace ``x`` before the blend reads it, and the blend would be the plain
    activation at every ``decay``. Values must be finite (0 times infinity is not a number).

    takes_plain_state: load also the state dict of the activation alone, in whose place this one stands; it leaves the
    decay as it is.

    Raises ``InputError`` for an activation that works in place, and for a ``value`` outside [0, 1].

    >>> fading = DecayedActivation(nn.ReLU(), value=0.25)
    >>> fading(torch.tensor([-4.0, 4.0]))
    tensor([-1.,  4.])
    >>> fading.set_decay(1.0)
    >>> fading(torch.tensor([-4.0, 4.0]))
    tensor([-4.,  4.])
    """

    decay: Tensor  # 0-dim
    takes_plain_state: bool = False  # also of what was pickled before there was a choice

    def __init__(self, activation: nn.Module, value: float = 0.0, *, takes_plain_state: bool = False) -> None:
        super().__init__()
        for name, module in activation.named_modules(prefix="activation"):
            if getattr(module, "inplace", False):
                raise InputError(
                    f"DecayedActivation: {name} is {module}, which overwrites the input that the blend still needs; "
                    f"build it with inplace=False"
                )
        self.activation = activation
        self.takes_plain_state = takes_plain_state
        self.register_buffer("decay", torch.tensor(_checked_decay(value)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # As torch.nn.BatchNorm2d does for checkpoints that are older than one of its buffers.
        if self.takes_plain_state:
            state_dict.setdefault(f"{prefix}decay", self.decay)
            for name in self.activation.state_dict():
                if f"{prefix}{name}" in state_dict:
                    state_dict[f"{prefix}activation.{name}"] = state_dict.pop(f"{prefix}{name}")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: Tensor) -> Tensor:
        activated: Tensor = self.activation(x)
        return (1.0 - self.decay) * activated + self.decay * x

    def set_decay(self, value: float) -> None:
        """Set ``decay``, in [0, 1], in place; ``InputError`` outside."""
        self.decay.fill_(_checked_decay(value))

    def extra_repr(self) -> str:
        return _decay_repr(self.decay)


@final
class DecayedLeakyReLU(nn.Module):
    """A leaky ReLU whose negative slope is the decay: a ReLU at 0, exactly the identity at 1.

    The same function as ``DecayedActivation(nn.ReLU())``, in the form that VanillaNet trains with (arXiv
    2305.12972, section 3.1). ``x`` may have any shape. The slope stays the 0-dim buffer ``decay``, a tensor: a Python
    number read from it would be a break in the graph of ``torch.compile`` and an error in ``torch.export``.

    Raises ``InputError`` for a ``value`` outside [0, 1].

    >>> DecayedLeakyReLU(0.5)(torch.tensor([-4.0, 4.0]))
    tensor([-2.,  4.])
    """

    decay: Tensor  # 0-dim

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("decay", torch.tensor(_checked_decay(value)))

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x, self.decay.reshape(1))

    def set_decay(self, value: float) -> None:
        """Set ``decay``, in [0, 1], in place; ``InputError`` outside."""
        self.decay.fill_(_checked_decay(value))

    def extra_repr(self) -> str:
        return _decay_repr(self.decay)


@final
class SeriesActivation(nn.Module):
    """A ReLU that sees its neighbours: a weighted sum of shifted activations, then a batch norm.

    The series informed activation function of VanillaNet (arXiv 2305.12972, section 3.2, equations 5 and 6): a
    depthwise convolution of ``relu(x)`` over ``(2 * order + 1)`` x ``(2 * order + 1)`` positions, zero padded by
    ``order``, without a bias. ``x`` is [batch, channels, height, width]; the result has the same shape.

    Raises ``InputError`` when ``channels`` is not positive or ``order`` is negative.

    >>> SeriesActivation(8, order=1)(torch.randn(2, 8, 5, 7)).shape
    torch.Size([2, 8, 5, 7])
    """

    def __init__(self, channels: int, order: int = 3) -> None:
        super().__init__()
        if channels < 1 or order < 0:
            raise InputError(
                f"SeriesActivation: channels must be at least 1 and order at least 0, got {channels} and {order}"
            )
        self.channels = channels
        self.order = order
        side = 2 * order + 1
        self.weight = nn.Parameter(torch.empty(channels, 1, side, side))  # [channels, 1, kh, kw]
        self.bn = nn.BatchNorm2d(channels, eps=1e-6)
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        shifted = F.conv2d(F.relu(x), self.weight, padding=self.order, groups=self.channels)
        normalised: Tensor = self.bn(shifted)
        return normalised

    def extra_repr(self) -> str:
        return f"{self.channels}, order={self.order}"


def decaying_activations(model: nn.Module) -> dict[str, DecayedActivation | DecayedLeakyReLU]:
    """Every decaying activation of ``model`` by its path, in the order of its modules; a shared one once.

    >>> list(decaying_activations(nn.Sequential(nn.Linear(2, 2), DecayedActivation(nn.ReLU()))))
    ['1']
    """
    kinds = (DecayedActivation, DecayedLeakyReLU)
    return {path: module for path, module in model.named_modules() if isinstance(module, kinds)}


def set_decay(model: nn.Module, value: float) -> None:
    """Set the decay of every ``DecayedActivation`` and ``DecayedLeakyReLU`` in ``model``, in place.

    Raises ``InputError`` when ``value`` is outside [0, 1] or when the model has no decaying activation.

    >>> model = nn.Sequential(nn.Linear(2, 2), DecayedActivation(nn.ReLU()))
    >>> set_decay(model, 1.0)
    >>> model[1].decay
    tensor(1.)
    """
    for module in require_decaying_activations(model, "set_decay").values():
        module.set_decay(value)


def require_decaying_activations(model: nn.Module, asker: str) -> dict[str, DecayedActivation | DecayedLeakyReLU]:
    """`decaying_activations`; ``InputError`` in the name of ``asker`` where there is none."""
    found = decaying_activations(model)
    if not found:
        raise InputError(
            f"{asker}: {type(model).__name__} has no decaying activation; "
            f"build it with rgc.nn.DecayedActivation or rgc.nn.DecayedLeakyReLU, or make one with rgc.nn.linearize"
        )
    return found


def _checked_decay(value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise InputError(f"decay must be between 0 (the activation) and 1 (the identity), got {value}")
    return float(value)


def _decay_repr(decay: Tensor) -> str:
    return "decay=meta" if decay.is_meta else f"decay={float(decay):g}"
