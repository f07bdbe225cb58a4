"""Is ReduceNet the network it claims to be, and is it one affine map once its activations have decayed?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

import rgc
from rgc.errors import InputError
from rgc.models import ReduceBlock, ReduceNet, reducenet, reducenet20, reducenet56
from rgc.nn import DecayedActivation, set_decay
from rgc.testing import randomize

Randomise = Callable[[Any], Any]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_reducenet20_has_exactly_140698_parameters() -> None:
    assert parameters(reducenet20()) == 140_698


@pytest.mark.parametrize("expansion", [1, 2, 4])
def test_the_expansion_widens_only_the_middle_of_each_block(expansion: int) -> None:
    block = ReduceBlock(16, 32, expansion=expansion, stride=2)
    middle = 32 * expansion
    assert parameters(block) == 16 * middle * 9 + 2 * middle + middle * 32 + 2 * 32


@pytest.mark.parametrize(("model", "activations"), [(reducenet20(), 10), (reducenet56(), 28)])
def test_there_is_one_decaying_activation_in_the_stem_and_one_in_each_block(model: ReduceNet, activations: int) -> None:
    assert sum(isinstance(module, DecayedActivation) for module in model.modules()) == activations


@pytest.mark.parametrize("size", [32, 17])
def test_the_output_has_one_score_per_class(size: int) -> None:
    assert reducenet(8, num_classes=7)(torch.randn(2, 3, size, size)).shape == (2, 7)


def test_a_block_with_stride_two_has_no_shortcut() -> None:
    for block, shortcut in (
        (ReduceBlock(4, 4), True),
        (ReduceBlock(4, 4, stride=2), False),
        (ReduceBlock(4, 8), False),
    ):
        block.eval()
        nn.init.zeros_(block.bn2.weight)
        x = torch.randn(1, 4, 6, 6)
        y = block(x)
        assert torch.equal(y, x) if shortcut else not y.any()


def test_it_is_affine_exactly_when_every_decay_is_one(randomise: Randomise) -> None:
    model = randomise(reducenet(8, expansion=2))
    x, y = torch.randn(2, 2, 3, 16, 16, dtype=torch.float64)
    midpoint = (model(x) + model(y)) / 2
    assert not torch.allclose(model((x + y) / 2), midpoint)
    set_decay(model, 1.0)
    torch.testing.assert_close(model((x + y) / 2), (model(x) + model(y)) / 2, rtol=1e-10, atol=1e-10)


def test_the_decays_go_to_the_stem_and_then_to_the_blocks_in_order() -> None:
    decays = [0.0, 0.125, 0.25, 0.5, 0.625, 0.75, 1.0]
    model = reducenet(14, decay=decays)
    found = [module.decay.item() for module in model.modules() if isinstance(module, DecayedActivation)]
    assert found == decays


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_it_traces_under_torch_fx(decay: float, randomise: Randomise) -> None:
    model = randomise(reducenet20(decay=decay))
    (x,) = model.example_inputs()
    assert torch.equal(symbolic_trace(model)(x), model(x))


def test_a_state_dict_carries_weights_and_decays() -> None:
    source, target = reducenet(8, decay=0.5).eval(), reducenet(8).eval()
    target.load_state_dict(source.state_dict())
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(target(x), source(x))


def test_the_example_input_is_what_the_model_was_built_for() -> None:
    (x,) = reducenet(8, in_channels=1, image_size=28).example_inputs()
    assert x.shape == (1, 1, 28, 28)
    assert ReduceBlock(4, 8).double().example_inputs()[0].dtype == torch.float64


PADDINGS: list[Any] = ["layer", "stage", "network"]


def stages(model: ReduceNet, x: Tensor) -> list[Tensor]:
    """What the stem and the stages make of an image."""
    made: list[Tensor] = []
    parts = (model.stem, model.stage1, model.stage2, model.stage3)
    hooks = [part.register_forward_hook(lambda _module, _inputs, y: made.append(y)) for part in parts]
    model(x)
    for hook in hooks:
        hook.remove()
    return made


@pytest.mark.parametrize("depth", [8, 20])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (16, 16), (17, 14), (19, 32)])
def test_the_modes_of_padding_have_the_same_output_sizes_at_every_size(size: tuple[int, int], depth: int) -> None:
    x = torch.randn(1, 3, *size)
    layer, stage, network = (stages(reducenet(depth, padding=padding).eval(), x) for padding in PADDINGS)
    assert [y.shape for y in stage] == [y.shape for y in layer]
    assert network[-1].shape == layer[-1].shape


@pytest.mark.parametrize("padding", PADDINGS)
def test_the_modes_of_padding_agree_where_no_border_is_seen(padding: Any, randomise: Randomise) -> None:
    model, other = randomise(reducenet(14, decay=1.0)), reducenet(14, padding=padding).double().eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    mine, its = stages(model, x)[-1], stages(other, x)[-1]
    torch.testing.assert_close(its[..., 4:-4, 4:-4], mine[..., 4:-4, 4:-4])
    assert torch.equal(its, mine) == (padding == "layer")


@pytest.mark.parametrize("expansion", [1, 2])
@pytest.mark.parametrize(("depth", "size"), [(8, 16), (8, 17), (20, 13)])
@pytest.mark.parametrize(("padding", "kernels"), [("stage", 4), ("network", 1)])
def test_a_stage_or_a_network_that_pads_once_is_one_convolution(
    padding: Any, kernels: int, depth: int, size: int, expansion: int
) -> None:
    model = randomize(reducenet(depth, padding=padding, expansion=expansion, decay=1.0, widths=(4, 6, 8))).double()
    compiled = rgc.compile(model, torch.randn(2, 3, size, size, dtype=torch.float64), objective="depth")
    report = compiled.report
    assert report.ops_after == {"Conv2d": kernels, "AdaptiveAvgPool2d": 1} and not report.fixed_size
    for each in (size, size + 3):
        x = torch.randn(1, 3, each, each + 2, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("depth", "padding", "kernels"), [(56, "stage", [3, 19, 35, 35]), (26, "network", [53]), (56, "layer", [3] * 28)]
)
def test_the_kernels_are_as_large_as_the_fields_of_the_stages(depth: int, padding: Any, kernels: list[int]) -> None:
    model = randomize(reducenet(depth, padding=padding, decay=1.0, widths=(2, 2, 2), num_classes=2))
    compiled = rgc.compile(model, torch.randn(2, 3, 9, 8), objective="depth")
    assert [m.kernel_size[0] for m in compiled.modules() if isinstance(m, nn.Conv2d)] == kernels
    assert not compiled.report.failures


@pytest.mark.parametrize("padding", ["stage", "network"])
def test_one_convolution_of_a_stage_is_exact_in_integers(padding: Any) -> None:
    """Integer weights, batch norms with a factor of -1 or 1: in float64 every step is exact."""
    model = reducenet(14, padding=padding, decay=1.0, widths=(2, 3, 4)).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(torch.randint(-1, 2, module.weight.shape, generator=generator))
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.eps = 0.0
                module.running_mean.copy_(torch.randint(-2, 3, module.bias.shape, generator=generator))
                module.weight.copy_(torch.randint(0, 2, module.bias.shape, generator=generator) * 2 - 1)
                module.bias.copy_(torch.randint(-2, 3, module.bias.shape, generator=generator))
    backbone = nn.Sequential(Backbone(model), nn.ReLU()).eval()
    x = torch.randint(-2, 3, (2, 3, 11, 14), generator=generator).double()
    compiled = rgc.compile(backbone, x, objective="depth")
    assert compiled.report.ops_after == {"Conv2d": 4 if padding == "stage" else 1, "ReLU": 1}
    assert torch.equal(compiled(x), backbone(x)) and backbone(x).any()


class Backbone(nn.Module):
    """A network without its head."""

    def __init__(self, model: ReduceNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.features(x)


def test_kernels_that_do_not_pay_are_left_apart_with_the_estimate_as_reason() -> None:
    model = randomize(reducenet(20, padding="stage", decay=1.0))
    report = rgc.compile(model, torch.randn(1, 3, 32, 32)).report
    assert report.ops_after["Conv2d"] > 4
    assert any("estimated slower" in each.reason for each in report.refusals if each.rewrite == "merge_stage")


@pytest.mark.parametrize("padding", ["same", "Stage", 1, None])
def test_another_padding_is_refused(padding: Any) -> None:
    with pytest.raises(InputError, match=f"padding must be 'layer', 'stage' or 'network', got {padding!r}"):
        reducenet(8, padding=padding)


@pytest.mark.parametrize("depth", [2, 7, 18, 21])
def test_a_depth_that_is_not_six_n_plus_two_is_refused(depth: int) -> None:
    with pytest.raises(InputError, match=rf"depth must be 6n \+ 2 \(8, 14, 20, ...\), got {depth}"):
        reducenet(depth)


def test_an_expansion_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="expansion must be at least 1, got 0"):
        reducenet20(expansion=0)


def test_the_wrong_number_of_decays_is_refused() -> None:
    with pytest.raises(InputError, match=r"one number or 4 \(the stem's, then one per block\), got 2"):
        reducenet(8, decay=[0.0, 1.0])
