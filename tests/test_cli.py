"""Does the command line do what it says, and on every error print one line, write nothing and exit as promised?"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rgc
from rgc import Conv, Deferred
from rgc.calibrate import Probe
from rgc.cli import run
from rgc.cli_options import Destination, InputSpec, default_output, example_for
from rgc.cli_output import one_line, pattern_text, progress
from rgc.errors import InputError
from rgc.models import reducenet20
from rgc.nn import DecayedActivation
from rgc.report import Verification
from rgc.rewrite import Hole
from rgc.timing import Call, Timer

SMALL = ["--input", "1x3x12x11"]

PLUGIN = '''"""Passes of a user."""

from rgc import Activation, Value, require, rewrite


@rewrite(lambda x, act: act(x))
def keep_activation(x: Value, act: Activation) -> Value:
    """An activation stays. It is the identity of nothing."""
    require(False, "activations are kept")
    return x


@rewrite(lambda x, act: act(x))
def lose_activation(x: Value, act: Activation) -> Value:
    """Wrong on purpose."""
    return x
'''


def randomised(model: nn.Module) -> nn.Module:
    """The model in eval mode, its batch norms with statistics, scales of both signs and offsets of their own."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            with torch.no_grad():
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.normal_(generator=generator)
                module.bias.normal_(generator=generator)
    return model.eval()


def small_model() -> nn.Module:
    torch.manual_seed(0)
    layers = {"conv": nn.Conv2d(3, 8, 3, padding=1), "bn": nn.BatchNorm2d(8), "act": nn.ReLU()}
    return randomised(nn.Sequential(OrderedDict(layers)))


def linear_reducenet() -> nn.Module:
    torch.manual_seed(0)
    model = reducenet20()
    for module in model.modules():
        if isinstance(module, DecayedActivation):
            module.set_decay(1.0)
    return randomised(model)


class Unknown(nn.Module):
    """A class that no allow-list holds."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with ``model.pt``."""
    monkeypatch.chdir(tmp_path)
    torch.save(small_model(), tmp_path / "model.pt")
    return tmp_path


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model.pt`` and what it compiles to in each format."""
    made = tmp_path_factory.mktemp("compiled")
    torch.save(small_model(), made / "model.pt")
    for output in ("model.pt2", "model.onnx", "model/"):
        assert run(["compile", str(made / "model.pt"), *SMALL, "--output", f"{made}/{output}"]) == 0
    return made


def contents(folder: Path) -> dict[str, str]:
    """Every file below ``folder`` with its hash."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


Fails = Callable[..., str]


