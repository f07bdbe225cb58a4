"""What does ``rgc.compile`` do? Capture, rewrite, emit, prove; and, if the proof fails, find the culprit and go on."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import PythonCode
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from rgc.attribution import Attribution, first_failing
from rgc.cost import CPU, OBJECTIVES, Objective, macs, target_named
from rgc.data import Sample, samples_of
from rgc.decisions import Decisions
from rgc.emit import emit, losses, narrow, opaque_counts, operator_counts
from rgc.engine import Policy, Record, apply, copy_graph
from rgc.errors import InputError, NotEquivalentError
from rgc.example import (
    Example,
    copy_model,
    output_difference,
    precise_form,
    precisely,
    runnable,
    runnable_in_float64,
    unchanged_generators,
)
from rgc.frontend import TIERS, Capture, capture
from rgc.ir import Graph, Value
from rgc.limits import Limits
from rgc.passbook import resolve
from rgc.precision import is_precise
from rgc.proof import TOLERANCE
from rgc.report import ErrorBound, Failure, Firing, Refused, Report, Verification
from rgc.rewrite import Pass
from rgc.rounding import bound_errors
from rgc.verify import Level, Pair, require_level

#: So many rewrites may fail at the level of the model before compiling gives up.
MOST_CULPRITS = 8


class CompiledModule(fx.GraphModule):
    """A ``torch.fx.GraphModule`` of ordinary ``torch.nn`` layers in eval mode that equals the model it came from.

    ``report`` says what was merged, what was refused and why, and how it was proved; ``plan`` compiles another
    checkpoint of the same model; ``example`` is the call for which it was compiled.
    """

    report: Report
    plan: Plan
    example: Example

    @classmethod
    def of(cls, module: fx.GraphModule, report: Report, plan: Plan, example: Example) -> Self:
        """``module`` with its record."""
        compiled = cls(module, module.graph, class_name=report.model)
        compiled.report, compiled.plan, compiled.example = report, plan, example
        return compiled.eval()

    def recompile(self) -> PythonCode:
        """As in torch.fx, but for the cost of a call, which is what the call of a very small model costs."""
        code = super().recompile()
        cls: Any = type(self)  # torch.fx makes one for every module
        del cls.__call__  # its wrapper prints the generated line behind an error, and torch.nn.Module's own does it all
        for name in self._modules:
            setattr(cls, name, _layer_named(name))
        return code

    def __reduce__(self) -> Any:
        rebuild, arguments = super().__reduce__()[:2]
        return _restored, (rebuild, arguments, self.report, self.plan, self.example)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> CompiledModule:
        copied = cast(CompiledModule, super().__deepcopy__(memo or {}))
        copied.report, copied.plan, copied.example = self.report, self.plan, self.example
        return copied


def _layer_named(name: str) -> property:
    """A layer as an attribute of the class, found at once, where torch.nn.Module searches when all else has failed."""

    def layer(module: nn.Module) -> nn.Module | None:
        try:
            return module._modules[name]
        except KeyError:
            raise AttributeError(name) from None  # and torch.nn.Module says so in its own words

    return property(layer)


def _restored(rebuild: Any, arguments: tuple[Any, ...], report: Report, plan: Plan, example: Example) -> CompiledModule:
    return CompiledModule.of(rebuild(*arguments), report, plan, example)


@dataclass(frozen=True)
class Options:
    """How to compile: what ``rgc.compile`` takes beside the model and the example."""

    passes: Any = "default"
    objective: Objective = "latency"
    target: str | None = None
    dtype: torch.dtype | None = None
    verify: Level = "quick"
    strict: bool = False
    limits: Limits = field(default_factory=Limits)
    fixed_size: bool | None = None  # may passes rely on the example's size? None: as their names say


@dataclass(frozen=True)
class Plan:
    """The decisions of one compilation, to be applied to other checkpoints of the same model without a search.

    firings: the rewrites that were made, each with where. decisions: what was found to pay, and what not, on
    ``target``; nothing is weighed again when they are applied, so the machine may be another. undone: firings that a
    user's own data have shown to be wrong, which are never made again.
    """

    source: nn.Module = field(repr=False)
    example: Example = field(repr=False)
    options: Options
    target: str
    firings: tuple[tuple[str, str], ...]
    decisions: Decisions = field(repr=False)
    undone: tuple[tuple[str, str], ...] = ()

    def apply(self, state_dict: Mapping[str, Tensor]) -> CompiledModule:
        """The same model with the weights of ``state_dict``, through the same rewrites, and proved as ever.

        The result is, bit for bit, what compiling that checkpoint afresh would give. Where it would be another, because
        a decision does not hold (a slope that was 1) or because the checkpoint allows what was never decided (a bias
        that is zero now), `NotEquivalentError` names it. Raises `InputError` where the weights do not fit the model.
        """
        model = copy_model(self.source)
        try:
            model.load_state_dict(state_dict)
        except RuntimeError as error:
            raise InputError(f"the checkpoint does not fit the model: {' '.join(str(error).split())[:300]}") from error
        decisions = self.decisions.closed()
        compiled = compile_with(model, self.example, self.options, by=replace(self, decisions=decisions))
        self._require_kept(compiled.report)
        if decisions.undecided:
            first = decisions.undecided[0]
            raise NotEquivalentError(
                f"{first.subject} at {first.where}: this checkpoint allows what the plan has not decided; "
                "compile it afresh"
            )
        return compiled

    def _require_kept(self, report: Report) -> None:
        """`NotEquivalentError` for the first rewrite of the plan that was not made."""
        made = Counter((firing.rewrite, firing.where) for firing in report.rewrites)
        lost = next(iter(Counter(self.firings) - made), None)
        if lost is None:
            return
        said: list[Refused | Failure] = [*report.refusals, *report.failures]
        reasons = {(each.rewrite, each.where): each.reason for each in said}
        # what another rewrite did there, or did not, may have taken the place of the match
        reason = reasons.get(lost, "it does not match any more")
        raise NotEquivalentError(f"{lost[0]} at {lost[1]} does not hold for this checkpoint: {reason}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, without any weights; `InputError` where it cannot be written."""
        from rgc.plan_file import write_plan

        write_plan(self, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module, passes: Sequence[Any] = ()) -> Plan:
        """Read what `save` wrote, for the ``model`` that it was made for, with weights of any kind.

        passes: your own, where the plan names some: pass objects, or files and modules of passes. Raises `InputError`
        for a damaged file, a model of other layers or shapes, and a pass that is not known.
        """
        from rgc.plan_file import read_plan

        return read_plan(Path(path), model, passes)


