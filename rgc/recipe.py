"""What is a random model, as data? A recipe: layers by name, steps that call them, and the source code that it says.

The source code is the one meaning of a recipe: the model that is compiled is what Python makes of it, and a reproducer
prints it. A recipe is data, so a failing one is made smaller by leaving steps out.
"""

from __future__ import annotations

import re
import textwrap
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]

#: The named tuple that a model may return.
PAIR = "Pair"


@dataclass(frozen=True)
class Step:
    """A line or two of ``forward``.

    code: the lines, with ``{0}``, ``{1}`` for what is read, ``{y0}``, ``{y1}`` for the results and ``{m}`` for the
    layer. inputs, results: names of values. layer: the name of the layer that is called, if any.

    >>> print(Step("{y0} = {m}({0})", ("x0",), ("v0",), "m0").text)
    v0 = self.m0(x0)
    """

    code: str
    inputs: tuple[str, ...]
    results: tuple[str, ...] = ()
    layer: str | None = None

    @property
    def text(self) -> str:
        """The lines as they stand in ``forward``."""
        named = {f"y{index}": name for index, name in enumerate(self.results)}
        return self.code.format(*self.inputs, m=f"self.{self.layer}", **named)


@dataclass(frozen=True)
class Recipe:
    """A model and a call of it.

    inputs: name and shape of each argument. layers: name and constructor of each layer, parameter, buffer or number.
    ties: pairs of layers of which the first has the weight of the second. steps: in order. returned: the names of the
    values that ``forward`` returns. structure: how, with ``{0}``, ``{1}`` for them. seed: of all weights and inputs.
    """

    inputs: tuple[tuple[str, Shape], ...]
    layers: tuple[tuple[str, str], ...]
    ties: tuple[tuple[str, str], ...]
    steps: tuple[Step, ...]
    returned: tuple[str, ...]
    structure: str = "{0}"
    seed: int = 0

    @cached_property
    def source(self) -> str:
        """The source code of the class ``Model``."""
        used = self._used_layers | {name for pair in self._used_ties for name in pair}
        named = [f"{PAIR} = namedtuple({PAIR!r}, ['first', 'second'])", ""] if f"{PAIR}(" in self.structure else []
        made = [f"self.{name} = {constructor}" for name, constructor in self.layers if name in used]
        tied = [f"self.{first}.weight = self.{second}.weight" for first, second in self._used_ties]
        body = [*(step.text for step in self.steps), f"return {self.structure.format(*self.returned)}"]
        arguments = "".join(f", {name}" for name, _ in self.inputs)
        return "\n".join([
            *named,
            "class Model(nn.Module):",
            "    def __init__(self):",
            *(textwrap.indent(line, 8 * " ") for line in ("super().__init__()", *made, *tied)),
            "",
            f"    def forward(self{arguments}):",
            *(textwrap.indent(line, 8 * " ") for line in body),
        ])  # fmt: skip

    @property
    def overwrites(self) -> bool:
        """Does it write to a tensor? A view that sees a part of that is beyond symbolic tracing."""
        written = re.compile(r"inplace=True|[-+*/]= |\w_\(|\] = ")
        layers = dict(self.layers)
        return any(written.search(f"{step.text} {layers.get(step.layer or '', '')}") for step in self.steps)

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model with random weights, in evaluation mode; the same ones every time."""
        from rgc.testing import randomize

        namespace: dict[str, Any] = {"torch": torch, "F": F, "nn": nn}
        namespace |= {"OrderedDict": OrderedDict, "namedtuple": namedtuple}
        exec(compile(self.source, "<recipe>", "exec"), namespace)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model: nn.Module = namespace["Model"]()
        return randomize(model, self.seed).to(dtype)

    def call(self, dtype: torch.dtype = torch.float32, batch: int = 2, wider: int = 0) -> tuple[Tensor, ...]:
        """Random arguments, with ``batch`` samples, and ``wider`` more positions on each spatial axis."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = [(batch, shape[1], *(n + wider for n in shape[2:])) for _, shape in self.inputs]
        return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)

    def pruned(self) -> Recipe:
        """Without steps that nothing returned depends on, and without layers and arguments that no step reads."""
        needed = set(self.returned)
        kept: list[Step] = []
        for step in reversed(self.steps):
            if needed & {*step.results, *(step.inputs if not step.results else ())}:
                needed |= set(step.inputs)
                kept.append(step)
        layers = replace(self, steps=tuple(kept))._used_layers | {name for pair in self.ties for name in pair}
        return replace(
            self,
            inputs=tuple(each for each in self.inputs if each[0] in needed) or self.inputs[:1],
            layers=tuple(each for each in self.layers if each[0] in layers),
            steps=tuple(reversed(kept)),
        )

    def smaller(self) -> Iterator[Recipe]:
        """Recipes that leave something out; not all of them run."""
        for name in self.returned if len(self.returned) > 1 or self.structure != "{0}" else ():
            yield replace(self, returned=(name,), structure="{0}")
        for name in dict.fromkeys(used for step in reversed(self.steps) for used in step.inputs):
            yield replace(self, returned=(name,), structure="{0}").pruned()
        if (pruned := self.pruned()) != self:
            yield pruned
        for tie in self.ties:
            yield replace(self, ties=tuple(each for each in self.ties if each != tie))
        for index in reversed(range(len(self.steps))):
            yield from self._without(index)

    def _without(self, index: int) -> Iterator[Recipe]:
        """Without one step: who reads its results reads an earlier value."""
        step, rest = self.steps[index], self.steps[:index] + self.steps[index + 1 :]
        earlier = [*step.inputs, *(name for before in self.steps[:index] for name in before.results)]
        for name in dict.fromkeys([*earlier, *(name for name, _ in self.inputs)]) if step.results else [""]:
            other = dict.fromkeys(step.results, name)
            steps = tuple(replace(each, inputs=tuple(other.get(used, used) for used in each.inputs)) for each in rest)
            yield replace(self, steps=steps, returned=tuple(other.get(used, used) for used in self.returned))

    @property
    def _used_layers(self) -> set[str | None]:
        """The layers that are called, and those of which one that is called is another name (``self.m1 = self.m0``)."""
        used = {step.layer for step in self.steps}
        for name, constructor in reversed(self.layers):
            if name in used and constructor.startswith("self."):
                used.add(constructor.removeprefix("self."))
        return used

    @property
    def _used_ties(self) -> list[tuple[str, str]]:
        used = {step.layer for step in self.steps}
        return [pair for pair in self.ties if set(pair) <= used]


