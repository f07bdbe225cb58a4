"""Does every kind of model file come in whole, every other one get one clear line, and none get to run its code?"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional

from rgc.errors import InputError
from rgc.loading import load_model


class Unknown(nn.Module):
    """A class that is on no allow-list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


class Bomb:
    """Pickles as a shell command that leaves a canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def small_model() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return model


ARCHITECTURES = """
from torch import nn
def small(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
def needy(width, *, depth, bias=True): return nn.Linear(width, depth)
def wrong(): return 42
class Holder:
    make = staticmethod(small)
number = 3
"""


@pytest.fixture
def architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory, which is not otherwise on the path."""
    (tmp_path / "rgc_test_architectures.py").write_text(ARCHITECTURES)
    (tmp_path / "rgc_test_broken.py").write_text("def :\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "rgc_test_architectures", raising=False)
    return "rgc_test_architectures"


def refusal(path: Path | str, *, arch: str | None = None, trust: bool = False) -> str:
    """The message with which a file is refused, held to the form that all of them have."""
    before = list(sys.path)
    with pytest.raises(InputError) as caught:
        load_model(str(path), arch=arch, trust=trust)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    assert str(path) in message or (arch is not None and arch in message)
    assert sys.path == before
    return message


def with_program(path: Path, program: bytes) -> Path:
    """A torch.save archive whose pickle is replaced."""
    torch.save(small_model(), path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, program if member.endswith("/data.pkl") else data)
    return path


def assert_same_state(found: nn.Module, expected: nn.Module) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# Whole modules


def test_a_module_of_torch_layers_comes_in_whole(tmp_path: Path) -> None:
    model = small_model()
    torch.save(model, tmp_path / "model.pt")
    found = load_model(str(tmp_path / "model.pt"))
    assert_same_state(found, model)
    assert not any(module.training for module in found.modules())
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(found(x), model(x))


def test_the_training_mode_is_left_as_it_was_saved(tmp_path: Path) -> None:
    torch.save(small_model().train(), tmp_path / "model.pt")
    assert load_model(str(tmp_path / "model.pt")).training


@pytest.mark.parametrize("activation", [functional.relu, functional.gelu], ids=["relu", "gelu"])
def test_a_layer_that_keeps_a_function_comes_in(tmp_path: Path, activation: object) -> None:
    torch.save(nn.TransformerEncoderLayer(8, 2, activation=activation), tmp_path / "model.pt")  # type: ignore[arg-type]
    assert load_model(str(tmp_path / "model.pt")).activation is activation


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
def test_a_module_inside_a_training_checkpoint_is_found(tmp_path: Path, key: str) -> None:
    torch.save({"epoch": 3, key: small_model()}, tmp_path / "model.pth")
    assert isinstance(load_model(str(tmp_path / "model.pth")), nn.Sequential)


@pytest.mark.parametrize(
    "name",
    [
        *("convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5"),
        *("mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1"),
        *("swin_t", "vit_b_16"),
    ],
)
def test_every_torchvision_family_comes_in(tmp_path: Path, name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = models.get_model(name, weights=None, **options).eval()
    torch.save(model, tmp_path / "model.pt")
    assert_same_state(load_model(str(tmp_path / "model.pt")), model)


@pytest.mark.parametrize(
    "name", ["retinanet_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_fpn", "ssdlite320_mobilenet_v3_large"]
)
def test_torchvision_detectors_come_in(tmp_path: Path, name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.get_model(name, weights=None, weights_backbone=None).eval()
    torch.save(model, tmp_path / "model.pt")
    assert_same_state(load_model(str(tmp_path / "model.pt")), model)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "convnext_atto",
            "efficientnet_lite0",
            "fastvit_t8",
            "ghostnet_100",
            "hgnetv2_b0",
            "levit_128s",
            "mobileone_s0",
        ),
        *("nfnet_l0", "poolformer_s12", "regnety_002", "repvgg_a0", "repvit_m0_9", "vit_tiny_patch16_224"),
    ],
)
def test_timm_models_come_in(tmp_path: Path, name: str) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name).eval()
    torch.save(model, tmp_path / "model.pt")
    assert_same_state(load_model(str(tmp_path / "model.pt")), model)