def compile(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    passes: str | Sequence[Any] = "default",
    objective: Objective = "latency",
    target: str | None = None,
    dtype: torch.dtype | None = None,
    verify: Level = "quick",
    strict: bool = False,
    limits: Limits | None = None,
    data: Any = None,
) -> CompiledModule:
    """Merge what is linear in ``model`` and prove the result equal; the model itself is never changed.

    example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; None asks the model for its
    ``example_inputs()``.
    passes: "default" (exact for any input size), "all" (also what holds at the example's size only), names (with ``-``
    taken away), pass objects, or files and modules of your own passes.
    objective: "latency" (merge what a cost model of ``target`` says pays), "depth", "macs" or "params".
    target: "cpu" (the default), "cuda", or a file that `rgc calibrate` wrote; a name stands for the stored calibration
    of this machine, and without one for conservative figures.
    dtype: the dtype of the result, by default the model's own.
    verify: "quick" or "full", how many inputs are drawn for the proof.
    strict: stop at the first rewrite whose check fails, instead of undoing it.
    limits: how large a model, a kernel and a weight may be, and for how long rewrites are tried.
    data: inputs of your own for the proof, beside those that it draws: in the form of the example, with any number of
    samples along the first axis.

    Raises `InputError` for what cannot be used and `NotEquivalentError` where no equal result was reached.

    >>> import torch, rgc
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
    >>> compiled = rgc.compile(model, torch.randn(1, 3, 16, 16))
    >>> compiled.report.ops_before, compiled.report.ops_after
    (Counter({'Conv2d': 1, 'BatchNorm2d': 1, 'ReLU': 1}), Counter({'Conv2d': 1, 'ReLU': 1}))
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"rgc compiles a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("a TorchScript module cannot be traced; compile the eager model that it was made from")
    if objective not in OBJECTIVES:
        raise InputError(f"unknown objective {objective!r}; choose one of {', '.join(OBJECTIVES)}")
    options = Options(passes, objective, target, dtype, require_level(verify), strict, limits or Limits())
    require_eval(model)
    example = example_of(model, example_inputs)
    samples = () if data is None else samples_of(data, example, model)
    return compile_with(model, example, options, samples=samples)


@dataclass(frozen=True)
class Trace:
    """A model as rgc sees it, before or after some passes, without a proof of the whole: for looking at.

    ``original`` is the graph before the passes; ``record`` is the engine's, by value of ``graph``.
    """

    graph: Graph
    tier: str
    notes: tuple[str, ...]
    rewrites: list[Firing]
    refusals: list[Refused]
    original: Graph
    record: Record


def trace(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    passes: str | Sequence[Any] = (),
    objective: Objective = "latency",
    target: str | None = None,
    limits: Limits | None = None,
) -> Trace:
    """The graph of ``model`` with module paths and source lines, after ``passes``; arguments as in `compile`.

    Every firing is proved, the model as a whole is not: use `compile` for a result to run.
    """
    limits = limits or Limits()
    require_eval(model)
    limits.require_size(model, type(model).__name__)
    example = example_of(model, example_inputs)
    dtype = floating_dtype(model, example)
    require_definite(model, example)
    subject = _Subject.of(model, example.cast(dtype), dtype)
    chosen, fixed = resolve(passes) if passes else ((), False)
    captured = capture(
        subject.proof_model, subject.proof_example, subject.expected, dtype,
        fixed=fixed, tolerance=subject.tolerance, compile_child=_no_child,
    )  # fmt: skip
    _require_nodes(captured, limits)
    policy = Policy(objective, target_named(target, dtype), limits=limits)
    graph, record = _rewritten(subject, captured, chosen, policy)
    refusals = record.refused(graph)
    return Trace(graph, captured.tier, captured.notes, record.firings, refusals, captured.graph, record)


def require_eval(model: nn.Module) -> None:
    """Refuse a model with a submodule in training mode, by name."""
    for name, module in model.named_modules():
        if module.training:
            which = f"submodule {name!r}" if name else "model"
            raise InputError(f"the {which} ({type(module).__name__}) is in training mode; call model.eval() first")


def require_definite(model: nn.Module, example: Example) -> None:
    """Refuse weights and examples on which no proof can stand: NaN and infinite weights by name, empty examples.

    Infinite buffers may stay: a mask adds them where a softmax turns them into zeros.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor) or tensor.layout != torch.strided or tensor.device.type == "meta":
            continue  # without values, or of a kind that PyTorch cannot ask this
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        is_weight = isinstance(tensor, nn.Parameter)
        bad = ~tensor.detach().isfinite() if is_weight else tensor.detach().isnan()
        if bool(bad.any()):
            what = "parameter" if is_weight else "buffer"
            first = tensor.detach()[bad][0].item()
            raise InputError(
                f"the {what} {name!r} holds {first} ({int(bad.sum()):,} of {tensor.numel():,} elements): what computes "
                "with that is equal to nothing, so no result could be proved; repair the weights first"
            )
    empty = next((tensor for tensor in example.tensors if not tensor.numel()), None)
    if empty is not None:
        size = "x".join(map(str, empty.shape))
        raise InputError(f"the example has an input without elements ({size}), which proves nothing; give it a batch")


