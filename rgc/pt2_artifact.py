"""How is a compiled model written to, and read from, a .pt2 file?"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rgc.errors import InputError
from rgc.exported_program import FreeProgram, export_program, quiet_export
from rgc.pt2_inspection import reason_to_distrust


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
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise InputError(f"{path} is not a .pt2 archive")
    if not trust and (reason := reason_to_distrust(content)) is not None:
        raise InputError(f"{path} could run code when loaded ({reason}); load it only if you trust where it came from")
    try:
        with quiet_export():
            return torch.export.load(io.BytesIO(content)).module()
    except (RuntimeError, ValueError, KeyError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} cannot be loaded by torch {torch.__version__}: {reason}") from error
