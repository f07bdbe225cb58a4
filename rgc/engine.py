"""How are rewrites applied? A worklist over the graph: match, build, gate by cost, prove, replace, look again nearby.

The engine, not the author of a rewrite, looks after other users of inner values, commutativity, provenance, geometry
fields that a rule did not read, the cost, and the float64 check of every firing. A firing that fails its check never
reaches the graph, and is reported; so is a rewrite that raises.
"""

from __future__ import annotations

import math
import time
import traceback
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from rgc.algebra import Conv
from rgc.cost import CPU, Objective, Target, cost, macs
from rgc.decisions import ORDER, PARTS, UNDECIDED, Decisions, Question, barred, form_of
from rgc.errors import GraphError, NotEquivalentError, Refusal, RgcError, require
from rgc.ir import Graph, Operator, Origin, Value, is_value, topological
from rgc.limits import Limits, human_bytes
from rgc.partition import parts_that_pay
from rgc.planner import Planner
from rgc.precision import ReadOnly, in_float64
from rgc.proof import check_firing
from rgc.ranges import Interval, range_of
from rgc.region import Region, affine_regions, join_at, partial_joins_at
from rgc.report import Failure, Firing, Refused
from rgc.rewrite import Case, GraphPass, Match, Pass, Rewrite, observed, unread_geometry

#: Passes that fire more often than this per node of the graph undo each other for ever.
MOST_FIRINGS_PER_NODE = 8


@dataclass(frozen=True)
class Policy:
    """What the engine may do: the objective and machine that decide what pays, what is banned, and how far to go.

    ``deadline`` is a time of `time.perf_counter` after which nothing more is tried. ``decisions`` keeps what was found
    to pay; closed ones decide in the place of the objective and the machine.
    """

    objective: Objective = "latency"
    target: Target = CPU
    banned: frozenset[tuple[str, str]] = frozenset()
    limit: int | None = None  # stop after so many firings
    limits: Limits = field(default_factory=Limits)
    deadline: float = math.inf
    decisions: Decisions = field(default_factory=Decisions)


#: What proves a firing, as `check_firing` does: old value, new value, sources; the error, or a `NotEquivalentError`.
Proof = Callable[..., float]

#: What two neighbours are joined with instead of each other, both sides with themselves.
Segments = tuple[tuple[Value, ...], tuple[Value, ...]]