@pytest.fixture
def fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run a command that has to fail: one line on stderr, nothing on stdout, nothing written. Returns the line."""

    def check(*arguments: str, status: int = 2) -> str:
        before = contents(folder)
        capsys.readouterr()
        assert run(arguments) == status
        seen = capsys.readouterr()
        assert seen.out == ""
        assert seen.err.startswith("rgc: ")
        assert seen.err.count("\n") == 1 and seen.err.endswith("\n")
        assert contents(folder) == before
        return seen.err

    return check


def test_compile_writes_beside_the_input_and_says_what_it_did(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compile", "model.pt", *SMALL]) == 0
    seen = capsys.readouterr()
    assert "fold_batchnorm" in seen.out
    assert "proved equal" in seen.out
    last = seen.out.splitlines()[-1]
    assert last.startswith("wrote model.fused.pt2 (")
    assert "kB; free dimensions: input[0], input[2], input[3])" in last
    assert seen.err == ""
    written = ("model.pt", "model.fused.pt2", "model.fused.pt2.certificate.json")
    assert set(contents(folder)) == {str(folder / name) for name in written}
    x = torch.randn(3, 3, 9, 10)
    with torch.no_grad():
        found = rgc.load("model.fused.pt2")(x)
        torch.testing.assert_close(found, small_model()(x))


def test_output_without_a_terminal_has_no_escape_codes(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["passes", "fold_batchnorm"]) == 0
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    assert run(["inspect", "model.pt", *SMALL]) == 0
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.delenv("NO_COLOR")
    assert run(["inspect", "model.pt", *SMALL]) == 0
    assert "\x1b[1m" in capsys.readouterr().out


def test_a_linear_reducenet_becomes_one_linear_layer_in_onnx(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(linear_reducenet(), "reducenet.pt")
    command = ["compile", "reducenet.pt", "--passes", "all", "--objective", "depth", "--format", "onnx"]
    assert run(command) == 0
    assert "wrote reducenet.fused.onnx (124" in capsys.readouterr().out
    assert run(["verify", "reducenet.pt", "reducenet.fused.onnx"]) == 0
    assert "equal" in capsys.readouterr().out
    assert run(["inspect", "reducenet.pt", "--passes", "all", "--objective", "depth"]) == 0
    shown = capsys.readouterr().out
    assert "ReduceNet: 1 operators, traced by torch.fx" in shown
    assert "linear 3072->10" in shown
    assert "collapse" in shown


def test_a_zoo_model_goes_to_the_working_directory_and_is_the_same_every_time(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compile", "zoo:reducenet20", "--format", "python"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("wrote reducenet20.fused/ (")
    assert {path.name for path in (folder / "reducenet20.fused").iterdir()} == {
        "certificate.json", "model.py", "model.safetensors",
    }  # fmt: skip
    assert run(["verify", "zoo:reducenet20", "reducenet20.fused/", "--trust"]) == 0


def test_a_state_dict_compiles_with_arch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "factories.py").write_text(
        "from torch import nn\n\n\ndef small():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))\n"
    )
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).state_dict(), "weights.pt")
    try:
        assert run(["inspect", "weights.pt", "--arch", "factories:small", *SMALL]) == 0
    finally:
        sys.modules.pop("factories", None)
    assert "conv 3x3 3->8" in capsys.readouterr().out


def test_the_report_is_written_as_json(folder: Path) -> None:
    command = ["compile", "model.pt", *SMALL, "--report", "report.json", "--verify", "full", "--dtype", "float64"]
    assert run(command) == 0
    report = json.loads((folder / "report.json").read_text())
    assert report["ops_before"] == {"Conv2d": 1, "BatchNorm2d": 1, "ReLU": 1}
    assert report["ops_after"] == {"Conv2d": 1, "ReLU": 1}
    assert [firing["rewrite"] for firing in report["rewrites"]] == ["fold_batchnorm"]
    assert report["input_shapes"] == [[1, 3, 12, 11]]
    assert report["max_error"] <= 1e-10
    assert report["verification"]["level"] == "full"
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.fused.pt2", "model.fused.pt2.certificate.json", "model.pt", "report.json",
    ]  # fmt: skip


def test_inspect_shows_the_graph_before_and_after_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "model.pt", *SMALL]) == 0
    before = capsys.readouterr().out
    assert "Sequential: 3 operators, traced by torch.fx" in before
    assert "%1 = conv 3x3 3->8(%0) : float32[1, 8, 12, 11]  # conv" in before
    assert "BatchNorm2d      1" in before
    assert run(["inspect", "model.pt", *SMALL, "--passes", "fold_batchnorm"]) == 0
    after = capsys.readouterr().out
    assert "batch norm" not in after
    assert "# conv + bn" in after
    assert contents(folder) == {str(folder / "model.pt"): contents(folder)[str(folder / "model.pt")]}


@pytest.mark.parametrize("artifact", ["model.pt2", "model.onnx", "model/"])
def test_verify_tells_equal_from_not_equal(
    compiled: Path, tmp_path: Path, artifact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trust = ["--trust"] if artifact == "model/" else []
    original = str(compiled / "model.pt")
    assert run(["verify", original, f"{compiled}/{artifact}", *SMALL, *trust]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "equal"
    perturbed = small_model()
    with torch.no_grad():
        next(perturbed.parameters())[0, 0, 0, 0] += 1e-2
    torch.save(perturbed, tmp_path / "perturbed.pt")
    assert run(["verify", str(tmp_path / "perturbed.pt"), f"{compiled}/{artifact}", *SMALL, *trust]) == 1
    seen = capsys.readouterr()
    assert seen.out.startswith("not equal: the artifact differs by ")
    assert seen.out.count("\n") == 1
    assert seen.err == ""


def test_verify_says_which_shapes_differ(compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(nn.Conv2d(3, 4, 1).eval(), tmp_path / "other.pt")
    assert run(["verify", str(tmp_path / "other.pt"), str(compiled / "model.onnx"), "--input", "1x3x6x6"]) == 1
    expected = "not equal: the artifact returns 1x8x6x6 where the original returns 1x4x6x6\n"
    assert capsys.readouterr().out == expected


def test_verify_refuses_bad_input(fails: Fails, compiled: Path, folder: Path) -> None:
    original = str(compiled / "model.pt")
    assert "to have 3 channels, but got 4" in fails("verify", original, f"{compiled}/model.pt2", "--input", "1x4x9x9")
    assert "does not exist" in fails("verify", original, "none.pt2", *SMALL)
    assert "no such file" in fails("verify", "none.pt", f"{compiled}/model.pt2", *SMALL)
    assert "cannot tell the format" in fails("verify", original, original, *SMALL)
    assert "holds Python code" in (line := fails("verify", original, f"{compiled}/model/", *SMALL))
    assert "--trust" in line
    (folder / "cut.pt2").write_bytes((compiled / "model.pt2").read_bytes()[:-500])
    assert "not a .pt2 archive" in fails("verify", original, "cut.pt2", *SMALL)


def test_verify_asks_for_trust_where_a_pt2_carries_pickles(fails: Fails, folder: Path) -> None:
    program = torch.export.export(small_model(), (torch.randn(1, 3, 12, 11),))
    torch.export.save(program, folder / "with_example.pt2")  # torch itself stores the example as a pickle
    line = fails("verify", "model.pt", "with_example.pt2", *SMALL)
    assert "loading it could run code" in line and "--trust" in line


def test_verify_refuses_a_size_that_the_artifact_does_not_take(fails: Fails, folder: Path) -> None:
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval(), "flat.pt")
    assert run(["compile", "flat.pt", "--input", "1x3x2x2", "--output", "flat.onnx"]) == 0
    line = fails("verify", "flat.pt", "flat.onnx", "--input", "1x12x1x1")
    assert "the artifact does not take an input of 1x12x1x1" in line


def test_passes_lists_all_and_explains_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["passes"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["fold_batchnorm", "default"] in [row[:2] for row in rows]
    assert ["collapse", "all"] in [row[:2] for row in rows]
    assert run(["passes", "fold_batchnorm"]) == 0
    shown = capsys.readouterr().out
    assert "s(Wx + b - m)" in shown
    assert "bn(conv(x))   with x: Value, conv: Conv | AvgPool, bn: BatchNorm" in shown
    assert "convolution without bias" in shown
    assert "batch statistics" in shown
    assert "may refuse because" in shown and "it reads {x}" in " ".join(shown.split())
    assert "not tried here: --prove" in shown
    assert run(["passes", "hygiene"]) == 0
    assert "has no pattern" in capsys.readouterr().out


def test_passes_proves_one_and_says_how_probably_a_wrong_one_passes(
    folder: Path, capsys: pytest.CaptureFixture[str], fails: Fails
) -> None:
    assert run(["passes", "fold_border", "--prove"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "equal, no rounding a wrong rewrite passes with a chance of at most" in shown
    assert "evidence bitwise" in shown or "evidence exact" in shown
    assert "assuming the replacement's numbers are polynomials" in shown
    (folder / "mine.py").write_text(
        "from torch import nn\nfrom rgc import Activation, Value, rewrite\n\n\n"
        "@rewrite(lambda x, act: act(x))\ndef lose(x: Value, act: Activation) -> Value:\n    return x\n\n\n"
        "@lose.fires_on(shape=(2, 3))\ndef relu() -> nn.Module:\n    return nn.Sequential(nn.ReLU()).eval()\n"
    )
    line = fails("passes", "lose", "--prove", "--plugin", "mine.py", status=1)
    assert "lose on the example 'relu': no law: [relu] became [nothing], and at " in line


def test_passes_proves_all_in_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("rgc.passes.ALL", (rgc.passes.fold_border, rgc.passes.drop_identity))
    monkeypatch.setattr("rgc.passes.OPT_IN", ())
    assert run(["passes", "--prove"]) == 0
    names = [row.split()[0] for row in capsys.readouterr().out.splitlines()]
    assert names[:3] == ["pass", "fold_border", "drop_identity"]


def test_a_plugin_adds_its_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine.py").write_text(PLUGIN)
    assert run(["passes", "--plugin", "mine.py"]) == 0
    assert "An activation stays." in capsys.readouterr().out
    assert run(["passes", "keep_activation", "--plugin", "mine.py"]) == 0
    assert "act(x)   with x: Value, act: Activation" in capsys.readouterr().out
    command = ["inspect", "model.pt", *SMALL, "--plugin", "mine.py", "--passes", "-lose_activation"]
    assert run(command) == 0
    shown = capsys.readouterr().out
    assert "activations are kept" in shown
    assert "fold_batchnorm" in shown
    assert "lose_activation" not in shown


def test_a_wrong_pass_is_undone_or_under_strict_ends_the_compilation(
    fails: Fails, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "mine.py").write_text(PLUGIN)
    wrong = ["compile", "model.pt", *SMALL, "--plugin", "mine.py", "--passes", "lose_activation"]
    assert "lose_activation" in fails(*wrong, "--strict", status=1)
    assert run(wrong) == 0
    assert "bug: lose_activation" in capsys.readouterr().out


@pytest.mark.parametrize("output", ["out.pt2", "out.onnx", "out/"])
def test_an_artifact_that_differs_is_not_kept(fails: Fails, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    wrong = Verification(False, None, 1.0, 0.0, 0.0, 1, "quick", "differs by 1")
    monkeypatch.setattr("rgc.artifact_check.compare", lambda *_: wrong)
    line = fails("compile", "model.pt", *SMALL, "--output", output, "--report", "report.json", status=1)
    assert "the written file differs by 1; nothing is kept" in line


def test_models_that_cannot_be_used_are_refused(fails: Fails, folder: Path) -> None:
    torch.save(small_model().train(), "train.pt")
    torch.save(Unknown().eval(), "unknown.pt")
    (folder / "cut.pt").write_bytes((folder / "model.pt").read_bytes()[:2000])
    torch.save(small_model().state_dict(), "weights.pt")
    for command in ("compile", "inspect"):
        assert "training mode" in fails(command, "train.pt", *SMALL)
        assert "no such file" in fails(command, "none.pt", *SMALL)
        assert "cut off or damaged" in fails(command, "cut.pt", *SMALL)
        assert "Unknown" in (line := fails(command, "unknown.pt", *SMALL))
        assert "--trust" in line
        assert "--arch" in fails(command, "weights.pt", *SMALL)
        assert "did you mean reducenet20" in fails(command, "zoo:reducenet2", *SMALL)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1x3xq", "is no shape"), ("", "is no shape"), ("1x0x3", "is no shape"), ("=1x3", "is no shape"),
        ("1x3x8x8:float8", "'float8' is none of int64"), ("99999x99999", "more than rgc tries"),
        ("1x4x8x8", "expected input[1, 4, 8, 8] to have 3 channels"), ("3x8", "does not run on an input of 3x8"),
        ("mask=1x3x8x8", "does not run"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit_are_refused(fails: Fails, text: str, reason: str) -> None:
    assert reason in fails("compile", "model.pt", "--input", text)


def test_more_inputs_than_the_model_takes_are_refused(fails: Fails) -> None:
    assert "does not run" in fails("compile", "model.pt", *SMALL, *SMALL)
    assert "given twice" in fails("compile", "model.pt", "--input", "a=1x3", "--input", "a=1x3")


def test_a_model_that_nobody_knows_needs_an_input(fails: Fails) -> None:
    assert "cannot tell what Sequential takes; say it with --input" in fails("compile", "model.pt")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["compile"], "Missing argument 'MODEL'"),
        (["compile", "model.pt", "--outptu", "x"], "--output"),
        (["comple", "model.pt"], "comple"),
        (["--verbose"], "--verbose"),
        (["compile", "model.pt", *SMALL, "--passes", "fold_batchnrm"], "did you mean 'fold_batchnorm'?"),
        (["compile", "model.pt", *SMALL, "--passes", ""], "unknown pass ''"),
        (["passes", "fold_batchnrm"], "did you mean 'fold_batchnorm'?"),
        (["compile", "model.pt", *SMALL, "--objective", "speed"], "'speed' is not one of"),
        (["compile", "model.pt", *SMALL, "--output", "x.onnx", "--format", "pt2"], "contradicts --output x.onnx"),
        (["compile", "model.pt", *SMALL, "--output", "x/", "--format", "onnx"], "contradicts --output x/"),
        (["compile", "model.pt", *SMALL, "--output", "x.h5"], "cannot tell the format of x.h5"),
        (["compile", "model.pt", *SMALL, "--output", ".."], "names no file or folder"),
        (["compile", "model.pt", *SMALL, "--output", "model.pt", "--format", "pt2"], "is the input itself"),
        (["compile", "model.pt", *SMALL, "--output", "no/such/x.pt2"], "there is no folder"),
        (["compile", "model.pt", *SMALL, "--report", "no/x.json"], "there is no folder"),
        (["compile", "model.pt", *SMALL, "--report", "x.html"], "writes .json reports only"),
        (["compile", "model.pt", *SMALL, "--bisect"], "--bisect: say with --data FILE on which inputs"),
        (["compile", "model.pt", *SMALL, "--bisect", "--output", "x.pt2"], "--bisect: leave --output out"),
        (["compile", "model.pt", *SMALL, "--data", "none.pt"], "none.pt: no such file of inputs"),
        (["compile", "model.pt", "--plan", "p.json", "--passes", "all"], "--plan: leave --passes out"),
        (["compile", "model.pt", "--plan", "none.json"], "none.json: cannot be read"),
        (["compile", "model.pt", *SMALL, "--save-plan", "p.txt"], "a plan is written as .json"),
        (["compile", "model.pt", *SMALL, "--save-plan", "no/p.json"], "there is no folder"),
        (["compile", "model.pt", *SMALL, "--report", "r.json", "--save-plan", "r.json"], "is the report itself"),
        (["inspect", "model.pt", *SMALL, "--plugin", "x.py"], "say with --passes"),
        (["passes", "--plugin", "none.py"], "no such file of passes"),
        (["passes", "--plugin", "none"], "no module 'none'"),
    ],
)
def test_options_that_make_no_sense_are_refused(fails: Fails, arguments: list[str], reason: str) -> None:
    assert reason in fails(*arguments)


def test_a_plugin_that_cannot_run_is_refused_with_its_line(fails: Fails, folder: Path) -> None:
    (folder / "syntax.py").write_text("x = 1\nx = = 2\n")
    (folder / "raises.py").write_text("import rgc\n\n1 / 0\n")
    assert "line 2: SyntaxError" in fails("passes", "--plugin", "syntax.py")
    assert "line 3: ZeroDivisionError" in fails("passes", "--plugin", "raises.py")


def test_inputs_are_never_overwritten(fails: Fails, folder: Path) -> None:
    (folder / "artifact.json").mkdir()
    assert "is the input itself" in fails("compile", "model.pt", *SMALL, "--report", _link(folder, "model.json"))
    assert "is the artifact itself" in fails(
        "compile", "model.pt", *SMALL, "--output", "x.json", "--format", "pt2", "--report", "x.json"
    )
    assert "is a folder" in fails("compile", "model.pt", *SMALL, "--report", "artifact.json")


def _link(folder: Path, name: str) -> str:
    (folder / name).symlink_to(folder / "model.pt")
    return name


@pytest.mark.skipif(os.geteuid() == 0, reason="every folder is writable for root")
def test_a_folder_that_is_not_writable_is_refused(fails: Fails, folder: Path) -> None:
    (folder / "closed").mkdir(mode=0o555)
    assert "is not writable" in fails("compile", "model.pt", *SMALL, "--output", "closed/x.pt2")


def test_a_folder_that_turns_out_unwritable_is_refused(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    make = tempfile.mkdtemp

    def refuse(suffix: str | None = None, prefix: str | None = None, dir: Any = None) -> str:
        if prefix == ".rgc-":  # a folder beside the user's files
            raise PermissionError(13, "Permission denied")
        return make(suffix, prefix, dir)

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    assert "cannot write x.pt2: Permission denied" in fails("compile", "model.pt", *SMALL, "--output", "x.pt2")


def test_an_interrupted_command_writes_nothing(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rgc.artifact_check.compare", interrupt)
    assert fails("compile", "model.pt", *SMALL, "--report", "x.json", status=130) == "rgc: interrupted\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "that takes more memory than there is, or than --limit memory= allows"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory\nframe #0"), "that takes more memory than there is"),
        (RecursionError("maximum recursion depth exceeded"), "the model is nested too deeply for PyTorch to walk"),
    ],
)
def test_what_the_machine_cannot_hold_is_one_line(
    fails: Fails, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    def give_up(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("rgc.compiler.compile", give_up)
    assert fails("compile", "model.pt", *SMALL).startswith(f"rgc: {line}")


def test_an_artifact_larger_than_the_memory_is_not_read(fails: Fails, compiled: Path) -> None:
    arguments = ("verify", "model.pt", str(compiled / "model.pt2"), *SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rgc.cli.process_within", lambda _: contextlib.nullcontext())  # which would stop it before
        assert "is larger than the 1.0 KiB that are read (--limit memory=)" in fails(
            *arguments, "--limit", "memory=1KiB"
        )


def test_help_shows_examples_and_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "rgc compile model.pt --passes all" in capsys.readouterr().out
    for command in ("compile", "inspect", "verify", "passes"):
        for flag in ("-h", "--help"):
            assert run([command, flag]) == 0
            assert f"Examples:\n    rgc {command}" in capsys.readouterr().out
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"rgc {rgc.__version__}\n"


def test_the_example_is_the_model_s_own_or_the_size_that_its_library_names() -> None:
    assert example_for(reducenet20(), ()).tensors[0].shape == (1, 3, 32, 32)
    torchvision = pytest.importorskip("torchvision")
    assert example_for(torchvision.models.resnet18(), ()).tensors[0].shape == (1, 3, 224, 224)
    with torch.device("meta"):
        inception = torchvision.models.inception_v3(init_weights=False)
    assert example_for(inception, ()).tensors[0].shape == (1, 3, 299, 299)
    with pytest.raises(InputError, match="cannot tell what VideoResNet takes"), torch.device("meta"):
        example_for(torchvision.models.video.r3d_18(), ())
    timm_like = small_model()
    timm_like.pretrained_cfg = {"input_size": (3, 64, 48)}
    assert example_for(timm_like, ()).tensors[0].shape == (1, 3, 64, 48)


def test_inputs_come_by_position_and_by_name_with_integers_inside_the_vocabulary() -> None:
    specs = [InputSpec.parse(text) for text in ("2x16:int64", "mask=2x16:bool", "1x3")]
    example = example_for(nn.Embedding(3, 4), specs)
    tokens, plain = example.args
    assert tokens.dtype is torch.int64 and set(tokens.unique().tolist()) == {0, 1, 2}
    assert plain.shape == (1, 3) and plain.dtype is torch.float32
    assert example.kwargs["mask"].dtype is torch.bool
    again = example_for(nn.Embedding(3, 4), specs)
    assert torch.equal(plain, again.args[1])


def test_the_format_follows_the_output_and_the_default_name_the_format() -> None:
    assert Destination.of("model.pt", "x.onnx", None, None).format == "onnx"
    assert Destination.of("model.pt", "x/", None, None).format == "python"
    assert Destination.of("model.pt", "x", "python", None).artifact == Path("x")
    assert Destination.of("model.pt", None, "onnx", None).artifact == Path("model.fused.onnx")
    assert default_output("a/b.model.pth", "python") == Path("a/b.model.fused")


def test_an_error_is_one_line_that_cannot_steer_the_terminal() -> None:
    assert one_line("a\nb\t\x1b]0;c\x07") == "a b \\x1b]0;c\\x07"


def test_patterns_are_shown_as_they_are_written() -> None:
    x, a, b = Hole("x"), Hole("a"), Hole("b")
    assert pattern_text(a(x) - (b(x) + x)) == "a(x) - (b(x) + x)"
    assert pattern_text(a(x, b(x)) * (x + x)) == "a(x, b(x)) * (x + x)"


def test_progress_is_silent_away_from_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("compiling"):
        pass
    assert capsys.readouterr() == ("", "")


def test_progress_shows_on_a_terminal_once_it_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress("compiling"):
        pass
    assert "compiling" not in capsys.readouterr().err
    monkeypatch.setattr("rgc.cli_output._PATIENCE", 0.0)
    shown = ""
    with progress("compiling"):
        for _ in range(100):  # five seconds at most for the first frame
            shown += capsys.readouterr().err
            if "compiling" in shown:
                break
            time.sleep(0.05)
    assert "compiling" in shown


def two_convolutions() -> nn.Module:
    torch.manual_seed(0)
    layers = {"conv1": nn.Conv2d(3, 16, 1), "act": nn.ReLU(), "conv2": nn.Conv2d(16, 4, 3, padding=1, bias=False)}
    return nn.Sequential(OrderedDict(layers)).eval()


def test_inspect_explains_a_layer_in_place_of_the_graph(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "model.pt", *SMALL, "--explain", "conv"]) == 0
    seen = capsys.readouterr()
    assert seen.err == ""
    assert "conv + bn: now conv 3x3 3->8" in seen.out and "fold_batchnorm at bn: exact" in seen.out
    assert "%0 = input()" not in seen.out


@pytest.mark.parametrize("where", ["conv1,conv2", "conv1 + conv2", "conv2, conv1"])
def test_inspect_explains_a_pair(folder: Path, capsys: pytest.CaptureFixture[str], where: str) -> None:
    torch.save(two_convolutions(), "two.pt")
    assert run(["inspect", "two.pt", *SMALL, "--explain", where]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "conv1 -> conv2: not one operator because relu at act is not linear" in text
    assert "change replace ReLU act by rgc.nn.DecayedActivation and decay it to 1" in text
    assert "gives conv 3x3 3->4 + ones; another function: train it further gains" in text


def test_inspect_explains_under_the_passes_and_the_objective_that_are_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--passes", "hygiene", "--objective", "macs", "--target", "cuda"]
    assert run(["inspect", "model.pt", *SMALL, *options, "--explain", "conv"]) == 0
    seen = capsys.readouterr().out
    assert "passes hygiene, objective macs, times estimated for cuda" in seen
    assert "none of the passes in use takes conv and bn together" in seen and "--passes default" in seen


def test_compile_explains_after_its_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compile", "model.pt", *SMALL, "--explain", "conv,bn"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(at for at, line in enumerate(lines) if "proved equal" in line) < lines.index("conv,bn in Sequential")
    assert lines[-1].startswith("wrote model.fused.pt2 (") and lines[-3].strip() == ""
    assert lines[-2] == "certificate: model.fused.pt2.certificate.json"


@pytest.mark.parametrize("command", ["compile", "inspect"])
def test_a_layer_that_is_not_there_is_one_line_with_a_close_name(fails: Fails, command: str) -> None:
    assert "explain 'cnv': the model has no layer 'cnv'; did you mean conv?" in fails(
        command, "model.pt", *SMALL, "--explain", "cnv"
    )


def test_an_explanation_without_colour_has_no_escape_codes_and_fits(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(two_convolutions(), "two.pt")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["inspect", "two.pt", *SMALL, "--explain", "conv1"]) == 0
    seen = capsys.readouterr().out
    assert "\x1b" not in seen and max(map(len, seen.splitlines())) <= 80


@pytest.mark.parametrize("start", [["-m", "rgc"], ["-c", "from rgc.cli import main; main()"]])
def test_the_console_script_exits_with_the_status(folder: Path, start: list[str]) -> None:
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, *start, "compile", "model.pt", "--input", "1x3xq"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "rgc: --input 1x3xq: is no shape; write 1x3x224x224, name=1x16 or 1x16:int64\n"


QUICK = ["--pairs", "6", "--seconds", "0.05", "--runtimes", "eager,onnxruntime"]


@pytest.mark.parametrize("artifact", ["model.pt2", "model.onnx", "model/"])
def test_bench_compares_an_artifact_with_its_original(
    compiled: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, artifact: str
) -> None:
    report = tmp_path / "times.json"
    original, made = str(compiled / "model.pt"), f"{compiled}/{artifact}"
    assert run(["bench", original, made, "--trust", *SMALL, *QUICK, "--batch", "1,2", "--report", str(report)]) == 0
    seen = capsys.readouterr()
    assert seen.err == ""
    found = json.loads(report.read_text())
    runtimes = ["onnxruntime"] if artifact == "model.onnx" else ["eager", "onnxruntime"]
    settings = [(each["setting"]["runtime"], each["setting"]["batch"]) for each in found["comparisons"]]
    assert settings == [(runtime, batch) for runtime in runtimes for batch in (1, 2)]
    assert (found["original"], found["compiled"]) == (original, made)
    for runtime in runtimes:
        assert runtime in seen.out
    is_left_out = "is an ONNX file, which runs in onnxruntime only" in " ".join(seen.out.split())
    assert is_left_out == (artifact == "model.onnx")


def test_bench_compares_two_models(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "model.pt", "model.pt", *SMALL, *QUICK, "--threads", "1"]) == 0
    assert "model.pt and model.pt on " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "--batch 0: is no positive number, nor several separated by commas"),
        (["--threads", "1,x"], "--threads 1,x: is no positive number, nor several separated by commas"),
        (["--runtimes", "tensorrt"], "unknown runtime 'tensorrt'; choose of eager, torch.compile, onnxruntime"),
        (["--pairs", "3"], "3 pairs are too few for an interval; measure at least 6"),
        (["--seconds", "-1"], "the time for a setting is a positive number of seconds, got -1"),
        (["--device", "abacus"], "unknown device 'abacus'; use cpu or cuda"),
        (["--cuda-graphs"], "CUDA graphs need device cuda, got cpu"),
        (["--report", "times.html"], "--report times.html: this version writes .json files only"),
        (["--report", "nowhere/times.json"], "--report nowhere/times.json: there is no folder"),
    ],
)
def test_bench_refuses_wrong_options(fails: Fails, options: list[str], message: str) -> None:
    assert message in fails("bench", "model.pt", "model.pt", *SMALL, *options)


def test_bench_asks_for_trust_and_for_files_that_exist(fails: Fails, folder: Path) -> None:
    assert "missing.pt2 does not exist" in fails("bench", "model.pt", "missing.pt2")
    assert "missing.pt: no such file" in fails("bench", "missing.pt", "model.pt")
    (folder / "made").mkdir()
    assert "add --trust" in fails("bench", "model.pt", "made/")


@pytest.fixture
def few_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `rgc calibrate` measures takes a minute; here it is two layers, on a machine without noise."""

    class Steady(Timer):
        def seconds(self, call: Call, times: int) -> float:
            call()
            return 1e-3

    three = Deferred((4, 4, 3, 3), lambda: torch.zeros(4, 4, 3, 3))
    probes = [Probe(Conv(three), (1, 4, 8, 8)), Probe(Conv(torch.zeros(4, 8)), (1, 8))]
    monkeypatch.setattr("rgc.calibrate.standard_probes", lambda target: probes)
    monkeypatch.setattr("rgc.calibrate.timer_for", lambda device: Steady())


