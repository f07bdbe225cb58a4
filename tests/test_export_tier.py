"""Does the second tier say what it took for granted about sizes, and refuse what its program would lose?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rgc
from rgc.errors import TraceError
from rgc.example import Example
from rgc.export_tier import trace_by_export


class Model(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.body = forward

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def _on_tall_images(m: Any, x: Tensor) -> Tensor:
    return m.second(m.first(x)) if x.shape[2] > 8 else m.first(x)


def _on_multiples_of_three(m: Any, x: Tensor) -> Tensor:
    return m.second(m.first(x)) if x.shape[3] % 3 == 2 else m.first(x)


@pytest.fixture
def without_the_first_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rgc.attempt.TIERS", ("torch.export", "submodules"))


@pytest.mark.usefixtures("without_the_first_tier")
@pytest.mark.parametrize(("forward", "right", "wrong", "message"), [
    (_on_tall_images, [(1, 4, 9, 5), (3, 4, 40, 8)], (1, 4, 8, 8), "axis 2 of x is 9 or more"),
    (_on_multiples_of_three, [(1, 4, 9, 8), (3, 4, 5, 8)], (1, 4, 9, 9), "axis 3 of x is 8"),
])  # fmt: skip
def test_a_size_that_steers_forward_is_checked_at_run_time(
    forward: Callable[[Any, Tensor], Tensor], right: list[tuple[int, ...]], wrong: tuple[int, ...], message: str
) -> None:
    model = Model(forward).eval()
    compiled = rgc.compile(model, torch.randn(1, 4, 9, 8))
    assert compiled.report.tier == "torch.export" and compiled.report.fixed_size
    for shape in right:
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), model(x))
    with pytest.raises(AssertionError, match=f"this compiled model holds where {message}; compile it again"):
        compiled(torch.randn(wrong))


@pytest.mark.usefixtures("without_the_first_tier")
def test_sizes_that_steer_nothing_stay_free() -> None:
    model = Model(lambda m, x: m.second(m.first(x)) if x.dim() == 4 and not x.is_cuda else x).eval()
    compiled = rgc.compile(model, torch.randn(1, 4, 9, 8))
    assert compiled.report.tier == "torch.export" and not compiled.report.fixed_size
    for shape in ((1, 4, 9, 8), (5, 4, 3, 30)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("forward", [
    lambda m, x: m.first(x) if x.shape[0] > 3 else m.second(x),
    lambda m, x: m.first(x) * len(x),
    lambda m, x: torch.stack([m.first(image[None])[0] for image in x]),
], ids=["in a condition", "as a number", "in a loop"])  # fmt: skip
def test_a_batch_size_that_steers_forward_keeps_the_model_whole(forward: Callable[[Any, Tensor], Tensor]) -> None:
    model = Model(forward).eval()
    with pytest.raises(TraceError, match="batch size"):
        trace_by_export(model, Example((torch.randn(2, 4, 9, 8),)))
    compiled = rgc.compile(model, torch.randn(2, 4, 9, 8))
    assert compiled.report.tier == "submodules"
    for batch in (1, 2, 5):
        x = torch.randn(batch, 4, 9, 8)
        torch.testing.assert_close(compiled(x), model(x))


def _counts(m: Any, x: Tensor) -> Tensor:
    m.count += 1
    return m.first(x)


def _autocasts(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.first(x)


@pytest.mark.parametrize(("forward", "message"), [
    (_counts, "forward overwrites its buffers or its inputs"),
    (lambda m, x: m.first(x.mul_(2)), "forward overwrites its buffers or its inputs"),
    (_autocasts, "forward turns autocast on or off, which a graph cannot hold"),
])  # fmt: skip
def test_what_a_program_would_lose_is_refused(forward: Callable[[Any, Tensor], Tensor], message: str) -> None:
    with pytest.raises(TraceError) as caught:
        trace_by_export(Model(forward).eval(), Example((torch.randn(2, 4, 9, 8),)))
    assert str(caught.value) == message


def test_a_hook_anywhere_is_refused() -> None:
    model = Model(lambda m, x: m.first(x)).eval()
    model.second.register_forward_hook(lambda *_: None)
    with pytest.raises(TraceError, match="forward hooks would be lost"):
        trace_by_export(model, Example((torch.randn(2, 4, 9, 8),)))


def test_a_model_with_autocast_keeps_its_precision(capfd: pytest.CaptureFixture[str]) -> None:
    model = Model(_autocasts).eval()
    x = torch.randn(1, 4, 9, 8)
    compiled = rgc.compile(model, x)
    assert torch.equal(compiled(x), model(x)) and compiled(x).dtype == torch.bfloat16


def test_a_failing_export_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    rgc.compile(Model(lambda m, x: m.first(x) if x.sum() > 0 else x).eval(), torch.randn(1, 4, 9, 8))
    assert capfd.readouterr() == ("", "")