def _require_nodes(captured: Capture, limits: Limits) -> None:
    if len(captured.graph) > limits.nodes:
        raise InputError(
            f"the graph has {len(captured.graph):,} operations; at most {limits.nodes:,} are taken (--limit nodes=)"
        )


def example_of(model: nn.Module, given: Any) -> Example:
    """The example call: what was given, or what the model itself suggests."""
    if given is None:
        suggest = getattr(model, "example_inputs", None)
        if not callable(suggest):
            raise InputError(
                f"{type(model).__name__} suggests no example_inputs(); pass an example (--input 1x3x224x224)"
            )
        try:
            given = suggest()
        except Exception as error:  # it is the model's own code, which may raise anything
            reason = f"{type(error).__name__}: {_first_line(error)}"
            raise InputError(f"example_inputs() of {type(model).__name__} raised {reason}; pass an example") from error
    if isinstance(given, Example):
        return given
    if isinstance(given, dict):
        return Example((), given)
    return Example(tuple(given) if isinstance(given, list | tuple) else (given,))


def floating_dtype(model: nn.Module, example: Example) -> torch.dtype:
    """The one floating-point dtype of the model's parameters (of the example, where it has none)."""
    found = {t.dtype for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()}
    if len(found) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise InputError(f"the model mixes the dtypes {names}; convert it to one first, e.g. model.float()")
    if found:
        return found.pop()
    return next((t.dtype for t in example.tensors if t.is_floating_point()), torch.float32)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's parameters and buffers; the CPU where it has none."""
    return next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))


def compile_with(
    model: nn.Module,
    example: Example,
    options: Options,
    *,
    samples: tuple[Sample, ...] = (),
    by: Plan | None = None,
) -> CompiledModule:
    """`compile` with everything said: the model is in eval mode and the example is a call of it.

    by: the plan that decides what pays; without one, that is found out.
    """
    started = time.perf_counter()
    with unchanged_generators():
        task, policy = _Task.of(model, example, options, started, by)
        traced, attempt = _captured_and_proved(replace(task, samples=samples), policy)
    report = _report(task.subject, traced, attempt, task.passes, started)
    firings = tuple((firing.rewrite, firing.where) for firing in report.rewrites)
    source = copy_model(model, share_parameters=True)
    undone = (*(by.undone if by else ()), *attempt.undone)
    plan = Plan(source, task.example, options, policy.target.name, firings, policy.decisions, undone)
    compiled = CompiledModule.of(attempt.module, report, plan, task.example.cast(task.dtype))
    if options.verify == "full":
        bound = error_bound(compiled)
        compiled.report = replace(report, bound=bound, seconds=time.perf_counter() - started)
    return compiled


