"""Does a .safetensors file name each tensor once? JSON allows repeats, and readers differ in which they take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: The safetensors library reads no longer header than this either.
MOST_BYTES = 100_000_000


def repeated_name(path: Path) -> str | None:
    """The first name that the header gives twice; None where there is none, or no header that could be read."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= MOST_BYTES else b""
    repeated: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            repeated.append(next(name for name in names if names.count(name) > 1))
        return dict(pairs)

    try:
        json.loads(text, object_pairs_hook=note)
    except (ValueError, RecursionError):
        return None  # the library says what is wrong with it
    return repeated[0] if repeated else None