@pytest.mark.usefixtures("few_probes")
def test_calibrate_measures_and_compile_uses_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    threads = torch.get_num_threads()
    assert run(["calibrate", "--threads", str(threads)]) == 0
    seen = capsys.readouterr()
    assert seen.err == "" and "highest rate" in seen.out and "smallest calls" in seen.out
    (written,) = (folder / "cache" / "rgc" / "calibrations").iterdir()
    assert seen.out.splitlines()[-1] == f"wrote {written}"
    assert run(["inspect", "model.pt", *SMALL, "--explain", "conv"]) == 0
    assert "times estimated for cpu (calibrated)" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("few_probes")
def test_calibrate_writes_a_file_that_compile_takes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["calibrate", "--output", "server.json", "--dtype", "bfloat16", "--threads", "2"]) == 0
    assert "cpu, bfloat16, 2 threads" in capsys.readouterr().out
    assert run(["compile", "model.pt", *SMALL, "--target", "server.json"]) == 0
    assert "proved equal" in capsys.readouterr().out


def test_calibrate_refuses_wrong_options(fails: Fails) -> None:
    assert "'tpu' is not one of 'cpu', 'cuda'" in fails("calibrate", "--target", "tpu")
    assert "--threads 1,2: one number at a time" in fails("calibrate", "--threads", "1,2")
    assert "--output speed.txt: this version writes .json files only" in fails("calibrate", "--output", "speed.txt")
    assert "unknown target 'tpu'" in fails("compile", "model.pt", *SMALL, "--target", "tpu")
    assert "server.json: cannot be read" in fails("compile", "model.pt", *SMALL, "--target", "server.json")
    if not torch.cuda.is_available():
        assert "target cuda: this PyTorch sees no GPU" in fails("calibrate", "--target", "cuda")


