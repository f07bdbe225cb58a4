"""Does every runtime run the model that it was given, as the setting says, and say why where it cannot?"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rgc
from rgc.errors import InputError
from rgc.example import Example
from rgc.runtimes import RUNTIMES, Runner, Setting
from rgc.testing import randomize

COMPILERS = ("c++", "g++", "clang++", "cl")
if not any(map(shutil.which, COMPILERS)):  # what torch.compile needs on the CPU
    RUNTIMES = tuple(name for name in RUNTIMES if name != "torch.compile")

SETTING = Setting("eager", batch=2, threads=1, device=torch.device("cpu"))


def model() -> nn.Module:
    torch.manual_seed(0)
    return randomize(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)))


def example() -> Example:
    return Example((torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0)),))


def result(found: Any) -> Tensor:
    """The one tensor of what a runtime returns."""
    return torch.from_numpy(found[0]) if isinstance(found, list) and isinstance(found[0], np.ndarray) else found


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_runtime_computes_what_the_model_computes(runtime: Any) -> None:
    net, given = model(), example()
    with Runner(net, "net") as runner, torch.no_grad():
        call = runner.call(given, replace(SETTING, runtime=runtime))
        torch.testing.assert_close(result(call()), net(*given.args), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result(call()), net(*given.args), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 5])
def test_an_export_serves_other_batches(batch: int) -> None:
    net, given = model(), example()
    with Runner(net, "net") as runner, torch.no_grad():
        runner.call(given, replace(SETTING, runtime="onnxruntime"))
        other = given.redrawn(batch)
        call = runner.call(other, replace(SETTING, runtime="onnxruntime", batch=batch))
        torch.testing.assert_close(result(call()), net(*other.args), rtol=1e-4, atol=1e-5)


class OneBatch(nn.Module):
    """Holds for each batch on its own: its reshape has the number in it when it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(int(x.shape[0]) * 3, -1) * float(x.shape[0])


def test_a_model_that_exports_for_one_batch_is_exported_for_each() -> None:
    net, given = OneBatch().eval(), example()
    with Runner(net, "net") as runner, torch.no_grad():
        for batch in (2, 4):
            other = given.redrawn(batch)
            call = runner.call(other, replace(SETTING, runtime="onnxruntime", batch=batch))
            torch.testing.assert_close(result(call()), net(*other.args))


def test_dtype_and_memory_format_are_those_of_the_setting_and_the_model_stays_as_it_is() -> None:
    net, given = model(), example()
    seen: list[Tensor] = []
    net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with Runner(net, "net") as runner, torch.no_grad():
        call = runner.call(given, replace(SETTING, dtype=torch.bfloat16, channels_last=True))
        assert call().dtype == torch.bfloat16  # type: ignore[attr-defined]
    assert seen[0].dtype == torch.bfloat16 and seen[0].is_contiguous(memory_format=torch.channels_last)
    assert next(net.parameters()).dtype == torch.float32 and next(net.parameters()).is_contiguous()


def test_an_onnx_file_runs_in_onnxruntime_only(tmp_path: Path) -> None:
    net, given = model(), example()
    rgc.save(rgc.compile(net, *given.args), tmp_path / "net.onnx")
    with Runner(rgc.load(tmp_path / "net.onnx"), "net.onnx") as runner, torch.no_grad():
        call = runner.call(given, replace(SETTING, runtime="onnxruntime"))
        torch.testing.assert_close(result(call()), net(*given.args), rtol=1e-4, atol=1e-5)
        with pytest.raises(InputError, match=r"net\.onnx is an ONNX file, which runs in onnxruntime only"):
            runner.call(given, SETTING)
        with pytest.raises(InputError, match=r"net\.onnx is an ONNX file, whose dtype is fixed"):
            runner.call(given, replace(SETTING, runtime="onnxruntime", dtype=torch.float16))


def test_an_exported_program_runs_everywhere(tmp_path: Path) -> None:
    net, given = model(), example()
    rgc.save(rgc.compile(net, *given.args), tmp_path / "net.pt2")
    with Runner(rgc.load(tmp_path / "net.pt2"), "net.pt2") as runner, torch.no_grad():
        for runtime in RUNTIMES:
            call = runner.call(given, replace(SETTING, runtime=runtime))
            torch.testing.assert_close(result(call()), net(*given.args), rtol=1e-4, atol=1e-5)


def test_what_does_not_run_says_why() -> None:
    with Runner(model(), "net") as runner, torch.no_grad():
        with pytest.raises(InputError, match="it does not run: RuntimeError: "):
            runner.call(Example((torch.randn(2, 5, 9, 8),)), SETTING)
        with pytest.raises(InputError, match="onnxruntime takes no bfloat16"):
            runner.call(example(), replace(SETTING, runtime="onnxruntime", dtype=torch.bfloat16))
        with pytest.raises(InputError, match="onnxruntime is measured on the CPU only"):
            runner.call(example(), replace(SETTING, runtime="onnxruntime", device=torch.device("cuda")))


def test_a_setting_reads_as_words() -> None:
    assert str(SETTING) == "eager, batch 2, 1 thread"
    assert str(replace(SETTING, threads=2)) == "eager, batch 2, 2 threads"
    assert str(replace(SETTING, device=torch.device("cuda"))) == "eager, batch 2, cuda"
