"""How is a plan kept as a file? As JSON without weights or code: options, the example's form, firings, decisions.

The file names the layers and the tensors of the model that it was made for, so that another model is told apart before
anything runs. Passes are kept by name: reading a plan runs none that the caller has not handed in.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rgc.attempt import Options
from rgc.compiler import Plan
from rgc.cost import OBJECTIVES
from rgc.decisions import Decisions, Question
from rgc.errors import InputError
from rgc.example import Example, copy_model
from rgc.limits import Limits, machine_memory
from rgc.passbook import resolve
from rgc.rewrite import Pass
from rgc.subject import require_eval
from rgc.verify import DRAWS
from rgc.workshop import write_whole

FORMAT, VERSION = "rgc plan", 1

#: A plan of a hundred thousand layers is smaller.
MOST_BYTES = 2**28

#: More elements than this in one input of the example are no example.
MOST_ELEMENTS = 2**31

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


class _DamageError(Exception):
    """Something in the file is not what `plan_text` writes."""


def write_plan(plan: Plan, path: Path) -> None:
    """Write a plan, whole or not at all; `InputError` where it cannot be written."""
    text = plan_text(plan)
    try:
        write_whole(path, text)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def plan_text(plan: Plan) -> str:
    """The plan as JSON; `InputError` for one whose example holds what JSON cannot."""
    passes, fixed = resolve(plan.options.passes)
    options = plan.options
    content = {
        "format": FORMAT,
        "version": VERSION,
        "torch": torch.__version__,
        "model": {"layers": _layers(plan.source), "tensors": _tensors(plan.source)},
        "example": {"args": _written(plan.example.args), "kwargs": _written(plan.example.kwargs)},
        "options": {
            "passes": [each.name for each in passes],
            "fixed_size": fixed if options.fixed_size is None else options.fixed_size,
            "objective": options.objective,
            "dtype": None if options.dtype is None else _name(options.dtype),
            "verify": options.verify,
            "strict": options.strict,
            "limits": _limits(options.limits),
        },
        "target": plan.target,
        "firings": list(plan.firings),
        "decisions": [[*dataclasses.astuple(question), answer] for question, answer in plan.decisions.answers.items()],
    }
    return json.dumps(content, indent=1) + "\n"


def read_plan(path: Path, model: nn.Module, passes: Sequence[Any] = ()) -> Plan:
    """The plan in a file, for ``model``; ``passes`` are those of the user's own. Arguments and errors: `Plan.load`."""
    if not isinstance(model, nn.Module):
        raise InputError(f"a plan is read for a torch.nn.Module, not {type(model).__name__}")
    require_eval(model)
    content = _content(path)
    try:
        for what, own in (("layers", _layers(model)), ("tensors", _tensors(model))):
            _require_same(path, what, _taken(content, "model", what, dict), own)
        return _plan(path, content, model, passes)
    except _DamageError as damage:
        raise InputError(f"{path}: is no plan of rgc compile, or damaged: {damage}; save it again") from damage


def _plan(path: Path, content: dict[str, Any], model: nn.Module, passes: Sequence[Any]) -> Plan:
    options = _taken(content, "options", None, dict)
    dtype = _one_of(options, "dtype", [None, "float32", "float64", "float16", "bfloat16"])
    chosen = Options(
        passes=_passes(path, _listed(_taken(options, "passes", None, list), str), passes),
        objective=_one_of(options, "objective", OBJECTIVES),
        dtype=None if dtype is None else _DTYPES[dtype],
        verify=_one_of(options, "verify", list(DRAWS)),
        strict=_taken(options, "strict", None, bool),
        limits=_read_limits(_taken(options, "limits", None, dict)),
        fixed_size=_taken(options, "fixed_size", None, bool),
    )
    args, kwargs = (_read(_taken(content, "example", name, dict)) for name in ("args", "kwargs"))
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise _DamageError("its example is no call")
    firings = [_row(each, 2) for each in _taken(content, "firings", None, list)]
    rows = [_row(each, 4) for each in _taken(content, "decisions", None, list)]
    decisions = Decisions({Question(*row[:3]): row[3] for row in rows})
    target = _taken(content, "target", None, str)
    source = copy_model(model, share_parameters=True)
    return Plan(source, Example(args, kwargs), chosen, target, tuple((a, b) for a, b in firings), decisions)


def _content(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path}: is larger than the {MOST_BYTES:,} bytes of a plan")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is no JSON, so no plan of rgc compile ({str(error)[:80]})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path}: is no plan of rgc compile; write one with --save-plan")
    if content.get("version") != VERSION:
        version = str(content.get("version"))[:20]
        raise InputError(f"{path}: is a plan of version {version}, this rgc reads version {VERSION}; save it again")
    return content


# --- the model ---------------------------------------------------------------------------------------------------


def _layers(model: nn.Module) -> dict[str, str]:
    """The class of every layer by its path, those that stand in several places at each."""
    named = model.named_modules(remove_duplicate=False)
    return {path: f"{type(module).__module__}.{type(module).__qualname__}" for path, module in named}


def _tensors(model: nn.Module) -> dict[str, str]:
    state = model.state_dict()
    return {name: _form(value) for name, value in state.items() if isinstance(value, Tensor)}


def _form(tensor: Tensor) -> str:
    return "lazy" if is_lazy(tensor) else f"{_name(tensor.dtype)}{list(tensor.shape)}"


