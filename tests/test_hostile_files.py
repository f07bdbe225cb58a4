"""Whatever happens to the bytes of a model, is it refused in one line or still itself, with nothing executed?

`benchmarks.hostile` runs the same over many more files.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import rgc
from rgc.errors import InputError
from rgc.loading import load_model
from rgc.testing import randomize
from tests.fuzz_targets import Forbidden, call_target, file_seeds, file_target, nothing_is_executed, reproduce

LAYERS = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
KINDS = ("model.pt", "model.safetensors", "model.pt2", "model.onnx")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One small model in every format that is read without trust."""
    folder = tmp_path_factory.mktemp("files")
    model = randomize(nn.Sequential(*LAYERS).eval())
    torch.save(model, folder / "model.pt")
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    compiled = rgc.compile(model, torch.randn(1, 3, 8, 8))
    for name in ("model.pt2", "model.onnx"):
        rgc.save(compiled, folder / name)
    return {name: (folder / name).read_bytes() for name in KINDS}


def make_layers() -> nn.Module:
    """The architecture of the state dict."""
    return nn.Sequential(*LAYERS).eval()


def read(path: Path) -> nn.Module | None:
    """The model of a damaged file; None where it is refused, in one line."""
    try:
        with nothing_is_executed():
            if path.suffix in (".pt2", ".onnx"):
                return rgc.load(path)
            arch = "tests.test_hostile_files:make_layers" if path.suffix == ".safetensors" else None
            return load_model(str(path), arch=arch)
    except InputError as error:
        if "\n" in str(error):
            raise AssertionError(f"several lines: {error}") from error
        return None


@pytest.mark.parametrize("name", KINDS)
@settings(suppress_health_check=list(HealthCheck), max_examples=40)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_loads_and_runs_nothing(
    name: str, files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = files[name]
    content = bytearray(whole)
    position = data.draw(st.integers(0, len(whole) - 1))
    how = data.draw(st.sampled_from(["flip", "cut", "zero", "repeat", "drop"]))
    length = data.draw(st.integers(1, 64))
    if how == "flip":
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "cut":
        del content[position:]
    elif how == "zero":
        content[position : position + length] = bytes(len(content[position : position + length]))
    elif how == "repeat":
        content[position:position] = content[position : position + length]
    else:
        del content[position : position + length]
    path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(content)
    found = read(path)
    if name == "model.pt" and found is not None:  # every byte of a tensor is under a checksum
        path.write_bytes(whole)
        expected = load_model(str(path)).state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.state_dict().items())


def test_what_is_damaged_on_purpose_is_told_from_what_is_whole(files: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) is not None
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        assert read(tmp_path / name) is None


def test_a_header_that_claims_more_than_the_file_is_refused(tmp_path: Path) -> None:
    for header in (2**63 - 1).to_bytes(8, "little"), (10**6).to_bytes(8, "little") + b"{}":
        (tmp_path / "model.safetensors").write_bytes(header)
        with pytest.raises(InputError, match="is not a readable safetensors file"):
            load_model(str(tmp_path / "model.safetensors"))


def test_a_tensor_with_more_elements_than_memory_is_refused_before_it_is_touched(tmp_path: Path) -> None:
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "model.pt")
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.zeros(1).expand(2**20, 2**20))
    torch.save(layer, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").stat().st_size < 10_000
    with pytest.raises(InputError, match="holds 4,096.0 GiB of tensors"):
        load_model(str(tmp_path / "model.pt"))


@pytest.mark.parametrize(
    "damage",
    [lambda m: m.__setattr__("groups", 3), lambda m: m.__setattr__("stride", (0, 0)),
     lambda m: m.__setattr__("kernel_size", "x"), lambda m: m.__setattr__("padding", (-5, 10**12)),
     lambda m: m.__setattr__("dilation", (10**9, 1))],
    ids=["groups", "stride", "kernel", "padding", "dilation"],
)  # fmt: skip
def test_layers_whose_numbers_make_no_sense_are_an_error_or_run_as_they_do_in_pytorch(
    damage: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
    damage(model[0])  # type: ignore[index]  # a Sequential
    torch.save(model, tmp_path / "model.pt")
    loaded, x = load_model(str(tmp_path / "model.pt")), torch.randn(1, 3, 8, 8)
    try:
        expected = loaded(x)
    except (RuntimeError, TypeError, ValueError):
        with pytest.raises(InputError, match="does not run on an input of 1x3x8x8"):
            rgc.compile(loaded, x)
    else:
        torch.testing.assert_close(rgc.compile(loaded, x)(x), expected, rtol=1e-4, atol=1e-4)


# The fuzzer


def test_what_a_file_must_not_cause_is_noticed() -> None:
    import os

    with pytest.raises(Forbidden, match=r"os\.system"), nothing_is_executed():
        os.system("true")
    with pytest.raises(Forbidden, match="open"), nothing_is_executed():
        open("/nowhere/at/all", "w")  # noqa: SIM115  # it must not get as far
    os.system("true")


def test_every_kind_of_seed_is_read_by_the_fuzzer_and_some_load(tmp_path: Path) -> None:
    outcomes = [file_target(seed, tmp_path) for seed in file_seeds()]
    assert set(outcomes) == {"loaded", "InputError"} and outcomes.count("loaded") >= 5


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(data=st.binary(min_size=5, max_size=40))
def test_chance_finds_no_call_that_is_lifted_to_another_function(data: bytes) -> None:
    assert call_target(data, Path()) in {
        "lifted", "empty", "random", "ill-conditioned", "TraceError", "GraphError", "refused by PyTorch",
    }  # fmt: skip


@pytest.mark.parametrize(
    "finding",
    [
        b"\x3a\x3d\x01m\x01\x00\x00c\x00\x01\x83\n\x9cpA\xff\xff",
        b"c\x00\x01\n\x03\x04\t\x00\x03\xf8\xf6\xfe\xfe\x00\x03",
    ],
)
def test_what_the_fuzzer_has_found_in_calls_stays_found(finding: bytes) -> None:
    assert reproduce(finding, "lift") in {"lifted", "empty", "ill-conditioned", "TraceError"}


def test_an_archive_without_an_end_that_zipfile_can_read_stays_found(files: dict[str, bytes], tmp_path: Path) -> None:
    damaged = files["model.pt"].replace(b"PK\x05\x06", b"PK\x06\x07" + bytes(12) + b"\x07\0\0\0" + b"PK\x05\x06")
    (tmp_path / "model.pt").write_bytes(damaged)
    assert read(tmp_path / "model.pt") is None
    assert zipfile.is_zipfile(io.BytesIO(files["model.pt"]))
