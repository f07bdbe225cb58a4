"""How does the author of a pass test it? Its examples, with weights that hide nothing, and random models.

from rgc.testing import check

def test_my_rewrite() -> None:
    check(my_rewrite)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from rgc.errors import RgcError
from rgc.rewrite import Pass

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from rgc.fuzzing import Tally
    from rgc.recipe import Recipe

Model = TypeVar("Model", bound=nn.Module)


class ExampleError(RgcError, AssertionError):
    """A pass does not do what its examples say, or has none, or is wrong beyond them."""


def check(pass_: Pass, *, thorough: bool = True) -> None:
    """Try a pass in every way, and raise `ExampleError` with all that is wrong with it, in plain words.

    On each of its examples it must fire, or leave the model alone and say why, under several random weights. On random
    integers, where nothing rounds, what it makes must be equal to the last bit. Models like its examples, with other
    strides, groups, borders, readers and sizes, and random ones must stay equal. And small faults that are planted in
    its source must be noticed by its examples. ``thorough=False``: only the examples. All of it takes a quarter to one
    minute for most passes; `rgc test` prints more of what it finds.

    >>> from rgc.passes import merge_stage
    >>> check(merge_stage, thorough=False)
    """
    from rgc.examination import examine, told

    examination = examine(pass_, thorough=thorough)
    if not examination.ok:
        raise ExampleError("\n".join(told(examination)))


def randomize(model: Model, seed: int = 0) -> Model:
    """``model`` in eval mode with random norm statistics, gamma of both signs, and random biases; in place.

    Fresh models hide bugs: with the statistics of a new batch norm, and with zero biases, every border is right. So
    every other parameter whose elements are all the same (a layer scale of 1e-5, a head of zeros) becomes random as
    well, of both signs, and of a size that keeps the activations where they are. Left alone are the slopes of
    ``nn.PReLU`` and what is frozen (``requires_grad=False``): there a constant is meant, such as a decayed lambda.

    >>> bn = randomize(nn.BatchNorm2d(64))
    >>> bool((bn.weight < 0).any()), bool((bn.weight > 0).any()), bn.training
    (True, True, False)
    """
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: Tensor | None, low: float, high: float) -> None:
        if tensor is not None:
            drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(low + (high - low) * drawn)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                fill(module.running_mean, -0.5, 0.5)
                # PyTorch's own initialisation shrinks a layer's output to a variance of about 1/3
                fill(module.running_var, 0.2, 0.8)
                fill(module.weight, 0.5, 1.5)
                if module.weight is not None:
                    module.weight.mul_(_signs(module.weight.shape, generator).to(module.weight))
            fill(module._parameters.get("bias"), -0.5, 0.5)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm) and module.weight is not None:
                fill(module.weight, 0.5, 1.5)
                module.weight.mul_(_signs(module.weight.shape, generator).to(module.weight))
        meant = {id(slope) for module in model.modules() if isinstance(module, nn.PReLU) for slope in [module.weight]}
        for parameter in model.parameters():
            if parameter.requires_grad and id(parameter) not in meant and _is_constant(parameter):
                fill(parameter, 0.4, 1.0)
                inputs = parameter[0].numel() if sum(n > 1 for n in parameter.shape) > 1 else 1
                parameter.mul_(_signs(parameter.shape, generator).to(parameter) / inputs**0.5)
    model.eval()  # which returns None in models of other people
    return model


def graphs(most_steps: int = 10) -> SearchStrategy[Recipe]:
    """A Hypothesis strategy of random models that run: a `Recipe` has a ``model()``, a ``call()`` and its ``source``.

    They have up to ``most_steps`` draws of layers and calls, branches, sums, concatenations, shared modules, tied
    weights and values that are overwritten, on one to three inputs with no to three spatial axes.

    >>> from hypothesis import given, settings
    >>> @settings(max_examples=5, deadline=None)
    ... @given(graphs(most_steps=3))
    ... def test(recipe):
    ...     recipe.model()(*recipe.call())
    >>> test()
    """
    from rgc.graphs import recipes

    return recipes(most_steps)


def fuzz(
    examples: int = 300,
    *,
    seed: int = 0,
    first: int = 0,
    most_steps: int = 10,
    passes: Sequence[Any] | None = None,
    progress: Callable[[Tally], None] = lambda _: None,
) -> Tally:
    """Compile so many random models, each in a way of its own, and compare with eager PyTorch in float64.

    Each is compiled with one of ``passes`` (what `rgc.compile` takes for them; by default every set of built-in ones)
    and one of the objectives, in float64, float32, float16 or bfloat16. The same ``seed`` draws the same models, of
    which those from number ``first`` on are compiled. A `Fault` among the ``faults`` of the result is as small as it
    was made, and ``fault.script`` is a Python program that shows it.

    >>> tally = fuzz(3, most_steps=2)
    >>> tally.examples, tally.faults
    (3, [])
    """
    from rgc.fuzzing import run

    return run(examples, seed=seed, first=first, most_steps=most_steps, passes=passes, progress=progress)


def _signs(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Signs at random, both of them where there is room for two."""
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    if signs.numel() > 1:
        signs.view(-1)[0], signs.view(-1)[-1] = 1, -1
    return signs


def _is_constant(parameter: Tensor) -> bool:
    flat = parameter.flatten()
    return parameter.is_floating_point() and flat.numel() > 0 and bool((flat == flat[0]).all())


__all__ = ["ExampleError", "check", "fuzz", "graphs", "randomize"]
