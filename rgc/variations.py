"""On which other models must a pass be right as well? Its examples with another geometry, and among other layers.

An author thinks of the example at hand: a stride of 1, no groups, one reader. Here each layer of an example is made
again with another stride, padding, dilation, border, kernel, groups or bias, and the whole is put behind and before
other layers, called twice, read in the middle, and run at other sizes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rgc.constructors import AVERAGES, CONVOLUTIONS, LINEAR, MAXIMA, NORMS, TRANSPOSED, arguments_of, kinds_of
from rgc.example import copy_model
from rgc.rewrite import Example
from rgc.trial import drawn, made

#: A model into another one; it may change the one that it is given.
Change = Callable[[nn.Module], nn.Module]

_ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.ReLU6, nn.SiLU, nn.ELU, nn.Softplus, lambda: nn.LeakyReLU(0.3),
    lambda: nn.Hardtanh(-0.5, 2.0),
)  # fmt: skip


@dataclass(frozen=True)
class Variation:
    """A model like an example, ``words`` say how it is not the example; ``shape`` is that of its input."""

    example: Example
    words: str
    shape: tuple[int, ...]
    change: Change = lambda model: model

    def build(self) -> nn.Module:
        """The model, with weights that `rgc.testing.randomize` has yet to make random."""
        return self.change(self.example.build())

    def __str__(self) -> str:
        return f"the example {self.example.name!r}{self.words and f' {self.words}'}"


def variations(example: Example) -> Iterator[Variation]:
    """The example with one thing changed, in every way that leaves a model that runs."""
    model = made(example.build, 0, torch.float64)
    for words, change in [*layer_changes(model), *surroundings(model, example.shape)]:
        variation = Variation(example, words, example.shape, change)
        if runs(variation):
            yield variation
    for shape in other_shapes(example.shape):
        variation = Variation(example, f"on an input of {'x'.join(map(str, shape))}", shape)
        if runs(variation):
            yield variation


def random_variation(examples: Sequence[Example], seed: int) -> Variation:
    """One of the examples with up to three layers changed, put among up to two other things, at some size."""
    draw = random.Random(seed)
    example = draw.choice(examples)
    shape = draw.choice([example.shape, *other_shapes(example.shape)])
    found = Variation(example, "", shape)
    if not runs(found):
        found = Variation(example, "", example.shape)
    for step in range(draw.randint(1, 5)):
        model = found.build()
        changes = list(layer_changes(model) if step < 3 else surroundings(model, found.shape))
        for words, change in draw.sample(changes, min(len(changes), 4)):
            earlier = found.change
            tried = Variation(
                example,
                f"{found.words}{', ' * bool(found.words)}{words}",
                found.shape,
                lambda model, earlier=earlier, change=change: change(earlier(model)),  # type: ignore[misc]
            )
            if runs(tried):
                found = tried
                break
    return found


def runs(variation: Variation) -> bool:
    """Does eager PyTorch take it, with a result that is finite and not empty?"""
    try:
        model = made(variation.build, 0, torch.float64)
        with torch.no_grad():
            outputs = model(drawn(variation.shape, 0, torch.float64))
    # A layer that was changed may not fit the next one, and forward is somebody's own code.
    except Exception:
        return False
    leaves = outputs if isinstance(outputs, tuple | list) else [outputs]
    return all(leaf.numel() > 0 and bool(leaf.isfinite().all()) for leaf in leaves if isinstance(leaf, Tensor))


def other_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """One sample; one position, a few, and many, where there are spatial axes."""
    shapes = [(1, *shape[1:])]
    if len(shape) > 2:
        axes = range(len(shape) - 2)
        shapes += [(2, shape[1], *(size + axis for axis in axes)) for size in (1, 4, 13)]
        shapes.append((2, shape[1], *(1 for _ in axes)))
    return list(dict.fromkeys(shapes))


def layer_changes(model: nn.Module) -> Iterator[tuple[str, Change]]:
    """Each layer made again with one argument changed, and pairs of layers with one weight."""
    shared: dict[tuple[Any, ...], str] = {}
    for path, layer in model.named_modules():
        for words, new in _others(layer):
            yield f"with {words} in {_place(path, layer)}", _replacing(path, new)
        weight = getattr(layer, "weight", None)
        if path and isinstance(weight, nn.Parameter):
            first = shared.setdefault((type(layer), weight.shape), path)
            if first != path:
                yield f"with one weight for the layers {first!r} and {path!r}", _tying(path, first)


def surroundings(model: nn.Module, shape: tuple[int, ...]) -> Iterator[tuple[str, Change]]:
    """The model behind and before other layers, called twice, and with its inner values read by others."""
    channels, rank = shape[1], len(shape) - 2
    for words, layers in _neighbours(channels, rank):
        yield f"behind {words}", lambda inner, layers=layers: nn.Sequential(*layers(), inner)  # type: ignore[misc]
    with torch.no_grad():
        output = copy_model(model).double().eval()(drawn(shape, 0, torch.float64))
    if isinstance(output, Tensor) and output.dim() >= 2:
        for words, layers in _neighbours(output.shape[1], output.dim() - 2):
            yield f"before {words}", lambda inner, layers=layers: nn.Sequential(inner, *layers())  # type: ignore[misc]
        if output.shape == shape:
            yield "with a skip connection around it", _Residual
            yield "called on its own result", lambda inner: nn.Sequential(inner, inner)
    yield "called twice, on two inputs", _Twice
    for index, name in enumerate(_inner_values(model)):
        yield f"whose value {name!r} is read elsewhere too", _reading(index)


def _place(path: str, layer: nn.Module) -> str:
    return f"its layer {path!r} ({type(layer).__name__})" if path else f"it ({type(layer).__name__})"


def _replacing(path: str, new: Callable[[], nn.Module]) -> Change:
    def replace(model: nn.Module) -> nn.Module:
        if not path:
            return new()
        model.set_submodule(path, new())
        return model

    return replace


def _tying(path: str, first: str) -> Change:
    def tie(model: nn.Module) -> nn.Module:
        model.get_submodule(path).weight = model.get_submodule(first).weight
        return model

    return tie


def _others(layer: nn.Module) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """What a layer could have been."""
    kinds = kinds_of(layer)
    if kinds is not None:
        own = arguments_of(layer)
        for changed in _arguments(kinds, own):
            words = ", ".join(f"{name}={value!r}" for name, value in changed.items())
            yield words, lambda changed=changed: type(layer)(**{**own, **changed})  # type: ignore[misc]
    elif type(layer) in {type(make()) for make in _ACTIVATIONS}:
        for make in _ACTIVATIONS:
            if type(other := make()) is not type(layer):
                yield str(other), make


def _arguments(kinds: tuple[type[nn.Module], ...], own: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Arguments that differ from a layer's own, a few at a time, so that each makes one point."""
    if kinds is CONVOLUTIONS:
        yield from _of_convolution(own)
    elif kinds is TRANSPOSED:
        yield {"stride": 2 if _is(own["stride"], 1) else 1, "output_padding": 0}
        yield {"stride": 2, "output_padding": 1}
        yield {"padding": 1 if _is(own["padding"], 0) else 0}
        yield {"dilation": 2, "output_padding": 0}
        yield from _of_groups(own)
        yield {"bias": not own["bias"]}
    elif kinds is NORMS:
        yield {"affine": not own["affine"]}
        yield {"track_running_stats": not own["track_running_stats"]}
        yield {"eps": 0.1}
    elif kinds is AVERAGES or kinds is MAXIMA:
        yield {"stride": 1 if not _is(own["stride"], 1) else 2}
        yield {"kernel_size": 3, "stride": 1, "padding": 1}
        yield {"kernel_size": 3, "stride": 2, "padding": 1}
        yield {"kernel_size": 2, "stride": 2, "ceil_mode": True}
        if kinds is AVERAGES:
            yield {"kernel_size": 3, "padding": 1, "count_include_pad": False}
        else:
            yield {"dilation": 2}
    elif kinds is LINEAR:
        yield {"bias": not own["bias"]}


