"""What stands in for a convolution while it trains? Branches over one padded input whose sum is that convolution.

A branch is affine and reads the input already padded, as the convolution pads it, so padding of any amount and kind,
and what a batch norm does on the border, are the same for all. Each new branch k has a kernel E_k, which it applies
after its batch norm as s E_k, with s the scale of the batch norm behind the convolution (1 where there is none). The
first branch keeps that batch norm and has the kernel W - sum of E_k: so the sum is s W x + t, also where s is 0.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgc.decay import DecayedActivation
from rgc.errors import require

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
Classes = tuple[type[nn.Conv1d], type[nn.BatchNorm1d], type[nn.AvgPool1d]]

#: The layers for one, two and three spatial axes.
LAYERS: Mapping[int, Classes] = {
    1: (nn.Conv1d, nn.BatchNorm1d, nn.AvgPool1d),
    2: cast(Classes, (nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d)),
    3: cast(Classes, (nn.Conv3d, nn.BatchNorm3d, nn.AvgPool3d)),
}

#: How many KxK branches MobileOne has (arXiv 2206.04040, table 5: k = 4 for the smallest network).
MOBILEONE_BRANCHES = 4


@final
class ParallelBranches(nn.Module):
    """The sum of ``branches`` of one input, which is padded first: ``padding`` as `torch.nn.functional.pad` has it.

    Input [batch, in_channels, *sizes]; the output is that of the branches, which all have one shape.

    >>> branches = {"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(3, 4, 3)}
    >>> ParallelBranches(branches, padding=(1, 1, 1, 1))(torch.randn(1, 3, 5, 5)).shape
    torch.Size([1, 4, 5, 5])
    """

    def __init__(self, branches: Mapping[str, nn.Module], padding: Sequence[int], mode: str = "constant") -> None:
        super().__init__()
        self.padding = tuple(padding)
        self.mode = mode
        self.branches = nn.ModuleDict(branches)

    def forward(self, x: Tensor) -> Tensor:
        if any(self.padding):
            x = F.pad(x, self.padding, mode=self.mode)
        first, *rest = self.branches.values()
        y: Tensor = first(x)
        for branch in rest:
            y = y + branch(x)
        return y

    def extra_repr(self) -> str:
        return f"padding={self.padding}, mode={self.mode!r}"


@final
class Crop(nn.Module):
    """The input without ``lead`` positions at the start and ``trail`` at the end of each of its last axes.

    >>> Crop((1, 0), (1, 2))(torch.zeros(1, 3, 5, 5)).shape
    torch.Size([1, 3, 3, 3])
    """

    def __init__(self, lead: Sequence[int], trail: Sequence[int]) -> None:
        super().__init__()
        self.lead = tuple(lead)
        self.trail = tuple(trail)

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.lead, self.trail, strict=True)
        return x[(..., *(slice(lead, -trail if trail else None) for lead, trail in pairs))]

    def extra_repr(self) -> str:
        return f"lead={self.lead}, trail={self.trail}"


@final
class TwiceReLU(nn.Module):
    """2 relu(t) = t + abs(t): faded to t, it is t + (1 - decay) abs(t), whose difference of t and -t is always 2 t.

    >>> TwiceReLU()(torch.tensor([-1.0, 3.0]))
    tensor([0., 6.])
    """

    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.relu(x)


def repvgg(conv: Convolution, bn: Norm | None) -> nn.Module:
    """RepVGG's block (arXiv 2101.03697, section 3.2): KxK, 1x1 and identity, each with a batch norm; no activation."""
    site = _Site(conv, bn)
    return site.assembled("rbr_dense", [site.point("rbr_1x1"), *site.identity("rbr_identity")])


def acnet(conv: Convolution, bn: Norm | None) -> nn.Module:
    """ACNet's block (arXiv 1908.03930, section 3): KxK, and for each axis the line of the kernel through its centre."""
    site = _Site(conv, bn)
    size = "x".join(map(str, site.kernel))
    require(all(k % 2 == 1 for k in site.kernel), f"an even kernel ({size}) has no centre in which lines could cross")
    long = [axis for axis, k in enumerate(site.kernel) if k > 1]
    require(len(long) > 1, f"a kernel of {size} is a line or a point already")
    names = {0: "ver", 1: "hor"} if len(site.kernel) == 2 else {axis: f"axis{axis}" for axis in long}
    lines = []
    for axis in long:
        kernel = [k if other == axis else 1 for other, k in enumerate(site.kernel)]
        start = [0 if other == axis else k // 2 for other, k in enumerate(site.kernel)]
        lines.append(site.part(names[axis], kernel, start))
    return site.assembled("square", lines)


def mobileone(conv: Convolution, bn: Norm | None) -> nn.Module:
    """MobileOne's block (arXiv 2206.04040, section 3.2): several KxK, a 1x1 and a skip, each with a batch norm."""
    site = _Site(conv, bn)
    zeros = [0] * len(site.kernel)
    kxk = [site.part(f"rbr_conv_{index}", site.kernel, zeros) for index in range(1, MOBILEONE_BRANCHES)]
    scale = [site.point("rbr_scale")] if max(site.kernel) > 1 else []
    return site.assembled("rbr_conv_0", [*kxk, *scale, *site.identity("rbr_skip")])


def dbb(conv: Convolution, bn: Norm | None) -> nn.Module:
    """The diverse branch block (arXiv 2103.13425, section 3.2): KxK, 1x1-KxK, 1x1 and 1x1-average.

    Depthwise, the 1x1 is left out, and the average has no 1x1. A dilated kernel has no average: pooling has no gaps.
    """
    site = _Site(conv, bn)
    branches = [site.sequence("dbb_1x1_kxk")]
    if max(site.kernel) > 1 and not site.depthwise:
        branches.append(site.point("dbb_1x1"))
    if max(site.kernel) > 1 and max(conv.dilation) == 1:
        branches.append(site.average("dbb_avg"))
    return site.assembled("dbb_origin", branches)


def reduce(conv: Convolution, bn: Norm | None) -> nn.Module:
    """KxK to twice the channels, batch norm, decaying activation, 1x1: ReduceNet's block, at decay 0.

    The middle has z and -z of each output z, and the 1x1 takes half of their difference: with `TwiceReLU` that is z at
    every decay, and in training mode too. What the two learn differs as soon as the decay is below 1. The batch norm
    is there if the convolution has one.
    """
    groups, outputs = conv.groups, conv.out_channels

    def mirrored(values: Tensor) -> Tensor:  # [outputs, ...] -> [2 outputs, ...], z beside -z in each group
        each = _grouped(values.detach(), groups)
        return torch.cat([each, -each], 1).flatten(0, 1)

    wide = _convolution(conv, 2 * outputs, conv.kernel_size, conv.stride, conv.dilation, bias=conv.bias is not None)
    wide.padding, wide.padding_mode = conv.padding, conv.padding_mode
    wide._reversed_padding_repeated_twice = conv._reversed_padding_repeated_twice
    ones = (1,) * len(conv.kernel_size)
    narrow = _convolution(conv, outputs, ones, ones, ones, inputs=2 * outputs)
    half = torch.eye(outputs // groups).to(conv.weight) / 2
    with torch.no_grad():
        wide.weight.copy_(mirrored(conv.weight))
        if conv.bias is not None and wide.bias is not None:
            wide.bias.copy_(mirrored(conv.bias))
        narrow.weight.copy_(torch.cat([half, -half], 1).repeat(groups, 1).reshape(narrow.weight.shape))
    layers: dict[str, nn.Module] = {"conv1": wide}
    if bn is not None:
        layers["bn1"] = wide_bn = _norm(conv, bn, 2 * outputs)
        with torch.no_grad():
            assert bn.running_mean is not None and bn.running_var is not None
            assert wide_bn.running_mean is not None and wide_bn.running_var is not None
            wide_bn.running_mean.copy_(mirrored(bn.running_mean))
            wide_bn.running_var.copy_(mirrored(bn.running_var).abs())
            if bn.affine:
                # gamma has one sign for both: the minus is in the kernel already
                wide_bn.weight.copy_(_grouped(bn.weight, groups).repeat(1, 2).flatten())
                wide_bn.bias.copy_(mirrored(bn.bias))
    activation = DecayedActivation(TwiceReLU()).to(conv.weight)
    return _in_mode_of(conv, nn.Sequential(OrderedDict({**layers, "activation": activation, "conv2": narrow})))


#: Each kind of block by its name; a builder refuses, with a reason, a convolution that the block cannot stand in for.
BLOCKS: Mapping[str, Callable[[Convolution, Norm | None], nn.Module]] = {
    "repvgg": repvgg, "acnet": acnet, "dbb": dbb, "mobileone": mobileone, "reduce": reduce,
}  # fmt: skip


@dataclass(frozen=True)
class _Branch:
    """A branch with its last batch norm, and the kernel [out, in / groups, *kernel] before that one, in float64."""

    name: str
    layers: dict[str, nn.Module]
    bn: Norm
    kernel: Tensor


@dataclass(frozen=True)
class _Site:
    """A convolution, and the batch norm behind it: makes the branches that may stand beside it."""

    conv: Convolution
    bn: Norm | None

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.conv.kernel_size

    @property
    def depthwise(self) -> bool:
        return self.conv.groups == self.conv.in_channels == self.conv.out_channels

    def point(self, name: str) -> _Branch:
        """A 1x1 convolution at the centre of the kernel (an even one: at the tap before the middle)."""
        return self.part(name, [1] * len(self.kernel), self._centre())

    def identity(self, name: str) -> list[_Branch]:
        """A batch norm of the input, where that has the shape of the output; else nothing."""
        if max(self.conv.stride) > 1 or self.conv.in_channels != self.conv.out_channels:
            return []
        bn = self._norm(self.conv.out_channels)
        one = nn.init.dirac_(torch.empty_like(self._point_weight(), dtype=torch.float64), self.conv.groups)
        crop = self._crop([1] * len(self.kernel), self._centre())
        return [_Branch(name, {**crop, "bn": bn}, bn, self._embedded(one, self._centre()))]

    def part(self, name: str, kernel: Sequence[int], start: Sequence[int]) -> _Branch:
        """A convolution with the taps of the kernel from ``start`` on, ``kernel`` of them."""
        conv = _convolution(self.conv, self.conv.out_channels, kernel, self.conv.stride, self.conv.dilation)
        bn = self._norm(self.conv.out_channels)
        layers = {**self._crop(kernel, start), "conv": conv, "bn": bn}
        return _Branch(name, layers, bn, self._embedded(_exact(conv.weight), start))

    def sequence(self, name: str) -> _Branch:
        """1x1 convolution, which begins as the identity where it keeps the channels, batch norm, KxK convolution."""
        inputs, groups = self.conv.in_channels, self.conv.groups
        first, middle, pointwise = self._pointwise(2 * inputs if self.depthwise else inputs)
        if first.out_channels == inputs:
            with torch.no_grad():
                nn.init.dirac_(first.weight, groups)
            pointwise = _rescaled(middle, _exact(first.weight), torch.ones(inputs)) * _exact(first.weight)
        stride, dilation = self.conv.stride, self.conv.dilation
        conv = _convolution(self.conv, self.conv.out_channels, self.kernel, stride, dilation, inputs=first.out_channels)
        bn = self._norm(self.conv.out_channels)
        kernel = torch.einsum(
            "gomk,gmi->goik",
            _grouped(_exact(conv.weight).flatten(2), groups),
            _grouped(pointwise.flatten(1), groups),
        )
        layers: dict[str, nn.Module] = {"conv1": first, "bn1": middle, "conv2": conv, "bn2": bn}
        return _Branch(name, layers, bn, kernel.reshape(self.conv.weight.shape))

    def average(self, name: str) -> _Branch:
        """1x1 convolution and batch norm, unless depthwise, then the mean over the taps of the kernel."""
        layers: dict[str, nn.Module] = {}
        matrix = torch.ones(self._point_weight().shape, dtype=torch.float64)
        if not self.depthwise:
            layers["conv"], layers["bn1"], matrix = self._pointwise(self.conv.out_channels)
        pool = cast(Callable[..., nn.Module], LAYERS[len(self.kernel)][2])
        layers["avg"] = pool(self.kernel, self.conv.stride)
        layers["bn"] = bn = self._norm(self.conv.out_channels)
        return _Branch(name, layers, bn, (matrix / math.prod(self.kernel)).expand(self.conv.weight.shape))

    def assembled(self, main: str, others: Sequence[_Branch]) -> nn.Module:
        """All branches, of which ``main`` has the kernel that makes their sum the convolution and its batch norm."""
        conv, bn = self.conv, self.bn
        rest = _exact(conv.weight) - sum(branch.kernel for branch in others)
        dense = _convolution(
            conv,
            conv.out_channels,
            self.kernel,
            conv.stride,
            conv.dilation,
            bias=bn is not None and conv.bias is not None,
        )
        scale = torch.ones(conv.out_channels, dtype=torch.float64)
        with torch.no_grad():
            dense.weight.copy_(rest)
            dense.weight.requires_grad_(conv.weight.requires_grad)
            if bn is None:
                bn = self._norm(conv.out_channels)
                _rescaled(bn, _exact(dense.weight), scale)
                if conv.bias is not None:
                    bn.bias.copy_(conv.bias)
            else:
                assert bn.running_var is not None
                gamma = _exact(bn.weight) if bn.affine else scale.to(bn.running_var.device)
                scale = gamma / (_exact(bn.running_var) + bn.eps).sqrt()
                if conv.bias is not None and dense.bias is not None:
                    dense.bias.copy_(conv.bias)
        for branch in others:
            _rescaled(branch.bn, branch.kernel, scale)
        chains: dict[str, dict[str, nn.Module]] = {main: {"conv": dense, "bn": bn}}
        chains |= {branch.name: branch.layers for branch in others}
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        branches = {name: nn.Sequential(OrderedDict(layers)) for name, layers in chains.items()}
        block = ParallelBranches(branches, conv._reversed_padding_repeated_twice, mode)
        return _in_mode_of(conv, block)

    def _centre(self) -> list[int]:
        return [(k - 1) // 2 for k in self.kernel]

    def _crop(self, kernel: Sequence[int], start: Sequence[int]) -> dict[str, nn.Module]:
        """What makes a smaller kernel read what those taps read: nothing where it has all of them."""
        lead = [d * first for d, first in zip(self.conv.dilation, start, strict=True)]
        extent = zip(self.conv.dilation, self.kernel, kernel, start, strict=True)
        trail = [d * (whole - part - first) for d, whole, part, first in extent]
        return {"crop": Crop(lead, trail)} if any([*lead, *trail]) else {}

    def _embedded(self, weight: Tensor, start: Sequence[int]) -> Tensor:
        whole = weight.new_zeros(self.conv.weight.shape)
        ends = zip(start, weight.shape[2:], strict=True)
        taps: tuple[Any, ...] = (..., *(slice(first, first + size) for first, size in ends))
        whole[taps] = weight
        return whole

    def _point_weight(self) -> Tensor:
        weight = self.conv.weight.detach()
        return weight.new_empty((*weight.shape[:2], *(1 for _ in self.kernel)))

    def _pointwise(self, outputs: int) -> tuple[Convolution, Norm, Tensor]:
        """1x1 convolution, batch norm, and what both do: a matrix [outputs, in / groups, 1, ...] in float64."""
        ones = (1,) * len(self.kernel)
        conv = _convolution(self.conv, outputs, ones, ones, ones)
        bn = self._norm(outputs)
        return conv, bn, _rescaled(bn, _exact(conv.weight), None) * _exact(conv.weight)

    def _norm(self, channels: int) -> Norm:
        bn = _norm(self.conv, self.bn, channels)
        if not bn.affine:
            fresh = type(bn)(channels, eps=bn.eps, momentum=bn.momentum)
            return fresh.to(self.conv.weight).train(bn.training)
        return bn


def _rescaled(bn: Norm, kernel: Tensor, scale: Tensor | None) -> Tensor:
    """Give ``bn`` the variance of ``kernel`` over white input, and the gamma that makes its scale ``scale``; in place.

    Without ``scale`` gamma stays 1. Returns the scale, [outputs, 1, ...] in float64.
    """
    assert bn.running_var is not None
    with torch.no_grad():
        bn.running_var.copy_(kernel.square().flatten(1).sum(1))
        deviation = (_exact(bn.running_var) + bn.eps).sqrt()
        if scale is not None:
            bn.weight.copy_(scale.to(deviation) * deviation)
        factor: Tensor = _exact(bn.weight) / deviation
    return factor.reshape(-1, *(1,) * (kernel.dim() - 1))


def _convolution(
    like: Convolution,
    outputs: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    *,
    inputs: int | None = None,
    bias: bool = False,
) -> Convolution:
    """A new convolution of the groups, dtype and device of ``like`` that pads nothing."""
    layer = cast(Callable[..., Convolution], LAYERS[len(like.kernel_size)][0])
    conv = layer(
        like.in_channels if inputs is None else inputs, outputs, tuple(kernel), stride=tuple(stride),
        dilation=tuple(dilation), groups=like.groups, bias=bias,
    )  # fmt: skip
    return conv.to(like.weight).train(like.training)


def _norm(conv: Convolution, like: Norm | None, channels: int) -> Norm:
    """A new batch norm with the options, dtype, device and mode of ``like``, or with PyTorch's own."""
    if like is None:
        kind = cast(Callable[..., Norm], LAYERS[len(conv.kernel_size)][1])
        return kind(channels).to(conv.weight).train(conv.training)
    fresh = type(like)(channels, eps=like.eps, momentum=like.momentum, affine=like.affine)
    assert like.running_mean is not None
    return fresh.to(like.running_mean).train(like.training)


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    """[groups, outputs / groups, ...] of [outputs, ...]."""
    return tensor.reshape(groups, tensor.shape[0] // groups, *tensor.shape[1:])


def _in_mode_of(conv: Convolution, block: nn.Module) -> nn.Module:
    """``block`` in training or evaluation as ``conv`` is; each batch norm has a mode already, for it may be frozen."""
    for module in block.modules():
        if not isinstance(module, Norm):
            module.training = conv.training
    return block


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().double()
