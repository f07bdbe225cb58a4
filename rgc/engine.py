"""How are rewrites applied? A worklist over the graph: match, build, gate by cost, prove, replace, look again nearby.

The engine, not the author of a rewrite, looks after other users of inner values, commutativity, provenance, geometry
fields that a rule did not read, the cost, and the float64 check of every firing. A firing that fails its check is
undone before anything saw it, and reported.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rgc.algebra import Conv
from rgc.cost import CPU, Objective, Target, cost
from rgc.errors import GraphError, NotEquivalentError, Refusal, RgcError, require
from rgc.ir import Graph, Operator, Origin, Value, topological
from rgc.proof import check_firing
from rgc.region import affine_regions, join_at
from rgc.report import Failure, Firing, Refused
from rgc.rewrite import Case, GraphPass, Match, Pass, Rewrite, observed, unread_geometry

#: A rewrite that fires more often than this per node of the graph undoes itself for ever.
MOST_FIRINGS_PER_NODE = 20


@dataclass(frozen=True)
class Policy:
    """What the engine may do: the objective and machine that decide what pays, what is banned, and how far to go."""

    objective: Objective = "latency"
    target: Target = CPU
    banned: frozenset[tuple[str, str]] = frozenset()
    limit: int | None = None  # stop after so many firings


@dataclass
class Record:
    """What the engine did, would not do, and found wrong."""

    firings: list[Firing] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    refusals: dict[tuple[str, Value], str] = field(default_factory=dict)

    def refused(self, graph: Graph) -> list[Refused]:
        """The refusals that still stand: those at values that the graph still holds."""
        standing = ((name, value, reason) for (name, value), reason in self.refusals.items() if value in graph)
        return [Refused(name, value.where, reason) for name, value, reason in standing]


def apply(
    graph: Graph, passes: Sequence[Pass], policy: Policy, same: Callable[[Graph], float] = lambda _: 0.0
) -> tuple[Graph, Record]:
    """Run ``passes`` to their fixed point; ``same`` measures how far a graph is from the original (for graph passes)."""
    record = Record()
    allowance = MOST_FIRINGS_PER_NODE * (len(graph) + 10)
    while True:
        before = len(record.firings)
        graph = _run_graph_passes(graph, [p for p in passes if isinstance(p, GraphPass)], policy, record, same)
        worker = _Worklist(graph, [p for p in passes if isinstance(p, Rewrite)], policy, record, allowance)
        worker.run()
        if len(record.firings) == before or _exhausted(policy, record):
            return graph, record


def copy_graph(graph: Graph) -> Graph:
    """A graph of new values over the same operators."""
    twins: dict[Value, Value] = {}
    for value in graph.nodes():
        inputs = [twins[used] for used in value.inputs]
        twins[value] = Value(value.op, inputs, value.type, value.origin, value.name)
    from torch.utils._pytree import tree_map

    outputs = tree_map(lambda leaf: twins[leaf] if isinstance(leaf, Value) else leaf, graph.outputs, is_leaf=_is_value)
    return Graph([twins[value] for value in graph.inputs], outputs, [twins[value] for value in graph.effects])


class _Worklist:
    def __init__(
        self, graph: Graph, rewrites: Sequence[Rewrite], policy: Policy, record: Record, allowance: int
    ) -> None:
        self.graph, self.policy, self.record, self.allowance = graph, policy, record, allowance
        cases = [(rewrite, case) for rewrite in rewrites for case in rewrite.cases]
        self.local = [pair for pair in cases if not pair[1].matches_regions]
        self.regional = [pair for pair in cases if pair[1].matches_regions]
        nodes = graph.nodes()
        self.order: dict[Value, float] = {value: float(index) for index, value in enumerate(nodes)}
        self.pending = deque(nodes)
        self.waiting = set(nodes)

    def run(self) -> None:
        while not _exhausted(self.policy, self.record):
            if self.pending:
                value = self.pending.popleft()
                self.waiting.discard(value)
                if value in self.graph:
                    self._visit(value)
            elif not self._visit_regions():
                return

    def _visit(self, value: Value) -> None:
        for rewrite, case in self.local:
            if self._try_all(rewrite, value, case.match(value), case):
                return
        join = join_at(value, self.order) if self.regional else None
        if join is None:
            return
        for rewrite, case in self.regional:
            match = case.match_region(join)
            if match is not None and self._try_all(rewrite, value, iter([match]), case):
                return

    def _visit_regions(self) -> bool:
        """Whole maximal regions come last, when nothing local fires any more; True if one fired."""
        for region in affine_regions(self.graph) if self.regional else []:
            for rewrite, case in self.regional:
                match = case.match_region(region)
                if match is not None and self._try_all(rewrite, region.sink, iter([match]), case):
                    return True
        return False

    def _try_all(self, rewrite: Rewrite, root: Value, matches: Iterator[Match], case: Case) -> bool:
        if (rewrite.name, root.where) in self.policy.banned:
            return False
        for match in matches:
            try:
                self._fire(rewrite, case, match)
            except Refusal as refusal:
                self.record.refusals.setdefault((rewrite.name, root), refusal.reason)
            except NotEquivalentError as error:
                self.record.failures.append(Failure(rewrite.name, root.where, str(error)))
                self.record.refusals[(rewrite.name, root)] = f"undone, its result was not equal: {error}"
                return False
            else:
                self.record.refusals.pop((rewrite.name, root), None)
                return True
        return False

    def _fire(self, rewrite: Rewrite, case: Case, match: Match) -> None:
        root = match.root
        new = _build(rewrite, case, match)
        _require_same_type(rewrite, root, new)
        added = topological([new], known=self.graph.__contains__)
        for value in added:
            value.op = value.op.__dict__.get("_original", value.op)
        dying = _dying(self.graph, match)
        self._require_gain(dying, added, match)
        error = check_firing(root, new, list(match.values.values()))
        self._replace(match, new, added)
        kind = _evidence_class(match, added)
        self.record.firings.append(Firing(rewrite.name, root.where, kind, error, tuple(v.op.label for v in added)))
        if len(self.record.firings) > self.allowance:
            raise GraphError(f"rewrite {rewrite.name} keeps firing at {root.where}: does its result match its pattern?")

    def _require_gain(self, dying: list[Value], added: list[Value], match: Match) -> None:
        objective, target = self.policy.objective, self.policy.target
        before, after = (cost(values, objective, target) for values in (dying, added))
        if after <= before * (1 + 1e-9):
            return
        kept = [value for value in match.interior if value not in dying]
        require(not kept, f"saves nothing: {kept[0].where if kept else ''} is also used elsewhere")
        if objective == "latency":
            raise Refusal(f"estimated slower on {target.name}: {after * 1e3:.3g} ms instead of {before * 1e3:.3g} ms")
        unit = {"depth": "layers", "macs": "multiply-accumulates", "params": "parameters"}[objective]
        raise Refusal(f"costs more: {after:,.6g} instead of {before:,.6g} {unit}")

    def _replace(self, match: Match, new: Value, added: list[Value]) -> None:
        root = match.root
        nearby = {user for value in match.values.values() for user in self.graph.users(value)}
        origin = _merged_origin(match)
        for value in added:
            value.origin, value.name = origin, root.name
        high = self.order[root]
        low = max((self.order[used] for value in added for used in value.inputs if used in self.order), default=high - 1)
        self.graph.replace(root, new)
        for index, value in enumerate(added, start=1):
            self.order[value] = low + (high - low) * index / len(added)
        for value in [*added, *self.graph.users(new), *sorted(nearby, key=self.order.__getitem__)]:
            if value in self.graph and value not in self.waiting:
                self.waiting.add(value)
                self.pending.append(value)


def _build(rewrite: Rewrite, case: Case, match: Match) -> Value:
    operators = {name: observed(op) for name, op in match.operators.items()}
    try:
        new = case.build(**match.values, **operators)
    except RgcError:
        raise
    except Exception as error:
        error.add_note(f"raised inside rewrite {rewrite.name} at {match.root.where}; the model is unchanged")
        raise
    if not isinstance(new, Value):
        raise GraphError(f"rewrite {rewrite.name} must return a Value, returned {type(new).__name__}")
    reused = {id(value.op) for value in topological([new], known=set(match.values.values()).__contains__)}
    for name, op in operators.items():
        unread = [] if id(op) in reused else unread_geometry(op)
        found = ", ".join(f"{field_name}={op.__dict__[field_name]}" for field_name in unread)
        require(not unread, f"the rule does not read {found} of {name} ({op.label})")
    return new


def _require_same_type(rewrite: Rewrite, root: Value, new: Value) -> None:
    if new.type != root.type and (
        new.type is None or root.type is None or (new.type.shape, new.type.dtype) != (root.type.shape, root.type.dtype)
    ):
        raise NotEquivalentError(f"{root.where}: rewrite {rewrite.name} turns {root.type} into {new.type}")


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


def _merged_origin(match: Match) -> Origin:
    """Every path that went in; the convolution with the most weights gives the new layer its name."""

    def weight(value: Value) -> int:
        return math.prod(value.op.shape) if isinstance(value.op, Conv) else 0

    leading = max(match.interior, key=weight)
    origin = leading.origin
    for value in reversed(match.interior):
        origin = origin | value.origin
    return origin


def _evidence_class(match: Match, added: list[Value]) -> str:
    convs = [value.op for value in added if isinstance(value.op, Conv)]
    if any(op.bias is not None and op.bias.dim() > 1 for op in convs):
        return "exact+corrected"
    reused: set[Operator] = {value.op for value in match.interior}
    return "bitwise" if all(value.op in reused for value in added) and len(added) < len(match.interior) else "exact"


def _run_graph_passes(
    graph: Graph, passes: Sequence[GraphPass], policy: Policy, record: Record, same: Callable[[Graph], float]
) -> Graph:
    for each in passes:
        if (each.name, "model") in policy.banned or _exhausted(policy, record):
            continue
        backup, before = copy_graph(graph), _state(graph)
        changed = each.run(graph)
        if not isinstance(changed, Graph):
            raise GraphError(f"graph pass {each.name} must return a Graph, returned {type(changed).__name__}")
        if _state(changed) == before:
            continue
        try:
            error = same(changed)
        except NotEquivalentError as failure:
            record.failures.append(Failure(each.name, "model", str(failure)))
            graph = backup
            continue
        summary = f"{len(before)} -> {len(changed)} values"
        record.firings.append(Firing(each.name, "model", "exact", error, (summary,)))
        graph = changed
    return graph


def _state(graph: Graph) -> list[tuple[Value, Operator, tuple[Value, ...]]]:
    return [(value, value.op, value.inputs) for value in graph.nodes()]


def _exhausted(policy: Policy, record: Record) -> bool:
    return policy.limit is not None and len(record.firings) >= policy.limit


def _is_value(leaf: Any) -> bool:
    return isinstance(leaf, Value)


__all__ = ["Policy", "Record", "apply", "copy_graph"]
