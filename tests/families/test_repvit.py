"""Does RepViT become what its authors deploy?

Wang et al., "RepViT: Revisiting Mobile CNN From ViT Perspective" (2024), section 3.2 (token mixer) and figure 3.
"""

from __future__ import annotations

from typing import Any

import pytest
from timm.models import repvit
from torch import nn


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("size", [(9, 9), (8, 5)], ids=str)
def test_the_token_mixer_with_a_norm_over_the_sum_becomes_one_depthwise_convolution(
    becomes: Any, legacy: bool, size: tuple[int, int]
) -> None:
    compiled = becomes(repvit.RepVggDw(8, 3, legacy), (2, 8, *size), {"Conv2d": 1})
    (conv,) = (module for module in compiled.modules() if isinstance(module, nn.Conv2d))
    assert conv.groups == 8


def test_a_block_becomes_a_depthwise_convolution_and_two_pointwise_ones(becomes: Any) -> None:
    block = repvit.RepViTBlock(8, 2, 3, use_se=False, act_layer=nn.GELU)
    becomes(block, (2, 8, 9, 8), {"Conv2d": 3, "GELU": 1, "add": 1})


def test_a_block_with_squeeze_and_excitation_keeps_that_only(becomes: Any) -> None:
    block = repvit.RepViTBlock(8, 2, 3, use_se=True, act_layer=nn.GELU)
    excite = {"mean": 1, "ReLU": 1, "Sigmoid": 1, "mul": 1}
    becomes(block, (2, 8, 9, 8), {"Conv2d": 5, "GELU": 1, "add": 1, **excite})


def test_a_stem_becomes_two_convolutions(becomes: Any) -> None:
    becomes(repvit.RepVitStem(3, 16, nn.GELU), (2, 3, 17, 14), {"Conv2d": 2, "GELU": 1})


def test_a_downsampling_becomes_one_strided_convolution_between_its_blocks(becomes: Any) -> None:
    """The pre-block; spatial and channel downsampling as one 3x3 of stride 2; the feed-forward residual."""
    block = repvit.RepVitDownsample(8, 2, 12, 3, nn.GELU)
    becomes(block, (2, 8, 9, 8), {"Conv2d": 3 + 1 + 2, "GELU": 2, "add": 2})


@pytest.mark.parametrize("distillation", [False, True])
def test_the_averaged_heads_become_one_linear_layer(becomes: Any, distillation: bool) -> None:
    becomes(repvit.RepVitClassifier(16, 5, distillation), (4, 16), {"Linear": 1})
