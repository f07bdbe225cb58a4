"""Does the trainer resume to the last bit, and keep several processes the same?"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "examples" / "cifar.py"
SMALL = [
    "--epochs",
    "2",
    "--batch",
    "8",
    "--no-figure",
    "--bench-seconds",
    "0.1",
    "--device",
    "cpu",
    "--threads",
    "1",
    "--passes",
    "default",
]


@pytest.fixture(scope="module")
def cifar() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cifar_example", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cifar_example"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of noise: 3 of 10 classes to train on, 1 to test."""
    path = tmp_path_factory.mktemp("data") / "images.tar.xz"
    generator = torch.Generator().manual_seed(0)
    with tarfile.open(path, "w:xz") as opened:
        for part, count in (("train", 3), ("test", 1)):
            for name in "abcdefghij":
                for index in range(count):
                    pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
                    file = io.BytesIO()
                    Image.fromarray(pixels.numpy()).save(file, "JPEG")
                    content = file.getvalue()
                    member = tarfile.TarInfo(f"{part}/{name}/{index:04}.jpg")
                    member.size = len(content)
                    opened.addfile(member, io.BytesIO(content))
    return path


def test_data_are_decoded_once_and_labelled_by_class(cifar: ModuleType, archive: Path, tmp_path: Path) -> None:
    data = cifar.load_data(archive, tmp_path, cifar.Console(quiet=True))
    assert data.train_images.shape == (30, 3, 32, 32) and data.train_images.dtype == torch.uint8
    assert data.train_labels.tolist() == [index // 3 for index in range(30)]
    assert data.test_labels.tolist() == list(range(10))
    stored = (tmp_path / "images.pt").stat().st_mtime_ns
    again = cifar.load_data(archive, tmp_path, cifar.Console(quiet=True))
    assert torch.equal(again.test_images, data.test_images)
    assert (tmp_path / "images.pt").stat().st_mtime_ns == stored


def test_augmented_images_are_crops_of_the_padded_ones_or_their_mirrors(cifar: ModuleType) -> None:
    images = torch.arange(1, 41 * 3 * 8 * 8 + 1).view(41, 3, 8, 8)
    found = cifar.augmented(images, torch.Generator().manual_seed(1))
    assert torch.equal(found, cifar.augmented(images, torch.Generator().manual_seed(1)))
    padded = F.pad(images, [4] * 4)
    kinds = set()
    for crop, whole in zip(found, padded, strict=True):
        places = [
            (top, left, mirrored)
            for top in range(9)
            for left in range(9)
            for mirrored in (False, True)
            if torch.equal(crop, _crop(whole, top, left, mirrored))
        ]
        assert len(places) == 1
        kinds.update(places)
    assert {mirrored for *_, mirrored in kinds} == {False, True}
    assert {top for top, *_ in kinds} | {left for _, left, _ in kinds} == set(range(9))


def _crop(whole: Tensor, top: int, left: int, mirrored: bool) -> Tensor:
    crop = whole[:, top : top + 8, left : left + 8]
    return crop.flip(2) if mirrored else crop


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(_same, first, second))
    return torch.equal(first, second) if isinstance(first, Tensor) else bool(first == second)


class Killed(BaseException):
    pass


