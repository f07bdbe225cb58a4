"""Does the proof refuse every faulty compiler? ``python -m benchmarks.mutation [--count N] [--jobs N]``.

Small faults (`rgc.mutants`) are planted, one at a time, in the algebra and in all passes, and models are compiled in
which the mutated line runs: the examples of the passes, and random chains and branches of convolutions. Every result
that is handed out is compared with the model itself, which was run before the fault was planted, at more sizes than the
proof draws. So a mutant is

- *refused*: a firing failed its check, a trace was not believed, or nothing was emitted;
- *survivor*: a wrong result was handed out. The proof has a hole, and the exit status is 1;
- *harmless*: every result is right. The argument why is printed for each of them, with the number of models that ran
  the line: other merges are made than before, each of them proved; or fewer; or only the words of a refusal differ; or
  the changed expression has, in every evaluation, the very value that it had before; or it has not, but all that comes
  of it has the same bits.

The mutated code may be what the proof itself evaluates operators with, but the proof (`rgc.proof`, `rgc.verify`) is not
mutated. Mutants, models and weights are the same in every run.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import rgc
from rgc.errors import RgcError
from rgc.example import is_same_tensor
from rgc.mutants import Mutant, mutants_of, observed, planted
from rgc.passes import ALL, OPT_IN
from rgc.proof import relative_difference
from rgc.report import Report
from rgc.testing import randomize

ROOT = Path(rgc.__file__).resolve().parent
PASSES = Path(rgc.passes.__file__).resolve().parent

#: What is mutated: the algebra in the wide sense, and every pass.
FILES = tuple(
    str(path) for path in (
        *(ROOT / f"{name}.py" for name in ("algebra", "axis", "kernels", "region", "sparsity", "rearrange", "views")),
        *(path for path in sorted(PASSES.glob("*.py")) if path.name != "__init__.py"),
    )
)  # fmt: skip

#: So many models try each mutant before one that changes nothing is called harmless.
MOST_MODELS = 12

#: Seconds of processor time for one compilation under a mutant; the slowest model takes less than one without.
PATIENCE = 20

#: How far a result may be from its model in float64, relative to the scale of the output.
TOLERANCE = 1e-8


def main() -> None:
    """Print the figures and every mutant that was not refused; exit status 1 if one survives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=400, help="how many mutants, drawn from all")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes")
    parser.add_argument("--models", type=int, default=MOST_MODELS, help="how many models try each mutant")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write all verdicts here as well")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        _work()
        return
    say = partial(print, file=sys.stderr, flush=True)
    subjects = corpus()
    lines = covered(subjects, say)
    pool = [mutant for mutant in all_mutants() if reached_by(mutant, lines)]
    chosen = sample(pool, options.count, options.seed)
    say(f"{len(chosen)} of {len(pool)} mutants whose line runs ({len(all_mutants())} in all); {len(subjects)} models")
    verdicts = judged(chosen, lines, options.jobs, options.models, say)
    if options.output is not None:
        options.output.write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=1) + "\n")
    print_verdicts(verdicts, len(pool), len(subjects))
    sys.exit(any(verdict.status == "survivor" for verdict in verdicts))


# --- models ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A model, how it is compiled, and what it computes, in float64."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    passes: Any
    objective: str = "depth"


@cache
def corpus() -> tuple[Subject, ...]:
    """The examples of every pass, by that pass alone and by all; then random models."""
    subjects = []
    for each in (*ALL, *OPT_IN):
        for example in each.examples:
            if example.name.startswith("head that widens") or 28 in example.shape:
                continue  # large, to show a cost
            passes: list[Any] = [each, *(["all"] if example.fixed_size else [])]
            subjects.append(Subject(f"{each.name}: {example.name}", example.build, example.shape, passes))
    subjects += [
        Subject(f"random {seed}", partial(random_model, seed), (2, 4, 9, 8), "all" if seed % 3 == 0 else "default")
        for seed in range(72)
    ]
    return tuple(subjects)


