"""Does any file crash the loaders, or any call the lift table? A coverage-guided search for as long as you say.

    pip install -e ".[fuzz]"
    python -m tests.fuzz_loader --seconds 3600                    # files
    python -m tests.fuzz_loader --seconds 3600 --target lift      # calls
    python -m tests.fuzz_loader --reproduce crash-0123abcd        # one input again

A finding ends the search: its traceback is printed, and the input is kept as ``crash-...`` in the working directory.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_loader", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--target", choices=("loader", "lift"), default="loader", help="what is fuzzed")
    parser.add_argument("--seconds", type=int, default=60, help="for how long (default: 60)")
    parser.add_argument("--seed", type=int, default=1, help="of the search (default: 1)")
    parser.add_argument("--corpus", type=Path, help="a folder in which inputs of new coverage are kept and found again")
    parser.add_argument("--reproduce", type=Path, metavar="FILE", help="run this input once, without a fuzzer")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    if options.reproduce is not None:
        from tests.fuzz_targets import reproduce

        print(reproduce(options.reproduce.read_bytes(), options.target))
        return
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="rgc-fuzz-"))
        _search(options, Path(temporary))


def _search(options: argparse.Namespace, folder: Path) -> None:
    import atheris

    with atheris.instrument_imports(include=["rgc", "zipfile", "pickletools"]):
        from tests.fuzz_targets import TARGETS
    target, seeds = TARGETS[options.target]
    corpus = options.corpus or folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(seeds()):
        (corpus / f"seed-{index}").write_bytes(seed)
    seen: Counter[str] = Counter()
    started = time.monotonic()

    def test_one_input(data: bytes) -> None:
        seen[target(data, folder)] += 1
        if seen.total() % 1000 == 0:
            print(f"{options.target}: {_summary(seen, time.monotonic() - started)}", flush=True)

    atheris.Setup(
        [sys.argv[0], f"-max_total_time={options.seconds}", f"-seed={options.seed}", "-timeout=60",
         "-rss_limit_mb=4096", "-max_len=65536", "-verbosity=0", str(corpus)],
        test_one_input,
    )  # fmt: skip
    atheris.Fuzz()  # does not come back: it ends the process, with another status than 0 after a finding


def _summary(seen: Counter[str], seconds: float) -> str:
    outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in seen.most_common())
    return f"{seen.total():,} inputs in {seconds:,.0f} s: {outcomes}"


if __name__ == "__main__":
    main(sys.argv[1:])