def reduced(recipe: Recipe, fails: Callable[[Recipe], bool], attempts: int = 400) -> Recipe:
    """The smallest recipe found that still ``fails``, by leaving out whatever can go; at most so many attempts."""
    while True:
        for candidate in recipe.smaller():
            if attempts == 0:
                return recipe
            attempts -= 1
            if candidate != recipe and _runs(candidate) and fails(candidate):
                recipe = candidate
                break
        else:
            return recipe


def script(
    recipe: Recipe, options: Mapping[str, Any], dtype: torch.dtype, reason: str, *, by_name: bool = False
) -> str:
    """A Python program that shows the failure: it stops with an error as long as there is one."""
    arguments = ", ".join(f"{key}={value!r}" for key, value in options.items())
    shapes = ", ".join(f"{name!r}: torch.randn({', '.join(map(str, shape))})" for name, shape in recipe.inputs)
    copies = "{name: x.clone() for name, x in inputs.items()}"
    example, call = (copies, f"**{copies}") if by_name else (f"tuple({copies}.values())", f"*{copies}.values()")
    return "\n".join([
        *(f"# {line}" for line in reason.splitlines()),
        "from collections import OrderedDict, namedtuple",
        "",
        "import torch",
        "import torch.nn.functional as F",
        "from torch import nn",
        "from torch.utils._pytree import tree_leaves",
        "",
        "import rgc",
        "from rgc.testing import randomize",
        "",
        "",
        recipe.source,
        "",
        "",
        f"torch.manual_seed({recipe.seed})",
        f"model = randomize(Model(), {recipe.seed}).to({dtype})",
        f"inputs = {{name: x.to({dtype}) for name, x in {{{shapes}}}.items()}}",
        f"compiled = rgc.compile(model, {example}, {arguments})",
        "assert not compiled.report.failures, compiled.report.failures",
        "with torch.no_grad():",
        f"    expected, found = (tree_leaves(f({call})) for f in (model, compiled))",
        "assert len(expected) == len(found), (expected, found)",
        "for a, b in ((a, b) for a, b in zip(expected, found) if isinstance(a, torch.Tensor)):",
        "    print(compiled.report.tier, (a - b).abs().max().item() / a.abs().max().item())",
        "    torch.testing.assert_close(a, b)",
    ]) + "\n"  # fmt: skip


def _runs(recipe: Recipe) -> bool:
    """Is it a model at all? Of what was left out, something may be missing."""
    try:
        with torch.no_grad():
            recipe.model()(*recipe.call())
    except (RuntimeError, ValueError, TypeError, IndexError, NameError, AttributeError):
        return False
    return True
