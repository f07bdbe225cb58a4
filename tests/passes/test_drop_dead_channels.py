"""Does `drop_dead_channels` delete every dead channel, and none that counts?"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rgc
from rgc.passes import drop_dead_channels
from rgc.testing import randomize


def pruned(layer: nn.Module, rows: tuple[int, ...] = (), columns: tuple[int, ...] = ()) -> nn.Module:
    """The layer with these rows and columns of its weight set to zero."""
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    with torch.no_grad():
        layer.weight[list(rows)] = 0
        layer.weight[:, list(columns)] = 0
    return layer


def norm(channels: int, dead: tuple[int, ...], beta: float | None = None) -> nn.BatchNorm2d:
    """A batch norm whose gamma is zero for ``dead`` channels, and whose beta there is ``beta`` if it is given."""
    layer = randomize(nn.BatchNorm2d(channels))
    with torch.no_grad():
        layer.weight[list(dead)] = 0
        if beta is not None:
            layer.bias[list(dead)] = beta
    return layer


def compiled(model: nn.Module, *shape: int, passes: object = (drop_dead_channels,)) -> rgc.CompiledModule:
    model = model.eval()
    x = torch.randn(shape or (2, 3, 9, 8), generator=torch.Generator().manual_seed(0))
    found = rgc.compile(model, x, passes=passes, objective="macs")  # type: ignore[arg-type]  # one pass
    assert not found.report.failures
    return found


def widths(model: nn.Module) -> list[tuple[int, int]]:
    """The output and input channels of each layer with a weight, in order."""
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.ConvTranspose2d)]
    return [(layer.weight.shape[0], layer.weight.shape[1]) for layer in layers]


def test_a_layer_loses_its_rows_of_zeros_and_the_next_the_columns() -> None:
    model = nn.Sequential(pruned(nn.Conv2d(3, 8, 3, bias=False), (1, 4, 7)), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1))
    assert widths(compiled(model)) == [(5, 3), (5, 5)]


def test_a_gamma_of_zero_and_a_beta_below_zero_are_dead_behind_a_relu() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8, (0, 2, 5), beta=-1.0), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1))
    found = compiled(model, passes="default")
    assert widths(found) == [(5, 3), (5, 5)]
    assert "drop_dead_channels" in {firing.rewrite for firing in found.report.rewrites}


def test_constants_before_a_padded_convolution_become_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8, (0, 2, 5), beta=1.0), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1))
    assert widths(compiled(model)) == [(6, 3), (5, 6)]


def test_constants_before_a_convolution_without_padding_go_into_its_bias() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8, (0, 2, 5), beta=1.0), nn.ReLU(), nn.Conv2d(8, 5, 3, bias=False))
    found = compiled(model)
    assert widths(found) == [(5, 3), (5, 5)]
    assert any(isinstance(m, nn.Conv2d) and m.bias is not None and m.out_channels == 5 for m in found.modules())


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_copies_at_the_border_do_not_interrupt_a_constant(mode: str) -> None:
    reader = nn.Conv2d(8, 5, 3, padding=1, padding_mode=mode)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8, (0, 2, 5), beta=1.0), nn.ReLU(), reader)
    assert widths(compiled(model)) == [(5, 3), (5, 5)]


def test_channels_that_nobody_reads_go_through_a_depthwise_convolution() -> None:
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    reader = pruned(nn.Conv2d(8, 5, 3, padding=1), columns=(0, 3))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6(), depthwise, norm(8, ()), nn.Hardswish(), reader)
    assert widths(compiled(model)) == [(6, 3), (6, 1), (5, 6)]


def test_one_channel_stays_where_all_are_dead() -> None:
    everything = tuple(range(8))
    model = nn.Sequential(pruned(nn.Conv2d(3, 8, 3), everything), nn.Sigmoid(), nn.Conv2d(8, 5, 3, padding=1))
    assert widths(compiled(model)) == [(1, 3), (5, 1)]


class Net(nn.Module):
    """Two pruned layers of one input, combined, and a layer that reads the result."""

    def __init__(
        self, combine: Callable[[Tensor, Tensor], Tensor], dead: tuple[tuple[int, ...], tuple[int, ...]], inputs: int
    ) -> None:
        super().__init__()
        self.combine = combine
        self.a = pruned(nn.Conv2d(3, 6, 3, padding=1, bias=False), dead[0])
        self.b = pruned(nn.Conv2d(3, 6, 3, padding=1, bias=False), dead[1])
        self.last = nn.Conv2d(inputs, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.combine(torch.relu(self.a(x)), torch.sigmoid(self.b(x)) - 0.5))
        return y


@pytest.mark.parametrize(
    ("combine", "inputs", "expected"),
    [
        (torch.add, 6, [(5, 3), (5, 3), (4, 5)]),  # dead in both: 2
        (torch.mul, 6, [(3, 3), (3, 3), (4, 3)]),  # dead in either: 1, 2, 3
        (lambda a, b: torch.cat([a, b], 1), 12, [(4, 3), (4, 3), (4, 8)]),  # 1, 2 and 2, 3
    ],
)  # fmt: skip
def test_sums_products_and_concatenations(
    combine: Callable[[Tensor, Tensor], Tensor], inputs: int, expected: list[tuple[int, int]]
) -> None:
    assert widths(compiled(Net(combine, ((1, 2), (2, 3)), inputs))) == expected


def test_a_linear_layer_loses_the_positions_of_a_dead_channel() -> None:
    model = nn.Sequential(
        pruned(nn.Conv2d(3, 8, 3), (2, 4)), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)
    )
    assert widths(compiled(model)) == [(6, 3), (5, 24)]


def test_neurons_of_a_perceptron() -> None:
    model = nn.Sequential(
        pruned(nn.Linear(7, 16), (3, 8)),
        nn.GELU(),
        pruned(nn.Linear(16, 9), columns=(0, 1)),
        nn.Tanh(),
        nn.Linear(9, 4),
    )
    assert widths(compiled(model, 5, 7)) == [(12, 7), (9, 12), (4, 9)]


def test_a_transposed_convolution_keeps_one_constant() -> None:
    model = nn.Sequential(pruned(nn.Conv2d(3, 8, 3), (0, 4, 6)), nn.Sigmoid(), nn.ConvTranspose2d(8, 4, 3, stride=2))
    assert widths(compiled(model)) == [(6, 3), (6, 4)]


def test_a_layer_that_is_called_on_two_constants_becomes_two() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = pruned(nn.Conv2d(3, 6, 1), (0, 1)), pruned(nn.Conv2d(3, 6, 1), (0, 1))
            self.shared = nn.Conv2d(6, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.relu(self.shared(torch.sigmoid(self.a(x)))) * self.shared(torch.sigmoid(self.b(x)))
            return y

    found = compiled(Twice())
    assert sorted(widths(found)) == [(4, 3), (4, 3), (4, 4), (4, 4)]


@pytest.mark.parametrize(
    "between",
    [nn.Softmax(1), nn.GroupNorm(2, 8), nn.LayerNorm([8, 7, 6]), nn.ChannelShuffle(2), nn.Conv2d(8, 8, 3, groups=2)],
    ids=lambda layer: type(layer).__name__,
)
def test_what_mixes_channels_keeps_them_all(between: nn.Module) -> None:
    model = nn.Sequential(pruned(nn.Conv2d(3, 8, 3), (1, 2)), between, nn.ReLU(), nn.Conv2d(8, 4, 1))
    found = compiled(model)
    assert widths(found)[0] == (8, 3)


def test_the_output_and_a_second_reader_keep_their_channels() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = pruned(nn.Conv2d(3, 8, 3), (1, 2))
            self.second = nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.relu(self.first(x))
            return y, self.second(y)

    assert widths(compiled(Both())) == [(8, 3), (4, 8)]


def test_the_result_is_refused_where_it_would_cost_more() -> None:
    """A graph pass is weighed like any rewrite."""

    @rgc.graph_pass
    def squander(graph: rgc.Graph) -> rgc.Graph:
        """Computes everything twice."""
        for value in graph.nodes():
            if isinstance(value.op, rgc.Conv):
                graph.replace(value, rgc.Conv(torch.eye(4).reshape(4, 4, 1, 1))(value.op(*value.inputs)))
        return graph

    report = compiled(nn.Sequential(nn.Conv2d(3, 4, 3)), passes=(squander,)).report
    assert not report.rewrites
    assert [refused.reason for refused in report.refusals if refused.rewrite == "squander"]


#: What may stand between two layers, by name: the activation decides what becomes of a constant.
BETWEEN: dict[str, Callable[[int], nn.Module]] = {
    "relu": lambda n: nn.ReLU(),
    "sigmoid": lambda n: nn.Sigmoid(),
    "prelu": lambda n: nn.PReLU(n),
    "norm": lambda n: norm(n, (0,)),
    "max pool": lambda n: nn.MaxPool2d(2, 1),
    "counted average": lambda n: nn.AvgPool2d(3, 1, 1),
    "depthwise": lambda n: nn.Conv2d(n, n, 3, padding=1, groups=n),
    "upsample": lambda n: nn.Upsample(scale_factor=2),
    "pad": lambda n: nn.ZeroPad2d(1),
}  # fmt: skip


@settings(suppress_health_check=(*settings().suppress_health_check, HealthCheck.nested_given))  # compiling draws, too
@given(
    st.lists(st.sampled_from(sorted(BETWEEN)), min_size=1, max_size=3),
    st.lists(st.sets(st.integers(0, 7)), min_size=4, max_size=4),
    st.sampled_from([0, 1]),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_equal_for_any_dead_rows_and_columns(
    names: list[str], dead: list[set[int]], padding: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    rows_a, columns_b, rows_b, columns_c = (tuple(sorted(each)) for each in dead)
    model = nn.Sequential(
        pruned(nn.Conv2d(3, 8, 3, padding=1, bias=bias), rows_a),
        *(BETWEEN[name](8) for name in names),
        pruned(nn.Conv2d(8, 8, 3, padding=padding, bias=bias), rows_b, columns_b),
        nn.ReLU(),
        pruned(nn.Conv2d(8, 5, 3, padding=padding), columns=columns_c),
    ).eval()
    found = compiled(model, 2, 3, 9, 8)
    assert found.report.params_after <= found.report.params_before
    for size in itertools.product((7, 10), (8, 11)):
        x = torch.randn(2, 3, *size)
        assert torch.allclose(found(x), model(x), rtol=1e-4, atol=1e-4)


def test_every_channel_that_network_slimming_marks_goes() -> None:
    """Gammas at zero all over a network, as L1 regularisation leaves them (arXiv 1708.06519)."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((3, 16, 16, 16)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1),
            norm(outputs, tuple(range(0, outputs, 2)), -0.1),
            nn.ReLU(),
        ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    assert widths(compiled(model, 2, 3, 16, 16, passes="default")) == [(8, 3), (8, 8), (8, 8), (4, 8)]
