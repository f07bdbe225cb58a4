"""How are random models drawn? Step by step, each run as it is drawn, so that every model that comes out runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgc.recipe import Recipe, Shape, Step
from rgc.recipe_steps import (
    ANY_SHAPE,
    BROADCAST,
    CHAINS,
    PAIRS,
    Chooser,
    Made,
    batch_norm,
    linear,
    makers,
    pointwise_convolution,
    same_convolution,
    scale,
)

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

#: The largest value of a random model, in elements, and the largest number in it: what grows further tells nothing.
MOST_ELEMENTS = 4096
LARGEST = 1e4

#: What a model returns, by the number of values.
STRUCTURES = {
    1: ("{0}", "{0}", "({0},)", "{{'out': {0}}}", "[{0}, 3]", "({0}, {0}.new_ones(2))", "OrderedDict(out={0})"),
    2: ("({0}, {1})", "{{'a': {0}, 'b': {1}}}", "[{0}, ({1}, None)]", "Pair({0}, {1})", "OrderedDict(a={0}, b={1})"),
    3: ("({0}, {1}, {2})", "{{'first': {0}, 'rest': [{1}, {2}]}}", "Pair({0}, [{1}, {2}])", "[Pair({0}, {1}), {2}]"),
}

#: Draws of several steps that belong together.
_RARE = ["branches", "residual", "again", "broadcast", "chain", "chain", "meeting", "meeting"]

#: Errors by which PyTorch says that a step does not fit the value that it reads.
_DOES_NOT_FIT = (RuntimeError, ValueError, TypeError, IndexError, AssertionError, NotImplementedError)


def recipes(most_steps: int = 10) -> SearchStrategy[Recipe]:
    """A Hypothesis strategy; shrinks to few steps, simple layers and small sizes."""
    from hypothesis import strategies as st

    @st.composite
    def draw_one(draw: st.DrawFn) -> Recipe:
        return draw_recipe(Chooser(lambda low, high: draw(st.integers(low, high))), most_steps)

    return draw_one()


def draw_recipe(choose: Chooser, most_steps: int = 10) -> Recipe:
    """A recipe of a model that runs, of up to ``most_steps`` draws, some of which add a few steps."""
    drawing = _Drawing(choose)
    for _ in range(choose.number(1, most_steps)):
        drawing.step()
    return drawing.finished()


class _Drawing:
    """A recipe under way, with what each value is on a call."""

    def __init__(self, choose: Chooser) -> None:
        self.choose = choose
        rank = choose.pick([2, 2, 2, 1, 0, 3])
        channels = choose.pick([4, 3, 6, 2, 8, 1])
        low, high = {0: (1, 1), 1: (4, 11), 2: (4, 9), 3: (3, 5)}[rank]
        size = choose.numbers(low, high, rank)
        self.inputs: list[tuple[str, Shape]] = []
        for index in range(choose.pick([1, 1, 1, 2, 3])):
            other = choose.pick([channels, channels, 3]) if index else channels
            self.inputs.append((f"x{index}", (2, other, *size)))
        generator = torch.Generator().manual_seed(0)
        self.values = {name: torch.randn(shape, generator=generator) for name, shape in self.inputs}
        self.layers: dict[str, str] = {}
        self.made = SimpleNamespace()  # the layers themselves
        self.steps: list[Step] = []

    def step(self) -> None:
        """Draw one more step, or a few that belong together; what does not run is left out."""
        kind = self.choose.pick(["layer"] * 9 + ["pair"] * 4 + _RARE)
        {
            "layer": self._layer, "pair": self._pair, "branches": self._branches, "residual": self._residual,
            "again": self._again, "broadcast": self._broadcast, "chain": self._chain, "meeting": self._meeting,
        }[kind]()  # fmt: skip

    def finished(self) -> Recipe:
        """The recipe; it returns the last value, and sometimes others: also inputs as they are, and one twice."""
        names, first = list(self.values), self.inputs[0][0]
        count = self.choose.pick([1, 1, 1, 2, 3])
        others = [*names[::-1], names[-1], first]
        returned = [self.choose.pick([names[-1]] * 19 + [first])]
        returned += [self.choose.pick(others) for _ in range(count - 1)]
        structure = self.choose.pick(STRUCTURES[count])
        ties = self._ties() if self.choose.number(0, 3) == 3 else ()
        seed = self.choose.number(0, 9999)
        return Recipe(
            tuple(self.inputs), tuple(self.layers.items()), ties, tuple(self.steps), tuple(returned), structure, seed
        )

    def _layer(self) -> None:
        self._apply(self._recent())

    def _apply(self, name: str) -> str:
        """One layer or call on the value of this name; the name of the result, or the same where it does not fit."""
        shape = tuple(self.values[name].shape)
        if len(shape) < 2:
            return name
        made = self.choose.pick(makers(shape))(self.choose, shape)
        return self._emit(made, (name,)) or name

    def _pair(self) -> None:
        first = self._recent()
        shape = self.values[first].shape
        others = [name for name, value in self.values.items() if value.shape == shape and name != first]
        second = self.choose.pick(others[::-1]) if others else first
        self._emit(Made(self.choose.pick(PAIRS)), (first, second))

    def _broadcast(self) -> None:
        """A gate or an offset for each channel, from the value itself or from another one."""
        first = self._recent()
        value = self.values[first]
        fits = [name for name, other in self.values.items() if _broadcasts(other, value)]
        if fits:
            self._emit(Made(self.choose.pick(BROADCAST)), (first, self.choose.pick(fits[::-1])))
        elif 2 < value.dim() <= 5:
            conv = f"nn.Conv{value.dim() - 2}d({value.shape[1]}, {value.shape[1]}, 1)"
            pooled = self._emit(Made(f"{{0}}.mean({tuple(range(2, value.dim()))}, keepdim=True)"), (first,))
            gate = None if pooled is None else self._emit(Made("{m}({0})", conv), (pooled,))
            if gate is not None:
                self._emit(Made(self.choose.pick(BROADCAST)), (first, gate))

    def _branches(self) -> None:
        """Layers on one value that meet again."""
        source = self._recent()
        ends = []
        for _ in range(self.choose.number(2, 3)):
            end = source
            for _ in range(self.choose.number(1, 2)):
                end = self._apply(end)
            ends.append(end)
        if len({self.values[end].shape for end in ends}) == 1:
            code = self.choose.pick(
                [" + ".join(f"{{{index}}}" for index in range(len(ends))), _concatenated(len(ends))]
            )
            self._emit(Made(code), tuple(ends))

    def _residual(self) -> None:
        """A few layers with a skip connection around them, if they keep the shape."""
        source = self._recent()
        end = source
        for _ in range(self.choose.number(1, 4)):
            before = end
            end = self._apply(end)
            if self.values[end].shape != self.values[source].shape:
                end = before
        code = self.choose.pick(["{0} + {1}", "{1} + {0}", "{y0} = {0}\n{y0} += {1}", "F.relu({0} + {1})"])
        self._emit(Made(code), (end, source))

    def _chain(self) -> None:
        """Layers in a row, at times with a skip connection around them."""
        source = end = self._recent()
        for maker in self.choose.pick(CHAINS):
            shape = tuple(self.values[end].shape)
            if len(shape) in (3, 4, 5) or maker in ANY_SHAPE:
                end = self._emit(maker(self.choose, shape), (end,)) or end
        if end != source and self.values[end].shape == self.values[source].shape and self.choose.flag():
            self._emit(Made("{0} + {1}"), (end, source))

    def _meeting(self) -> None:
        """A layer behind a sum or a concatenation of layers, of different values where there are some."""
        sources = [self._recent() for _ in range(self.choose.number(2, 4))]
        shapes = {tuple(self.values[source].shape) for source in sources}
        if len(shapes) > 1 or len(next(iter(shapes))) > 5:
            return
        (shape,) = shapes
        maker = self.choose.pick([same_convolution, batch_norm, scale] if len(shape) > 2 else [batch_norm, linear])
        made = maker(self.choose, shape)
        ends = [self._emit(made, (source,)) for source in sources]
        if None in ends:
            return
        meet = self.choose.pick(["{0} + {1}", "{0} - {1}", _concatenated(len(sources))])
        end = self._emit(Made(meet), tuple(filter(None, ends)))
        if end is not None:
            behind = self.choose.pick([pointwise_convolution, batch_norm] if len(shape) > 2 else [batch_norm, linear])
            self._emit(behind(self.choose, tuple(self.values[end].shape)), (end,))

    def _again(self) -> None:
        """A layer that is called once more, of another value or of the same, by its name or by another."""
        used = [step for step in self.steps if step.layer is not None and len(step.results) == 1]
        if used:
            step = self.choose.pick(used[::-1])
            inputs = step.inputs if self.choose.flag() else tuple(self._recent() for _ in step.inputs)
            is_module = isinstance(getattr(self.made, str(step.layer)), nn.Module)
            other = f"self.{step.layer}" if is_module and self.choose.flag() else None
            self._emit(Made(step.code, other), inputs, step.layer)

    def _recent(self) -> str:
        """A value, rather one of the last."""
        names = list(self.values)[::-1]
        return names[min(self.choose.pick([0, 0, 0, 0, 1, 1, 2, 3, 5, 8]), len(names) - 1)]

    def _emit(self, made: Made, inputs: tuple[str, ...], layer: str | None = None) -> str | None:
        """Add the step if it runs; the name of its last result."""
        number = len(self.steps)
        if made.layer is not None:
            layer = f"m{number}"
        count = len(self.values)
        results = tuple(f"v{count + index}" for index in range(made.results))
        code = made.code if "{y0}" in made.code else f"{{y0}} = {made.code}"
        step = Step(code, inputs, results, layer)
        try:
            found = self._run(step, made.layer)
        except _DOES_NOT_FIT:
            return None
        if not all(_is_sensible(value) for value in found.values()):
            return None
        self.values.update(found)
        self.steps.append(step)
        if made.layer is not None and layer is not None:
            self.layers[layer] = made.layer
        return results[-1]

    def _run(self, step: Step, constructor: str | None) -> dict[str, Tensor]:
        """The results of a step; values that it overwrites are copies until it has run through."""
        copies = {name: self.values[name].clone() for name in step.inputs}
        scope: dict[str, Any] = {"torch": torch, "F": F, "nn": nn, "self": self.made, **copies}
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if constructor is not None and step.layer is not None:
                made = eval(constructor, scope)
                setattr(self.made, step.layer, made.eval() if isinstance(made, nn.Module) else made)
            exec(step.text, scope)
        return {name: scope[name] for name in step.results}

    def _ties(self) -> tuple[tuple[str, str], ...]:
        """Two layers of one kind that share a weight."""
        kinds: dict[str, str] = {}
        for name, constructor in self.layers.items():
            if constructor.startswith(("nn.Conv", "nn.Linear")) and constructor in kinds:
                return ((name, kinds[constructor]),)
            kinds[constructor] = name
        return ()


def _is_sensible(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.numel() > MOST_ELEMENTS or value.numel() == 0 or value.shape[:1] != (2,):
        return False
    return bool(value.isfinite().all()) and float(value.abs().max()) < LARGEST and 2 <= value.dim() <= 5


def _broadcasts(other: Tensor, value: Tensor) -> bool:
    if other.dim() != value.dim() or other.shape == value.shape:
        return False
    return all(n in (1, m) for n, m in zip(other.shape[1:], value.shape[1:], strict=True))


def _concatenated(count: int) -> str:
    return f"torch.cat([{', '.join(f'{{{index}}}' for index in range(count))}], 1)"
