"""With ``objective="depth"``, why are the layers that are left not fewer? ``python -m benchmarks.depth``.

For each model of `benchmarks.latency`: the linear operators (convolutions, linear layers, norms, scales, poolings) of
the model, of what latency makes of it, and of what depth makes of it. Then every pair of linear operators that is still
in a row at depth, with nothing between them but what is affine too, and the reasons of the rewrites that refused it.
A pair without a reason would be one that nobody looked at.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.latency import MODELS, Entry
from rgc.compiler import Trace, trace
from rgc.ir import Graph, Value
from rgc.neighbours import after, is_linear
from rgc.rearrange import Rearrangement
from rgc.testing import randomize

COLUMNS = ("model", "passes", "linear operators", "latency", "depth", "pairs left", "without a reason", "reasons")


@dataclass(frozen=True)
class Pair:
    """Two linear operators in a row, and why they are not one."""

    first: Value
    second: Value
    reasons: tuple[str, ...]


def main() -> None:
    """Print the table as Markdown, each row when it is made."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="", help="only these, separated by semicolons")
    parser.add_argument("--pairs", action="store_true", help="also print each pair with its reasons")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    chosen = {name.strip(): MODELS[name.strip()] for name in options.models.split(";")} if options.models else MODELS
    print(f"torch {torch.__version__}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    shown: list[str] = []
    for name, entry in chosen.items():
        latency, depth = (traced(entry, objective) for objective in ("latency", "depth"))
        left = list(pairs_left(depth))
        kinds = Counter(kind for pair in left for kind in {kind_of(reason) for reason in pair.reasons})
        counts = (str(linear_operators(values)) for values in (latency.original, latency.graph, depth.graph))
        missing = sum(not pair.reasons for pair in left)
        told = "; ".join(f"{kind} ({count})" for kind, count in kinds.most_common())
        print(f"| {' | '.join((name, entry.passes, *counts, str(len(left)), str(missing), told))} |", flush=True)
        shown += [f"{name}: {p.first.where} | {p.second.where}: {'; '.join(p.reasons) or 'no reason'}" for p in left]
    if options.pairs:
        print("\n" + "\n".join(shown))


def traced(entry: Entry, objective: Literal["latency", "depth"]) -> Trace:
    """The graph of the model after its passes."""
    torch.manual_seed(0)
    model = randomize(entry.build())
    return trace(model, torch.randn(1, *entry.sample), passes=entry.passes.split(","), objective=objective)


def is_layer(value: Value) -> bool:
    """Is it a linear operator that does something, and no view, which costs nothing?"""
    return is_linear(value) and not (isinstance(value.op, Rearrangement) and value.op.is_view)


def linear_operators(graph: Graph) -> int:
    """How many of them a graph holds."""
    return sum(map(is_layer, graph.nodes()))


def pairs_left(found: Trace) -> Iterator[Pair]:
    """Every pair of linear operators in a row that the graph still holds."""
    for first in filter(is_layer, found.graph.nodes()):
        for between, second in after(found.graph, first):
            if is_layer(second) and all(value.op.affine for value in between):
                at = {second, *between}
                refused = {reason: None for (_, value), reason in found.record.refusals.items() if value in at}
                yield Pair(first, second, tuple(refused))


def kind_of(reason: str) -> str:
    """The reason without what it says of the one place: up to its first colon, and without numbers and names."""
    plain = re.split(r": |; ", reason)[0]
    return re.sub(
        r"\b(transposed )?(conv \S+|linear) \d+->\d+( /\d+)?( groups=\d+)?( \+ \w+( map)?)*", "a layer", plain
    )


if __name__ == "__main__":
    main()