def error_bound(compiled: CompiledModule, example_inputs: Any = None) -> ErrorBound | None:
    """How far rounding can take ``compiled`` from its original, for any order of summation, and how far it does.

    On ``example_inputs``, by default those it was compiled for; None where the original does not run in float64, so
    that nothing tells rounding from anything else. Method and assumptions: `rgc.rounding`. Raises `NotEquivalentError`
    where more than rounding is found.

    >>> import torch, rgc
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).eval()
    >>> bound = rgc.error_bound(rgc.compile(model, torch.randn(1, 8)))
    >>> bound.outputs[0].measured <= bound.outputs[0].bound < 1e-4
    True
    """
    difference = compiled.report.max_error
    if difference is None:
        return None
    given = compiled.example if example_inputs is None else example_of(compiled, example_inputs)
    example = given.cast(floating_dtype(compiled, given))
    with unchanged_generators():
        precise = precise_form(compiled.plan.source, example.to(torch.device("cpu")).cast(torch.float64))
        return bound_errors(compiled, example.to(device_of(compiled)), precise.expected, difference)


def bisect(
    model: nn.Module,
    example_inputs: Any,
    data: Any,
    *,
    passes: str | Sequence[Any] = "default",
    objective: Objective = "latency",
    target: str | None = None,
    dtype: torch.dtype | None = None,
    verify: Level = "quick",
    limits: Limits | None = None,
) -> Attribution:
    """Name the rewrite with which the compiled model begins to differ from ``model`` on your own ``data``, if it does.

    The model is compiled as by `compile`, whose arguments these are, without the data; then the result is held against
    the original on each sample of them. Raises what `compile` raises.

    >>> import torch, rgc
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
    >>> str(rgc.bisect(model, torch.randn(1, 3, 16, 16), torch.randn(20, 3, 16, 16)))
    'equal on all 20 samples'
    """
    started = time.perf_counter()
    options = Options(passes, objective, target, dtype, require_level(verify), False, limits or Limits())
    require_eval(model)
    example = example_of(model, example_inputs)
    samples = samples_of(data, example, model)
    with unchanged_generators():
        task, policy = _Task.of(model, example, options, started)
        traced, attempt = _captured_and_proved(task, policy)
        count, undone = len(traced.firings(attempt.record)), tuple(attempt.failures)
        del attempt
        found = Attribution(True, samples[-1].last + 1, traced.capture.tier, count, undone=undone)
        error = _fault(task, traced, count, samples)
        return found if error is None else _attributed(task, traced, found, samples, error)


def _attributed(
    task: _Task, traced: _Traced, found: Attribution, samples: Sequence[Sample], error: NotEquivalentError
) -> Attribution:
    """The culprit of a difference on one of the samples, found on that sample alone."""
    chosen = [sample for sample in samples if sample.name == error.sample]
    singles = chosen[0].singles()
    try:
        alone = _fault(task, traced, found.firings, singles)
    except InputError:  # the model takes no batch of one
        alone = None
    if alone is not None:
        chosen, error = [sample for sample in singles if sample.name == alone.sample], alone
    number = first_failing(found.firings, lambda count: _fault(task, traced, count, chosen) is not None)
    worse = _fault(task, traced, number, chosen) or error
    firing, before = None, 0.0
    if number:
        cut = traced.up_to(task, number - 1)
        seen = _proved(task, cut, *_rewritten_within(task, cut), only=chosen).verification
        before = (seen.max_error or 0.0) if worse.precision == "float64" else seen.deployed_error
        cut = traced.up_to(task, number)
        firing = cut.firings(_rewritten_within(task, cut)[1])[-1]
    return replace(
        found, equal=False, firing=firing, number=number, sample=worse.sample, precision=worse.precision,
        before=before, after=worse.difference, allowed=worse.allowed, reason=str(worse),
    )  # fmt: skip


