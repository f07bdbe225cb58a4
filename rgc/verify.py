"""Is the compiled model the original? Hypothesis draws inputs, float64 decides the function, noise the floats.

In float64 the compiled model must agree with the original to 1e-10 of the output's scale. There are inputs on which the
original rounds worse than that even there: on those, more is allowed only if the original is as far from itself when
inputs and weights differ in the last place, never more than 1e-7, and for the example itself never more than 1e-9; so
what is wrong by 1e-8 is wrong. In the deployed dtype its distance from the float64 original may not exceed a small
multiple of the original's own distance: both round, and only the comparison of the two tells a fault from rounding.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from rgc.data import Sample, samples_of
from rgc.errors import InputError, NotEquivalentError, first_line
from rgc.example import Example, output_difference, precise_form, runnable, runnable_in_float64
from rgc.precision import Jittered, ReadOnlyModel, jittered
from rgc.proof import TOLERANCE
from rgc.report import Verification
from rgc.subject import device_of, example_of, floating_dtype, require_eval

Level = Literal["quick", "full"]

#: Outputs of up to so many elements are kept from the check in float64 to that in the deployed dtype.
LARGEST_KEPT = 2**18

#: How many inputs are drawn beside the example.
DRAWS: dict[str, int] = {"quick": 4, "full": 50}

#: Where sizes are free, drawn inputs are at most about so wide: borders show at any size. An example that is as wide
#: has no wider input drawn beside it, so that a large one is not slower to prove.
LARGEST_DRAWN = 64

#: The compiled model may be so many times as far from the float64 original as the original itself was at its worst ...
NOISE_MULTIPLE = 8.0

#: ... plus so many units in the last place of the output's scale, for originals that happen to round well.
NOISE_FLOOR = 8.0

#: Rounding in float64 explains no more than this on the example, however little the original is at rest there, ...
LARGEST_ROUNDING = 1e-9

#: ... and on drawn inputs, some of which lie where hardly anything but rounding is left, no more than this.
LARGEST_ROUNDING_IF_DRAWN = 1e-7

#: An original that is farther than this from itself in float64 does not round: it computes something else there.
LARGEST_NOISE = 0.1

#: So many runs in which inputs and weights differ in the last place tell how far an original is at rest.
JITTERS = 3

#: In the deployed dtype, by so many units: a sum of K terms rounds by about sqrt(K) of them, and layers add up.
UNITS = (1, 8, 64)


def verify(
    original: nn.Module,
    compiled: Callable[..., Any],
    example_inputs: Any = None,
    *,
    level: Level = "quick",
    data: Any = None,
) -> Verification:
    """Compare a compiled model (or any loaded artifact) with its original on the example and on drawn inputs.

    data: inputs of your own to compare on as well, in the form of the example, the first axis with any number of
    samples. Raises `InputError` where the original cannot run the example or the data; a difference is returned, not
    raised: ``verify(...).equal``.
    """
    require_eval(original)
    example = example_of(original, example_inputs)
    dtype = floating_dtype(original, example)
    on_cpu = example.to(torch.device("cpu"))
    precise = precise_form(original, on_cpu.cast(torch.float64))
    own = runnable(original, dtype, is_read_only=precise.shares)
    exact = runnable_in_float64(precise.model, original, is_read_only=precise.shares)
    pair = Pair(own, compiled, exact, None, dtype, device_of(original))
    samples = () if data is None else samples_of(data, example, original)
    try:
        return pair.check(on_cpu, level=level, free_sizes=False, expected=precise.expected, samples=samples)
    except NotEquivalentError as error:
        return Verification(False, None, float("inf"), 0.0, 0.0, 0, level, str(error))


@dataclass(frozen=True)
class Case:
    """An input, and what the original makes of it; None where that is so large that it is computed again instead."""

    example: Example
    expected: Any
    sample: str = ""

    @classmethod
    def of(cls, example: Example, expected: Any, sample: str = "") -> Case:
        """The case, with the output if it is small; ``sample`` names it where it is a user's own."""
        elements = sum(leaf.numel() for leaf in tree_flatten(expected)[0] if isinstance(leaf, Tensor))
        return cls(example, expected if elements <= LARGEST_KEPT else None, sample)


