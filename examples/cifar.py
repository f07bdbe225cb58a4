"""What does a CIFAR-10 network lose when its activations decay, and what does compiling it then gain?

    python examples/cifar.py --data cifar10-jpeg.tar.xz --model reducenet20 --keep 3
    torchrun --nproc-per-node 2 examples/cifar.py --data cifar10-jpeg.tar.xz --model resnet20

The archive holds ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg``, 32x32 pixels; it is decoded once into the folder of
the results. Each run writes a checkpoint after every epoch (``--resume`` goes on from it, on one process to the last
bit), a line in ``results.jsonl`` and a figure of the training. Under ``torchrun`` it trains the same model on all
processes; a batch is that of all of them together.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import rgc
from rgc.errors import RgcError
from rgc.models import create
from rgc.nn import DecayedActivation, DecayGroup, DecaySchedule, distillation_loss, linearize

#: Of the images that the trained weights in use here were made with.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

#: Zeros around an image before it is cropped to its size at random.
MARGIN = 4


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, evaluate, compile, measure; exit status 2 and one line for what cannot be used."""
    options = _options(arguments)
    try:
        with _processes(options) as world:
            run(options, world)
    except RgcError as error:
        print(f"cifar: {error}", file=sys.stderr)
        sys.exit(2)


def run(options: argparse.Namespace, world: World) -> dict[str, Any]:
    """One run as ``options`` say; its result, which the first process also writes down."""
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    data = world.first_alone(lambda: load_data(options.data, folder, world.console))
    torch.manual_seed(options.seed)
    model = network(options.model, options.keep).to(world.device)
    teacher = _teacher(options).to(world.device) if options.teacher else None
    training = Training(model, options, steps=len(data.train_labels) // options.batch * options.epochs)
    if options.resume:
        training.load(folder / f"{options.name}.pt", world.device)
    wrapped = DistributedDataParallel(model) if world.size > 1 else model
    for epoch in range(training.epoch, options.epochs):
        loss = _train_epoch(wrapped, training, data, teacher, options, world, epoch)
        world.take_buffers_of_first(model)
        world.require_same(model.state_dict())
        accuracy = _accuracy(model, data, world)
        training.note(loss, accuracy)
        if world.is_first:
            training.save(folder / f"{options.name}.pt")
            world.console.print(f"epoch {epoch + 1}: loss {loss:.4f}, test accuracy {accuracy:.2%}")
    if not world.is_first:
        return {}
    result = _result(model.cpu().eval(), data, options, world, training)
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")
    world.console.print_json(data=result)
    if options.figure:
        draw(training.history, folder / f"{options.name}.png", options.name)
    return result


# --- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Images [N, 3, 32, 32] as bytes, and their classes in alphabetical order."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_data(archive: Path, folder: Path, console: Console) -> Data:
    """The images of ``archive``, decoded once: later runs read ``images.pt`` in ``folder``."""
    cache = folder / "images.pt"
    stamp = [str(archive.resolve()), archive.stat().st_size]
    if cache.exists():
        stored = torch.load(cache, weights_only=True)
        if stored["archive"] == stamp:
            return Data(**stored["data"])
    data = _decoded(archive, console)
    scratch = cache.with_suffix(f".{os.getpid()}")
    torch.save({"archive": stamp, "data": vars(data)}, scratch)
    scratch.replace(cache)
    return data


def _decoded(archive: Path, console: Console) -> Data:
    from PIL import Image

    images: dict[str, list[Tensor]] = {"train": [], "test": []}
    names: dict[str, list[str]] = {"train": [], "test": []}
    with tarfile.open(archive) as opened, console.status(f"decoding {archive.name}"):
        for member in opened:
            *_, part, name, file = ("", "", *member.name.split("/"))
            if member.isfile() and part in images and file.endswith(".jpg"):
                content = opened.extractfile(member)
                assert content is not None  # it is a file
                pixels = np.array(Image.open(content).convert("RGB"))  # [height, width, 3]
                images[part].append(torch.from_numpy(pixels).permute(2, 0, 1))
                names[part].append(name)
    if not images["train"] or not images["test"]:
        raise rgc.InputError(f"{archive} has no train/CLASS/*.jpg or no test/CLASS/*.jpg")
    classes = sorted(set(names["train"]))
    labels = {part: torch.tensor([classes.index(name) for name in each]) for part, each in names.items()}
    return Data(torch.stack(images["train"]), labels["train"], torch.stack(images["test"]), labels["test"])


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image padded by `MARGIN`, cropped to its size at random, and mirrored half of the time."""
    count, _, height, width = images.shape
    padded = F.pad(images, [MARGIN] * 4)
    top, left = torch.randint(0, 2 * MARGIN + 1, (2, count), generator=generator)
    mirrored = torch.randint(0, 2, (count,), generator=generator).bool()
    rows = top[:, None] + torch.arange(height)
    across = torch.arange(width).expand(count, -1)
    columns = left[:, None] + torch.where(mirrored[:, None], across.flip(1), across)
    batch, channel = torch.arange(count)[:, None, None, None], torch.arange(images.shape[1])[:, None, None]
    return padded[batch, channel, rows[:, None, :, None], columns[:, None, None, :]]


def normalised(images: Tensor, device: torch.device) -> Tensor:
    """Bytes as the numbers that a network takes."""
    mean, deviation = (torch.tensor(each, device=device).view(1, 3, 1, 1) for each in (MEAN, DEVIATION))
    return (images.to(device).float() / 255 - mean) / deviation


# --- models ----------------------------------------------------------------------------------------------------------


class ResNet(nn.Module):
    """The CIFAR ResNet of arXiv 1512.03385, section 4.2, with shortcuts of option A, its activations as modules."""

    def __init__(self, depth: int = 20) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = nn.ReLU()
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(_Block(before, width, stride), *(_Block(width, width, 1) for _ in range(blocks - 1)))
            for before, width, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.act1(self.bn1(self.conv1(x))))))
        scores: Tensor = self.linear(x.mean((2, 3)))
        return scores


class _Block(nn.Module):
    def __init__(self, entering: int, leaving: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(entering, leaving, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(leaving)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(leaving, leaving, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(leaving)
        self.act2 = nn.ReLU()
        self.widened = leaving - entering

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        if self.widened:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.widened // 2, self.widened // 2))
        result: Tensor = self.act2(y + x)
        return result


def network(name: str, keep: int | None) -> nn.Module:
    """A new network; with ``keep``, that many of its activations stay, evenly spread, and the others may decay."""
    own: dict[str, Callable[[], nn.Module]] = {
        "resnet20": lambda: ResNet(20),
        "resnet56": lambda: ResNet(56),
        "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)),
    }
    model = own[name]() if name in own else create(name, num_classes=10, image_size=32)
    if keep is None:
        return model
    decaying = [path for path, each in model.named_modules() if isinstance(each, DecayedActivation)]
    if not decaying:
        model = linearize(model)
        decaying = [path for path, each in model.named_modules() if isinstance(each, DecayedActivation)]
    if not 0 <= keep <= len(decaying):
        raise rgc.InputError(f"--keep is between 0 and {len(decaying)}, the activations of {name}; got {keep}")
    kept = {decaying[round((index + 0.5) * len(decaying) / keep - 0.5)] for index in range(keep)}
    for path in kept:
        owner, _, child = path.rpartition(".")
        activation = model.get_submodule(path).activation
        setattr(model.get_submodule(owner), child, activation)
    return model


def _teacher(options: argparse.Namespace) -> nn.Module:
    teacher = network(options.teacher_model, None)
    try:
        stored = torch.load(options.teacher, weights_only=True, map_location="cpu")
        weights = stored.get("model", stored.get("state_dict", stored))
        teacher.load_state_dict({name.removeprefix("module."): tensor for name, tensor in weights.items()})
    except (RuntimeError, OSError, AttributeError) as error:
        line = " ".join(str(error).split())[:200]
        raise rgc.InputError(f"{options.teacher} is no checkpoint of {options.teacher_model}: {line}") from error
    return teacher.eval().requires_grad_(False)


# --- training --------------------------------------------------------------------------------------------------------


class Training:
    """A model with all that training it changes, to be saved and resumed as one."""

    def __init__(self, model: nn.Module, options: argparse.Namespace, steps: int) -> None:
        if steps < 1:
            raise rgc.InputError(f"--batch {options.batch} is larger than the training set")
        self.model = model
        self.epoch = 0
        self.history: list[dict[str, float]] = []
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=options.lr, momentum=0.9, weight_decay=options.weight_decay, nesterov=True
        )
        warm = max(1, steps // 20)

        def rate(step: int) -> float:
            return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps)))

        self.rates = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        fades = options.keep is not None or options.model.startswith("reducenet")
        fading = [each for each in model.modules() if isinstance(each, DecayedActivation)]
        decay_steps = max(1, round(options.decay_until * steps))
        self.decays = DecaySchedule(model, decay_steps, groups=[DecayGroup(_all)]) if fades and fading else None
        self.settings = {key: getattr(options, key) for key in _SETTINGS}

    def step(self, loss: Tensor) -> None:
        """One step of everything."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.rates.step()
        if self.decays is not None:
            self.decays.step()

    def note(self, loss: float, accuracy: float) -> None:
        """The end of an epoch."""
        decay = self.decays.get_last_decay()[0] if self.decays is not None else 0.0
        self.history.append({"loss": loss, "accuracy": accuracy, "decay": decay, "lr": self.rates.get_last_lr()[0]})
        self.epoch += 1

    def save(self, path: Path) -> None:
        """Write everything to ``path``, which is whole at any time."""
        state = {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "rates": self.rates.state_dict(), "decays": self.decays.state_dict() if self.decays else None,
            "epoch": self.epoch, "history": self.history, "settings": self.settings,
        }  # fmt: skip
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self, path: Path, device: torch.device) -> None:
        """Go on from ``path``."""
        if not path.exists():
            raise rgc.InputError(f"there is no {path} to resume from; leave out --resume")
        state = torch.load(path, weights_only=True, map_location=device)
        other = [key for key in _SETTINGS if state["settings"].get(key) != self.settings[key]]
        if other:
            was, now = state["settings"].get(other[0]), self.settings[other[0]]
            raise rgc.InputError(f"{path} was trained with --{other[0].replace('_', '-')} {was}, not {now}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rates.load_state_dict(state["rates"])
        if self.decays is not None:
            self.decays.load_state_dict(state["decays"])
        self.epoch, self.history = state["epoch"], state["history"]


#: What a resumed run has to have in common with the one that it goes on with.
_SETTINGS = (
    "model", "keep", "epochs", "batch", "seed", "lr", "weight_decay", "label_smoothing", "decay_until", "temperature",
    "alpha",
)  # fmt: skip


def _all(path: str, module: nn.Module) -> bool:
    return True


def _train_epoch(
    model: nn.Module, training: Training, data: Data, teacher: nn.Module | None, options: argparse.Namespace,
    world: World, epoch: int,
) -> float:  # fmt: skip
    """One pass over the training set; the mean loss of all processes."""
    model.train()
    # A generator per epoch, so that a resumed run draws what the whole one would have drawn.
    shared = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
    own = torch.Generator().manual_seed((options.seed * 1_000_003 + epoch) * 1_009 + world.rank + 1)
    batches = torch.randperm(len(data.train_labels), generator=shared).split(options.batch)
    batches = [batch for batch in batches if len(batch) == options.batch]
    total = torch.zeros((), device=world.device)
    for batch in world.track(batches, f"epoch {epoch + 1}/{options.epochs}"):
        mine = batch[world.rank :: world.size]
        x = normalised(augmented(data.train_images[mine], own), world.device)
        loss = _loss(model(x), data.train_labels[mine].to(world.device), x, teacher, options)
        training.step(loss)
        total += loss.detach()
    return world.sum(float(total)) / world.size / len(batches)


def _loss(logits: Tensor, labels: Tensor, x: Tensor, teacher: nn.Module | None, options: argparse.Namespace) -> Tensor:
    if teacher is None:
        return F.cross_entropy(logits, labels, label_smoothing=options.label_smoothing)
    with torch.no_grad():
        taught = teacher(x)
    return distillation_loss(
        logits, taught, labels, temperature=options.temperature, alpha=options.alpha,
        label_smoothing=options.label_smoothing,
    )  # fmt: skip


def predictions(model: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """The classes that ``model`` predicts."""
    with torch.no_grad():
        found = [model(normalised(batch, device)).argmax(1) for batch in images.split(250)]
    return torch.cat(found).cpu() if found else torch.zeros(0, dtype=torch.long)


def _accuracy(model: nn.Module, data: Data, world: World) -> float:
    """On the test set, of which each process takes a part."""
    images, labels = data.test_images[world.rank :: world.size], data.test_labels[world.rank :: world.size]
    right = float((predictions(model.eval(), images, world.device) == labels).sum())
    return world.sum(right) / len(data.test_labels)


# --- results ---------------------------------------------------------------------------------------------------------


def _result(
    model: nn.Module, data: Data, options: argparse.Namespace, world: World, training: Training
) -> dict[str, Any]:
    """What the run has shown: of the network as it was trained, and of what rgc makes of it."""
    cpu = torch.device("cpu")
    example = normalised(data.test_images[:1], cpu)
    compiled = rgc.compile(model, example, passes=options.passes)
    report = compiled.report
    before, after = (predictions(each, data.test_images, cpu) for each in (model, compiled))
    measured = rgc.bench(model, compiled, example, runtimes=["eager"], seconds=options.bench_seconds)
    ratio = measured.comparisons[0].ratio
    return {
        "name": options.name,
        **training.settings,
        "processes": world.size,
        "torch": torch.__version__,
        "accuracy": float((before == data.test_labels).double().mean()),
        "accuracy_compiled": float((after == data.test_labels).double().mean()),
        "predictions_changed": int((before != after).sum()),
        "passes": options.passes,
        "layers": report.ops_before.total(),
        "layers_compiled": report.ops_after.total(),
        "parameters": report.params_before,
        "parameters_compiled": report.params_after,
        "latency_ratio": ratio.median,
        "latency_ratio_interval": [ratio.low, ratio.high],
        "loss": training.history[-1]["loss"] if training.history else None,
    }


def draw(history: Sequence[dict[str, float]], path: Path, title: str) -> None:
    """The course of the training as one figure."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    epochs = range(1, len(history) + 1)
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 6), layout="constrained")
    above.plot(epochs, [each["loss"] for each in history], color="tab:blue", label="training loss")
    above.set_ylabel("training loss")
    right = above.twinx()
    right.plot(epochs, [each["accuracy"] for each in history], color="tab:orange")
    right.set_ylabel("test accuracy", color="tab:orange")
    below.plot(epochs, [each["decay"] for each in history], color="tab:green", label="decay")
    below.plot(epochs, [each["lr"] for each in history], color="tab:red", label="learning rate")
    below.set_xlabel("epoch")
    below.legend()
    above.set_title(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# --- processes -------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """The processes that train together: one, or those that ``torchrun`` has started."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    console: Console = field(default_factory=Console)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, value: float) -> float:
        """The sum over all processes."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)

    def first_alone(self, make: Callable[[], Data]) -> Data:
        """What the first process makes before the others do: they find what it has stored."""
        if self.size == 1:
            return make()
        made = make() if self.is_first else None
        dist.barrier()
        return make() if made is None else made

    def take_buffers_of_first(self, model: nn.Module) -> None:
        """Statistics of batch norms are those of the first process, as DistributedDataParallel has them."""
        for buffer in model.buffers() if self.size > 1 else ():
            dist.broadcast(buffer, 0)

    def require_same(self, state: dict[str, Tensor]) -> None:
        """Stop where a weight, a decay or a statistic is not the same, to the last bit, in every process."""
        for name, tensor in state.items() if self.size > 1 else ():
            first = tensor.clone()
            dist.broadcast(first, 0)
            differs = self.sum(float(not torch.equal(first, tensor)))
            if differs:
                raise RuntimeError(f"{name} is not the same in all processes: {int(differs)} differ from the first")

    def track(self, batches: Sequence[Tensor], title: str) -> Iterator[Tensor]:
        """The batches one by one, with a progress bar in the first process."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=self.console, disable=not self.is_first) as progress:
            yield from progress.track(batches, description=title)


class _processes:  # noqa: N801 - used as a function
    """The `World` of this process, as a context."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    def __enter__(self) -> World:
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        is_cuda = torch.cuda.is_available() and self.options.device != "cpu"
        local = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local) if is_cuda else torch.device("cpu")
        if size == 1:
            return World(device=device)
        if self.options.batch % size:
            raise rgc.InputError(f"--batch {self.options.batch} cannot be shared evenly by {size} processes")
        if is_cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if is_cuda else "gloo")
        return World(dist.get_rank(), size, device, Console(quiet=dist.get_rank() > 0))

    def __exit__(self, *_: object) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="archive of train/CLASS/*.jpg and test/CLASS/*.jpg")
    parser.add_argument("--folder", type=Path, default=Path("cifar"), help="where results go (default: cifar)")
    parser.add_argument("--model", default="resnet20", help="resnet20, resnet56, linear, or a name of the zoo")
    parser.add_argument(
        "--keep", type=int, help="so many activations stay, all others decay (default: as the model is)"
    )
    parser.add_argument("--name", help="of the run (default: made of model and keep)")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=128, help="of all processes together (default: 128)")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--decay-until", type=float, default=0.67, help="part of all steps after which decays are 1")
    parser.add_argument("--teacher", type=Path, help="checkpoint of a network to learn from")
    parser.add_argument("--teacher-model", default="resnet56")
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--alpha", type=float, default=0.9, help="weight of the teacher beside the labels")
    parser.add_argument("--passes", default="all", help="of rgc.compile (default: all)")
    parser.add_argument("--bench-seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of PyTorch in each process")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto takes CUDA where there is one")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint of this name")
    parser.add_argument("--no-figure", dest="figure", action="store_false")
    options = parser.parse_args(arguments)
    options.name = options.name or options.model + ("" if options.keep is None else f"-keep{options.keep}")
    if not options.data.is_file():
        parser.error(f"--data {options.data} is no file")
    if options.teacher and not options.teacher.is_file():
        parser.error(f"--teacher {options.teacher} is no file")
    if min(options.epochs, options.batch) < 1 or not 0 < options.decay_until <= 1:
        parser.error("--epochs and --batch are at least 1, and --decay-until lies in (0, 1]")
    if find_spec("PIL") is None:
        parser.error("decoding the images needs pillow: pip install 'rgc[examples]'")
    if options.figure and find_spec("matplotlib") is None:
        parser.error("the figure needs matplotlib: pip install 'rgc[examples]', or give --no-figure")
    return options


if __name__ == "__main__":
    main()
