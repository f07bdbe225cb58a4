"""Is what was there before still there, whole, after a kill, an interrupt or a full disk? A few of each.

`python -m benchmarks.hostile` does the same many times over; docs/security.md holds what it printed.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def attempt(part: str, count: int) -> str:
    """What the benchmark prints for a few attempts; nothing may have gone wrong."""
    command = [sys.executable, "-m", "benchmarks.hostile", part, "--count", str(count), "--seed", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    assert ", 0 wrong\n" in done.stdout
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes that are killed are forked")
def test_a_killed_command_leaves_the_earlier_artifact_or_the_new_one() -> None:
    assert "killed" in attempt("kills", 6)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="interrupts are sent as signals")
def test_an_interrupted_command_says_so_in_a_line_and_leaves_nothing() -> None:
    assert "SIGINT: 2 tried" in attempt("interrupts", 2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_FSIZE, tmpfs and /proc are Linux's")
def test_a_disk_that_takes_no_more_leaves_the_earlier_artifact() -> None:
    said = attempt("disk", 3)
    assert "file size limit: status 2, earlier artifact" in said
    assert "folder that takes no files: status 2, nothing written" in said


def test_every_kind_of_damage_changes_the_bytes() -> None:
    from benchmarks.hostile import damaged

    chance, whole = random.Random(0), bytes(range(256)) * 4
    changed = {how.split()[0]: content for how, content in (damaged(whole, chance) for _ in range(200))}
    assert set(changed) == {"flip", "cut", "zero", "repeat", "drop", "noise"}
    assert all(content != whole for how, content in changed.items() if how != "zero")