def random_model(seed: int) -> nn.Module:
    """A chain, or branches of one input, of convolutions and what may stand between them, by ``seed``."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    if seed % 2:
        return nn.Sequential(*_chain(draw, draw.choice((2, 2, 3))), nn.ReLU()).eval()
    combine = draw.choice(["sum", "difference", "concatenation", "residual"])
    return _Meeting(combine, *(nn.Sequential(*_branch(draw)) for _ in range(draw.choice((2, 3))))).eval()


class _Meeting(nn.Module):
    def __init__(self, combine: str, *branches: nn.Module) -> None:
        super().__init__()
        self.combine, self.branches = combine, nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        parts = [branch(x) for branch in self.branches]
        if self.combine == "concatenation":
            return torch.relu(torch.cat(parts, 1))
        total = parts[0]
        for part in parts[1:]:
            total = total - part if self.combine == "difference" else total + part
        return torch.relu(total + x if self.combine == "residual" else total)


def _chain(draw: random.Random, length: int) -> Iterator[nn.Module]:
    for _ in range(length):
        kind = draw.random()
        if kind < 0.1:
            yield nn.BatchNorm2d(4)
        elif kind < 0.2:
            yield nn.AvgPool2d(draw.choice((2, 3)), draw.choice((1, 2)), draw.choice((0, 1)))
        elif kind < 0.3:
            kernel, stride = draw.choice((1, 2, 3)), draw.choice((1, 2))
            yield nn.ConvTranspose2d(4, 4, kernel, stride, groups=draw.choice((1, 2)), bias=draw.random() < 0.7)
        else:
            yield _convolution(draw)


def _convolution(draw: random.Random) -> nn.Module:
    kernel = (draw.choice((1, 1, 2, 3)), draw.choice((1, 1, 2, 3)))
    mode = draw.choice(["zeros"] * 5 + ["reflect", "replicate", "circular"])
    padding = (draw.choice((0, 0, 1, 2)), draw.choice((0, 0, 1)))
    return nn.Conv2d(
        4, 4, kernel, (draw.choice((1, 1, 2)), draw.choice((1, 1, 2))), padding, draw.choice((1, 1, 2)),
        draw.choice((1, 1, 2, 4)), draw.random() < 0.6, mode,
    )  # fmt: skip


def _branch(draw: random.Random) -> Iterator[nn.Module]:
    """Branches that keep the size, so that they meet."""
    for _ in range(draw.choice((1, 1, 2))):
        kind = draw.random()
        reach = draw.choice((1, 3, 5))
        if kind < 0.2:
            yield nn.BatchNorm2d(4)
        elif kind < 0.3:
            yield nn.AvgPool2d(3, 1, 1)
        else:
            kernel = (reach, draw.choice((1, 3)))
            dilation = draw.choice((1, 1, 2))
            padding = tuple(dilation * (k - 1) // 2 for k in kernel)
            groups = draw.choice((1, 2, 4))
            yield nn.Conv2d(4, 4, kernel, 1, padding, dilation, groups, draw.random() < 0.6)


@dataclass(frozen=True)
class _Prepared:
    """A subject with weights, inputs of many sizes and the model's outputs for them (None: it does not run there)."""

    model: nn.Module
    example: Tensor
    calls: list[tuple[Tensor, Any]]
    baseline: rgc.CompiledModule


@cache
def _prepared(index: int) -> _Prepared:
    subject = corpus()[index]
    torch.manual_seed(0)
    model = randomize(subject.build(), 0).double()
    example = torch.randn(subject.shape, dtype=torch.float64)
    calls = [(x, _output(model, x)) for x in _inputs(subject.shape)]
    return _Prepared(model, example, calls, _compiled(subject, model, example))


def compiled_again(index: int) -> rgc.CompiledModule:
    """What compiling the model at that place of the corpus makes."""
    prepared = _prepared(index)
    return _compiled(corpus()[index], prepared.model, prepared.example)