@dataclass(frozen=True)
class _Subject:
    """The model under compilation: as it is, and as the proof sees it (in float64 where it runs in float64).

    ``is_read_only``: forward is known to leave the weights as they are, so it may run on those of the user's model.
    """

    model: nn.Module
    device: torch.device
    proof_model: nn.Module
    proof_example: Example
    expected: Any
    in_float64: bool
    is_read_only: bool
    tolerance: float
    notes: tuple[str, ...]

    @staticmethod
    def of(model: nn.Module, example: Example, dtype: torch.dtype) -> _Subject:
        device = device_of(model)
        on_cpu = example.to(torch.device("cpu"))
        try:
            wide = on_cpu.cast(torch.float64)
            found = precise_form(model, wide)
            return _Subject(model, device, found.model, wide, found.expected, True, found.shares, TOLERANCE, ())
        # Forward is the user's own and may raise anything; what remains wrong is raised below, in the own dtype.
        except Exception as error:
            name = str(dtype).removeprefix("torch.")
            note = f"the model does not run in float64 ({_first_line(error)}); proved in {name} instead"
        try:
            plain = copy_model(model).cpu().requires_grad_(False)
            expected = on_cpu.run(copy_model(plain, share_parameters=True))
        except Exception as error:
            shapes = ", ".join("x".join(map(str, t.shape)) for t in example.tensors)
            raise InputError(
                f"{type(model).__name__} does not run on an input of {shapes}: {_first_line(error)}"
            ) from error
        return _Subject(model, device, plain, on_cpu, expected, False, False, 256 * torch.finfo(dtype).eps, (note,))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


@dataclass(frozen=True)
class _Child:
    """A part that was compiled in place of a model that cannot be traced as a whole."""

    before: Graph
    after: Graph
    record: Record
    fixed_size: bool


@dataclass(frozen=True)
class _Task:
    """What is compiled, and how: a model with an example of its own dtype; ``samples`` of a user join the proof."""

    subject: _Subject
    example: Example
    passes: Sequence[Pass]
    fixed: bool
    dtype: torch.dtype
    options: Options
    samples: Sequence[Sample] = ()

    @staticmethod
    def of(
        model: nn.Module, example: Example, options: Options, started: float, by: Plan | None = None
    ) -> tuple[_Task, Policy]:
        """The task and the policy that the options mean; `InputError` for what cannot be compiled."""
        passes, fixed = resolve(options.passes)
        fixed = fixed if options.fixed_size is None else options.fixed_size
        own_dtype = floating_dtype(model, example)
        dtype = options.dtype or own_dtype
        example = example.cast(own_dtype)
        options.limits.require_size(model, type(model).__name__)
        require_definite(model, example)
        target = target_named(options.target, dtype) if by is None else replace(CPU, name=by.target)
        policy = Policy(
            options.objective, target, banned=frozenset(by.undone if by else ()),
            limits=options.limits, deadline=started + options.limits.seconds,
            decisions=by.decisions if by else Decisions(),
        )  # fmt: skip
        return _Task(_Subject.of(model, example, own_dtype), example, passes, fixed, dtype, options), policy


@dataclass(frozen=True)
class _Traced:
    """A model as one of ``tiers`` captured it, to be rewritten under ``policy``.

    ``children``: the parts that were compiled for that, under the same policy, also those that were put back.
    """

    capture: Capture
    children: dict[str, _Child]
    policy: Policy
    tiers: Sequence[str]

    def firings(self, record: Record) -> list[Firing]:
        """All firings in the order in which they were made, those in the parts first."""
        inside = [
            replace(each, where=f"{path}.{each.where}")
            for path, child in self.children.items()
            for each in child.record.firings
        ]
        return inside + record.firings

    def under(self, task: _Task, policy: Policy) -> _Traced:
        """The same trace under another policy, for which parts have to be compiled again."""
        if self.capture.tier != TIERS[-1]:
            return replace(self, policy=policy)
        again = _captured(task, policy, self.tiers[-1:])
        notes = tuple(note for note in self.capture.notes if note.startswith(TIERS[:-1]))
        return replace(again, capture=replace(again.capture, notes=notes + again.capture.notes), tiers=self.tiers)

    def up_to(self, task: _Task, count: int) -> _Traced:
        """The same trace with the first ``count`` firings only, however long they take."""
        return self.under(task, replace(self.policy, limit=count, deadline=math.inf))


def _captured(task: _Task, policy: Policy, tiers: Sequence[str]) -> _Traced:
    """The model by the first of ``tiers`` that can trace it; without any, the model itself in one piece."""
    children: dict[str, _Child] = {}

    def compile_child(path: str, child: nn.Module, call: Example) -> tuple[nn.Module, bool]:
        if not tiers:
            raise NotEquivalentError("no part may be compiled")
        inside = _within_part(_after_parts(policy, children), path)
        children[path], module = _child(
            child, call, task.passes, task.fixed, inside, task.dtype, task.subject.tolerance
        )  # fmt: skip
        return module, children[path].fixed_size

    found = capture(
        task.subject.proof_model, task.subject.proof_example, task.subject.expected, task.dtype,
        fixed=task.fixed, compile_child=compile_child, tolerance=task.subject.tolerance, tiers=tiers,
    )  # fmt: skip
    _require_nodes(found, task.options.limits)
    return _Traced(found, children, policy, tiers)


