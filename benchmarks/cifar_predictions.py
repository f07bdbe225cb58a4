"""Do compiled networks predict what the trained ones predict, on all 10,000 CIFAR-10 test images?

    python -m benchmarks.cifar_predictions [FOLDER]

FOLDER holds resnet20_cifar10.th, resnet56_cifar10.th and cifar10-jpeg.tar.xz (default: $RGC_DATA, then
../shared/data beside the repository). Prints top-1 of the original, of the compiled model, and of its ONNX file in
onnxruntime, and how many predictions differ; the exit status is 1 if any does.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ARCHIVE = "cifar10-jpeg.tar.xz"


class CifarResNet(nn.Module):
    """The CIFAR ResNets of arXiv 1512.03385, section 4.2, with shortcuts of option A.

    >>> CifarResNet(20)(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(Block(before, width, stride), *(Block(width, width, 1) for _ in range(blocks - 1)))
            for before, width, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        scores: Tensor = self.linear(x.mean((2, 3)))
        return scores


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters: every second pixel, channels filled up with zeros."""

    def __init__(self, entering: int, leaving: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(entering, leaving, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(leaving)
        self.conv2 = nn.Conv2d(leaving, leaving, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(leaving)
        self.widened = leaving - entering

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.widened:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.widened // 2, self.widened // 2))
        return F.relu(y + x)


def data_folder() -> Path:
    """Where the weights and the images are: $RGC_DATA, or ../shared/data beside the repository."""
    return Path(os.environ.get("RGC_DATA", Path(__file__).parents[2] / "shared" / "data"))


def trained(depth: int, folder: Path) -> CifarResNet:
    """The published CIFAR-10 weights, in eval mode."""
    weights = torch.load(folder / f"resnet{depth}_cifar10.th", weights_only=True, map_location="cpu")["state_dict"]
    model = CifarResNet(depth)
    model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in weights.items()})
    return model.eval()


def images_of_test(folder: Path, count: int = 10_000) -> tuple[Tensor, Tensor]:
    """The first ``count`` test images, normalised, [count, 3, 32, 32], and their classes in alphabetical order."""
    from PIL import Image

    pixels: list[np.ndarray] = []
    names: list[str] = []
    with tarfile.open(folder / ARCHIVE) as archive:
        for member in archive:
            if len(names) < count and member.isfile() and member.name.lstrip("./").startswith("test/"):
                opened = archive.extractfile(member)
                assert opened is not None  # it is a file
                pixels.append(np.asarray(Image.open(io.BytesIO(opened.read())).convert("RGB")))
                names.append(member.name.split("/")[-2])
    x = torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean.view(1, 3, 1, 1)) / deviation.view(1, 3, 1, 1), torch.tensor(
        [CLASSES.index(name) for name in names]
    )


CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def predictions(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The predicted classes."""
    with torch.no_grad():
        return torch.cat([model(batch).argmax(1) for batch in torch.split(images, 250)])


def main() -> int:
    import rgc

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else data_folder()
    images, labels = images_of_test(folder)
    changed = 0
    print(f"{len(images):,} images; layers and functions before and after; top-1, changed predictions")
    for depth in (20, 56):
        model = trained(depth, folder)
        compiled = rgc.compile(model, images[:2])
        with tempfile.TemporaryDirectory() as scratch:
            rgc.save(compiled, f"{scratch}/model.onnx")
            onnx = rgc.load(f"{scratch}/model.onnx")
            runs = [
                (name, predictions(run, images))
                for name, run in (
                    ("original", model),
                    ("compiled", compiled),
                    ("onnxruntime", lambda batch, loaded=onnx: loaded(batch)[0]),
                )
            ]
        report = compiled.report
        print(f"ResNet-{depth}: {report.ops_before.total()} -> {report.ops_after.total()}")
        for name, found in runs:
            differing = int((found != runs[0][1]).sum())
            changed += differing
            print(f"  {name:<12} {(found == labels).float().mean():.2%} {differing:5d}")
    return int(changed > 0)


if __name__ == "__main__":
    sys.exit(main())