def test_a_model_of_the_zoo_comes_in_by_name_and_from_its_file(tmp_path: Path) -> None:
    model = load_model("zoo:repvgg_a0")
    assert isinstance(model, nn.Module)
    torch.save(model, tmp_path / "model.pt")
    assert_same_state(load_model(str(tmp_path / "model.pt")), model)
    with pytest.raises(InputError, match="no_such_model"):
        load_model("zoo:no_such_model")
    assert "leave --arch out" in refusal("zoo:repvgg_a0", arch="a:b")


def test_an_architecture_for_a_whole_module_is_an_error(tmp_path: Path, architectures: str) -> None:
    torch.save(small_model(), tmp_path / "model.pt")
    message = refusal(tmp_path / "model.pt", arch=f"{architectures}:small")
    assert message.endswith("holds a whole Sequential, not a state dict: leave --arch out")


# State dicts


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_state_dict_fills_its_architecture(
    tmp_path: Path, architectures: str, wrapper: str | None, prefix: str
) -> None:
    model = small_model()
    state: object = OrderedDict((prefix + key, value) for key, value in model.state_dict().items())
    torch.save({"epoch": 7, wrapper: state} if wrapper else state, tmp_path / "state.pth")
    found = load_model(str(tmp_path / "state.pth"), arch=f"{architectures}:small")
    assert_same_state(found, model)
    assert not found.training


def test_safetensors_fill_their_architecture(tmp_path: Path, architectures: str) -> None:
    model = small_model()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "state.safetensors")
    assert_same_state(load_model(str(tmp_path / "state.safetensors"), arch=f"{architectures}:Holder.make"), model)
    assert "is a state dict of 7 tensors; name its model with --arch" in refusal(tmp_path / "state.safetensors")


def test_a_state_dict_without_architecture_asks_for_one(tmp_path: Path) -> None:
    torch.save(small_model().state_dict(), tmp_path / "state.pt")
    message = refusal(tmp_path / "state.pt")
    assert message.endswith("is a state dict of 7 tensors; name its model with --arch package.module:factory")


def test_a_state_dict_that_does_not_fit_says_where(tmp_path: Path, architectures: str) -> None:
    state = small_model().state_dict()
    state["0.bias"] = torch.zeros(5)
    state["1.weight"] = torch.ones(4, dtype=torch.float64)
    state["head.weight"] = state.pop("0.weight")
    torch.save(state, tmp_path / "state.pt")
    assert refusal(tmp_path / "state.pt", arch=f"{architectures}:small").endswith(
        "1 missing: 0.weight; 1 unexpected: head.weight; 1 of another shape: 0.bias 5 instead of 4; "
        "1 of a type that would lose digits: 1.weight torch.float64 into torch.float32"
    )
    torch.save({f"other.{index}": torch.zeros(()) for index in range(9)}, tmp_path / "state.pt")
    message = refusal(tmp_path / "state.pt", arch=f"{architectures}:small")
    assert "9 unexpected: other.0, other.1, other.2, ..." in message


def test_a_half_precision_checkpoint_fills_a_full_precision_model(tmp_path: Path, architectures: str) -> None:
    state = {
        key: value.half() if value.is_floating_point() else value for key, value in small_model().state_dict().items()
    }
    torch.save(state, tmp_path / "state.pt")
    found = load_model(str(tmp_path / "state.pt"), arch=f"{architectures}:small").state_dict()
    assert all(torch.equal(found[key], value.to(found[key].dtype)) for key, value in state.items())


@pytest.mark.parametrize(
    ("arch", "complaint"),
    [
        ("small", "is not of the form package.module:factory"),
        (":small", "is not of the form package.module:factory"),
        ("rgc_no_such_module:small", "cannot import rgc_no_such_module"),
        (".relative:small", "is not of the form package.module:factory"),
        ("rgc_test_broken:small", "cannot import rgc_test_broken (invalid syntax"),
        ("rgc_test_architectures:large", "rgc_test_architectures has no large"),
        ("rgc_test_architectures:number", "is of type int, not a function or class that makes a model"),
        ("rgc_test_architectures:needy", "needs arguments (width, depth); name a factory that needs none"),
        ("rgc_test_architectures:wrong", "returned something of type int, not a torch.nn.Module"),
    ],
)
def test_an_architecture_that_makes_no_model_says_why(
    tmp_path: Path, architectures: str, arch: str, complaint: str
) -> None:
    torch.save(small_model().state_dict(), tmp_path / "state.pt")
    assert complaint in refusal(tmp_path / "state.pt", arch=arch)


