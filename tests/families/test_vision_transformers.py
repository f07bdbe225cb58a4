"""Do the batch norms and linear parts of the mobile vision transformers disappear?

TinyViT: Wu et al., "TinyViT: Fast Pretraining Distillation for Small Vision Transformers" (2022), section 3.2.
EfficientViT (MSRA): Liu et al., "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention"
(2023), section 3 and figure 6. EfficientFormer: Li et al., "EfficientFormer: Vision Transformers at MobileNet Speed"
(2022), section 4 and figure 3. NextViT: Li et al., "Next-ViT: Next Generation Vision Transformer for Efficient
Deployment in Realistic Industrial Scenarios" (2022), section 3. SHViT: Yun and Ro, "SHViT: Single-Head Vision
Transformer with Memory Efficient Macro Design" (2024), section 3.
"""

from __future__ import annotations

from typing import Any

import pytest
from timm.models import efficientformer, efficientvit_msra, nextvit, shvit, tiny_vit
from torch import Tensor, nn


def norms(compiled: Any) -> set[str]:
    return {name for name in compiled.report.ops_after if "BatchNorm" in name}


class TestTinyViT:
    def test_the_patch_embedding_becomes_two_convolutions(self, becomes: Any) -> None:
        becomes(tiny_vit.PatchEmbed(3, 8, nn.GELU), (2, 3, 17, 14), {"Conv2d": 2, "GELU": 1})

    def test_an_inverted_residual_becomes_three_convolutions(self, becomes: Any) -> None:
        block = tiny_vit.MBConv(8, 8, 2.0, nn.GELU, drop_path=0.1)
        becomes(block, (2, 8, 9, 8), {"Conv2d": 3, "GELU": 3, "add": 1})

    def test_patch_merging_becomes_three_convolutions(self, becomes: Any) -> None:
        becomes(tiny_vit.PatchMerging(8, 12, nn.GELU), (2, 8, 9, 8), {"Conv2d": 3, "GELU": 2})

    def test_the_affine_part_of_the_layer_norm_goes_into_the_feed_forward_layer(self, becomes: Any) -> None:
        compiled = becomes(tiny_vit.NormMlp(8, 16), (2, 5, 8), {"LayerNorm": 1, "Linear": 2, "GELU": 1})
        assert compiled.report.params_after == (8 * 16 + 16) + (16 * 8 + 8)

    def test_a_block_keeps_one_depthwise_convolution_and_no_batch_norm(self, becomes: Any) -> None:
        """By hand: qkv, proj, two feed-forward layers; one convolution; two layer norms without parameters."""
        block = tiny_vit.TinyVitBlock(8, 2, window_size=3)
        views = {"split": 1, "permute": 4, "transpose": 2, "scaled_dot_product_attention": 1}
        kept = {"LayerNorm": 2, "GELU": 1, "add": 2}
        compiled = becomes(block, (2, 3, 3, 8), {"Linear": 4, "Conv2d": 1, **kept, **views}, any_size=False)
        assert not norms(compiled)


class TestEfficientViT:
    def test_the_patch_embedding_becomes_four_convolutions(self, becomes: Any) -> None:
        becomes(efficientvit_msra.PatchEmbedding(3, 16), (2, 3, 17, 16), {"Conv2d": 4, "ReLU": 3})

    def test_a_depthwise_residual_becomes_one_convolution(self, becomes: Any) -> None:
        conv = efficientvit_msra.ConvNorm(8, 8, 3, 1, 1, groups=8)
        compiled = becomes(efficientvit_msra.ResidualDrop(conv), (2, 8, 9, 8), {"Conv2d": 1})
        (merged,) = (module for module in compiled.modules() if isinstance(module, nn.Conv2d))
        assert merged.groups == 8

    def test_a_feed_forward_layer_becomes_two_convolutions(self, becomes: Any) -> None:
        model = efficientvit_msra.ResidualDrop(efficientvit_msra.ConvMlp(8, 16))
        becomes(model, (2, 8, 5, 6), {"Conv2d": 2, "ReLU": 1, "add": 1})

    def test_patch_merging_keeps_its_squeeze_and_excitation_only(self, becomes: Any) -> None:
        excite = {"mean": 1, "Sigmoid": 1, "mul": 1}
        becomes(efficientvit_msra.PatchMerging(4, 8), (2, 4, 9, 8), {"Conv2d": 5, "ReLU": 3, **excite})

    def test_a_cascaded_attention_keeps_no_norm_and_no_scale(self, becomes: Any) -> None:
        """By hand: qkv and depthwise per head, proj; the scale of q is in its depthwise convolution."""
        attention = efficientvit_msra.CascadedGroupAttention(
            8, 4, num_heads=2, attn_ratio=1, resolution=3, kernels=(3, 3)
        )
        heads = {"split": 2, "transpose": 4, "matmul": 4, "add": 2 + 1, "softmax": 2}
        compiled = becomes(
            attention, (2, 8, 3, 3), {"Conv2d": 5, "chunk": 1, "cat": 1, "ReLU": 1, **heads}, any_size=False
        )
        assert not norms(compiled) and compiled.report.ops_after["mul"] == 0

    def test_a_norm_before_the_head_becomes_part_of_it(self, becomes: Any) -> None:
        becomes(efficientvit_msra.NormLinear(8, 5), (4, 8), {"Linear": 1})


