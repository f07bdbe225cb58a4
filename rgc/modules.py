"""What do PyTorch's modules mean? One table from module classes to the functions of the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from rgc.functions import (
    Handler,
    Lifting,
    activation,
    adaptive_max_pool,
    avg_pool,
    batch_norm,
    conv,
    conv_transpose,
    dropout,
    linear,
    max_pool,
    prelu,
    upsample,
)
from rgc.normalizations import group_norm, instance_norm, layer_norm, rms_norm
from rgc.operators import BatchNorm, Identity
from rgc.rearrange_calls import (
    channel_shuffle_module,
    pad_module,
    pixel_shuffle_module,
    pixel_unshuffle_module,
)


def is_leaf(module: nn.Module) -> bool:
    """Does the table know this very module, hooks and overridden methods excluded? Others are traced into."""
    return has_hooks(module) or module_handler(module) is not None


def has_hooks(module: nn.Module) -> bool:
    """Would looking into the module lose a hook that the user put there?"""
    before = [hook for hook in module._forward_pre_hooks.values() if not isinstance(hook, _COMPUTE_WEIGHTS)]
    return bool(module._forward_hooks or before or module._backward_hooks)


def refresh_weights(module: nn.Module) -> None:
    """Let the hooks that compute a weight from parameters, whatever the input is, compute it now."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _COMPUTE_WEIGHTS):
            hook(module, ())


#: What ``torch.nn.utils.weight_norm`` and ``spectral_norm`` put before ``forward``.
_COMPUTE_WEIGHTS = (WeightNorm, SpectralNorm)


def _conv_module(lifter: Lifting, module: Any, x: Any) -> Any:
    return _shared(lifter, module, conv, x, module.weight, module.bias, module.stride, module.padding,
                   module.dilation, module.groups, module.padding_mode)  # fmt: skip


def _conv_transpose_module(lifter: Lifting, module: Any, x: Any, output_size: Any = None) -> Any:
    if output_size is not None or module.padding_mode != "zeros":
        return None
    return _shared(lifter, module, conv_transpose, x, module.weight, module.bias, module.stride, module.padding,
                   module.output_padding, module.groups, module.dilation)  # fmt: skip


def _linear_module(lifter: Lifting, module: Any, x: Any) -> Any:
    return _shared(lifter, module, linear, x, module.weight, module.bias)


def _batch_norm_module(lifter: Lifting, module: Any, x: Any) -> Any:
    if module.running_mean is None:
        count = module.num_features
        zero, one = torch.zeros(count, dtype=torch.float64), torch.ones(count, dtype=torch.float64)
        op = BatchNorm(zero, one, module.weight, module.bias, module.eps, len(lifter.shape(x)) - 2, training=True)
        return lifter.emit(lifter.shared(module, lambda: op), x)
    return _shared(lifter, module, batch_norm, x, module.running_mean, module.running_var, module.weight, module.bias,
                   False, 0.1, module.eps)  # fmt: skip


def _layer_norm_module(lifter: Lifting, module: Any, x: Any) -> Any:
    return layer_norm(lifter, x, module.normalized_shape, module.weight, module.bias, module.eps, module=module)


def _rms_norm_module(lifter: Lifting, module: Any, x: Any) -> Any:
    return rms_norm(lifter, x, module.normalized_shape, module.weight, module.eps, module=module)


def _group_norm_module(lifter: Lifting, module: Any, x: Any) -> Any:
    return group_norm(lifter, x, module.num_groups, module.weight, module.bias, module.eps, module=module)


def _instance_norm_module(rank: int) -> Handler:
    def handle(lifter: Lifting, module: Any, x: Any) -> Any:
        if len(lifter.shape(x)) != rank + 2:  # without a batch axis
            return None
        if module.running_mean is not None:
            return _shared(lifter, module, batch_norm, x, module.running_mean, module.running_var, module.weight,
                           module.bias, False, 0.1, module.eps)  # fmt: skip
        return instance_norm(lifter, x, weight=module.weight, bias=module.bias, eps=module.eps, module=module)

    return handle


def _avg_pool_module(rank: int) -> Handler:
    def handle(lifter: Lifting, module: Any, x: Any) -> Any:
        override = getattr(module, "divisor_override", None)  # AvgPool1d has none
        return avg_pool(rank)(
            lifter, x, module.kernel_size, module.stride, module.padding, module.ceil_mode, module.count_include_pad,
            override,
        )  # fmt: skip

    return handle


def _max_pool_module(rank: int) -> Handler:
    def handle(lifter: Lifting, module: Any, x: Any) -> Any:
        return max_pool(rank)(
            lifter, x, module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode,
            module.return_indices,
        )  # fmt: skip

    return handle


def _adaptive_max_pool_module(rank: int) -> Handler:
    def handle(lifter: Lifting, module: Any, x: Any) -> Any:
        return adaptive_max_pool(rank)(lifter, x, module.output_size, module.return_indices)

    return handle


def _upsample_module(lifter: Lifting, module: Any, x: Any) -> Any:
    return upsample(lifter, x, module.size, module.scale_factor, module.mode, module.align_corners,
                    module.recompute_scale_factor)  # fmt: skip


def _activation_module(name: str, *options: str) -> Handler:
    def handle(lifter: Lifting, module: Any, x: Any) -> Any:
        result = activation(name)(lifter, x, **{option: getattr(module, option) for option in options})
        if result is not None and getattr(module, "inplace", False):  # not every activation has the option
            lifter.mark_inplace(result)
        return result

    return handle


def _prelu_module(lifter: Lifting, module: Any, x: Any) -> Any:
    return prelu(lifter, x, module.weight)


