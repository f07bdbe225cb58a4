"""What is known of a machine, and where is it kept? The figures of `rgc calibrate`, as JSON in the user's cache."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rgc.errors import InputError
from rgc.workshop import write_whole

#: Of the file format; a file of another version is not read.
VERSION = 1

#: The overheads that a calibration holds.
OVERHEADS = ("conv", "linear", "pass")

#: Channels read and made per group, groups, positions of the whole batch.
LayerSize = tuple[float, float, float, float]
#: The same, and the part of the peak that was reached there.
Point = tuple[float, float, float, float, float]

_AGAIN = "run rgc calibrate again"


@dataclass(frozen=True)
class Key:
    """For what a calibration holds: on another machine, in another dtype or with other threads it says nothing."""

    target: str
    dtype: str
    device: str
    torch_version: str
    threads: int

    @staticmethod
    def of_this_machine(target: str, dtype: torch.dtype) -> Key | None:
        """The key of the machine that this runs on, with the threads that PyTorch uses; None if it has no such GPU."""
        if target == "cuda" and not torch.cuda.is_available():
            return None
        threads = torch.get_num_threads() if target == "cpu" else 0
        name = machine_name(torch.device(target))
        return Key(target, str(dtype).removeprefix("torch."), name, torch.__version__, threads)

    @property
    def file_name(self) -> str:
        """``cpu-float32-torch-2.14.0-2-threads-amd-epyc.v1.json``."""
        threads = (f"{self.threads}-threads",) if self.threads else ()
        words = "-".join((self.target, self.dtype, "torch", self.torch_version, *threads, self.device))
        return f"{re.sub(r'[^a-z0-9.]+', '-', words.lower()).strip('-')}.v{VERSION}.json"


@dataclass(frozen=True)
class Calibration:
    """The figures of one machine.

    peak: the highest rate seen [FLOP/s]. overhead: seconds of a call by kind. bandwidth: (bytes of a pass, byte/s),
    increasing in bytes. efficiency: by class of kernel, points of `LayerSize` and part of the peak. noise: the median
    spread of what was measured; unsettled: how many of ``count`` measurements were noisy when the time was spent.
    """

    key: Key
    peak: float
    overhead: Mapping[str, float]
    bandwidth: tuple[tuple[float, float], ...]
    efficiency: Mapping[str, tuple[Point, ...]]
    noise: float = 0.0
    unsettled: int = 0
    count: int = 0

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.bandwidth]
        numbers = [self.peak, *(number for pair in self.bandwidth for number in pair), *self.overhead.values()]
        numbers += [number for points in self.efficiency.values() for point in points for number in point]
        if not all(0 < number < math.inf for number in numbers):
            raise InputError("a figure is not positive")
        if set(self.overhead) != set(OVERHEADS) or not self.bandwidth or not self.efficiency:
            raise InputError("figures are missing")
        if sizes != sorted(set(sizes)) or not all(self.efficiency.values()):
            raise InputError("figures are out of order or missing")

    def to_json(self) -> str:
        """The figures as JSON; `read_calibration` reads them back."""
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, indent=1)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all; `InputError` where it cannot be written."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, self.to_json() + "\n")
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def cache_folder() -> Path:
    """Where calibrations of this user are kept."""
    import platformdirs

    return platformdirs.user_cache_path("rgc", appauthor=False) / "calibrations"


def stored_calibration(target: str, dtype: torch.dtype, folder: Path | None = None) -> Calibration | None:
    """The calibration of this machine, if there is one in ``folder`` (by default the user's cache)."""
    key = Key.of_this_machine(target, dtype)
    if key is None:
        return None
    path = (folder or cache_folder()) / key.file_name
    return read_calibration(path) if path.is_file() else None


def read_calibration(path: Path) -> Calibration:
    """The calibration in a file of `rgc calibrate`; `InputError` if it holds none."""
    try:
        plain = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); {_AGAIN}") from error
    except ValueError as error:
        raise InputError(f"{path}: is no JSON ({error}); {_AGAIN}") from error
    found = plain.pop("version", None) if isinstance(plain, dict) else None
    if found != VERSION:
        raise InputError(f"{path}: is no calibration of version {VERSION}; {_AGAIN}")
    try:
        return _calibration(plain)
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: is damaged ({type(error).__name__}: {error}); {_AGAIN}") from error


def machine_name(device: torch.device) -> str:
    """What the hardware calls itself.

    >>> bool(machine_name(torch.device("cpu")))
    True
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as lines:
            named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:  # there is no such file elsewhere than on Linux
        named = ""
    return named or platform.processor() or platform.machine()


def _calibration(plain: dict[str, Any]) -> Calibration:
    key = Key(**plain.pop("key"))
    bandwidth = tuple((float(size), float(rate)) for size, rate in plain.pop("bandwidth"))
    efficiency = {
        str(name): tuple((float(a), float(b), float(c), float(d), float(eta)) for a, b, c, d, eta in points)
        for name, points in plain.pop("efficiency").items()
    }
    return Calibration(key, bandwidth=bandwidth, efficiency=efficiency, **plain)


__all__ = [
    "OVERHEADS", "VERSION", "Calibration", "Key", "LayerSize", "Point", "cache_folder", "machine_name",
    "read_calibration", "stored_calibration",
]  # fmt: skip