class Mixer(nn.Module):
    """x + s (pool(x) - x), as MetaFormer's pooling; the paper's equation 1 with a layer scale."""

    def __init__(self, channels: int, count_include_pad: bool) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=count_include_pad)
        self.scale = nn.Parameter(1e-5 * nn.init.ones_(nn.Parameter(nn.Linear(channels, 1).weight.detach()[0])))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale.view(-1, 1, 1) * (self.pool(x) - x)


class TestEfficientFormer:
    def test_the_stem_becomes_two_convolutions(self, becomes: Any) -> None:
        becomes(efficientformer.Stem4(3, 8), (2, 3, 17, 16), {"Conv2d": 2, "ReLU": 2})

    def test_a_downsampling_becomes_one_convolution(self, becomes: Any) -> None:
        becomes(efficientformer.Downsample(4, 8), (2, 4, 9, 8), {"Conv2d": 1})

    def test_a_pooling_mixer_that_counts_its_padding_becomes_one_depthwise_convolution(self, becomes: Any) -> None:
        compiled = becomes(Mixer(8, count_include_pad=True), (2, 8, 9, 8), {"Conv2d": 1})
        (conv,) = (module for module in compiled.modules() if isinstance(module, nn.Conv2d))
        assert conv.groups == 8

    def test_a_pooling_mixer_that_does_not_count_its_padding_stays_a_pooling_and_says_why(self, becomes: Any) -> None:
        compiled = becomes(
            Mixer(8, count_include_pad=False), (2, 8, 9, 8), {"AvgPool2d": 1, "mul": 1, "sub": 1, "add": 1}
        )
        assert any("count_include_pad" in refused.reason for refused in compiled.report.refusals)

    def test_a_block_keeps_no_norm_and_no_layer_scale_but_the_mixers(self, becomes: Any) -> None:
        """By hand: pooling, difference, scale, sum; then two 1x1 convolutions that took norms and layer scale."""
        mixer = {"AvgPool2d": 1, "sub": 1, "mul": 1, "add": 2}
        compiled = becomes(efficientformer.MetaBlock2d(8, mlp_ratio=2), (2, 8, 7, 6), {"Conv2d": 2, "GELU": 1, **mixer})
        assert not norms(compiled)

    def test_a_token_block_has_its_layer_scales_in_its_linear_layers(self, becomes: Any) -> None:
        block = efficientformer.MetaBlock1d(32, mlp_ratio=1)
        views = {"split": 1, "permute": 2, "transpose": 3}
        attention = {"matmul": 2, "mul": 1, "softmax": 1}
        kept = {"LayerNorm": 2, "GELU": 1, "add": 3}
        compiled = becomes(block, (2, 49, 32), {"Linear": 4, **views, **attention, **kept})
        assert compiled.report.ops_after["mul"] <= 1  # of the attention's scores


