"""Is each block the convolution and batch norm that it stands in for, at every geometry?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rgc
from rgc.errors import Refusal
from rgc.expansion_blocks import BLOCKS, acnet
from rgc.nn import set_decay
from rgc.testing import randomize

GEOMETRIES: list[dict[str, Any]] = [
    {}, {"padding": 1, "stride": 2}, {"padding": "same", "dilation": 2}, {"padding": (0, 2), "bias": False},
    {"padding": 1, "groups": 8}, {"padding": 1, "groups": 2, "out_channels": 6}, {"padding": 1, "stride": (1, 2)},
    {"padding": 2, "padding_mode": "reflect"}, {"padding": 1, "padding_mode": "circular"},
    {"kernel_size": (3, 5), "padding": (1, 2)}, {"kernel_size": (4, 2), "padding": "same"}, {"kernel_size": 1},
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # PyTorch's, of its own slower path
@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_is_its_convolution_and_batch_norm(block: str, geometry: dict[str, Any], has_norm: bool) -> None:
    options = {"in_channels": 8, "out_channels": 8, "kernel_size": 3, **geometry}
    conv = nn.Conv2d(**options)
    bn = nn.BatchNorm2d(conv.out_channels, eps=1e-2) if has_norm else None
    original = randomize(nn.Sequential(conv, *([bn] if bn else []))).double()
    x = torch.randn(2, 8, 11, 10, dtype=torch.float64)
    expected = original(x)
    if block == "acnet" and geometry.get("kernel_size") in ((4, 2), 1):
        with pytest.raises(Refusal, match="no centre" if geometry["kernel_size"] != 1 else "a line or a point"):
            acnet(conv, bn)
        return
    built = BLOCKS[block](conv, bn)
    assert not any(module.training for module in built.modules())
    assert torch.allclose(built(x), expected, rtol=0, atol=1e-12 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_have_one_or_three_axes_too(block: str, axes: int) -> None:
    kinds: dict[int, tuple[Any, Any]] = {1: (nn.Conv1d, nn.BatchNorm1d), 3: (nn.Conv3d, nn.BatchNorm3d)}
    conv, bn = kinds[axes][0](4, 4, 3, padding=1), kinds[axes][1](4)
    original = randomize(nn.Sequential(conv, bn))
    x = torch.randn(2, 4, *range(5, 5 + axes))
    expected = original(x)
    if block == "acnet" and axes == 1:
        with pytest.raises(Refusal, match="a line or a point"):
            acnet(conv, bn)
        return
    built = BLOCKS[block](conv, bn)
    assert torch.allclose(built(x), expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))


def test_the_reduce_block_is_equal_at_every_decay_and_in_training_mode() -> None:
    conv, bn = nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)
    original = randomize(nn.Sequential(conv, bn)).double()
    block = BLOCKS["reduce"](conv, bn)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    for decay in (0.0, 0.3, 1.0):
        set_decay(block, decay)
        assert torch.allclose(block(x), original(x), rtol=0, atol=1e-12)
        assert torch.allclose(block.train()(x), original.train()(x), rtol=0, atol=1e-12)
        block.eval(), original.eval()


@pytest.mark.parametrize("block", [name for name in BLOCKS if name != "reduce"])
def test_a_batch_norm_whose_gamma_is_zero_keeps_every_branch_trainable(block: str) -> None:
    conv, bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
    nn.init.zeros_(bn.weight)
    built = BLOCKS[block](conv, bn)
    y = built(torch.randn(2, 4, 6, 6))
    assert torch.equal(y, torch.zeros_like(y))
    (y * torch.randn_like(y)).sum().backward()
    last = [list(branch.children())[-1] for branch in built.get_submodule("branches").children()]
    for norm in last:
        assert isinstance(norm, nn.BatchNorm2d) and norm.weight.grad is not None
        assert norm.weight.grad.abs().min() > 0


def test_a_frozen_batch_norm_stays_frozen_in_every_branch() -> None:
    conv, bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4).eval()
    built = BLOCKS["repvgg"](conv, bn)
    assert built.training
    assert not any(module.training for module in built.modules() if isinstance(module, nn.BatchNorm2d))


@pytest.mark.parametrize("block", BLOCKS)
def test_a_trained_block_merges_into_one_convolution(block: str) -> None:
    model = rgc.expand(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)), block)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 4, 6, 6) + 1).square().mean().backward()
        optimizer.step()
    if block == "reduce":
        set_decay(model, 1.0)
    compiled = rgc.compile(model.eval(), torch.randn(1, 4, 9, 8))
    assert compiled.report.ops_after == {"Conv2d": 1}