def _of_convolution(own: dict[str, Any]) -> Iterator[dict[str, Any]]:
    is_padded = not _is(own["padding"], 0)
    yield {"stride": 2 if _is(own["stride"], 1) else 1}
    yield {"padding": 0 if is_padded else 1}
    yield {"dilation": 2 if _is(own["dilation"], 1) else 1}
    yield from _of_groups(own)
    yield {"bias": not own["bias"]}
    for mode in ("circular", "reflect", "replicate"):
        if mode != own["padding_mode"]:
            yield {"padding_mode": mode, **({} if is_padded else {"padding": 1})}
    for kernel, padding in ((1, 0), (3, 1), (3, 0), (2, 0), (5, 2)):
        if not (_is(own["kernel_size"], kernel) and _is(own["padding"], padding)):
            yield {"kernel_size": kernel, "padding": padding, "dilation": 1}


def _of_groups(own: dict[str, Any]) -> Iterator[dict[str, Any]]:
    most = math.gcd(own["in_channels"], own["out_channels"])
    for groups in (1, 2, 3, most):
        if groups != own["groups"] and most % groups == 0:
            yield {"groups": groups}


def _is(given: Any, value: int) -> bool:
    return all(each == value for each in given) if isinstance(given, tuple) else bool(given == value)


def _neighbours(channels: int, rank: int) -> Iterator[tuple[str, Callable[[], list[nn.Module]]]]:
    """Layers that keep the shape of a batch with so many channels and spatial axes."""
    yield "a ReLU", lambda: [nn.ReLU()]
    yield "a sigmoid", lambda: [nn.Sigmoid()]
    if rank == 0:
        yield "a linear layer", lambda: [nn.Linear(channels, channels)]
    elif rank <= 3:
        conv, norm = CONVOLUTIONS[rank - 1], NORMS[rank - 1]
        yield "a padded convolution", lambda: [conv(channels, channels, 3, padding=1)]
        yield "a batch norm", lambda: [norm(channels)]
        yield "a 1x1 convolution and a ReLU", lambda: [conv(channels, channels, 1), nn.ReLU()]


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x) + x


class _Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x), self.inner(torch.tanh(x))


def _inner_values(model: nn.Module) -> list[str]:
    """The calls of a model that symbolic tracing sees, but for the last one, whose value is returned anyway."""
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception:  # what forward does with a value that is none may end in any way
        return []
    return [node.name for node in _calls(graph)]


def _calls(graph: fx.Graph) -> list[fx.Node]:
    returned = next(node for node in graph.nodes if node.op == "output").all_input_nodes
    return [node for node in graph.nodes if node.op.startswith("call") and node not in returned]


def _reading(index: int) -> Change:
    """The model that returns also the value of its call of this number."""

    def read(model: nn.Module) -> nn.Module:
        traced = fx.symbolic_trace(model)
        output = next(node for node in traced.graph.nodes if node.op == "output")
        output.args = ((output.args[0], _calls(traced.graph)[index]),)
        traced.recompile()
        return traced

    return read


__all__ = ["Variation", "layer_changes", "other_shapes", "random_variation", "runs", "surroundings", "variations"]