class TestNextViT:
    @pytest.mark.parametrize("size", [(9, 9), (8, 6)], ids=str)
    def test_a_pointwise_patch_embedding_becomes_one_convolution(self, becomes: Any, size: tuple[int, int]) -> None:
        becomes(nextvit.PatchEmbed(8, 12), (2, 8, *size), {"Conv2d": 1})

    def test_a_pooled_patch_embedding_keeps_its_pooling_where_windows_may_be_unequal(self, becomes: Any) -> None:
        becomes(nextvit.PatchEmbed(8, 12, stride=2), (2, 8, 9, 8), {"AvgPool2d": 1, "Conv2d": 1})

    def test_a_pooled_patch_embedding_becomes_one_convolution_at_an_even_size(self, becomes: Any) -> None:
        becomes(nextvit.PatchEmbed(8, 12, stride=2), (2, 8, 10, 8), {"Conv2d": 1}, passes="all,-collapse")

    def test_a_convolutional_attention_becomes_two_convolutions(self, becomes: Any) -> None:
        becomes(nextvit.ConvAttention(16, 8), (2, 16, 5, 6), {"Conv2d": 2, "ReLU": 1})

    def test_a_convolutional_block_becomes_five_convolutions(self, becomes: Any) -> None:
        """By hand: embedding, grouped 3x3, projection, and the feed-forward layer with the norm in its first 1x1."""
        block = nextvit.NextConvBlock(8, 16, head_dim=8, mlp_ratio=2)
        becomes(block, (2, 8, 5, 6), {"Conv2d": 5, "ReLU": 2, "add": 2})

    def test_the_pooled_keys_have_their_batch_norm_in_the_linear_layers(self, becomes: Any) -> None:
        """By hand: q, k, v, proj; the norm over channels [N, C, L] goes through the transpose into k and v."""
        attention = nextvit.EfficientAttention(8, head_dim=4, sr_ratio=2)
        views = {"permute": 1, "transpose": 5, "AvgPool1d": 1, "scaled_dot_product_attention": 1}
        becomes(attention, (2, 16, 8), {"Linear": 4, **views}, any_size=False)

    def test_a_transformer_block_keeps_no_norm(self, becomes: Any) -> None:
        block = nextvit.NextTransformerBlock(16, 64, 0.0, head_dim=16, mlp_ratio=0.5, mix_block_ratio=0.5)
        views = {"permute": 1, "transpose": 5, "scaled_dot_product_attention": 1, "cat": 1}
        convs = {"Conv2d": 1 + 1 + 2 + 2, "Linear": 4, "ReLU": 2, "add": 3}
        compiled = becomes(block, (2, 16, 4, 4), {**convs, **views}, any_size=False)
        assert not norms(compiled)


class TestSHViT:
    def test_a_depthwise_residual_becomes_one_convolution(self, becomes: Any) -> None:
        conv = shvit.Conv2dNorm(8, 8, 3, 1, 1, groups=8)
        becomes(shvit.Residual(conv), (2, 8, 9, 8), {"Conv2d": 1})

    def test_a_feed_forward_residual_becomes_two_convolutions(self, becomes: Any) -> None:
        becomes(shvit.Residual(shvit.FFN(8, 16)), (2, 8, 5, 4), {"Conv2d": 2, "ReLU": 1, "add": 1})

    def test_patch_merging_keeps_its_squeeze_and_excitation_only(self, becomes: Any) -> None:
        excite = {"mean": 1, "Sigmoid": 1, "mul": 1}
        becomes(shvit.PatchMerging(4, 8), (2, 4, 9, 8), {"Conv2d": 5, "ReLU": 3, **excite})

    def test_single_head_attention_has_the_affine_part_of_its_norm_in_its_projection(self, becomes: Any) -> None:
        """By hand: qkv (with the affine part of the group norm) and proj."""
        model = shvit.SHSA(8, 4, 4)
        views = {"split": 2, "transpose": 2, "cat": 1}
        kept = {"GroupNorm1": 1, "matmul": 2, "mul": 1, "softmax": 1, "ReLU": 1}
        compiled = becomes(model, (2, 8, 4, 3), {"Conv2d": 2, **kept, **views})
        assert not norms(compiled)
        assert compiled.report.params_after == (4 * 12 + 12) + (8 * 8 + 8)

    def test_a_stage_of_convolutions_becomes_three(self, becomes: Any) -> None:
        becomes(shvit.BasicBlock(8, 4, 4, "i"), (2, 8, 5, 6), {"Conv2d": 3, "ReLU": 1, "add": 1})
