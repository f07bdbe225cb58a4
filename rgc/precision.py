"""In which precision does a model run, and what may it write? In float64 without a copy of its weights, and read-only.

The function of a model is what it computes without rounding. To know it, a model runs in float64: its inputs are of
that dtype, and weights of a lower one are widened call by call, so that no more than the weights of one call exist
twice. Casts to a lower precision inside the model would hide 1e-10 behind 1e-7, and are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

#: The dtypes that are widened.
LOW = frozenset({torch.float32, torch.float16, torch.bfloat16})


def dtype_in(dtype: torch.dtype, tensor: Tensor) -> torch.dtype:
    """The dtype of ``tensor`` in a model of the floating-point ``dtype``: integers keep theirs, complex stays complex.

    >>> dtype_in(torch.float64, torch.ones(1)), dtype_in(torch.float64, torch.ones(1, dtype=torch.complex64))
    (torch.float64, torch.complex128)
    """
    if tensor.is_complex():
        return torch.complex128 if dtype == torch.float64 else torch.complex64
    return dtype if tensor.is_floating_point() else tensor.dtype


class WriteError(RuntimeError):
    """A model writes to its weights, so it needs a copy of them to run on."""


def precisely(tensors: Any, *, widens: bool = True) -> AbstractContextManager[Any]:
    """A context in which a model of any floating-point dtype runs in float64, if any of ``tensors`` is of that dtype.

    Without ``widens`` only its casts are ignored, and its weights have to be in float64. Raises `WriteError` from
    within where the model overwrites a weight of a lower precision.
    """
    return _InFloat64(widens) if is_precise(tensors) else nullcontext()


def is_precise(tensors: Any) -> bool:
    """Is any of these tensors in float64?"""
    return any(isinstance(leaf, Tensor) and leaf.dtype == torch.float64 for leaf in tree_flatten(tensors)[0])


def in_float64() -> AbstractContextManager[Any]:
    """A context in which every call computes in float64, whatever the precision of its arguments."""
    return _InFloat64(widens=True)


class _InFloat64(TorchFunctionMode):
    def __init__(self, widens: bool) -> None:
        super().__init__()
        self._widens = widens

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _ABOUT_FORM or _holds_proxy(args) or options.get("device") == "meta":
            return func(*args, **options)  # a trace keeps what the user wrote, and so does who infers types
        if name == "__get__":  # an attribute, such as w.dtype or w.T
            found = func(*args, **options)
            is_low = isinstance(found, torch.dtype) and found in LOW and not args[0].is_meta
            return torch.float64 if is_low else found
        if func in _CASTS:
            func = Tensor.double
        wide: list[Tensor] | None = [] if self._widens else None
        result = func(*_widened(args, wide), **_widened(options, wide))
        if wide and any(tensor._version for tensor in wide):
            raise WriteError(f"{name} overwrites a weight")
        if func in _FACTORIES and result.dtype == torch.float32:
            return func(*args, **{**options, "dtype": torch.float64})
        return result


_CASTS = frozenset({Tensor.float, Tensor.half, Tensor.bfloat16})
_FACTORIES = frozenset({
    torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.logspace, torch.ones, torch.rand,
    torch.randn, torch.tensor, torch.zeros,
})  # fmt: skip

#: What only asks about a tensor, changes its flags, or looks at the same memory: a copy would answer something else.
_ABOUT_FORM = frozenset({
    "__getitem__", "__hash__", "__len__", "__set__", "as_strided", "chunk", "data_ptr", "detach", "diagonal", "dim",
    "expand", "expand_as", "flatten", "get_device", "is_complex", "is_contiguous", "is_floating_point", "is_set_to",
    "movedim", "narrow", "ndimension", "nelement", "numel", "permute", "promote_types", "register_hook",
    "requires_grad_", "reshape", "select", "size", "split", "squeeze", "storage_offset", "stride", "swapaxes", "t",
    "transpose", "unbind", "unflatten", "unsqueeze", "untyped_storage", "view", "view_as",
})  # fmt: skip


def _holds_proxy(arguments: Any) -> bool:
    """Is there a value of a trace among the positional arguments, also inside of lists?"""
    return any(isinstance(each, fx.Proxy) or (type(each) in (list, tuple) and _holds_proxy(each)) for each in arguments)


def _widened(value: Any, made: list[Tensor] | None) -> Any:
    """The same arguments in float64, tensors of a lower precision as copies that are noted in ``made``, if that is."""
    if isinstance(value, Tensor):
        if made is None or value.dtype not in LOW or value.is_meta:
            return value
        made.append(value.double())
        return made[-1]
    if isinstance(value, torch.dtype):
        return torch.float64 if value in LOW else value
    if type(value) is tuple:
        return tuple([_widened(each, made) for each in value])
    if type(value) is list and any(isinstance(each, Tensor | list | tuple) for each in value):
        return [_widened(each, made) for each in value]
    if type(value) is dict:
        return {key: _widened(each, made) for key, each in value.items()}
    return value


class ReadOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """A context in which `WriteError` is raised before anything overwrites the memory of one of ``tensors``."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._protected = {_memory(tensor) for tensor in tensors if tensor.numel()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func._schema.is_mutable:
            for index, declared in enumerate(func._schema.arguments):
                given = args[index] if index < len(args) else options.get(declared.name)
                if declared.alias_info is not None and declared.alias_info.is_write:
                    self._require_unprotected(given, str(func))
        return func(*args, **options)

    def _require_unprotected(self, given: Any, name: str) -> None:
        for tensor in tree_flatten(given)[0]:
            if isinstance(tensor, Tensor) and tensor.numel() and _memory(tensor) in self._protected:
                raise WriteError(f"{name} overwrites a weight")


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Jittered(TorchFunctionMode):
    """A context in which the parameters of ``model`` are moved by about ``units`` in the last place, up or down.

    Each is moved where it is used, always in the same way, and in the dtype in which it is used: that of the parameter,
    or float64 where the model runs `precisely`.
    """

    def __init__(self, model: nn.Module, seed: int, dtype: torch.dtype | None = None, units: int = 1) -> None:
        super().__init__()
        self._units = units
        self._seeds = {id(parameter): seed + index for index, parameter in enumerate(model.parameters())}
        self._kept = list(model.parameters())  # alive, and so are their ids
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _ABOUT_FORM or name == "__get__":
            return func(*args, **options)
        args, options = tree_map(self._moved, (tuple(args), options))
        return func(*args, **options)

    def _moved(self, leaf: Any) -> Any:
        seed = self._seeds.get(id(leaf))
        return leaf if seed is None else jittered(leaf.to(self._dtype or leaf.dtype), seed, self._units)


def jittered(tensor: Tensor, seed: int, units: int = 1) -> Tensor:
    """The tensor with each element moved by about ``units`` in the last place, up or down."""
    if not tensor.is_floating_point():
        return tensor
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor) * 2 - 1
    return tensor + signs * tensor.abs() * (units * torch.finfo(tensor.dtype).eps)


class ReadOnlyModel:
    """``model`` as a function that leaves its weights as they are: it runs ``copied()`` once it tries to write them."""

    def __init__(self, model: nn.Module, copied: Callable[[], nn.Module]) -> None:
        self.model, self._copied = model, copied
        self._is_copy = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the model."""
        if self._is_copy:
            return self.model(*args, **kwargs)
        given = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        try:
            with ReadOnly([*self.model.parameters(), *self.model.buffers()]):
                return self.model(*args, **kwargs)
        except WriteError:
            self.model, self._is_copy = self._copied(), True
        args, kwargs = given
        return self.model(*args, **kwargs)


__all__ = [
    "LOW", "Jittered", "ReadOnly", "ReadOnlyModel", "WriteError", "dtype_in", "in_float64", "is_precise",
    "jittered", "precisely",
]  # fmt: skip
