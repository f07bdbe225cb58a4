"""Are parallel linear branches of one source one operator, whichever way they meet?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn


@pytest.mark.parametrize(
    "meet",
    [
        lambda a, b, x: a + b,
        lambda a, b, x: b - a,
        lambda a, b, x: x - a + b,
        lambda a, b, x: (a + x) + (b - x),
        lambda a, b, x: torch.cat([b, x, a], 1),
        lambda a, b, x: torch.cat([a, a + b], dim=-3),
    ],
)
def test_they_become_one_convolution(meet: Any, calls: Any, compiled: Any) -> None:
    model = calls(
        lambda x, a, b: torch.relu(meet(a(x), b(x), x)), a=nn.Conv2d(4, 4, 3, padding=1), b=nn.Conv2d(4, 4, 1, groups=2)
    )
    assert compiled(model, 2, 4, 7, 6).ops_after == {"Conv2d": 1, "ReLU": 1}


@pytest.mark.parametrize(
    ("kind", "size"), [(nn.Conv1d, (7,)), (nn.Conv3d, (3, 4, 5)), (nn.ConvTranspose2d, (4, 5)), (nn.Linear, (5, 4))]
)
def test_of_every_kind(kind: Any, size: tuple[int, ...], calls: Any, compiled: Any) -> None:
    a, b = (kind(4, 4) if kind is nn.Linear else kind(4, 4, 3, padding=1) for _ in range(2))
    shape = (2, *size) if kind is nn.Linear else (2, 4, *size)
    report = compiled(calls(lambda x, a, b: torch.relu(a(x) + b(x)), a=a, b=b), *shape)
    assert report.ops_after == {kind.__name__: 1, "ReLU": 1}


def test_two_branches_of_one_source_meet_across_a_third_of_another(calls: Any, compiled: Any) -> None:
    def across(x: Any, a: Any, b: Any) -> Any:
        return torch.relu((torch.tanh(x) + a(x)) + b(x))

    model = calls(across, a=nn.Conv2d(4, 4, 3, padding=1), b=nn.Conv2d(4, 4, 1))
    report = compiled(model, 2, 4, 7, 6)
    assert report.ops_after["Conv2d"] == 1 and report.ops_after["add"] == 1


def test_branches_that_others_read_stay(calls: Any, compiled: Any, reasons: Any) -> None:
    def shared(x: Any, a: Any, b: Any) -> Any:
        y, z = a(x), b(x)
        return torch.relu(y + z), y, z

    model = calls(shared, a=nn.Conv2d(4, 4, 3, padding=1), b=nn.Conv2d(4, 4, 1))
    report = compiled(model, 2, 4, 7, 6)
    assert report.ops_after["Conv2d"] == 2 and "is also used elsewhere" in reasons(report, "merge_branches")


def test_one_channel_that_the_sum_repeats_is_merged(calls: Any, compiled: Any) -> None:
    parts = {"a": nn.Conv2d(4, 6, 3, padding=1), "b": nn.Conv2d(4, 1, 1)}
    assert compiled(calls(lambda x, a, b: torch.relu(a(x) - b(x)), **parts), 2, 4, 5, 6).ops_after == {
        "Conv2d": 1, "ReLU": 1,
    }  # fmt: skip


@pytest.mark.parametrize("order", ["aybc", "yabc", "abyc", "abcy", "cyab"])
def test_addends_of_one_source_are_found_anywhere_in_a_sum(order: str, calls: Any, compiled: Any) -> None:
    def summed(x: Any, a: Any, b: Any, c: Any) -> Any:
        terms = {"a": a(x), "b": -b(x), "c": c(x), "y": torch.tanh(x)}
        first, *others = (terms[letter] for letter in order)
        for other in others:
            first = first - other
        return torch.relu(first)

    parts = {"a": nn.Conv2d(4, 4, 3, padding=1), "b": nn.Conv2d(4, 4, 1), "c": nn.Sequential(nn.Conv2d(4, 4, 1))}
    report = compiled(calls(summed, **parts), 2, 4, 5, 6)
    assert report.ops_after["Conv2d"] == 1 and report.ops_after.total() == 4


def test_branches_of_two_sources_are_merged_apart(calls: Any, compiled: Any) -> None:
    def summed(x: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        y = torch.tanh(x)
        return torch.relu(a(x) + c(y) + (b(x) - d(y)))

    parts = {name: nn.Conv2d(4, 4, 3 if name in "ac" else 1, padding=int(name in "ac")) for name in "abcd"}
    report = compiled(calls(summed, **parts), 2, 4, 5, 6)
    assert report.ops_after == {"Conv2d": 2, "add": 1, "ReLU": 1, "Tanh": 1}


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        (nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, stride=5), "strides differ"),
        (nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "padding modes differ"),
    ],
)
def test_branches_of_other_geometry_are_refused(
    a: nn.Module, b: nn.Module, reason: str, calls: Any, compiled: Any, reasons: Any
) -> None:
    report = compiled(calls(lambda x, a, b: torch.relu(a(x) + b(x)), a=a, b=b), 2, 4, 5, 5)
    assert report.ops_after["Conv2d"] == 2 and reason in reasons(report, "merge_branches")


def test_channel_groups_that_go_their_own_ways_are_one_depthwise_convolution(calls: Any, compiled: Any) -> None:
    """The token mixer of InceptionNeXt (arXiv 2303.16900): identity, square, band and column kernels, batch norm."""

    def mixer(x: torch.Tensor, square: nn.Module, band: nn.Module, column: nn.Module, norm: nn.Module) -> torch.Tensor:
        rest, a, b, c = torch.split(x, (10, 2, 2, 2), dim=1)
        return torch.relu(norm(torch.cat((rest, square(a), band(b), column(c)), dim=1)))

    model = calls(
        mixer, square=nn.Conv2d(2, 2, 3, padding=1, groups=2), band=nn.Conv2d(2, 2, (1, 11), padding=(0, 5), groups=2),
        column=nn.Conv2d(2, 2, (11, 1), padding=(5, 0), groups=2), norm=nn.BatchNorm2d(16),
    )  # fmt: skip
    report = compiled(model, 2, 16, 14, 13)
    assert report.ops_after == {"Conv2d": 1, "ReLU": 1} and report.params_after == 16 * (11 * 11 + 1)


def test_a_partial_convolution_is_one_in_depth_and_stays_where_that_is_slower(calls: Any, compiled: Any) -> None:
    def partial(x: torch.Tensor, conv: nn.Module) -> torch.Tensor:
        return torch.relu(torch.cat((conv(x[:, :16]), x[:, 16:]), 1))

    model = calls(partial, conv=nn.Conv2d(16, 16, 3, padding=1))
    assert compiled(model, 1, 64, 28, 28).ops_after == {"Conv2d": 1, "ReLU": 1}
    assert compiled(model, 1, 64, 28, 28, objective="macs").ops_after == {"Conv2d": 1, "cat": 1, "ReLU": 1}


def test_pieces_that_are_only_put_together_again_vanish(calls: Any, compiled: Any) -> None:
    model = calls(lambda x: torch.tanh(torch.cat(torch.relu(x).chunk(4, 1), 1)))
    for objective in ("depth", "latency"):
        assert compiled(model, 2, 8, 5, 4, objective=objective).ops_after == {"ReLU": 1, "Tanh": 1}


def test_the_shortcut_without_parameters_of_a_residual_network_joins_its_convolution(calls: Any, compiled: Any) -> None:
    def block(x: torch.Tensor, conv: nn.Module, norm: nn.Module) -> torch.Tensor:
        shortcut = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0)
        return torch.relu(norm(conv(x)) + shortcut)

    model = calls(block, conv=nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), norm=nn.BatchNorm2d(16))
    for size in ((8, 8), (9, 7)):
        assert compiled(model, 2, 8, *size).ops_after == {"Conv2d": 1, "ReLU": 1}


def test_branches_of_cropped_inputs_are_one_convolution(calls: Any, compiled: Any) -> None:
    """An asymmetric convolution block as its release writes it, on an input that is padded once (arXiv 1908.03930)."""

    def block(x: torch.Tensor, square: nn.Module, tall: nn.Module, wide: nn.Module) -> torch.Tensor:
        x = nn.functional.pad(torch.tanh(x), (1, 1, 1, 1))
        return torch.relu(square(x) + tall(x[:, :, :, 1:-1]) + wide(x[:, :, 1:-1, :]))

    parts = {"square": nn.Conv2d(4, 4, 3), "tall": nn.Conv2d(4, 4, (3, 1)), "wide": nn.Conv2d(4, 4, (1, 3))}
    assert compiled(calls(block, **parts), 2, 4, 7, 6).ops_after == {"Conv2d": 1, "ReLU": 1, "Tanh": 1}


@pytest.mark.parametrize("meet", [
    lambda x: x + x[:, -1:],
    lambda x: 2 * x[:, 1:2] - x,
    lambda x: torch.cat([x[:, 2:3], x[:, :1] + x], 1),
])  # fmt: skip
def test_one_selected_channel_is_repeated_for_all(meet: Any, calls: Any, compiled: Any) -> None:
    for shape in ((2, 4), (2, 4, 5, 6)):
        report = compiled(calls(lambda x: torch.relu(meet(x))), *shape)
        assert not report.failures and report.ops_after.total() == 2
