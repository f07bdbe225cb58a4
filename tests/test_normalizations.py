"""Is a normalisation by the sample's own statistics split where that helps, and one layer again where it does not?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rgc
from rgc.algebra import Scale
from rgc.compiler import trace
from rgc.cost import CPU, cost
from rgc.example import output_difference
from rgc.operators import BatchNorm, Normalize, Opaque

Forward = Callable[..., Tensor]


class Model(nn.Module):
    def __init__(self, forward: Forward, **parts: nn.Module) -> None:
        super().__init__()
        self.parts, self.call = nn.ModuleDict(parts), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, **self.parts)


def randomised(model: nn.Module) -> nn.Module:
    """Weights of both signs, and statistics that hide nothing."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.3, 2) if name.endswith("running_var") else nn.init.normal_(tensor)
    return model.eval()


def compiled_equal(model: nn.Module, shape: tuple[int, ...], **options: Any) -> rgc.CompiledModule:
    torch.manual_seed(0)
    model = randomised(model)
    compiled = rgc.compile(model, torch.randn(shape), **options)
    for batch in (1, shape[0], 5):
        x = torch.randn(batch, *shape[1:])
        with torch.no_grad():
            assert output_difference(model(x), compiled(x)) < 1e-5
    return compiled


TOKENS, IMAGES, SIGNALS, VOLUMES = (2, 5, 6), (2, 6, 7, 8), (2, 6, 9), (2, 6, 3, 4, 5)
LAYERS: list[tuple[Callable[[], Any], tuple[int, ...]]] = [
    (lambda: nn.LayerNorm(6, 1e-3), TOKENS), (lambda: nn.LayerNorm(6, bias=False), TOKENS),
    (lambda: nn.LayerNorm(6, elementwise_affine=False), TOKENS),
    (lambda: nn.LayerNorm((5, 6), elementwise_affine=False), TOKENS),
    (lambda: nn.RMSNorm(6), TOKENS), (lambda: nn.RMSNorm(6, 0.5, elementwise_affine=False), TOKENS),
    (lambda: nn.GroupNorm(2, 6, 0.1), IMAGES), (lambda: nn.GroupNorm(1, 6), SIGNALS),
    (lambda: nn.GroupNorm(3, 6), (2, 6)),
    (lambda: nn.GroupNorm(6, 6, affine=False), VOLUMES),
    (lambda: nn.InstanceNorm1d(6, 0.2, affine=True), SIGNALS), (lambda: nn.InstanceNorm2d(6), IMAGES),
    (lambda: nn.InstanceNorm2d(6, affine=True), IMAGES), (lambda: nn.InstanceNorm3d(6, affine=True), VOLUMES),
]  # fmt: skip


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_a_normalisation_with_nothing_to_fold_into_is_the_users_own_layer(make: Any, shape: tuple[int, ...]) -> None:
    layer = make()
    model = Model(lambda x, norm: torch.relu(norm(x)), norm=layer)
    compiled = compiled_equal(model, shape)
    found = compiled.get_submodule("parts.norm")
    assert type(found) is type(layer) and repr(found) == repr(layer)
    assert set(compiled.state_dict()) == set(model.state_dict())
    assert compiled.report.ops_before == compiled.report.ops_after == {type(layer).__name__: 1, "ReLU": 1}
    assert compiled.report.params_after == compiled.report.params_before


@pytest.mark.parametrize(("make", "shape", "linear"), [
    (lambda: nn.LayerNorm(6), TOKENS, nn.Linear(6, 3)), (lambda: nn.RMSNorm(6), TOKENS, nn.Linear(6, 3, bias=False)),
    (lambda: nn.GroupNorm(2, 6), IMAGES, nn.Conv2d(6, 4, 3)), (lambda: nn.GroupNorm(3, 6), (2, 6), nn.Linear(6, 3)),
    (lambda: nn.InstanceNorm2d(6, affine=True), IMAGES, nn.Conv2d(6, 2, (1, 3))),
    (lambda: nn.InstanceNorm1d(6, affine=True), SIGNALS, nn.Conv1d(6, 2, 3)),
])  # fmt: skip
def test_the_weights_of_a_normalisation_fold_into_the_linear_operator_behind_it(
    make: Any, shape: tuple[int, ...], linear: nn.Module
) -> None:
    compiled = compiled_equal(Model(lambda x, norm, linear: linear(norm(x)), norm=make(), linear=linear), shape)
    norm = compiled.get_submodule("parts.norm")
    assert not list(norm.parameters()) and [each.rewrite for each in compiled.report.rewrites] == ["fold_scale"]
    assert sum(compiled.report.ops_after.values()) == 2


