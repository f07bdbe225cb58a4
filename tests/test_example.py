"""Does a compiled model take the arguments that its original takes, and refuse the others in plain words?"""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import rgc
from rgc.errors import InputError
from rgc.example import Example, copy_model, output_difference, precisely, unchanged_generators

X, Y = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
Pair = namedtuple("Pair", "p q")


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        nn.init.normal_(self.norm.running_mean)
        nn.init.normal_(self.norm.weight)

    def body(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)))  # type: ignore[no-any-return]


def model_of(forward: Callable[..., Any]) -> nn.Module:
    return type(forward.__name__, (Base,), {"forward": forward})().eval()  # type: ignore[no-any-return]


def call(model: Callable[..., Any], example: Any) -> Any:
    example = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, example)
    with torch.no_grad():
        return model(**example) if isinstance(example, dict) else model(*example)


def two(self: Any, x: Tensor, y: Tensor) -> Tensor:
    return self.body(x) - 2 * y


def optional(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    return self.body(x) if mask is None else self.body(x) * mask


def constants(self: Any, x: Tensor, n: int, mode: str = "a", on: bool = True) -> Tensor:
    return (self.body(x) * n if on else x) if mode == "a" else x


def nested(self: Any, given: Any) -> Tensor:
    return self.body(given["a"][0]) * given["k"] + given["a"][1][0]


def summed(self: Any, tensors: Any) -> Tensor:
    return sum(self.body(x) for x in tensors)  # type: ignore[return-value]


def named(self: Any, pair: Any) -> Tensor:
    return self.body(pair.p) + pair.q


def starred(self: Any, x: Tensor, *rest: Tensor, factor: int = 1, **more: Tensor) -> Tensor:
    return self.body(x) + sum(rest) + more["z"] * factor


def keyword_only(self: Any, x: Tensor | None = None, *, y: Tensor) -> Tensor:
    return self.body(x) + y


CALLS: dict[str, tuple[Callable[..., Any], Any]] = {
    "several tensors": (two, (X, Y)),
    "tensors by name, in another order": (two, {"y": Y, "x": X}),
    "an optional tensor that is left out": (optional, (X,)),
    "an optional tensor": (optional, (X, Y)),
    "numbers, strings and flags": (constants, (X, 3, "a")),
    "a nested structure": (nested, ({"a": [X, (Y, X)], "k": 3},)),
    "a list that forward iterates over": (summed, ([X, Y],)),
    "a tuple": (summed, ((X, Y, X),)),
    "a named tuple": (named, (Pair(X, Y),)),
    "starred arguments": (starred, {"x": X, "z": Y, "factor": 2}),
    "a keyword-only tensor behind a default": (keyword_only, {"x": X, "y": Y}),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_traced_and_repeated_with(name: str) -> None:
    forward, example = CALLS[name]
    model = model_of(forward)
    compiled = rgc.compile(model, example)
    assert compiled.report.tier == "torch.fx" and compiled.report.ops_after["BatchNorm2d"] == 0
    assert output_difference(call(model, example), call(compiled, example)) < 1e-5


@pytest.mark.parametrize("name", [name for name in CALLS if name != "starred arguments"])  # export trips over **kwargs
def test_export_takes_the_same_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rgc.attempt.TIERS", ("torch.export", "submodules"))
    forward, example = CALLS[name]
    model = model_of(forward)
    compiled = rgc.compile(model, example)
    assert compiled.report.tier == "torch.export"
    assert output_difference(call(model, example), call(compiled, example)) < 1e-5


@pytest.mark.parametrize("name", CALLS)
def test_a_model_that_stays_whole_takes_the_same_calls(name: str) -> None:
    forward, example = CALLS[name]

    def depends_on_values(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = forward(self, *args, **kwargs)
        return result if result.sum() > -1e9 else None

    depends_on_values.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    model = model_of(depends_on_values)
    compiled = rgc.compile(model, example)
    assert compiled.report.tier == "submodules"
    assert output_difference(call(model, example), call(compiled, example)) < 1e-5


@pytest.mark.parametrize(("forward", "example", "other", "message"), [
    (optional, (X,), (X, Y), "this compiled model holds for mask = None only"),
    (constants, (X, 3), (X, 4), "this compiled model holds for n = 3 only"),
    (constants, (X, 3), (X, 3, "b"), "this compiled model holds for mode = 'a' only"),
    (constants, (X, 3), (X, 3, "a", False), "this compiled model holds for on = True only"),
    (nested, ({"a": [X, (Y, X)], "k": 3},), ({"a": [X, (Y, X)], "k": 4},), "holds for given['k'] = 3 only"),
    (summed, ([X, Y],), ([X, Y, X],), "this compiled model holds for len(tensors) = 2 only"),
])  # fmt: skip
def test_another_constant_than_the_traced_one_is_refused(
    forward: Callable[..., Any], example: Any, other: Any, message: str
) -> None:
    compiled = rgc.compile(model_of(forward), example)
    with pytest.raises(AssertionError) as caught:
        call(compiled, other)
    assert message in str(caught.value)


def test_a_tensor_that_the_trace_computes_with_has_no_default() -> None:
    compiled = rgc.compile(model_of(optional), (X, Y))
    with pytest.raises(TypeError, match="mask"):
        compiled(X)


class Opaque:
    """What no graph can hold."""


def test_an_argument_that_no_graph_can_hold_keeps_the_model_whole() -> None:
    compiled = rgc.compile(model_of(lambda self, x, thing: self.body(x)), (X, Opaque()))
    assert compiled.report.tier == "submodules"
    assert any("the input thing is of type Opaque, which no graph can hold" in note for note in compiled.report.notes)
    compiled(X, Opaque())


def test_an_example_that_does_not_fit_forward_is_refused() -> None:
    with pytest.raises(InputError, match=r"does not run on an input of 2x4x9x8, 2x4x9x8: .*takes 2 positional"):
        rgc.compile(model_of(lambda self, x: self.body(x)), (X, Y))
    with pytest.raises(InputError, match=r"the example does not fit .*: missing a required argument: 'y'"):
        Example((X,)).bind(model_of(two))


@dataclass
class Outputs:
    """A structure that torch.fx has to build by a call."""

    a: Tensor
    b: Tensor


OUTPUTS: dict[str, Callable[[Any, Tensor], Any]] = {
    "a tuple with the input itself": lambda self, x: (x, self.body(x)),
    "a list": lambda self, x: [self.body(x)],
    "a nested dict": lambda self, x: {"a": self.body(x), "b": [x, None, 3, "k"], "c": (x, {"d": x})},
    "the same tensor twice": lambda self, x: [self.body(x)] * 2,
    "an ordered dict": lambda self, x: OrderedDict(out=self.body(x), inner=OrderedDict(x=x)),
    "a named tuple": lambda self, x: Pair(self.body(x), x),
    "a dataclass": lambda self, x: Outputs(self.body(x), x),
    "constants and parameters": lambda self, x: (self.body(x), self.first.weight, torch.ones(3)),
    "sizes": lambda self, x: (self.body(x), x.shape, x.shape[0]),
    "nothing": lambda self, x: None,
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_output_keeps_its_structure_when_it_is(name: str) -> None:
    model = model_of(OUTPUTS[name])
    compiled = rgc.compile(model, X)
    for batch in (1, 2):
        expected, found = call(model, (X[:batch],)), call(compiled, (X[:batch],))
        assert type(expected) is type(found) and output_difference(expected, found) < 1e-5


# --- the parts ---------------------------------------------------------------------------------------------------


def test_a_redrawn_call_has_another_batch_and_integers_of_the_same_kind() -> None:
    drawn = Example((torch.zeros(1, 3, 5), torch.tensor([[7, 9]])), {"flag": True}).redrawn(2)
    image, tokens = drawn.args
    assert image.shape == (2, 3, 5) and image.std() > 0.3
    assert tokens.shape == (2, 2) and set(tokens.flatten().tolist()) <= {7, 9}
    assert drawn.kwargs == {"flag": True}


def test_running_leaves_the_arguments_alone() -> None:
    x = torch.ones(3)
    assert torch.equal(Example((x,)).run(lambda t: t.add_(1)), x + 1)
    assert torch.equal(x, torch.ones(3))


def test_a_model_in_float64_stays_there_whatever_it_casts_to() -> None:
    x = torch.randn(3, dtype=torch.float64)
    with precisely([x]):
        assert torch.equal(x.float().half().to(torch.bfloat16), x)
        assert (x + torch.zeros(3)).dtype == torch.eye(2).dtype == torch.float64
        assert torch.softmax(x, 0, dtype=torch.float32).dtype == torch.float64
        assert torch.arange(3).dtype == torch.int64
    with precisely([x.float()]):
        assert x.float().dtype == torch.float32


def test_a_copied_model_takes_its_plain_tensors_along() -> None:
    model = nn.Linear(2, 2)
    model.shift = torch.ones(2)
    model.computed = model.weight * 2  # has a gradient history, which copy.deepcopy refuses
    copied = copy_model(model, dtype=torch.float64)
    assert copied.shift.dtype == copied.computed.dtype == copied.weight.dtype == torch.float64
    assert copied.shift is not model.shift and model.shift.dtype == torch.float32
    assert copy_model(model, share_parameters=True).weight is model.weight


@pytest.mark.parametrize(("dtype", "wanted"), [
    (torch.float64, torch.complex128), (torch.float32, torch.complex64), (torch.bfloat16, torch.complex64),
])  # fmt: skip
def test_a_copied_model_keeps_the_imaginary_parts_of_its_weights(dtype: torch.dtype, wanted: torch.dtype) -> None:
    model = nn.Linear(2, 2)
    model.filter = nn.Parameter(torch.tensor([1 + 2j]))
    model.register_buffer("phase", torch.tensor([3j]))
    model.plain = torch.tensor([1 - 1j])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as PyTorch warns where it discards them
        copied = copy_model(model, dtype=dtype)
    assert copied.weight.dtype == dtype and copied.filter.dtype == copied.phase.dtype == copied.plain.dtype == wanted
    assert (copied.filter.item(), copied.phase.item(), copied.plain.item()) == (1 + 2j, 3j, 1 - 1j)


def test_random_numbers_drawn_inside_do_not_show_outside() -> None:
    before = torch.random.get_rng_state()
    with unchanged_generators():
        torch.rand(3)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(("expected", "found", "difference"), [
    ({"a": torch.ones(2)}, OrderedDict(a=torch.ones(2)), 0.0),
    (torch.ones(2), torch.ones(3), float("inf")),
    (torch.ones(2), (torch.ones(2), torch.ones(2)), float("inf")),
    (torch.ones(2), 1.0, float("inf")),
    ((torch.ones(2), "a"), (torch.ones(2), "b"), float("inf")),
    (Outputs(X, Y), Outputs(X, Y), 0.0),
    (torch.tensor([2.0]), torch.tensor([1.0]), 0.5),
])  # fmt: skip
def test_outputs_are_compared_leaf_by_leaf(expected: Any, found: Any, difference: float) -> None:
    assert output_difference(expected, found) == difference
