"""Does rgc verify --certificate check again what a certificate says, and tell what does not hold?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import rgc
from rgc.cli import run
from rgc.testing import randomize

SMALL = ("--input", "1x3x9x8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and what the command line makes of it."""
    folder = tmp_path_factory.mktemp("certified")
    torch.manual_seed(0)
    torch.save(randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())), folder / "model.pt")
    assert run(["compile", f"{folder}/model.pt", *SMALL, "--output", f"{folder}/model.onnx"]) == 0
    assert run(["compile", f"{folder}/model.pt", *SMALL]) == 0
    return folder


def _verify(made: Path, artifact: str, original: str = "", certificate: str = "") -> int:
    return run([
        "verify", original or f"{made}/model.pt", f"{made}/{artifact}",
        "--certificate", certificate or f"{made}/{artifact}.certificate.json",
    ])  # fmt: skip


@pytest.mark.parametrize("artifact", ["model.onnx", "model.fused.pt2"])
def test_an_artifact_is_checked_again_from_nothing(
    made: Path, artifact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _verify(made, artifact) == 0
    shown = capsys.readouterr().out
    assert (
        "certificate: the original and 1 file are those that it describes; equal on the inputs of seeds 0, 1, 2"
        in shown
    )


def test_an_original_that_was_saved_anew_is_the_same_model(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = torch.load(made / "model.pt", weights_only=False)
    torch.save(model, tmp_path / "anew.pt")  # the name of the file is in its archive
    assert _verify(made, "model.onnx", f"{tmp_path}/anew.pt") == 0
    assert "is not the same file as model.pt, but holds the same model" in capsys.readouterr().out.replace("\n", " ")


def test_one_changed_weight_of_the_original_ends_with_status_1_and_its_name(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = torch.load(made / "model.pt", weights_only=False)
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] *= 1 + 2**-22
    torch.save(model, tmp_path / "model.pt")
    assert _verify(made, "model.onnx", f"{tmp_path}/model.pt") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{tmp_path}/model.pt: holds other weights" in error


def test_a_certificate_that_lies_beside_and_is_not_used_is_mentioned(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", f"{made}/model.pt", f"{made}/model.onnx", *SMALL]) == 0
    assert f"add --certificate {made}/model.onnx.certificate.json" in capsys.readouterr().out


def test_the_certificate_of_another_artifact_ends_with_status_1(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _verify(made, "model.onnx", certificate=f"{made}/model.fused.pt2.certificate.json") == 1
    assert "model.onnx: is not the file that the certificate describes" in capsys.readouterr().err


def test_what_is_no_certificate_ends_with_status_2_in_one_line(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for certificate in (f"{made}/model.pt", f"{made}/none.json"):
        assert _verify(made, "model.onnx", certificate=certificate) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_an_artifact_that_was_certified_but_is_not_equal_is_found(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever forges the digests has not changed what the files compute."""
    import json

    from rgc.certificate import made_of

    model = torch.load(made / "model.pt", weights_only=False)
    with torch.no_grad():
        model[0].weight.mul_(1.01)
    forged = rgc.compile(model, torch.randn(1, 3, 9, 8))
    rgc.save(forged, tmp_path / "model.onnx")
    data = json.loads((made / "model.onnx.certificate.json").read_text())
    (digest,) = made_of(tmp_path / "model.onnx", "onnx").files
    data["artifact"]["files"] = [{"name": digest.name, "bytes": digest.bytes, "sha256": digest.sha256}]
    (tmp_path / "forged.json").write_text(json.dumps(data))
    assert _verify(tmp_path, "model.onnx", f"{made}/model.pt", f"{tmp_path}/forged.json") == 1
    assert "(seed 0 of the certificate)" in capsys.readouterr().err
