"""Is an affine region between fixed sizes one matrix, and is every reason not to make it one named?"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import rgc
from rgc import passes
from rgc.attempt import Options
from rgc.compiler import compile_with
from rgc.subject import example_of
from rgc.testing import randomize

collapse = passes.collapse
module = importlib.import_module("rgc.passes.collapse")


def padded(reads: int, makes: int, stride: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(reads, makes, 3, stride, padding=1, **options)


def results(report: rgc.Report) -> list[tuple[str, ...]]:
    return [firing.result for firing in report.rewrites if firing.rewrite == "collapse"]


def test_more_inputs_than_outputs_and_the_reverse(compiled: Any) -> None:
    narrow = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(32, 3))
    wide = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 50))
    assert compiled(narrow, 2, 3, 6, 6, passes=[collapse]).ops_after == {"Linear": 1}
    assert compiled(wide, 2, 3, passes=[collapse]).ops_after == {"Linear": 1}


def test_a_region_that_ends_in_an_image_ends_in_an_image_again(compiled: Any) -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1), nn.ReLU())
    report = compiled(model, 2, 2, 3, 4, passes=[collapse])
    assert report.ops_after == {"Linear": 1, "ReLU": 1} and report.fixed_size


def test_what_ends_in_one_position_is_one_layer_without_views_or_a_linear_layer_where_that_is_faster(
    compiled: Any,
) -> None:
    model = nn.Sequential(padded(3, 8), padded(8, 8), nn.Conv2d(8, 4, (6, 5)))
    assert results(compiled(model, 2, 3, 6, 5, passes=[collapse])) == [("conv 6x5 3->4",)]
    fastest = compiled(model, 2, 3, 6, 5, passes=[collapse], objective="latency")
    assert results(fastest) == [("flatten", "linear 90->4", "unflatten")]


@pytest.mark.parametrize(
    ("model", "shape", "result"),
    [
        (nn.Sequential(nn.Conv1d(2, 4, 5, padding=2), nn.Conv1d(4, 2, 5, padding=2)), (2, 2, 7), "linear 14->14"),
        (nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.Conv3d(4, 2, 3, padding=1)), (2, 2, 3, 2, 3), "linear 36->36"),
        (nn.Sequential(nn.Linear(6, 8), nn.Unflatten(1, (2, 4)), nn.Linear(4, 3), nn.Flatten(), nn.Linear(6, 4)),
         (2, 6), "linear 6->4"),
        (nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), (2, 3, 6), "linear 18->12"),
        (nn.Sequential(nn.ConvTranspose2d(2, 3, 3, 2), padded(3, 2, 2)), (2, 2, 3, 4), "linear 24->40"),
        (nn.Sequential(nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect"), nn.Upsample(scale_factor=2)),
         (2, 2, 3, 4), "linear 24->360"),
    ],
    ids=["1-d", "3-d", "vectors and views", "vectors in rows", "transposed", "reflected and resampled"],
)  # fmt: skip
def test_every_kind_of_affine_layer_collapses(
    model: nn.Module, shape: tuple[int, ...], result: str, compiled: Any
) -> None:
    (labels,) = results(compiled(model, *shape, passes=[collapse]))
    assert result in labels


# --- parts of regions ----------------------------------------------------------------------------------------------


def test_the_linear_parts_between_activations_collapse_each_by_itself(compiled: Any) -> None:
    first, second = (padded(2, 4, 2), padded(4, 4)), (padded(4, 8, 2), padded(8, 2))
    tail = nn.Flatten(), nn.Linear(8, 6), nn.Linear(6, 3)
    model = nn.Sequential(*first, nn.ReLU(), *second, nn.ReLU(), *tail)
    report = compiled(model, 2, 2, 8, 8, passes=[collapse])
    assert report.ops_after == {"Linear": 3, "ReLU": 2} and len(results(report)) == 3


def test_a_sink_that_several_layers_read_is_computed_once(calls: Any, compiled: Any) -> None:
    def forward(x: Tensor, a: Any, b: Any, c: Any, d: Any) -> Tensor:
        y = b(a(x))
        total: Tensor = torch.relu(c(y)) + torch.tanh(d(y)) + torch.sigmoid(y)
        return total

    model = calls(forward, a=padded(2, 3), b=padded(3, 2), c=padded(2, 2), d=padded(2, 2))
    report = compiled(model, 2, 2, 3, 3, passes=[collapse])
    assert report.ops_after["Linear"] == 1 and report.ops_after["Conv2d"] == 2


def test_where_the_whole_is_too_large_the_part_that_is_not_collapses(
    compiled: Any, reasons: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGEST_MATRIX", 400)
    model = nn.Sequential(padded(2, 4), padded(4, 4, 4), padded(4, 4), padded(4, 4), nn.Upsample(scale_factor=8))
    report = compiled(model, 2, 2, 8, 8, passes=[collapse])
    assert results(report) == [("flatten", "linear 16->16", "unflatten")]
    assert report.ops_after == {"Conv2d": 2, "Linear": 1, "Upsample": 1}
    assert "a matrix of 1,024 x 128: 131,072 numbers" in reasons(report, "collapse")


def test_a_branch_that_is_wholly_inside_a_part_goes_with_it(calls: Any, compiled: Any, monkeypatch: Any) -> None:
    def forward(x: Tensor, stem: Any, a: Any, b: Any, tail: Any) -> Any:
        y = stem(x)
        return tail(b(a(y)) + y)

    monkeypatch.setattr(module, "LARGEST_MATRIX", 400)
    parts = {"stem": padded(8, 2, 2), "a": padded(2, 3), "b": padded(3, 2), "tail": nn.Upsample(scale_factor=4)}
    report = compiled(calls(forward, **parts), 2, 8, 6, 6, passes=[collapse])
    assert results(report) == [("flatten", "linear 18->18", "unflatten")]
    assert report.ops_after == {"Conv2d": 1, "Linear": 1, "Upsample": 1}


LAYERS: dict[str, Any] = {
    "3x3": padded, "1x1": lambda reads, makes: nn.Conv2d(reads, makes, 1),
    "strided": lambda reads, makes: padded(reads, makes, 2), "norm": lambda reads, makes: nn.BatchNorm2d(reads),
}  # fmt: skip


def chain(draw: random.Random) -> list[nn.Module]:
    layers: list[nn.Module] = []
    channels = 2
    for _ in range(draw.randint(2, 5)):
        kind, makes = draw.choice(sorted(LAYERS)), draw.choice((1, 2, 4))
        layers.append(LAYERS[kind](channels, makes))
        channels = channels if kind == "norm" else makes
    return layers


@pytest.mark.parametrize("seed", range(24))
def test_for_depth_no_cut_of_a_chain_leaves_fewer_layers(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part of a cut is one matrix where that is allowed, or what the other rewrites make of it."""
    draw = random.Random(seed)
    layers, limit = chain(draw), draw.choice((30, 200, 600, 2000))
    x = torch.randn(2, 2, 6, 5, generator=torch.Generator().manual_seed(0))
    model = randomize(nn.Sequential(*layers))
    sizes = [math.prod(x.shape[1:]), *(model[: end + 1](x)[0].numel() for end in range(len(layers)))]

    @functools.cache
    def fewest(start: int, end: int) -> int:
        if sizes[start] * sizes[end] <= limit:
            return 1
        report = rgc.compile(
            model[start:end].eval(), model[:start](x), passes="all,-collapse", objective="depth"
        ).report
        return layers_of(report)

    best = math.inf
    for inner in itertools.product((False, True), repeat=len(layers) - 1):
        ends = [0, *(end for end, cut in enumerate(inner, start=1) if cut), len(layers)]
        best = min(best, sum(itertools.starmap(fewest, itertools.pairwise(ends))))
    monkeypatch.setattr(module, "LARGEST_MATRIX", limit)
    report = rgc.compile(model, x, passes="all", objective="depth").report
    assert report.failures == [] and layers_of(report) == best


