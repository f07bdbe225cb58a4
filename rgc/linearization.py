"""How does an existing model get decaying activations? In a copy, at the paths and calls of those that it has."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from rgc.activation_sites import CALLS, Forward, Site, call_sites, forwards, hidden_callers, layer_sites
from rgc.decay import DecayedActivation
from rgc.decay_schedule import Which, chosen_paths
from rgc.errors import InputError, NotEquivalentError
from rgc.in_place import unseen_reader

#: What multiplies another value as a rule (squeeze and excitation): it fades only where it is asked for.
GATES = ("Sigmoid", "Hardsigmoid", "HardSigmoid", "HardSigmoidMe")


def linearize(model: nn.Module, which: Which | None = None, *, example_inputs: Any = None) -> nn.Module:
    """A copy of ``model`` whose chosen activations are `DecayedActivation`, at decay 0: the same function, to the bit.

    which: a predicate ``(path, activation) -> bool``, or a list of paths, of activations or of modules that hold some;
    by default every activation but sigmoids, which are gates as a rule. A call (``F.relu(x)``, ``x.relu()``) has the
    path of the module that makes it and the name of the function, counted: ``layer1.0.relu``, ``layer1.0.relu_1``. A
    module that is called several times is one activation, and fades in all of its calls; so is one with several paths.

    The state dict has the names that ``model``'s has and one ``PATH.decay`` more for each activation; one of ``model``
    loads into the copy as it is, and leaves the decays alone. (The slopes of ``nn.PReLU`` are written as
    ``PATH.activation.weight``.) A module that calls its activations is a ``torch.fx.GraphModule`` in the copy, and
    pickled as code: save the state dict of such a copy.

    An activation that works in place becomes one that does not. Where somebody reads what it has overwritten, the two
    are not the same. So its readers are looked for, and where they cannot be seen, the copy has to give the very
    output of the model on ``example_inputs`` (a tensor, or a tuple of arguments), in evaluation.

    Raises ``InputError`` for a path that is no activation, a choice of nothing, a caller that cannot be traced although
    an activation in it was named, and where readers cannot be seen and no example is given; ``NotEquivalentError``
    where the copy computes something else. Where nothing was named, a caller that cannot be traced is left as it is,
    with a warning.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.GELU())
    >>> linearize(model, ["1"])[1]
    DecayedActivation(
      decay=0
      (activation): ReLU()
    )
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"linearize takes a torch.nn.Module, not {type(model).__name__}")
    copied = _with_activation_layers(copy.deepcopy(model))
    traced = forwards(copied)
    sites = {site.path: site for site in [*layer_sites(copied), *call_sites(traced)]}
    chosen = [sites[path] for path in _chosen(which, sites, traced, type(model).__name__)]
    if which is None or callable(which):
        _warn_of_hidden_callers(traced)
    unseen = [why for site in chosen for why in [unseen_reader(site, copied, traced)] if why]
    if unseen and example_inputs is None:
        raise InputError(
            f"linearize: {unseen[0]}; give example_inputs, on which the copy is compared with the model, or build "
            f"that activation with inplace=False"
        )
    result = _replaced(copied, chosen, traced)
    if example_inputs is not None:
        _require_same(model, result, example_inputs, unseen)
    return result


