"""How does a network whose weights or width changed get batch norm statistics again? They are measured on data.

Post-statistics of batch norm, arXiv 1903.05134: the average over batches of each batch's mean and
(unbiased) variance, as ``nn.BatchNorm2d`` itself gathers it with ``momentum=None``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from rgc.dynamic import described
from rgc.errors import InputError
from rgc.slimmable import SlimmableBatchNorm2d

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def recalibrate(model: nn.Module, loader: Iterable[Any], batches: int | None = None) -> None:
    """Measure the running statistics of every batch norm in ``model`` anew, in place, on data from ``loader``.

    loader: gives batches: tensors, or tuples and lists whose first element is the input. batches: how many of them to
    take; by default all. Every batch counts the same, so drop a small last one (``drop_last=True``).

    All other modules run in evaluation, without gradients; nothing but the running statistics changes. A batch norm
    that no batch reaches keeps its own. Where a process group is initialised, every rank calls this with batches of
    its own, and all get the same statistics: the average over the batches of all ranks.

    Raises ``InputError`` for a model without such batch norms, one with a slimmable batch norm (which is to be
    specialised first), and a loader with fewer batches than asked for; the statistics are then as they were.

    >>> bn = nn.BatchNorm1d(1)
    >>> recalibrate(bn, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [9.0]])])
    >>> bn.running_mean, bn.running_var
    (tensor([4.5000]), tensor([5.]))
    """
    module = model.module if isinstance(model, DistributedDataParallel) else model
    norms = _norms(module)
    if batches is not None and (isinstance(batches, bool) or not isinstance(batches, int) or batches < 1):
        raise InputError(f"recalibrate: batches is how many to take, at least 1; got {batches!r}")
    with _measuring(module, norms) as kept:
        taken = 0
        for batch in islice(loader, batches):
            module(_on_device(batch, norms[0]))
            taken += 1
        if taken < (1 if batches is None else batches):
            raise InputError(f"recalibrate: the loader gave {taken} of {batches or 'at least 1'} batches")
        _average_over_ranks(norms)
        for norm, before in zip(norms, kept, strict=True):
            if not int(_statistic(norm, "num_batches_tracked")):
                _restore(norm, before)


def _norms(module: nn.Module) -> list[_BatchNorm]:
    for path, each in module.named_modules():
        if isinstance(each, SlimmableBatchNorm2d):
            raise InputError(
                f"recalibrate: {described(path, each)} has other statistics at each width; "
                f"recalibrate what rgc.specialize(model, width=...) returns"
            )
    norms = [each for each in module.modules() if isinstance(each, _BatchNorm) and each.running_mean is not None]
    if not norms:
        raise InputError(f"recalibrate: {type(module).__name__} has no batch norm with running statistics")
    return norms


@contextmanager
def _measuring(module: nn.Module, norms: list[_BatchNorm]) -> Iterator[list[dict[str, Tensor]]]:
    """Batch norms gather cumulative averages from nothing, all else is in evaluation; gives what they had before."""
    modes = {each: each.training for each in module.modules()}
    momenta = [norm.momentum for norm in norms]
    kept = [{name: _statistic(norm, name).clone() for name in _STATISTICS} for norm in norms]
    try:
        for each in modes:
            each.training = isinstance(each, _BatchNorm) and each.running_mean is not None
        for norm in norms:
            norm.momentum = None
            norm.reset_running_stats()
        with torch.no_grad():
            yield kept
    except BaseException:
        for norm, before in zip(norms, kept, strict=True):
            _restore(norm, before)
        raise
    finally:
        for each, training in modes.items():
            each.training = training
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _average_over_ranks(norms: list[_BatchNorm]) -> None:
    """Every rank gets the mean of all ranks' averages, weighted by the batches they are made of; in float64."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    for norm in norms:
        mean, var, count = (_statistic(norm, name) for name in _STATISTICS)
        sums = torch.cat([mean.double() * count, var.double() * count, count.double().reshape(1)])
        dist.all_reduce(sums)
        total = sums[-1]
        if total:
            features = mean.numel()
            mean.copy_(sums[:features] / total)
            var.copy_(sums[features:-1] / total)
        count.copy_(total)


def _statistic(norm: _BatchNorm, name: str) -> Tensor:
    tensor = norm._buffers[name]
    assert tensor is not None  # `_norms` takes only those that track
    return tensor


def _restore(norm: _BatchNorm, before: dict[str, Tensor]) -> None:
    for name, tensor in before.items():
        _statistic(norm, name).copy_(tensor)


def _on_device(batch: Any, norm: _BatchNorm) -> Tensor:
    x = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(x, Tensor):
        raise InputError(f"recalibrate: a batch is a tensor, or starts with one; got {type(x).__name__}")
    return x.to(_statistic(norm, "running_mean").device)