def test_a_resumed_run_ends_to_the_last_bit_as_one_that_was_not_stopped(
    cifar: ModuleType, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--data", str(archive), "--model", "reducenet20", "--keep", "2", *SMALL]
    cifar.main([*given, "--folder", str(tmp_path / "whole")])
    stopped = [*given, "--folder", str(tmp_path / "stopped")]
    save = cifar.Training.save

    def save_and_die(training: Any, path: Path) -> None:
        save(training, path)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(cifar.Training, "save", save_and_die)
        with pytest.raises(Killed):
            cifar.main(stopped)
    cifar.main([*stopped, "--resume"])
    name = "reducenet20-keep2.pt"
    whole, resumed = (torch.load(tmp_path / each / name, weights_only=True) for each in ("whole", "stopped"))
    assert whole["epoch"] == 2
    assert _same(whole, resumed)
    assert [name for name in whole["model"] if name.endswith("decay")]
    assert all(whole["model"][name] == 1.0 for name in whole["model"] if name.endswith("decay"))
    [line] = (tmp_path / "stopped" / "results.jsonl").read_text().splitlines()
    result = json.loads(line)
    assert result["predictions_changed"] == 0 and result["accuracy"] == result["accuracy_compiled"]
    assert result["layers_compiled"] < result["layers"] and result["keep"] == 2 and result["processes"] == 1


def test_a_student_learns_from_a_checkpoint_of_a_teacher(cifar: ModuleType, archive: Path, tmp_path: Path) -> None:
    given = ["--data", str(archive), "--folder", str(tmp_path), *SMALL, "--epochs", "1", "--lr", "0.001"]
    cifar.main([*given, "--model", "linear", "--name", "teacher"])
    taught = ["--teacher", str(tmp_path / "teacher.pt"), "--teacher-model", "linear", "--alpha", "1.0"]
    cifar.main([*given, "--model", "linear", "--name", "student", *taught, "--seed", "1"])
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["teacher", "student"]
    assert lines[0]["loss"] != lines[1]["loss"]


@pytest.mark.parametrize(
    ("name", "keep", "kept", "decaying"), [("reducenet20", 3, 3, 7), ("reducenet20", 0, 0, 10), ("resnet20", 5, 5, 14)]
)
def test_kept_activations_do_not_decay_and_are_spread(
    cifar: ModuleType, name: str, keep: int, kept: int, decaying: int
) -> None:
    model = cifar.network(name, keep)
    found = [isinstance(each, cifar.DecayedActivation) for each in model.modules()]
    inner = [each for each in model.modules() if isinstance(each, torch.nn.ReLU)]
    assert sum(found) == decaying
    assert len(inner) - decaying == kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "11", "--model", "reducenet20"], "--keep is between 0 and 10, the activations of reducenet20"),
        (["--model", "reducenet21"], "no zoo model is named 'reducenet21'"),
        (["--resume"], "to resume from; leave out --resume"),
        (["--batch", "64"], "--batch 64 is larger than the training set"),
        (["--data", "nowhere.tar"], "--data nowhere.tar is no file"),
        (["--decay-until", "0"], "--decay-until lies in (0, 1]"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_line_with_status_2(
    cifar: ModuleType,
    archive: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cifar.main(["--data", str(archive), "--folder", str(tmp_path), *SMALL, *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "results.jsonl").exists()


def test_a_run_with_other_settings_is_not_resumed(
    cifar: ModuleType, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", str(archive), "--folder", str(tmp_path), "--model", "linear", *SMALL, "--epochs", "1"]
    cifar.main(given)
    with pytest.raises(SystemExit):
        cifar.main([*given, "--resume", "--lr", "0.5"])
    assert "was trained with --lr 0.1, not 0.5" in capsys.readouterr().err


def test_the_figure_shows_the_training(cifar: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the figure needs matplotlib")
    history = [{"loss": 2.0 / n, "accuracy": 0.1 * n, "decay": n / 5, "lr": 0.1} for n in range(1, 6)]
    cifar.draw(history, tmp_path / "run.png", "run")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


TWO = """
import sys
sys.path.insert(0, {folder!r})
import torch
import cifar

def checked(world):
    torch.manual_seed(0)
    model = cifar.network("reducenet20", None)
    world.require_same(model.state_dict())
    if world.rank:
        model.stage1[1].bn1.running_mean[3] = 1e-7
        model.stage2[0].activation.set_decay(0.5)
    try:
        world.require_same(model.state_dict())
        raise SystemExit("nothing was noticed")
    except RuntimeError as error:
        assert "stage1.1.bn1.running_mean is not the same in all processes: 1 differ" in str(error), error
    world.take_buffers_of_first(model)
    world.require_same(model.state_dict())
    assert model.stage2[0].activation.decay == 0

run = cifar.run
cifar.run = lambda options, world: checked(world) or run(options, world)
cifar.main({arguments!r})
"""


def test_two_processes_train_one_model(archive: Path, tmp_path: Path) -> None:
    """That weights, decays and statistics are the same to the last bit is checked by the run itself, and that check."""
    arguments = ["--data", str(archive), "--folder", str(tmp_path), "--model", "reducenet20", *SMALL]
    arguments += ["--epochs", "1"]
    script = tmp_path / "two.py"
    script.write_text(TWO.format(folder=str(SCRIPT.parent), arguments=arguments))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "results.jsonl").read_text())
    assert result["processes"] == 2 and result["predictions_changed"] == 0
    stored = torch.load(tmp_path / "reducenet20.pt", weights_only=True)
    assert all(stored["model"][name] == 1.0 for name in stored["model"] if name.endswith("decay"))
    assert stored["decays"]["last_step"] == 3