@dataclass(frozen=True)
class Cases:
    """Inputs on which two models agree in float64, up to ``exact`` (None: not compared there)."""

    level: Level
    cases: list[Case]
    exact: float | None


@dataclass(frozen=True)
class Pair:
    """An original and its compiled form, each in the deployed dtype and in float64 (None: not to be had)."""

    original: Callable[..., Any]
    compiled: Callable[..., Any]
    reference: Callable[..., Any] | None
    compiled_reference: Callable[..., Any] | None
    dtype: torch.dtype
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    accepts: Callable[[Example], bool] = lambda _: True  # which drawn inputs the compiled form can take

    def check(
        self,
        example: Example,
        *,
        level: Level,
        free_sizes: bool,
        expected: Any = None,
        samples: Sequence[Sample] = (),
    ) -> Verification:
        """The worst differences over the example, the drawn inputs and ``samples``.

        `NotEquivalentError` names the input's shape, or the sample.
        """
        cases = self.check_in_float64(
            example, level=level, free_sizes=free_sizes, expected=expected, samples=samples
        )  # fmt: skip
        return self.check_deployed(cases)

    def check_in_float64(
        self,
        example: Example,
        *,
        level: Level,
        free_sizes: bool,
        expected: Any = None,
        samples: Sequence[Sample] = (),
    ) -> Cases:
        """The example, the drawn inputs that the original takes, and ``samples``, on which the two agree in float64.

        ``expected``: what the original makes of the example, if that is known.
        """
        first = self._expected(example) if expected is None else expected
        cases, exact = [Case.of(example, first)], self._exact_difference(example, first, LARGEST_ROUNDING)
        for drawn in draw_examples(example, DRAWS[level], free_sizes):
            if not self.accepts(drawn):
                continue
            try:
                found = self._expected(drawn)
            except (RuntimeError, ValueError, AssertionError, IndexError):
                continue  # the original itself does not take this size, so nothing can be said about it
            may_decline = _has_new_ones(drawn, example) or (_is_whole(first) and not _is_whole(found))
            if may_decline and not self._takes(drawn):
                continue
            if _is_finite(first) and not _is_finite(found):
                continue  # a window of nothing but padding, say: what computes with infinities may become NaN
            exact = max(exact, self._exact_difference(drawn, found, LARGEST_ROUNDING_IF_DRAWN))
            cases.append(Case.of(drawn, found))
        own = self.check_samples_in_float64(samples, level)
        exact = max(exact, own.exact or 0.0)
        return Cases(level, cases + own.cases, exact if self.compiled_reference is not None else None)

    def check_samples_in_float64(self, samples: Sequence[Sample], level: Level) -> Cases:
        """A user's own inputs, on which the two agree in float64; `InputError` where the original does not run."""
        cases, exact = [], 0.0
        for sample in samples:
            try:
                found = self._expected(sample.example)
            except Exception as error:  # forward is the user's own and may raise anything
                raise InputError(f"the model does not run on {sample.name}: {first_line(error)}") from error
            with _naming(sample.name):
                exact = max(exact, self._exact_difference(sample.example, found, LARGEST_ROUNDING_IF_DRAWN))
            cases.append(Case.of(sample.example, found, sample.name))
        return Cases(level, cases, exact if self.compiled_reference is not None else None)

    def check_deployed(self, cases: Cases) -> Verification:
        """The worst differences in the deployed dtype; the compiled form in float64 is not needed for it any more."""
        worst = _Worst()
        for case in cases.cases:
            expected = self._expected(case.example) if case.expected is None else case.expected
            with _naming(case.sample):
                self._compare(case.example, worst, expected)
        return Verification(True, cases.exact, worst.deployed, worst.own, worst.allowed, worst.count, cases.level)

    def _expected(self, example: Example) -> Any:
        """What the original makes of an input, in float64 where that is to be had."""
        if self.reference is None:
            return example.cast(self.dtype).run(self.original)
        return example.cast(torch.float64).run(self.reference)

    def _exact_difference(self, example: Example, expected: Any, most: float) -> float:
        if self.compiled_reference is None:
            return 0.0
        precise = example.cast(torch.float64)
        exact = output_difference(expected, _run(self.compiled_reference, precise))
        if exact <= TOLERANCE:
            return exact
        allowed = max(TOLERANCE, min(self._rounding(precise, expected), most))
        if not exact <= allowed:
            raise NotEquivalentError(
                f"differs by {exact:.1e} of its scale in float64 on {_describe(example)}",
                difference=exact, allowed=allowed, precision="float64",
            )  # fmt: skip
        return exact

    def _takes(self, example: Example) -> bool:
        """Does the compiled form run? One element may broadcast there, a crop leave none: a layer refuses both."""
        try:
            if self.compiled_reference is not None:
                _run(self.compiled_reference, example.cast(torch.float64))
            else:
                _run(self.compiled, example.cast(self.dtype).to(self.device))
        except NotEquivalentError:
            return False
        return True

    def _compare(self, example: Example, worst: _Worst, expected: Any) -> None:
        deployed = example.cast(self.dtype).to(self.device)
        original, result = self._run_original(deployed), _run(self.compiled, deployed)
        own, found = (output_difference(expected, _on_cpu(output)) for output in (original, result))
        _require_same_dtypes(original, result)
        # Where the original leaves the range of the dtype nothing rounds: that excuses nothing on other inputs.
        worst.own = max(worst.own, own) if math.isfinite(own) else worst.own
        allowed = max(NOISE_MULTIPLE * max(worst.own, own) + NOISE_FLOOR * torch.finfo(self.dtype).eps, TOLERANCE)
        direct = output_difference(original, result) if max(own, found) > LARGEST_NOISE else 0.0
        if not found <= allowed:
            if not direct > LARGEST_NOISE or not self._is_no_calmer(deployed, original, direct):
                precision = str(self.dtype).removeprefix("torch.")
                raise NotEquivalentError(
                    f"differs by {found:.1e} of its scale in {precision} on {_describe(example)}, "
                    f"where the original's own rounding explains {allowed:.1e}",
                    difference=found, allowed=allowed, precision=precision,
                )  # fmt: skip
            allowed = found  # the original is thrown about by its own rounding, by luck not on this very input
        if own > LARGEST_NOISE and not direct <= LARGEST_NOISE and not self._is_no_calmer(deployed, original, direct):
            raise NotEquivalentError(
                f"differs from the original by {direct:.1e} of its scale in {str(self.dtype).removeprefix('torch.')}, "
                f"which itself computes something else in float64 ({own:.1e} away)"
            )
        worst.count += 1
        if math.isfinite(own):
            worst.deployed, worst.allowed = max(worst.deployed, found), max(worst.allowed, allowed)

    def _run_original(self, example: Example) -> Any:
        """What the original makes of an input in the deployed dtype; it has run in float64 already."""
        try:
            return example.run(self.original)
        except Exception as error:  # forward is the user's own and may raise anything
            name, reason = str(self.dtype).removeprefix("torch."), (str(error).strip().splitlines() or [""])[0][:160]
            raise InputError(
                f"the model does not run in {name} on {_describe(example)}: {type(error).__name__}: {reason}"
            ) from error

    def _rounding(self, example: Example, expected: Any) -> float:
        """What rounding in float64 explains: a multiple of how far the last place of inputs and weights moves it."""
        if self.reference is None:
            return 0.0
        others = (_jittered(self.reference, example, seed, torch.float64) for seed in range(JITTERS))
        found = max(output_difference(expected, call.run(model)) for model, call in others)
        return NOISE_MULTIPLE * found

    def _is_no_calmer(self, example: Example, output: Any, distance: float) -> bool:
        """Is the original as far from itself on some inputs and weights that differ in the last place?

        A detector that keeps the best of many equally good boxes returns others after any rounding, and as many as it
        likes: float64 decides there, and the deployed dtype can say no more than that the original is no calmer.
        """
        settings = itertools.product(range(JITTERS), UNITS)
        others = (_jittered(self.original, example, seed, self.dtype, units) for seed, units in settings)
        return any(distance <= output_difference(output, call.run(model)) for model, call in others)


