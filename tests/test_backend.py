"""Does torch.compile with this backend merge what is in evaluation, and never give a stale or another result?"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from rgc.backend import MOST_CHANGES, compile_graph
from rgc.testing import randomize

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8)


class Seen:
    """A model compiled by the backend, and what it reported for each graph that it merged."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.layers: list[Counter[str]] = []
        dynamic = options.pop("dynamic", None)
        given = {"inner": "eager", "report": lambda report: self.layers.append(report.ops_after), **options}
        self.run = torch.compile(model, backend=compile_graph, options=given, dynamic=dynamic)

    def __call__(self, *args: Any) -> Any:
        with torch.no_grad():
            return self.run(*args)


def network() -> nn.Sequential:
    return randomize(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)
        )
    )


def test_weights_that_dynamo_passes_as_inputs_are_merged(x: Tensor) -> None:
    model = network()
    seen = Seen(model)
    torch.testing.assert_close(seen(x), model(x))
    torch.testing.assert_close(seen(x + 1), model(x + 1))
    assert seen.layers == [Counter({"Conv2d": 2, "ReLU": 1})]


def write(model: nn.Sequential) -> None:
    model[0].weight.mul_(2)


def write_behind_the_counter(model: nn.Sequential) -> None:
    model[0].weight.data[0, 0, 0, 0] += 1


def give_new_memory(model: nn.Sequential) -> None:
    model[3].weight.data = torch.randn(3, 4, 1, 1)


def give_a_new_parameter(model: nn.Sequential) -> None:
    model[3].weight = nn.Parameter(torch.randn(3, 4, 1, 1))


def write_a_buffer(model: nn.Sequential) -> None:
    model[1].running_mean.add_(1)


def load(model: nn.Sequential) -> None:
    model.load_state_dict({name: tensor * 1.5 for name, tensor in model.state_dict().items() if tensor.dim()}, False)


CHANGES = [write, write_behind_the_counter, give_new_memory, give_a_new_parameter, write_a_buffer, load]


@pytest.mark.parametrize("weights", ["contents", "versions"])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_weights_that_change_after_compiling_count(change: Any, weights: str, x: Tensor) -> None:
    if (change, weights) == (write_behind_the_counter, "versions"):
        pytest.skip("what PyTorch does not count is not seen; the option says so")
    model = network()
    seen = Seen(model, weights=weights)
    before = seen(x)
    change(model)
    assert not torch.allclose(model(x), before)
    torch.testing.assert_close(seen(x), model(x))
    assert len(seen.layers) == 2


@torch.no_grad()
def test_a_graph_whose_weights_keep_changing_is_left_alone_with_a_warning(x: Tensor) -> None:
    model = network()
    seen = Seen(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(MOST_CHANGES + 3):
            torch.testing.assert_close(seen(x), model(x))
            model[0].weight.add_(0.1)
    assert len(seen.layers) == MOST_CHANGES
    [message] = [str(each.message) for each in told if "rgc" in str(each.message)]
    assert f"gives it to eager as it is: its weights, or numbers in it, have changed {MOST_CHANGES} times" in message


def test_two_modules_that_share_a_graph_keep_their_own_weights(x: Tensor) -> None:
    blocks = nn.ModuleList([network(), network()])
    run = Seen(lambda block, value: block(value))
    for block in [*blocks, *blocks]:
        torch.testing.assert_close(run(block, x), block(x))
    assert len(run.layers) == 2


def test_a_graph_break_makes_two_graphs_of_which_both_are_merged(x: Tensor) -> None:
    first, second = network(), network()

    def breaks(value: Tensor) -> Tensor:
        value = first(F.pad(value, (1, 1, 1, 1)))
        torch._dynamo.graph_break()
        return second(value)

    seen = Seen(breaks)
    torch.testing.assert_close(seen(x), breaks(x))
    assert seen.layers == [Counter({"Conv2d": 2, "ReLU": 1, "pad": 1}), Counter({"Conv2d": 2, "ReLU": 1})] or [
        layers["Conv2d"] for layers in seen.layers
    ] == [2, 2]


@pytest.mark.parametrize("dynamic", [None, True])
def test_other_sizes_are_served_also_where_forward_asks_for_them(dynamic: bool | None) -> None:
    model = network()

    def asks(value: Tensor) -> Tensor:
        return model(value).view(value.shape[0], 3, -1)[:, :, : value.shape[3]] * value.size(2)

    seen = Seen(asks, dynamic=dynamic)
    for size in ((1, 3, 8, 8), (2, 3, 9, 11), (3, 3, 12, 7), (3, 3, 7, 7)):
        value = torch.randn(size)
        torch.testing.assert_close(seen(value), asks(value))
    assert 1 <= len(seen.layers) <= 2
    assert all(layers["BatchNorm2d"] == 0 for layers in seen.layers)


def test_passes_that_hold_at_one_size_are_used_where_dynamo_guards_it_and_not_elsewhere(x: Tensor) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1), nn.Flatten()))
    fixed = Seen(model, passes="all", objective="depth", dynamic=False)
    torch.testing.assert_close(fixed(x), model(x))
    assert fixed.layers[0].total() < 3
    torch._dynamo.reset()
    free = Seen(model, passes="all", objective="depth", dynamic=True)
    for size in (8, 9, 12):
        value = torch.randn(2, 3, size, size + 1)
        torch.testing.assert_close(free(value), model(value))


