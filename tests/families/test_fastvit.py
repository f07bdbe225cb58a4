"""Do FastViT's and MobileCLIP's token mixers and large-kernel branches become single convolutions?

Vasu et al., "FastViT: A Fast Hybrid Vision Transformer using Structural Reparameterization" (2023), sections 3.2-3.3:
RepMixer Y = X + DWConv(BN(X)) (equation 2), written X + gamma (mixer(X) - norm(X)) in the release. Vasu et al.,
"MobileCLIP: Fast Image-Text Models through Multi-Modal Reinforced Training" (2024), section 3.2: Text-RepMixer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models import fastvit
from torch import Tensor, nn


@pytest.mark.parametrize("size", [(9, 9), (8, 11)], ids=str)
@pytest.mark.parametrize("layer_scale", [1e-5, None])
def test_a_rep_mixer_becomes_one_depthwise_convolution(
    becomes: Any, layer_scale: float | None, size: tuple[int, int]
) -> None:
    compiled = becomes(fastvit.RepMixer(8, layer_scale_init_value=layer_scale), (2, 8, *size), {"Conv2d": 1})
    (conv,) = (module for module in compiled.modules() if isinstance(module, nn.Conv2d))
    assert conv.groups == 8 and conv.kernel_size == (3, 3)


def test_a_conditional_position_encoding_becomes_one_depthwise_convolution(becomes: Any) -> None:
    becomes(fastvit.RepConditionalPosEnc(8), (2, 8, 9, 8), {"Conv2d": 1})


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("small", [3, 5])
def test_large_and_small_kernel_branches_become_one_convolution(becomes: Any, stride: int, small: int) -> None:
    block = fastvit.ReparamLargeKernelConv(8, 16, 7, stride, group_size=1, small_kernel=small)
    becomes(block, (2, 8, 9, 12), {"Conv2d": 1})


def test_a_rep_mixer_block_becomes_three_convolutions(becomes: Any) -> None:
    """The mixer; depthwise 7x7, norm and first 1x1 as one; the second 1x1 with the layer scale."""
    becomes(fastvit.RepMixerBlock(4, mlp_ratio=2), (2, 4, 9, 8), {"Conv2d": 3, "GELU": 1, "add": 1})


def test_a_stem_becomes_three_convolutions(becomes: Any) -> None:
    becomes(fastvit.convolutional_stem(3, 8), (2, 3, 17, 16), {"Conv2d": 3, "GELU": 3})


def test_a_patch_embedding_becomes_two_convolutions(becomes: Any) -> None:
    becomes(fastvit.PatchEmbed(7, 2, 4, 8), (2, 4, 9, 10), {"Conv2d": 2, "GELU": 2})


def test_the_batch_norm_before_attention_goes_into_its_projection(becomes: Any) -> None:
    """By hand: qkv and proj, which takes the layer scale; depthwise 7x7 with the first 1x1; the second 1x1."""
    block = fastvit.AttentionBlock(32, mlp_ratio=1)
    attention = {"permute": 1, "unbind": 1, "scaled_dot_product_attention": 1, "transpose": 3}
    compiled = becomes(
        block, (2, 32, 3, 4), {"Linear": 2, "Conv2d": 2, "GELU": 1, "add": 2, **attention}, any_size=False
    )
    assert compiled.report.ops_after["mul"] == 0


class TextMixer(nn.Module):
    """MobileCLIP's one-dimensional RepMixer over tokens [N, C, 1, L]."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        conv = nn.Conv2d(channels, channels, (1, kernel), padding=(0, kernel // 2), groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.skip, self.conv = nn.BatchNorm2d(channels), nn.Sequential(conv, nn.BatchNorm2d(channels))
        self.layer_scale = nn.Parameter(1e-5 * torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.conv(x) + self.skip(x)
        return x + self.layer_scale * (mixed - self.norm(x))


def test_a_text_rep_mixer_becomes_one_convolution(becomes: Any) -> None:
    becomes(TextMixer(8, 11), (2, 8, 1, 15), {"Conv2d": 1})
