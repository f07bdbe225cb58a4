"""Does rgc stay equal on random models? Compile each in a drawn way and compare with an oracle: eager float64.

A model may be refused by `InputError`. Anything else that is not equal is a fault: another error, a difference, a
firing that the proof had to undo, a source model that has changed. A fault is made smaller and prints as a program.
"""

from __future__ import annotations

import math
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from rgc.algebra import Conv, Scale
from rgc.compiler import CompiledModule, compile, trace
from rgc.errors import InputError
from rgc.graphs import draw_recipe
from rgc.ir import Operator
from rgc.operators import (
    Activation,
    AdaptiveMaxPool,
    Add,
    AvgPool,
    BatchNorm,
    ChannelMean,
    Clamp,
    Concat,
    Constant,
    Flatten,
    Identity,
    MaxPool,
    Multiply,
    Normalize,
    Opaque,
    Structural,
    Unflatten,
    Upsample,
)
from rgc.rearrange import Assign, BorderFill, Gather, Pad, PixelShuffle, PixelUnshuffle, Subsample
from rgc.recipe import Recipe, reduced, script
from rgc.recipe_steps import Chooser
from rgc.tail import AxisSums

#: What tracing makes of a model.
VOCABULARY: tuple[type[Operator], ...] = (
    Activation, AdaptiveMaxPool, Add, Assign, AvgPool, BatchNorm, BorderFill, ChannelMean, Clamp, Concat, Constant,
    Conv, Gather, Identity, MaxPool, Multiply, Normalize, Opaque, Pad, PixelShuffle, PixelUnshuffle, Scale, Structural,
    Subsample, Upsample,
)  # fmt: skip

#: What only a rewrite makes: the flattened form of a matrix, and sums along the axes before a linear tail.
MADE: tuple[type[Operator], ...] = (AxisSums, Flatten, Unflatten)

#: The largest difference in float64, relative to the largest output.
TOLERANCE = 1e-9

#: In the deployed dtype the compiled model may be so many times as far from float64 as the original at its worst, plus
#: so many units in the last place.
NOISE_MULTIPLE, NOISE_FLOOR = 32.0, 64.0

#: Of the models that are drawn: in float64 nothing hides behind rounding, in half precision weights are rounded most.
DTYPES = (torch.float64, torch.float32, torch.float64, torch.float32, torch.float16, torch.bfloat16)

OBJECTIVES = ("latency", "depth", "macs", "params")

#: Faults of one kind that are made smaller.
MOST_ALIKE = 3

#: Batches beside the example's 2, and how much wider the other inputs are where sizes are free.
BATCHES, WIDER = (1, 3), (1, 3, -1)


