"""What does ``rgc.compile`` do? Capture, rewrite, emit, prove; and, if the proof fails, find the culprit and go on."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, cast

import torch
from torch import Tensor, fx, nn

from rgc.cost import OBJECTIVES, Objective, macs, parameters, target_named
from rgc.emit import emit, operator_counts
from rgc.engine import Policy, Record, apply, copy_graph
from rgc.errors import InputError, NotEquivalentError
from rgc.frontend import Capture, Example, capture, output_difference
from rgc.ir import Graph
from rgc.passbook import resolve
from rgc.proof import TOLERANCE
from rgc.report import Failure, Firing, Refused, Report, Verification
from rgc.rewrite import Pass
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

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> CompiledModule:
        copied = cast(CompiledModule, super().__deepcopy__(memo or {}))
        copied.report, copied.plan, copied.example = self.report, self.plan, self.example
        return copied


@dataclass(frozen=True)
class Options:
    """How to compile: what ``rgc.compile`` takes beside the model and the example."""

    passes: Any = "default"
    objective: Objective = "latency"
    target: str | None = None
    dtype: torch.dtype | None = None
    verify: Level = "quick"
    strict: bool = False
    fixed_size: bool | None = None  # may passes rely on the example's size? None: as their names say


@dataclass(frozen=True)
class Plan:
    """The rewrites of one compilation, to be applied to other checkpoints of the same model."""

    source: nn.Module = field(repr=False)
    example: Example = field(repr=False)
    options: Options
    decisions: tuple[tuple[str, str], ...]

    def apply(self, state_dict: dict[str, Tensor]) -> CompiledModule:
        """The same model with the weights of ``state_dict``, through the same rewrites.

        Raises `InputError` where the weights do not fit, `NotEquivalentError` where a decision no longer holds.
        """
        model = copy.deepcopy(self.source)
        try:
            model.load_state_dict(state_dict)
        except RuntimeError as error:
            raise InputError(f"the checkpoint does not fit the model: {' '.join(str(error).split())[:300]}") from error
        compiled = compile_with(model, self.example, self.options)
        found = tuple((firing.rewrite, firing.where) for firing in compiled.report.rewrites)
        lost = [decision for decision in self.decisions if decision not in found]
        if lost:
            reasons = {(refused.rewrite, refused.where): refused.reason for refused in compiled.report.refusals}
            name, where = lost[0]
            reason = reasons.get(lost[0], "it does not match any more")
            raise NotEquivalentError(f"{name} at {where} does not hold for this checkpoint: {reason}")
        return compiled


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
) -> CompiledModule:
    """Merge what is linear in ``model`` and prove the result equal; the model itself is never changed.

    example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; None asks the model for its
    ``example_inputs()``.
    passes: "default" (exact for any input size), "all" (also what holds at the example's size only), names (with ``-``
    taken away), pass objects, or files and modules of your own passes.
    objective: "latency" (merge what a cost model of ``target`` says pays), "depth", "macs" or "params".
    dtype: the dtype of the result, by default the model's own.
    verify: "quick" or "full", how many inputs are drawn for the proof.
    strict: stop at the first rewrite whose check fails, instead of undoing it.

    Raises `InputError` for what cannot be used and `NotEquivalentError` where no equal result was reached.

    >>> import torch, rgc
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
    >>> compiled = rgc.compile(model, torch.randn(1, 3, 16, 16))
    >>> compiled.report.ops_before, compiled.report.ops_after
    (Counter({'Conv2d': 1, 'BatchNorm2d': 1, 'ReLU': 1}), Counter({'Conv2d': 1, 'ReLU': 1}))
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"rgc compiles a torch.nn.Module, not {type(model).__name__}")
    if objective not in OBJECTIVES:
        raise InputError(f"unknown objective {objective!r}; choose one of {', '.join(OBJECTIVES)}")
    options = Options(passes, objective, target, dtype, require_level(verify), strict)
    require_eval(model)
    return compile_with(model, example_of(model, example_inputs), options)


@dataclass(frozen=True)
class Trace:
    """A model as rgc sees it, before or after some passes, without a proof of the whole: for looking at."""

    graph: Graph
    tier: str
    notes: tuple[str, ...]
    rewrites: list[Firing]
    refusals: list[Refused]


def trace(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    passes: str | Sequence[Any] = (),
    objective: Objective = "latency",
    target: str | None = None,
) -> Trace:
    """The graph of ``model`` with module paths and source lines, after ``passes``; arguments as in `compile`.

    Every firing is proved, the model as a whole is not: use `compile` for a result to run.
    """
    require_eval(model)
    example = example_of(model, example_inputs)
    dtype = floating_dtype(model, example)
    subject = _Subject.of(model, example.cast(dtype), dtype)
    chosen, fixed = resolve(passes) if passes else ((), False)
    captured = capture(
        subject.proof_model, subject.proof_example, subject.expected, dtype,
        fixed=fixed, tolerance=subject.tolerance, compile_child=_no_child,
    )  # fmt: skip
    graph, record = _rewritten(subject, captured, chosen, Policy(objective, target_named(target)))
    return Trace(graph, captured.tier, captured.notes, record.firings, record.refused(graph))


