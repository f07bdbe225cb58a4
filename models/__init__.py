"""Which models does rgc know by name? The zoo: training forms, with the branches and batch norms that rgc merges.

Every model has ``example_inputs()``, a batch of one of the right size. ``create("repvgg_a0")`` makes what
``zoo:repvgg_a0`` names on the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from torch import nn

from rgc.errors import InputError
from rgc.models.acnet import ACBlock, acnet_resnet18
from rgc.models.branchynet import BranchyResNet, branchy_resnet20
from rgc.models.condconv import CondConvResNet, condconv_resnet20
from rgc.models.dbb import DiverseBranchBlock, dbb_resnet18
from rgc.models.dsnet import DSNet, dsnet_small
from rgc.models.reducenet import ReduceBlock, ReduceNet, reducenet, reducenet20, reducenet56
from rgc.models.repvgg import (
    RepVGG,
    RepVGGBlock,
    repvgg_a0,
    repvgg_a1,
    repvgg_a2,
    repvgg_b0,
    repvgg_b1,
    repvgg_b1g2,
    repvgg_b1g4,
    repvgg_b2,
    repvgg_b2g2,
    repvgg_b2g4,
    repvgg_b3,
    repvgg_b3g2,
    repvgg_b3g4,
)
from rgc.models.skipnet import SkipNet, skipnet20
from rgc.models.slimmable_resnet import SlimmableResNet, slimmable_resnet20, us_resnet20
from rgc.models.vanillanet import (
    VanillaBlock,
    VanillaNet,
    vanillanet5,
    vanillanet6,
    vanillanet7,
    vanillanet8,
    vanillanet9,
    vanillanet10,
    vanillanet11,
    vanillanet12,
    vanillanet13,
)

__all__ = [
    "ACBlock",
    "BranchyResNet",
    "CondConvResNet",
    "DSNet",
    "DiverseBranchBlock",
    "ReduceBlock",
    "ReduceNet",
    "RepVGG",
    "RepVGGBlock",
    "SkipNet",
    "SlimmableResNet",
    "VanillaBlock",
    "VanillaNet",
    "acnet_resnet18",
    "branchy_resnet20",
    "condconv_resnet20",
    "create",
    "dbb_resnet18",
    "dsnet_small",
    "names",
    "reducenet",
    "reducenet20",
    "reducenet56",
    "repvgg_a0",
    "repvgg_a1",
    "repvgg_a2",
    "repvgg_b0",
    "repvgg_b1",
    "repvgg_b1g2",
    "repvgg_b1g4",
    "repvgg_b2",
    "repvgg_b2g2",
    "repvgg_b2g4",
    "repvgg_b3",
    "repvgg_b3g2",
    "repvgg_b3g4",
    "skipnet20",
    "slimmable_resnet20",
    "us_resnet20",
    "vanillanet5",
    "vanillanet6",
    "vanillanet7",
    "vanillanet8",
    "vanillanet9",
    "vanillanet10",
    "vanillanet11",
    "vanillanet12",
    "vanillanet13",
]

_FACTORIES: tuple[Callable[..., nn.Module], ...] = (
    reducenet20,
    reducenet56,
    vanillanet5,
    vanillanet6,
    vanillanet7,
    vanillanet8,
    vanillanet9,
    vanillanet10,
    vanillanet11,
    vanillanet12,
    vanillanet13,
    repvgg_a0,
    repvgg_a1,
    repvgg_a2,
    repvgg_b0,
    repvgg_b1,
    repvgg_b1g2,
    repvgg_b1g4,
    repvgg_b2,
    repvgg_b2g2,
    repvgg_b2g4,
    repvgg_b3,
    repvgg_b3g2,
    repvgg_b3g4,
    acnet_resnet18,
    dbb_resnet18,
    slimmable_resnet20,
    us_resnet20,
    branchy_resnet20,
    skipnet20,
    condconv_resnet20,
    dsnet_small,
)


def names() -> tuple[str, ...]:
    """The names that ``create`` knows.

    >>> names()[:3]
    ('reducenet20', 'reducenet56', 'vanillanet5')
    """
    return tuple(factory.__name__ for factory in _FACTORIES)


def create(name: str, **options: Any) -> nn.Module:
    """A new model of the zoo, in training mode, with weights drawn from the global random state.

    ``name`` is one of ``names()``; case, ``-`` and ``_`` do not matter. ``options`` are the factory's.

    Raises ``InputError`` for an unknown name or an unknown option.

    >>> create("reducenet-20", num_classes=100).fc.out_features
    100
    """
    factories = {_plain(factory.__name__): factory for factory in _FACTORIES}
    if _plain(name) not in factories:
        raise InputError(_unknown(name))
    try:
        return factories[_plain(name)](**options)
    except TypeError as error:
        raise InputError(f"zoo model {name!r}: {error}") from error


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _unknown(name: str) -> str:
    close = get_close_matches(name.lower().replace("-", "_"), names())
    hint = f"did you mean {' or '.join(close)}?" if close else f"the zoo has {', '.join(names())}"
    return f"no zoo model is named {name!r}; {hint}"