@dataclass
class Record:
    """What the engine did, would not do, and found wrong."""

    firings: list[Firing] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    refusals: dict[tuple[str, Value | None], str] = field(default_factory=dict)  # None: the whole model
    broken: set[tuple[str, Value | None]] = field(default_factory=set)  # failed once, not tried there again
    planned: dict[tuple[Value, Value], Segments] = field(default_factory=dict)  # of neighbours left apart for others
    cut_short: bool = False  # the time was up before all was tried

    def refused(self, graph: Graph) -> list[Refused]:
        """The refusals that still stand: those at values that the graph still holds."""
        return [
            Refused(name, "model" if value is None else value.where, reason)
            for (name, value), reason in self.refusals.items()
            if value is None or value in graph
        ]

    def fail(self, name: str, value: Value | None, reason: str) -> None:
        """Report a pass whose result was not equal, and do not try it there again."""
        self.failures.append(Failure(name, "model" if value is None else value.where, reason))
        self.broken.add((name, value))

    def require_progress(self, allowance: int) -> None:
        """`GraphError` where passes have fired more often than ``allowance``."""
        if len(self.firings) > allowance:
            last = self.firings[-1]
            names = ", ".join(sorted({firing.rewrite for firing in self.firings[-len(self.firings) // 2 :]}))
            raise GraphError(
                f"{last.rewrite} still fires at {last.where} after {allowance} firings: "
                f"does a result match its own pattern, or do passes undo each other ({names})?"
            )


def apply(
    graph: Graph,
    passes: Sequence[Pass],
    policy: Policy,
    same: Callable[[Graph], float] = lambda _: 0.0,
    proof: Proof | None = None,
) -> tuple[Graph, Record]:
    """Run ``passes`` to their fixed point; ``same`` measures how far a graph pass has led from the original.

    ``proof`` is asked of every firing of a rewrite instead of `check_firing`.
    """
    record = Record()
    allowance = MOST_FIRINGS_PER_NODE * (len(graph) + 10)
    while True:
        before = len(record.firings)
        graph = _run_graph_passes(graph, [p for p in passes if isinstance(p, GraphPass)], policy, record, same)
        record.require_progress(allowance)
        rewrites = [p for p in passes if isinstance(p, Rewrite)]
        worker = _Worklist(graph, rewrites, policy, record, allowance, proof or check_firing)
        worker.run()
        if len(record.firings) == before or _exhausted(policy, record):
            return graph, record


def copy_graph(graph: Graph) -> Graph:
    """A graph of new values over the same operators."""
    twins: dict[Value, Value] = {}
    for value in graph.nodes():
        inputs = [twins[used] for used in value.inputs]
        twins[value] = Value(value.op, inputs, value.type, value.origin, value.name)
    outputs = tree_map(lambda leaf: twins[leaf] if isinstance(leaf, Value) else leaf, graph.outputs, is_leaf=is_value)
    return Graph([twins[value] for value in graph.inputs], outputs, [twins[value] for value in graph.effects])


class _Worklist:
    def __init__(
        self,
        graph: Graph,
        rewrites: Sequence[Rewrite],
        policy: Policy,
        record: Record,
        allowance: int,
        proof: Proof,
    ) -> None:
        self.graph, self.policy, self.record, self.allowance = graph, policy, record, allowance
        self.rewrites, self.proof = rewrites, proof
        cases = [(rewrite, case) for rewrite in rewrites for case in rewrite.cases]
        self.local = [pair for pair in cases if not pair[1].matches_regions]
        self.regional = [pair for pair in cases if pair[1].matches_regions]
        self.of_parts = [pair for pair in self.regional if pair[1].matches_parts]
        nodes = graph.nodes()
        self.order: dict[Value, float] = {value: float(index) for index, value in enumerate(nodes)}
        self.uses = Counter(id(value.op) for value in nodes)
        self.pending = deque(map(weakref.ref, nodes))  # what has been replaced meanwhile need not live on
        self.waiting = set(nodes)
        self.made: set[Value] = set()  # by rewrites, and not come to since
        self.copying: OrderedDict[weakref.ref[Value], None] = OrderedDict()  # where a match holds what others use too
        self.planner = planner_of(rewrites, policy)

    def run(self) -> None:
        """Visit until nothing fires: first what replaces all that it matches, then what copies a part of it.

        A copy may pay by itself and yet cost the merge that would have made it needless.
        """
        while not _exhausted(self.policy, self.record):
            if self.pending:
                value = self.pending.popleft()()
                if value is None or value not in self.graph:
                    continue
                self.made.discard(value)
                if self.made.intersection(value.inputs):  # after them: of a long chain neighbours merge in pairs,
                    self.pending.append(weakref.ref(value))  # these again in pairs, and so most merges are small
                    continue
                self.waiting.discard(value)
                self._visit(value, may_copy=False)
            elif self.copying:
                value = self.copying.popitem(last=False)[0]()
                if value is not None and value in self.graph:
                    self._visit(value, may_copy=True)
            elif not self._visit_regions():
                return

    def _visit(self, value: Value, may_copy: bool) -> None:
        for rewrite, _ in (*self.local, *self.regional):
            self.record.refusals.pop((rewrite.name, value), None)  # what stood in the way may have gone
        for rewrite, case in self.local:
            if self._try_all(rewrite, value, case.match(value), case, may_copy):
                return
        for rewrite, case in self.regional:
            if self._try_all(rewrite, value, self._joins(case, value), case, may_copy):
                return

    def _joins(self, case: Case, value: Value) -> Iterator[Match]:
        """The branches that meet in ``value``, all of them first."""
        join = join_at(value, self.order)
        whole = None if join is None else case.match_region(join)
        if whole is not None:
            yield whole
        yield from filter(None, map(case.match_partial, partial_joins_at(value, self.graph)))

    def _visit_regions(self) -> bool:
        """Regions come last, when nothing local fires any more; True if one fired."""
        fired = False
        outputs = set(self.graph.output_values)
        for region in reversed(affine_regions(self.graph)) if self.of_parts else ():  # one may begin where one ends
            if all(value in self.graph for value in (region.source, *region.values)):
                fired = self._visit_region(region, outputs) or fired
        return fired

    def _visit_region(self, region: Region, outputs: set[Value]) -> bool:
        """The parts that the plan names, last to first, for each begins where the one before ends."""
        inside = set(region.values)
        needed = {v for v in region.values if v in outputs or any(u not in inside for u in self.graph.users(v))}
        parts = self._parts(region, needed)
        fired = False
        for part in reversed(parts or [region]):  # without parts, the region itself is tried, and says why not
            fired = self._rewrite_part(part) or fired
        return fired

    def _parts(self, region: Region, needed: Collection[Value]) -> list[Region]:
        """The parts of ``region`` to be replaced, first to last, as the cost model cuts it or as was decided."""
        number = {region.source: -1, **{value: index for index, value in enumerate(region.values)}}
        kept = (str(number[value]) for value in region.values if value in needed)

        def weigh() -> str:
            found = parts_that_pay(region, self._price_of, self._price, needed)
            return " ".join(f"{number[part.source]}:{number[part.sink]}" for part in found)

        form = form_of([region.source], region.values, more=[*kept, *self._barred])
        answer = self.policy.decisions.answer(Question(PARTS, region.sink.where, form), weigh) or ""
        ends = (tuple(map(int, part.split(":"))) for part in answer.split())
        return [region.between(first, last) for first, last in ends]

    def _rewrite_part(self, part: Region) -> bool:
        for rewrite, case in self._by_price(part):
            matches = filter(None, map(case.match_region, [part]))
            if _exhausted(self.policy, self.record):
                return False
            if self._try_all(rewrite, part.sink, matches, case, may_copy=True):
                return True
        return False

    def _by_price(self, part: Region) -> list[tuple[Rewrite, Case]]:
        """The rewrites of regions, by the price of what they make of ``part``; last those that refuse it."""

        def price(pair: tuple[Rewrite, Case]) -> float:
            found = self._price_by(part, *pair)
            return math.inf if found is None else found

        def weigh() -> str:
            order = sorted(range(len(self.of_parts)), key=lambda index: price(self.of_parts[index]))
            return " ".join(map(str, order))

        form = form_of([part.source], part.values, more=self._barred)
        answer = self.policy.decisions.answer(Question(ORDER, part.sink.where, form), weigh) or ""
        return [self.of_parts[int(index)] for index in answer.split()]

    @property
    def _barred(self) -> Iterator[str]:
        """What may not be tried, as a part of the form of a question: what is found to pay depends on it."""
        broken = ((name, "model" if value is None else value.where) for name, value in self.record.broken)
        return barred({*self.policy.banned, *broken})

    def _price_of(self, part: Region) -> float | None:
        """What the cheapest rewrite of ``part`` would cost; None where none takes it."""
        prices = (self._price_by(part, rewrite, case) for rewrite, case in self.of_parts)
        return min((price for price in prices if price is not None), default=None)

    def _price_by(self, part: Region, rewrite: Rewrite, case: Case) -> float | None:
        """What ``rewrite`` would make of ``part`` costs, before any number of it is computed."""
        if self._is_barred(rewrite, part.sink):
            return None
        try:
            match = case.match_region(replace(part, outlined=True))
            if match is None:
                return None
            new = build(rewrite, case, match)
        except (Refusal, GraphError):
            return None
        return cost(topological([new], known=lambda value: value is part.source), *self._weights)

    def _price(self, value: Value) -> float:
        return cost([value], *self._weights)

    @property
    def _weights(self) -> tuple[Objective, Target]:
        return self.policy.objective, self.policy.target

    def _try_all(self, rewrite: Rewrite, root: Value, matches: Iterator[Match], case: Case, may_copy: bool) -> bool:
        if self._is_barred(rewrite, root):
            return False
        while True:
            try:
                match = next(matches, None)  # which may ask a predicate of the rewrite
                if match is None:
                    return False
                if not may_copy and len(_dying(self.graph, match)) < len(match.interior):
                    self.copying[weakref.ref(root)] = None
                    continue
                self._fire(rewrite, case, match)
            except Refusal as refusal:
                self.record.refusals.setdefault((rewrite.name, root), refusal.reason)
            except (GraphError, NotEquivalentError) as error:
                self.record.fail(rewrite.name, root, str(error))
                return False
            else:
                self.record.require_progress(self.allowance)
                return True

    def _is_barred(self, rewrite: Rewrite, root: Value) -> bool:
        return (rewrite.name, root.where) in self.policy.banned or (rewrite.name, root) in self.record.broken

    def _fire(self, rewrite: Rewrite, case: Case, match: Match) -> None:
        root = match.root
        replacement = build(rewrite, case, match)
        _require_same_type(rewrite, match.target, replacement)
        new = match.embed(replacement)
        added = topological([new], known=self.graph.__contains__)
        dying = _dying(self.graph, match)
        _require_within(self.policy.limits, match.interior, added)
        if case.weighed:
            self._require_worth(rewrite, case, match, dying, added)
        else:
            _require_no_copies(match, dying)
        sources = [value for value in match.values.values() if value not in match.interior]
        ranges = {value: range_of(value) for value in sources} if case.relies_on_range else {}
        error = self.proof(match.target, replacement, sources, ranges=ranges)
        origin = _merged_origin(match)
        self._replace(match, new, added, origin)
        labels = tuple(value.op.label for value in added)
        condition = _condition(ranges)
        # without a range that says anything, the check was on all values
        kind = "range-conditional" if condition else _evidence_class(match, added, error)
        more = sum(map(macs, added)) - sum(map(macs, dying))
        self.record.firings.append(Firing(rewrite.name, root.where, kind, error, labels, origin.paths, condition, more))

    def _require_worth(
        self, rewrite: Rewrite, case: Case, match: Match, dying: list[Value], added: list[Value]
    ) -> None:
        """Refuse what does not pay, as the plan of its chain or the gain decides, or as was decided before."""
        kept = next((value for value in match.interior if value not in dying), None)
        if self.policy.objective == "params":  # those of an operator that other values share stay
            dying, added = self._freed(dying), list({id(value.op): value for value in added}.values())

        def weigh() -> None:
            if not self._is_planned(case, match):
                require_gain(self.policy, dying, added, kept)

        chain = self.planner.form_around(self.graph, *match.interior[::-1]) if case.is_pair else ""
        form = form_of(dying, added, [] if kept is None else [kept], more=[chain])
        _require_decided(self.policy.decisions, Question(rewrite.name, match.root.where, form), weigh)

    def _is_planned(self, case: Case, match: Match) -> bool:
        """Does the plan of a longer chain join the two? Without a plan the gain decides; against a plan, a refusal."""
        if not case.is_pair:
            return False
        outer, inner = match.interior
        segments = self.planner.segments_of(self.graph, inner, outer)
        if segments is not None and segments[0] != segments[1]:
            self.record.planned[inner, outer] = segments
        return joined_by_plan(segments, inner, outer)

    def _freed(self, dying: list[Value]) -> list[Value]:
        gone = Counter(id(value.op) for value in dying)
        return list({id(v.op): v for v in dying if gone[id(v.op)] == self.uses[id(v.op)]}.values())

    def _replace(self, match: Match, new: Value, added: list[Value], origin: Origin) -> None:
        root = match.root
        nearby = {user for value in match.values.values() for user in self.graph.users(value)}
        for value in added:
            value.origin, value.name = origin, root.name
        high = self.order[root]
        low = max(
            (self.order[used] for value in added for used in value.inputs if used in self.order), default=high - 1
        )
        self.uses.update(id(value.op) for value in added)
        self.graph.replace(root, new)
        for index, value in enumerate(added, start=1):
            self.order[value] = low + (high - low) * index / len(added)
        self._forget(_gone(self.graph, match))
        nearby = {value for value in nearby if value in self.graph}
        for value in [*added, *self.graph.users(new), *sorted(nearby, key=self.order.__getitem__)]:
            if value in self.graph and value not in self.waiting:
                self.waiting.add(value)
                self.pending.append(weakref.ref(value))
        self.made.update(value for value in added if value in self.waiting)

    def _forget(self, gone: list[Value]) -> None:
        """Let go of values that the graph holds no more, and of their weights with them."""
        for value in gone:
            self.order.pop(value, None)
            self.waiting.discard(value)
            self.made.discard(value)
            for rewrite in self.rewrites:
                self.record.refusals.pop((rewrite.name, value), None)
            self.uses[id(value.op)] -= 1
            if not self.uses[id(value.op)]:
                del self.uses[id(value.op)]  # another operator may get the id
        self.planner.forget(gone)


def planner_of(rewrites: Sequence[Rewrite], policy: Policy) -> Planner:
    """The planner of chains that asks the rewrites of two operators in a row, at the costs of ``policy``."""
    pairs = [(rewrite, case) for rewrite in rewrites for case in rewrite.cases if case.is_pair]

    def merged(value: Value) -> Operator | None:
        for rewrite, case in pairs:
            if (rewrite.name, value.where) in policy.banned:
                continue
            for match in _matches(case, value):
                try:
                    new = build(rewrite, case, match)
                    _require_within(policy.limits, match.interior, [new])
                except (Refusal, GraphError):
                    continue
                if new.inputs == value.inputs[0].inputs and new.type == value.type:
                    return new.op
        return None

    objective, target = policy.objective, policy.target
    bounded = objective == "latency"
    return Planner(
        merged,
        cost=lambda value: cost([value], objective, target),
        bound=lambda value: cost([value], objective, target.in_any_runtime) if bounded else 0.0,
    )


def _matches(case: Case, value: Value) -> Iterator[Match]:
    """The matches of a case, up to where a predicate of it raises: that is reported where the rewrite is tried."""
    try:
        yield from case.match(value)
    except (GraphError, Refusal):
        return


def joined_by_plan(segments: Segments | None, first: Value, second: Value) -> bool:
    """Does a plan join the two? Without one, False: the gain decides. A `Refusal` where it joins them with others."""
    if segments is None:
        return False
    mine, its = segments
    if mine == its:
        return True
    partners = [value.where for value in (*mine, *its) if value not in (first, second)]
    require(not partners, f"planned otherwise: it pays more to merge with {', '.join(partners)}")
    return False


def build(rewrite: Rewrite, case: Case, match: Match) -> Value:
    """What ``rewrite`` makes of a match; raises its `Refusal`, and a `GraphError` where it breaks its contract."""
    operators = {name: observed(op) for name, op in match.operators.items()}
    try:
        with in_float64(), _unwritten(match.operators.values()):
            new = case.build(**match.values, **operators)
    except RgcError:
        raise
    except Exception as error:  # a rewrite is its author's code and may raise anything: reported, the model kept
        raise GraphError(_raised(error)) from error
    if not isinstance(new, Value):
        raise GraphError(f"it must return a Value, returned {type(new).__name__}")
    made = topological([new], known=set(match.values.values()).__contains__)
    reused = {id(value.op) for value in made}
    for name, op in operators.items():
        unread = [] if id(op) in reused else unread_geometry(op)
        found = ", ".join(f"{field_name}={op.__dict__[field_name]}" for field_name in unread)
        require(not unread, f"the rule does not read {found} of {name} ({op.label})")
    for value in made:
        value.op = value.op.__dict__.get("_original", value.op)
    return new


def _unwritten(operators: Iterable[Operator]) -> AbstractContextManager[Any]:
    """A context in which weights stay as they are: in float64 nothing else keeps a pass from writing to them.

    Those of a lower precision are widened where they are used, and `in_float64` raises where a copy is written to.
    """
    tensors = [each for op in operators for each in vars(op).values() if isinstance(each, Tensor)]
    precise = [each for each in tensors if each.dtype == torch.float64 and not each.is_meta]
    return ReadOnly(precise) if precise else nullcontext()


def require_gain(policy: Policy, dying: list[Value], added: list[Value], kept: Value | None) -> None:
    """Refuse to put ``added`` in the place of ``dying`` where that does not pay; ``kept`` is matched but needed."""
    objective, target = policy.objective, policy.target
    before, after = (cost(values, objective, target) for values in (dying, added))
    if after < before or (kept is None and after <= before * (1 + 1e-9)):
        if objective == "latency":
            _require_no_loss(target.in_any_runtime, dying, added)
        return
    require(kept is None, f"saves nothing: {kept.where if kept else ''} is also used elsewhere")
    if objective == "latency":
        slow, fast = _told_apart(after * 1e3, before * 1e3)
        raise Refusal(f"estimated slower on {target.name}: {slow} ms instead of {fast} ms")
    unit = {"depth": "layers", "macs": "multiply-accumulates", "params": "parameters"}[objective]
    raise Refusal(f"costs more: {after:,.6g} instead of {before:,.6g} {unit}")


def _require_decided(decisions: Decisions, question: Question, weigh: Callable[[], None]) -> None:
    """Refuse what ``weigh`` refuses, or what was refused when it was decided."""

    def reason() -> str:
        try:
            weigh()
        except Refusal as refusal:
            return refusal.reason
        return ""

    decided = decisions.answer(question, reason)
    require(decided is not None, UNDECIDED)
    require(not decided, decided or "")


def _require_no_loss(target: Target, dying: list[Value], added: list[Value]) -> None:
    """Refuse what only the kernels of one runtime make faster: the result may run in another."""
    before, after = (cost(values, "latency", target) for values in (dying, added))
    if after > before * (1 + 1e-9):
        work, least = (sum(map(macs, values)) for values in (added, dying))
        slow, fast = _told_apart(work / 1e6, least / 1e6)
        raise Refusal(
            f"estimated slower where kernels are equally good: {slow} M multiply-accumulates instead of {fast} M"
        )


def _told_apart(a: float, b: float) -> tuple[str, str]:
    """Both numbers, with as many digits as it takes to see that they differ.

    >>> _told_apart(1.5, 1.25), _told_apart(0.0083104, 0.0083101)
    (('1.5', '1.25'), ('0.0083104', '0.0083101'))
    """
    pairs = ((f"{a:.{digits}g}", f"{b:.{digits}g}") for digits in range(3, 17))
    return next((pair for pair in pairs if pair[0] != pair[1]), (repr(a), repr(b)))


def _require_within(limits: Limits, before: Sequence[Value], added: Sequence[Value]) -> None:
    """Refuse a merged layer beyond the limits, before its weight is computed; what was there already may stay so."""
    widest, largest = (max(map(size, before), default=0) for size in (_taps, _weight_bytes))
    for value in added:
        taps, weight = _taps(value), _weight_bytes(value)
        require(
            taps <= max(limits.kernel, widest),
            f"the merged kernel would have {taps} taps along an axis; at most {limits.kernel} are made (kernel limit)",
        )
        require(
            weight <= max(limits.memory, largest),
            f"the merged weight would take {human_bytes(weight)}; at most {limits.in_words} are used (memory limit)",
        )


def _taps(value: Value) -> int:
    """Taps of a kernel along its longest axis; none of one that is a matrix of the whole input."""
    if not isinstance(value.op, Conv) or value.op.kernel == value.op.size:
        return 0
    return max(value.op.kernel, default=0)


def _weight_bytes(value: Value) -> int:
    """In float64, in which weights are merged."""
    return 8 * math.prod(value.op.shape) if isinstance(value.op, Conv) else 0


def _require_same_type(rewrite: Rewrite, root: Value, new: Value) -> None:
    if new.type != root.type and (
        new.type is None or root.type is None or (new.type.shape, new.type.dtype) != (root.type.shape, root.type.dtype)
    ):
        raise NotEquivalentError(f"{root.where}: {rewrite.name} turns {root.type} into {new.type}")


def _dying(graph: Graph, match: Match) -> list[Value]:
    """The matched values that nobody needs once the root is replaced."""
    dying = [match.root]
    gone = {match.root}
    outputs = set(graph.output_values)
    for value in match.interior[1:]:
        if value not in outputs and all(user in gone for user in graph.users(value)):
            gone.add(value)
            dying.append(value)
    return dying


def _gone(graph: Graph, match: Match) -> list[Value]:
    """The matched values, and those before them, that the graph holds no more."""
    gone: dict[Value, None] = {}
    stack = [match.root]
    while stack:
        value = stack.pop()
        if value not in graph and value not in gone:
            gone[value] = None
            stack.extend(value.inputs)
    return list(gone)


def _require_no_copies(match: Match, dying: list[Value]) -> None:
    kept = [value.where for value in match.interior if value not in dying]
    require(not kept, f"{', '.join(kept)} would be computed twice: it is also used elsewhere")


def _merged_origin(match: Match) -> Origin:
    """Every path that went in; the convolution with the most weights gives the new layer its name.

    No layer stands for a whole region: there it is the last of the outermost ones.
    """

    def weight(value: Value) -> int:
        return math.prod(value.op.shape) if isinstance(value.op, Conv) else 0

    origin = Origin()
    for value in reversed(match.interior):
        origin = origin | value.origin
    if any(type(op) is Region for op in match.operators.values()):
        outermost = min(reversed(origin.paths), key=lambda path: path.count("."), default=None)
        return origin if outermost is None else Origin((outermost,)) | origin
    return max(match.interior, key=weight).origin | origin


def _condition(ranges: dict[Value, Interval]) -> str:
    return "; ".join(f"{value.where} in {interval}" for value, interval in ranges.items() if not interval.is_unbounded)


def _evidence_class(match: Match, added: list[Value], error: float) -> str:
    if any({"add", "ones", "sub"} & set(value.op.extras) for value in added if isinstance(value.op, Conv)):
        return "exact+corrected"
    reused = {id(value.op) for value in match.interior}
    fewer = all(id(value.op) in reused for value in added) and len(added) < len(match.interior)
    return "bitwise" if fewer and error == 0 else "exact"


def _run_graph_passes(
    graph: Graph, passes: Sequence[GraphPass], policy: Policy, record: Record, same: Callable[[Graph], float]
) -> Graph:
    for each in passes:
        banned = (each.name, "model") in policy.banned or (each.name, None) in record.broken
        if banned or _exhausted(policy, record):
            continue
        backup, before = copy_graph(graph), _state(graph)
        record.refusals.pop((each.name, None), None)
        try:
            changed = _changed_by(each, graph)
            if _state(changed) == before:
                continue
            added = _require_worth_of(each, policy, [value for value, _, _ in before[0]], changed.nodes())
            error = _checked(changed, same)
        except Refusal as refusal:
            record.refusals[(each.name, None)] = refusal.reason
            graph = backup
        except (GraphError, NotEquivalentError) as failure:
            record.fail(each.name, None, str(failure))
            graph = backup
        else:
            result = f"{len(backup)} -> {len(changed)} values", *(value.op.label for value in added)
            record.firings.append(Firing(each.name, "model", "exact", error, result, _touched(backup, changed, added)))
            graph = changed
    return graph


def _require_worth_of(each: GraphPass, policy: Policy, before: list[Value], after: list[Value]) -> list[Value]:
    """The operators that are new in a changed graph; a `Refusal` where the change does not pay."""
    old, new = set(before), set(after)
    dying, added = [value for value in before if value not in new], [value for value in after if value not in old]
    question = Question(each.name, "model", form_of(dying, added))
    _require_decided(policy.decisions, question, lambda: require_gain(policy, dying, added, None))
    known = {id(value.op) for value in dying}
    return [value for value in added if id(value.op) not in known]


def _touched(before: Graph, after: Graph, added: list[Value]) -> tuple[str, ...]:
    """The paths that are gone, and those of the operators that are new."""
    remaining = _paths(after)
    lost = (path for path in _paths(before) if path not in remaining)
    return tuple(dict.fromkeys([*lost, *(path for value in added for path in value.origin.paths)]))


def _paths(graph: Graph) -> dict[str, None]:
    return dict.fromkeys(path for value in graph.nodes() for path in value.origin.paths)


def _changed_by(each: GraphPass, graph: Graph) -> Graph:
    try:
        with in_float64(), _unwritten(value.op for value in graph.nodes()):
            changed = each.run(graph)
    except RgcError:
        raise
    except Exception as error:  # as in build
        raise GraphError(_raised(error)) from error
    if not isinstance(changed, Graph):
        raise GraphError(f"it must return a Graph, returned {type(changed).__name__}")
    return changed


def _checked(graph: Graph, same: Callable[[Graph], float]) -> float:
    try:
        return same(graph)
    except RgcError:
        raise
    except Exception as error:  # what a graph pass left behind may fail in any way when it runs
        raise GraphError(f"its graph does not run: {type(error).__name__}: {error}") from error


def _raised(error: Exception) -> str:
    """What somebody's pass raised, and in which line of it."""
    frame = traceback.extract_tb(error.__traceback__)[1]
    return f"it raised {type(error).__name__}: {error} ({frame.filename.rsplit('/', 1)[-1]}:{frame.lineno})"


def _state(graph: Graph) -> tuple[list[tuple[Value, Operator, tuple[Value, ...]]], list[Value], list[Value]]:
    return [(value, value.op, value.inputs) for value in graph.nodes()], graph.output_values, list(graph.effects)


def _exhausted(policy: Policy, record: Record) -> bool:
    if time.perf_counter() > policy.deadline:
        record.cut_short = True
        return True
    return policy.limit is not None and len(record.firings) >= policy.limit


__all__ = [
    "Policy", "Proof", "Record", "Segments", "apply", "build", "copy_graph", "joined_by_plan", "planner_of",
    "require_gain",
]  # fmt: skip
