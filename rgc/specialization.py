"""How does a dynamic model become an ordinary one? Each dynamic module is replaced by what it says it becomes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rgc.dynamic import Dynamic, chosen_for, described, dynamic_modules, require_known
from rgc.errors import InputError


def specialize(model: nn.Module, **choices: Any) -> nn.Module:
    """A static copy of ``model`` that computes, in evaluation, what the model does with these choices.

    The result has the parameters that these choices use and no others, in storage of its own; `rgc.compile` merges it.
    The model is not changed. Each choice goes to every module that has it; a dict gives different values to different
    paths: ``keep={"blocks": True, "blocks.3": False}``, where the longest path wins.

    Weights that are tied between dynamic layers become one copy for each of them: the same function, no longer tied.
    Layers that are the identity in evaluation (dropout, torchvision's StochasticDepth, timm's DropPath) are static
    already: they stay, and `rgc.compile` drops them.

    Raises ``InputError`` for a choice or a path that the model does not have, a choice that is left open, a value that
    is not possible, and a dynamic module with hooks, which would be lost.

    >>> import rgc
    >>> net = rgc.models.create("slimmable_resnet20").eval()
    >>> half = rgc.specialize(net, width=0.5)
    >>> half.conv1
    Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"specialize takes a torch.nn.Module, not {type(model).__name__}")
    require_known("specialize", model, choices)
    copied = copy.deepcopy(model)
    return _Walk(choices, dynamic_modules(copied)).static(copied)


class _Walk:
    """One walk over a copy of the model, from the root down; what is shared stays shared."""

    def __init__(self, choices: Mapping[str, Any], dynamic: list[tuple[list[str], Dynamic]]) -> None:
        self.choices = choices
        self.paths = {id(module): paths for paths, module in dynamic}
        self.became: dict[int, nn.Module] = {}
        self.visited: list[nn.Module] = [
            module for _, module in dynamic
        ]  # keeps them alive, lest a new module gets the id of one that has gone

    def static(self, module: nn.Module) -> nn.Module:
        """What ``module`` becomes, its children included."""
        if id(module) in self.became:
            return self.became[id(module)]
        result = self.static(self.decided(module)) if isinstance(module, Dynamic) else module
        self.became[id(module)] = self.became[id(result)] = result
        self.visited += [module, result]
        for name, child in list(result._modules.items()):
            if child is not None:
                result._modules[name] = self.static(child)
        return result

    def decided(self, module: Dynamic) -> nn.Module:
        paths = self.paths.get(id(module), [""])
        where = described(paths[0], module)
        chosen = chosen_for("specialize", paths, module, self.choices)
        for name, choice in module.choices().items():
            if chosen.get(name) is None:
                raise InputError(f"specialize: {where} leaves {name} open; pass {name}=, {choice}")
        if module._forward_hooks or module._forward_pre_hooks:
            raise InputError(f"specialize: {where} has forward hooks, which would be lost; remove them first")
        old = set(module.modules())
        result = module.specialized(**chosen)
        is_new = result is module or result not in old
        if not isinstance(result, nn.Module) or (isinstance(result, Dynamic) and is_new):
            raise InputError(
                f"specialize: {where}.specialized must return a static module or one of its children, "
                f"not a {type(result).__name__}"
            )
        for each in set(result.modules()) - old:
            each.training = module.training
        _own_storage(result)
        return result


def _own_storage(module: nn.Module) -> None:
    """Views into larger tensors become tensors of their own; one that is at several places stays one."""
    owned: dict[int, Tensor] = {}
    for each in module.modules():
        for tensors in (each._parameters, each._buffers):
            for name, tensor in tensors.items():
                if tensor is None or tensor.is_meta or tensor.untyped_storage().nbytes() == tensor.nbytes:
                    continue
                if id(tensor) not in owned:
                    clone = tensor.detach().clone()
                    is_parameter = isinstance(tensor, nn.Parameter)
                    owned[id(tensor)] = nn.Parameter(clone, tensor.requires_grad) if is_parameter else clone
                tensors[name] = owned[id(tensor)]  # type: ignore[assignment]  # a parameter where there was one
