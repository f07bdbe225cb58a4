"""Do the caps hold, and does what goes over one get an error, a refusal or a note, as it should?"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import rgc
from rgc.cli import run
from rgc.errors import InputError
from rgc.limits import MOST_LEVELS, Limits, count_layers, machine_memory, process_within
from rgc.testing import randomize


def chain(length: int) -> nn.Module:
    """Convolutions of 3x3 without padding, which merge to one of 2 length + 1 taps."""
    return randomize(nn.Sequential(*(nn.Conv2d(2, 2, 3) for _ in range(length))).eval())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("nodes", "write one of nodes=NUMBER"), ("time=3", "write one of"), ("nodes=0", "'0' is not a positive number"),
     ("nodes=1.5", "not a positive number"), ("kernel=-3", "not a positive number"), ("memory=2TB", "not a positive"),
     ("seconds=inf", "not a positive number"), ("seconds=nan", "not a positive number"), ("=3", "write one of"),
     ("memory=x", "not a positive number")],
)  # fmt: skip
def test_limits_that_are_none_are_refused(text: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=complaint):
        Limits.parse([text])
    assert run(["compile", "model.pt", "--limit", text]) == 2
    seen = capsys.readouterr().err
    assert seen.startswith(f"rgc: --limit {text}: ") and seen.count("\n") == 1


def test_limits_cannot_be_built_wrong() -> None:
    for wrong in ({"nodes": 0}, {"kernel": True}, {"seconds": float("nan")}, {"memory": "1"}):
        with pytest.raises(InputError, match="is not a positive number"):
            Limits(**wrong)  # type: ignore[arg-type]


def test_limits_are_read_with_their_units() -> None:
    given = Limits.parse(["memory=1.5GiB", "seconds=0.5", "kernel=9", "nodes=1000"])
    assert given == Limits(1000, 9, 3 * 2**29, 0.5)


def test_the_memory_is_that_of_the_container_where_it_has_a_bound(tmp_path: Path) -> None:
    own = machine_memory(tmp_path / "none")
    assert own > 2**26
    (tmp_path / "bound").write_text("1048576\n")
    (tmp_path / "free").write_text("max\n")
    assert (machine_memory(tmp_path / "bound"), machine_memory(tmp_path / "free")) == (2**20, own)


def test_a_model_of_more_layers_than_allowed_is_an_error_before_any_work() -> None:
    with pytest.raises(InputError, match=r"Sequential: has 6 layers, .* at most 5 are taken \(--limit nodes=\)"):
        rgc.compile(chain(5), torch.randn(1, 2, 16, 16), limits=Limits(nodes=5))
    rgc.compile(chain(5), torch.randn(1, 2, 16, 16), limits=Limits(nodes=6))


class Busy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            x = x + x.relu()
        return x


def test_a_graph_of_more_operations_than_allowed_is_an_error() -> None:
    with pytest.raises(InputError, match="the graph has 41 operations; at most 10 are taken"):
        rgc.compile(Busy().eval(), torch.randn(1, 2), limits=Limits(nodes=10))


def test_layers_shared_over_and_over_are_counted_and_never_run() -> None:
    model: nn.Module = nn.ReLU()
    for _ in range(40):
        model = nn.Sequential(model, model)
    assert count_layers(model) == 2**41 - 1
    with pytest.raises(InputError, match="has 2,199,023,255,551 layers"):
        rgc.compile(model.eval(), torch.randn(1))


def test_a_layer_inside_itself_and_layers_nested_without_end_are_errors() -> None:
    model = nn.Sequential(nn.Sequential(nn.ReLU()))
    model[0].add_module("up", model)
    with pytest.raises(InputError, match="the model: the layer '0.up' contains itself"):
        count_layers(model)
    deep: nn.Module = nn.ReLU()
    for _ in range(MOST_LEVELS + 1):
        deep = nn.Sequential(deep)
    with pytest.raises(InputError, match=f"nested more than {MOST_LEVELS} deep"):
        count_layers(deep)


def test_a_tensor_that_only_looks_large_is_too_large() -> None:
    model = nn.Linear(2, 2).eval()
    model.register_buffer("table", torch.zeros(1).expand(2**40))
    with pytest.raises(InputError, match=r"Linear: holds 4,096.0 GiB of tensors; at most .* \(--limit memory=\)"):
        rgc.compile(model, torch.randn(1, 2))


def test_a_merged_kernel_beyond_the_limit_is_refused_with_its_size() -> None:
    x = torch.randn(1, 2, 16, 16)
    compiled = rgc.compile(chain(4), x, objective="depth", limits=Limits(kernel=5))
    assert compiled.report.ops_after["Conv2d"] == 2
    reasons = {refused.reason for refused in compiled.report.refusals}
    assert "the merged kernel would have 9 taps along an axis; at most 5 are made (kernel limit)" in reasons
    assert rgc.compile(chain(4), x, objective="depth").report.ops_after["Conv2d"] == 1


def test_a_kernel_that_is_beyond_the_limit_already_may_stay_so() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(2, 2, 9), nn.BatchNorm2d(2)).eval())
    report = rgc.compile(model, torch.randn(1, 2, 16, 16), limits=Limits(kernel=3)).report
    assert report.ops_after["BatchNorm2d"] == 0


def test_a_merged_weight_beyond_the_memory_is_refused_with_its_size() -> None:
    model = randomize(nn.Sequential(nn.Linear(4096, 2), nn.Linear(2, 4096)).eval())
    compiled = rgc.compile(model, torch.randn(1, 4096), objective="depth", limits=Limits(memory=2**20))
    assert compiled.report.ops_after["Linear"] == 2
    assert "the merged weight would take 128.0 MiB; at most 1.0 MiB are used (memory limit)" in {
        refused.reason for refused in compiled.report.refusals
    }


def test_when_the_time_is_up_what_is_merged_is_proved_and_a_note_says_so() -> None:
    model, x = chain(4), torch.randn(1, 2, 16, 16)
    compiled = rgc.compile(model, x, objective="depth", limits=Limits(seconds=1e-6))
    assert compiled.report.ops_after["Conv2d"] == 4 and compiled.report.verification is not None
    assert any(note.startswith("stopped rewriting after 0 s, so more may merge") for note in compiled.report.notes)
    torch.testing.assert_close(compiled(x), model(x))
    assert not any("stopped" in note for note in rgc.compile(model, x, objective="depth").report.notes)


def test_the_process_is_held_to_its_memory_and_let_go() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with process_within(2**33):
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] == 2**33
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_what_takes_more_memory_than_allowed_is_one_line(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Upsample(scale_factor=3000), nn.Conv2d(3, 4, 3)).eval(), tmp_path / "model.pt")
    arguments = ["compile", "model.pt", "--input", "1x3x16x16", "--limit", "memory=3GiB"]
    script = f"import sys; sys.path.insert(0, {str(Path.cwd())!r}); from rgc.cli import run; sys.exit(run({arguments}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("rgc: ") and done.stderr.count("\n") == 1
    assert "memory" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
