"""What if files, processes and disks misbehave? Damaged models, kills, interrupts, full and read-only disks.

    python -m benchmarks.hostile                      # everything, about half an hour on one core
    python -m benchmarks.hostile files --count 20000
    python -m benchmarks.hostile kills interrupts --count 50
    python -m benchmarks.hostile disk --count 60

Each line says how many times something was tried and how it came out; the exit status is 1 if anything came out wrong.
Where the system permits it, disks are real ones: a small tmpfs that is full, and one that is mounted read-only.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

import rgc
from rgc.cli import run
from rgc.errors import InputError
from rgc.loading import load_model
from rgc.testing import randomize
from rgc.workshop import PREFIX
from tests.fuzz_targets import nothing_is_executed

COMMAND = Path(__file__).resolve().parent.parent / "rgc_command.py"
INPUT = ("--input", "1x3x12x12")
FORMATS = ("model.pt2", "model.onnx", "model/")
#: A command that is done so many seconds behind an interrupt has not heard it; leaving Python takes some of them.
LATE = 2.0

DAMAGED = ("model.pt", "model.safetensors", "model.pt2", "model.onnx")


@dataclass
class Trial:
    """A folder with a model, an earlier artifact of it in every format, and what became of attempts to write anew."""

    folder: Path
    chance: random.Random
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    cold: float = 0.0  # how long the first compilation took, which imports what it needs

    @classmethod
    def made(cls, folder: Path, seed: int) -> Trial:
        """The trial, with one compilation of every format behind it, so that the next ones import nothing."""
        torch.set_num_threads(1)
        trial = cls(folder, random.Random(seed))
        torch.manual_seed(seed)
        for name in ("earlier", "model"):
            layers = (nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3))
            model = randomize(nn.Sequential(*layers).eval(), seed=len(name))
            torch.save(model, folder / f"{name}.pt")
        (folder / "before").mkdir()
        (folder / "out").mkdir()
        for output in FORMATS:
            started = time.monotonic()
            if _quietly(["compile", str(folder / "earlier.pt"), *INPUT, "--output", f"{folder}/before/{output}"]):
                raise SystemExit("the earlier artifact could not be made")
            trial.cold = trial.cold or time.monotonic() - started
            started = time.monotonic()
            _quietly(trial.command(output))
            trial.seconds[output] = time.monotonic() - started
            trial.restore()
        return trial

    def command(self, output: str) -> list[str]:
        """Compile the model over the earlier artifact."""
        return ["compile", str(self.folder / "model.pt"), *INPUT, "--output", f"{self.folder}/out/{output}"]

    def restore(self) -> None:
        """The earlier artifacts, and nothing else."""
        for found in (self.folder / "out").iterdir():
            shutil.rmtree(found) if found.is_dir() else found.unlink()
        shutil.copytree(self.folder / "before", self.folder / "out", dirs_exist_ok=True)

    def judge(self, output: str, what: str) -> str:
        """Which artifact stands there now: the earlier, whole, or the new one, whole; noted as wrong if neither."""
        path = self.folder / "out" / output.rstrip("/")
        if _contents(path) == _contents(self.folder / "before" / output.rstrip("/")):
            return "earlier"
        x = torch.randn(2, 3, 12, 12)
        try:
            found = rgc.load(path, trust=True)(x)
        except InputError as error:
            self.wrong.append(f"{what}: {output} is neither: {error}")
            return "broken"
        expected = load_model(str(self.folder / "model.pt"))(x)
        if torch.allclose(found[0] if isinstance(found, list) else found, expected, rtol=1e-3, atol=1e-3):
            return "new"
        self.wrong.append(f"{what}: {output} computes something else")
        return "broken"

    def leftovers(self) -> list[str]:
        """Workshops that nobody has removed."""
        return [path.name for path in (self.folder / "out").iterdir() if path.name.startswith(PREFIX)]


def _quietly(command: Sequence[str]) -> int:
    with contextlib.redirect_stdout(io.StringIO()):
        return run(command)


def _contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    return {each.name: each.read_bytes() for each in files}


def kills(trial: Trial, count: int) -> str:
    """SIGKILL at a random moment of ``rgc compile --output``, every second time while it writes."""
    for index in range(count):
        output = FORMATS[index % len(FORMATS)]
        child = _fork(lambda output=output: run(trial.command(output)))  # type: ignore[misc]  # it is called at once
        if index % 2:
            _wait_for(lambda: bool(trial.leftovers()), trial.seconds[output] * 20)
            time.sleep(trial.chance.uniform(0, trial.seconds[output] * 0.8))
        else:
            time.sleep(trial.chance.uniform(0, trial.seconds[output] * 1.2))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        left = "leaving a workshop" if trial.leftovers() else "leaving nothing"
        ended = "killed" if os.WIFSIGNALED(status) else "done before"
        trial.outcomes[f"{ended}, {left}, {trial.judge(output, 'kill')} artifact"] += 1
        if trial.leftovers() and index % 5 == 1:
            _quietly(trial.command(output))
            if trial.leftovers():
                trial.wrong.append("the next run did not remove what a killed one left")
        trial.restore()
    return "SIGKILL"


def interrupts(trial: Trial, count: int) -> str:
    """SIGINT at a random moment of the command, once it imports PyTorch: status 130, one line, nothing left."""
    alone = time.monotonic()
    subprocess.run([sys.executable, "-c", "import rgc"], cwd=COMMAND.parent, check=True)
    alone = time.monotonic() - alone + trial.cold
    for index in range(count):
        output = FORMATS[index % len(FORMATS)]
        process = subprocess.Popen(
            [sys.executable, COMMAND, *trial.command(output)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        _wait_for(lambda process=process: _imports_torch(process.pid), alone)  # type: ignore[misc]  # called at once
        time.sleep(trial.chance.uniform(0, alone))
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        _, said = process.communicate()
        if process.returncode == 0 and time.monotonic() - sent > LATE:
            trial.wrong.append(f"interrupt: lost, the command ran on for {time.monotonic() - sent:.1f} s")
        if (process.returncode, said) not in ((130, "rgc: interrupted\n"), (0, "")):
            trial.wrong.append(f"interrupt: status {process.returncode}, {said[-300:]!r}")
        if trial.leftovers():
            trial.wrong.append("interrupt: a workshop is left")
        ended = "done before" if process.returncode == 0 else f"status {process.returncode}"
        trial.outcomes[f"{ended}, {trial.judge(output, 'interrupt')} artifact"] += 1
        trial.restore()
    return "SIGINT"


def disk(trial: Trial, count: int) -> str:
    """No file may grow beyond a random size, a small disk is full, a disk is read-only: status 2 and one line."""
    for index in range(count):
        output = FORMATS[index % len(FORMATS)]
        size = max(map(len, _contents(trial.folder / "before" / output.rstrip("/")).values()))
        bound = trial.chance.randrange(size)

        def limited(output: str = output, bound: int = bound) -> int:
            resource.setrlimit(resource.RLIMIT_FSIZE, (bound, resource.RLIM_INFINITY))
            return run(trial.command(output))

        _refused(trial, limited, output, "file size limit")
        trial.restore()
    with _mounted(trial.folder / "disk", "size=4k") as is_mounted:
        for output in FORMATS if is_mounted else ():
            _refused_elsewhere(trial, f"{trial.folder}/disk/{output}", "full disk")
        if is_mounted:
            subprocess.run(["mount", "-o", "remount,ro", str(trial.folder / "disk")], check=True)
        for output in FORMATS if is_mounted else ():
            _refused_elsewhere(trial, f"{trial.folder}/disk/{output}", "read-only disk")
    _refused_elsewhere(trial, "/proc/model.pt2", "folder that takes no files")
    return "disk"


def _refused(trial: Trial, attempt: Callable[[], int], output: str, what: str) -> None:
    status, said = _status_and_error(attempt)
    if status != 2 or not said.startswith("rgc: ") or said.count("\n") != 1:
        trial.wrong.append(f"{what}: {output}: status {status}, {said[-300:]!r}")
    if trial.leftovers():
        trial.wrong.append(f"{what}: a workshop is left")
    trial.outcomes[f"{what}: status {status}, {trial.judge(output, what)} artifact"] += 1


def _refused_elsewhere(trial: Trial, output: str, what: str) -> None:
    model = str(trial.folder / "model.pt")
    status, said = _status_and_error(lambda: run(["compile", model, *INPUT, "--output", output]))
    if status != 2 or not said.startswith("rgc: ") or said.count("\n") != 1:
        trial.wrong.append(f"{what}: {output}: status {status}, {said[-300:]!r}")
    folder = Path(output.rstrip("/")).parent
    if any(path.name.startswith((PREFIX, "model")) for path in folder.iterdir()):
        trial.wrong.append(f"{what}: something is left in {folder}")
    trial.outcomes[f"{what}: status {status}, nothing written"] += 1


@contextlib.contextmanager
def _mounted(folder: Path, options: str) -> Iterator[bool]:
    """A small file system of its own, if this user may make one."""
    folder.mkdir()
    mount = shutil.which("mount")
    done = (
        mount is not None
        and not subprocess.run(
            [mount, "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
        ).returncode
    )
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", str(folder)], check=True)


def _status_and_error(attempt: Callable[[], int]) -> tuple[int, str]:
    reading, writing = os.pipe()
    child = _fork(attempt, writing)
    os.close(writing)
    with os.fdopen(reading) as errors:
        said = errors.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def _fork(attempt: Callable[[], int], errors: int | None = None) -> int:
    """A process that has everything imported already and makes one attempt, its errors written to a descriptor."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet if errors is None else errors, 2)
    status = 70
    try:
        status = attempt()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _imports_torch(process: int) -> bool:
    """Has it come so far? Before there is no code of ours that could say a line."""
    maps = Path(f"/proc/{process}/maps")
    return maps.exists() and "libtorch" in maps.read_text()


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)


