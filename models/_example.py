"""What does a model of the zoo take as its example input?"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def example(module: nn.Module, *shape: int) -> tuple[Tensor, ...]:
    """One normal input of this shape on the device and in the dtype of ``module``; always the same values.

    It draws from a generator of its own, so the global random state stays as it was.
    """
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
    return (values.to(next(module.parameters())),)
