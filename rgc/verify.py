"""Is the compiled model the original? Hypothesis draws inputs, float64 decides the function, noise the floats.

In float64 the compiled model must agree with the original to 1e-10 of the output's scale. In the deployed dtype its
distance from the float64 original may not exceed a small multiple of the original's own distance: both round, and only
the comparison of the two tells a fault from rounding.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from rgc.errors import InputError, NotEquivalentError
from rgc.example import Example, copy_model, output_difference
from rgc.proof import TOLERANCE
from rgc.report import Verification

Level = Literal["quick", "full"]

#: How many inputs are drawn beside the example.
DRAWS: dict[str, int] = {"quick": 4, "full": 50}

#: Where sizes are free, drawn inputs are at most about so wide: borders show at any size.
LARGEST_DRAWN = 64

#: The compiled model may be so many times as far from the float64 original as the original itself was at its worst ...
NOISE_MULTIPLE = 8.0

#: ... plus so many units in the last place of the output's scale, for originals that happen to round well.
NOISE_FLOOR = 8.0

#: An original that is farther than this from itself in float64 does not round: it computes something else there.
LARGEST_NOISE = 0.1

#: So many inputs that differ in the last place tell whether such an original is at rest at all.
JITTERS = 3


def verify(
    original: nn.Module, compiled: Callable[..., Any], example_inputs: Any = None, *, level: Level = "quick"
) -> Verification:
    """Compare a compiled model (or any loaded artifact) with its original on the example and on drawn inputs.

    Raises `InputError` where the original cannot run the example; a difference is returned, not raised:
    ``verify(...).equal``.
    """
    from rgc.compiler import device_of, example_of, floating_dtype, require_eval

    require_eval(original)
    example = example_of(original, example_inputs)
    dtype = floating_dtype(original, example)
    reference = copy_model(original, dtype=torch.float64).cpu().requires_grad_(False)
    pair = Pair(copy_model(original), compiled, reference, None, dtype, device_of(original))
    try:
        return pair.check(example.to(torch.device("cpu")), level=level, free_sizes=False)
    except NotEquivalentError as error:
        return Verification(False, None, float("inf"), 0.0, 0.0, 0, level, str(error))


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

    def check(self, example: Example, *, level: Level, free_sizes: bool, expected: Any = None) -> Verification:
        """The worst differences over the example and the drawn inputs; `NotEquivalentError` names the input's shape."""
        worst = _Worst()
        self._compare(example, worst, expected)
        for drawn in draw_examples(example, DRAWS[level], free_sizes):
            if not self.accepts(drawn):
                continue
            try:
                reference = self.original if self.reference is None else self.reference  # an empty model is false
                expected = drawn.cast(self.dtype if self.reference is None else torch.float64).run(reference)
            except (RuntimeError, ValueError, AssertionError, IndexError):
                continue  # the original itself does not take this size, so nothing can be said about it
            if _has_new_ones(drawn, example) and not self._takes(drawn):
                continue
            self._compare(drawn, worst, expected)
        exact = worst.exact if self.compiled_reference is not None else None
        return Verification(True, exact, worst.deployed, worst.own, worst.allowed, worst.count, level)

    def _takes(self, example: Example) -> bool:
        """Does the compiled form run? An axis of one element may broadcast in the original; a layer refuses it."""
        try:
            _run(self.compiled, example.cast(self.dtype).to(self.device))
        except NotEquivalentError:
            return False
        return True

    def _compare(self, example: Example, worst: _Worst, expected: Any) -> None:
        reference = self.original if self.reference is None else self.reference
        precise = example if self.reference is None else example.cast(torch.float64)
        if expected is None:
            expected = precise.run(reference)
        if self.compiled_reference is not None:
            exact = output_difference(expected, _run(self.compiled_reference, precise))
            worst.exact = max(worst.exact, exact)
            if not exact <= TOLERANCE:
                raise NotEquivalentError(f"differs by {exact:.1e} of its scale in float64 on {_describe(example)}")
        deployed = example.cast(self.dtype).to(self.device)
        original, result = deployed.run(self.original), _run(self.compiled, deployed)
        own, found = (output_difference(expected, _on_cpu(output)) for output in (original, result))
        _require_same_dtypes(original, result)
        worst.own = max(worst.own, own)
        allowed = max(NOISE_MULTIPLE * worst.own + NOISE_FLOOR * torch.finfo(self.dtype).eps, TOLERANCE)
        if not found <= allowed:
            raise NotEquivalentError(
                f"differs by {found:.1e} of its scale in {str(self.dtype).removeprefix('torch.')} "
                f"on {_describe(example)}, "
                f"where the original's own rounding explains {allowed:.1e}"
            )
        if own > LARGEST_NOISE and not (direct := output_difference(original, result)) <= self._unrest(deployed):
            raise NotEquivalentError(
                f"differs from the original by {direct:.1e} of its scale in {str(self.dtype).removeprefix('torch.')}, "
                f"which itself computes something else in float64 ({own:.1e} away)"
            )
        worst.deployed = max(worst.deployed, found)
        worst.allowed, worst.count = max(worst.allowed, allowed), worst.count + 1

    def _unrest(self, example: Example) -> float:
        """How far the original is from itself on inputs and with weights that differ in the last place.

        A detector that keeps the best of many equally good boxes returns others after any rounding, and as many as it
        likes: float64 decides there, and the deployed dtype can say no more than that the original is no calmer.
        """
        output = example.run(self.original)
        others = (_jittered(self.original, example, seed) for seed in range(JITTERS))
        return max(LARGEST_NOISE, *(output_difference(output, call.run(model)) for model, call in others))


