"""Which names does a pickled model use, how, and which of them may be used without trusting where the file came from?

A pickle is a program: it names globals, calls some of them (REDUCE), makes bare instances of others (NEWOBJ) and fills
those with state (BUILD). So the pickle is read as text first, without running it, and its names are judged by use:

- called: only what rebuilds tensors and plain containers, and enumerations;
- instantiated, without its constructor: classes of torch.nn, torchvision, timm and rgc whose instances are plain data;
- mentioned (say, the activation that a layer keeps): such a class, or a public function of torch.nn.functional or
  torchvision.ops. Library code may call it later, when the model runs, which stays within these libraries.

What is not understood is refused. PyTorch's own weights-only unpickler then runs the same program with exactly the
admitted names: two independent locks, each of which has to open.
"""

from __future__ import annotations

import enum
import importlib
import pickle
import pickletools
import sys
import types
from abc import ABCMeta
from dataclasses import dataclass

import torch
from torch import nn

_PACKAGES = (
    "torch.nn", "torchvision.models", "torchvision.ops", "timm.models", "timm.layers",
    "rgc.nn", "rgc.models", "rgc.choices", "rgc.conditional", "rgc.decay", "rgc.early_exit", "rgc.skipping",
    "rgc.slimmable", "rgc.slimming_gate",
)  # fmt: skip
_FUNCTION_HOMES = ("torch.nn.functional", "torch._C._nn", "torchvision.ops")
_REBUILDERS = frozenset(
    {
        "collections.OrderedDict",
        "builtins.set",
        "torch.Size",
        "torch.device",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        # Layers keep how to make a norm as partial(BatchNorm2d, eps=...): it calls nothing while the pickle is read,
        # and what it wraps can only be another admitted name.
        "functools.partial",
    }
)
# What torch.save writes (pickle protocol 2) and the weights-only unpickler of PyTorch reads.
_OPCODES = frozenset(
    {
        *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"),
        *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
        *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS"),
        *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "NONE", "NEWTRUE", "NEWFALSE"),
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"),
    }
)


@dataclass(frozen=True)
class Admission:
    """The verdict on a pickle: the objects it may use, each with the name it uses for it, and the names it may not."""

    admitted: tuple[tuple[object, str], ...]
    refused: tuple[str, ...]


@dataclass(frozen=True)
class PickleUses:
    """The globals that a pickle names, by what it does with them; each a dotted name."""

    mentioned: frozenset[str]
    instantiated: frozenset[str]
    called: frozenset[str]
    filled: frozenset[str]
    """Globals whose own attributes it would change: never harmless."""


def judge(program: bytes) -> Admission:
    """Decide which names of a pickle may be used, without running any of it.

    Raises ``pickle.UnpicklingError`` if the pickle does not read as one that ``torch.save`` writes.

    >>> judge(pickle.dumps(nn.ReLU, protocol=2))
    Admission(admitted=((<class 'torch.nn.modules.activation.ReLU'>, 'torch.nn.modules.activation.ReLU'),), refused=())
    >>> judge(pickle.dumps(print, protocol=2)).refused
    ('builtins.print',)
    """
    uses = read_uses(program)
    resolved = {name: _resolve(name) for name in sorted(uses.mentioned)}
    refused = {name for name, target in resolved.items() if target is None} | uses.filled
    refused |= {name for name in uses.called if name not in _REBUILDERS and not _is_enumeration(resolved[name])}
    refused |= {name for name in uses.instantiated if not _is_plain_class(resolved[name])}
    usable = {name: target for name, target in resolved.items() if callable(target) and name not in refused}
    return Admission(tuple((target, name) for name, target in usable.items()), tuple(sorted(refused)))


def read_uses(program: bytes) -> PickleUses:
    """Follow a pickle's stack symbolically, where only the globals have a value, and note what happens to each."""
    stack: list[str | None] = []  # a dotted name for a global, None for every other value
    marks: list[int] = []
    memo: dict[int, str | None] = {}
    uses: dict[str, set[str]] = {use: set() for use in ("GLOBAL", "NEWOBJ", "REDUCE", "BUILD")}
    try:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name not in _OPCODES:
                raise pickle.UnpicklingError(
                    f"its pickle uses {opcode.name}, which torch.save does not write by default"
                )
            if opcode.name == "GLOBAL":
                name = _dotted(str(argument))
                uses["GLOBAL"].add(name)
                stack.append(name)
            elif opcode.name in ("BINPUT", "LONG_BINPUT"):
                memo[int(str(argument))] = stack[-1]
            elif opcode.name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[int(str(argument))])
            elif opcode.name == "MARK":
                marks.append(len(stack))
            else:
                target = stack[-2] if opcode.name in uses else None
                if target is not None:
                    uses[opcode.name].add(target)
                elif opcode.name in ("NEWOBJ", "REDUCE"):
                    raise pickle.UnpicklingError("its pickle calls a value that it computed, not one that it names")
                _apply(opcode, stack, marks)
    except (ValueError, IndexError, KeyError) as error:
        raise pickle.UnpicklingError(f"its pickle is damaged ({error})") from error
    return PickleUses(*(frozenset(uses[use]) for use in ("GLOBAL", "NEWOBJ", "REDUCE", "BUILD")))


