"""Is an activation that works in place the same function out of place? Only if nobody reads what it overwrites.

The value has to have been made by a layer or function that returns memory of its own, and to have no later reader.
Where that cannot be seen in the forward of the modules that call the activation, the answer is the reason why.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

from torch import fx, nn

from rgc.activation_sites import Forward, Site, called, is_in_place

#: Functions whose result shares no memory with what they are given.
_FRESH = frozenset({
    "add", "sub", "mul", "truediv", "div", "neg", "conv1d", "conv2d", "conv3d", "linear", "batch_norm", "layer_norm",
    "group_norm", "instance_norm", "cat", "stack", "matmul", "bmm", "addmm", "max_pool2d", "avg_pool2d",
})  # fmt: skip

#: Layers whose result shares none either.
_FRESH_LAYERS = (
    nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd,
)  # fmt: skip

#: What returns its input, or writes to it and returns it.
_PASSING_LAYERS = (nn.Identity, nn.modules.dropout._DropoutNd)
_PASSING = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


def unseen_reader(site: Site, model: nn.Module, traced: Mapping[str, Forward]) -> str:
    """Why ``site`` cannot be said to be the same out of place; empty where it is.

    ``traced`` has the forward of each module of ``model`` by path, as `rgc.activation_sites.forwards` gives it.
    """
    if site.node is not None:
        forward = traced[site.caller]
        return _reader(site.node, site, forward) if is_in_place(site.node) else ""
    if not any(getattr(module, "inplace", False) for module in site.layer.modules()) or not site.path:
        return ""
    reasons: list[str] = []
    for path, container in model.named_modules():
        if type(container) is nn.Sequential:
            reasons += _reasons_in_sequence(site, list(container))
        elif path in traced:
            reasons += [
                _reader(node, site, traced[path])
                for graph in traced[path].graphs
                for node in graph.nodes
                if node.op == "call_module" and container.get_submodule(str(node.target)) is site.layer
            ]
    if not reasons:
        owner = site.path.rpartition(".")[0] or "the model"
        return f"{site.path} works in place, and what {owner} does with its input cannot be seen"
    return next((reason for reason in reasons if reason), "")


def _reasons_in_sequence(site: Site, modules: list[nn.Module]) -> list[str]:
    reasons = []
    for index, module in enumerate(modules):
        if module is site.layer:
            before = [each for each in modules[:index] if not isinstance(each, _PASSING_LAYERS)]
            made = bool(before) and _makes_anew(before[-1])
            reasons.append("" if made else f"{site.path} overwrites a value that came in from outside its Sequential")
    return reasons


def _reader(node: fx.Node, site: Site, forward: Forward) -> str:
    """Who may read what the in-place ``node`` overwrites? Empty if surely nobody does."""
    position = {each: index for index, each in enumerate(node.graph.nodes)}
    value, last = node.all_input_nodes[0], node
    while True:
        others = [user for user in value.users if user is not last]
        later = [user.name for user in others if position[user] > position[last]]
        if later:
            return f"{site.path} works in place, and {value.name}, which it overwrites, is read again by {later[0]}"
        views = [each.name for each in others if not (_is_fresh(each, forward.module) or _asks_for_size(each))]
        if views:
            return f"{site.path} overwrites {value.name}, of which {views[0]} may be a view that is read again"
        if _is_fresh(value, forward.module):
            return ""
        if not _passes_on(value, forward.module) or not value.all_input_nodes:
            return f"{site.path} overwrites {value.name}, which may have readers that cannot be seen"
        value, last = value.all_input_nodes[0], value


def _is_fresh(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return _makes_anew(module.get_submodule(str(node.target)))
    return node.op == "call_function" and node.target not in _PASSING and called(node) in _FRESH


def _asks_for_size(node: fx.Node) -> bool:
    name = str(node.args[1]) if node.target is getattr and len(node.args) > 1 else called(node)
    return name in ("shape", "size", "dim", "ndim", "numel", "dtype", "device")


def _passes_on(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), _PASSING_LAYERS)
    return node.op == "call_function" and node.target in _PASSING


def _makes_anew(module: nn.Module) -> bool:
    if module._forward_hooks or module._forward_pre_hooks:
        return False  # which may keep the value
    if type(module) is nn.Sequential:
        return len(module) > 0 and _makes_anew(module[-1])
    return isinstance(module, _FRESH_LAYERS)
