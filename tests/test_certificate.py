"""Does a certificate name what it belongs to, notice every change, and read nothing but certificates?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rgc
from rgc.certificate import (
    Certificate,
    architecture_digest,
    certificate_of,
    described,
    drawn,
    files_of,
    is_certificate,
    weights_digest,
)
from rgc.errors import InputError, NotEquivalentError
from rgc.example import Example
from rgc.testing import randomize


def network() -> nn.Module:
    torch.manual_seed(0)
    return randomize(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One compiled model in the three formats."""
    folder = tmp_path_factory.mktemp("made")
    compiled = rgc.compile(network(), torch.randn(2, 3, 8, 8))
    for name in ("model.pt2", "model.onnx", "model/"):
        rgc.save(compiled, f"{folder}/{name}")
    return folder


FORMATS = {"model.pt2": "pt2", "model.onnx": "onnx", "model": "python"}


@pytest.mark.parametrize("name", FORMATS)
def test_every_artifact_has_a_certificate_that_describes_it(made: Path, name: str) -> None:
    certificate = Certificate.read(certificate_of(made / name, FORMATS[name]))
    certificate.require_files(made / name)
    assert certificate.require_original("a model in memory", network()) is None
    assert [firing.rewrite for firing in certificate.rewrites] == ["fold_batchnorm"]
    assert certificate.rewrites[0].evidence == "exact"
    assert [check.seed for check in certificate.checks] == [0, 1, 2]
    assert all(0 < check.deployed_error <= check.allowed_error for check in certificate.checks)
    assert certificate.bound is not None and certificate.bound.outputs[0].bound is not None
    assert ("onnxruntime" in certificate.versions) == (name == "model.onnx")
    assert certificate.draw(0).args[0].shape == (2, 3, 8, 8)


def test_the_same_compilation_gives_the_same_certificate(tmp_path: Path) -> None:
    def text(folder: str) -> str:
        rgc.save(
            rgc.compile(network(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))),
            f"{tmp_path}/{folder}/",
        )
        return (tmp_path / folder / "certificate.json").read_text()

    first = text("one")
    assert first == text("two")
    assert list(json.loads(first)) == [
        "kind", "format", "original", "artifact", "options", "rewrites", "undone", "verification", "bound",
        "preconditions", "inputs", "checks", "versions",
    ]  # fmt: skip
    assert str(tmp_path) not in first


@pytest.mark.parametrize("name", FORMATS)
def test_one_changed_byte_of_an_artifact_is_found_by_the_name_of_its_file(
    made: Path, tmp_path: Path, name: str
) -> None:
    certificate = Certificate.read(certificate_of(made / name, FORMATS[name]))
    for file in files_of(made / name, FORMATS[name]):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        copy = tmp_path / file.relative_to(made)
        for other in files_of(made / name, FORMATS[name]):
            place = tmp_path / other.relative_to(made)
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(other.read_bytes())
        certificate.require_files(tmp_path / name)
        copy.write_bytes(content)
        with pytest.raises(NotEquivalentError, match=f"{file.name}: is not the file that the certificate describes"):
            certificate.require_files(tmp_path / name)


def test_a_file_that_is_missing_or_too_much_is_named(made: Path, tmp_path: Path) -> None:
    certificate = Certificate.read(made / "model" / "certificate.json")
    folder = tmp_path / "model"
    folder.mkdir()
    for file in files_of(made / "model", "python"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "more.py").write_text("import this")
    with pytest.raises(NotEquivalentError, match=r"more\.py: is no part of the artifact"):
        certificate.require_files(folder)
    (folder / "more.py").unlink()
    (folder / "model.py").unlink()
    with pytest.raises(NotEquivalentError, match=r"model\.py: is missing"):
        certificate.require_files(folder)
    with pytest.raises(NotEquivalentError, match="is no python artifact"):
        certificate.require_files(made / "model.onnx")


def _changed(change: Callable[[Any], None]) -> nn.Module:
    model = network()
    with torch.no_grad():
        change(model)
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model[3].weight[1, 3, 0, 0].mul_(1 + 2**-20),
        lambda model: model[1].running_mean[0].add_(1e-6),
        lambda model: model.double(),
    ],
)
def test_one_changed_weight_of_the_original_is_found(made: Path, change: Callable[[Any], None]) -> None:
    certificate = Certificate.read(certificate_of(made / "model.pt2", "pt2"))
    with pytest.raises(NotEquivalentError, match=r"^model\.pt: holds other weights than the model"):
        certificate.require_original("model.pt", _changed(change))


def test_other_layers_with_the_same_weights_are_another_original(made: Path) -> None:
    certificate = Certificate.read(certificate_of(made / "model.pt2", "pt2"))
    with pytest.raises(NotEquivalentError, match="is a Sequential of other layers"):
        certificate.require_original("model.pt", _changed(lambda model: setattr(model[0], "stride", (2, 2))))


def test_digests_see_what_is_neither_parameter_nor_persistent() -> None:
    model = network()
    before = weights_digest(model), architecture_digest(model)
    model.register_buffer("grid", torch.zeros(2), persistent=False)
    with_buffer = weights_digest(model)
    model.factor = torch.ones(1)
    assert len({before[0], with_buffer, weights_digest(model)}) == 3
    assert architecture_digest(model) == before[1]
    assert weights_digest(nn.Linear(3, 2).bfloat16())  # which numpy does not know


CALL = Example(
    (torch.randn(2, 3), [torch.randn(1).half(), None], (True, 0.5)),
    {"tokens": torch.tensor([[3, 9]]), "more": {"mask": torch.tensor([True, False]), "name": "x"}},
)


