"""How is a model called? One call with its arguments: by name, in other dtypes, with other values, as graph inputs."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map

from rgc.errors import InputError, TraceError
from rgc.precision import LOW, ReadOnlyModel, dtype_in, precisely
from rgc.proof import relative_difference

#: Two runs of one model in float64 differ by no more than this: there is no order of summation but one to choose from.
SAME = 1e-13


@dataclass(frozen=True)
class Example:
    """One call of a model: positional and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(given: Any) -> Example:
        """The call that a tensor, a tuple of positional or a dict of keyword arguments stands for."""
        if isinstance(given, Example):
            return given
        if isinstance(given, dict):
            return Example((), given)
        return Example(tuple(given) if isinstance(given, list | tuple) else (given,))

    def cast(self, dtype: torch.dtype) -> Example:
        """The same call with floating-point tensors in ``dtype``; every tensor a copy."""

        def convert(leaf: Tensor) -> Tensor:
            return leaf.detach().to(dtype, copy=True) if leaf.is_floating_point() else leaf.detach().clone()

        return self._mapped(convert)

    def cloned(self) -> Example:
        """The same call with copies of its tensors."""
        return self._mapped(lambda leaf: leaf.detach().clone())

    def to(self, device: torch.device) -> Example:
        """The same call with its tensors on ``device``."""
        return self._mapped(lambda leaf: leaf.to(device))

    def redrawn(self, batch: int, seed: int = 0) -> Example:
        """A call like this one with normal values and ``batch`` samples; integers are drawn from those of this call."""
        generator = torch.Generator().manual_seed(seed)
        own = next((tensor.shape[0] for tensor in self.tensors if tensor.dim() > 1), None)

        def draw(leaf: Tensor) -> Tensor:
            shape = (batch, *leaf.shape[1:]) if leaf.dim() > 1 and leaf.shape[0] == own else tuple(leaf.shape)
            if leaf.is_floating_point():
                return torch.randn(shape, generator=generator, dtype=torch.float64).to(leaf)
            chosen = torch.randint(0, max(leaf.numel(), 1), shape, generator=generator).to(leaf.device)
            return leaf.flatten()[chosen] if leaf.numel() else leaf

        return self._mapped(draw)

    def run(self, model: Callable[..., Any], *, widens: bool = True) -> Any:
        """The model's output on copies of the arguments (a model may overwrite its input).

        Where these are in float64 it runs `precisely`, with weights of a lower precision if it ``widens``.
        """
        fresh = self.cloned()
        with torch.no_grad(), precisely(self.tensors, widens=widens):
            return model(*fresh.args, **fresh.kwargs)

    def bind(self, model: nn.Module) -> dict[str, Any]:
        """Argument values by name: ``*args`` as args_0, args_1, ..., each of ``**kwargs`` by its own."""
        return self.binding(model).values

    def binding(self, model: nn.Module) -> Binding:
        """How this call fits the signature of ``forward``; `InputError` where it does not."""
        signature = inspect.signature(model.forward)
        try:
            bound = signature.bind(*self.args, **self.kwargs)
        except TypeError as error:
            raise InputError(f"the example does not fit {type(model).__name__}.forward: {error}") from error
        return Binding(signature, dict(bound.arguments))

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments."""
        return [leaf for leaf in tree_flatten((self.args, self.kwargs))[0] if isinstance(leaf, Tensor)]

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Example:
        def convert(leaf: Any) -> Any:
            return function(leaf) if isinstance(leaf, Tensor) else leaf

        return Example(tree_map(convert, self.args), tree_map(convert, self.kwargs))


@dataclass(frozen=True)
class Binding:
    """A call against the signature of a ``forward``: its arguments by the flat names of the graph's inputs."""

    signature: inspect.Signature
    arguments: dict[str, Any]

    @property
    def values(self) -> dict[str, Any]:
        """What the call gives, in the order of the signature."""
        flat: dict[str, Any] = {}
        for name, value in self.arguments.items():
            kind = self.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                flat.update({f"{name}_{index}": each for index, each in enumerate(value)})
            else:
                flat.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
        return flat

    @property
    def defaults(self) -> dict[str, Any]:
        """What each named parameter is where a call leaves it out."""
        parameters = self.signature.parameters.values()
        return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}

    def completed(self) -> Binding:
        """The same call with every default passed on."""
        order = list(self.signature.parameters)
        every = {**self.defaults, **self.arguments}
        return Binding(self.signature, dict(sorted(every.items(), key=lambda item: order.index(item[0]))))

    def call(self, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with other ``values`` by the same names, as positional and keyword arguments."""
        bound = self.signature.bind_partial()
        for name, value in self.arguments.items():
            kind = self.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                bound.arguments[name] = tuple(values[f"{name}_{index}"] for index in range(len(value)))
            elif kind is inspect.Parameter.VAR_KEYWORD:
                bound.arguments[name] = {key: values[key] for key in value}
            else:
                bound.arguments[name] = values[name]
        return bound.args, bound.kwargs


def declare(tracer: fx.proxy.TracerBase, binding: Binding) -> dict[str, Any]:
    """Placeholders for the call, and for each argument what a trace computes with.

    Tensors become proxies, in the structure in which they come. Everything else is a constant of the trace, which a
    check at run time compares with what the caller passes.
    """
    given = binding.values
    left_out = {name: value for name, value in binding.defaults.items() if name not in given and _is_plain(value)}
    proxies = {}
    for name in sorted({**given, **left_out}, key=_rank(binding)):
        is_constant = name in left_out or _is_plain(given[name])
        default = (binding.defaults[name],) if is_constant and _is_plain(binding.defaults.get(name, tracer)) else ()
        proxies[name] = tracer.create_proxy("placeholder", name, default, {}, name=name)
    for name, value in left_out.items():
        _check(tracer, proxies[name], value, name)
    return {name: _unpacked(tracer, proxies[name], value, name) for name, value in given.items()}


def _rank(binding: Binding) -> Callable[[str], int]:
    order = {name: index for index, name in enumerate(binding.signature.parameters)}
    for name, value in binding.arguments.items():
        kind = binding.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            order.update({f"{name}_{index}": order[name] for index in range(len(value))})
    last = len(order)
    return lambda name: order.get(name, last)


def _unpacked(tracer: fx.proxy.TracerBase, proxy: Any, value: Any, name: str) -> Any:
    if isinstance(value, Tensor):
        return proxy
    if not any(isinstance(leaf, Tensor) for leaf in tree_flatten(value)[0]):
        _check(tracer, proxy, value, name)
        return value
    length = tracer.create_proxy("call_function", len, (proxy,), {})
    _check(tracer, length, len(value), f"len({name})")
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    parts = [_unpacked(tracer, proxy[key], value[key], f"{name}[{key!r}]") for key in keys]
    if isinstance(value, dict):
        return type(value)(zip(keys, parts, strict=True))
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def _check(tracer: fx.proxy.TracerBase, proxy: fx.Proxy, value: Any, name: str) -> None:
    """The compiled model holds for this very constant."""
    if not _is_plain(value):
        raise TraceError(f"the input {name} is of type {type(value).__name__}, which no graph can hold")
    same = tracer.create_proxy("call_function", operator.eq, (proxy, value), {})
    message = f"this compiled model holds for {name} = {value!r} only; compile it again for another"
    tracer.create_proxy("call_function", torch._assert, (same, message), {})


def _is_plain(value: Any) -> bool:
    leaves = tree_flatten(value)[0]
    return all(
        leaf is None or isinstance(leaf, bool | int | float | str | torch.dtype | torch.device) for leaf in leaves
    )


def output_difference(expected: Any, found: Any) -> float:
    """The largest difference over all tensors of two outputs, each relative to its own scale."""
    left, right = (tree_flatten(_plain(output))[0] for output in (expected, found))
    if len(left) != len(right):
        return float("inf")
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            worst = max(worst, relative_difference(a.detach(), b.detach()))
        elif isinstance(a, Tensor) or isinstance(b, Tensor) or not (a is b or bool(a == b)):
            return float("inf")
    return worst


def _plain(output: Any) -> Any:
    """Mappings and dataclasses as plain dicts, so that an OrderedDict equals the dict that a traced model returns."""
    if isinstance(output, Mapping):
        return {key: _plain(value) for key, value in output.items()}
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {each.name: _plain(getattr(output, each.name)) for each in dataclasses.fields(output)}
    if isinstance(output, list | tuple):
        return [_plain(value) for value in output]
    return output


def copy_model(model: nn.Module, *, share_parameters: bool = False, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy to run, so that whatever ``forward`` writes, the original stays as it is; cast to ``dtype`` if given.

    Unlike ``nn.Module.to`` that takes tensors along which are neither parameters nor buffers, and unlike
    ``copy.deepcopy`` those with a gradient history: a weight that a hook computes.
    """
    memo: dict[int, Any] = {id(p): p for p in model.parameters()} if share_parameters else {}
    copied = _copied(model, memo, dtype)
    if dtype is None:
        return copied
    # nn.Module.to casts complex parameters as well, to a dtype without imaginary parts.
    return cast(nn.Module, copied._apply(lambda tensor: tensor.to(dtype_in(dtype, tensor))))  # type: ignore[no-untyped-call]


def same_memory(model: nn.Module) -> nn.Module:
    """A copy with modules and parameters of its own, whose floating-point weights lie in the memory of the model's."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter and parameter.is_floating_point():
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    memo.update({id(buffer): buffer.detach() for buffer in model.buffers() if buffer.is_floating_point()})
    return _copied(model, memo, None).requires_grad_(False)


def _copied(model: nn.Module, memo: dict[int, Any], dtype: torch.dtype | None) -> nn.Module:
    for module in model.modules():
        for leaf in tree_flatten([value for name, value in vars(module).items() if not name.startswith("_")])[0]:
            if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter):
                wanted = leaf.dtype if dtype is None else dtype_in(dtype, leaf)
                memo.setdefault(id(leaf), leaf.detach().to(wanted, copy=True))
    return copy.deepcopy(model, memo)


@dataclass(frozen=True)
class Precise:
    """A model that runs in float64 on the CPU, and its output on an example there.

    ``shares``: its weights are those of the model that it came from, widened where they are used.
    """

    model: nn.Module
    expected: Any
    shares: bool


def precise_form(model: nn.Module, example: Example) -> Precise:
    """``model`` as it runs in float64 on the CPU, without a copy of its weights where one makes no difference.

    Whether it does is tried: a copy in float64 tells the output, and whether ``forward`` writes to its weights. Raises
    what ``forward`` raises in float64.
    """
    precise = copy_model(model, dtype=torch.float64).cpu().requires_grad_(False)
    running = copy_model(precise, share_parameters=True)
    expected = example.run(running, widens=False)
    if not _has_weights_of(running, model):
        return Precise(copy_model(model, dtype=torch.float64).cpu().requires_grad_(False), expected, shares=False)
    del running
    tensors = [tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.is_floating_point()]
    if not tensors or not all(tensor.is_cpu and tensor.dtype in LOW for tensor in tensors):
        return Precise(precise, expected, shares=False)
    shared = same_memory(model)
    try:
        found = example.run(copy_model(shared, share_parameters=True))
    except Exception:  # code that sees the dtypes of its weights may raise anything: then it gets a copy
        return Precise(precise, expected, shares=False)
    is_same = output_difference(expected, found) <= SAME
    return Precise(shared if is_same else precise, expected, is_same)


def runnable(model: nn.Module, dtype: torch.dtype, *, is_read_only: bool) -> Callable[..., Any]:
    """``model`` as it runs in ``dtype`` on its device, such that the weights of ``model`` stay as they are.

    ``is_read_only``: ``forward`` is known to leave them so, and runs on them instead of on a copy while it does.
    """

    def copied() -> nn.Module:
        return copy_model(model, dtype=dtype)

    is_cast = any(t.is_floating_point() and t.dtype != dtype for t in model.parameters())
    return copied() if is_cast or not is_read_only else ReadOnlyModel(same_memory(model), copied)


def runnable_in_float64(precise: nn.Module, model: nn.Module, *, is_read_only: bool) -> Callable[..., Any]:
    """``precise``, the form of ``model`` for float64, as it runs on the CPU; ``is_read_only`` as in `runnable`."""
    running = copy_model(precise, share_parameters=True)
    if not is_read_only:
        return running
    return ReadOnlyModel(running, lambda: copy_model(model, dtype=torch.float64).cpu())


def _has_weights_of(after: nn.Module, before: nn.Module) -> bool:
    """Are the parameters and buffers of ``after``, a copy in float64, still those of ``before``?"""
    old, new = ({**dict(each.named_parameters()), **dict(each.named_buffers())} for each in (before, after))
    return old.keys() == new.keys() and all(is_same_tensor(tensor, new[name]) for name, tensor in old.items())


def is_same_tensor(before: Tensor, after: Tensor) -> bool:
    """Are the elements the same, NaN included, if the first tensor is cast to the device and dtype of the second?"""
    if before.shape != after.shape:
        return False
    cast = before.detach().to(after.device, after.dtype)
    return torch.equal(cast, after) or torch.equal(cast.nan_to_num(), after.nan_to_num())


@contextmanager
def unchanged_generators() -> Iterator[None]:
    """Random numbers drawn inside leave the global generators as they were."""
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch's own
    devices = list(range(torch.cuda.device_count())) if started else []
    with torch.random.fork_rng(devices=devices):
        yield


__all__ = [
    "Binding", "Example", "Precise", "copy_model", "declare", "is_same_tensor", "output_difference", "precise_form",
    "precisely", "runnable", "runnable_in_float64", "same_memory", "unchanged_generators",
]  # fmt: skip