def _after_parts(policy: Policy, children: Mapping[str, _Child]) -> Policy:
    """The policy for what comes after the parts: their firings count."""
    if policy.limit is None:
        return policy
    return replace(policy, limit=max(0, policy.limit - sum(len(each.record.firings) for each in children.values())))


def _within_part(policy: Policy, path: str) -> Policy:
    """The policy inside a part, where places are named without its path."""
    inside = ((name, where.removeprefix(f"{path}.")) for name, where in policy.banned if where.startswith(f"{path}."))
    return replace(policy, banned=frozenset(inside))


def _captured_and_proved(task: _Task, policy: Policy) -> tuple[_Traced, _Attempt]:
    """The first tier whose result is equal; the last keeps the model as it is."""
    tiers: Sequence[str] = TIERS
    notes: tuple[str, ...] = ()
    while True:
        traced = _captured(task, policy, tiers)
        traced = replace(traced, capture=replace(traced.capture, notes=notes + traced.capture.notes))
        try:
            return _prove(task, traced)
        except NotEquivalentError as error:
            if task.options.strict or not tiers or isinstance(error, _LostError):
                raise
            notes = (*traced.capture.notes, f"{traced.capture.tier}: {error}")
            tiers = TIERS[TIERS.index(traced.capture.tier) + 1 :]


def _holds_at_any_size(graph: Graph) -> bool:
    return all(value.op.any_size for value in graph.nodes())


class _LostError(NotEquivalentError):
    """Weights do not survive in the deployed dtype; ``refused`` are the firings that made them, to be left out."""

    def __init__(self, message: str, refused: list[Refused]) -> None:
        super().__init__(message)
        self.refused = refused


def _lost(found: Sequence[tuple[Value, str, bool]], firings: Sequence[Firing]) -> _LostError:
    """Name the layers, and for each the last firing that had a part in it, if any."""
    refused: dict[tuple[str, str], Refused] = {}
    for value, reason, _ in found:
        paths = set(value.origin.paths)
        made = next((each for each in reversed(firings) if paths & set(each.sources)), None)
        if made is not None:
            refused[made.rewrite, made.where] = Refused(made.rewrite, made.where, f"of the result, {reason}")
    where = "; ".join(f"{value.where}: {reason}" for value, reason, _ in found[:3])
    return _LostError(f"does not survive in its dtype: {where}; choose bfloat16 or float32", list(refused.values()))


@dataclass(frozen=True)
class _Attempt:
    """A graph rewritten and emitted; ``refused`` are firings whose weights would not survive in its dtype."""

    graph: Graph
    record: Record
    module: fx.GraphModule
    verification: Verification
    failures: tuple[Failure, ...] = ()
    undone: tuple[tuple[str, str], ...] = ()  # by what a user's own data have shown
    refused: tuple[Refused, ...] = ()


def _prove(task: _Task, traced: _Traced) -> tuple[_Traced, _Attempt]:
    """Rewrite and check the whole model; a rewrite that the check finds guilty is banned, reported, and left out."""
    strict = task.options.strict
    failures: list[Failure] = []
    undone: list[tuple[str, str]] = []
    refused: list[Refused] = []
    while True:
        graph, record = _rewritten_within(task, traced)
        try:
            attempt = _proved(task, traced, graph, record)
        except _LostError as error:
            del graph
            if not error.refused:
                raise _LostError(f"the compiled model {error}; nothing is emitted", []) from error
            refused += error.refused
            banned = traced.policy.banned | {(each.rewrite, each.where) for each in error.refused}
            traced = traced.under(task, replace(traced.policy, banned=banned))
            continue
        except NotEquivalentError as error:
            del graph
            culprit = _culprit(task, traced, record)
            if culprit is None or strict or len(failures) >= MOST_CULPRITS:
                where = f"{culprit.rewrite} at {culprit.where}: " if culprit else ""
                raise NotEquivalentError(f"{where}the compiled model {error}; nothing is emitted") from error
            failures.append(Failure(culprit.rewrite, culprit.where, f"the model {error}"))
            undone += [(culprit.rewrite, culprit.where)] if error.sample else []
            banned = traced.policy.banned | {(culprit.rewrite, culprit.where)}
            traced = traced.under(task, replace(traced.policy, banned=banned))
            continue
        if strict and attempt.record.failures:
            first = attempt.record.failures[0]
            raise NotEquivalentError(f"{first.rewrite} at {first.where}: {first.reason}")
        found = tuple(failures + attempt.record.failures)
        return traced, replace(attempt, failures=found, undone=tuple(undone), refused=tuple(refused))