# --- a user's own inputs, and plans ---------------------------------------------------------------------------------

WIDE_CLAMP = '''"""A pass that is wrong beyond a clamp."""

from rgc import Activation, Identity, Value, require, rewrite


@rewrite(lambda x, clamp: clamp(x))
def lose_wide_clamp(x: Value, clamp: Activation) -> Value:
    """Wrong where values lie beyond the clamp."""
    require(clamp.name == "hardtanh", "not a clamp")
    return Identity("lost")(x)
'''


def test_bisect_names_the_rewrite_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = {"conv": nn.Conv2d(3, 8, 3), "bn": nn.BatchNorm2d(8), "clamp": nn.Hardtanh(-1e6, 1e6)}
    torch.save(randomised(nn.Sequential(OrderedDict(layers))), "clamped.pt")
    (folder / "wide.py").write_text(WIDE_CLAMP)
    data = torch.randn(4, 3, 12, 11)
    torch.save(data, "near.pt")
    data[2] *= 1e9
    torch.save({"input": data}, "far.pt")
    before = contents(folder)
    command = ["compile", "clamped.pt", *SMALL, "--bisect", "--plugin", "wide.py", "--data"]
    assert run([*command, "near.pt"]) == 0
    assert capsys.readouterr().out == "equal on all 4 samples\n"
    assert run([*command, "far.pt"]) == 1
    seen = capsys.readouterr()
    assert seen.err == "" and "lose_wide_clamp at clamp" in seen.out and "sample 2 of the data" in seen.out
    assert run([*command, "far.pt", "--passes", "default,-lose_wide_clamp"]) == 0
    assert contents(folder) == before


