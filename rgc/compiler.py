"""What does ``rgc.compile`` return? The equal module that `rgc.attempt` has found, its report and its plan."""

from __future__ import annotations

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

from rgc.attempt import (
    Attempt,
    Options,
    Task,
    Traced,
    attributed,
    captured_and_proved,
    fault,
    holds_at_any_size,
    no_child,
    require_nodes,
    rewritten,
)
from rgc.attribution import Attribution
from rgc.cost import CPU, OBJECTIVES, Objective, macs, target_named
from rgc.data import Sample, samples_of
from rgc.decisions import Decisions
from rgc.emit import opaque_counts, operator_counts
from rgc.engine import Policy, Record
from rgc.errors import InputError, NotEquivalentError
from rgc.example import Example, copy_model, precise_form, unchanged_generators
from rgc.frontend import capture
from rgc.ir import Graph
from rgc.limits import Limits
from rgc.passbook import resolve
from rgc.report import ErrorBound, Failure, Firing, Refused, Report
from rgc.rewrite import Pass
from rgc.rounding import bound_errors
from rgc.subject import Subject, device_of, example_of, floating_dtype, require_definite, require_eval
from rgc.verify import Level, require_level


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
    subject = Subject.of(model, example.cast(dtype), dtype)
    chosen, fixed = resolve(passes) if passes else ((), False)
    captured = capture(
        subject.proof_model, subject.proof_example, subject.expected, dtype,
        fixed=fixed, tolerance=subject.tolerance, compile_child=no_child,
    )  # fmt: skip
    require_nodes(captured, limits)
    policy = Policy(objective, target_named(target, dtype), limits=limits)
    graph, record = rewritten(subject, captured, chosen, policy)
    refusals = record.refused(graph)
    return Trace(graph, captured.tier, captured.notes, record.firings, refusals, captured.graph, record)


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
        task = Task.of(model, example, options)
        policy = _policy(task, started, by)
        traced, attempt = captured_and_proved(replace(task, samples=samples), policy)
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


def _policy(task: Task, started: float, by: Plan | None = None) -> Policy:
    """What the options, or the plan, say about what pays, and what they ban."""
    options = task.options
    return Policy(
        options.objective,
        target_named(options.target, task.dtype) if by is None else replace(CPU, name=by.target),
        banned=frozenset(by.undone if by else ()),
        limits=options.limits,
        deadline=started + options.limits.seconds,
        decisions=by.decisions if by else Decisions(),
    )


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
        task = Task.of(model, example, options)
        policy = _policy(task, started)
        traced, attempt = captured_and_proved(task, policy)
        count, undone = len(traced.firings(attempt.record)), tuple(attempt.failures)
        del attempt
        found = Attribution(True, samples[-1].last + 1, traced.capture.tier, count, undone=undone)
        error = fault(task, traced, count, samples)
        return found if error is None else attributed(task, traced, found, samples, error)


def _report(subject: Subject, traced: Traced, attempt: Attempt, passes: Sequence[Pass], started: float) -> Report:
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
        fixed_size=captured.fixed_size or not holds_at_any_size(attempt.graph),
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
