"""Does rgc stay equal on random models? ``python -m benchmarks.fuzz [--examples 10000] [--seed 0] [--first 0]``.

Draws models (`rgc.testing.graphs`), compiles each with one of the pass sets and objectives, and compares the result
with eager PyTorch in float64 on several batches and sizes. It prints how many were equal, refused or at fault, in how
many each operator occurred, and how often each rewrite fired. A fault is made as small as it gets, and printed as a
Python program that shows it; then the exit status is 1. Where PyTorch itself crashes, stderr says in which model.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import time

import torch
from rich.console import Console
from rich.progress import Progress

from rgc.fuzzing import Tally
from rgc.testing import fuzz


def main() -> None:
    """Print the tally, and the faults; progress goes to stderr."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=10_000, help="how many models are drawn")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same models")
    parser.add_argument("--first", type=int, default=0, help="the number of the first of them: what a run goes on with")
    parser.add_argument("--steps", type=int, default=10, help="draws of layers and calls per model, at most")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are tiny
    started = time.perf_counter()
    faulthandler.enable()
    told = 0
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("models", total=options.examples)

        def show(tally: Tally) -> None:
            nonlocal told
            bar.update(task, completed=tally.examples, description=f"{len(tally.faults)} faults")
            model = options.first + tally.examples - 1
            for fault in tally.faults[told:]:
                bar.console.print(f"model {model}: {fault.kind}: {fault.reason}", markup=False)
            if not bar.console.is_terminal and tally.examples % 100 == 0:
                bar.console.print(f"up to model {model}: {len(tally.faults)} faults")
            told = len(tally.faults)

        tally = fuzz(options.examples, seed=options.seed, first=options.first, most_steps=options.steps, progress=show)
    for fault in tally.faults:
        print(fault.script, end="\n\n")
    print(tally)
    seconds = time.perf_counter() - started
    print(f"seed {options.seed}, from model {options.first}, torch {torch.__version__}, {seconds:.0f} s")
    sys.exit(1 if tally.faults else 0)


if __name__ == "__main__":
    main()
