"""Are the figures of a machine kept for that machine alone, and read back as they were or refused with a reason?"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rgc.calibration import Calibration, Key, cache_folder, machine_name, read_calibration, stored_calibration
from rgc.errors import InputError

KEY = Key("cpu", "float32", "AMD EPYC (TM) 9/B", "2.14.0+cpu", 2)
FIGURES = Calibration(
    KEY, 1e11, {"conv": 5e-6, "linear": 4e-6, "pass": 1e-6}, ((1e3, 1e11), (1e6, 1e10)),
    {"3x3 dense": ((16.0, 32.0, 1.0, 49.0, 0.25),)}, noise=0.02, unsettled=1, count=9,
)  # fmt: skip


def own_key(dtype: torch.dtype = torch.float32) -> Key:
    key = Key.of_this_machine("cpu", dtype)
    assert key is not None
    return key


def test_figures_are_read_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "machine.json"
    FIGURES.save(path)
    assert read_calibration(path) == FIGURES
    assert [entry.name for entry in path.parent.iterdir()] == ["machine.json"]


def test_a_file_is_named_after_the_machine() -> None:
    assert KEY.file_name == "cpu-float32-torch-2.14.0-cpu-2-threads-amd-epyc-tm-9-b.v1.json"
    assert replace(KEY, threads=0).file_name == "cpu-float32-torch-2.14.0-cpu-amd-epyc-tm-9-b.v1.json"


def test_a_stored_calibration_is_found_for_its_dtype_and_threads_only(tmp_path: Path) -> None:
    assert stored_calibration("cpu", torch.float32, tmp_path) is None
    mine = replace(FIGURES, key=own_key())
    mine.save(tmp_path / mine.key.file_name)
    assert stored_calibration("cpu", torch.float32, tmp_path) == mine
    assert stored_calibration("cpu", torch.bfloat16, tmp_path) is None
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert stored_calibration("cpu", torch.float32, tmp_path) is None
    finally:
        torch.set_num_threads(threads)


def test_the_key_names_this_machine() -> None:
    key = own_key(torch.float16)
    assert key.dtype == "float16" and key.torch_version == torch.__version__ and key.threads == torch.get_num_threads()
    assert key.device == machine_name(torch.device("cpu")) and key.device.strip()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there_has_no_calibration(tmp_path: Path) -> None:
    assert Key.of_this_machine("cuda", torch.float32) is None
    assert stored_calibration("cuda", torch.float32, tmp_path) is None


def test_calibrations_are_kept_in_the_cache_of_the_user() -> None:
    assert cache_folder() == Path(os.environ["XDG_CACHE_HOME"]) / "rgc" / "calibrations"


def without(name: str) -> dict[str, Any]:
    plain = json.loads(FIGURES.to_json())
    del plain[name]
    return plain


def changed(**fields: Any) -> dict[str, Any]:
    return {**json.loads(FIGURES.to_json()), **fields}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
        ([1], "is no calibration of version 1"),
        ({}, "is no calibration of version 1"),
        (changed(version=0), "is no calibration of version 1"),
        (without("key"), "is damaged (KeyError: 'key')"),
        (without("peak"), "is damaged (TypeError: "),
        (changed(surplus=1), "is damaged (TypeError: "),
        (changed(bandwidth=[[1, "fast"]]), "is damaged (ValueError: could not convert string to float: 'fast')"),
        (changed(peak=0.0), "is damaged (InputError: a figure is not positive)"),
        (changed(peak=float("nan")), "is damaged (InputError: a figure is not positive)"),
        (changed(efficiency={"3x3 dense": [[1, 1, 1, 1, -0.5]]}), "is damaged (InputError: a figure is not positive)"),
        (changed(efficiency={}), "is damaged (InputError: figures are missing)"),
        (changed(overhead={"conv": 1.0}), "is damaged (InputError: figures are missing)"),
        (changed(bandwidth=[[2, 1], [1, 1]]), "is damaged (InputError: figures are out of order or missing)"),
        (changed(efficiency={"3x3 dense": []}), "is damaged (InputError: figures are out of order or missing)"),
    ],
)
def test_a_file_that_holds_no_figures_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError) as refused:
        read_calibration(path)
    assert str(refused.value).startswith(f"{path}: {message}") and str(refused.value).endswith(
        "; run rgc calibrate again"
    )


def test_a_missing_file_and_a_place_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.json: cannot be read \(No such file or directory\)"):
        read_calibration(tmp_path / "nothing.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*machine\.json: "):
        FIGURES.save(tmp_path / "file" / "machine.json")