def _inputs(shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The example's shape in other batches, then other sizes, at two magnitudes."""
    generator = torch.Generator().manual_seed(1)
    shapes = [shape, (1, *shape[1:]), (3, *shape[1:])]
    if len(shape) > 2:
        spatial = len(shape) - 2
        shapes += [(2, shape[1], *(n + (3 * axis) % 4 for axis in range(spatial))) for n in (*range(1, 13), 16, 17)]
    for each in shapes:
        for magnitude in (1.0, 20.0) if each == shape else (1.0,):
            yield magnitude * torch.randn(each, generator=generator, dtype=torch.float64)


def _output(model: Callable[..., Any], x: Tensor) -> Any:
    try:
        with torch.no_grad():
            return model(x.clone())
    except (RuntimeError, ValueError, TypeError, IndexError, RgcError):
        return None


def _compiled(subject: Subject, model: nn.Module, example: Tensor) -> rgc.CompiledModule:
    return rgc.compile(model, example, passes=subject.passes, objective=subject.objective)  # type: ignore[arg-type]


# --- which models run which lines ----------------------------------------------------------------------------------

Lines = dict[tuple[str, int], list[int]]


def covered(subjects: Sequence[Subject], say: Callable[[str], None]) -> Lines:
    """For each line of `FILES` the models, by their place in the corpus, whose compilation runs it.

    A line that a model itself runs is of an example, and no rule: a fault there makes another model.
    """
    wanted = {os.path.realpath(path): path for path in FILES}
    lines: dict[tuple[str, int], set[int]] = defaultdict(set)
    own: set[tuple[str, int]] = set()
    for index in range(len(subjects)):
        prepared = _prepared(index)  # what runs only the first time, such as imports, runs before
        with _traced(wanted, lambda path, line: own.add((path, line))):
            _output(prepared.model, prepared.example)
        with _traced(wanted, lambda path, line, index=index: lines[path, line].add(index)):
            _compiled(subjects[index], _prepared(index).model, _prepared(index).example)
        if index % 50 == 49:
            say(f"traced {index + 1} models")
    return {place: sorted(found) for place, found in lines.items() if place not in own}


@contextmanager
def _traced(wanted: dict[str, str], note: Callable[[str, int], None]) -> Iterator[None]:
    known: dict[str, str | None] = {}

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        path = known[frame.f_code.co_filename]
        if event == "line" and path is not None:
            note(path, frame.f_lineno)
        return local

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if name not in known:
            known[name] = wanted.get(os.path.realpath(name))
        return local if known[name] is not None else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


def models_of(mutant: Mutant, lines: Lines) -> list[int]:
    """The models whose compilation runs the mutated line, or the first line of what spans several."""
    return lines.get((mutant.path, mutant.line), [])


def reached_by(mutant: Mutant, lines: Lines) -> bool:
    """Does any model run it?"""
    return bool(models_of(mutant, lines))


# --- mutants -----------------------------------------------------------------------------------------------------


@cache
def all_mutants() -> tuple[Mutant, ...]:
    """Every mutant of the rules and the algebra; the models that the passes bring as examples are no rules."""
    return tuple(mutant for path in FILES for mutant in mutants_of(path, _is_rule))


def _is_rule(definition: ast.AST) -> bool:
    if isinstance(definition, ast.ClassDef):
        return not any(ast.unparse(base).startswith("nn.") for base in definition.bases)
    assert isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef)
    returns = "" if definition.returns is None else ast.unparse(definition.returns)
    return returns != "nn.Module" and definition.name not in ("label", "__post_init__", "_check")


def sample(pool: Sequence[Mutant], count: int, seed: int) -> list[Mutant]:
    """``count`` mutants, as evenly as may be over files, and within each over the kinds of fault."""
    draw = random.Random(seed)
    by_file: dict[str, list[Mutant]] = {}
    for path in FILES:
        kinds: dict[str, list[Mutant]] = defaultdict(list)
        for mutant in pool:
            if mutant.path == path:
                kinds[mutant.kind].append(mutant)
        for members in kinds.values():
            draw.shuffle(members)
        by_file[path] = list(_in_turn(list(kinds.values())))
    return sorted(list(_in_turn(list(by_file.values())))[:count], key=lambda each: (each.path, each.line, each.change))


def _in_turn(lists: list[list[Mutant]]) -> Iterator[Mutant]:
    for place in range(max(map(len, lists), default=0)):
        yield from (each[place] for each in lists if place < len(each))


# --- verdicts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: "refused", "survivor" or "harmless", by what or why, after how many models."""

    mutant: str
    file: str
    kind: str
    status: str
    how: str
    models: int
    model: str = ""