def _apply(opcode: pickletools.OpcodeInfo, stack: list[str | None], marks: list[int]) -> None:
    """Pop what the opcode consumes and push what it makes, which is never a global."""
    taken = len(opcode.stack_before)
    if pickletools.markobject in opcode.stack_before:
        del stack[marks.pop() :]
        taken = opcode.stack_before.index(pickletools.markobject)
    if len(stack) - taken < (marks[-1] if marks else 0):
        raise IndexError("it takes more values than there are")
    del stack[len(stack) - taken :]
    stack.extend(None for _ in opcode.stack_after)


def _dotted(argument: str) -> str:
    """The dotted name of GLOBAL's argument, which is a module and a name with a space between."""
    module, _, name = argument.partition(" ")
    if module == "__builtin__":  # the spelling of protocol 2
        module = "builtins"
    return f"{module}.{name}"


def _resolve(name: str) -> object | None:
    """The object behind a dotted name, or None if it may not be used in any way.

    The last part is looked up in its module's own namespace, so that no chain of attributes leads out of it.
    """
    module, _, attribute = name.rpartition(".")
    if name in _REBUILDERS:
        return _lookup(module, attribute)
    if module == "torch":
        found = _lookup(module, attribute)
        is_storage = attribute.endswith("Storage") and isinstance(found, type)
        return found if is_storage or isinstance(found, torch.dtype) else None
    if not _is_within(module, _PACKAGES + _FUNCTION_HOMES):
        return None
    found = _lookup(module, attribute)
    return found if _is_plain_class(found) or _is_enumeration(found) or _is_pure_function(found) else None


def _lookup(module: str, attribute: str) -> object | None:
    """Imports at most the package that the module lies in: a file does not get to choose which modules are imported."""
    package = _package_of(module, _PACKAGES)
    if package is not None:
        try:
            importlib.import_module(package)
        except (ImportError, OSError, RuntimeError) as error:
            raise pickle.UnpicklingError(f"it needs {package}, which does not import here: {error}") from error
    home = sys.modules.get(module)
    return None if home is None else vars(home).get(attribute)


def _package_of(module: str, packages: tuple[str, ...]) -> str | None:
    return next((package for package in packages if module == package or module.startswith(package + ".")), None)


def _is_within(module: str, packages: tuple[str, ...]) -> bool:
    return _package_of(module, packages) is not None


def _is_pure_function(found: object) -> bool:
    """A public function defined where functions compute tensors from tensors."""
    if not isinstance(found, types.FunctionType | types.BuiltinFunctionType):
        return False
    return not found.__name__.startswith("_") and _is_within(str(found.__module__), _FUNCTION_HOMES)


def _is_enumeration(found: object) -> bool:
    return isinstance(found, enum.EnumMeta) and _is_within(found.__module__, _PACKAGES)


def _is_plain_class(found: object) -> bool:
    """A class of ours or of these libraries that is made of nothing but attributes: no code runs when one is made.

    A layer may bring its own ``__setstate__``: that is library code which mends the attributes of older releases.
    """
    if not isinstance(found, type) or not _is_within(found.__module__, _PACKAGES):
        return False
    # Another metaclass may run code; that of abstract classes runs none, and our own dynamic layers have it.
    if type(found) is not type and not (type(found) is ABCMeta and _is_within(found.__module__, ("rgc",))):
        return False
    # A graph module compiles source text that it keeps as state.
    if _defines(found, "__new__", "__del__") or issubclass(found, torch.fx.GraphModule | torch.jit.ScriptModule):
        return False
    return issubclass(found, nn.Module) or not _defines(found, "__setstate__")


def _defines(found: type, *names: str) -> bool:
    return any(name in vars(base) for base in found.__mro__ if base is not object for name in names)
