"""Which rewritten form of a model is equal to it? The first that the proof lets pass; what it finds guilty is left out.

A model is captured by the first tier that can trace it, rewritten, emitted and held against the original. Where that
fails, the firing with which the very check begins to fail is found by bisection (`rgc.attribution`), banned and
reported, and the model is rewritten without it; where no firing is to blame, the next tier is tried.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from rgc.attribution import Attribution, first_failing
from rgc.cost import Objective
from rgc.data import Sample
from rgc.emit import emit, losses, narrow
from rgc.engine import Policy, Record, apply, copy_graph
from rgc.errors import InputError, NotEquivalentError
from rgc.example import Example, copy_model, output_difference, precisely, runnable, runnable_in_float64
from rgc.frontend import TIERS, Capture, capture
from rgc.ir import Graph, Value
from rgc.limits import Limits
from rgc.passbook import resolve
from rgc.precision import is_precise
from rgc.report import Failure, Firing, Refused, Verification
from rgc.rewrite import Pass
from rgc.subject import Subject, floating_dtype, require_definite
from rgc.verify import Level, Pair

#: So many rewrites may fail at the level of the model before compiling gives up.
MOST_CULPRITS = 8


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
class Child:
    """A part that was compiled in place of a model that cannot be traced as a whole."""

    before: Graph
    after: Graph
    record: Record
    fixed_size: bool


@dataclass(frozen=True)
class Task:
    """What is compiled, and how: a model with an example of its own dtype; ``samples`` of a user join the proof."""

    subject: Subject
    example: Example
    passes: Sequence[Pass]
    fixed: bool
    dtype: torch.dtype
    options: Options
    samples: Sequence[Sample] = ()

    @staticmethod
    def of(model: nn.Module, example: Example, options: Options) -> Task:
        """What the options mean for a model and an example; `InputError` for what cannot be compiled."""
        passes, fixed = resolve(options.passes)
        fixed = fixed if options.fixed_size is None else options.fixed_size
        own_dtype = floating_dtype(model, example)
        dtype = options.dtype or own_dtype
        example = example.cast(own_dtype)
        options.limits.require_size(model, type(model).__name__)
        require_definite(model, example)
        return Task(Subject.of(model, example, own_dtype), example, passes, fixed, dtype, options)


@dataclass(frozen=True)
class Traced:
    """A model as one of ``tiers`` captured it, to be rewritten under ``policy``.

    ``children``: the parts that were compiled for that, under the same policy, also those that were put back.
    """

    capture: Capture
    children: dict[str, Child]
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

    def under(self, task: Task, policy: Policy) -> Traced:
        """The same trace under another policy, for which parts have to be compiled again."""
        if self.capture.tier != TIERS[-1]:
            return replace(self, policy=policy)
        again = _captured(task, policy, self.tiers[-1:])
        notes = tuple(note for note in self.capture.notes if note.startswith(TIERS[:-1]))
        return replace(again, capture=replace(again.capture, notes=notes + again.capture.notes), tiers=self.tiers)

    def up_to(self, task: Task, count: int) -> Traced:
        """The same trace with the first ``count`` firings only, however long they take."""
        return self.under(task, replace(self.policy, limit=count, deadline=math.inf))


@dataclass(frozen=True)
class Attempt:
    """A graph rewritten and emitted; ``refused`` are firings whose weights would not survive in its dtype."""

    graph: Graph
    record: Record
    module: fx.GraphModule
    verification: Verification
    failures: tuple[Failure, ...] = ()
    undone: tuple[tuple[str, str], ...] = ()  # by what a user's own data have shown
    refused: tuple[Refused, ...] = ()


class _LostError(NotEquivalentError):
    """Weights do not survive in the deployed dtype; ``refused`` are the firings that made them, to be left out."""

    def __init__(self, message: str, refused: list[Refused]) -> None:
        super().__init__(message)
        self.refused = refused


def captured_and_proved(task: Task, policy: Policy) -> tuple[Traced, Attempt]:
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


def _captured(task: Task, policy: Policy, tiers: Sequence[str]) -> Traced:
    """The model by the first of ``tiers`` that can trace it; without any, the model itself in one piece."""
    children: dict[str, Child] = {}

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
    require_nodes(found, task.options.limits)
    return Traced(found, children, policy, tiers)


def _after_parts(policy: Policy, children: Mapping[str, Child]) -> Policy:
    """The policy for what comes after the parts: their firings count."""
    if policy.limit is None:
        return policy
    return replace(policy, limit=max(0, policy.limit - sum(len(each.record.firings) for each in children.values())))


def _within_part(policy: Policy, path: str) -> Policy:
    """The policy inside a part, where places are named without its path."""
    inside = ((name, where.removeprefix(f"{path}.")) for name, where in policy.banned if where.startswith(f"{path}."))
    return replace(policy, banned=frozenset(inside))


def _prove(task: Task, traced: Traced) -> tuple[Traced, Attempt]:
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


def _culprit(task: Task, traced: Traced, record: Record) -> Firing | None:
    """The first firing with which the very check fails that has failed; None where it does without any."""
    firings = traced.firings(record)
    number = first_failing(len(firings), lambda count: fault(task, traced, count) is not None)
    return firings[number - 1] if number else None


def fault(task: Task, traced: Traced, count: int, only: Sequence[Sample] | None = None) -> NotEquivalentError | None:
    """What the check says of the model after ``count`` firings; on ``only`` these samples, if they are given."""
    cut = traced.up_to(task, count)
    try:
        _proved(task, cut, *_rewritten_within(task, cut), only=only)
    except NotEquivalentError as error:
        error.__cause__ = error.__context__ = None  # their frames hold the weights, and so do its own
        return error.with_traceback(None)
    return None


def attributed(
    task: Task, traced: Traced, found: Attribution, samples: Sequence[Sample], error: NotEquivalentError
) -> Attribution:
    """The culprit of a difference on one of the samples, found on that sample alone."""
    chosen = [sample for sample in samples if sample.name == error.sample]
    singles = chosen[0].singles()
    try:
        alone = fault(task, traced, found.firings, singles)
    except InputError:  # the model takes no batch of one
        alone = None
    if alone is not None:
        chosen, error = [sample for sample in singles if sample.name == alone.sample], alone
    number = first_failing(found.firings, lambda count: fault(task, traced, count, chosen) is not None)
    worse = fault(task, traced, number, chosen) or error
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


def _rewritten_within(task: Task, traced: Traced) -> tuple[Graph, Record]:
    policy = _after_parts(traced.policy, traced.children)
    return rewritten(task.subject, traced.capture, task.passes, policy)


def _proved(task: Task, traced: Traced, graph: Graph, record: Record, only: Sequence[Sample] | None = None) -> Attempt:
    """Emit and check a rewritten graph: on the example, drawn inputs and the user's own, or on ``only`` such."""
    subject, captured, dtype, options = task.subject, traced.capture, task.dtype, task.options
    # All that runs here is a copy: forward may write to the model, or to what is kept of it in the result.
    original, reference = runnable(subject.model, dtype, is_read_only=subject.is_read_only), None
    if subject.in_float64:
        reference = runnable_in_float64(subject.proof_model, subject.model, is_read_only=subject.is_read_only)
    free = holds_at_any_size(graph) and not captured.fixed_size
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
    return Attempt(graph, record, module, verification)