def require_eval(model: nn.Module) -> None:
    """Refuse a model with a submodule in training mode, by name."""
    for name, module in model.named_modules():
        if module.training:
            which = f"submodule {name!r}" if name else "model"
            raise InputError(f"the {which} ({type(module).__name__}) is in training mode; call model.eval() first")


def example_of(model: nn.Module, given: Any) -> Example:
    """The example call: what was given, or what the model itself suggests."""
    if given is None:
        suggest = getattr(model, "example_inputs", None)
        if not callable(suggest):
            raise InputError(
                f"{type(model).__name__} suggests no example_inputs(); pass an example (--input 1x3x224x224)"
            )
        given = suggest()
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


def compile_with(model: nn.Module, example: Example, options: Options) -> CompiledModule:
    """`compile` with everything said: the model is in eval mode and the example is a call of it."""
    started = time.perf_counter()
    target = target_named(options.target)
    passes, fixed = resolve(options.passes)
    fixed = fixed if options.fixed_size is None else options.fixed_size
    own_dtype = floating_dtype(model, example)
    dtype = options.dtype or own_dtype
    example = example.cast(own_dtype)
    subject = _Subject.of(model, example, own_dtype)
    captured = capture(
        subject.proof_model, subject.proof_example, subject.expected, dtype,
        fixed=fixed, tolerance=subject.tolerance,
        compile_child=lambda child, call: _child(child, call, passes, fixed, dtype, options),
    )  # fmt: skip
    policy = Policy(options.objective, target)
    attempt = _prove(subject, captured, passes, policy, dtype, options)
    report = _report(model, example, captured, attempt, options, passes, started)
    sources = {id(p): p for p in model.parameters()}
    plan = Plan(copy.deepcopy(model, sources), example, options, tuple((f.rewrite, f.where) for f in report.rewrites))
    return CompiledModule.of(attempt.module, report, plan, example.cast(dtype))


@dataclass(frozen=True)
class _Subject:
    """The model under compilation: as it is, and as the proof sees it (float64 where it runs in float64)."""

    model: nn.Module
    device: torch.device
    proof_model: nn.Module
    proof_example: Example
    expected: Any
    in_float64: bool
    tolerance: float
    notes: tuple[str, ...]

    @staticmethod
    def of(model: nn.Module, example: Example, dtype: torch.dtype) -> _Subject:
        device = device_of(model)
        on_cpu = example.to(torch.device("cpu"))
        precise = copy.deepcopy(model).cpu().double().requires_grad_(False)
        try:
            expected = on_cpu.cast(torch.float64).run(precise)
            return _Subject(model, device, precise, on_cpu.cast(torch.float64), expected, True, TOLERANCE, ())
        except (RuntimeError, TypeError) as error:
            note = f"the model does not run in float64 ({str(error).splitlines()[0][:120]}); proved in {dtype} instead"
        plain = copy.deepcopy(model).cpu().requires_grad_(False)
        try:
            expected = on_cpu.run(plain)
        except Exception as error:
            shapes = ", ".join("x".join(map(str, t.shape)) for t in example.tensors)
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"{type(model).__name__} does not run on an input of {shapes}: {first}") from error
        return _Subject(model, device, plain, on_cpu, expected, False, 256 * torch.finfo(dtype).eps, (note,))


@dataclass(frozen=True)
class _Attempt:
    """A graph rewritten and emitted."""

    graph: Graph
    record: Record
    module: fx.GraphModule
    verification: Verification
    failures: tuple[Failure, ...] = ()


def _prove(
    subject: _Subject, captured: Capture, passes: Sequence[Pass], policy: Policy, dtype: torch.dtype, options: Options
) -> _Attempt:
    """Rewrite and check the whole model; a rewrite that the check finds guilty is banned, reported, and left out."""
    failures: list[Failure] = []
    while True:
        try:
            attempt = _attempt(subject, captured, passes, policy, dtype, options)
        except NotEquivalentError as error:
            culprit = _culprit(subject, captured, passes, policy)
            if culprit is None or options.strict or len(failures) >= MOST_CULPRITS:
                where = f"{culprit.rewrite} at {culprit.where}: " if culprit else ""
                raise NotEquivalentError(f"{where}the compiled model {error}; nothing is emitted") from error
            failures.append(Failure(culprit.rewrite, culprit.where, f"the model {error}"))
            policy = replace(policy, banned=policy.banned | {(culprit.rewrite, culprit.where)})
            continue
        if options.strict and attempt.record.failures:
            first = attempt.record.failures[0]
            raise NotEquivalentError(f"{first.rewrite} at {first.where}: {first.reason}")
        return replace(attempt, failures=tuple(failures + attempt.record.failures))