def test_data_join_the_proof_of_compile_and_verify(
    compiled: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(torch.randn(5, 3, 12, 11), "data.pt")
    for artifact in ("model.pt2", "model.onnx"):
        command = ["verify", str(compiled / "model.pt"), str(compiled / artifact), *SMALL]
        counts = []
        for more in ([], ["--data", "data.pt"]):
            assert run([*command, *more]) == 0
            (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("inputs")]
            counts.append(int(line.split()[1]))
        assert counts[1] == counts[0] + 5
    torch.save(torch.randn(5, 3, 13, 11), "taller.pt")
    assert run(["compile", "model.pt", *SMALL, "--data", "taller.pt", "--output", "fused.pt2"]) == 0
    torch.save(torch.randn(5, 2, 12, 11), "thin.pt")
    assert run(["compile", "model.pt", *SMALL, "--data", "thin.pt"]) == 2
    assert "the model does not run on sample 0 of the data" in capsys.readouterr().err


def test_a_plan_is_saved_and_taken_for_the_next_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compile", "model.pt", *SMALL, "--save-plan", "plan.json", "--output", "first/"]) == 0
    torch.manual_seed(7)
    other = small_model()
    with torch.no_grad():
        other[0].weight.mul_(0.5)  # type: ignore[index]
    torch.save(other, "next.pt")
    assert run(["compile", "next.pt", "--plan", "plan.json", "--output", "second/"]) == 0
    assert run(["compile", "next.pt", *SMALL, "--output", "afresh/"]) == 0
    files = [{path.name: path.read_bytes() for path in (folder / name).iterdir()} for name in ("second", "afresh")]
    for each in files:
        each.pop("certificate.json")  # which names the options, a plan among them
    assert files[0] == files[1]
    torch.save(linear_reducenet(), "other.pt")
    capsys.readouterr()
    assert run(["compile", "other.pt", "--plan", "plan.json"]) == 2
    assert "plan.json: is the plan of another model" in capsys.readouterr().err


RELU_ONCE = """
from torch import nn

from rgc import Activation, Value, require, rewrite


@rewrite(lambda x, first, second: second(first(x)))
def relu_once(x: Value, first: Activation, second: Activation) -> Value:
    '''relu(relu(x)) = relu(x).'''
    require(first.name == second.name == "relu", "not two ReLUs")
    return first(x)


@relu_once.fires_on(shape=(2, 3))
def relus() -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.ReLU())


@relu_once.leaves_alone(shape=(2, 3), because="not two ReLUs")
def relu_and_gelu() -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.GELU())
"""
NO_MODELS = ["--examples", "0", "--no-mutation"]


def test_a_pass_is_tested_and_what_is_wrong_is_told_with_a_program(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "mine.py").write_text(RELU_ONCE.replace("nn.ReLU(), nn.ReLU()", "nn.ReLU(), nn.Tanh()"))
    before = contents(folder)
    assert run(["test", "mine.py", *NO_MODELS]) == 1
    said, errors = capsys.readouterr()
    assert not errors
    assert {path: told for path, told in contents(folder).items() if "__pycache__" not in path} == before
    assert "wrong: relu_once on the example 'relus' (seed 0): it must fire, but refuses: not two ReLUs" in said
    assert "    import rgc\n" in said and "self.m_1 = nn.Tanh()" in said
    assert [line.split()[0] for line in said.splitlines()[2:6]] == ["examples", "laws", "fuzzing", "mutation"]


def test_a_pass_with_which_nothing_is_wrong_exits_with_0(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine.py").write_text(RELU_ONCE)
    assert run(["test", "mine.py", *NO_MODELS]) == 0
    assert "wrong: " not in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "reason"), [
    (["none.py"], "none.py: no such file of passes"),
    (["none"], "no module 'none' for passes"),
    (["empty.py"], "defines no pass; decorate a function with @rgc.rewrite"),
    (["syntax.py"], "syntax.py: cannot be loaded (line 2: SyntaxError"),
    (["raises.py"], "raises.py: cannot be loaded (line 1: ZeroDivisionError"),
    (["mine.py", "--examples", "-1"], "--examples"),
    ([], "Missing argument 'FILE|MODULE'"),
])  # fmt: skip
def test_what_holds_no_pass_is_refused_in_a_line(fails: Fails, folder: Path, arguments: list[str], reason: str) -> None:
    for name, text in {"empty": "x = 1\n", "syntax": "x = 1\nx = = 2\n", "raises": "1 / 0\n", "mine": PLUGIN}.items():
        (folder / f"{name}.py").write_text(text)
    assert reason in fails("test", *arguments)


