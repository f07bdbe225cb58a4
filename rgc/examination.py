"""What is wrong with somebody's pass? Its examples, models like them, random models, and faults in its own source.

*Examples*: on each the pass must fire, or leave the model alone and say why. *Laws*: what it replaces must be equal to
the last bit on random integers, where nothing rounds. *Fuzzing*: it must be right as well on
models like its examples, with another geometry and among other layers, and on random ones. *Mutation*: small faults in
its source must be noticed by its examples; one that is not shows a line that no example is about.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rgc import fuzzing
from rgc.compiler import trace
from rgc.cost import Objective
from rgc.errors import RgcError
from rgc.fuzzing import Fault, Setting, Tally
from rgc.laws import prove
from rgc.near_miss import near_miss, shown
from rgc.pass_source import remarks
from rgc.recipe import script
from rgc.reproducer import program
from rgc.rewrite import Example, Pass, Rewrite
from rgc.survivors import Likeness, Survivor, file_of, mutate
from rgc.trial import Trial, attempt, drawn, made, relies_on_range
from rgc.variations import Variation, random_variation, variations

#: So many draws of weights for each example.
SEEDS = 3

#: So many faults are planted in a pass, of all that its source may have.
MOST_FAULTS = 120

#: Draws of layers and calls in a random model, at most.
MOST_STEPS = 6

OBJECTIVES: tuple[Objective, ...] = ("depth", "latency", "macs")

#: What `rgc.laws.prove` says where it can tell nothing of a rewrite, right or wrong.
_INCONCLUSIVE = ("nothing can be concluded", "does not fire on integers", "over no power of two")

#: Is told what is being done.
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: in which kind of check it showed, what it is, what to do, and a program that shows it.

    ``advice`` and ``program`` may be empty.
    """

    check: str
    problem: str
    advice: str = ""
    program: str = ""

    def __str__(self) -> str:
        return f"{self.problem}{self.advice and f'; {self.advice}'}"


@dataclass(frozen=True)
class Line:
    """One kind of check: its name, "ok", "wrong" or "not tried", and what was tried."""

    check: str
    status: str
    tried: str


