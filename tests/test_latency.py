"""The latency benchmark: a run goes on where the one before ended, and one slow load is no verdict."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import latency
from benchmarks.latency import Conditions, Entry, Row
from rgc.errors import InputError

HERE = Conditions("a machine", "2.0", "cpu", "float32", "cpu", 1, 1, False, False)
SLOWER, FASTER = (0.98, 0.97, 0.99), (1.02, 1.0, 1.03)


def row(*loads: tuple[float, float, float], runtime: str = "eager") -> Row:
    return Row(HERE, "small", "default", runtime, "3 -> 2", 2e-3, 1e-3, loads)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[float, float, float]]]:
    """What each load will show, in order, instead of a measurement."""
    given: list[tuple[float, float, float]] = []

    def rows_of_one_load(*arguments: object) -> list[Row]:
        runtimes = arguments[-1]
        assert isinstance(runtimes, list)
        return [row(given.pop(0), runtime=runtime) for runtime in runtimes]

    monkeypatch.setattr(latency, "rows_of_one_load", rows_of_one_load)
    yield given
    assert not given


def measured(*runtimes: str) -> list[Row]:
    return list(latency.measured_rows("small", Entry(nn.Identity), HERE, Namespace(), list(runtimes)))


def test_a_row_that_is_not_slower_is_measured_once(loads: list[tuple[float, float, float]]) -> None:
    loads += [FASTER]
    assert measured("eager") == [row(FASTER)]


def test_a_slower_row_is_measured_with_other_loads_and_one_that_is_not_slower_decides(
    loads: list[tuple[float, float, float]],
) -> None:
    loads += [SLOWER, FASTER]
    (found,) = measured("eager")
    assert found.loads == (SLOWER, FASTER) and not found.is_slower and found.interval == (0.97, 1.03)
    assert str(found) == "2 -> 1: 1.00 (0.97 - 1.03, 2 loads)"


def test_what_is_slower_in_every_load_is_slower(loads: list[tuple[float, float, float]]) -> None:
    loads += [FASTER, SLOWER, SLOWER, SLOWER]
    first, second = measured("eager", "onnxruntime")
    assert not first.is_slower and second.is_slower and len(second.loads) == latency.MOST_LOADS


def test_rows_come_back_from_the_file_and_a_line_that_was_cut_off_does_not(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert latency.stored_rows(path) == {}
    rows = [row(SLOWER, FASTER), replace(row(runtime="onnxruntime"), left_out="no such operator")]
    for each in rows:
        latency.append(path, each)
    with path.open("a") as file:
        file.write('{"conditions": {"mach')
    assert list(latency.stored_rows(path).values()) == rows
    latency.append(path, row(FASTER, runtime="torch.compile"))
    assert list(latency.stored_rows(path).values()) == [*rows, row(FASTER, runtime="torch.compile")]


def test_a_file_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for text in ("{}\n", "not JSON\n", "[1]\n", '{"loads": [], "conditions": {"speed": 1}}\n'):
        path.write_text(text)
        with pytest.raises(InputError, match="line 1: is no row of this benchmark"):
            latency.stored_rows(path)


def test_a_second_run_measures_what_is_missing_and_prints_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def small() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()

    monkeypatch.setattr(latency, "MODELS", {"a": Entry(small, (3, 8, 8)), "b": Entry(small, (3, 8, 8))})
    store, threads = str(tmp_path / "rows.jsonl"), str(torch.get_num_threads())
    fixed = ["--runtimes", "eager", "--pairs", "6", "--seconds", "0.01", "--threads", threads, "--store", store]
    monkeypatch.setattr(sys, "argv", ["latency", *fixed, "--models", "a"])
    latency.main()
    (first,) = latency.stored_rows(Path(store)).values()
    assert first.operators == "3 -> 2" and first.loads and first.before > 0
    monkeypatch.setattr(sys, "argv", ["latency", *fixed])
    latency.main()
    again = list(latency.stored_rows(Path(store)).values())
    assert [each.model for each in again] == ["a", "b"] and again[0] == first
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["latency", "--print", "--store", store])
    latency.main()
    printed = capsys.readouterr().out
    assert f"| a | default | 3 -> 2 | {first} |" in printed and f"| b | default | 3 -> 2 | {again[1]} |" in printed


def test_what_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in ((["--models", "resnet"], "there is no 'resnet'"), (["--print"], "--print needs --store")):
        monkeypatch.setattr(sys, "argv", ["latency", *arguments])
        with pytest.raises(SystemExit) as exit_:
            latency.main()
        assert exit_.value.code == 2 and said in capsys.readouterr().err