def rewritten(subject: Subject, captured: Capture, passes: Sequence[Pass], policy: Policy) -> tuple[Graph, Record]:
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


def require_nodes(captured: Capture, limits: Limits) -> None:
    if len(captured.graph) > limits.nodes:
        raise InputError(
            f"the graph has {len(captured.graph):,} operations; at most {limits.nodes:,} are taken (--limit nodes=)"
        )


def _child(
    child: nn.Module, call: Example, passes: Sequence[Pass], fixed: bool, policy: Policy, dtype: torch.dtype,
    tolerance: float,
) -> tuple[Child, nn.Module]:  # fmt: skip
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
        child, call, expected, dtype, fixed=fixed, compile_child=no_child, tolerance=tolerance, tiers=TIERS[:1]
    )
    if captured.tier == "submodules":
        raise NotEquivalentError(captured.notes[0])
    if captured.fixed_size and not fixed:
        raise NotEquivalentError("what it does depends on the size of its input, which the rest may change")
    graph, record = apply(copy_graph(captured.graph), passes, policy, same)
    module = emit(graph, _own_dtype(call))
    difference(call.run(module))
    return Child(captured.graph, graph, record, captured.fixed_size or not holds_at_any_size(graph)), module


def no_child(path: str, child: nn.Module, call: Example) -> tuple[nn.Module, bool]:
    raise NotEquivalentError("not traced as a whole")


def _release(module: fx.GraphModule) -> None:
    """Let go of the weights now: a `GraphModule` and its graph refer to each other, and so live on for a while."""
    for part in module.modules():
        part._parameters.clear()
        part._buffers.clear()


def _is_channels_last(model: nn.Module) -> bool:
    kernels = [p for p in model.parameters() if p.dim() == 4]
    return any(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in kernels)


def holds_at_any_size(graph: Graph) -> bool:
    return all(value.op.any_size for value in graph.nodes())