def _identity_module(lifter: Lifting, module: Any, x: Any) -> Any:
    return lifter.emit(Identity("identity"), x)


def _dropout_module(lifter: Lifting, module: Any, x: Any) -> Any:
    return dropout(lifter, x, module.p, module.training)


def _shared(lifter: Lifting, module: nn.Module, handler: Handler, x: Any, *args: Any) -> Any:
    """Lift by ``handler``; a module that is called again reuses its first operator where that fits."""
    known = lifter.operators.get(id(module))
    if known is not None and (not isinstance(known, BatchNorm) or known.axes == len(lifter.shape(x)) - 2):
        return lifter.emit(known, x)
    result = handler(lifter, x, *args)
    if result is not None:
        lifter.operators[id(module)] = result.op
    return result


MODULES: dict[type[nn.Module], Handler] = {
    nn.Conv1d: _conv_module, nn.Conv2d: _conv_module, nn.Conv3d: _conv_module,
    nn.ConvTranspose1d: _conv_transpose_module, nn.ConvTranspose2d: _conv_transpose_module,
    nn.ConvTranspose3d: _conv_transpose_module, nn.Linear: _linear_module,
    nn.BatchNorm1d: _batch_norm_module, nn.BatchNorm2d: _batch_norm_module, nn.BatchNorm3d: _batch_norm_module,
    nn.SyncBatchNorm: _batch_norm_module,
    nn.LayerNorm: _layer_norm_module, nn.RMSNorm: _rms_norm_module, nn.GroupNorm: _group_norm_module,
    nn.InstanceNorm1d: _instance_norm_module(1), nn.InstanceNorm2d: _instance_norm_module(2),
    nn.InstanceNorm3d: _instance_norm_module(3),
    nn.AvgPool1d: _avg_pool_module(1), nn.AvgPool2d: _avg_pool_module(2), nn.AvgPool3d: _avg_pool_module(3),
    nn.MaxPool1d: _max_pool_module(1), nn.MaxPool2d: _max_pool_module(2), nn.MaxPool3d: _max_pool_module(3),
    nn.AdaptiveMaxPool1d: _adaptive_max_pool_module(1), nn.AdaptiveMaxPool2d: _adaptive_max_pool_module(2),
    nn.AdaptiveMaxPool3d: _adaptive_max_pool_module(3),
    nn.Upsample: _upsample_module,
    nn.ReLU: _activation_module("relu"), nn.ReLU6: _activation_module("relu6"),
    nn.LeakyReLU: _activation_module("leaky_relu", "negative_slope"), nn.ELU: _activation_module("elu", "alpha"),
    nn.CELU: _activation_module("celu", "alpha"), nn.SELU: _activation_module("selu"),
    nn.GELU: _activation_module("gelu", "approximate"), nn.SiLU: _activation_module("silu"),
    nn.Mish: _activation_module("mish"), nn.Sigmoid: _activation_module("sigmoid"), nn.Tanh: _activation_module("tanh"),
    nn.Hardswish: _activation_module("hardswish"), nn.Hardsigmoid: _activation_module("hardsigmoid"),
    nn.Hardtanh: _activation_module("hardtanh", "min_val", "max_val"),
    nn.Softplus: _activation_module("softplus", "beta", "threshold"), nn.LogSigmoid: _activation_module("logsigmoid"),
    nn.Softsign: _activation_module("softsign"), nn.Tanhshrink: _activation_module("tanhshrink"),
    nn.PReLU: _prelu_module, nn.Identity: _identity_module,
    nn.Dropout: _dropout_module, nn.Dropout1d: _dropout_module, nn.Dropout2d: _dropout_module,
    nn.Dropout3d: _dropout_module, nn.AlphaDropout: _dropout_module, nn.FeatureAlphaDropout: _dropout_module,
    nn.ZeroPad1d: pad_module("constant"), nn.ZeroPad2d: pad_module("constant"), nn.ZeroPad3d: pad_module("constant"),
    nn.ConstantPad1d: pad_module("constant"), nn.ConstantPad2d: pad_module("constant"),
    nn.ConstantPad3d: pad_module("constant"), nn.ReflectionPad1d: pad_module("reflect"),
    nn.ReflectionPad2d: pad_module("reflect"), nn.ReflectionPad3d: pad_module("reflect"),
    nn.ReplicationPad1d: pad_module("replicate"), nn.ReplicationPad2d: pad_module("replicate"),
    nn.ReplicationPad3d: pad_module("replicate"), nn.CircularPad1d: pad_module("circular"),
    nn.CircularPad2d: pad_module("circular"), nn.CircularPad3d: pad_module("circular"),
    nn.ChannelShuffle: channel_shuffle_module, nn.PixelShuffle: pixel_shuffle_module,
    nn.PixelUnshuffle: pixel_unshuffle_module,
}  # fmt: skip

STRUCTURAL_MODULES = frozenset({
    nn.Flatten, nn.Unflatten, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.PixelShuffle,
    nn.PixelUnshuffle, nn.ChannelShuffle, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d,
    nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
    nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
})  # fmt: skip


def module_handler(module: nn.Module) -> Handler | None:
    """The handler of a module whose ``forward`` is the one that PyTorch wrote, also in a subclass that keeps it."""
    if "forward" in module.__dict__:
        return None
    for kind in type(module).__mro__:
        handler = MODULES.get(kind)
        if handler is not None:
            methods = ("forward", "_conv_forward")
            same = all(getattr(type(module), name, None) is getattr(kind, name, None) for name in methods)
            return handler if same else None
    return None