@dataclass(frozen=True)
class Setting:
    """How a random model is compiled: arguments of ``rgc.compile``, the dtype of the model, and how it is called."""

    passes: Any = "default"
    objective: str = "latency"
    strict: bool = False
    dtype: torch.dtype = torch.float64
    by_name: bool = False  # its inputs are keyword arguments

    @property
    def is_double(self) -> bool:
        """Is the model in float64, where it may not differ at all?"""
        return self.dtype == torch.float64

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of ``rgc.compile``."""
        return {"passes": self.passes, "objective": self.objective, "strict": self.strict}

    def example(self, recipe: Recipe) -> Any:
        """The example that ``rgc.compile`` is given."""
        inputs = recipe.call(self.dtype)
        return {name: x for (name, _), x in zip(recipe.inputs, inputs, strict=True)} if self.by_name else inputs


@dataclass(frozen=True)
class Fault:
    """A random model on which rgc does what it must not. ``kind`` is the sort of fault, ``reason`` says more."""

    kind: str
    reason: str
    recipe: Recipe
    setting: Setting

    @property
    def script(self) -> str:
        """A Python program that shows it."""
        reason = f"{self.kind}: {self.reason}"
        setting = self.setting
        return script(self.recipe, setting.options, setting.dtype, reason, by_name=setting.by_name)


@dataclass
class Tally:
    """What a run of the fuzzer has seen: how many models, what became of them, and what they were made of."""

    examples: int = 0
    equal: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # by reason
    unusable: int = 0  # what eager PyTorch does not run either
    tiers: Counter[str] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)  # of the models that were equal
    operators: Counter[str] = field(default_factory=Counter)  # models in which each operator occurs
    firings: Counter[str] = field(default_factory=Counter)
    comparisons: int = 0
    faults: list[Fault] = field(default_factory=list)

    @property
    def idle(self) -> list[str]:
        """The built-in rewrites that have not fired."""
        from rgc.passes import ALL, OPT_IN

        return [each.name for each in (*ALL, *OPT_IN) if not self.firings[each.name]]

    @property
    def undrawn(self) -> list[str]:
        """The operators of the vocabulary, as tracing makes them, that have not occurred."""
        return [each.__name__ for each in VOCABULARY if not self.operators[each.__name__]]

    def __str__(self) -> str:
        return "\n".join([
            f"{self.examples} models: {self.equal} equal, {self.refused.total()} refused, {self.unusable} unusable, "
            f"{len(self.faults)} faults; {self.comparisons} comparisons in float64",
            f"traced by {_counted(self.tiers)}",
            f"dtypes {_counted(self.dtypes)}",
            f"operators, by models: {_counted(self.operators)}",
            f"firings, by rewrite: {_counted(self.firings)}",
            f"operators that did not occur: {', '.join(self.undrawn) or 'none'}",
            f"rewrites that did not fire: {', '.join(self.idle) or 'none'}",
            *(f"refused {times} times: {reason}" for reason, times in self.refused.most_common()),
        ])  # fmt: skip


def run(
    examples: int, *, seed: int, first: int, most_steps: int, passes: Sequence[Any] | None,
    progress: Callable[[Tally], None],
) -> Tally:  # fmt: skip
    """`rgc.testing.fuzz`; ``progress`` is called after each model."""
    tally = Tally()
    for index in range(first, first + examples):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PyTorch says of a model that nobody would write
            recipe, setting = drawn(seed, index, most_steps, passes)
            tally.examples += 1
            fault = check_recipe(recipe, setting, tally)
            if fault is not None:
                tally.faults.append(_smallest(fault) if _is_new(fault, tally) else fault)
        progress(tally)
    return tally


def drawn(seed: int, index: int, most_steps: int = 10, passes: Sequence[Any] | None = None) -> tuple[Recipe, Setting]:
    """A random recipe and how to compile it: the one with this number among those of ``seed``."""
    chance = random.Random(f"{seed} {index}")
    choose = Chooser(chance.randint)
    recipe = draw_recipe(choose, most_steps)
    chosen = choose.pick(pass_sets() if passes is None else passes)
    return recipe, Setting(chosen, choose.pick(OBJECTIVES), choose.flag(), choose.pick(DTYPES), choose.flag())


def pass_sets() -> list[str]:
    """Every set of passes: the two by name, each with what is opt-in, and each without one of its own."""
    from rgc.passes import ALL, OPT_IN

    opt_in = "".join(f",{each.name}" for each in OPT_IN)
    sets = ["default", "all", f"all{opt_in}", f"default{opt_in}"]
    without = [f"{kind},-{each.name}" for each in ALL for kind in ("default", "all")]
    return sets * (len(without) // len(sets)) + without


def check_recipe(recipe: Recipe, setting: Setting, tally: Tally | None = None) -> Fault | None:
    """Compile the model in this way, and hold the result against the eager model; a fault, or None."""
    tally = Tally() if tally is None else tally
    model = recipe.model(setting.dtype)
    oracle = recipe.model(setting.dtype).double()  # rounded as the model is
    runs = all(_outputs(each, recipe.call(dtype)) is not None for each, dtype in _both(model, oracle, setting))
    if not runs or not _is_calm(oracle, recipe):
        tally.unusable += 1
        return None
    before = _snapshot(model)

    def fault(kind: str, reason: str) -> Fault:
        return Fault(kind, reason, recipe, setting)

    try:
        compiled = compile(model, setting.example(recipe), **setting.options)
    except InputError as error:
        tally.refused[str(error)[:100]] += 1
        return None if _same(before, _snapshot(model)) else fault("changed", "the source model, after a refusal")
    except Exception as error:  # whatever it is, it is what is looked for
        return fault(f"raises {type(error).__name__}", str(error)[:500])
    if not _same(before, _snapshot(model)):
        return fault("changed", "the source model")
    report = compiled.report
    if report.failures:
        return fault(f"failure of {report.failures[0].rewrite}", report.failures[0].reason[:500])
    if wrong := next(_differences(compiled, model, oracle, recipe, setting, tally), None):
        return fault("differs", wrong)
    if report.tier != "torch.fx" and not recipe.overwrites:
        return fault(f"traced by {report.tier}", "; ".join(report.notes)[:500])
    tally.equal += 1
    tally.tiers[report.tier] += 1
    tally.dtypes[str(setting.dtype).removeprefix("torch.")] += 1
    tally.firings.update(firing.rewrite for firing in report.rewrites)
    tally.operators.update({type(value.op).__name__ for value in trace(model, setting.example(recipe)).graph.nodes()})
    return None


def _both(model: nn.Module, oracle: nn.Module, setting: Setting) -> list[tuple[nn.Module, torch.dtype]]:
    """The model in its own dtype, which may lack a kernel or overflow, and the oracle."""
    return [(oracle, torch.float64), (model, setting.dtype)]


def _is_new(fault: Fault, tally: Tally) -> bool:
    """Is it worth the time to make it smaller? The same fault has many faces; a few of them do."""
    return sum(_face(each) == _face(fault) for each in tally.faults) < MOST_ALIKE


def _face(fault: Fault) -> tuple[str, str]:
    return fault.kind, re.sub(r"[0-9.e-]+", "#", fault.reason)[:60]


def _smallest(fault: Fault) -> Fault:
    def fails(candidate: Recipe) -> bool:
        found = check_recipe(candidate, fault.setting)
        return found is not None and found.kind == fault.kind

    return check_recipe(reduced(fault.recipe, fails), fault.setting) or fault


def _differences(
    compiled: CompiledModule, model: nn.Module, oracle: nn.Module, recipe: Recipe, setting: Setting, tally: Tally
) -> Iterator[str]:
    """What is wrong with the compiled model, on the example, other batches and, where they are free, other sizes."""
    calls = [(2, 0), *((batch, 0) for batch in BATCHES)]
    if not compiled.report.fixed_size:
        calls += [(2, wider) for wider in WIDER]
    for batch, wider in calls:
        expected = _outputs(oracle, recipe.call(torch.float64, batch, wider))
        if expected is None:
            continue  # eager PyTorch does not take this size either
        inputs = recipe.call(setting.dtype, batch, wider)
        given = dict(zip((name for name, _ in recipe.inputs), inputs, strict=True)) if setting.by_name else inputs
        where = f"on a batch of {batch}, {wider} wider"
        try:
            found = _run(compiled, given)
        except Exception as error:
            yield f"fails {where}: {type(error).__name__}: {str(error)[:300]}"
            continue
        tally.comparisons += 1
        own = 0.0 if setting.is_double else _distance(expected, _run(model, inputs))
        allowed = NOISE_MULTIPLE * own + NOISE_FLOOR * torch.finfo(setting.dtype).eps
        allowed = TOLERANCE if setting.is_double else allowed
        distance = _distance(expected, found)
        if not distance <= allowed:
            yield f"by {distance:.1e} of the output's scale {where}, where {allowed:.1e} is rounding"


def _is_calm(oracle: nn.Module, recipe: Recipe) -> bool:
    """Does rounding stay rounding? What is computed from numbers that cancel out is neither right nor wrong."""
    inputs = recipe.call(torch.float64)
    moved = tuple(x * (1 + 1e-12) for x in inputs)
    distance = _distance(_run(oracle, inputs), _run(oracle, moved))
    return distance < 1e-9


def _outputs(model: nn.Module, inputs: Sequence[Tensor]) -> list[Any] | None:
    """The outputs of the eager model; None where it does not run, or computes what is not finite."""
    try:
        outputs = _run(model, inputs)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        return None
    return outputs if all(bool(leaf.isfinite().all()) for leaf in outputs if isinstance(leaf, Tensor)) else None


def _run(model: nn.Module, inputs: Sequence[Tensor] | dict[str, Tensor]) -> list[Any]:
    """The leaves of the output, behind what says how they are put together."""
    with torch.no_grad():
        if isinstance(inputs, dict):
            output = model(**{name: x.clone() for name, x in inputs.items()})
        else:
            output = model(*(x.clone() for x in inputs))
    leaves, form = tree_flatten(output)
    return [str(form), *leaves]


def _distance(expected: Sequence[Any], found: Sequence[Any]) -> float:
    """The largest difference of all outputs, each relative to its own largest element; infinite for another form."""
    if len(expected) != len(found):
        return math.inf
    worst = 0.0
    for left, right in zip(expected, found, strict=True):
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            worst = max(worst, 0.0 if left == right else math.inf)
        elif left.shape != right.shape:
            return math.inf
        elif left.numel():
            distance = float((left - right.double()).abs().max())
            worst = max(worst, distance / max(float(left.abs().max()), 1e-30) if distance == distance else math.inf)
    return worst


def _snapshot(model: nn.Module) -> list[Any]:
    state = [(name, tensor.clone(), tensor.requires_grad) for name, tensor in model.state_dict(keep_vars=True).items()]
    return [*state, [(name, module.training, type(module)) for name, module in model.named_modules()]]


def _same(before: list[Any], after: list[Any]) -> bool:
    return len(before) == len(after) and before[-1] == after[-1] and all(
        one[0] == two[0] and torch.equal(one[1], two[1]) and one[2] == two[2]
        for one, two in zip(before[:-1], after[:-1], strict=True)
    )  # fmt: skip


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {times}" for name, times in counter.most_common()) or "none"