def layers_of(report: rgc.Report) -> int:
    """What runs but the additions of bias maps, which are no layers."""
    return report.ops_after.total() - report.ops_after["add"]


# --- what is cheaper as it is ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["latency", "macs", "params"])
def test_a_bottleneck_of_low_rank_stays_factored(objective: str, compiled: Any, reasons: Any) -> None:
    vectors = nn.Sequential(nn.Linear(1000, 10), nn.Linear(10, 1000), nn.ReLU())
    report = compiled(vectors, 2, 1000, passes="all", objective=objective)
    assert report.ops_after == {"Linear": 2, "ReLU": 1} and report.rewrites == []
    assert any(word in reasons(report, "collapse") for word in ("estimated slower", "costs more"))
    images = nn.Sequential(nn.Conv2d(256, 16, 1, bias=False), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 256, 1))
    report = compiled(images, 1, 256, 14, 14, passes="all", objective=objective)
    assert report.ops_after == {"Conv2d": 3} and report.rewrites == []


def test_for_depth_a_bottleneck_is_multiplied_out(compiled: Any) -> None:
    model = nn.Sequential(nn.Linear(100, 5), nn.Linear(5, 100))
    assert compiled(model, 2, 100, passes="all").ops_after == {"Linear": 1}


def test_a_part_before_a_bottleneck_collapses_and_the_bottleneck_stays(compiled: Any) -> None:
    model = nn.Sequential(padded(3, 8), padded(8, 8), nn.Flatten(), nn.Linear(288, 4), nn.Linear(4, 2000), nn.ReLU())
    for objective in ("latency", "macs"):
        report = compiled(model, 2, 3, 6, 6, passes="all", objective=objective)
        assert report.ops_after == {"Linear": 2, "ReLU": 1}
        assert report.macs_after == 2 * (108 * 4 + 4 * 2000)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_rows_or_columns_are_probed_whichever_take_fewer_passes(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[str] = []
    for name in ("_rows", "_columns"):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, n=name, f=original: (probed.append(n), f(*args))[1])
    for reads, makes, wanted in ((30, 7, "_rows"), (30, 20, "_columns"), (7, 30, "_columns")):
        probed.clear()
        model = nn.Sequential(nn.Linear(reads, 20), nn.Linear(20, makes))
        assert compiled(model, 2, reads, passes=[collapse]).ops_after == {"Linear": 1}
        assert set(probed) == {wanted}


