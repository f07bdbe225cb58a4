"""A skip connection around a linear operator is one more tap of it: x + Ax = (I + A)x."""

from __future__ import annotations

from torch import Tensor, nn

from rgc import Conv, Linear, Scale, Value, add, rewrite, unit


@rewrite(lambda x, linear: x + linear(x))
def absorb_residual(x: Value, linear: Conv | Scale) -> Value:
    return _absorbed(x, linear)


def _absorbed(x: Value, linear: Linear) -> Value:
    size = None if linear.spatial is None else x.tensor_type.size(linear.spatial)
    return add(linear, unit(), size)(x)


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.inner(x)
        return x + inner


@absorb_residual.fires_on(shape=(2, 4, 8, 8))
def residual_around_a_padded_convolution() -> nn.Module:
    return nn.Sequential(_Residual(nn.Conv2d(4, 4, 3, padding=1)), nn.ReLU()).eval()


@absorb_residual.fires_on(shape=(2, 4, 8, 8))
def residual_around_a_grouped_convolution() -> nn.Module:
    return nn.Sequential(_Residual(nn.Conv2d(4, 4, 3, padding=1, groups=2)), nn.ReLU()).eval()


@absorb_residual.leaves_alone(shape=(2, 1, 1, 8), because="output sizes")
def residual_that_broadcasts() -> nn.Module:
    return nn.Sequential(_Residual(nn.Conv2d(1, 1, (1, 8))), nn.ReLU()).eval()
