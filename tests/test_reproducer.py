"""Is the program that shows a fault one that runs and shows it?"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgc.reproducer import program, source_of


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
        self.gate = nn.Parameter(torch.ones(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x)) * self.gate
        return torch.cat([y, y.mean((2, 3), keepdim=True).expand_as(y)], 1)


def test_the_source_of_a_model_is_like_it_but_for_the_weights() -> None:
    model = Mixed().eval()
    source = source_of(model)
    assert source is not None and "nn.Conv2d(3, 4, 3, padding=1, padding_mode='circular')" in source
    names: dict[str, type[nn.Module]] = {}
    exec(source, {"torch": torch, "nn": nn}, names)
    again = names["Model"]()
    with torch.no_grad():
        for new, old in zip(again.parameters(), [model.gate, *model.conv.parameters()], strict=True):
            new.copy_(old)
    x = torch.randn(2, 3, 5, 6)
    assert torch.equal(again(x), model(x))


def test_a_model_that_cannot_be_written_down_has_no_program() -> None:
    class Own(nn.Conv2d):
        pass

    class Asking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    assert source_of(nn.Sequential(nn.MultiheadAttention(4, 2))) is None
    assert program("no", Asking(), (2, 3), name="fold", file=None) == ""


PASS = """
from rgc import BatchNorm, Conv, Value, rewrite


@rewrite(lambda x, conv, bn: bn(conv(x)))
def twice(x: Value, conv: Conv, bn: BatchNorm) -> Value:
    return (bn.as_linear() @ bn.as_linear() @ conv)(x)
"""


def test_the_program_runs_and_shows_the_failure(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PASS)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    for fixed_size in (False, True):
        text = program(
            "it is not equal", model, (2, 3, 6, 6), name="twice", file=str(tmp_path / "mine.py"), fixed_size=fixed_size
        )
        assert text.startswith("# it is not equal\n")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile(text, "<program>", "exec"), {})  # its last line holds: rgc has undone what is wrong
        assert "Failure(rewrite='twice'" in said.getvalue() and "differs by" in said.getvalue()
