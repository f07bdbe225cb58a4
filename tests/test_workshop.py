"""Does what is written appear whole or not at all, and does a workshop vanish even if its owner was killed?"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rgc.workshop import PREFIX, exchange, publish, set_aside, workshop, write_whole

OWNER = """
import sys, time
from pathlib import Path
from rgc.workshop import workshop
with workshop(Path(sys.argv[1])) as place:
    (place / "draft").write_text("half")
    print(place, flush=True)
    time.sleep(60)
"""


def owner_of_a_workshop(folder: Path) -> tuple[subprocess.Popen[str], Path]:
    """A living process with a workshop in ``folder``."""
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_workshop_is_beside_the_target_and_goes_at_the_end_and_on_an_error(tmp_path: Path) -> None:
    with workshop(tmp_path) as place:
        (place / "inner").mkdir()
        assert place.parent == tmp_path and place.name.startswith(PREFIX)
    with pytest.raises(KeyboardInterrupt), workshop(tmp_path):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_living_owner_keeps_its_workshop_and_a_killed_one_leaves_it_to_the_next(tmp_path: Path) -> None:
    process, place = owner_of_a_workshop(tmp_path)
    try:
        with workshop(tmp_path) as own:
            assert sorted(tmp_path.iterdir()) == sorted([place, own])
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (place / "draft").exists()
        with workshop(tmp_path) as own:
            assert list(tmp_path.iterdir()) == [own]
    finally:
        process.kill()
        process.communicate()


def test_two_workshops_of_one_process_leave_each_other_alone(tmp_path: Path) -> None:
    with workshop(tmp_path) as first, workshop(tmp_path) as second:
        assert first.is_dir() and second.is_dir()


def test_what_is_no_workshop_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / f"{PREFIX}file").write_text("mine")
    before = sorted(tmp_path.iterdir())
    with workshop(tmp_path):
        pass
    assert sorted(tmp_path.iterdir()) == before


def test_what_was_set_aside_when_its_owner_died_comes_back_unless_it_was_replaced(tmp_path: Path) -> None:
    for name in ("lost", "replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    with workshop(tmp_path) as place:
        for name in ("lost", "replaced"):
            set_aside(tmp_path / name, place)
        (tmp_path / "replaced").mkdir()
        shutil.copytree(place, tmp_path / f"{PREFIX}dead")  # as it would be left behind
        for name in ("lost", "replaced"):
            shutil.rmtree(place / f"{name}.old")
    with workshop(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["lost", "old", "replaced"]


def test_where_folders_cannot_be_locked_nobody_removes_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{PREFIX}other").mkdir()

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with workshop(tmp_path) as place:
        assert place.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == [f"{PREFIX}other"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_takes_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr("rgc.workshop.exchange", lambda *_: False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    with workshop(tmp_path) as place:
        (place / "model").mkdir()
        (place / "model" / "new").touch()
        publish(place / "model", tmp_path / "model")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "new"]


def test_paths_that_do_not_exist_are_not_exchanged(tmp_path: Path) -> None:
    assert not exchange(tmp_path / "a", tmp_path / "b")


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_whole(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
