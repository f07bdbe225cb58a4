"""Does an expanded copy compute what its model does, and compile to the very same layers?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import rgc
from rgc.decay_schedule import Which
from rgc.errors import InputError
from rgc.expansion_blocks import BLOCKS, ParallelBranches
from rgc.models import ReduceNet
from rgc.nn import set_decay
from rgc.testing import randomize


def mobilenet() -> nn.Module:
    return torchvision.models.MobileNetV2(7, 0.25, [[1, 16, 1, 1], [6, 24, 2, 2]])


def resnet() -> nn.Module:
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=7)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet": resnet, "mobilenet_v2": mobilenet, "reducenet8": lambda: ReduceNet(8, widths=(8, 8, 8)),
    "timm ConvNormAct": lambda: nn.Sequential(*(timm.layers.ConvNormAct(n, 8, 3, stride=2) for n in (3, 8))),
}  # fmt: skip
CASES = [(name, "repvgg") for name in MODELS] + [("mobilenet_v2", "dbb"), ("reducenet8", "acnet")]


@pytest.mark.parametrize(("name", "block"), CASES)
def test_an_expanded_model_is_equal_and_compiles_to_the_same_layers(name: str, block: str) -> None:
    model = randomize(MODELS[name]())
    x = torch.randn(1, 3, 32, 32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expanded = rgc.expand(model, block)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.allclose(expanded(x), model(x), rtol=0, atol=1e-4 * float(model(x).detach().abs().max()))
    assert rgc.compile(expanded, x).report.ops_after == rgc.compile(model, x).report.ops_after


def test_a_reduced_model_is_equal_at_decay_1_and_compiles_to_the_same_layers() -> None:
    model, x = randomize(mobilenet()), torch.randn(1, 3, 32, 32)
    expanded = rgc.expand(model, "reduce")
    set_decay(expanded, 1.0)
    assert torch.allclose(expanded(x), model(x), rtol=0, atol=1e-4 * float(model(x).detach().abs().max()))
    assert rgc.compile(expanded, x).report.ops_after == rgc.compile(model, x).report.ops_after


class Pairs(nn.Module):
    """A convolution of two readers, a shared one, and one whose batch norm stands behind an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.two, self.two_bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.shared, self.shared_bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.behind, self.behind_bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(x)
        y = self.two_bn(y) + y
        y = self.shared_bn(self.shared(self.shared(y)))
        return self.behind_bn(self.behind(y).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_batch_norm_that_is_not_the_only_reader_stays_where_it_is(block: str) -> None:
    model, x = randomize(Pairs()), torch.randn(1, 4, 8, 8)
    expanded = rgc.expand(model, block)
    assert all(isinstance(getattr(expanded, f"{name}_bn"), nn.BatchNorm2d) for name in ("two", "shared", "behind"))
    assert torch.allclose(expanded(x), model(x), rtol=0, atol=1e-4 * float(model(x).detach().abs().max()))


def test_a_forward_that_cannot_be_traced_keeps_its_batch_norms() -> None:
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body[0](x)
            return self.body[1](y) if y.sum() > 0 else y

    model, x = randomize(Untraceable()), torch.randn(1, 4, 8, 8)
    expanded = rgc.expand(model)
    for sign in (1, -1):
        assert torch.allclose(expanded(sign * x), model(sign * x), atol=1e-5)


def test_a_kernel_that_is_computed_or_shared_is_left_as_it_is_with_a_warning() -> None:
    tied = nn.Conv2d(4, 4, 3)
    other = nn.Conv2d(4, 4, 3)
    other.weight = tied.weight
    model = nn.Sequential(weight_norm(nn.Conv2d(4, 4, 3)), tied, other, nn.Conv2d(4, 4, 3))
    with pytest.warns(UserWarning, match=r"0: its weight is computed .*; 1: its weight is shared .*; 2: its weight"):
        expanded = rgc.expand(model)
    assert [isinstance(each, ParallelBranches) for each in expanded.children()] == [False, False, False, True]


def test_where_takes_paths_containers_and_a_predicate() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)))

    def expanded(where: object) -> list[str]:
        copy = rgc.expand(model, where=where)  # type: ignore[arg-type]
        return [path for path, module in copy.named_modules() if isinstance(module, ParallelBranches)]

    assert expanded(None) == ["0", "1.0"]
    assert expanded(["1"]) == ["1.0"]
    assert expanded(["1.1"]) == ["1.1"]
    assert expanded(lambda path, conv: path == "0") == ["0"]


@pytest.mark.parametrize(
    ("block", "where", "message"),
    [
        ("repvg", None, "there is no block 'repvg'"),
        ("acnet", ["0"], "0 cannot become a block 'acnet': an even kernel"),
        ("acnet", None, "no convolution of Sequential becomes a block 'acnet'"),
        ("repvgg", ["1"], "no convolution is named '1'"),
        ("repvgg", "0", r"write \['0'\]"),
        ("repvgg", lambda path, conv: False, "none is chosen"),
    ],
)
def test_what_cannot_be_expanded_is_refused(block: str, where: Which | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rgc.expand(nn.Sequential(nn.Conv2d(4, 4, 2)), block, where)