@pytest.mark.parametrize(
    ("contents", "complaint"),
    [
        (torch.zeros(3), "holds a Tensor, not a model or a state dict"),
        ([1, 2], "holds a list, not a model or a state dict"),
        ({}, "holds a dict, not a model or a state dict"),
        ({"epoch": 3}, "holds a dict whose entry 'epoch' is of type int, not a tensor"),
        ({1: torch.zeros(3)}, "holds a dict whose entry 1 is of type Tensor"),
        ({"state_dict": {"a": "b"}}, "holds a dict whose entry 'a' is of type str, not a tensor"),
    ],
    ids=["tensor", "list", "empty", "number", "numbered", "wrapped"],
)
def test_what_is_no_state_dict_is_called_what_it_is(tmp_path: Path, contents: object, complaint: str) -> None:
    torch.save(contents, tmp_path / "state.pt")
    assert complaint in refusal(tmp_path / "state.pt")


# Files that are no models


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "missing.pt")
    assert "is a folder" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in refusal(tmp_path / "pipe")
    (tmp_path / "empty.pt").touch()
    assert "is empty" in refusal(tmp_path / "empty.pt")


@pytest.mark.parametrize("trust", [False, True])
def test_files_of_other_kinds(tmp_path: Path, trust: bool) -> None:
    path = tmp_path / "model.pt"
    path.write_text("hello\nworld\n")
    assert "is not a model that rgc reads" in refusal(path, trust=trust)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "nothing")
    assert "not one of torch.save" in refusal(path, trust=trust)
    (tmp_path / "model.safetensors").write_text("hello\nworld\n")
    assert "is not a readable safetensors file" in refusal(tmp_path / "model.safetensors", trust=trust)


