"""How much has each activation decayed at each step of training? A schedule, used as a learning-rate scheduler is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, final, get_args

from torch import nn

from rgc.decay import DecayedActivation, DecayedLeakyReLU, require_decaying_activations
from rgc.errors import InputError

#: How the decay goes from 0 to 1 over its range.
Curve = Literal["cosine", "linear"]

#: Which activations: a predicate of path and module, or paths, of activations or of modules that hold them.
Which = Callable[[str, nn.Module], bool] | Sequence[str]


@dataclass(frozen=True)
class DecayGroup:
    """Activations that decay together, from ``start`` to ``stop``, fractions of the steps of the whole schedule.

    ``which`` is a predicate of path and module, or a list of paths: of activations, or of modules that hold some.

    Raises ``InputError`` for another curve, and unless ``0 <= start < stop <= 1``.

    >>> DecayGroup(["stage3"], stop=0.5).curve
    'cosine'
    """

    which: Which
    start: float = 0.0
    stop: float = 1.0
    curve: Curve = "cosine"

    def __post_init__(self) -> None:
        if self.curve not in get_args(Curve):
            raise InputError(f"a decay's curve must be one of {', '.join(get_args(Curve))}, got {self.curve!r}")
        if isinstance(self.which, str):
            raise InputError(f"a group of activations is a predicate or a list of paths; write [{self.which!r}]")
        if not 0.0 <= self.start < self.stop <= 1.0:
            raise InputError(
                f"a decay runs between fractions of all steps, 0 <= start < stop <= 1; got {self.start}, {self.stop}"
            )

    def decay_at(self, step: int, total_steps: int) -> float:
        """The decay after ``step`` of ``total_steps`` steps: 0.0 up to the start, exactly 1.0 from the stop on."""
        # As products, for a quotient such as 7 / 10 need not reach a stop of 0.7.
        first, last = self.start * total_steps, self.stop * total_steps
        if step >= last:
            return 1.0
        part = max(0.0, (step - first) / (last - first))
        return part if self.curve == "linear" else 0.5 * (1.0 - math.cos(math.pi * part))


@final
class DecaySchedule:
    """Takes the decaying activations of a model from what they are to the identity, one ``step()`` after the other.

    Used as a scheduler of ``torch.optim.lr_scheduler`` is: made before training, it sets the decay of step 0; call
    ``step()`` after each step (or each epoch, if ``total_steps`` counts epochs) of the optimizer. After
    ``total_steps`` steps every decay is exactly 1.0, in every dtype, and stays so. What is trained after that is the
    network that will be deployed, so let ``total_steps`` be less than all steps (VanillaNet, arXiv 2305.12972, decays
    over the first part of its epochs only).

    curve: "cosine", (1 - cos(pi t)) / 2, slow at both ends, or "linear". start: the fraction of the steps that passes
    before anything decays. groups: what decays when, in place of ``curve`` and ``start``; what is in none of them is
    left as it is. With them one can decay from the last layer to the first.

    The model may be wrapped in ``DistributedDataParallel`` or by ``torch.compile``, and may be moved and cast between
    steps. The decay depends on nothing but the number of steps, so it is the same on every rank.

    Raises ``InputError`` when ``total_steps`` is below 1, for an unknown curve or a range that is none, for a model
    without decaying activations, and for a group that matches nothing or what another one holds.

    >>> from rgc.nn import DecayedActivation
    >>> model = nn.Sequential(nn.Linear(2, 2), DecayedActivation(nn.ReLU()), nn.Linear(2, 2))
    >>> schedule = DecaySchedule(model, total_steps=4, curve="linear")
    >>> for _ in range(4):
    ...     schedule.step()
    ...     print(schedule.get_last_decay(), model[1].decay.item())
    [0.25] 0.25
    [0.5] 0.5
    [0.75] 0.75
    [1.0] 1.0
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        curve: Curve = "cosine",
        start: float = 0.0,
        groups: Sequence[DecayGroup] | None = None,
    ) -> None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise InputError(f"DecaySchedule: total_steps must be a whole number of at least 1, got {total_steps!r}")
        if groups is not None and (curve != "cosine" or start != 0.0):
            raise InputError("DecaySchedule: groups have a curve and a start of their own; give these or groups")
        found = require_decaying_activations(model, "DecaySchedule")
        given = [DecayGroup(_every, start, 1.0, curve)] if groups is None else list(groups)
        if not given:
            raise InputError("DecaySchedule: the list of groups is empty; leave groups out to decay every activation")
        self.total_steps = total_steps
        self.last_step = 0
        self._members = _members(given, found)
        self._set()

    def step(self) -> None:
        """Go on to the next step and set every decay; after the last one they stay at 1.0."""
        self.last_step += 1
        self._set()

    def get_last_decay(self) -> list[float]:
        """The decay of each group as it was last set, before it was rounded to the dtype of the buffer."""
        return [member.group.decay_at(self.last_step, self.total_steps) for member in self._members]

    def state_dict(self) -> dict[str, Any]:
        """What is needed to resume: the number of steps, and the plan, by which `load_state_dict` tells a mix-up."""
        return {"last_step": self.last_step, **self._plan()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken, and set every decay as it was there, to the last bit.

        Raises ``InputError`` when it is of a schedule with other steps, curves, ranges or activations.
        """
        plan = self._plan()
        other = [key for key in plan if state_dict.get(key) != plan[key]]
        if other or not isinstance(state_dict.get("last_step"), int):
            key = other[0] if other else "last_step"
            raise InputError(
                f"DecaySchedule: the saved schedule has {key} = {state_dict.get(key)!r}, "
                f"this one {plan.get(key, self.last_step)!r}; build it with the same arguments for the same model"
            )
        self.last_step = state_dict["last_step"]
        self._set()

    def _plan(self) -> dict[str, Any]:
        groups = [[each.group.curve, each.group.start, each.group.stop, list(each.modules)] for each in self._members]
        return {"total_steps": self.total_steps, "groups": groups}

    def _set(self) -> None:
        for member, decay in zip(self._members, self.get_last_decay(), strict=True):
            for module in member.modules.values():
                module.set_decay(decay)


@dataclass(frozen=True)
class _Member:
    """A group with the activations that it has in a model, by the path that they have without wrappers."""

    group: DecayGroup
    modules: dict[str, DecayedActivation | DecayedLeakyReLU] = field(repr=False)


def _members(groups: list[DecayGroup], found: dict[str, DecayedActivation | DecayedLeakyReLU]) -> list[_Member]:
    members: list[_Member] = []
    owner: dict[str, int] = {}
    plain = {unwrapped(path): module for path, module in found.items()}
    plain = plain if len(plain) == len(found) else found  # a child named "module" beside others is no wrapper
    for index, group in enumerate(groups):
        chosen = chosen_paths(group.which, plain, f"DecaySchedule: group {index}")
        if not chosen:
            raise InputError(f"DecaySchedule: group {index} matches no decaying activation; there are {_some(plain)}")
        for path in chosen:
            if path in owner:
                raise InputError(f"DecaySchedule: {path} is in the groups {owner[path]} and {index}; leave it in one")
            owner[path] = index
        members.append(_Member(group, {path: plain[path] for path in chosen}))
    return members


def chosen_paths(which: Which, modules: dict[str, Any], asker: str, kind: str = "activation") -> list[str]:
    """The paths among ``modules`` that ``which`` chooses; ``InputError`` with suggestions for one that is none of them.

    A path also chooses what lies below it.
    """
    if callable(which):
        return [path for path, module in modules.items() if which(path, module)]
    chosen: set[str] = set()
    for name in which:
        below = [path for path in modules if path in (name, unwrapped(name)) or path.startswith(f"{unwrapped(name)}.")]
        if not below:
            close = get_close_matches(str(name), modules)
            hint = f"did you mean {' or '.join(close)}?" if close else f"there are {_some(modules)}"
            raise InputError(f"{asker}: no {kind} is named {name!r}; {hint}")
        chosen.update(below)
    return [path for path in modules if path in chosen]


def unwrapped(path: str) -> str:
    """A module's path without the names that ``DistributedDataParallel`` and ``torch.compile`` put before it.

    >>> unwrapped("module._orig_mod.stem.2")
    'stem.2'
    """
    names = [name for name in path.split(".") if name != "_orig_mod"]
    while len(names) > 1 and names[0] == "module":
        del names[0]
    return ".".join(names)


def _every(path: str, module: nn.Module) -> bool:
    return True


def _some(paths: dict[str, Any], most: int = 6) -> str:
    names = [path or "(the model itself)" for path in paths]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