def _culprit(task: _Task, traced: _Traced, record: Record) -> Firing | None:
    """The first firing with which the very check fails that has failed; None where it does without any."""
    firings = traced.firings(record)
    number = first_failing(len(firings), lambda count: _fault(task, traced, count) is not None)
    return firings[number - 1] if number else None


def _fault(task: _Task, traced: _Traced, count: int, only: Sequence[Sample] | None = None) -> NotEquivalentError | None:
    """What the check says of the model after ``count`` firings; on ``only`` these samples, if they are given."""
    cut = traced.up_to(task, count)
    try:
        _proved(task, cut, *_rewritten_within(task, cut), only=only)
    except NotEquivalentError as error:
        error.__cause__ = error.__context__ = None  # their frames hold the weights, and so do its own
        return error.with_traceback(None)
    return None


def _rewritten_within(task: _Task, traced: _Traced) -> tuple[Graph, Record]:
    policy = _after_parts(traced.policy, traced.children)
    return _rewritten(task.subject, traced.capture, task.passes, policy)


def _proved(
    task: _Task, traced: _Traced, graph: Graph, record: Record, only: Sequence[Sample] | None = None
) -> _Attempt:
    """Emit and check a rewritten graph: on the example, drawn inputs and the user's own, or on ``only`` such."""
    subject, captured, dtype, options = task.subject, traced.capture, task.dtype, task.options
    # All that runs here is a copy: forward may write to the model, or to what is kept of it in the result.
    original, reference = runnable(subject.model, dtype, is_read_only=subject.is_read_only), None
    if subject.in_float64:
        reference = runnable_in_float64(subject.proof_model, subject.model, is_read_only=subject.is_read_only)
    free = _holds_at_any_size(graph) and not captured.fixed_size
    precise = emit(graph, None, copies=False) if subject.in_float64 else None
    pair = Pair(original, precise or original, reference, precise, dtype, subject.device)
    samples = task.samples if only is None else only
    if not free:
        _require_size_of(subject.proof_example, samples)
    if only is None:
        cases = pair.check_in_float64(
            subject.proof_example, level=options.verify, free_sizes=free, expected=subject.expected, samples=samples
        )
    else:
        cases = pair.check_samples_in_float64(samples, options.verify)
    if precise is not None:
        _release(precise)
    lost = losses(graph, dtype)
    if any(overflows for _, _, overflows in lost):
        raise _lost([each for each in lost if each[2]], record.firings)
    narrow(graph, dtype)  # before the weights of the result exist, those in float64 go
    module = emit(graph, dtype).to(subject.device)
    if _is_channels_last(subject.model):
        module = module.to(memory_format=torch.channels_last)
    result = copy_model(module, share_parameters=True)
    try:
        verification = Pair(original, result, reference, None, dtype, subject.device).check_deployed(cases)
    except NotEquivalentError as error:
        if lost:  # the likely cause, and if it is none, the next attempt says so
            raise _lost(lost, record.firings) from error
        raise
    return _Attempt(graph, record, module, verification)


def _release(module: fx.GraphModule) -> None:
    """Let go of the weights now: a `GraphModule` and its graph refer to each other, and so live on for a while."""
    for part in module.modules():
        part._parameters.clear()
        part._buffers.clear()


def _rewritten(subject: _Subject, captured: Capture, passes: Sequence[Pass], policy: Policy) -> tuple[Graph, Record]:
    named = subject.proof_example.bind(subject.proof_model)

    def same(graph: Graph) -> float:
        given = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, named)
        with precisely(given):
            error = output_difference(subject.expected, graph.evaluate(given, _own_dtype(subject.proof_example)))
        if not error <= subject.tolerance:
            raise NotEquivalentError(f"the model differs by {error:.1e} of its scale")
        return error

    return apply(copy_graph(captured.graph), passes, policy, same)


def _own_dtype(call: Example) -> torch.dtype | None:
    """What merged weights, which are in float64, are cast to for a call that cannot be in float64; None if it is."""
    if is_precise(call.tensors):
        return None
    return next((tensor.dtype for tensor in call.tensors if tensor.is_floating_point()), None)