def _require_same(path: Path, what: str, planned: dict[str, Any], own: dict[str, str]) -> None:
    """`InputError` for the first of the layers or tensors that the plan and the model do not share."""
    for name in {**planned, **own}:
        if planned.get(name) != own.get(name):
            its, mine = (str(each.get(name, "nothing"))[:80] for each in (planned, own))
            raise InputError(
                f"{path}: is the plan of another model: of its {what}, {name[:80]!r} is {its} in the plan and {mine} "
                "in this model"
            )


# --- options -----------------------------------------------------------------------------------------------------


def _passes(path: Path, names: Sequence[str], given: Sequence[Any]) -> tuple[Pass, ...]:
    from rgc.passes import ALL, OPT_IN

    known: dict[str, Pass] = {each.name: each for each in (*ALL, *OPT_IN)}
    if given:
        known |= {each.name: each for each in resolve(given)[0]}
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise InputError(
            f"{path}: uses the pass {unknown[:80]!r}, which is none of rgc's own; hand it in as passes= (--plugin)"
        )
    return tuple(known[name] for name in names)


def _limits(limits: Limits) -> dict[str, float | None]:
    """The memory only where somebody chose it: by default it is that of the machine."""
    memory = None if limits.memory == machine_memory() else limits.memory
    return {**dataclasses.asdict(limits), "memory": memory}


def _read_limits(given: dict[str, Any]) -> Limits:
    names = {each.name for each in dataclasses.fields(Limits)}
    if not given.keys() <= names:
        raise _DamageError("it has limits of other names")
    try:
        return Limits(**{name: value for name, value in given.items() if value is not None})
    except InputError as error:
        raise _DamageError(str(error)[:120]) from error


# --- the example -------------------------------------------------------------------------------------------------


def _written(value: Any) -> Any:
    """An argument as JSON: a tensor by its form and range, everything else as it is."""
    if isinstance(value, Tensor):
        if _name(value.dtype) not in _DTYPES:
            raise InputError(
                f"a plan cannot keep an example of {_name(value.dtype)}; pickle the compiled model instead"
            )
        finite = value.detach().double().cpu()
        finite = finite[finite.isfinite()]
        low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 0.0)
        return {"tensor": list(value.shape), "dtype": _name(value.dtype), "low": low, "high": high}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_written(each) for each in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _written(each) for key, each in value.items()}}
    is_plain = (
        value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
    )
    if not is_plain:
        kind = type(value).__name__
        raise InputError(f"a plan cannot keep a {kind} of the example as JSON; pickle the compiled model instead")
    return value


def _read(value: Any) -> Any:
    """An argument again; tensors are drawn in their range, always the same."""
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise _DamageError("its example holds a bare list")
        return value
    makers: Mapping[str, Callable[[Any], Any]] = {
        "tuple": lambda parts: tuple(_read(each) for each in _instance(parts, list)),
        "list": lambda parts: [_read(each) for each in _instance(parts, list)],
        "dict": lambda parts: {key: _read(each) for key, each in _instance(parts, dict).items()},
    }
    if "tensor" in value:
        return _drawn(value)
    if len(value) != 1 or next(iter(value)) not in makers:
        raise _DamageError("its example holds something unknown")
    (kind,) = value
    return makers[kind](value[kind])


def _drawn(value: dict[str, Any]) -> Tensor:
    shape = _listed(value["tensor"], int)
    if any(isinstance(n, bool) or n < 0 for n in shape) or math.prod(shape) > MOST_ELEMENTS:
        raise _DamageError("its example has no possible shape")
    dtype = _DTYPES[_one_of(value, "dtype", list(_DTYPES))]
    low, high = (float(_taken(value, name, None, (int, float))) for name in ("low", "high"))
    if not -math.inf < low <= high < math.inf:
        raise _DamageError("its example has no possible range")
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(shape, generator=generator, dtype=torch.float64)
    if dtype.is_floating_point:
        return (low + (high - low) * spread).to(dtype)
    return (low + (high - low + 1) * spread).floor().clamp(low, high).to(dtype)


# --- taking things out of JSON -----------------------------------------------------------------------------------


def _taken(content: dict[str, Any], name: str, inner: str | None, kind: Any) -> Any:
    found = content.get(name)
    if inner is not None:
        found = _instance(found, dict).get(inner)
    if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
        raise _DamageError(f"its {inner or name} is {'missing' if found is None else 'of another kind'}")
    return found


def _instance(found: Any, kind: type) -> Any:
    if not isinstance(found, kind):
        raise _DamageError(f"it holds a {type(found).__name__} in the place of a {kind.__name__}")
    return found


def _one_of(content: dict[str, Any], name: str, choices: Sequence[Any]) -> Any:
    found = content.get(name)
    if not isinstance(found, str | None) or found not in choices:
        raise _DamageError(f"its {name} is {str(found)[:40]!r}")
    return found


def _listed(found: Any, kind: type) -> list[Any]:
    return [_instance(each, kind) for each in _instance(found, list)]


def _row(found: Any, length: int) -> list[str]:
    row = _listed(found, str)
    if len(row) != length:
        raise _DamageError(f"it has a row of {len(row)} columns instead of {length}")
    return row


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


__all__ = ["plan_text", "read_plan", "write_plan"]
