"""Are recalibrated statistics those of the data, the same on all ranks, and is nothing else changed?"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import rgc
from rgc import models
from rgc.errors import InputError
from rgc.testing import randomize

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def network() -> nn.Module:
    torch.manual_seed(0)
    norms = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)
    return randomize(nn.Sequential(*norms))


def data(count: int = 4, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(6, 3, 8, 7, generator=generator) + 1 for _ in range(count)]


def expected(batches: list[Tensor]) -> dict[str, Tensor]:
    """Mean over batches of mean and unbiased variance, layer by layer, in float64."""
    model = copy.deepcopy(network()).double()
    conv1, bn1, relu, _, conv2, _ = model
    found = {}
    for name, layers in (("1", (conv1,)), ("5", (conv1, "bn", relu, conv2))):
        means, variances = [], []
        for x in batches:
            y = x.double()
            for layer in layers:
                y = bn1.train()(y) if layer == "bn" else layer(y)
            means.append(y.mean((0, 2, 3)))
            variances.append(y.var((0, 2, 3), correction=1))
        found[f"{name}.running_mean"] = torch.stack(means).mean(0)
        found[f"{name}.running_var"] = torch.stack(variances).mean(0)
    return found


def test_the_statistics_are_the_average_over_batches_and_nothing_else_changes() -> None:
    model = network()
    model[1].train()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    rgc.recalibrate(model, [(x, torch.zeros(6)) for x in data()])
    for name, value in expected(data()).items():
        torch.testing.assert_close(model.state_dict()[name].double(), value, rtol=1e-5, atol=1e-6)
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[2] not in STATISTICS:
            assert torch.equal(tensor, before[name])
    assert [module.training for module in model.modules()] == modes
    assert model[1].momentum == 0.1 and all(parameter.grad is None for parameter in model.parameters())
    assert model[5].num_batches_tracked == 4


def test_only_so_many_batches_are_taken_and_too_few_leave_the_model_as_it_was() -> None:
    model, other = network(), network()
    rgc.recalibrate(model, data(), batches=2)
    rgc.recalibrate(other, data()[:2])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    before = copy.deepcopy(model.state_dict())
    for loader, batches, message in (
        (data(), 5, "gave 4 of 5 batches"),
        ([], None, "gave 0 of at least 1 batches"),
        (data(), 0, "at least 1; got 0"),
        ([{"x": 1}], None, "starts with one; got dict"),
    ):
        with pytest.raises(InputError, match=message):
            rgc.recalibrate(model, loader, batches)
    with pytest.raises(RuntimeError, match="channels"):
        rgc.recalibrate(model, [*data(), torch.zeros(1, 2, 8, 8)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules())


def test_a_norm_that_no_batch_reaches_keeps_its_statistics() -> None:
    model = network()
    model.add_module("unused", nn.Identity())
    model.unused.aside = randomize(nn.BatchNorm2d(3))
    mean = model.unused.aside.running_mean.clone()
    rgc.recalibrate(model, data())
    assert torch.equal(model.unused.aside.running_mean, mean)


def test_a_universally_slimmable_network_gets_the_statistics_of_its_width() -> None:
    model = randomize(models.us_resnet20())
    static = rgc.specialize(model, width=0.4)
    generator = torch.Generator().manual_seed(2)
    batch = torch.randn(8, 3, 16, 16, generator=generator)
    rgc.recalibrate(static, [batch])
    static.train()
    in_training = static(batch)
    static.eval()
    bn = static.bn1
    assert torch.allclose(bn.running_mean, static.conv1(batch).mean((0, 2, 3)), atol=1e-5)
    assert in_training.isfinite().all()
    with pytest.raises(InputError, match=r"bn1 \(SlimmableBatchNorm2d\) has other statistics at each width"):
        rgc.recalibrate(model, [batch])
    with pytest.raises(InputError, match="Linear has no batch norm with running statistics"):
        rgc.recalibrate(nn.Linear(2, 2), [batch])


def _one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = DistributedDataParallel(network())
    own = data()[:1] if rank == 0 else data()[1:]
    rgc.recalibrate(model, own)
    torch.save(model.module.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_all_ranks_get_the_average_over_the_batches_of_all(tmp_path: Path) -> None:
    mp.spawn(_one_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    for name, value in expected(data()).items():
        torch.testing.assert_close(first[name].double(), value, rtol=1e-5, atol=1e-6)
    assert first["1.num_batches_tracked"] == 4