def test_a_plugin_may_not_replace_a_pass_unseen(fails: Fails, folder: Path) -> None:
    (folder / "mine.py").write_text(PLUGIN)
    (folder / "other.py").write_text(PLUGIN)
    (folder / "clash.py").write_text(PLUGIN.replace("keep_activation", "fold_scale"))
    command = ["compile", "model.pt", *SMALL]
    assert "the pass fold_scale has the name of a built-in pass" in fails(*command, "--plugin", "clash.py")
    assert "another plugin has a pass keep_activation too" in fails(
        *command, "--plugin", "mine.py", "--plugin", "other.py"
    )


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("body", "reason"), [
    ("raise ValueError('no idea')", "it raised ValueError: no idea (mine.py:8)"),
    ("return 3", "it must return a Value, returned int"),
    ("conv.weight.mul_(2); return x", "overwrites a weight (mine.py:8)"),
    ("return conv(conv(x))", "weight expects 3 input channels, got 8"),
])  # fmt: skip
def test_errors_inside_a_plugin_are_reported_by_its_name_and_the_model_stays(
    folder: Path, body: str, reason: str, double: bool
) -> None:
    (folder / "mine.py").write_text(
        f"from rgc import Conv, Value, rewrite\n\n\n@rewrite(lambda x, conv: conv(x))\n"
        f"def mine(x: Value, conv: Conv) -> Value:\n    # of a user\n    # who errs\n    {body}\n"
    )
    model = small_model().double() if double else small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(1, 3, 12, 11, dtype=torch.float64 if double else torch.float32)
    report = rgc.compile(model, x, passes=["default", str(folder / "mine.py")]).report
    assert {failure.rewrite for failure in report.failures} == {"mine"}
    assert reason in report.failures[0].reason
    assert any(firing.rewrite == "fold_batchnorm" for firing in report.rewrites)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
