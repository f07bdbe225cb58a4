"""What does ``rgc.compile`` do? Capture, rewrite, emit, prove; and, if the proof fails, find the culprit and go on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import PythonCode
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from rgc.cost import OBJECTIVES, Objective, macs, target_named
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
    """The rewrites of one compilation, to be applied to other checkpoints of the same model."""

    source: nn.Module = field(repr=False)
    example: Example = field(repr=False)
    options: Options
    decisions: tuple[tuple[str, str], ...]

    def apply(self, state_dict: dict[str, Tensor]) -> CompiledModule:
        """The same model with the weights of ``state_dict``, through the same rewrites.

        Raises `InputError` where the weights do not fit, `NotEquivalentError` where a decision no longer holds.
        """
        model = copy_model(self.source)
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
    limits: Limits | None = None,
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
    return compile_with(model, example_of(model, example_inputs), options)


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


def compile_with(model: nn.Module, example: Example, options: Options) -> CompiledModule:
    """`compile` with everything said: the model is in eval mode and the example is a call of it."""
    started = time.perf_counter()
    passes, fixed = resolve(options.passes)
    fixed = fixed if options.fixed_size is None else options.fixed_size
    own_dtype = floating_dtype(model, example)
    dtype = options.dtype or own_dtype
    example = example.cast(own_dtype)
    options.limits.require_size(model, type(model).__name__)
    require_definite(model, example)
    policy = Policy(
        options.objective, target_named(options.target, dtype),
        limits=options.limits, deadline=started + options.limits.seconds,
    )  # fmt: skip
    with unchanged_generators():
        subject = _Subject.of(model, example, own_dtype)
        captured, attempt, children = _captured_and_proved(subject, passes, fixed, policy, dtype, options)
    report = _report(subject, captured, attempt, children, policy, passes, started)
    decisions = tuple((firing.rewrite, firing.where) for firing in attempt.record.firings)
    plan = Plan(copy_model(model, share_parameters=True), example, options, decisions)
    compiled = CompiledModule.of(attempt.module, report, plan, example.cast(dtype))
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


def _captured_and_proved(
    subject: _Subject, passes: Sequence[Pass], fixed: bool, policy: Policy, dtype: torch.dtype, options: Options
) -> tuple[Capture, _Attempt, dict[str, _Child]]:
    """The first tier whose result is equal; the last keeps the model as it is."""
    children: dict[str, _Child] = {}
    tiers: Sequence[str] = TIERS
    notes: tuple[str, ...] = ()

    def compile_child(path: str, child: nn.Module, call: Example) -> tuple[nn.Module, bool]:
        if not tiers:
            raise NotEquivalentError("no part may be compiled")
        children[path], module = _child(child, call, passes, fixed, policy, dtype, subject.tolerance)
        return module, children[path].fixed_size

    while True:
        captured = capture(
            subject.proof_model, subject.proof_example, subject.expected, dtype,
            fixed=fixed, compile_child=compile_child, tolerance=subject.tolerance, tiers=tiers,
        )  # fmt: skip
        _require_nodes(captured, options.limits)
        captured = replace(captured, notes=notes + captured.notes)
        try:
            attempt = _prove(subject, captured, passes, policy, dtype, options)
            return captured, attempt, {path: children[path] for path in captured.compiled}
        except NotEquivalentError as error:
            if options.strict or not tiers or isinstance(error, _LostError):
                raise
            notes = (*captured.notes, f"{captured.tier}: {error}")
            tiers = TIERS[TIERS.index(captured.tier) + 1 :]


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
    refused: tuple[Refused, ...] = ()


def _prove(
    subject: _Subject, captured: Capture, passes: Sequence[Pass], policy: Policy, dtype: torch.dtype, options: Options
) -> _Attempt:
    """Rewrite and check the whole model; a rewrite that the check finds guilty is banned, reported, and left out."""
    failures: list[Failure] = []
    refused: list[Refused] = []
    while True:
        try:
            attempt = _attempt(subject, captured, passes, policy, dtype, options)
        except _LostError as error:
            if not error.refused:
                raise _LostError(f"the compiled model {error}; nothing is emitted", []) from error
            refused += error.refused
            policy = replace(policy, banned=policy.banned | {(each.rewrite, each.where) for each in error.refused})
            continue
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
        return replace(attempt, failures=tuple(failures + attempt.record.failures), refused=tuple(refused))


def _attempt(
    subject: _Subject, captured: Capture, passes: Sequence[Pass], policy: Policy, dtype: torch.dtype, options: Options
) -> _Attempt:
    graph, record = _rewritten(subject, captured, passes, policy)
    # All that runs here is a copy: forward may write to the model, or to what is kept of it in the result.
    original, reference = runnable(subject.model, dtype, is_read_only=subject.is_read_only), None
    if subject.in_float64:
        reference = runnable_in_float64(subject.proof_model, subject.model, is_read_only=subject.is_read_only)
    free = _holds_at_any_size(graph) and not captured.fixed_size
    precise = emit(graph, None, copies=False) if subject.in_float64 else None
    pair = Pair(original, precise or original, reference, precise, dtype, subject.device)
    cases = pair.check_in_float64(
        subject.proof_example, level=options.verify, free_sizes=free, expected=subject.expected
    )  # fmt: skip
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
            error = output_difference(subject.expected, graph.evaluate(given))
        if not error <= subject.tolerance:
            raise NotEquivalentError(f"the model differs by {error:.1e} of its scale")
        return error

    return apply(copy_graph(captured.graph), passes, policy, same)


def _culprit(subject: _Subject, captured: Capture, passes: Sequence[Pass], policy: Policy) -> Firing | None:
    """The first firing after which the model is wrong in float64, by bisection; None if it is right after all."""

    def error_after(count: int) -> tuple[float, list[Firing]]:
        graph, record = _rewritten(subject, captured, passes, replace(policy, limit=count))
        module = emit(graph, None, copies=False)
        difference = output_difference(subject.expected, subject.proof_example.run(module))
        _release(module)
        return difference, record.firings

    _, record = _rewritten(subject, captured, passes, policy)
    good, bad = 0, len(record.firings)
    if bad == 0 or error_after(bad)[0] <= subject.tolerance or error_after(good)[0] > subject.tolerance:
        return None  # with no rewrite at all it is wrong too: then none of them is guilty
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if error_after(middle)[0] <= subject.tolerance else (good, middle)
    return error_after(bad)[1][-1]


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
            return difference(graph.evaluate(call.cloned().bind(child)))

    expected = call.run(copy_model(child, share_parameters=True))
    captured = capture(
        child, call, expected, dtype, fixed=fixed, compile_child=_no_child, tolerance=tolerance, tiers=TIERS[:1]
    )
    if captured.tier == "submodules":
        raise NotEquivalentError(captured.notes[0])
    if captured.fixed_size and not fixed:
        raise NotEquivalentError("what it does depends on the size of its input, which the rest may change")
    graph, record = apply(copy_graph(captured.graph), passes, policy, same)
    module = emit(graph, None)
    difference(call.run(module))
    return _Child(captured.graph, graph, record, captured.fixed_size or not _holds_at_any_size(graph)), module


def _no_child(path: str, child: nn.Module, call: Example) -> tuple[nn.Module, bool]:
    raise NotEquivalentError("not traced as a whole")


def _is_channels_last(model: nn.Module) -> bool:
    kernels = [p for p in model.parameters() if p.dim() == 4]
    return any(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in kernels)


def _report(
    subject: _Subject, captured: Capture, attempt: _Attempt, children: dict[str, _Child], policy: Policy,
    passes: Sequence[Pass], started: float,
) -> Report:  # fmt: skip
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