def test_a_call_is_described_without_its_values_and_drawn_again() -> None:
    form = json.loads(json.dumps(described(CALL)))
    once, again = drawn(form, 0), drawn(form, 0)
    assert all(torch.equal(a, b) for a, b in zip(once.tensors, again.tensors, strict=True))
    assert not torch.equal(once.args[0], drawn(form, 1).args[0])
    assert [(t.shape, t.dtype) for t in once.tensors] == [(t.shape, t.dtype) for t in CALL.tensors]
    assert 3 <= int(once.kwargs["tokens"].min()) <= int(once.kwargs["tokens"].max()) <= 9
    assert once.args[1][1] is None and once.args[2] == (True, 0.5) and once.kwargs["more"]["name"] == "x"


def test_a_call_that_cannot_be_described_is_said_so_in_the_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="an argument of type device cannot be described"):
        described(Example((torch.randn(2), torch.device("cpu"))))

    def refuse(example: Example) -> dict[str, Any]:
        return described(Example((torch.device("cpu"),)))

    monkeypatch.setattr("rgc.saving.described", refuse)
    rgc.save(rgc.compile(network(), torch.randn(2, 3, 8, 8)), f"{tmp_path}/tagged/")
    certificate = Certificate.read(tmp_path / "tagged" / "certificate.json")
    assert certificate.inputs is None and not certificate.checks
    assert "device cannot be described" in certificate.preconditions[-1]
    with pytest.raises(InputError, match="give them with --input"):
        certificate.draw(0)


def _with(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    *parents, name = path.split(".")
    place: Any = data
    for each in parents:
        place = place[int(each) if each.isdigit() else each]
    place[name] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("format", 2, "is a certificate of format 2; this rgc reads 1"),
        ("kind", "another", "is no certificate of rgc"),
        ("original.weights", 7, r"damaged: original\.weights is no str"),
        ("artifact.files", [], "files is empty"),
        ("artifact.files", {}, r"artifact\.files is no list"),
        ("artifact.files.0.name", "../../secret", "is no file of an artifact"),
        ("artifact.files.0.name", "/etc/passwd", "is no file of an artifact"),
        ("original", {}, r"original\.file is missing"),
        ("surprise", 1, "surprise is no field"),
        ("inputs", {"args": [], "kwargs": {}, "code": 1}, "inputs are not args and kwargs"),
        ("inputs.args", [{"eval": "1"}], "described in no way"),
        ("inputs.args.0.tensor.shape", [2**20, 2**20], "is no shape"),
        ("inputs.args.0.tensor.shape", [-1], "is no shape"),
        ("inputs.args.0.tensor.dtype", "object", "described in no way"),
        ("checks.0.seed", "0", r"checks\[0\]\.seed is no int"),
        ("options", [], "options is no object"),
        ("bound", 3, "bound is no object"),
    ],
)
def test_a_foreign_damaged_or_later_certificate_is_one_line(
    made: Path, tmp_path: Path, path: str, value: Any, expected: str
) -> None:
    data = _with(json.loads((made / "model.pt2.certificate.json").read_text()), path, value)
    (tmp_path / "changed.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=expected) as raised:
        Certificate.read(tmp_path / "changed.json")
    assert "\n" not in str(raised.value)


def test_what_is_no_json_is_one_line(made: Path, tmp_path: Path) -> None:
    text = (made / "model.pt2.certificate.json").read_text()
    for content in (b"", b"\x80\x02", text[: len(text) // 2].encode(), b"[" * 100_000, b"[1]", b"null"):
        (tmp_path / "file.json").write_bytes(content)
        with pytest.raises(InputError, match="certificate"):
            Certificate.read(tmp_path / "file.json")
    with pytest.raises(InputError, match="cannot be read"):
        Certificate.read(tmp_path / "none.json")


def test_a_file_of_the_users_is_never_overwritten_by_a_certificate(tmp_path: Path) -> None:
    mine = tmp_path / "model.pt2.certificate.json"
    mine.write_text("{}")
    compiled = rgc.compile(network(), torch.randn(2, 3, 8, 8))
    with pytest.raises(InputError, match="is no certificate of rgc, and would be overwritten"):
        rgc.save(compiled, tmp_path / "model.pt2")
    assert mine.read_text() == "{}" and not is_certificate(mine) and len(list(tmp_path.iterdir())) == 1


class _Killed(BaseException):
    """As if the process ended here."""


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_certificate_never_lies_beside_what_it_does_not_describe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Ended before any of the two renames, or behind both."""
    from rgc import artifact

    path, certificate = tmp_path / "model.pt2", tmp_path / "model.pt2.certificate.json"
    rgc.save(rgc.compile(network(), torch.randn(2, 3, 8, 8)), path)
    before = path.read_bytes()
    other = rgc.compile(_changed(lambda model: model[3].weight.mul_(2)), torch.randn(2, 3, 8, 8))
    left, publish = [steps], artifact.publish

    def publish_or_end(draft: Path, target: Path) -> None:
        if not left[0]:
            raise _Killed
        left[0] -= 1
        publish(draft, target)

    monkeypatch.setattr(artifact, "publish", publish_or_end)
    if steps < 2:
        with pytest.raises(_Killed):
            rgc.save(other, path)
    else:
        rgc.save(other, path)
    assert (path.read_bytes() == before) == (steps == 0)
    assert certificate.exists() == (steps != 1)
    if certificate.exists():
        Certificate.read(certificate).require_files(path)
