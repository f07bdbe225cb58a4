"""How does an existing model get branches to train with? In a copy, a block in the place of each convolution."""

from __future__ import annotations

import copy
import warnings
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast, get_args

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from rgc.activation_sites import forwards
from rgc.decay_schedule import Which, chosen_paths
from rgc.errors import InputError, Refusal
from rgc.expansion_blocks import BLOCKS, LAYERS, Convolution, Norm
from rgc.modules import has_hooks


def expand(model: nn.Module, block: str = "repvgg", where: Which | None = None) -> nn.Module:
    """A copy of ``model`` with a block of branches for each chosen convolution: more to train, the same to deploy.

    `rgc.compile` makes one convolution of each block again, so the copy compiles to the layers that ``model`` compiles
    to. ``block`` is one of

    - ``"repvgg"``: KxK, 1x1 and identity (arXiv 2101.03697);
    - ``"acnet"``: KxK, Kx1 and 1xK (arXiv 1908.03930); odd kernels only;
    - ``"dbb"``: KxK, 1x1-KxK, 1x1 and 1x1-average (arXiv 2103.13425);
    - ``"mobileone"``: four KxK, 1x1 and identity (arXiv 2206.04040);
    - ``"reduce"``: KxK to twice the channels, a decaying activation, 1x1. It merges once its decay is 1
      (`rgc.nn.DecaySchedule`, `rgc.nn.set_decay`).

    where: a predicate ``(path, convolution) -> bool``, or a list of paths, of convolutions or of modules that hold
    some; by default every ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d`` whose kernel is larger than 1. What a block
    cannot stand in for (a kernel with a parametrization, an even one for ``acnet``) is left as it is, with a warning.

    In evaluation the copy computes what ``model`` does, up to rounding: new branches start as usual, and the kernel
    beside them is what is left of the original's. The batch norm right behind a convolution goes into the block, an
    identity in its place; where nothing proves that it is the only reader, it stays where it is. Each other branch has
    a batch norm of its own, with the statistics that white input would give. So in training mode, where statistics
    are those of the batch, the copy differs from the model from the first step on, but for ``"reduce"``, which is
    equal there too. What is not replaced keeps its names in the state dict. New weights are drawn from the global
    random state.

    Raises ``InputError`` for an unknown block, a path that is no convolution, a convolution named by its own path that
    the block cannot stand in for, and where nothing is left to expand.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> expanded = expand(model, "acnet")
    >>> list(expanded[0].branches)
    ['square', 'ver', 'hor']
    >>> x = torch.randn(1, 3, 6, 6)
    >>> torch.allclose(expanded(x), model(x), atol=1e-5)
    True
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expand takes a torch.nn.Module, not {type(model).__name__}")
    if block not in BLOCKS:
        raise InputError(f"expand: there is no block {block!r}; block is one of {', '.join(BLOCKS)}")
    if isinstance(where, str):
        raise InputError(f"expand: where is a predicate or a list of paths; write [{where!r}]")
    copied = copy.deepcopy(model)
    uses = _Uses(copied)
    named = set() if where is None or callable(where) else set(where)
    new: dict[int, nn.Module] = {}
    refused: dict[str, str] = {}
    for path, conv in _chosen(copied, where).items():
        if named and path not in named and max(conv.kernel_size) == 1:
            continue
        reason = uses.why_not(conv)
        try:
            if not reason:
                bn = uses.norm_behind(path, conv)
                new[id(conv)] = BLOCKS[block](conv, None if bn is None else _plain(bn))
                if bn is not None:
                    new[id(bn)] = _without_norm(bn)
        except Refusal as refusal:
            reason = refusal.reason
        if reason and path in named:
            raise InputError(f"expand: {path} cannot become a block {block!r}: {reason}")
        if reason:
            refused[path] = reason
    told = "; ".join(f"{path}: {reason}" for path, reason in refused.items())
    if not new:
        raise InputError(
            f"expand: no convolution of {type(model).__name__} becomes a block {block!r} ({told or 'none is chosen'})"
        )
    if told:
        warnings.warn(f"expand: left as they are: {told}", stacklevel=2)
    for owner in list(copied.modules()):
        for name, child in list(owner._modules.items()):
            if id(child) in new:
                owner._modules[name] = new[id(child)]
    return new.get(id(copied), copied)


def _chosen(model: nn.Module, where: Which | None) -> dict[str, Convolution]:
    """The convolutions to replace by their (first) path."""
    convs = {path: module for path, module in model.named_modules() if isinstance(module, Convolution)}
    if where is None:
        return {path: conv for path, conv in convs.items() if max(conv.kernel_size) > 1}
    return {path: convs[path] for path in chosen_paths(where, convs, "expand", kind="convolution")}


@dataclass
class _Uses:
    """Who calls the layers of a model, and who reads what they give; by the identity of the layer.

    Each module's forward is traced by itself. ``readers`` has, for each call of a layer, the one layer that alone
    reads the result, or None.
    """

    model: nn.Module
    readers: dict[int, list[int | None]] = field(default_factory=lambda: defaultdict(list))
    read: set[int] = field(default_factory=set)  # layers whose tensors a forward takes by name
    hidden: list[str] = field(default_factory=list)  # modules that may call anything below them

    def __post_init__(self) -> None:
        modules = list(self.model.named_modules(remove_duplicate=False))
        self.layers = {id(module): module for _, module in modules}
        self.places = Counter(id(module) for _, module in modules)
        self.owners = Counter(id(each) for module in self.layers.values() for each in module._parameters.values())
        called = {id(self.model)}
        for path, forward in forwards(self.model).items():
            if not forward.graphs:
                self.hidden.append(path)
            for graph in forward.graphs[:1] if forward.graph else forward.graphs:
                for node in graph.nodes:
                    if node.op == "call_module":
                        layer = forward.module.get_submodule(node.target)
                        called.add(id(layer))
                        self.readers[id(layer)].append(_reader(forward.module, node) if forward.graph else None)
                    elif node.op == "get_attr":
                        self.read.add(id(forward.module.get_submodule(node.target.rpartition(".")[0])))
        for _, sequence in self.model.named_modules():  # outer before inner
            if type(sequence) is nn.Sequential and id(sequence) in called:
                children = list(sequence)
                called.update(map(id, children))
                for child, reader in zip(children, [*children[1:], None], strict=True):
                    self.readers[id(child)].append(id(reader) if reader is not None else None)

    def why_not(self, conv: Convolution) -> str:
        """Why no block can stand in for ``conv``; empty where one can."""
        kind = type(conv)
        base = next(each for each in get_args(Convolution) if isinstance(conv, each))
        if is_parametrized(conv) or "weight" not in conv._parameters:
            return "its weight is computed by a parametrization, which a block would lose; remove it first"
        if nn.parameter.is_lazy(conv.weight):
            return "its input channels are not known yet; run the model once"
        if kind.forward is not base.forward or kind._conv_forward is not base._conv_forward:
            return f"its class {kind.__name__} has a forward of its own"
        if has_hooks(conv) or "forward" in vars(conv):
            return "it has hooks, which a block would lose"
        if any(self.owners[id(each)] > 1 for each in (conv.weight, conv.bias) if each is not None):
            return "its weight is shared with another layer"
        return "its weight is read elsewhere than in its own call" if id(conv) in self.read else ""

    def norm_behind(self, path: str, conv: Convolution) -> nn.Module | None:
        """The batch norm that alone reads ``conv``, and reads nothing else; None where that is not sure."""
        readers = self.readers[id(conv)]
        if len(readers) != 1 or readers[0] is None or self.places[id(conv)] > 1:
            return None
        bn = self.layers[readers[0]]
        kinds: list[type[nn.Module]] = [LAYERS[len(conv.kernel_size)][1], nn.SyncBatchNorm]
        known = type(bn) in kinds or (_is_timms(bn) and len(conv.kernel_size) == 2)
        if not known or len(self.readers[id(bn)]) != 1 or self.places[id(bn)] > 1 or id(bn) in self.read:
            return None
        if any(not parent or path.startswith(f"{parent}.") for parent in self.hidden):
            return None
        norm = cast(Norm, bn)
        owned = all(self.owners[id(each)] == 1 for each in bn._parameters.values() if each is not None)
        whole = norm.running_mean is not None and norm.num_features == conv.out_channels and owned
        return None if not whole or has_hooks(bn) or "forward" in vars(bn) or is_parametrized(bn) else bn


def _reader(module: nn.Module, node: Any) -> int | None:
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_module" or users[0].args != (node,) or users[0].kwargs:
        return None
    return id(module.get_submodule(users[0].target))


def _is_timms(bn: nn.Module) -> bool:
    """Is this timm's batch norm with an activation? Its parts are children: ``drop``, then ``act``."""
    return type(bn).__name__ == "BatchNormAct2d" and type(bn).__module__.startswith("timm.")


def _plain(bn: nn.Module) -> Norm:
    norm = cast(Norm, bn)
    if not _is_timms(bn):
        return norm
    plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine).train(norm.training)
    plain._parameters, plain._buffers = norm._parameters, norm._buffers
    return plain


def _without_norm(bn: nn.Module) -> nn.Module:
    rest: Iterator[tuple[str, nn.Module]] = bn.named_children()
    return nn.Sequential(OrderedDict(rest)).train(bn.training) if _is_timms(bn) else nn.Identity().train(bn.training)
