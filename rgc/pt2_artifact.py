"""How is a compiled model written to, and read from, a .pt2 file?"""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rgc.archive import UNREADABLE_ARCHIVE, fault_of_archive, is_archive
from rgc.errors import InputError
from rgc.exported_program import FreeProgram, export_program, quiet_export
from rgc.limits import machine_memory
from rgc.pt2_inspection import reason_to_distrust

#: What torch.export.load raises for an archive that is not one of its own.
UNREADABLE_PROGRAM = (RuntimeError, ValueError, LookupError, AssertionError, TypeError, AttributeError, zlib.error)


def write_pt2(
    module: nn.Module,
    path: Path,
    example_args: tuple[Any, ...],
    example_kwargs: Mapping[str, Any],
    *,
    free_sizes: bool,
) -> FreeProgram:
    """Write ``module`` as a torch.export archive; the result says which input dimensions stayed free."""
    exported = export_program(module, example_args, example_kwargs, free_sizes=free_sizes)
    # Into memory first: on a full disk torch's own writer does not raise, it ends the process.
    archive = io.BytesIO()
    with quiet_export():
        torch.export.save(exported.program, archive)
    path.write_bytes(archive.getbuffer())
    return exported


def read_pt2(path: Path, *, trust: bool = False) -> nn.Module:
    """Read a .pt2 archive as a callable module.

    Raises InputError if it is not such an archive, or, unless ``trust``, if loading it could run code that it carries.
    """
    content = path.read_bytes()  # what is inspected must be what is loaded
    if not is_archive(io.BytesIO(content)):
        raise InputError(f"{path} is not a .pt2 archive")
    try:
        fault = fault_of_archive(io.BytesIO(content), machine_memory())
    except UNREADABLE_ARCHIVE as error:
        fault = f"is damaged ({error})"
    if fault is not None:
        raise InputError(f"{path} {fault}")
    if not trust and (reason := reason_to_distrust(content)) is not None:
        raise InputError(f"{path} could run code when loaded ({reason}); load it only if you trust where it came from")
    try:
        with quiet_export():
            return torch.export.load(io.BytesIO(content)).module()
    except UNREADABLE_PROGRAM as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} cannot be loaded by torch {torch.__version__}: {reason}") from error
