"""What are a user's own inputs? Any number of samples, as calls of the size that the example has, each with a name.

Data have the form of the example (a tensor, positional or keyword arguments) with more samples along the first axis.
They are cut into calls of as many samples as the example has: a model that takes one batch only takes them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from rgc.errors import InputError
from rgc.example import Example


@dataclass(frozen=True)
class Sample:
    """A call with the samples ``first`` to ``last`` of the data, counted from 0.

    along: for each tensor of the call, whether its first axis is that of the samples.
    """

    example: Example
    first: int
    last: int
    along: tuple[bool, ...]

    @property
    def name(self) -> str:
        """``sample 3 of the data``, ``samples 4 to 7 of the data``."""
        span = f" {self.first}" if self.first == self.last else f"s {self.first} to {self.last}"
        return f"sample{span} of the data"

    def part(self, first: int, last: int) -> Sample:
        """The call with the samples ``first`` to ``last`` of these, counted from 0."""
        along = iter(self.along)

        def cut(leaf: Any) -> Any:
            return leaf[first : last + 1] if isinstance(leaf, Tensor) and next(along) else leaf

        args, kwargs = tree_map(cut, (self.example.args, self.example.kwargs))
        return Sample(Example(args, kwargs), self.first + first, self.first + last, self.along)

    def singles(self) -> list[Sample]:
        """Each sample as a call of its own."""
        return [self.part(index, index) for index in range(self.last - self.first + 1)]


def samples_of(data: Any, example: Example, model: nn.Module) -> tuple[Sample, ...]:
    """``data`` cut into calls like ``example``; the last one overlaps the one before, so that it is as large.

    Raises `InputError` for data of another form, without samples, of different numbers of them, or with NaN.
    """
    call = Example.of(data)
    try:
        given, wanted = call.bind(model), example.bind(model)
    except InputError as error:
        raise InputError(str(error).replace("the example does", "the data do")) from error
    if given.keys() != wanted.keys():
        names = ", ".join(given.keys() ^ wanted.keys())
        raise InputError(f"the data and the example are calls of different arguments ({names})")
    batch = next((tensor.shape[0] for tensor in example.tensors if tensor.dim() > 1), None)
    values: dict[str, Any] = {}
    lengths: dict[str, Any] = {}  # in the form of the values: how many samples a tensor has, None for one without
    for name in wanted:
        (found, form), (own, own_form) = tree_flatten(given[name]), tree_flatten(wanted[name])
        if form != own_form:
            raise InputError(f"the data give {name!r} in another structure than the example")
        fitted = [_fitting(name, each, like, batch) for each, like in zip(found, own, strict=True)]
        values[name] = tree_unflatten(fitted, form)
        counts = [_length(each, like, batch) for each, like in zip(fitted, own, strict=True)]
        lengths[name] = tree_unflatten(counts, form)
    binding = example.binding(model)
    args, kwargs = binding.call(values)
    # a tensor and its length stand at the same place of the call
    pairs = zip(tree_flatten((args, kwargs))[0], tree_flatten(binding.call(lengths))[0], strict=True)
    along = [length for leaf, length in pairs if isinstance(leaf, Tensor)]
    every = {length for length in along if length >= 0}
    if len(every) > 1:
        raise InputError(f"the inputs in the data have different numbers of samples: {', '.join(map(str, every))}")
    count = every.pop() if every else 1
    if count == 0:
        raise InputError("the data have no samples")
    whole = Sample(Example(args, kwargs), 0, count - 1, tuple(length >= 0 for length in along))
    size = count if batch is None else min(batch, count)
    return tuple(whole.part(first, first + size - 1) for first in _starts(count, size))


def _starts(count: int, size: int) -> Iterator[int]:
    """Where calls of ``size`` samples start; the last one ends with the last sample.

    >>> list(_starts(7, 3))
    [0, 3, 4]
    """
    return (min(start, count - size) for start in range(0, count, size))


def _length(given: Any, like: Any, batch: int | None) -> int:
    """How many samples a tensor has; -1 for what has no axis of samples."""
    return given.shape[0] if isinstance(like, Tensor) and like.dim() and like.shape[0] == batch else -1


def _fitting(name: str, given: Any, like: Any, batch: int | None) -> Any:
    """One argument of the data, as the example has it but for the number of samples, and of sizes that may be free."""
    if not isinstance(like, Tensor):
        same = not isinstance(given, Tensor) and type(given) is type(like) and bool(given == like)
        if not same:
            raise InputError(f"the data give another {name!r} than the example, which is a constant of the result")
        return given
    if not isinstance(given, Tensor):
        raise InputError(f"the data give {name!r} as {type(given).__name__}; the example has a tensor there")
    given, like = given.detach(), like.detach()
    kinds = given.is_floating_point() == like.is_floating_point() and (
        given.dtype == like.dtype or like.is_floating_point()
    )
    if not kinds:
        raise InputError(f"the data give {name!r} in {given.dtype}; the example has {like.dtype}")
    if given.dim() != like.dim():
        raise InputError(
            f"the data give {name!r} with {given.dim()} axes ({_size(given)}); the example has {like.dim()} "
            f"({_size(like)}), the first of them for samples"
        )
    if (not like.dim() or like.shape[0] != batch) and given.shape != like.shape:
        raise InputError(f"the data give {name!r} of {_size(given)}; it has no axis of samples and is {_size(like)}")
    if given.is_floating_point() and bool(given.isnan().any()):
        row = int(given.isnan().reshape(given.shape[0], -1).any(1).nonzero()[0]) if given.dim() else 0
        raise InputError(f"the data hold NaN ({name!r}, sample {row}): what is computed from that is equal to nothing")
    return given.cpu()  # where the proof runs


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


__all__ = ["Sample", "samples_of"]
