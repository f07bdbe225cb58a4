"""What is a dynamic module? One that computes one of several functions, and says itself what it becomes for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from torch import nn

from rgc.choices import Choice
from rgc.errors import InputError


class Dynamic(nn.Module, ABC):
    """A module with choices; `rgc.specialize` and `choose` need no more than these three methods.

    In evaluation, ``choose(**c)`` followed by a call has to compute what ``specialized(**c)`` computes.

    >>> from rgc.nn import OneOf
    >>> class Repeated(Dynamic):
    ...     def __init__(self, layer):
    ...         super().__init__()
    ...         self.layer, self.times = layer, 3
    ...     def choices(self):
    ...         return {"times": OneOf((1, 2, 3))}
    ...     def choose(self, **choices):
    ...         self.times = choices.get("times", self.times)
    ...     def specialized(self, **choices):
    ...         return nn.Sequential(*[self.layer] * choices["times"])
    ...     def forward(self, x):
    ...         for _ in range(self.times):
    ...             x = self.layer(x)
    ...         return x
    >>> import rgc
    >>> len(rgc.specialize(nn.Sequential(Repeated(nn.Linear(3, 3))), times=2)[0])
    2
    """

    @abstractmethod
    def choices(self) -> Mapping[str, Choice]:
        """What is to be chosen in this module itself (not in its children), by name."""

    @abstractmethod
    def choose(self, **choices: Any) -> None:
        """Compute with these from now on; values are checked, ``None`` means: decide by the input, anew each time."""

    @abstractmethod
    def specialized(self, **choices: Any) -> nn.Module:
        """The static module for these, which are all of ``choices()``, with checked values.

        It is called on a copy: children and whole parameters may be handed over, and dynamic ones among them are
        specialised afterwards. What is returned is a static module, or one of the children.
        """


def choose(model: nn.Module, **choices: Any) -> None:
    """Run ``model`` with these choices from now on, in place: each goes to every module that has it.

    A value is one for all of them, or a dict from module paths to values, where a path stands for all modules below it
    and the longest that fits wins. ``None`` means that modules decide by their input, where they can.

    Raises ``InputError`` for what the model does not have, and values that are not possible, before anything changes.

    >>> from rgc.nn import SlimmableLinear
    >>> layer = SlimmableLinear(8, 4, widths=(0.5, 1.0), slim_out=False)
    >>> choose(layer, width=0.5)
    >>> layer(layer.weight.new_ones(2, 4)).shape
    torch.Size([2, 4])
    """
    require_known("choose", model, choices)
    taken: list[tuple[Dynamic, dict[str, Any]]] = []
    for paths, module in dynamic_modules(model):
        found = chosen_for("choose", paths, module, choices)
        own = {name: value for name, value in found.items() if value is not None or module.choices()[name].by_input}
        taken.append((module, own))
    for name, value in choices.items():
        if value is None and not any(name in own for _, own in taken):
            raise InputError(f"choose: {name}=None, but nothing in {type(model).__name__} decides {name} by its input")
    for module, own in taken:
        module.choose(**own)


def dynamic_modules(model: nn.Module) -> list[tuple[list[str], Dynamic]]:
    """The dynamic modules in ``model``, itself included, each once with all of its paths."""
    paths: dict[Dynamic, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Dynamic):
            paths.setdefault(module, []).append(path)
    return [(found, module) for module, found in paths.items()]


def chosen_for(asker: str, paths: list[str], module: Dynamic, choices: Mapping[str, Any]) -> dict[str, Any]:
    """Which of ``choices`` the module at ``paths`` takes, with checked values; ``None`` stays."""
    found = {}
    for name, choice in module.choices().items():
        if name not in choices:
            continue
        where = described(paths[0], module)
        try:
            values = [None if value is None else choice.checked(value) for value in _values_at(paths, choices[name])]
        except InputError as error:
            raise InputError(f"{asker}: {name} of {where}: {error}") from error
        if any(value != values[0] for value in values):
            raise InputError(f"{asker}: {where} is also {', '.join(paths[1:])}: {name} has to be the same for all")
        if values:
            found[name] = values[0]
    return found


def require_known(asker: str, model: nn.Module, choices: Mapping[str, Any]) -> None:
    """Refuse choices that no module of ``model`` has, and paths below which none has them; with what there is."""
    possible: dict[str, dict[str, Choice]] = {}
    for paths, module in dynamic_modules(model):
        for name, choice in module.choices().items():
            possible.setdefault(name, {}).update(dict.fromkeys(paths, choice))
    kind = type(model).__name__
    for name, value in choices.items():
        if not possible:
            raise InputError(f"{asker}: {kind} has nothing to choose, so {name}={value!r} says nothing")
        if name not in possible:
            close = get_close_matches(name, possible)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            has = ", ".join(f"{each} ({next(iter(paths.values()))})" for each, paths in possible.items())
            raise InputError(f"{asker}: {kind} has no choice {name!r}; {hint}it has {has}")
        for path in value if isinstance(value, Mapping) else ():
            if not isinstance(path, str) or not any(_is_below(each, path) for each in possible[name]):
                close = get_close_matches(str(path), possible[name]) or list(possible[name])[:3]
                raise InputError(f"{asker}: no module at {path!r} has a choice {name!r}; it is at {', '.join(close)}")


def described(path: str, module: nn.Module) -> str:
    """The module as an error names it: its class, and its path where it has one."""
    return f"{path} ({type(module).__name__})" if path else type(module).__name__


def _values_at(paths: list[str], value: Any) -> list[Any]:
    """What a choice is at these paths; nothing for those that it does not speak of."""
    if not isinstance(value, Mapping):
        return [value]
    above = [[each for each in value if _is_below(path, each)] for path in paths]
    return [value[max(found, key=len)] for found in above if found]


def _is_below(path: str, above: str) -> bool:
    return above in ("", path) or path.startswith(f"{above}.")
