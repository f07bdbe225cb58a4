"""Does a loaded artifact compute what its original computes? The bar of `rgc.verify`, for what files give back.

A file gives back less than a module: an ``.onnx`` returns a flat list of tensors, its dtype shows in its inputs only,
and what it holds may take the batch of its example and no other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rgc.data import Sample
from rgc.errors import InputError, NotEquivalentError
from rgc.example import Example, copy_model
from rgc.onnx_artifact import OnnxModel
from rgc.report import Verification
from rgc.subject import device_of, floating_dtype
from rgc.verify import Case, Cases, Level, Pair

#: What artifacts raise for inputs that they do not take: onnxruntime through `OnnxModel`, torch by guards and kernels.
_REFUSALS = (InputError, RuntimeError, AssertionError, ValueError, IndexError, TypeError)

_ONNX_DTYPES = {
    "tensor(float16)": torch.float16,
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(bfloat16)": torch.bfloat16,
}


def compare(
    original: nn.Module,
    artifact: nn.Module,
    example: Example,
    *,
    level: Level = "quick",
    samples: Sequence[Sample] = (),
) -> Verification:
    """Hold ``artifact``, in its own dtype, against the float64 ``original`` on example, drawn inputs and ``samples``.

    Drawn batches that the artifact refuses to take are left out: it is then not wrong, but made for one batch size.
    Raises `InputError` where one of the two cannot run the example or a sample; a difference is returned, not raised.
    """
    pair = _pair(original, artifact, example.to(torch.device("cpu")))
    if isinstance(pair, str):
        return _different(level, pair)
    refused = next((sample for sample in samples if not pair.accepts(sample.example)), None)
    if refused is not None:
        raise InputError(f"the artifact does not take {_describe(refused.example)} ({refused.name})")
    try:
        return pair.check(example.to(torch.device("cpu")), level=level, free_sizes=False, samples=samples)
    except NotEquivalentError as error:
        return _different(level, str(error))


def compare_each(original: nn.Module, artifact: nn.Module, examples: Sequence[Example]) -> list[Verification | None]:
    """As `compare`, on just these examples of one form, each by itself; None where the original does not take one."""
    pair = _pair(original, artifact, examples[0])
    return [_different("quick", pair) if isinstance(pair, str) else _compared(pair, each) for each in examples]


def _compared(pair: Pair, example: Example) -> Verification | None:
    try:
        return pair.check_deployed(Cases("quick", [Case(example, None)], None))
    except NotEquivalentError as error:  # which a failure of the artifact is, too
        return _different("quick", str(error))
    except _REFUSALS:
        return None


def _pair(original: nn.Module, artifact: nn.Module, example: Example) -> Pair | str:
    """The two as `Pair` compares them, or why they differ on the example."""
    dtype, device = _dtype_of(artifact, original, example), device_of(artifact)
    reference, precision = _reference(original, example)
    try:
        found = example.cast(dtype).to(device).run(_flat(artifact))
    except _REFUSALS as error:
        raise InputError(f"the artifact does not take {_describe(example)}: {_first(error)}") from error
    expected = example.cast(precision).run(_flat(reference))
    if _sizes(found) != _sizes(expected):
        return f"returns {_sizes(found)} where the original returns {_sizes(expected)}"
    accepted = {_shapes(example): True}

    def accepts(drawn: Example) -> bool:
        if _shapes(drawn) not in accepted:
            accepted[_shapes(drawn)] = _takes(artifact, drawn.cast(dtype).to(device))
        return accepted[_shapes(drawn)]

    deployed = _flat(copy_model(original, dtype=dtype).to(device))
    precise = _flat(reference) if precision == torch.float64 else None
    return Pair(deployed, _flat(artifact), precise, None, dtype, device, accepts)


def _different(level: Level, reason: str) -> Verification:
    return Verification(False, None, float("inf"), 0.0, 0.0, 0, level, reason)


def _dtype_of(artifact: nn.Module, original: nn.Module, example: Example) -> torch.dtype:
    """The floating-point dtype in which the artifact computes."""
    if not isinstance(artifact, OnnxModel):
        return floating_dtype(artifact, example.cast(floating_dtype(original, example)))
    kinds = [entry.type for entry in artifact.session.get_inputs()]
    found = [_ONNX_DTYPES[kind] for kind in kinds if kind in _ONNX_DTYPES]
    return found[0] if found else floating_dtype(original, example)


def _reference(original: nn.Module, example: Example) -> tuple[nn.Module, torch.dtype]:
    """The original on the CPU, in float64 or, if it runs in its own dtype only, in that."""
    own = floating_dtype(original, example)
    precise = copy_model(original, dtype=torch.float64).cpu().requires_grad_(False)
    try:
        example.cast(torch.float64).run(precise)
        return precise, torch.float64
    except (RuntimeError, TypeError):
        pass  # it may have a dtype written into it; the next run tells that from an input that it does not take
    plain = copy_model(original).cpu().requires_grad_(False)
    try:
        example.cast(own).run(plain)
        return plain, own
    except Exception as error:
        raise InputError(f"{type(original).__name__} does not run on {_describe(example)}: {_first(error)}") from error


def _takes(artifact: nn.Module, example: Example) -> bool:
    try:
        example.run(artifact)
    except _REFUSALS:
        return False
    return True


def _flat(model: Callable[..., Any]) -> Callable[..., list[Any]]:
    """The same model with its tensors as a flat list, which is all that ONNX returns."""
    return lambda *args, **kwargs: [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]


def _sizes(tensors: list[Tensor]) -> str:
    return ", ".join("x".join(map(str, tensor.shape)) or "a scalar" for tensor in tensors) or "nothing"


def _shapes(example: Example) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in example.tensors)


def _describe(example: Example) -> str:
    return f"an input of {', '.join('x'.join(map(str, shape)) for shape in _shapes(example))}"


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
