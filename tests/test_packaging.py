"""Does what we ship hold the whole package, once, and can it be rebuilt from its own source archive?"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def build(source: Path, kind: str, into: Path) -> Path:
    """Build a ``wheel`` or an ``sdist`` of ``source`` with the setuptools of this environment: no network, no venv."""
    script = f"import sys; from setuptools.build_meta import build_{kind} as build; print(build(sys.argv[1]))"
    into.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", script, str(into)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return into / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that a build reads, with its symlinks: building must not write into the repository."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("rgc", "passes", "models"):
        shutil.copytree(REPOSITORY / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "rgc_command.py", "README.md", "LICENSE", "CHANGELOG.md"):
        if (REPOSITORY / name).exists():
            shutil.copy(REPOSITORY / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(checkout, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(checkout, "wheel", tmp_path_factory.mktemp("wheel"))


def names_in_wheel(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def python_sources(package: str) -> set[str]:
    return {path.name for path in (REPOSITORY / package).glob("*.py")}


def test_the_wheel_holds_every_module_exactly_once(wheel: Path) -> None:
    names = names_in_wheel(wheel)
    assert len(names) == len(set(names))
    code = {name for name in names if ".dist-info/" not in name}
    expected = {f"rgc/{name}" for name in python_sources("rgc")} | {"rgc/py.typed", "rgc_command.py"}
    expected |= {f"rgc/passes/{name}" for name in python_sources("passes")}
    expected |= {f"rgc/models/{name}" for name in python_sources("models")}
    assert code == expected


def test_the_wheel_holds_the_licence_and_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [entry_points] = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
        assert b"rgc = rgc_command:main" in archive.read(entry_points)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_sdist_holds_passes_and_models_where_the_repository_has_them(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    assert len(names) == len(set(names))
    inside = {name.split("/", 1)[1] for name in names if "/" in name}
    assert {f"passes/{name}" for name in python_sources("passes")} <= inside
    assert {f"models/{name}" for name in python_sources("models")} <= inside
    assert {"LICENSE", "pyproject.toml", "rgc/py.typed"} <= inside
    assert not any(name.startswith(("rgc/passes", "rgc/models")) for name in inside)


def test_the_sdist_rebuilds_to_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [unpacked] = [path for path in tmp_path.iterdir() if path.is_dir()]
    rebuilt = build(unpacked, "wheel", tmp_path / "rebuilt")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(rebuilt) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())
        assert all(first.read(name) == second.read(name) for name in first.namelist())