def _require_size_of(example: Example, samples: Sequence[Sample]) -> None:
    """`InputError` for data of another size than the example, where the result holds at that size only."""
    for sample in samples:
        for given, own in zip(sample.example.tensors, example.tensors, strict=True):
            if given.shape[1:] != own.shape[1:]:
                found, size = ("x".join(map(str, tensor.shape[1:])) for tensor in (given, own))
                raise InputError(
                    f"the data are of {found}, and the result holds at the example's size only, which is {size}; "
                    "give an example of the data's size"
                )


def _child(
    child: nn.Module, call: Example, passes: Sequence[Pass], fixed: bool, policy: Policy, dtype: torch.dtype,
    tolerance: float,
) -> tuple[_Child, nn.Module]:  # fmt: skip
    """A traceable part of a model that is not traceable as a whole, compiled in the dtype of the proof."""

    def difference(found: Any) -> float:
        error = output_difference(expected, found)
        if not error <= tolerance:
            raise NotEquivalentError(f"the part differs by {error:.1e} of its scale")
        return error

    def same(graph: Graph) -> float:
        with precisely(call.tensors):
            return difference(graph.evaluate(call.cloned().bind(child), _own_dtype(call)))

    expected = call.run(copy_model(child, share_parameters=True))
    captured = capture(
        child, call, expected, dtype, fixed=fixed, compile_child=_no_child, tolerance=tolerance, tiers=TIERS[:1]
    )
    if captured.tier == "submodules":
        raise NotEquivalentError(captured.notes[0])
    if captured.fixed_size and not fixed:
        raise NotEquivalentError("what it does depends on the size of its input, which the rest may change")
    graph, record = apply(copy_graph(captured.graph), passes, policy, same)
    module = emit(graph, _own_dtype(call))
    difference(call.run(module))
    return _Child(captured.graph, graph, record, captured.fixed_size or not _holds_at_any_size(graph)), module


def _no_child(path: str, child: nn.Module, call: Example) -> tuple[nn.Module, bool]:
    raise NotEquivalentError("not traced as a whole")


def _is_channels_last(model: nn.Module) -> bool:
    kernels = [p for p in model.parameters() if p.dim() == 4]
    return any(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in kernels)


def _report(subject: _Subject, traced: _Traced, attempt: _Attempt, passes: Sequence[Pass], started: float) -> Report:
    captured, policy = traced.capture, traced.policy
    children = {path: traced.children[path] for path in captured.compiled}
    before = [captured.graph, *(child.before for child in children.values())]
    after = [attempt.graph, *(child.after for child in children.values())]
    is_cut = attempt.record.cut_short or any(child.record.cut_short for child in children.values())
    record = Record(list(attempt.record.firings), list(attempt.failures), cut_short=is_cut)
    refusals = [*attempt.refused, *attempt.record.refused(attempt.graph)]
    for path, child in children.items():
        record.firings += [replace(each, where=f"{path}.{each.where}") for each in child.record.firings]
        record.failures += [replace(each, where=f"{path}.{each.where}") for each in child.record.failures]
        refusals += [replace(each, where=f"{path}.{each.where}") for each in child.record.refused(child.after)]
    return Report(
        model=type(subject.model).__name__,
        passes=tuple(each.name for each in passes),
        objective=policy.objective,
        target=policy.target.name,
        tier=captured.tier,
        input_shapes=tuple(tuple(tensor.shape) for tensor in subject.proof_example.tensors),
        rewrites=record.firings,
        refusals=refusals,
        failures=record.failures,
        ops_before=sum(map(operator_counts, before), Counter()),
        ops_after=sum(map(operator_counts, after), Counter()),
        opaque=sum(map(opaque_counts, after), Counter()),
        params_before=sum(tensor.numel() for tensor in subject.model.parameters()),
        params_after=_elements(attempt.module),
        macs_before=sum(macs(value) for graph in before for value in graph.nodes()),
        macs_after=sum(macs(value) for graph in after for value in graph.nodes()),
        fixed_size=captured.fixed_size or not _holds_at_any_size(attempt.graph),
        verification=attempt.verification,
        notes=[*subject.notes, *captured.notes, *_cut_short(record, policy, started)],
        seconds=time.perf_counter() - started,
    )


def _cut_short(record: Record, policy: Policy, started: float) -> list[str]:
    if not record.cut_short:
        return []
    allowed = policy.deadline - started
    return [f"stopped rewriting after {allowed:,.0f} s, so more may merge (--limit seconds=); what is done is proved"]


def _elements(model: nn.Module) -> int:
    """Elements of the parameters and of the constants that rewriting made (bias maps), batch norm statistics aside."""
    constants = [
        buffer for path, buffer in model.named_buffers()
        if buffer.is_floating_point() and not path.endswith(("running_mean", "running_var"))
    ]  # fmt: skip
    return sum(tensor.numel() for tensor in [*model.parameters(), *constants])