def test_a_number_that_is_no_size_is_a_constant_while_it_lasts(x: Tensor) -> None:
    model = network()
    seen = Seen(lambda value, factor, places: model(value * factor)[:, :, places:], dynamic=True)
    for factor, places in ((0.5, 2), (0.5, 2), (0.25, 3)):
        torch.testing.assert_close(seen(x, factor, places), model(x * factor)[:, :, places:])
    assert len(seen.layers) == 2
    assert all(layers["BatchNorm2d"] == 0 for layers in seen.layers)


def test_training_and_wanted_gradients_go_to_the_inner_backend_as_they_are(x: Tensor) -> None:
    model = network()
    seen = Seen(model)
    with pytest.warns(UserWarning, match=r"rgc merges nothing .* eager as it is: gradients are wanted; call it under"):
        loss = seen.run(x).square().sum()
    loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
    model.train()
    with pytest.warns(UserWarning, match="is in training mode; call model.eval"):
        seen(x)
    assert model[1].num_batches_tracked == 1
    assert seen.layers == []


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x) + self.calls


def write_input(x: Tensor) -> Tensor:
    return x.mul_(2) + 1


def return_weight(x: Tensor) -> tuple[Tensor, Tensor]:
    return x + 1, MODULE(x), MODULE.weight


def return_copy(x: Tensor) -> Tensor:
    return MODULE(x), x * 1


def draw(x: Tensor) -> Tensor:
    return MODULE(x) + torch.rand(3, 1, 1)


MODULE = nn.Conv2d(3, 3, 1).eval()


@pytest.mark.parametrize("function", [Writes().eval(), write_input, return_weight, return_copy, draw])
def test_what_does_more_than_compute_is_not_merged_wrongly(function: Any, x: Tensor) -> None:
    seen = Seen(function)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = x.clone()
        torch.manual_seed(1)
        found = seen(given)
        calls = [function.calls.item()] if isinstance(function, Writes) else []
        torch.manual_seed(1)
        expected = function(other := x.clone())
    if calls:
        assert calls == [1.0]
        expected = expected - 1
    torch.testing.assert_close(found, expected)
    assert torch.equal(given, other)
    if function is return_weight:
        assert found[2] is MODULE.weight
    if function is return_copy:
        found[1].zero_()
        assert torch.equal(given, x)


def test_autocast_is_left_to_the_inner_backend(x: Tensor) -> None:
    seen = Seen(network())
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(UserWarning, match="autocast is on"):
        assert seen(x).dtype == torch.bfloat16


def test_inference_mode_merges_too(x: Tensor) -> None:
    model = network()
    seen = Seen(model)
    with torch.inference_mode():
        torch.testing.assert_close(seen.run(x), model(x))
    assert seen.layers == [Counter({"Conv2d": 2, "ReLU": 1})]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_backend": "eager"}, "backend rgc has no option 'inner_backend'; it takes passes, objective"),
        ({"objective": "speed"}, "unknown objective 'speed'"),
        ({"weights": "never"}, "option weights is one of contents, versions, got 'never'"),
        ({"inner": "tensorflow"}, "torch.compile has no backend 'tensorflow'"),
        ({"inner": "rgc"}, "the inner backend cannot be rgc itself|has no backend 'rgc'"),
        ({"passes": ["fold_batchnrm"]}, "fold_batchnrm"),
    ],
)
def test_an_unknown_option_is_refused(options: dict[str, Any], message: str, x: Tensor) -> None:
    with pytest.raises(BackendCompilerFailed, match=message):
        torch.compile(network(), backend=compile_graph, options=options)(x)


def test_a_mode_is_refused(x: Tensor) -> None:
    with pytest.raises(BackendCompilerFailed, match="takes no mode"):
        torch.compile(network(), backend=compile_graph, mode="max-autotune")(x)


def test_a_dead_model_is_not_kept_alive(x: Tensor) -> None:
    import gc
    import weakref

    model = network()
    weight = weakref.ref(model[0].weight)
    seen = Seen(model)
    seen(x)
    graph_weights = seen.layers
    del seen, model
    torch._dynamo.reset()
    gc.collect()
    assert weight() is None and graph_weights


def test_inductor_runs_what_was_merged(x: Tensor) -> None:
    """One convolution is left, for which Inductor has nothing to compile in C++."""
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    seen = Seen(model, inner="inductor")
    torch.testing.assert_close(seen(x), model(x))
    assert seen.layers == [Counter({"Conv2d": 1})]
    assert torch._dynamo.utils.counters["inductor"]


def test_torch_finds_the_backend_by_its_name(tmp_path: Path) -> None:
    """In an installation: what a wheel says of its entry points, beside the package."""
    info = tmp_path / "rgc_entry-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rgc-entry\nVersion: 0\n")
    import tomllib

    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        entries = tomllib.load(file)["project"]["entry-points"]["torch_dynamo_backends"]
    lines = [f"{name} = {target}" for name, target in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[torch_dynamo_backends]", *lines, ""]))
    script = (
        "import torch\n"
        "model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()\n"
        "found = []\n"
        "options = {'inner': 'eager', 'report': lambda report: found.append(report.ops_after)}\n"
        "with torch.no_grad():\n"
        "    torch.compile(model, backend='rgc', options=options)(torch.randn(1, 3, 8, 8))\n"
        "print(dict(found[0]))\n"
    )
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stdout == "{'Conv2d': 1}\n", done.stderr
