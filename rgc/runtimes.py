"""How is a model run where it is deployed? As a call to time: in eager PyTorch, torch.compile or onnxruntime."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rgc.errors import InputError
from rgc.example import Example, copy_model
from rgc.subject import device_of, floating_dtype
from rgc.timing import Call, as_cuda_graph

Runtime = Literal["eager", "torch.compile", "onnxruntime"]
RUNTIMES: tuple[Runtime, ...] = ("eager", "torch.compile", "onnxruntime")


@dataclass(frozen=True)
class Setting:
    """Under which conditions a model runs.

    dtype: None for the model's own. ``cuda_graph``: replay the work of a call as one launch.
    """

    runtime: Runtime
    batch: int
    threads: int
    device: torch.device
    dtype: torch.dtype | None = None
    channels_last: bool = False
    cuda_graph: bool = False

    def __str__(self) -> str:
        where = f"{self.threads} thread{'s' * (self.threads > 1)}" if self.device.type == "cpu" else str(self.device)
        return f"{self.runtime}, batch {self.batch}, {where}"


class Runner:
    """One model, ready to be run under any setting. Use it in a ``with``: what it exports is gone afterwards."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name
        self._folder = tempfile.TemporaryDirectory(prefix="rgc-")
        self._exports: dict[tuple[torch.dtype | None, int | None], Path] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def call(self, example: Example, setting: Setting) -> Call:
        """The call to time, its inputs prepared; `InputError` says why there is none."""
        if setting.runtime == "onnxruntime":
            return self._in_onnxruntime(example, setting)
        if _is_onnx(self.model):
            raise InputError(f"{self.name} is an ONNX file, which runs in onnxruntime only")
        module, given = _placed(self.model, example, setting)
        if setting.runtime == "torch.compile":
            return _compiled(module, given, setting)
        return _graphed(_checked(module, given), setting)

    def _in_onnxruntime(self, example: Example, setting: Setting) -> Call:
        from rgc.onnx_artifact import OnnxModel

        if setting.device.type != "cpu":
            raise InputError("onnxruntime is measured on the CPU only")
        if isinstance(self.model, OnnxModel):
            if setting.dtype is not None:
                raise InputError(f"{self.name} is an ONNX file, whose dtype is fixed")
            return _session_call(self.model.path, example, setting)
        module, given = _placed(self.model, example, setting)
        if torch.bfloat16 in {tensor.dtype for tensor in (*module.parameters(), *given.tensors)}:
            raise InputError("onnxruntime takes no bfloat16 tensors from PyTorch")
        try:
            return _session_call(self._exported(module, given, setting, None), given, setting)
        except InputError:  # what was exported may hold for its own batch only
            return _session_call(self._exported(module, given, setting, setting.batch), given, setting)

    def _exported(self, module: nn.Module, given: Example, setting: Setting, batch: int | None) -> Path:
        """The ONNX file that `rgc.save` would write, with any batch or, where that fails, for one ``batch``."""
        from rgc.onnx_artifact import write_onnx

        key = (setting.dtype, batch)
        if key not in self._exports:
            path = Path(self._folder.name) / f"{len(self._exports)}.onnx"
            write_onnx(module, path, given.args, given.kwargs, free_sizes=False)
            self._exports[key] = path
        return self._exports[key]


def _is_onnx(model: nn.Module) -> bool:
    from rgc.onnx_artifact import OnnxModel

    return isinstance(model, OnnxModel)


def _placed(model: nn.Module, example: Example, setting: Setting) -> tuple[nn.Module, Example]:
    """A copy of the model, and the example, in the setting's dtype and memory format and on its device."""
    dtype = setting.dtype or floating_dtype(model, example)
    module = copy_model(model, dtype=None if setting.dtype is None else dtype).requires_grad_(False)
    if device_of(module) != setting.device:
        module = module.to(setting.device)
    given = example.cast(dtype).to(setting.device)
    if setting.channels_last:
        module = module.to(memory_format=torch.channels_last)
        given = _in_channels_last(given)
    return module, given


def _in_channels_last(example: Example) -> Example:
    def convert(leaf: Any) -> Any:
        is_image = isinstance(leaf, Tensor) and leaf.dim() == 4
        return leaf.contiguous(memory_format=torch.channels_last) if is_image else leaf

    return Example(tree_map(convert, example.args), tree_map(convert, example.kwargs))


def _checked(module: Callable[..., object], given: Example) -> Call:
    """The call, once it has been seen to work."""

    def call() -> object:
        return module(*given.args, **given.kwargs)

    try:
        call()
    except Exception as error:  # forward is the user's own, and kernels refuse dtypes and sizes in their own ways
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        raise InputError(f"it does not run: {type(error).__name__}: {reason}") from error
    return call


def _compiled(module: nn.Module, given: Example, setting: Setting) -> Call:
    optimised = torch.compile(module, dynamic=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own internals
        return _graphed(_checked(optimised, given), setting)


def _graphed(call: Call, setting: Setting) -> Call:
    return as_cuda_graph(call, setting.device) if setting.cuda_graph else call


def _session_call(path: Path, example: Example, setting: Setting) -> Call:
    from rgc.onnx_artifact import OnnxModel

    model = OnnxModel(path, threads=setting.threads)
    model(*example.args, **example.kwargs)  # raises where it does not take the example
    feeds = model.feeds(*example.args, **example.kwargs)
    return lambda: model.session.run(None, feeds)


__all__ = ["RUNTIMES", "Runner", "Runtime", "Setting"]
