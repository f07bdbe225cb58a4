"""Max pooling commutes with a positive factor and any offset per channel: s max(x) + t = max(s x + t) for s > 0.

So a batch norm on either side of it meets the convolution on the other. For s < 0 the maximum would become a minimum.
"""

from __future__ import annotations

from torch import nn

from rgc import AdaptiveMaxPool, BatchNorm, Conv, MaxPool, Scale, Value, compose, require, rewrite


@rewrite(lambda x, first, pool, scale: scale(pool(first(x))))
def exchange_max_pool(
    x: Value, first: Conv | BatchNorm | Scale, pool: MaxPool | AdaptiveMaxPool, scale: BatchNorm | Scale
) -> Value:
    positive = _increasing(scale, pool)
    return pool(compose(positive, first, None if first.spatial is None else x.tensor_type.size(first.spatial))(x))


@exchange_max_pool.also(lambda x, scale, pool, second: second(pool(scale(x))))
def exchange_max_pool_before(
    x: Value, scale: BatchNorm | Scale, pool: MaxPool | AdaptiveMaxPool, second: Conv
) -> Value:
    pooled = pool(x)
    return compose(second, _increasing(scale, pool), pooled.tensor_type.size(second.spatial))(pooled)


def _increasing(scale: BatchNorm | Scale, pool: MaxPool | AdaptiveMaxPool) -> Scale:
    folded = scale.as_linear()
    assert isinstance(folded, Scale)
    lowest = float(folded.scale.min())
    require(
        lowest > 0, f"{pool.label} commutes with positive factors only, and a channel of {scale.label} has {lowest:.6g}"
    )
    require(
        folded.spatial is None or folded.spatial >= pool.spatial,
        f"{pool.label} pools over the channels of {scale.label}",
    )
    return folded


@exchange_max_pool.fires_on(shape=(2, 3, 9, 8))
def batch_norm_after_max_pooling() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 2, 1), nn.BatchNorm2d(4, affine=False)).eval()


@exchange_max_pool.fires_on(shape=(2, 4, 9, 8))
def batch_norm_before_max_pooling() -> nn.Module:
    return nn.Sequential(
        nn.ReLU(), nn.BatchNorm2d(4, affine=False), nn.MaxPool2d(2, ceil_mode=True), nn.Conv2d(4, 4, 3)
    ).eval()


@exchange_max_pool.fires_on(shape=(2, 3, 9, 8))
def batch_norm_after_adaptive_max_pooling() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveMaxPool2d(3), nn.BatchNorm2d(4, affine=False)).eval()


@exchange_max_pool.leaves_alone(shape=(2, 3, 9, 8), because="commutes with positive factors only")
def batch_norm_of_both_signs_after_max_pooling() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.BatchNorm2d(4)).eval()


@exchange_max_pool.fires_on(shape=(2, 4, 9, 8))
def batch_norm_before_max_pooling_and_a_padded_convolution() -> nn.Module:
    return nn.Sequential(
        nn.ReLU(), nn.BatchNorm2d(4, affine=False), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1)
    ).eval()