@dataclass(frozen=True)
class Examination:
    """What was tried with a pass, and what is wrong with it. ``notes`` are worth knowing, and nothing is wrong."""

    name: str
    lines: tuple[Line, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Is nothing wrong?"""
        return not self.findings


def examine(
    pass_: Pass,
    *,
    thorough: bool = True,
    models: int = 40,
    mutation: bool = True,
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> Examination:
    """Try the pass in every way; what is wrong is told, never raised.

    thorough: beyond the examples, also integers, so many random ``models`` and at most as many like each example, and,
    unless ``mutation`` is False, faults.
    The same ``seed`` draws the same models.
    """
    examiner = _Examiner(pass_, seed, progress)
    examiner.look_at_examples(again=thorough)
    if thorough:
        examiner.prove_law()
        examiner.fuzz(models)
        if mutation:
            examiner.mutate()
        else:
            examiner.lines.append(Line("mutation", "not tried", "it was left out"))
    return Examination(pass_.name, tuple(examiner.lines), tuple(examiner.findings), tuple(examiner.notes))


def own_passes(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """Those that a file defines, of all that it holds: without the built-in ones that it imports."""
    from rgc.passes import ALL, OPT_IN

    own = tuple(each for each in passes if each not in (*ALL, *OPT_IN))
    return own or tuple(passes)


def problem_of_example(pass_: Pass, example: Example, seed: int, dtype: torch.dtype = torch.float32) -> str:
    """What the pass does on one of its examples that it must not; "" if nothing."""
    return _problem(pass_, example, _tried(pass_, example, seed, dtype))


def _tried(pass_: Pass, example: Example, seed: int, dtype: torch.dtype) -> Trial:
    return attempt(pass_, example.build, example.shape, seed=seed, dtype=dtype, fixed_size=example.fixed_size)


def _problem(pass_: Pass, example: Example, trial: Trial) -> str:
    if trial.unusable or trial.fault:
        return f"compiling fails: {trial.unusable}" if trial.unusable else trial.fault
    if example.fires and not trial.fired:
        return f"it must fire, but {_instead(pass_, example, trial)}"
    if not example.fires and trial.fired:
        return "it must leave the model alone, but fires"
    if not example.fires and not any(example.because in reason for reason in [*trial.reasons, ""]):
        return f"it must refuse because of {example.because!r}, but {_instead(pass_, example, trial)}"
    return ""


def _instead(pass_: Pass, example: Example, trial: Trial) -> str:
    if trial.reasons:
        return f"refuses: {'; '.join(trial.reasons)}"
    notes = f" ({'; '.join(trial.report.notes)})" if trial.report is not None and trial.report.notes else ""
    model = made(example.build, 0, torch.float64)
    try:
        graph = trace(model, drawn(example.shape, 0, torch.float64)).graph
    except RgcError as error:
        return f"the model cannot be traced: {error}"
    if not isinstance(pass_, Rewrite):
        return f"returns the graph as it is: {shown(graph)}{notes}"
    return f"its pattern does not match: {near_miss(pass_, graph)}{notes}"


@dataclass
class _Examiner:
    pass_: Pass
    seed: int
    progress: Progress
    lines: list[Line] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)  # names of examples that do not hold
    likenesses: list[Likeness] = field(default_factory=list)

    def look_at_examples(self, again: bool) -> None:
        """The source, and every example under several weights; ``again``, twice under the first."""
        name, examples = self.pass_.name, self.pass_.examples
        before = len(self.findings)
        problems, notes = remarks(self.pass_)
        self.findings += [Finding("examples", *problem) for problem in problems]
        self.notes += notes
        kinds = {example.fires for example in examples}
        for fires, decorator in ((True, "fires_on"), (False, "leaves_alone")):
            if fires not in kinds:
                problem = f"{name} is not finished: it has no example with @{name}.{decorator}"
                what = "it fires" if fires else "it must not fire, with the reason that it gives"
                self.findings.append(Finding("examples", problem, f"add a function that makes a model on which {what}"))
        for number, example in enumerate(examples, start=1):
            self.progress(f"example {number} of {len(examples)}: {example.name}")
            self._look_at(example, again)
        self._close("examples", before, f"{_count(len(examples), 'example')}, {SEEDS} draws of weights each")

    def _look_at(self, example: Example, again: bool) -> None:
        """The weights in float32 and in float64 in turn; in float64 other sizes are compared as well."""
        trials = []
        for seed in range(SEEDS):
            trials.append(_tried(self.pass_, example, seed, torch.float64 if seed == 1 else torch.float32))
            problem = _problem(self.pass_, example, trials[-1])
            if problem:
                where = f"{self.pass_.name} on the example {example.name!r} (seed {seed})"
                own = Variation(example, "", example.shape)
                text = "" if problem.startswith("compiling fails: ") else self._program(own, problem, "latency", seed)
                self.findings.append(Finding("examples", f"{where}: {problem}", self._advice(own, problem, seed), text))
                self.broken.add(example.name)
                return
        if again and _tried(self.pass_, example, 0, torch.float32).outcome != trials[0].outcome:
            self._report_chance("examples", Variation(example, "", example.shape))
        report = trials[0].report
        if trials[0].fired and report is not None and report.macs_after > report.macs_before:
            self.notes.append(
                f"it costs more: {report.macs_after - report.macs_before:,} multiply-accumulates beside "
                f"{report.macs_before:,} on the example {example.name!r}"
            )

    def prove_law(self) -> None:
        """The rewrite on random integers; where the examples hold, for they are what it is tried on."""
        if self.broken or not any(example.fires for example in self.pass_.examples):
            self.lines.append(Line("laws", "not tried", "first mend the examples"))
            return
        self.progress("integers")
        before = len(self.findings)
        try:
            tried = " ".join(str(prove(self.pass_, seed=self.seed)).split("\n"))
        except RgcError as error:
            reason = str(error)
            if any(words in reason for words in _INCONCLUSIVE):
                self.lines.append(Line("laws", "no verdict", reason))
                return
            self.findings.append(
                Finding("laws", reason, "mend the result, or refuse with `require(condition, reason)`")
            )
            tried = "random integers, compared element by element"
        self._close("laws", before, tried)

    def _report_chance(self, check: str, variation: Variation) -> None:
        problem = f"{self.pass_.name} does one thing and then another on the same model, {variation}"
        if not any(finding.problem.startswith(problem[:40]) for finding in self.findings):
            self.findings.append(Finding(check, problem, "let it depend on what it matches, and on nothing else"))

    def fuzz(self, models: int) -> None:
        """Models like the examples, each with one thing changed; then random ones, half of them like the examples."""
        before = len(self.findings)
        examples = [example for example in self.pass_.examples if example.name not in self.broken]
        alike = [variation for example in examples for variation in _some(list(variations(example)), models)]
        fired, faults = 0, list[tuple[Variation, Objective, Trial]]()
        for number, variation in enumerate(alike, start=1):
            self.progress(f"model {number} of {len(alike)} like the examples")
            trial = self._try(variation, "depth")
            fired += trial.fired
            if trial.fault:
                faults.append((variation, "depth", trial))
            elif not trial.unusable:
                if (
                    variation.example.fires
                    and not trial.fired
                    and self._try(variation, "depth").outcome != trial.outcome
                ):
                    self._report_chance("fuzzing", variation)
                again = lambda variation=variation: self._try(variation, "depth")  # noqa: E731
                self.likenesses.append((again, trial, str(variation)))
        for index in range(models // 2 if examples else 0):
            self.progress(f"random model {index + 1} of {models}")
            variation = random_variation(examples, self.seed * 100_000 + index)
            objective = OBJECTIVES[index % len(OBJECTIVES)]
            trial = self._try(variation, objective, ("default",) if index % 2 else ())
            fired += trial.fired
            if trial.fault:
                faults.append((variation, objective, trial))
        self._report_faults(faults)
        tally = self._fuzz_from_nothing(models - models // 2 if examples else models)
        fired += tally.firings[self.pass_.name]
        tried = f"{_count(len(alike), 'model')} like the examples, {models} random; it fired on {fired}"
        if examples and not fired:
            self.notes.append("it fires on no model but its own examples, so the random models say nothing about it")
        self._close("fuzzing", before, tried)

    def mutate(self) -> None:
        """Faults in the source; only if the examples hold, or each of them would be noticed."""
        if any(finding.check == "examples" for finding in self.findings):
            self.lines.append(Line("mutation", "not tried", "first mend the examples"))
            return
        if file_of(self.pass_) is None:
            self.lines.append(Line("mutation", "not tried", "its source is in no file"))
            return

        def ask(example: Example) -> str:
            return problem_of_example(self.pass_, example, 0)

        def tell(number: int, count: int) -> None:
            self.progress(f"fault {number} of {count} in its source")

        before = len(self.findings)
        made = mutate(self.pass_, ask, self.likenesses, most=MOST_FAULTS, progress=tell)
        self._report_survivors(made.survivors)
        tried = f"{made.planted} faults planted, {made.noticed} noticed by the examples"
        if made.possible > MOST_FAULTS:
            tried += f" (of {made.possible} that its source may have)"
        self._close("mutation", before, tried)

    def _try(self, variation: Variation, objective: Objective, beside: Sequence[str] = ()) -> Trial:
        return attempt(
            self.pass_, variation.build, variation.shape,
            objective=objective, fixed_size=variation.example.fixed_size, beside=beside,
        )  # fmt: skip

    def _report_faults(self, faults: Sequence[tuple[Variation, Objective, Trial]]) -> None:
        """One finding for each kind of fault: what changes its words only by numbers is of one kind."""
        kinds: dict[str, list[tuple[Variation, Objective, Trial]]] = {}
        for fault in faults:
            kinds.setdefault(re.sub(r"[0-9][0-9.e+x-]*", "#", fault[2].fault.rpartition(": ")[2])[:50], []).append(
                fault
            )
        for alike in kinds.values():
            variation, objective, trial = alike[0]
            others = [str(each) for each, _, _ in alike[1:4]]
            more = len(alike) - 1 - len(others)
            too = f" (so it is with {'; '.join(others)}{f', and {more} more' if more else ''})" if others else ""
            problem = f"{self.pass_.name} on {variation}: {trial.fault}{too}"
            text = self._program(variation, f"{self.pass_.name}: {trial.fault}", objective)
            self.findings.append(Finding("fuzzing", problem, self._advice(variation, trial.fault), text))

    def _advice(self, variation: Variation, fault: str, seed: int = 0) -> str:
        if "still fires at" in fault:
            return "what it makes must not match its own pattern, nor be undone by another pass"
        if "overwrites a weight" in fault or "writes to the weights" in fault:
            return "make a new tensor: the weights of an operator are those of the user's model"
        if "has no value; pass one to evaluate()" in fault:
            return "what it makes may read only values that the pattern names: let the pattern reach further"
        if "refuses without a reason" in fault:
            return "say in it what was found, and what a user could do"
        if "not equal" not in fault:
            return (
                ""
                if fault.startswith("it must ")
                else "say with `require` what the rewrite needs: then it refuses with a reason"
            )
        mended = attempt(
            relies_on_range(self.pass_), variation.build, variation.shape,
            seed=seed, objective="depth", fixed_size=variation.example.fixed_size,
        )  # fmt: skip
        if mended.fired and not mended.fault:
            return (
                "it is equal only for values in the range that rgc.range_of tells of them: "
                "declare that with @rewrite(..., relies_on_range=True)"
            )
        return "mend the result, or refuse such models with `require(condition, reason)`"

    def _program(self, variation: Variation, problem: str, objective: str, seed: int = 0) -> str:
        return program(
            problem, variation.build(), variation.shape, name=self.pass_.name, file=file_of(self.pass_),
            objective=objective, fixed_size=variation.example.fixed_size, seed=seed,
        )  # fmt: skip

    def _fuzz_from_nothing(self, models: int) -> Tally:
        sets = [[self.pass_], ["default", self.pass_], ["all", self.pass_]]
        done = 0

        def tell(tally: Tally) -> None:
            nonlocal done
            done += 1
            self.progress(f"random model {done} of {models}, from nothing")

        tally = fuzzing.run(models, first=0, seed=self.seed, most_steps=MOST_STEPS, passes=sets, progress=tell)
        for fault in {fault.kind: fault for fault in reversed(tally.faults)}.values():
            names = [each if isinstance(each, str) else each.name for each in fault.setting.passes]
            others = tuple(each for each in fault.setting.passes if each is not self.pass_)
            alone = fuzzing.check_recipe(fault.recipe, replace(fault.setting, passes=others))
            if alone is not None and alone.kind == fault.kind:
                self.notes.append(f"rgc itself goes wrong on a random model, without this pass: {alone.reason}")
                continue
            problem = f"{self.pass_.name} on a random model, with the passes {', '.join(names)}: "
            text = _script(fault, self.pass_.name, file_of(self.pass_))
            self.findings.append(Finding("fuzzing", f"{problem}{fault.kind}: {fault.reason}", "", text))
        return tally

    def _report_survivors(self, survivors: Sequence[Survivor]) -> None:
        told: set[tuple[int, str]] = set()
        silent = []
        for survivor in survivors:
            finding = self._finding_of(survivor)
            if finding is None:
                silent.append(f"line {survivor.mutant.line}, {survivor.mutant.change}")
                continue
            key = (survivor.mutant.line, finding.advice)
            if key not in told:  # the faults of one line that one example would show are one thing to mend
                told.add(key)
                self.findings.append(finding)
        if silent:
            listed = "; ".join(silent[:5]) + (f"; and {len(silent) - 5} more" if len(silent) > 5 else "")
            self.notes.append(
                f"{_count(len(silent), 'fault')} made no difference on any model that was tried: {listed}"
            )

    def _finding_of(self, survivor: Survivor) -> Finding | None:
        mutant, name = survivor.mutant, self.pass_.name
        where = f"line {mutant.line} of {mutant.path.rsplit('/', 1)[-1]}"
        if not survivor.is_reached:
            problem = f"no example of {name} runs {where}"
            return Finding("mutation", problem, "add one for which that line matters, or drop the line")
        problem = f"the examples of {name} do not notice a fault in {where}: {mutant.change}"
        if survivor.noticed is not None:
            likeness, trial = survivor.noticed
            how = f"@{name}.fires_on" if trial.fired else f"@{name}.leaves_alone"
            why = f", because {trial.reasons[0]!r}" if trial.reasons and not trial.fired else ""
            return Finding("mutation", problem, f"one that would: {likeness} ({how}{why})")
        if mutant.kind == "guard" and not survivor.is_raising:
            return Finding("mutation", problem, f"add a @{name}.leaves_alone with a model that this guard refuses")
        return None

    def _close(self, check: str, before: int, tried: str) -> None:
        wrong = len(self.findings) - before
        self.lines.append(Line(check, f"{wrong} wrong" if wrong else "ok", tried))


def _some(found: list[Variation], most: int) -> list[Variation]:
    """So many of them, in their order."""
    kept = set(random.Random(0).sample(range(len(found)), min(most, len(found))))
    return [each for index, each in enumerate(found) if index in kept]


class _Verbatim(str):
    """Text that stands in a program as it is."""

    def __repr__(self) -> str:
        return str(self)


def _script(fault: Fault, name: str, file: str | None) -> str:
    """The program of a fault, in which the pass is loaded from its file."""
    setting: Setting = fault.setting
    chosen = ", ".join(repr(each) if isinstance(each, str) else each.name for each in setting.passes)
    options: dict[str, Any] = {**setting.options, "passes": _Verbatim(f"[{chosen}]")}
    text = script(fault.recipe, options, setting.dtype, f"{fault.kind}: {fault.reason}")
    if file is None:
        return text
    loading = f"{name} = next(each for each in load_passes({file!r}) if each.name == {name!r})\n"
    return text.replace("import rgc\n", "import rgc\nfrom rgc.passbook import load_passes\n", 1).replace(
        "import randomize\n", f"import randomize\n\n{loading}", 1
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def told(examination: Examination, most: int = 8) -> Iterator[str]:
    """What is wrong, a line each."""
    for finding in examination.findings[:most]:
        yield str(finding)
    if len(examination.findings) > most:
        yield f"and {len(examination.findings) - most} more"


__all__ = ["Examination", "Finding", "Line", "examine", "own_passes", "problem_of_example", "told"]
