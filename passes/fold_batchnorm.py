"""A convolution followed by a frozen batch norm is one convolution: s(Wx + b - m) + t = (sW)x + s(b - m) + t.

Before a convolution, W(s x + t) = (W s)x + W t: exact where the convolution pads nothing. With zero padding the ring
around the batch norm's output is 0 and not t: the convolution then pads with -t / s, which s x + t takes to 0, or, at
a fixed size, gets a bias map.
"""

from __future__ import annotations

from torch import nn

from rgc import AvgPool, BatchNorm, Conv, Value, compose, require, rewrite


@rewrite(lambda x, conv, bn: bn(conv(x)))
def fold_batchnorm(x: Value, conv: Conv | AvgPool, bn: BatchNorm) -> Value:
    require(not bn.training, "batch norm still uses batch statistics; call model.eval() first")
    return (bn.as_linear() @ _per_channel(conv, x))(x)


@fold_batchnorm.also(lambda x, bn, conv: conv(bn(x)))
def fold_batchnorm_before(x: Value, bn: BatchNorm, conv: Conv | AvgPool) -> Value:
    require(not bn.training, "batch norm still uses batch statistics; call model.eval() first")
    return compose(_per_channel(conv, x), bn.as_linear(), x.tensor_type.size(conv.spatial))(x)


def _per_channel(linear: Conv | AvgPool, x: Value) -> Conv:
    """A pooling does not say of how many channels, and a batch norm of one channel is a scale of any."""
    spatial, given = linear.spatial, x.tensor_type
    return linear.at(given.size(spatial)).as_conv(given.shape[-spatial - 1], spatial)


@fold_batchnorm.also(lambda x, first, second: second(first(x)))
def fold_batchnorm_pair(x: Value, first: BatchNorm, second: BatchNorm) -> Value:
    return (second.as_linear() @ first.as_linear())(x)


@fold_batchnorm.also(lambda x, bn: bn(x))
def fold_batchnorm_alone(x: Value, bn: BatchNorm) -> Value:
    """Nothing to fold into; a batch norm that stays says why."""
    require(not bn.training, "batch norm still uses batch statistics; call model.eval() first")
    require(False, f"no linear layer that could take it up stands directly before or behind it; it reads {x.op.label}")
    return bn(x)


@fold_batchnorm.fires_on(shape=(2, 3, 8, 8))
def convolution_without_bias() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()


@fold_batchnorm.fires_on(shape=(2, 4, 9, 9))
def transposed_convolution_with_groups() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(6)).eval()


@fold_batchnorm.fires_on(shape=(5, 7))
def linear_layer() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4)).eval()


@fold_batchnorm.fires_on(shape=(2, 3, 8, 8))
def batch_norm_before_an_unpadded_convolution() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)).eval()


@fold_batchnorm.fires_on(shape=(2, 3, 8, 8))
def batch_norms_around_an_average_pooling() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), nn.AvgPool2d(2), nn.BatchNorm2d(3)).eval()


@fold_batchnorm.fires_on(shape=(2, 3, 6, 5), fixed_size=True)
def batch_norm_before_a_padded_convolution_at_a_fixed_size() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)).eval()


@fold_batchnorm.fires_on(shape=(2, 3, 6, 5))
def two_batch_norms() -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU()).eval()


@fold_batchnorm.leaves_alone(shape=(2, 3, 8, 8), because="batch statistics")
def batch_norm_without_statistics() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()


@fold_batchnorm.leaves_alone(shape=(2, 3, 8, 8), because="it reads max pool")
def batch_norm_between_other_layers() -> nn.Module:
    return nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(3), nn.ReLU()).eval()


@fold_batchnorm.fires_on(shape=(2, 3, 8, 8))
def batch_norm_before_a_padded_convolution() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)).eval()


@fold_batchnorm.leaves_alone(shape=(2, 4, 8, 8), because="unevenly")
def batch_norm_before_a_transposed_convolution_of_groups() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 3, stride=2, groups=4)).eval()


@fold_batchnorm.leaves_alone(shape=(2, 5, 7), because="different axes")
def linear_layer_whose_batch_norm_is_over_tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(5)).eval()