def test_an_offset_does_not_fold_into_a_padded_convolution_and_costs_nothing_to_keep() -> None:
    model = Model(lambda x, norm, conv: conv(norm(x)), norm=nn.GroupNorm(2, 6), conv=nn.Conv2d(6, 4, 3, padding=1))
    for passes in ("default", "all"):
        compiled = compiled_equal(model, IMAGES, passes=passes, objective="depth")
        assert compiled.report.ops_after == {"GroupNorm": 1, "Conv2d": 1} and not compiled.report.rewrites
        assert set(compiled.state_dict()) == set(model.state_dict())


def test_a_factor_behind_a_normalisation_goes_into_its_weights() -> None:
    gamma = torch.linspace(-1, 2, 6, dtype=torch.float64)
    compiled = compiled_equal(Model(lambda x, norm: torch.relu(gamma.to(x) * norm(x)), norm=nn.LayerNorm(6)), TOKENS)
    assert compiled.report.ops_after["LayerNorm"] == 1
    compiled = compiled_equal(Model(lambda x, norm: torch.relu(2 * norm(x) - 1), norm=nn.LayerNorm(6)), TOKENS)
    assert compiled.report.ops_after == {"LayerNorm": 1, "ReLU": 1}


def test_a_root_mean_square_norm_takes_no_offset_into_its_layer() -> None:
    compiled = compiled_equal(Model(lambda x, norm: torch.relu(norm(x) + 1), norm=nn.RMSNorm(6)), TOKENS)
    assert compiled.report.ops_after["RMSNorm"] == 1 and compiled.report.ops_after["add"] == 1


def test_a_normalisation_that_others_read_without_its_weights_is_kept_apart() -> None:
    def forward(x: Tensor, norm: nn.Module) -> Tensor:
        y: Tensor = norm(x)
        return torch.relu(y) + torch.relu(2 * y)

    compiled = compiled_equal(Model(forward, norm=nn.LayerNorm(6, elementwise_affine=False)), TOKENS)
    assert compiled.report.ops_after == {"LayerNorm": 1, "mul": 1, "ReLU": 2, "add": 1}


def test_a_normalisation_that_is_returned_as_well_is_kept() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(6, elementwise_affine=False)

        def forward(self, x: Tensor) -> Any:
            y = self.norm(x)
            return y, 3 * y

    compiled_equal(Both(), TOKENS)


def test_a_layer_that_is_called_twice_stays_one_layer() -> None:
    model = Model(lambda x, norm: torch.relu(norm(torch.relu(norm(x)))), norm=nn.GroupNorm(2, 6))
    compiled = compiled_equal(model, IMAGES)
    assert set(compiled.state_dict()) == set(model.state_dict())
    assert compiled.report.params_after == compiled.report.params_before


def test_a_group_norm_called_on_tensors_of_two_ranks_is_right_for_each() -> None:
    class Ranks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(2, 6)

        def forward(self, x: Tensor) -> Any:
            return self.norm(x), self.norm(x[:, :, 0, 0])

    compiled_equal(Ranks(), IMAGES)


def test_an_instance_norm_with_running_statistics_is_a_batch_norm() -> None:
    norm = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
    compiled = compiled_equal(
        Model(lambda x, conv, norm: torch.relu(norm(conv(x))), conv=nn.Conv2d(6, 6, 3, padding=1), norm=norm), IMAGES
    )
    assert compiled.report.ops_after == {"Conv2d": 1, "ReLU": 1}
    plain = nn.InstanceNorm1d(6, track_running_stats=True)
    graph = trace(randomised(Model(lambda x, norm: norm(x), norm=plain)), torch.randn(SIGNALS)).graph
    assert isinstance(graph.outputs.op, BatchNorm)


def test_an_instance_norm_without_a_batch_axis_is_kept_as_it_is() -> None:
    for norm in (nn.InstanceNorm2d(6), nn.InstanceNorm2d(6, track_running_stats=True)):
        model = Model(lambda x, norm: torch.relu(norm(x)), norm=norm).eval()
        graph = trace(model, torch.randn(6, 7, 8)).graph
        assert any(isinstance(value.op, Opaque) for value in graph.nodes())


W, B = torch.linspace(-1, 2, 6, dtype=torch.float64), torch.linspace(1, -3, 6, dtype=torch.float64)