@pytest.mark.parametrize("trust", [False, True])
def test_a_cut_off_file_is_called_damaged(tmp_path: Path, trust: bool) -> None:
    path = tmp_path / "model.pt"
    torch.save(small_model(), path)
    whole = path.read_bytes()
    for size in (1, 3, 10, 100, len(whole) // 2, len(whole) - 1, len(whole) - 30):
        path.write_bytes(whole[:size])
        assert "damaged" in refusal(path, trust=trust) or size < 2


def test_a_flipped_bit_is_noticed_wherever_it_matters(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    model = small_model()
    torch.save(model, path)
    whole = path.read_bytes()
    for position in range(0, len(whole), 37):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            found = load_model(str(path))
        except InputError:
            refusal(path)
        else:  # it fell into padding or into a field that nothing reads
            assert_same_state(found, model)


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning"
)  # torch.jit is deprecated; people still have its files
def test_a_torchscript_archive_is_called_one(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "model.pt")
    assert "is a TorchScript archive" in refusal(tmp_path / "model.pt")
    assert "is a TorchScript archive" in refusal(tmp_path / "model.pt", trust=True)


# Trust


def test_a_class_of_ones_own_needs_trust(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(Unknown(), path)
    message = refusal(path)
    assert f"{Unknown.__module__}.Unknown" in message
    assert "loading it can run code; add --trust" in message
    assert isinstance(load_model(str(path), trust=True), Unknown)


def test_a_trusted_class_that_is_nowhere_to_be_found(tmp_path: Path) -> None:
    path = with_program(tmp_path / "model.pt", b"\x80\x02crgc_no_such_module\nNet\n)\x81.")
    assert "No module named 'rgc_no_such_module'" in refusal(path, trust=True)


def test_a_trusted_class_is_found_in_the_working_directory(
    tmp_path: Path, architectures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rgc_test_network.py").write_text("from torch import nn\nclass Net(nn.Linear): pass\n")
    script = (
        "import sys, torch; sys.path.insert(0, '.'); import rgc_test_network as n; torch.save(n.Net(2, 2), 'model.pt')"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    assert type(load_model("model.pt", trust=True)).__name__ == "Net"
    monkeypatch.delitem(sys.modules, "rgc_test_network")


def test_the_old_format_and_bare_pickles_need_trust(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(small_model(), path, _use_new_zipfile_serialization=False)
    assert "is in the format of torch.save before PyTorch 1.6" in refusal(path)
    assert isinstance(load_model(str(path), trust=True), nn.Sequential)
    path.write_bytes(pickle.dumps({"a": 1}))
    assert "is a bare pickle, which torch.save did not write" in refusal(path)
    assert "cannot be loaded" in refusal(path, trust=True)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch.export.load before 2.15
def test_an_exported_program_needs_trust(tmp_path: Path) -> None:
    model, x = small_model(), torch.rand(1, 3, 8, 8)
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(model, (x,)), path)
    assert "is an exported program, whose archive may carry pickles: loading it can run code" in refusal(path)
    assert torch.equal(load_model(str(path), trust=True)(x), model(x))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/archive_format", "pt2")
    assert "is an exported program that cannot be loaded" in refusal(path, trust=True)


# Hostile files


def test_a_bomb_does_not_go_off(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    layer = nn.Linear(2, 2)
    layer.bomb = Bomb(canary)  # type: ignore[assignment]
    for bomb in (Bomb(canary), {"state_dict": {"a": Bomb(canary)}}, [torch.zeros(1), Bomb(canary)], layer):
        torch.save(bomb, tmp_path / "model.pt")
        assert "system" in refusal(tmp_path / "model.pt")
        assert not canary.exists()
        for legacy in (False, True):
            torch.save(bomb, tmp_path / "model.pt", pickle_protocol=4, _use_new_zipfile_serialization=not legacy)
            refusal(tmp_path / "model.pt")
            assert not canary.exists()
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Bomb(canary)))
    refusal(tmp_path / "model.pt")
    assert not canary.exists()


def test_a_bomb_inside_another_pickle_does_not_go_off(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    inner = pickle.dumps(Bomb(canary), protocol=2).decode("latin1").encode()
    text = b"X" + len(inner).to_bytes(4, "little") + inner + b"X\x06\x00\x00\x00latin1"
    for loads in (b"c_pickle\nloads\n", b"cpickle\nloads\n", b"ctorch.storage\n_load_from_bytes\n"):
        path = with_program(tmp_path / "model.pt", b"\x80\x02" + loads + b"c_codecs\nencode\n" + text + b"\x86R\x85R.")
        refusal(path)
        assert not canary.exists()


@pytest.mark.parametrize(
    "name",
    [
        "torch.nnevil\nsystem",
        "torch.nn.modules.module\ntorch.os.system",
        "torch.nn.modules.module.torch.os\nsystem",
        "torch.nn.functional\ntorch.os.system",
        "posix\nsystem",
        "torch.os\nsystem",
    ],
    ids=repr,
)
def test_a_bomb_behind_an_allowed_looking_name_does_not_go_off(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    package = tmp_path / "evil.py"
    package.write_text(f"open({str(canary)!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    command = f"touch {canary}".encode()
    argument = b"X" + len(command).to_bytes(4, "little") + command + b"\x85"
    partial = b"cfunctools\npartial\nc" + name.encode() + b"\n\x85R."
    for program in (b"c" + name.encode() + b"\n" + argument + b"R.", partial, b"cevil\nNet\n)\x81."):
        refusal(with_program(tmp_path / "model.pt", b"\x80\x02" + program))
        assert not canary.exists()


def test_two_pickles_in_one_archive_do_not_hide_a_bomb(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    bomb = pickle.dumps(Bomb(canary), protocol=2)
    for first, second in ((b"\x80\x02}.", bomb), (bomb, b"\x80\x02}.")):
        path = with_program(tmp_path / "model.pt", first)
        with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("model/data.pkl", second)
        refusal(path)
        assert not canary.exists()


def test_a_name_cannot_garble_the_message(tmp_path: Path) -> None:
    path = with_program(tmp_path / "model.pt", b"\x80\x02cevil\r\x1b[2J" + b"x" * 5000 + b"\nNet\n)\x81.")
    message = refusal(path)
    assert message.isprintable()


def test_a_library_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = with_program(tmp_path / "model.pt", b"\x80\x02ctimm.models.resnet\nResNet\n)\x81}b.")
    monkeypatch.setitem(sys.modules, "timm.models", None)
    assert "it needs timm.models, which does not import here" in refusal(path)


def test_importing_the_loader_stays_light() -> None:
    script = "import sys, rgc.loading; print(sorted({'timm', 'torchvision', 'onnx', 'sklearn'} & set(sys.modules)))"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