def _attempt(
    subject: _Subject, captured: Capture, passes: Sequence[Pass], policy: Policy, dtype: torch.dtype, options: Options
) -> _Attempt:
    graph, record = _rewritten(subject, captured, passes, policy)
    module = emit(graph, dtype).to(subject.device)
    precise = emit(graph, torch.float64) if subject.in_float64 else None
    reference = subject.proof_model if subject.in_float64 else None
    pair = Pair(_in_dtype(subject.model, dtype), module, reference, precise, dtype, subject.device)
    free = all(value.op.any_size for value in graph.nodes()) and not captured.fixed_size
    example = subject.proof_example
    verification = pair.check(example, level=options.verify, free_sizes=free, expected=subject.expected)
    return _Attempt(graph, record, module, verification)


def _rewritten(subject: _Subject, captured: Capture, passes: Sequence[Pass], policy: Policy) -> tuple[Graph, Record]:
    named = subject.proof_example.bind(subject.proof_model)

    def same(graph: Graph) -> float:
        given = {name: value.clone() if isinstance(value, Tensor) else value for name, value in named.items()}
        error = output_difference(subject.expected, graph.evaluate(given))
        if not error <= subject.tolerance:
            raise NotEquivalentError(f"the model differs by {error:.1e} of its scale")
        return error

    return apply(copy_graph(captured.graph), passes, policy, same)


def _culprit(subject: _Subject, captured: Capture, passes: Sequence[Pass], policy: Policy) -> Firing | None:
    """The first firing after which the model is wrong in float64, by bisection; None if all of them together are right."""

    def error_after(count: int) -> tuple[float, list[Firing]]:
        graph, record = _rewritten(subject, captured, passes, replace(policy, limit=count))
        module = emit(graph, torch.float64 if subject.in_float64 else None)
        return output_difference(subject.expected, subject.proof_example.run(module)), record.firings

    _, record = _rewritten(subject, captured, passes, policy)
    good, bad = 0, len(record.firings)
    if bad == 0 or error_after(bad)[0] <= subject.tolerance or error_after(good)[0] > subject.tolerance:
        return None  # with no rewrite at all it is wrong too: then none of them is guilty
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if error_after(middle)[0] <= subject.tolerance else (good, middle)
    return error_after(bad)[1][-1]


def _child(
    child: nn.Module, call: Example, passes: Sequence[Pass], fixed: bool, dtype: torch.dtype, options: Options
) -> nn.Module:
    """A traceable part of a model that is not traceable as a whole, compiled in the dtype of the proof."""
    expected = call.run(child)
    captured = capture(child, call, expected, dtype, fixed=fixed, compile_child=_no_child)
    if captured.tier == "submodules":
        raise NotEquivalentError("no tier traces this part")
    graph, _ = apply(captured.graph, passes, Policy(options.objective, target_named(options.target)))
    module = emit(graph, None)
    error = output_difference(expected, call.run(module))
    if not error <= TOLERANCE:
        raise NotEquivalentError(f"differs by {error:.1e}")
    return module


def _no_child(child: nn.Module, call: Example) -> nn.Module:
    raise NotEquivalentError("not traced as a whole")


def _in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    if all(t.dtype == dtype for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()):
        return model
    return copy.deepcopy(model).to(dtype)


def _report(
    model: nn.Module, example: Example, captured: Capture, attempt: _Attempt, options: Options,
    passes: Sequence[Pass], started: float,
) -> Report:  # fmt: skip
    before, after = captured.graph, attempt.graph
    fixed = captured.fixed_size or not all(value.op.any_size for value in after.nodes())
    return Report(
        model=type(model).__name__,
        passes=tuple(each.name for each in passes),
        objective=options.objective,
        target=options.target or "cpu",
        tier=captured.tier,
        input_shapes=tuple(tuple(tensor.shape) for tensor in example.tensors),
        rewrites=attempt.record.firings,
        refusals=attempt.record.refused(after),
        failures=list(attempt.failures),
        ops_before=operator_counts(before),
        ops_after=operator_counts(after),
        params_before=_distinct_parameters(before),
        params_after=_distinct_parameters(after),
        macs_before=sum(macs(value) for value in before.nodes()),
        macs_after=sum(macs(value) for value in after.nodes()),
        fixed_size=fixed,
        verification=attempt.verification,
        notes=list(captured.notes),
        seconds=time.perf_counter() - started,
    )


def _distinct_parameters(graph: Graph) -> int:
    """Parameters, those that several layers share counted once."""
    seen = {id(value.op): parameters(value) for value in graph.nodes()}
    return sum(seen.values())
