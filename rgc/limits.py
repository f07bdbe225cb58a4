"""How much may a compilation use? Caps on the graph, on what is merged, on memory and on time.

What goes over a cap is told apart by what a user can do about it. A model that is too large is an error before any work
is done. A merge that would make too large a layer is refused like any other, with its reason, and the layers stay. When
the time is up, rewriting stops, and what is merged so far is proved and returned, with a note.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rgc.errors import InputError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_CONTAINER = Path("/sys/fs/cgroup/memory.max")
#: Modules inside modules; PyTorch itself walks them by recursion, several calls a level.
MOST_LEVELS = 100


def machine_memory(container: Path = _CONTAINER) -> int:
    """Bytes of memory that this machine has, or that the container it stands in may use."""
    found = [2**33]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a bound ("max")
        found.append(int(container.read_text()))
    return min(found)


@dataclass(frozen=True)
class Limits:
    """The caps of one compilation; each with the name that ``rgc compile --limit NAME=VALUE`` gives it.

    nodes: layers of the model, each counted wherever it stands, and operations of its graph.
    kernel: taps of a merged kernel along an axis.
    memory: bytes of what is read from a file and of the weight of a merged layer. By default what the machine has; the
    command line holds its whole process to it.
    seconds: how long rewrites are tried, from the start of the compilation. The proof of the result comes on top.
    """

    nodes: int = 100_000
    kernel: int = 127
    memory: int = field(default_factory=machine_memory)
    seconds: float = 3600.0

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise InputError(f"the limit {each.name}={value!r} is not a positive number")

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Limits:
        """``NAME=VALUE`` each; memory also with a unit.

        >>> Limits.parse(["nodes=500", "memory=2GiB"]).memory
        2147483648
        """
        names = [each.name for each in dataclasses.fields(cls)]
        given: dict[str, float] = {}
        for text in texts:
            name, equals, value = (part.strip() for part in text.partition("="))
            if name not in names or not equals:
                raise InputError(f"--limit {text}: write one of {', '.join(f'{each}=NUMBER' for each in names)}")
            number = _number(value, name == "memory")
            if number is None or (name != "seconds" and number != int(number)):
                raise InputError(f"--limit {text}: {value!r} is not a positive number")
            given[name] = number if name == "seconds" else int(number)
        return cls(**given)  # type: ignore[arg-type]  # whole numbers but for the seconds, as just checked

    def require_size(self, model: nn.Module, what: str) -> None:
        """`InputError` for a model with more layers or larger tensors than allowed, without touching their elements."""
        count = count_layers(model, what)
        if count > self.nodes:
            raise InputError(
                f"{what}: has {count:,} layers, each counted wherever it stands; at most {self.nodes:,} are taken "
                "(--limit nodes=)"
            )
        tensors: dict[int, Tensor] = {id(t): t for t in [*model.parameters(), *model.buffers()] if not is_lazy(t)}
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if size > self.memory:
            raise InputError(f"{what}: holds {human_bytes(size)} of tensors; at most {self.in_words} (--limit memory=)")

    @property
    def in_words(self) -> str:
        """The memory, for people."""
        return human_bytes(self.memory)


def count_layers(model: nn.Module, what: str = "the model") -> int:
    """Modules of ``model``, one that stands in several places counted in each; `InputError` for one inside itself.

    ``what`` is how an error calls the model.

    >>> shared = nn.Sequential(nn.ReLU(), nn.ReLU())
    >>> count_layers(nn.Sequential(shared, shared))
    7
    """
    counts: dict[int, int] = {}
    under_way: dict[int, str] = {id(model): ""}
    stack = [("", model, iter(model._modules.items()))]
    while stack:
        path, module, pending = stack[-1]
        name, child = next(((n, c) for n, c in pending if c is not None and id(c) not in counts), ("", None))
        if child is None:
            stack.pop()
            del under_way[id(module)]
            counts[id(module)] = 1 + sum(counts[id(c)] for c in module._modules.values() if c is not None)
            continue
        inner = f"{path}.{name}".lstrip(".")
        if id(child) in under_way:
            raise InputError(f"{what}: the layer {inner[:80]!r} contains itself; a model must not have cycles")
        if len(stack) > MOST_LEVELS:
            raise InputError(f"{what}: layers are nested more than {MOST_LEVELS} deep, at {inner[:80]!r}")
        under_way[id(child)] = inner
        stack.append((inner, child, iter(child._modules.items())))
    return counts[id(model)]


@contextlib.contextmanager
def process_within(memory: int) -> Iterator[None]:
    """Hold this process to ``memory`` bytes of its own, so that what needs more fails instead of the whole machine."""
    if sys.platform == "win32":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bounds = [bound for bound in (memory, soft, hard) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def is_out_of_memory(error: BaseException) -> bool:
    """Does the error say that memory was refused? PyTorch's own allocator says so in words only."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def human_bytes(count: float) -> str:
    """Bytes for people.

    >>> human_bytes(2**31), human_bytes(2**52)
    ('2.0 GiB', '4,194,304.0 GiB')
    >>> human_bytes(3 * 2**20), human_bytes(1536), human_bytes(1000)
    ('3.0 MiB', '1.5 KiB', '1,000 bytes')
    """
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count:,.0f} bytes"


def _number(text: str, with_unit: bool) -> float | None:
    digits = text.rstrip("BKMGIbkmgi") if with_unit else text
    unit = _UNITS.get(text[len(digits) :].upper())
    try:
        value = float(digits) * (unit or math.nan)
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
