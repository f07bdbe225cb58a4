"""What does a traced value answer when ``forward`` asks for its rank, dtype, device or size? What the example says.

Beside every node of the trace runs the same call on tensors without data, for the example and for calls with another
batch, other sizes and, last, other channels; the model may refuse that last one, which then answers nothing from there
on. What does not depend on sizes (the rank, ``x.is_cuda``, ``x.dtype == torch.float16``) is a constant always, and so
is an axis that is equally long in all of the calls: the channels behind a layer that counts them. If that does not do,
the channels of the inputs are taken from the example too; and if that does not, where the calls differ in the batch
only, every number on which they agree: a trace at the example's size whose batch stays free. What depends on the values
of tensors is never a constant, for those have none here.

The calls are kept until somebody asks, and then run in the order in which they were made: most models never ask.
"""

from __future__ import annotations

import copy
import logging
import operator
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map

from rgc.example import precisely
from rgc.operators import pytorch_name

Constant = Literal["nothing", "channels", "sizes"]


class TracedValue(fx.Proxy):
    """A node of a trace with what it is for each of the probes; nothing where that cannot be known without data."""

    def __init__(self, node: fx.Node, tracer: AnsweringTracer) -> None:
        super().__init__(node, tracer)
        self.is_form = False  # may it be a size, a number, a device, a dtype? Otherwise it is, or holds, tensors
        self._answers: tuple[Any, ...] = ()

    @property
    def answers(self) -> tuple[Any, ...]:
        """What the value is for each probe; this runs all calls up to now that have not been run."""
        cast(AnsweringTracer, self.tracer).run_pending()
        return self._answers

    def __getattr__(self, name: str) -> Any:
        is_method = not self.is_form and name not in _FIELDS and callable(getattr(Tensor, name, None))
        if name.startswith("__") or is_method or not self.answers or not _is_data(self.answers[0], name):
            return super().__getattr__(name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        """Items may be assigned to: what that does to the value is the affair of the lifting."""
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __iadd__(self, other: Any) -> Any:
        return self._overwritten(operator.iadd, operator.add, other)

    def __isub__(self, other: Any) -> Any:
        return self._overwritten(operator.isub, operator.sub, other)

    def __imul__(self, other: Any) -> Any:
        return self._overwritten(operator.imul, operator.mul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._overwritten(operator.itruediv, operator.truediv, other)

    def __ifloordiv__(self, other: Any) -> Any:
        return self._overwritten(operator.ifloordiv, operator.floordiv, other)

    def __ipow__(self, other: Any) -> Any:
        return self._overwritten(operator.ipow, operator.pow, other)

    def _overwritten(self, inplace: Callable[..., Any], plain: Callable[..., Any], other: Any) -> Any:
        """``y += z`` writes to the tensor, for which other names may stand; of a size it makes another one."""
        function = plain if self.is_form else inplace
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __len__(self) -> int:
        length = self.tracer.length(self)  # type: ignore[attr-defined]  # the tracer is an AnsweringTracer
        return super().__len__() if length is None else int(length)


@dataclass(frozen=True)
class _Call:
    """A call of the trace that has not been run on tensors without data."""

    made: TracedValue
    kind: str
    target: Any
    args: Any
    kwargs: Any


class AnsweringTracer(fx.Tracer):
    """Symbolic tracing in which values know their types; what else they know is said by ``constant``.

    ``constant`` is the part of an input's shape that may be taken from the example: none, its channels, or all but the
    batch. ``assumed_channels`` and ``assumed_sizes`` tell after the trace whether it holds for those of the example
    only. ``may_refuse`` is the number of the probe that the model may refuse.
    """

    def __init__(self, probes: Sequence[Mapping[str, Any]], constant: Constant, may_refuse: int | None = None) -> None:
        super().__init__()
        self._without_data = FakeTensorMode(allow_non_fake_inputs=True)
        self._empty: dict[int, tuple[Tensor, Tensor]] = {}  # a tensor, kept alive, and the same without data
        self._probes = [tree_map(self._emptied, probe) for probe in probes]
        self._precise = [leaf for probe in probes for leaf in tree_flatten(probe)[0] if isinstance(leaf, Tensor)]
        self._modules: dict[str, nn.Module] = {}  # the same without data
        self._pending: deque[_Call] = deque()
        self._constant, self._sizes_are_constant, self._may_refuse = constant, constant == "sizes", may_refuse
        self.is_answering = False  # off while inputs are declared, and while a call runs on tensors without data
        self.is_running = False
        self.assumed_channels = self.assumed_sizes = False

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with _without_complaints():
            return super().trace(root, concrete_args)

    def proxy(self, node: fx.Node) -> TracedValue:
        return TracedValue(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        if kind == "call_function" and isinstance(target, types.FunctionType) and "." in pytorch_name(target):
            for result in self._looked_into(target, args, kwargs):
                return result
        made = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        assert isinstance(made, TracedValue)
        made.is_form = _may_be_form(kind, target, args)
        self._pending.append(_Call(made, kind, target, *_snapshot((args, kwargs))))
        asks = self.is_answering and target is not operator.setitem and self._may_be_constant(target, args)
        return self._constant_or(made, target, args) if asks and made.answers else made

    def _looked_into(self, function: Any, args: Any, kwargs: Any) -> list[Any]:
        """What a function that asked not to be traced (``fx.wrap``) makes of its arguments, traced all the same.

        Nothing where that cannot be done, because it looks at values, say; then it is called as it is.
        """
        before = len(self.graph.nodes)
        try:
            args, kwargs = tree_map(lambda leaf: leaf, (args, kwargs))  # lists of its own, which it may change
            return [function(*args, **kwargs)]
        except Exception:  # somebody else's code, which was not written for proxies, may raise anything
            for node in list(self.graph.nodes)[: before - 1 : -1]:
                self.graph.erase_node(node)
            return []

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self.is_running else super().call_module(m, forward, args, kwargs)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        length = self.length(obj)
        return super().iter(obj) if length is None else iter([self._element(obj, index) for index in range(length)])

    def length(self, value: fx.Proxy) -> int | None:
        """How many elements a value has, if that is the same for every probe and no question of its size."""
        if not isinstance(value, TracedValue) or not (self._sizes_are_constant or value.is_form):
            return None
        answers = _given(value.answers)
        counted = answers and (isinstance(answers[0], torch.Size) or (self._sizes_are_constant and self.is_answering))
        if not counted or not all(isinstance(each, Tensor | tuple | list) for each in answers):
            return None
        lengths = {len(each) for each in answers}
        self.assumed_sizes |= not isinstance(answers[0], torch.Size)
        return lengths.pop() if len(lengths) == 1 else None

    def _element(self, value: fx.Proxy, index: int) -> Any:
        return self.create_proxy("call_function", operator.getitem, (value, index), {})

    # --- answers -------------------------------------------------------------------------------------------------

    def _emptied(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, FakeTensor):
            return leaf
        if id(leaf) not in self._empty:
            self._empty[id(leaf)] = leaf, self._without_data.from_tensor(leaf, static_shapes=True)
        return self._empty[id(leaf)][1]

    def run_pending(self) -> None:
        """Answer for every value that the trace has made so far: in order, for some calls change their arguments."""
        while self._pending:
            call = self._pending.popleft()
            with precisely(self._precise):
                call.made._answers = self._answered(call.kind, call.target, call.args, call.kwargs)

    def _answered(self, kind: str, target: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
        """The result for each probe; nothing where one of them has none."""
        if kind == "placeholder":
            return tuple(probe[target] for probe in self._probes if target in probe)
        answers = []
        self.is_running = True
        try:
            for index in range(len(self._probes)):
                answers.append(self._answer(index, kind, target, args, kwargs))
        # A call on tensors without data may raise anything; what it would have returned then stays unknown.
        except Exception:
            return ()
        finally:
            self.is_running = False
        return tuple(answers)

    def _answer(self, index: int, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """The result for one probe; `_REFUSED` where that is the one that the model may refuse, and it has."""
        try:
            own = tree_map(lambda leaf: self._emptied(_answer(leaf, index)), (tuple(args), dict(kwargs)))
            with self._without_data:
                return self._run(kind, target, *own)
        except _RefusedError:
            return _REFUSED
        except _UnknownError:
            raise
        except Exception:  # of other channels: the operator may raise anything; of the rest: see the caller
            if index != self._may_refuse:
                raise
            return _REFUSED

    def _run(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "get_attr":
            return self._emptied(operator.attrgetter(target)(self.root).detach())
        if kind == "call_module":
            return self._module(target)(*args, **kwargs)
        return getattr(args[0], target)(*args[1:], **kwargs) if kind == "call_method" else target(*args, **kwargs)

    def _module(self, path: str) -> nn.Module:
        """A module with parameters without data: what is the same for several calls is then worked out once."""
        if path not in self._modules:
            module = self.root.get_submodule(path)
            memo = {id(tensor): self._emptied(tensor) for tensor in [*module.parameters(), *module.buffers()]}
            self._modules[path] = copy.deepcopy(module, memo)
        return self._modules[path]

    def _may_be_constant(self, target: Any, args: Sequence[Any]) -> bool:
        """Could `_constant_or` find a constant? Where not, nobody has to know what the value is."""
        if self._sizes_are_constant or target == "size" or _is_free_of_sizes(target, args):
            return True
        return target is operator.getitem and isinstance(args[0], TracedValue) and args[0].is_form

    def _constant_or(self, made: TracedValue, target: Any, args: Any) -> Any:
        """What ``made`` is, where that is a constant of the trace; otherwise ``made`` itself."""
        answers = _given(made.answers)
        is_axis = not self._sizes_are_constant and _is_axis(target, args, answers)
        if is_axis and self._constant == "channels" and not _agree(answers):
            answers = made.answers[: self._may_refuse]  # it is the last
            self.assumed_channels |= _agree(answers)
        if (is_axis or _is_free_of_sizes(target, args)) and _agree(answers):
            made.tracer.graph.erase_node(made.node)
            return answers[0]
        if not self._sizes_are_constant:
            return made
        first = answers[0]
        if _is_plain(first) and _agree(answers):
            made.tracer.graph.erase_node(made.node)
            self.assumed_sizes |= isinstance(first, int | float | torch.Size)
            return first
        if isinstance(first, torch.Size) and len({len(each) for each in answers}) == 1:
            return tuple(self._element(made, axis) for axis in range(len(first)))
        return made


@contextmanager
def _without_complaints() -> Iterator[None]:
    """A call that tensors without data do not take is no error here, although torch logs it as one."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


class _UnknownError(Exception):
    """A call needs a value that nothing is known about."""


class _RefusedError(Exception):
    """A call needs a value that the model has refused to compute."""


#: The answer of a probe of other channels behind what fixes their number.
_REFUSED = object()


def _given(answers: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(answer for answer in answers if answer is not _REFUSED)


def _answer(leaf: Any, index: int) -> Any:
    if isinstance(leaf, slice):
        return slice(*(_answer(each, index) for each in (leaf.start, leaf.stop, leaf.step)))
    if not isinstance(leaf, fx.Proxy):
        return leaf
    if not isinstance(leaf, TracedValue) or not leaf._answers:  # what came before has been run
        raise _UnknownError
    if leaf._answers[index] is _REFUSED:
        raise _RefusedError
    return leaf._answers[index]


def _snapshot(structure: Any) -> Any:
    """The same structure in containers of its own: the model may go on to change its lists."""
    if isinstance(structure, dict):
        return {key: _snapshot(each) for key, each in structure.items()}
    if type(structure) in (list, tuple):
        return type(structure)(map(_snapshot, structure))
    return structure


def _may_be_form(kind: str, target: Any, args: Sequence[Any]) -> bool:
    name = target if kind == "call_method" else getattr(target, "__name__", "")
    if target is operator.getitem:
        return isinstance(args[0], TracedValue) and args[0].is_form
    if getattr(target, "__module__", None) == "_operator":
        return any(isinstance(each, TracedValue) and each.is_form for each in args)
    is_builtin = kind == "call_function" and getattr(target, "__module__", None) == "builtins"
    return is_builtin or name in _ABOUT_FORM or name.startswith("is_")


_ABOUT_FORM = frozenset({
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset", "get_device", "type",
})  # fmt: skip

#: What functions with several results call them, as in ``x.max(1).values``; some of these are also methods of tensors.
_FIELDS = frozenset(name for kind in vars(torch.return_types).values() if isinstance(kind, type) for name in vars(kind))


def _is_data(value: Any, name: str) -> bool:
    """Is the attribute there, and no method?"""
    try:
        return not callable(getattr(value, name))
    except (AttributeError, RuntimeError):  # RuntimeError: .H and .mT of a tensor of the wrong rank
        return False


#: Questions whose answer is the same at every size.
_ATTRIBUTES = frozenset({
    "ndim", "is_cuda", "is_cpu", "is_mps", "is_xpu", "is_meta", "is_quantized", "is_sparse", "is_nested", "is_mkldnn",
    "is_leaf", "requires_grad", "layout", "type",
})  # fmt: skip
_METHODS = frozenset({"dim", "ndimension", "is_floating_point", "is_complex"})
_COMPARISONS = frozenset({operator.eq, operator.ne})


def _is_free_of_sizes(target: Any, args: Sequence[Any]) -> bool:
    if target is getattr:
        return args[1] in _ATTRIBUTES
    if target in (torch.is_floating_point, torch.is_complex, torch.is_tensor) or target in _METHODS:
        return True
    return bool(target in _COMPARISONS and any(map(_is_kind, args)))


def _is_axis(target: Any, args: Sequence[Any], answers: Sequence[Any]) -> bool:
    """Is it the length of one axis, in several calls of different sizes?"""
    if len(answers) < 2 or not all(isinstance(each, int) for each in answers):
        return False
    if target is operator.getitem:
        return isinstance(args[0], TracedValue) and isinstance(args[0].answers[0], torch.Size)
    return bool(target == "size")


def _is_kind(operand: Any) -> bool:
    known = operand.answers[0] if isinstance(operand, TracedValue) and operand.answers else operand
    return isinstance(known, torch.dtype | torch.device | torch.layout | str)


def _is_plain(value: Any) -> bool:
    if isinstance(value, torch.Size):
        return True
    return value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device | torch.layout)


def _agree(answers: Sequence[Any]) -> bool:
    return all(_is_plain(each) and type(each) is type(answers[0]) and each == answers[0] for each in answers)


__all__ = ["AnsweringTracer", "TracedValue"]