def files(trial: Trial, count: int) -> str:
    """Models with flipped, missing, repeated and zeroed bytes: refused in one line or loaded, and nothing executed."""
    from safetensors.torch import save_file

    save_file(load_model(str(trial.folder / "model.pt")).state_dict(), trial.folder / "model.safetensors")
    whole = {name: (trial.folder / "before" / name).read_bytes() for name in FORMATS[:2]}
    whole |= {name: (trial.folder / name).read_bytes() for name in DAMAGED[:2]}
    (trial.folder / "damaged").mkdir()
    for index in range(count):
        name = DAMAGED[index % len(DAMAGED)]
        path = trial.folder / "damaged" / name
        how, content = damaged(whole[name], trial.chance)
        path.write_bytes(content)
        try:
            with nothing_is_executed():
                rgc.load(path) if path.suffix in (".pt2", ".onnx") else load_model(str(path), arch=_architecture(path))
            outcome = "loaded"
        except InputError as error:
            outcome = "refused"
            if "\n" in str(error):
                trial.wrong.append(f"{name} ({how}): several lines: {error}")
        except Exception as error:  # which is what is looked for
            outcome = "error"
            trial.wrong.append(f"{name} ({how}): {type(error).__name__}: {error}")
            shutil.copy(path, f"wrong-{len(trial.wrong)}-{name}")
        trial.outcomes[f"{path.suffix} {outcome}"] += 1
    return "damaged files"


