"""Does a traced value answer what it can know, and nothing that it cannot?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from rgc.traced_value import AnsweringTracer

X, MANY, LARGE = torch.randn(2, 3, 6, 6), torch.randn(19, 3, 6, 6), torch.randn(19, 3, 15, 18)


def asked(question: Callable[[Any], Any], probes: list[Tensor], sizes_are_constant: bool) -> Any:
    """What ``question`` is told of a traced tensor that is known by ``probes``; proxies come as they are."""
    answers: list[Any] = []

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            answers.append(question(x))
            return x

    tracer = AnsweringTracer([{"x": probe} for probe in probes], "sizes" if sizes_are_constant else "nothing")
    tracer.is_answering = True
    tracer.trace(Model())
    return answers[0]


@pytest.mark.parametrize(("question", "answer"), [
    (lambda x: x.ndim, 4),
    (lambda x: x.relu().flatten(1).dim(), 2),
    (lambda x: len(x.shape), 4),
    (lambda x: x.is_cuda, False),
    (lambda x: x.requires_grad, False),
    (lambda x: x.dtype == torch.float16, False),
    (lambda x: x.device.type != "cpu", False),
    (lambda x: x.is_floating_point(), True),
    (lambda x: (x > 0).is_floating_point(), False),
    (lambda x: x.shape[1], 3),
    (lambda x: x.size(1), 3),
])  # fmt: skip
def test_what_is_the_same_at_every_size_is_a_constant(question: Callable[[Any], Any], answer: Any) -> None:
    assert asked(question, [X, LARGE], False) == answer and asked(question, [X, MANY], True) == answer


@pytest.mark.parametrize("question", [
    lambda x: x.shape[0], lambda x: x.shape[2], lambda x: x.size(3), lambda x: x.shape[2] % 2, lambda x: x.numel(),
])  # fmt: skip
def test_a_size_that_may_change_stays_a_symbol(question: Callable[[Any], Any]) -> None:
    assert isinstance(asked(question, [X, LARGE], False), fx.Proxy)


def test_at_the_size_of_the_example_all_but_the_batch_is_a_constant() -> None:
    batch, *rest = asked(lambda x: x.shape, [X, MANY], True)
    assert isinstance(batch, fx.Proxy) and rest == [3, 6, 6]
    assert asked(lambda x: [row.dim() for row in x.transpose(0, 1)], [X, MANY], True) == [3, 3, 3]
    assert isinstance(asked(lambda x: x.flatten(0, 1).shape[0], [X, MANY], True), fx.Proxy)


@pytest.mark.parametrize("question", [
    lambda x: x.max().item(), lambda x: x.nonzero().shape[0], lambda x: x[x > 0].shape[0], lambda x: x.argmax().item(),
])  # fmt: skip
def test_what_depends_on_values_stays_a_symbol(question: Callable[[Any], Any]) -> None:
    assert isinstance(asked(question, [X, MANY], True), fx.Proxy)


def test_a_loop_over_the_batch_is_refused() -> None:
    for sizes_are_constant, other in ((False, LARGE), (True, MANY)):
        with pytest.raises(fx.proxy.TraceError, match="Proxy object cannot be iterated"):
            asked(lambda x: [image.relu() for image in x], [X, other], sizes_are_constant)
        with pytest.raises(RuntimeError, match="'len' is not supported"):
            asked(len, [X, other], sizes_are_constant)
