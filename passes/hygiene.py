"""Equal operators on equal inputs are one operator. Dead code needs no pass: the graph drops what nobody reads."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from rgc import Activation, Clamp, Conv, Graph, Operator, Rearrangement, Scale, Structural, Value, graph_pass


@graph_pass
def hygiene(graph: Graph) -> Graph:
    """Equal operators on equal inputs are computed once, as one operator."""
    seen: dict[Hashable, Value] = {}
    for value in graph.nodes():
        if value not in graph or not value.inputs:
            continue
        key = (_key(value.op), value.inputs)
        first = seen.setdefault(key, value)
        if first is not value:
            graph.replace(value, first)
    return graph


def _key(op: Operator) -> Hashable:
    """What makes two operators equal: the same parameters in memory and the same options; otherwise themselves only."""
    if isinstance(op, Activation) and op.weight is None:
        return type(op), op.name, op.options
    if isinstance(op, Clamp | Conv | Scale | Rearrangement):
        return type(op), *(id(v) if isinstance(v, Tensor) else v for v in op.__dict__.values())
    if isinstance(op, Structural) and not op.tensors():
        return type(op), str(op.target), repr(op.args), repr(op.kwargs)
    return id(op)


class _Twice(nn.Module):
    """One layer is called twice on one value."""

    def __init__(self, second: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = self.first if second is None else second

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.first(x)) * torch.tanh(self.second(x))


@hygiene.fires_on(shape=(2, 3, 7, 6))
def layer_that_is_called_twice() -> nn.Module:
    return _Twice().eval()


@hygiene.leaves_alone(shape=(2, 3, 7, 6), because="")
def layers_of_one_form_with_weights_of_their_own() -> nn.Module:
    return _Twice(nn.Conv2d(3, 4, 3)).eval()