def _architecture(path: Path) -> str | None:
    return "benchmarks.hostile:architecture" if path.suffix == ".safetensors" else None


def architecture() -> nn.Module:
    """What the state dict belongs to."""
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()


def damaged(whole: bytes, chance: random.Random) -> tuple[str, bytes]:
    """The bytes with one fault of a random kind at a random place."""
    content = bytearray(whole)
    position, length = chance.randrange(len(whole)), chance.randrange(1, 200)
    part = slice(position, position + length)
    how = chance.choice(["flip", "flip", "cut", "zero", "repeat", "drop", "noise"])
    if how == "flip":
        content[position] ^= 1 << chance.randrange(8)
    elif how == "cut":
        del content[position:]
    elif how == "zero":
        content[part] = bytes(len(content[part]))
    elif how == "repeat":
        content[position:position] = content[part]
    elif how == "drop":
        del content[part]
    else:
        content[part] = chance.randbytes(len(content[part]))
    return f"{how} at {position}", bytes(content)


PARTS = {"files": (files, 10_000), "kills": (kills, 50), "interrupts": (interrupts, 50), "disk": (disk, 30)}


def main(arguments: Sequence[str]) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile", description=__doc__.split("\n", 1)[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"which of {', '.join(PARTS)}; default: all")
    parser.add_argument("--count", type=int, help="how many times each is tried; default: its own number")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {min(unknown)!r}; choose from {', '.join(PARTS)}")
    failed = False
    for name in options.parts or PARTS:
        attempt, number = PARTS[name]
        with tempfile.TemporaryDirectory(prefix="rgc-hostile-") as folder:
            trial = Trial.made(Path(folder), options.seed)
            what = attempt(trial, options.count or number)
        print(f"{what}: {trial.outcomes.total():,} tried, {len(trial.wrong)} wrong")
        for outcome, times in sorted(trial.outcomes.items()):
            print(f"  {times:>6,}  {outcome}")
        for line in trial.wrong[:20]:
            print(f"  WRONG: {line}")
        failed |= bool(trial.wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