def _with_activation_layers(model: nn.Module) -> nn.Module:
    """``model``, whose transformer layers have their activations as modules, and do not skip them in evaluation."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            name = str(getattr(module.activation, "__name__", ""))
            if name in CALLS and not isinstance(module.activation, nn.Module):
                module.activation = CALLS[name][0]()
    return model


def _chosen(which: Which | None, sites: Mapping[str, Site], traced: Mapping[str, Forward], model: str) -> list[str]:
    if isinstance(which, str):
        raise InputError(f"linearize: which is a predicate or a list of paths; write [{which!r}]")
    if which is None:
        chosen = [path for path, site in sites.items() if type(site.layer).__name__ not in GATES]
    else:
        layers = {path: site.layer for path, site in sites.items()}
        for name in () if callable(which) else which:
            _require_not_hidden(name, layers, traced)
        chosen = chosen_paths(which, layers, "linearize")
    if not chosen:
        hidden = [f"; {path or 'the model'} cannot be traced: {each.reason}" for path, each in hidden_callers(traced)]
        raise InputError(f"linearize: none of the {len(sites)} activations of {model} is chosen{''.join(hidden[:1])}")
    return chosen


def _require_not_hidden(name: str, layers: Mapping[str, nn.Module], traced: Mapping[str, Forward]) -> None:
    """A name that is no activation may be one of a call in a module that cannot be traced: then say so."""
    if any(path == name or path.startswith(f"{name}.") for path in layers):
        return
    for path, forward in hidden_callers(traced):
        if path in (name, name.rpartition(".")[0]):
            raise InputError(
                f"linearize: {name!r} is no module, and what {path or 'the model'} calls cannot be told "
                f"({forward.reason}); make that activation a module"
            )


def _warn_of_hidden_callers(traced: Mapping[str, Forward]) -> None:
    for path, forward in hidden_callers(traced):
        warnings.warn(
            f"linearize: what {path or 'the model'} ({type(forward.module).__name__}) calls is left as it is, "
            f"activations included, for it cannot be traced: {forward.reason}",
            stacklevel=3,
        )


def _replaced(model: nn.Module, sites: list[Site], traced: Mapping[str, Forward]) -> nn.Module:
    new = {id(site.layer): _decayed(site.layer, model) for site in sites if site.node is None}
    owners = list(model.modules())
    model = _with_children(model, owners, new)
    # The deepest callers first: what they become goes into those around them.
    for caller in sorted({site.caller for site in sites if site.node is not None}, key=_depth, reverse=True):
        own = [site for site in sites if site.node is not None and site.caller == caller]
        module = traced[caller].module
        model = _with_children(model, owners, {id(module): _with_decays(traced[caller], own, model)})
        owners = list(model.modules())
    return model


def _depth(path: str) -> int:
    return len(path.split(".")) if path else 0


def _with_children(model: nn.Module, owners: list[nn.Module], new: Mapping[int, nn.Module]) -> nn.Module:
    """``model`` with other modules in place of those with these ids, at every path that they have."""
    for owner in owners:
        for name, child in list(owner._modules.items()):
            if id(child) in new:
                setattr(owner, name, new[id(child)])
                if isinstance(owner, nn.TransformerEncoderLayer):
                    owner.activation_relu_or_gelu = 0  # else evaluation takes a kernel with a ReLU of its own
    return new.get(id(model), model)


def _decayed(layer: nn.Module, model: nn.Module) -> DecayedActivation:
    for module in layer.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]  # a flag, which an attribute's type does not tell
    decayed = DecayedActivation(layer, takes_plain_state=True).train(layer.training)
    tensor = next((t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()), None)
    return decayed if tensor is None else decayed.to(device=tensor.device, dtype=tensor.dtype)


def _with_decays(forward: Forward, sites: list[Site], model: nn.Module) -> fx.GraphModule:
    """The module of ``forward`` with its calls ``sites`` as children; its other children and tensors as they were."""
    module, graph = forward.module, forward.graph
    assert graph is not None  # it has sites
    for site in sites:
        assert site.node is not None
        name = site.path.rpartition(".")[2]
        module.add_module(name, _decayed(site.layer, model).train(module.training))
        with graph.inserting_after(site.node):
            call = graph.call_module(name, (site.node.all_input_nodes[0],))
        site.node.replace_all_uses_with(call)
        graph.erase_node(site.node)
    result = fx.GraphModule(module, graph, class_name=type(module).__name__)
    # torch.fx takes along only what the graph uses, and in another order.
    result._modules, result._parameters, result._buffers = module._modules, module._parameters, module._buffers
    result._non_persistent_buffers_set = module._non_persistent_buffers_set
    result.training = module.training
    return result


def _require_same(model: nn.Module, result: nn.Module, example_inputs: Any, unseen: list[str]) -> None:
    outputs = []
    for each in (model, result):
        args = copy.deepcopy(example_inputs)
        with torch.no_grad():
            output = copy.deepcopy(each).eval()(*(args if isinstance(args, list | tuple) else (args,)))
        outputs.append(tree_flatten(output)[0])
    same = len(outputs[0]) == len(outputs[1]) and all(map(_is_same, *outputs))
    if not same:
        reason = unseen[0] if unseen else "the model may keep state, or draw random numbers"
        raise NotEquivalentError(f"linearize: the copy at decay 0 computes something else: {reason}")


def _is_same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)
