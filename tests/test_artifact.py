"""Does a compiled model come back from every file format as what it was, and is a file written whole or not at all?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rgc.artifact import choose_format, load, save
from rgc.errors import InputError
from rgc.onnx_artifact import PROTOBUF_LIMIT, OnnxModel
from rgc.pt2_artifact import read_pt2
from rgc.pt2_inspection import is_pickle_free_pt2

EVERY_FORMAT = ("model.pt2", "model.onnx", "model/")


class Residual(nn.Module):
    """Branches, numbered and named groups, an operator on sizes and a global pool: any size, any batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Identity(), nn.SiLU())
        self.block = nn.ModuleDict({"a": nn.Conv2d(8, 8, (3, 5), padding=(1, 2), groups=4), "b": nn.BatchNorm2d(8)})
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.register_buffer("shift", torch.randn(8, 1, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.stem[3](self.stem[1](self.stem[0](x)))
        x = x + self.block["b"](self.block["a"](x)) * self.scale - self.shift
        x = F.adaptive_avg_pool2d(F.relu(x), 1)
        return self.head(x.view(x.size(0), -1))


class Pair(nn.Module):
    """Two inputs that share the batch, one with a default, and a nested result with a hole and an input in it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.b = nn.Linear(6, 4)

    def forward(self, image: Tensor, extra: Tensor, factor: float = 0.5) -> dict[str, Any]:
        y = self.a(image) * factor
        z = self.b(extra)
        return {"image": y, "all": (z, None, [y.mean((2, 3)) + z]), "extra": extra}


class FixedSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 8 * 8, 4)

    def forward(self, x: Tensor) -> Any:
        torch._assert(x.shape[1:] == (3, 8, 8), "this model was compiled for inputs of 3 x 8 x 8")
        return self.layer(x.flatten(1))


class WholeImagePool(nn.Module):
    """The example's size reaches a pooling kernel: a file that kept it would be silently wrong at other sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(3, 4, 3, 2, 1)
        self.mix = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.reduce(x)
        return self.mix(F.avg_pool2d(y, y.size(2)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)])
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Any:
        a = self.down[0](x)
        return self.out(torch.cat([a, self.up(self.down[1](a))], 1))


@fx.wrap
def python_of_its_own(x: Tensor) -> Tensor:
    return x[:, :, 1:] if x.shape[2] % 2 else x


class BranchesOnSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return python_of_its_own(self.layer(x))


class OwnLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def compiled(model: nn.Module) -> fx.GraphModule:
    """A traced model with every parameter and statistic randomised: fresh ones hide errors."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn_like(tensor) * 0.5)
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d) and layer.running_var is not None:
                layer.running_var.copy_(torch.rand_like(layer.running_var) + 0.3)
    return fx.GraphModule(model.eval(), Tracer().trace(model)).eval()


class Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, OwnLayer) or super().is_leaf_module(m, module_qualified_name)


def place(folder: Path, name: str) -> str:
    return f"{folder}/{name}"


def first(result: Any) -> Tensor:
    tensor = result[0] if isinstance(result, list) else result
    assert isinstance(tensor, Tensor)
    return tensor


def assert_equal(found: Tensor, expected: Tensor, *, bitwise: bool) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    if bitwise:
        assert torch.equal(found, expected)
    else:  # another engine sums in another order: a few rounding steps of the largest value
        torch.testing.assert_close(found, expected, rtol=0, atol=64 * 1.2e-7 * expected.abs().max().item())


@pytest.fixture(autouse=True)
def reproducible_inference() -> Iterator[None]:
    torch.manual_seed(7)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_a_model_of_any_size_comes_back_equal_at_other_batches_and_sizes(name: str, tmp_path: Path) -> None:
    model = compiled(Residual())
    written = save(model, place(tmp_path, name), example_args=(torch.randn(1, 3, 8, 8),), free_sizes=True)
    assert written.notes == ()
    assert written.free_dimensions == (None if name == "model/" else ("x[0]", "x[2]", "x[3]"))
    loaded = load(place(tmp_path, name), trust=True)
    assert not isinstance(loaded, OnnxModel) or loaded.output_names == ("output",)
    for shape in [(1, 3, 8, 8), (3, 3, 8, 8), (2, 3, 17, 6), (1, 3, 1, 2)]:
        x = torch.randn(shape)
        assert_equal(first(loaded(x)), model(x), bitwise=name != "model.onnx")


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_a_model_of_one_size_keeps_a_free_batch_and_refuses_other_sizes(name: str, tmp_path: Path) -> None:
    model = compiled(FixedSize())
    written = save(model, place(tmp_path, name), example_args=(torch.randn(2, 3, 8, 8),))
    assert written.free_dimensions == (None if name == "model/" else ("x[0]",))
    loaded = load(place(tmp_path, name), trust=True)
    x = torch.randn(5, 3, 8, 8)
    assert_equal(first(loaded(x)), model(x), bitwise=name != "model.onnx")
    with pytest.raises((RuntimeError, AssertionError, InputError), match="8"):
        loaded(torch.randn(5, 3, 4, 16))


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_several_inputs_and_a_nested_result_keep_their_names_and_places(name: str, tmp_path: Path) -> None:
    model = compiled(Pair())
    example = {"extra": torch.randn(2, 6)}
    save(model, place(tmp_path, name), example_args=(torch.randn(2, 3, 4, 5),), example_kwargs=example, free_sizes=True)
    loaded = load(place(tmp_path, name), trust=True)
    image, extra = torch.randn(3, 3, 7, 4), torch.randn(3, 6)
    expected = model(image, extra=extra)
    found = loaded(image, extra=extra)
    if isinstance(loaded, OnnxModel):
        assert loaded.input_names == ("image", "extra")
        assert loaded.output_names == ("output_image", "all_0", "all_2_0", "output_extra")
        flat = [expected["image"], expected["all"][0], expected["all"][2][0], expected["extra"]]
        for tensor, reference in zip(found, flat, strict=True):
            assert_equal(tensor, reference, bitwise=False)
        assert torch.equal(loaded(image, extra)[1], found[1])
        return
    assert set(found) == set(expected) and found["all"][1] is None
    assert torch.equal(found["image"], expected["image"]) and torch.equal(found["extra"], extra)
    assert torch.equal(found["all"][2][0], expected["all"][2][0])


@pytest.mark.parametrize("name", ["model.pt2", "model.onnx"])
@pytest.mark.parametrize(("model_class", "size"), [(WholeImagePool, 2), (WholeImagePool, 8), (BranchesOnSize, 8)])
def test_sizes_that_the_trace_depends_on_are_fixed_and_the_user_is_told(
    model_class: Callable[[], nn.Module], size: int, name: str, tmp_path: Path
) -> None:
    model = compiled(model_class())
    written = save(model, tmp_path / name, example_args=(torch.randn(2, 3, size, size),), free_sizes=True)
    loaded = load(tmp_path / name)
    assert written.free_dimensions is not None and "x[0]" in written.free_dimensions
    for shape in [(4, 3, size, size), (2, 3, size + 3, size + 3), (2, 3, 2 * size, 2 * size)]:
        x = torch.randn(shape)
        try:
            found = first(loaded(x))
        except (RuntimeError, AssertionError, InputError):
            assert written.notes and shape[2] != size
        else:
            assert_equal(found, model(x), bitwise=name == "model.pt2")


@pytest.mark.parametrize("name", ["model.pt2", "model.onnx"])
def test_skip_connections_leave_sizes_free_where_the_model_itself_works(name: str, tmp_path: Path) -> None:
    model = compiled(UNet())
    written = save(model, tmp_path / name, example_args=(torch.randn(1, 3, 8, 8),), free_sizes=True)
    assert written.free_dimensions == ("x[0]", "x[2]", "x[3]")
    x = torch.randn(2, 3, 20, 12)
    assert_equal(first(load(tmp_path / name)(x)), model(x), bitwise=name == "model.pt2")


def test_python_code_of_a_models_own_is_not_trusted_with_free_sizes(tmp_path: Path) -> None:
    example = (torch.randn(2, 3, 8, 8),)
    written = save(compiled(BranchesOnSize()), tmp_path / "m.pt2", example_args=example, free_sizes=True)
    assert written.free_dimensions == ("x[0]",)
    assert len(written.notes) == 1 and written.notes[0].startswith("with batch and sizes free the model would hold")


def test_a_model_that_torch_cannot_export_is_refused_in_one_line(tmp_path: Path) -> None:
    model = compiled(FixedSize())
    with pytest.raises(InputError, match=r"^torch\.export cannot capture the model: [^\n]+$"):
        save(model, tmp_path / "model.pt2", example_args=(torch.randn(1, 3, 9, 9),), free_sizes=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["model.pt2", "model/"])
def test_bfloat16_weights_come_back_with_their_bits(name: str, tmp_path: Path) -> None:
    model = compiled(Residual()).to(torch.bfloat16)
    x = torch.randn(2, 3, 9, 9, dtype=torch.bfloat16)
    save(model, place(tmp_path, name), example_args=(x,), free_sizes=True)
    loaded = load(place(tmp_path, name), trust=True)
    assert torch.equal(loaded(x), model(x)) and loaded(x).dtype == torch.bfloat16
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)


class Concatenating(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.relu(x), torch.cat([x, x], dim=-1)], dim=-1)


def test_an_onnx_model_counts_the_axes_of_concatenations_from_the_front(tmp_path: Path) -> None:
    """onnxruntime keeps its blocked layout of images only through a concatenation along axis 1."""
    import onnx

    save(Concatenating().eval(), tmp_path / "model.onnx", example_args=(torch.randn(2, 3, 9, 9),))
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert [node.attribute[0].i for node in nodes if node.op_type == "Concat"] in ([3], [3, 3])


def test_an_onnx_model_that_onnxruntime_cannot_run_is_refused(tmp_path: Path) -> None:
    model = compiled(Residual()).to(torch.bfloat16)
    with pytest.raises(InputError, match=r"^onnxruntime cannot load model\.onnx: [^\n]*$"):
        save(model, tmp_path / "model.onnx", example_args=(torch.randn(2, 3, 9, 9, dtype=torch.bfloat16),))
    assert os.listdir(tmp_path) == []


class Tied(nn.Module):
    grid: Tensor
    mask: Tensor
    empty: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight
        self.register_buffer("grid", torch.randn(4, 6).t()[:4], persistent=False)
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("empty", torch.zeros(0, 3, dtype=torch.int64))
        self.narrow = nn.Linear(4, 4).half()

    def forward(self, x: Tensor) -> Tensor:
        x = self.decoder(torch.sigmoid(self.encoder(x))) @ self.grid
        return torch.where(self.mask, self.narrow(x.half()).float(), -x) + self.empty.size(0)


def test_a_folder_keeps_names_dtypes_shared_and_strided_tensors(tmp_path: Path) -> None:
    model = compiled(Tied())
    save(model, tmp_path / "model", format="python")
    loaded = load(tmp_path / "model", trust=True)
    x = torch.randn(3, 4)
    assert torch.equal(loaded(x), model(x))
    assert set(loaded.state_dict()) == set(model.state_dict())
    for key, tensor in model.state_dict().items():
        assert loaded.state_dict()[key].dtype == tensor.dtype and torch.equal(loaded.state_dict()[key], tensor)
    assert loaded.get_parameter("decoder.weight") is loaded.get_parameter("encoder.weight")
    assert torch.equal(loaded.get_buffer("grid"), model.get_buffer("grid"))


def test_a_folder_needs_nothing_but_torch_and_reads_as_if_written_by_hand(tmp_path: Path) -> None:
    model = compiled(Residual())
    x = torch.randn(2, 3, 11, 8)
    save(model, place(tmp_path, "model/"))
    source = (tmp_path / "model" / "model.py").read_text()
    lines = ["y = self.block.a(x)", "y = self.block.b(y)", "y = y * self.scale", "x = x + y"]
    assert "".join(f"        {line}\n" for line in lines) in source
    assert "a=nn.Conv2d(8, 8, kernel_size=(3, 5), padding=(1, 2), groups=4)," in source
    torch.save((x, model(x)), tmp_path / "expected.pt")
    script = """
import sys
for name in ("rgc", "safetensors", "numpy"):
    sys.modules[name] = None
sys.path.insert(0, "model")
import torch
from model import load
x, expected = torch.load("expected.pt")
assert torch.equal(load()(x), expected)
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


class Quoted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.group = nn.ModuleDict({"1x1 'q": nn.Conv2d(3, 3, 1), "2": nn.ReLU()})

    def forward(self, x: Tensor) -> Any:
        x = self.group["2"](self.group["1x1 'q"](x))
        return {'"""\n\'; raise SystemExit': x[:, None, ..., ::2] - float("inf"), 3: (-x) ** -2.0, "n": x.shape[0] // 2}


def test_odd_names_and_values_are_quoted_in_a_folder(tmp_path: Path) -> None:
    model = compiled(Quoted())
    save(model, place(tmp_path, "model/"))
    loaded = load(place(tmp_path, "model/"), trust=True)
    x = torch.randn(2, 3, 4, 4)
    found, expected = loaded(x), model(x)
    assert list(found) == list(expected) and found["n"] == 1
    assert all(torch.equal(found[key], expected[key]) for key in list(expected)[:2])


def test_a_layer_that_is_not_torchs_own_is_named_and_other_formats_suggested(tmp_path: Path) -> None:
    model = compiled(nn.Sequential(nn.ReLU(), OwnLayer()))
    with pytest.raises(InputError, match=r"'1' of class .*OwnLayer .*save as \.pt2 or \.onnx"):
        save(model, place(tmp_path, "model/"))
    save(model, tmp_path / "model.pt2", example_args=(torch.randn(2, 3),))
    assert os.listdir(tmp_path) == ["model.pt2"]


def test_a_layer_with_a_hook_is_not_written_without_it(tmp_path: Path) -> None:
    model = compiled(Residual())
    model.get_submodule("head").register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(InputError, match="'head' of class nn.Linear differs from a fresh one in a hook"):
        save(model, place(tmp_path, "model/"))


def test_a_function_that_is_not_torchs_own_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"function .*python_of_its_own .*cannot be written as readable Python"):
        save(compiled(BranchesOnSize()), place(tmp_path, "model/"))


def test_weights_beyond_the_size_limit_go_into_a_second_file(tmp_path: Path) -> None:
    model = compiled(Residual())
    example = (torch.randn(2, 3, 8, 8),)
    for data in ("model.onnx.data", "model.onnx.data2", "model.onnx.data"):  # each pair over the one before
        written = save(model, tmp_path / "model.onnx", example_args=example, free_sizes=True, size_limit=1000)
        assert sorted(os.listdir(tmp_path)) == ["model.onnx", data]
    assert len(written.notes) == 1 and written.notes[0].startswith("not simplified")
    x = torch.randn(3, 3, 5, 6)
    assert_equal(first(load(tmp_path / "model.onnx")(x)), model(x), bitwise=False)
    save(model, tmp_path / "model.onnx", example_args=example)
    assert os.listdir(tmp_path) == ["model.onnx"]  # the second file went with the model that it belonged to


def test_a_failed_simplification_keeps_the_model_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxsim

    model = compiled(Residual())
    monkeypatch.setattr(onnxsim, "simplify", lambda model, **options: (model, False))
    written = save(model, tmp_path / "model.onnx", example_args=(torch.randn(2, 3, 8, 8),))
    assert written.notes == ("not simplified: onnxsim's result differed from its input",)
    x = torch.randn(3, 3, 8, 8)
    assert_equal(first(load(tmp_path / "model.onnx")(x)), model(x), bitwise=False)


def test_an_artifact_holds_no_source_path_and_no_value_of_the_example(tmp_path: Path) -> None:
    model = compiled(FixedSize())
    x = torch.full((1, 3, 8, 8), 0.123)
    for name in EVERY_FORMAT:
        save(model, place(tmp_path, name), example_args=(x,))
    for file in tmp_path.rglob("*.*"):
        if file.is_file():
            content = file.read_bytes()
            for private in (b"site-packages", b"test_artifact", str(tmp_path).encode(), x.numpy().tobytes()):
                assert private not in content


@pytest.mark.parametrize(
    ("name", "error"),
    [("model.pt2", KeyboardInterrupt), ("model.pt2", RuntimeError), ("model/", KeyboardInterrupt),
     ("external.onnx", KeyboardInterrupt)],
)  # fmt: skip
def test_an_interrupted_save_leaves_the_old_artifact_and_nothing_else(
    name: str, error: type[BaseException], tmp_path: Path
) -> None:
    limit = 100 if name.startswith("external") else PROTOBUF_LIMIT
    example = (torch.randn(2, 3, 8, 8),)
    save(compiled(FixedSize()), place(tmp_path, name), example_args=example, size_limit=limit)
    before = snapshot(tmp_path)

    def interrupt(loaded: nn.Module) -> None:
        assert isinstance(loaded, nn.Module)
        raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        save(compiled(FixedSize()), place(tmp_path, name), example_args=example, check=interrupt, size_limit=limit)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["model.pt2", "model/", "external.onnx"])