def _jittered(model: Callable[..., Any], example: Example, seed: int) -> tuple[Callable[..., Any], Example]:
    """Both with every floating-point number moved by about one unit in the last place, up or down."""
    generator = torch.Generator().manual_seed(seed)

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        signs = torch.randint(0, 2, leaf.shape, generator=generator).to(leaf) * 2 - 1
        return leaf + signs * leaf.abs() * torch.finfo(leaf.dtype).eps

    if isinstance(model, nn.Module):
        model = copy_model(model)
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.copy_(move(tensor))
    return model, Example(tree_map(move, example.args), tree_map(move, example.kwargs))


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
    exact: float = 0.0
    deployed: float = 0.0
    own: float = 0.0
    allowed: float = 0.0
    count: int = 0


def draw_examples(example: Example, count: int, free_sizes: bool) -> Iterator[Example]:
    """``count`` inputs like ``example``: other batches, other sizes where free, other distributions of values."""
    drawn: list[Example] = []
    import hypothesis
    from hypothesis import strategies as st

    batch = next((t.shape[0] for t in example.tensors if t.dim() > 1), 1)

    @hypothesis.settings(
        max_examples=count, derandomize=True, database=None, deadline=None,
        phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(
        st.integers(1, 3),
        st.integers(-3, 3),
        st.sampled_from([1, 2, 4]),
        st.sampled_from(_DISTRIBUTIONS),
        st.integers(0, 2**31),
    )
    def draw(new_batch: int, shift: int, divisor: int, distribution: Callable[..., Tensor], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def like(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            shape = list(leaf.shape)
            if leaf.dim() > 1 and shape[0] == batch:
                shape[0] = new_batch
            if free_sizes and leaf.dim() > 2:
                shape[2:] = [min(n, max(1, min(n, LARGEST_DRAWN) // divisor + shift)) for n in shape[2:]]
            if leaf.is_floating_point():
                return distribution(tuple(shape), generator).to(leaf.dtype)
            index = torch.randint(0, max(leaf.numel(), 1), tuple(shape), generator=generator)
            return leaf.flatten()[index] if leaf.numel() else leaf

        drawn.append(Example(tree_map(like, example.args), tree_map(like, example.kwargs)))

    with _hypothesis_in_a_temporary_folder():
        draw()
    yield from drawn


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


def _has_new_ones(drawn: Example, example: Example) -> bool:
    """Has an axis behind the batch one element, where the example has more?"""
    pairs = zip(drawn.tensors, example.tensors, strict=True)
    return any(n == 1 < m for ours, theirs in pairs for n, m in zip(ours.shape[1:], theirs.shape[1:], strict=True))


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
