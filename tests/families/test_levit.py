"""Do LeViT's norms on tokens, in front of heads and behind convolutions disappear into their neighbours?

Graham et al., "LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference" (2021), section 4.2: every
linear layer has a batch norm behind it, on [B, N, C] through ``flatten(0, 1)`` and ``reshape_as``; two averaged
heads.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models import levit
from torch import Tensor, nn


class TokenLinear(nn.Module):
    """Linear, then a batch norm over the features of all tokens, as the authors' release has it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        normalised: Tensor = self.norm(x.flatten(0, 1)).reshape_as(x)
        return normalised


def test_a_linear_layer_with_a_batch_norm_over_tokens_becomes_one_linear_layer(becomes: Any) -> None:
    compiled = becomes(TokenLinear(8, 12), (2, 5, 8), {"Linear": 1})
    x = torch.randn(3, 7, 8, dtype=torch.float64)  # another number of tokens
    assert compiled(x).shape == (3, 7, 12)


def test_linear_layers_with_batch_norms_over_tokens_in_a_row_become_one(becomes: Any) -> None:
    becomes(nn.Sequential(TokenLinear(8, 16), TokenLinear(16, 4)), (2, 5, 8), {"Linear": 1})


def test_the_feed_forward_layer_becomes_two_linear_layers(becomes: Any) -> None:
    becomes(levit.LevitMlp(8, 16, act_layer=nn.Hardswish), (2, 5, 8), {"Linear": 2, "Hardswish": 1})


def test_the_feed_forward_layer_of_convolutions_becomes_two_convolutions(becomes: Any) -> None:
    model = levit.LevitMlp(8, 16, use_conv=True, act_layer=nn.Hardswish)
    becomes(model, (2, 8, 5, 4), {"Conv2d": 2, "Hardswish": 1})


def test_the_patch_embedding_becomes_three_convolutions(becomes: Any) -> None:
    becomes(levit.Stem8(3, 16, nn.Hardswish), (2, 3, 17, 16), {"Conv2d": 3, "Hardswish": 2})


@pytest.mark.parametrize("bias", [True, False])
def test_a_batch_norm_before_a_head_becomes_part_of_it(becomes: Any, bias: bool) -> None:
    becomes(levit.NormLinear(8, 5, bias=bias), (4, 8), {"Linear": 1})


class DistilledHeads(nn.Module):
    """The class token is averaged; so are the two heads (section 4.2, "classification")."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.head_dist = levit.NormLinear(8, 5), levit.NormLinear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean(dim=1)
        averaged: Tensor = (self.head(x) + self.head_dist(x)) / 2
        return averaged


def test_two_averaged_heads_become_one_linear_layer(becomes: Any) -> None:
    becomes(DistilledHeads(), (2, 5, 8), {"mean": 1, "Linear": 1})


def test_attention_becomes_two_linear_layers_around_the_softmax(becomes: Any) -> None:
    """By hand: qkv and proj; split, permutations, two products, scale and bias stay."""
    attention = levit.Attention(8, 4, num_heads=2, attn_ratio=1, resolution=(2, 3), act_layer=nn.Hardswish)
    kept = {"split": 1, "permute": 3, "matmul": 2, "add": 1, "mul": 1, "softmax": 1, "transpose": 1, "Hardswish": 1}
    compiled = becomes(attention, (2, 6, 8), {"Linear": 2, **kept})
    assert not any("Norm" in name for name in compiled.report.ops_after)


def test_attention_with_convolutions_keeps_no_norm(becomes: Any) -> None:
    attention = levit.Attention(8, 4, num_heads=2, resolution=(2, 3), use_conv=True, act_layer=nn.Hardswish)
    kept = {"split": 1, "matmul": 2, "add": 1, "mul": 1, "softmax": 1, "transpose": 2, "Hardswish": 1}
    becomes(attention, (2, 8, 2, 3), {"Conv2d": 2, **kept}, any_size=False)


def test_downsampling_attention_keeps_no_norm(becomes: Any) -> None:
    """By hand: kv, q and proj; the strided slice of the tokens stays before q."""
    attention = levit.AttentionDownsample(
        8, 12, 4, num_heads=2, attn_ratio=1, resolution=(4, 4), act_layer=nn.Hardswish
    )
    kept = {"split": 1, "permute": 3, "matmul": 2, "add": 1, "mul": 1, "softmax": 1, "transpose": 1, "Hardswish": 1}
    becomes(attention, (2, 16, 8), {"Linear": 3, **kept}, any_size=False)


def test_a_small_network_keeps_no_norm(becomes: Any) -> None:
    model = levit.LevitDistilled(
        img_size=32,
        num_classes=4,
        embed_dim=(16,),
        key_dim=8,
        depth=(1,),
        num_heads=(2,),
        attn_ratio=1.0,
        mlp_ratio=2.0,
    )
    attention = {"split": 1, "permute": 3, "matmul": 2, "mul": 1, "softmax": 1}
    views = {"transpose": 2, "mean": 1}
    layers = {"Conv2d": 4, "Linear": 5, "Hardswish": 5, "add": 3}
    becomes(model, (2, 3, 32, 32), {**layers, **attention, **views}, any_size=False)