@pytest.mark.parametrize(("call", "kind", "shape"), [
    (lambda x: F.layer_norm(x, (6,), W, B, 0.1), "layer", TOKENS),
    (lambda x: F.layer_norm(x, [6], weight=W), "layer", TOKENS),
    (lambda x: torch.layer_norm(x, [6], None, B, 0.1), "layer", TOKENS),
    (lambda x: F.rms_norm(x, (6,), W, 0.1), "rms", TOKENS),
    (lambda x: F.group_norm(x, 3, W, B, 0.1), "group", IMAGES),
    (lambda x: F.group_norm(x, num_groups=2, bias=B, eps=0.1), "group", IMAGES),
    (lambda x: F.instance_norm(x, weight=W, bias=B, eps=0.1), "instance", SIGNALS),
    (lambda x: torch.ops.aten.native_layer_norm.default(x, [6], W, B, 0.1)[0], "layer", TOKENS),
    (lambda x: torch.ops.aten.native_group_norm.default(x, W, B, 2, 6, 56, 3, 0.1)[0], "group", IMAGES),
])  # fmt: skip
def test_functions_are_lifted_as_the_layers_are(call: Any, kind: str, shape: tuple[int, ...]) -> None:
    model = Model(lambda x: torch.relu(call(x))).eval()
    x = torch.randn(shape, dtype=torch.float64)
    graph = trace(model, x).graph
    ops = [value.op for value in graph.nodes()]
    assert [type(op) for op in ops[1:3]] == [Normalize, Scale] and ops[1].kind == kind  # type: ignore[attr-defined]
    torch.testing.assert_close(graph.evaluate({"x": x}), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("layer", "shape"), [
    (nn.LayerNorm(6), TOKENS), (nn.GroupNorm(2, 6), IMAGES), (nn.InstanceNorm2d(6, affine=True), IMAGES),
    (nn.InstanceNorm2d(6, track_running_stats=True), IMAGES),
])  # fmt: skip
def test_exported_programs_are_lifted_as_the_layers_are(layer: nn.Module, shape: tuple[int, ...]) -> None:
    def forward(x: Tensor, norm: nn.Module) -> Tensor:
        y: Tensor = torch.relu(norm(x))
        y[:, 0].zero_()  # through a view, which symbolic tracing does not follow
        return y

    compiled = compiled_equal(Model(forward, norm=layer), shape)
    assert compiled.report.tier == "torch.export"
    assert not {"layer_norm.default", "group_norm.default", "instance_norm.default"} & set(compiled.report.ops_after)


@pytest.mark.parametrize("call", [
    lambda x: F.layer_norm(x, x.shape[-1:], W, B),
    lambda x: F.layer_norm(x, (5, 6), W.expand(5, 6), None),
    lambda x: F.layer_norm(x, (6,), x[0, 0], B),
    lambda x: F.instance_norm(x, torch.zeros(5).double(), torch.ones(5).double()),
], ids=["a size that is read", "weights for each position", "weights that are computed", "updates"])  # fmt: skip
def test_other_forms_are_kept_as_they_are(call: Any) -> None:
    model = Model(lambda x: torch.relu(call(x))).eval()
    x = torch.randn(TOKENS, dtype=torch.float64)
    graph = trace(model, x).graph
    assert not any(isinstance(value.op, Normalize) for value in graph.nodes())
    torch.testing.assert_close(graph.evaluate({"x": x}), model(x))


def test_a_normalisation_and_its_weights_cost_as_one_layer() -> None:
    def values(affine: bool) -> list[Any]:
        model = Model(lambda x, norm: norm(x), norm=nn.LayerNorm(6, elementwise_affine=affine)).eval()
        return trace(model, torch.randn(TOKENS)).graph.nodes()

    assert len(values(True)) == len(values(False)) + 1
    for objective in ("depth", "latency"):
        assert cost(values(True), objective, CPU) == cost(values(False), objective, CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("read", [
    lambda y: y.reshape(y.shape[0], -1, 3), lambda y: y.view(y.size(0), y.size(1), 2, 3).flatten(2),
], ids=["shape", "size"])  # fmt: skip
def test_reading_the_shape_of_a_normalised_value_does_not_hold_its_weights_back(read: Any) -> None:
    def forward(x: Tensor, linear: nn.Module, norm: nn.Module) -> Tensor:
        y: Tensor = norm(torch.relu(x))
        z: Tensor = read(linear(y) * y.shape[1])
        return z

    compiled = compiled_equal(Model(forward, norm=nn.LayerNorm(6), linear=nn.Linear(6, 6)), TOKENS)
    assert "fold_scale" in {each.rewrite for each in compiled.report.rewrites}
    assert not list(compiled.get_submodule("parts.norm").parameters())