def _jittered(
    model: Callable[..., Any], example: Example, seed: int, dtype: torch.dtype, units: int = 1
) -> tuple[Callable[..., Any], Example]:
    """Both with every floating-point number moved by about ``units`` in the last place of ``dtype``, up or down."""
    inner = model.model if isinstance(model, ReadOnlyModel) else model

    def moved(*args: Any, **kwargs: Any) -> Any:
        with Jittered(inner, seed, dtype, units) if isinstance(inner, nn.Module) else nullcontext():
            return model(*args, **kwargs)

    def move(leaf: Any) -> Any:
        return jittered(leaf, seed, units) if isinstance(leaf, Tensor) else leaf

    return moved, Example(tree_map(move, example.args), tree_map(move, example.kwargs))


@contextmanager
def _naming(sample: str) -> Iterator[None]:
    """An error inside names the sample, if there is one."""
    try:
        yield
    except NotEquivalentError as error:
        if not sample:
            raise
        raise NotEquivalentError(
            f"{error} ({sample})",
            difference=error.difference, allowed=error.allowed, precision=error.precision, sample=sample,
        ) from error  # fmt: skip


def _run(compiled: Callable[..., Any], example: Example) -> Any:
    """What the compiled model returns where the original has returned something: it may not fail."""
    try:
        return example.run(compiled)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        raise NotEquivalentError(f"fails on {_describe(example)}: {type(error).__name__}: {reason}") from error


