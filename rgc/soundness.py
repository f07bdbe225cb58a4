"""Is a module that came out of a file put together like one?

Unpickling a module calls no constructor: it fills in attributes, and nothing says that they are the ones that PyTorch's
own code relies on. What a layer computes shows when it runs; here it is only made sure that it can be looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rgc.errors import InputError
from rgc.limits import Limits

_KINDS: Mapping[str, type] = {"_parameters": nn.Parameter, "_buffers": Tensor, "_modules": nn.Module}
_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict) and name not in _KINDS)


def require_sound(what: str, model: nn.Module, limits: Limits) -> None:
    """`InputError` for a module whose parts are not what they should be, that contains itself, or that is too large."""
    seen: set[int] = set()
    pending: list[tuple[str, nn.Module]] = [("", model)]
    while pending:
        path, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        fault = _fault(module)
        if fault is not None:
            where = f"its layer {path[:80]!r}" if path else "it"
            raise InputError(f"{what}: is damaged: {where} ({type(module).__name__}) {fault}; save it again")
        pending += [
            (f"{path}.{name}".lstrip("."), child) for name, child in module._modules.items() if child is not None
        ]
    limits.require_size(model, what)


def _fault(module: nn.Module) -> str | None:
    own = vars(module)
    for attribute in (*_KINDS, *_HOOKS):
        if not isinstance(own.get(attribute), dict):
            return f"lacks its {attribute.strip('_')}"
    if not isinstance(own.get("training"), bool):
        return f"is in training mode {str(own.get('training'))[:20]!r}"
    names: set[Any] = set()
    for attribute, kind in _KINDS.items():
        for name, part in own[attribute].items():
            if not isinstance(name, str) or not name or "." in name or not name.isprintable():
                return f"names one of its {attribute.strip('_')} {str(name)[:40]!r}"
            if name in names:
                return f"has two parts of the name {name[:40]!r}"
            names.add(name)
            if part is not None and not isinstance(part, kind):
                return f"keeps a {type(part).__name__} as {name[:40]!r} among its {attribute.strip('_')}"
    return None