def test_a_failing_rename_puts_the_old_artifact_back(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 100 if name.startswith("external") else PROTOBUF_LIMIT
    example = (torch.randn(2, 3, 8, 8),)
    save(compiled(FixedSize()), place(tmp_path, name), example_args=example, size_limit=limit)
    before = snapshot(tmp_path)
    real = os.replace

    def fail_at_the_end(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / name and not str(source).endswith(".old"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", fail_at_the_end)
    monkeypatch.setattr("rgc.workshop.exchange", lambda *_: False)
    with pytest.raises(InputError, match=r"^cannot write [^\n]*: No space left on device$"):
        save(compiled(FixedSize()), place(tmp_path, name), example_args=example, size_limit=limit)
    assert snapshot(tmp_path) == before


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() if file.is_file() else b"" for file in sorted(folder.rglob("*"))}


def test_a_folder_replaces_an_earlier_artifact_but_no_other_folder(tmp_path: Path) -> None:
    model = compiled(FixedSize())
    save(model, place(tmp_path, "model/"))
    save(model, tmp_path / "model")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files \(notes.txt\)"):
        save(model, tmp_path / "model")
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"


def test_an_input_file_is_never_overwritten(tmp_path: Path) -> None:
    source = tmp_path / "model.pt2"
    source.write_bytes(b"original")
    model = compiled(FixedSize())
    cases: list[tuple[Path | str, Path]] = [
        (source, source),
        (tmp_path / "x" / ".." / "model.pt2", source),
        (tmp_path / "m.onnx", tmp_path / "m.onnx.data"),
        (f"{tmp_path}/f/", tmp_path / "f" / "model.safetensors"),
    ]
    for target, protected in cases:
        with pytest.raises(InputError, match="would overwrite .*, which is an input; choose another path"):
            save(model, target, example_args=(torch.randn(2, 3, 8, 8),), protect=[protected])
    assert source.read_bytes() == b"original"


@pytest.mark.parametrize("path", ["missing/model.pt2", "file/model.onnx", "missing/model/"])
def test_a_place_that_cannot_be_written_is_one_clear_line(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^cannot write [^\n]*: (No such file or directory|Not a directory)$"):
        save(compiled(FixedSize()), place(tmp_path, path), example_args=(torch.randn(2, 3, 8, 8),))
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("path", "message"),
    [("model.h5", "cannot tell the format of model.h5: use a path that ends in .pt2, .onnx or /"),
     ("model", "cannot tell the format of model: use a path that ends in .pt2, .onnx or /")],
)  # fmt: skip
def test_an_unknown_suffix_is_refused(path: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        choose_format(path)
    assert str(error.value) == message
    with pytest.raises(InputError, match="unknown format 'h5': use pt2, onnx, python"):
        choose_format(path, "h5")


def test_files_and_folders_are_not_taken_for_each_other(tmp_path: Path) -> None:
    model = compiled(FixedSize())
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(InputError, match="is a file; a Python artifact is a folder"):
        save(model, tmp_path / "file", format="python")
    with pytest.raises(InputError, match="is a folder; a pt2 artifact is a file"):
        save(model, tmp_path / "folder.pt2", format="pt2")


def test_what_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.pt2").write_bytes(b"no archive")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    (tmp_path / "bad").mkdir()
    for name, message in [("missing.pt2", "does not exist"), ("bad.pt2", "is not a .pt2 archive"),
                          ("bad.onnx", "is not an ONNX model"), ("bad", "it has no model.py")]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            load(tmp_path / name, trust=True)


def test_a_folder_is_only_run_when_trusted(tmp_path: Path) -> None:
    save(compiled(FixedSize()), place(tmp_path, "model/"))
    with pytest.raises(InputError, match="runs its model.py; load it only if you trust where it came from"):
        load(tmp_path / "model")


def test_an_onnx_model_counts_its_inputs(tmp_path: Path) -> None:
    save(compiled(FixedSize()), tmp_path / "model.onnx", example_args=(torch.randn(2, 3, 8, 8),))
    with pytest.raises(InputError, match="the model has inputs x; got 2 tensors"):
        load(tmp_path / "model.onnx")(torch.randn(2, 3, 8, 8), torch.randn(1))


def edited(source: Path, target: Path, edit: Callable[[str, bytes], bytes], extra: dict[str, bytes]) -> Path:
    """A copy of an archive with changed records."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, edit(name, old.read(name)))
        for name, content in extra.items():
            new.writestr(old.namelist()[0].split("/")[0] + "/" + name, content)
    return target


def test_our_own_archives_are_recognised_as_free_of_code(tmp_path: Path) -> None:
    for number, (model, inputs) in enumerate(
        [(Residual(), (torch.randn(1, 3, 8, 8),)), (Pair(), (torch.randn(2, 3, 4, 4), torch.randn(2, 6)))]
    ):
        path = tmp_path / f"{number}.pt2"
        save(compiled(model), path, example_args=inputs, free_sizes=True)
        assert is_pickle_free_pt2(path)
        read_pt2(path)


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ('"use_pickle": false', '"use_pickle": true', "is pickled"),
        ("Symbol('s", "__import__('s", "size expression"),
        ("torch.ops.aten.conv2d.default", "torch.os.system", "operator 'torch.os.system'"),
        ("torch.ops.aten.conv2d.default", "torch.ops.aten.from_file.default", "operator 'torch.ops.aten.from_file"),
        ('"name": "conv2d"', '"name": "a\\nimport os"', "text 'a\\\\nimport os'"),
        ("builtins.tuple", "collections.deque", "container 'collections.deque'"),
        ('"graph_module"', '"other"', "malformed"),
    ],
)
def test_an_archive_with_code_in_it_is_only_loaded_when_trusted(
    before: str, after: str, reason: str, tmp_path: Path
) -> None:
    save(compiled(Residual()), tmp_path / "good.pt2", example_args=(torch.randn(2, 3, 8, 8),), free_sizes=True)

    def edit(name: str, content: bytes) -> bytes:
        return content.replace(before.encode(), after.encode()) if name.endswith(".json") else content

    bad = edited(tmp_path / "good.pt2", tmp_path / "bad.pt2", edit, {})
    assert bad.read_bytes() != edited(tmp_path / "good.pt2", tmp_path / "same.pt2", lambda n, c: c, {}).read_bytes()
    assert not is_pickle_free_pt2(bad)
    with pytest.raises(InputError, match=f"could run code when loaded .*{reason}"):
        load(bad)


@pytest.mark.parametrize(
    "record", ["data/aotinductor/model/lib.so", "data/weights/model.pt", "data/constants/custom_obj_0"]
)
def test_an_archive_with_other_records_is_only_loaded_when_trusted(record: str, tmp_path: Path) -> None:
    save(compiled(FixedSize()), tmp_path / "good.pt2", example_args=(torch.randn(2, 3, 8, 8),))
    bad = edited(tmp_path / "good.pt2", tmp_path / "bad.pt2", lambda name, content: content, {record: b"x"})
    assert not is_pickle_free_pt2(bad)
    assert not is_pickle_free_pt2(Path(json.__file__))


def test_an_archive_with_example_inputs_or_another_layout_is_only_loaded_when_trusted(tmp_path: Path) -> None:
    program = torch.export.export(compiled(FixedSize()), (torch.randn(2, 3, 8, 8),))
    torch.export.save(program, tmp_path / "foreign.pt2")
    with pytest.raises(InputError, match="it holds pickled example inputs"):
        load(tmp_path / "foreign.pt2")
    load(tmp_path / "foreign.pt2", trust=True)
    save(compiled(FixedSize()), tmp_path / "good.pt2", example_args=(torch.randn(2, 3, 8, 8),))
    with zipfile.ZipFile(tmp_path / "good.pt2", "a") as archive:
        archive.writestr("version", "8")
    assert not is_pickle_free_pt2(tmp_path / "good.pt2")
