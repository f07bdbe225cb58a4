"""What is given to the compiler? A model in eval mode and an example call, as they are and as the proof sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from rgc.errors import InputError, first_line
from rgc.example import Example, copy_model, precise_form
from rgc.proof import TOLERANCE


def require_eval(model: nn.Module) -> None:
    """Refuse a model with a submodule in training mode, by name."""
    for name, module in model.named_modules():
        if module.training:
            which = f"submodule {name!r}" if name else "model"
            raise InputError(f"the {which} ({type(module).__name__}) is in training mode; call model.eval() first")


def require_definite(model: nn.Module, example: Example) -> None:
    """Refuse weights and examples on which no proof can stand: NaN and infinite weights by name, empty examples.

    Infinite buffers may stay: a mask adds them where a softmax turns them into zeros.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor) or tensor.layout != torch.strided or tensor.device.type == "meta":
            continue  # without values, or of a kind that PyTorch cannot ask this
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        is_weight = isinstance(tensor, nn.Parameter)
        bad = ~tensor.detach().isfinite() if is_weight else tensor.detach().isnan()
        if bool(bad.any()):
            what = "parameter" if is_weight else "buffer"
            first = tensor.detach()[bad][0].item()
            raise InputError(
                f"the {what} {name!r} holds {first} ({int(bad.sum()):,} of {tensor.numel():,} elements): what computes "
                "with that is equal to nothing, so no result could be proved; repair the weights first"
            )
    empty = next((tensor for tensor in example.tensors if not tensor.numel()), None)
    if empty is not None:
        size = "x".join(map(str, empty.shape))
        raise InputError(f"the example has an input without elements ({size}), which proves nothing; give it a batch")


def example_of(model: nn.Module, given: Any) -> Example:
    """The example call: what was given, or what the model itself suggests."""
    if given is None:
        suggest = getattr(model, "example_inputs", None)
        if not callable(suggest):
            raise InputError(
                f"{type(model).__name__} suggests no example_inputs(); pass an example (--input 1x3x224x224)"
            )
        try:
            given = suggest()
        except Exception as error:  # it is the model's own code, which may raise anything
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"example_inputs() of {type(model).__name__} raised {reason}; pass an example") from error
    return Example.of(given)


def floating_dtype(model: nn.Module, example: Example) -> torch.dtype:
    """The one floating-point dtype of the model's parameters (of the example, where it has none)."""
    found = {t.dtype for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()}
    if len(found) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise InputError(f"the model mixes the dtypes {names}; convert it to one first, e.g. model.float()")
    if found:
        return found.pop()
    return next((t.dtype for t in example.tensors if t.is_floating_point()), torch.float32)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's parameters and buffers; the CPU where it has none."""
    return next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))


@dataclass(frozen=True)
class Subject:
    """The model under compilation: as it is, and as the proof sees it (in float64 where it runs in float64).

    ``is_read_only``: forward is known to leave the weights as they are, so it may run on those of the user's model.
    """

    model: nn.Module
    device: torch.device
    proof_model: nn.Module
    proof_example: Example
    expected: Any
    in_float64: bool
    is_read_only: bool
    tolerance: float
    notes: tuple[str, ...]

    @staticmethod
    def of(model: nn.Module, example: Example, dtype: torch.dtype) -> Subject:
        device = device_of(model)
        on_cpu = example.to(torch.device("cpu"))
        try:
            wide = on_cpu.cast(torch.float64)
            found = precise_form(model, wide)
            return Subject(model, device, found.model, wide, found.expected, True, found.shares, TOLERANCE, ())
        # Forward is the user's own and may raise anything; what remains wrong is raised below, in the own dtype.
        except Exception as error:
            name = str(dtype).removeprefix("torch.")
            note = f"the model does not run in float64 ({first_line(error)}); proved in {name} instead"
        try:
            plain = copy_model(model).cpu().requires_grad_(False)
            expected = on_cpu.run(copy_model(plain, share_parameters=True))
        except Exception as error:
            shapes = ", ".join("x".join(map(str, t.shape)) for t in example.tensors)
            raise InputError(
                f"{type(model).__name__} does not run on an input of {shapes}: {first_line(error)}"
            ) from error
        return Subject(model, device, plain, on_cpu, expected, False, False, 256 * torch.finfo(dtype).eps, (note,))