def test_a_chunk_at_a_time_is_the_same_matrix(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 500)
    for shape, layers in (
        ((2, 31), (nn.Linear(31, 20), nn.Linear(20, 7))),
        ((2, 7), (nn.Linear(7, 20), nn.Linear(20, 31))),
    ):
        assert compiled(nn.Sequential(*layers), *shape, passes=[collapse]).ops_after == {"Linear": 1}


def peak_of(call: Any) -> int:
    """Bytes that PyTorch holds at most while ``call`` runs, what it holds before not counted."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = call()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = list(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    assert kept is not None and held
    return max(held)


@pytest.mark.parametrize("by_columns", [True, False], ids=["columns", "rows"])
@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ((padded(3, 24), nn.BatchNorm2d(24), padded(24, 24), nn.AvgPool2d(2), nn.Conv2d(24, 8, 1)), (1, 3, 14, 14)),
        ((nn.Conv2d(3, 16, 7, padding=3, padding_mode="reflect"), nn.Conv2d(16, 2, 7, padding=3)), (1, 3, 12, 12)),
        ((nn.ConvTranspose2d(3, 16, 4, 2, 1), nn.ConvTranspose2d(16, 2, 4, 2, 1)), (1, 3, 6, 6)),
        ((nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 5, padding=2, groups=32), nn.Conv2d(32, 1, 1)), (1, 3, 9, 8)),
        ((nn.Linear(200, 900), nn.Unflatten(1, (30, 30)), nn.Conv1d(30, 30, 5, padding=2)), (1, 200)),
    ],
    ids=["widest in the middle", "reflected", "transposed", "depthwise", "vectors"],
)  # fmt: skip
def test_probing_holds_no_more_than_is_said(
    layers: tuple[nn.Module, ...], shape: tuple[int, ...], by_columns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes: list[Any] = []
    original = module._matrix
    monkeypatch.setattr(module, "_matrix", lambda probe: (probes.append(probe), original(probe))[1])
    monkeypatch.setattr(module, "FORWARD_PASSES_OF_A_BACKWARD", math.inf if by_columns else 0)
    rgc.compile(randomize(nn.Sequential(*layers)), torch.randn(shape), passes=[collapse], objective="depth")
    (probe,) = probes
    one = 8 * module._held_by_a_sample(probe.region)
    matrix = 8 * probe.inputs * probe.outputs
    widened = 2 * 8 * max(tensor.numel() for layer in layers for tensor in layer.parameters())
    for samples in (4, 40):
        monkeypatch.setattr(module, "CHUNK", samples * one // 8)
        peak = peak_of(lambda: original(probe))
        assert matrix < peak <= matrix + samples * one + widened
        assert peak > matrix + 0.1 * samples * one or samples > min(probe.inputs, probe.outputs), (
            "the bound is no bound"
        )


def test_a_region_whose_few_samples_are_too_large_is_refused(
    compiled: Any, reasons: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGEST_PASS", 2000)
    report = compiled(nn.Sequential(padded(2, 8), padded(8, 1, 4)), 2, 2, 8, 8, passes=[collapse])
    held = 3 * (2 * (2 * 64 + 8 * 64 + 4) + 8 * 64 + 2 * 64 + 2 * (100 + 9 * 64))
    assert f"probing the region holds {held:,} numbers (0.1 MiB) for 3 samples" in reasons(report, "collapse")
    assert "at most 2,000 numbers (0.0 MiB)" in reasons(report, "collapse") and report.ops_after == {"Conv2d": 2}


# --- what is refused -------------------------------------------------------------------------------------------------


def test_an_inner_value_that_is_an_output_stays(calls: Any, compiled: Any) -> None:
    def both(x: Any, first: Any, second: Any) -> Any:
        y = first(x)
        return y, second(y)

    report = compiled(calls(both, first=nn.Linear(6, 6), second=nn.Linear(6, 6)), 2, 6, passes=[collapse])
    assert report.ops_after == {"Linear": 2}


def test_a_matrix_that_is_too_large_is_refused(compiled: Any, reasons: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_MATRIX", 100)
    report = compiled(nn.Sequential(nn.Linear(20, 2), nn.Linear(2, 20)), 2, 20, passes=[collapse])
    assert "a matrix of 20 x 20: 400 numbers (0.0 MiB); at most 100 numbers (0.0 MiB)" in reasons(report, "collapse")


def test_a_region_that_mixes_samples_is_refused(calls: Any, compiled: Any, reasons: Any) -> None:
    mixed = calls(lambda x, a, b: b(a(x).flip(0)), a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    report = compiled(mixed, 2, 6, passes=[collapse])
    assert report.rewrites == [] and "mixes the samples of a batch" in reasons(report, "collapse")


def test_a_region_for_one_batch_size_is_refused(calls: Any, compiled: Any, reasons: Any) -> None:
    stuck = calls(lambda x, a, b: b(a(x).reshape(2, 6)), a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    report = compiled(stuck, 2, 6, passes=[collapse])
    assert report.rewrites == [] and "does not run on every batch size" in reasons(report, "collapse")


def test_a_free_size_is_refused(reasons: Any) -> None:
    model = randomize(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    options = Options(passes=[collapse], fixed_size=False)
    report = compile_with(model, example_of(model, torch.randn(2, 6)), options).report
    assert "one matrix only at a fixed size (--passes all)" in reasons(report, "collapse")


def test_a_region_of_one_layer_is_left_as_it_is(compiled: Any) -> None:
    assert compiled(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), 2, 3, 2, 2, passes=[collapse]).rewrites == []