def judged(
    mutants: Sequence[Mutant], lines: Lines, jobs: int, most: int, say: Callable[[str], None] = lambda _: None
) -> list[Verdict]:
    """The verdict on each mutant, in this process or in several."""
    calls = [(mutant, models_of(mutant, lines)) for mutant in mutants]
    if jobs <= 1:
        verdicts = []
        for number, (mutant, models) in enumerate(calls, start=1):
            verdicts.append(verdict_on(mutant, models, most))
            if verdicts[-1].status == "survivor" or number % 20 == 0:
                say(f"{number}: {verdicts[-1].status} {verdicts[-1].mutant} {verdicts[-1].how}")
        return verdicts
    found: list[list[Verdict]] = [[] for _ in range(jobs)]
    threads = [
        threading.Thread(target=lambda shard=shard: found[shard].extend(_elsewhere(calls[shard::jobs], most)))
        for shard in range(jobs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[number % jobs][number // jobs] for number in range(len(calls))]


def _elsewhere(calls: Sequence[tuple[Mutant, list[int]]], most: int) -> list[Verdict]:
    """The same in another process."""
    given = json.dumps([[asdict(mutant), models, most] for mutant, models in calls])
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.mutation", "--work"]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    return [Verdict(**each) for each in json.loads(done.stdout)]


def _work() -> None:
    calls = [(Mutant(**mutant), models, most) for mutant, models, most in json.load(sys.stdin)]
    print(json.dumps([asdict(verdict_on(*call)) for call in calls]))


def verdict_on(mutant: Mutant, models: Sequence[int], most: int = MOST_MODELS) -> Verdict:
    """Compile the models under the mutant until one is refused or wrong."""
    tried = _spread(models, most, mutant.line)
    effects: Counter[str] = Counter()
    for index in tried:
        prepared = _prepared(index)
        effect = _effect(mutant, corpus()[index], prepared)
        effects[effect] += 1
        status = effect.partition(":")[0]
        if status in ("refused", "survivor"):
            return _verdict(mutant, status, effect.partition(": ")[2], effects.total(), corpus()[index].name)
    how = next(each for each in _ARGUMENTS if effects[each])
    if how == _SAME_BITS:
        how = _observation(mutant, tried)
    return _verdict(mutant, "harmless", how, effects.total())


#: Why a mutant is harmless, by what it leads to on any model; the first that applies.
_OTHER, _FEWER = "other merges are made, each of them proved", "refuses more: fewer merges, each of them proved"
_WORDS, _SAME_BITS = "only the words of refusals differ", "all that is made has the same bits"
_ROUNDING = "the same merges, with weights that differ by rounding"
_ARGUMENTS = (_OTHER, _FEWER, _ROUNDING, _WORDS, _SAME_BITS)


def _observation(mutant: Mutant, models: Sequence[int]) -> str:
    """Why all that is made has the same bits: whether the mutated expression ever has another value."""
    evaluations = differences = 0
    for index in models:
        _prepared(index)
        with observed(mutant) as found:
            compiled_again(index)
        evaluations, differences = evaluations + found.evaluations, differences + found.differences
    if not differences:
        return f"the same value in each of {evaluations:,} evaluations"
    return f"another value in {differences:,} of {evaluations:,} evaluations, but {_SAME_BITS}"


def _verdict(mutant: Mutant, status: str, how: str, models: int, model: str = "") -> Verdict:
    return Verdict(mutant.name, Path(mutant.path).stem, mutant.kind, status, how, models, model)


def _spread(models: Sequence[int], most: int, seed: int) -> list[int]:
    """At most so many of the models, in an order of their own for each line."""
    shuffled = list(models)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:most]


def _effect(mutant: Mutant, subject: Subject, prepared: _Prepared) -> str:
    """What compiling one model under the mutant comes to."""
    try:
        with planted(mutant), _patience():
            compiled = _compiled(subject, prepared.model, prepared.example)
    except _TooLongError:
        return f"refused: no result within {PATIENCE} s"
    except RgcError as error:
        return f"refused: {type(error).__name__}"
    # a fault in the compiler raises anything, and then nothing is handed out
    except Exception as error:
        return f"refused: raises {type(error).__name__}"
    report = compiled.report
    wrong = _wrong(compiled, report, prepared)
    if wrong is not None:
        return f"survivor: {wrong}"
    if report.failures:
        return "refused: the firing is not equal"
    if any("the compiled model differs" in note or "the compiled model fails" in note for note in report.notes):
        return "refused: the model is not equal"
    if [note for note in report.notes if "traces another function" in note or "cannot trace" in note]:
        return "refused: the trace is not believed"
    return _change(compiled, prepared)


def _wrong(compiled: nn.Module, report: Report, prepared: _Prepared) -> str | None:
    """Where the result differs from what the model gave before the fault was planted, as far as it promises to hold."""
    size = prepared.example.shape[2:]
    for x, expected in prepared.calls:
        if expected is None or (report.fixed_size and x.shape[2:] != size):
            continue
        if not all(leaf.numel() for leaf in _leaves(expected)):
            continue  # a crop has left nothing, which a layer without padding refuses
        found = _output(compiled, x)
        shape = "x".join(map(str, x.shape))
        if found is None:
            return f"does not run on {shape}"
        pairs = zip(_leaves(expected), _leaves(found), strict=True)
        distance = max(relative_difference(before, after) for before, after in pairs)
        if not distance <= TOLERANCE:
            return f"differs by {distance:.1e} on {shape}"
    return None


def _leaves(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def _change(compiled: rgc.CompiledModule, prepared: _Prepared) -> str:
    report, before = compiled.report, prepared.baseline.report
    made, made_before = (Counter(_merges(one)) for one in (report, before))
    if made != made_before:
        return _FEWER if made < made_before else _OTHER
    if not _has_same_bits(compiled, prepared.baseline):
        return _ROUNDING
    return _WORDS if report.refusals != before.refusals else _SAME_BITS


def _merges(report: Report) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(each.rewrite, each.where, tuple(each.result)) for each in report.rewrites]


def _has_same_bits(one: nn.Module, other: nn.Module) -> bool:
    """The same code over the same weights."""
    left, right = one.state_dict(), other.state_dict()
    same_weights = left.keys() == right.keys() and all(is_same_tensor(left[name], right[name]) for name in left)
    return same_weights and getattr(one, "code", None) == getattr(other, "code", None)


class _TooLongError(BaseException):
    """Not an `Exception`: nobody on the way may catch it."""


@contextmanager
def _patience() -> Iterator[None]:
    def ring(signal_number: int, frame: FrameType | None) -> None:
        raise _TooLongError

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def print_verdicts(verdicts: Sequence[Verdict], pool: int, models: int) -> None:
    """The figures, by file; then every mutant that was not refused."""
    console = Console(width=200)
    table = Table("file", "mutants", "refused", "survivors", "harmless", box=MARKDOWN)
    for file in [*dict.fromkeys(verdict.file for verdict in verdicts), None]:
        those = [verdict for verdict in verdicts if file in (None, verdict.file)]
        counts = Counter(verdict.status for verdict in those)
        row = (len(those), counts["refused"], counts["survivor"], counts["harmless"])
        table.add_row(file or "all", *map(str, row))
    console.print(f"{len(verdicts)} of {pool} mutants whose line runs, {models} models, torch {torch.__version__}\n")
    console.print(table)
    for status in ("refused", "harmless"):
        by_how = Counter(_kind_of(verdict.how) for verdict in verdicts if verdict.status == status)
        console.print(f"\n{status}: " + ", ".join(f"{how} ({count})" for how, count in by_how.most_common()),
                      markup=False, soft_wrap=True)  # fmt: skip
    for status in ("survivor", "harmless"):
        those = [verdict for verdict in verdicts if verdict.status == status]
        if those:
            console.print(f"\n{status}s\n", markup=False)
        for verdict in those:
            where = f" [{verdict.model}]" if verdict.model else f" (on {verdict.models} models)"
            console.print(f"- {verdict.mutant}: {verdict.how}{where}", markup=False, soft_wrap=True)


def _kind_of(how: str) -> str:
    """How, without its numbers."""
    return re.sub(r"\d[\d,]*( of \d[\d,]*)? ", "", how)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