def _require_same_dtypes(original: Any, result: Any) -> None:
    expected, found = (
        [leaf.dtype for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)] for output in (original, result)
    )
    for before, after in zip(expected, found, strict=False):
        if before != after:
            raise NotEquivalentError(f"returns {after} where the original returns {before}")


@dataclass
class _Worst:
    deployed: float = 0.0
    own: float = 0.0
    allowed: float = 0.0
    count: int = 0


def draw_examples(example: Example, count: int, free_sizes: bool) -> Iterator[Example]:
    """``count`` inputs like ``example``: other batches, other sizes where free, other distributions of values.

    Batches and sizes come in turn, so that four draws have all that tells a rule from one that holds at some sizes
    only: the example's own, one a little larger and not square, half, and twice or a quarter of it.
    """
    drawn: list[Example] = []
    import hypothesis
    from hypothesis import strategies as st

    batch = next((t.shape[0] for t in example.tensors if t.dim() > 1), 1)
    batches = (2, 1, 3) if batch == 1 else (1, 2, 3)  # not the example's first: other sizes may not be taken
    images = [t.shape[2:] for t in example.tensors if t.dim() > 2]
    longest = max((n for image in images for n in image), default=1)
    is_small = 2 * longest <= LARGEST_DRAWN and all(2 ** len(i) * math.prod(i) <= LARGEST_DRAWN**2 for i in images)
    sizes = (_as_it_is, _longer, _half, _twice if is_small else _quarter, _shorter, _a_step_longer)

    @hypothesis.settings(
        max_examples=count, derandomize=True, database=None, deadline=None,
        phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(st.integers(0, 2), st.sampled_from(_DISTRIBUTIONS), st.integers(0, 2**31))
    def draw(shift: int, distribution: Callable[..., Tensor], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        turn = len(drawn)

        def like(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            shape = list(leaf.shape)
            if leaf.dim() > 1 and shape[0] == batch:
                shape[0] = batches[turn % len(batches)]
            if free_sizes and leaf.dim() > 2:
                resized = sizes[turn % len(sizes)]
                shape[2:] = [resized(_Axis(n, longest, axis + shift)) for axis, n in enumerate(shape[2:])]
            if leaf.is_floating_point():
                return distribution(tuple(shape), generator).to(leaf.dtype)
            index = torch.randint(0, max(leaf.numel(), 1), tuple(shape), generator=generator)
            return leaf.flatten()[index] if leaf.numel() else leaf

        drawn.append(Example(tree_map(like, example.args), tree_map(like, example.kwargs)))

    with _hypothesis_in_a_temporary_folder():
        draw()
    yield from drawn


@dataclass(frozen=True)
class _Axis:
    """Positions of an axis of the example, of its longest axis, and a number that differs between neighbouring axes.

    Axes of one length get one length again, in all inputs, and so do those of which one is a multiple of another: a
    model that takes two images may need them to fit.
    """

    length: int
    longest: int
    number: int

    @property
    def bounded(self) -> int:
        return min(self.length, LARGEST_DRAWN)

    def divided(self, divisor: int) -> int:
        """A part of the axis, as it is in an example whose longest axis is bounded: then the aspect stays."""
        return max(1, self.length * min(self.longest, LARGEST_DRAWN) // (self.longest * divisor))


def _as_it_is(axis: _Axis) -> int:
    return axis.bounded


def _longer(axis: _Axis) -> int:
    return axis.bounded + 1 + axis.number % 3


def _half(axis: _Axis) -> int:
    return axis.divided(2)


def _twice(axis: _Axis) -> int:
    """Larger also for a model that takes multiples of some step only."""
    return 1 if axis.length == 1 < axis.longest else 2 * axis.length


def _quarter(axis: _Axis) -> int:
    return axis.divided(4)


def _shorter(axis: _Axis) -> int:
    return max(1, axis.bounded - 1 - axis.number % 3)


def _a_step_longer(axis: _Axis) -> int:
    """As `_twice` where twice is too large: most steps divide 32."""
    return axis.bounded if axis.longest > LARGEST_DRAWN else axis.length + 32


@contextmanager
def _hypothesis_in_a_temporary_folder() -> Iterator[None]:
    """Hypothesis keeps a cache beside the user's files even without a database; here it must leave no trace."""
    from hypothesis import configuration

    before = vars(configuration)["__hypothesis_home_directory"]
    with tempfile.TemporaryDirectory(prefix="rgc-") as folder:
        configuration.set_hypothesis_home_dir(folder)
        try:
            yield
        finally:
            configuration.set_hypothesis_home_dir(before)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def _sparse(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return _normal(shape, generator) * (_uniform(shape, generator) < 0.05)


def _large(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return 16 * _normal(shape, generator)


#: The first is that of the first input drawn, at the example's sizes: large values reach what clamps.
_DISTRIBUTIONS = (_large, _normal, _sparse, _uniform)


def _is_finite(output: Any) -> bool:
    return all(bool(leaf.isfinite().all()) for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor))


def _has_new_ones(drawn: Example, example: Example) -> bool:
    """Has an axis behind the batch one element, where the example has more?"""
    pairs = zip(drawn.tensors, example.tensors, strict=True)
    return any(n == 1 < m for ours, theirs in pairs for n, m in zip(ours.shape[1:], theirs.shape[1:], strict=True))


def _is_whole(output: Any) -> bool:
    """Has every tensor an element?"""
    return all(leaf.numel() for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor))


def _describe(example: Example) -> str:
    shapes = ["x".join(map(str, tensor.shape)) for tensor in example.tensors]
    return f"an input of {', '.join(shapes)}"


def _on_cpu(output: Any) -> Any:
    return tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, output)


def require_level(level: str) -> Level:
    """``level`` if it is one; `InputError` otherwise."""
    if level not in DRAWS:
        raise InputError(f"unknown verification level {level!r}; choose one of {', '.join(DRAWS)}")
    return level  # type: ignore[return-value]  # just checked
