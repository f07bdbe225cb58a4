"""Where is a file made before it appears under its name? In a hidden folder beside it, which goes whatever happens.

A process that is killed cannot clean up, so the next one that writes there does. It tells a dead owner from a live one
by a lock on the folder, which the system drops with the process: unlike a process number, that holds across containers
and is never given to somebody else.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = ".rgc-"
#: What `set_aside` appends to a name; `_remove` puts back what still stands under such a name.
_OLD = ".old"
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)


@contextlib.contextmanager
def workshop(folder: Path) -> Iterator[Path]:
    """A new hidden folder in ``folder``, removed at the end; leftovers of processes that were killed go first.

    Raises `OSError` where none can be made.
    """
    folder = folder.absolute()
    _remove_leftovers(folder)
    made, lock = _make(folder)
    try:
        yield made
    finally:
        _remove(made)
        if lock is not None:
            os.close(lock)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all; raises `OSError`."""
    with workshop(path.absolute().parent) as place:
        draft = place / path.name
        draft.write_text(text)
        publish(draft, path)


def publish(draft: Path, target: Path) -> None:
    """Let a finished file or folder appear as ``target``, in one step that is either done or not; raises `OSError`.

    An earlier folder is left in the workshop. Where the system cannot exchange two folders, there is a moment without
    either; whoever is killed in it has the old one put back by the next run.
    """
    for part in draft.rglob("*") if draft.is_dir() else [draft]:
        _flush(part)
    if not (draft.is_dir() and target.is_dir()):
        os.replace(draft, target)
    elif not exchange(draft, target):
        old = set_aside(target, draft.parent)
        try:
            os.replace(draft, target)
        except BaseException:
            os.replace(old, target)
            raise


def set_aside(path: Path, place: Path) -> Path:
    """Move what is to be replaced into a workshop, under a name by which it is put back if it is never replaced."""
    old = place / f"{path.name}{_OLD}"
    os.replace(path, old)
    return old


def exchange(first: Path, second: Path) -> bool:
    """Let two paths trade places in one step; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0


def _flush(path: Path) -> None:
    """To the disk, before the name that stands for it changes: a full disk may only say so now."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _make(folder: Path) -> tuple[Path, int | None]:
    """A new workshop with its lock, or None for the lock where folders cannot be locked, and so nobody removes it."""
    while True:
        made = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
        try:
            lock = _lock(made)
        except OSError:
            return made, None
        if lock is not None and _is_at(lock, made):
            return made, lock
        if lock is not None:  # somebody took it for a leftover before it was locked
            os.close(lock)


def _remove_leftovers(folder: Path) -> None:
    for found in folder.glob(f"{PREFIX}*"):
        if found.is_symlink() or not found.is_dir():
            continue
        with contextlib.suppress(OSError):  # not ours to remove, or no lock can tell whose it is: it stays
            lock = _lock(found)
            if lock is not None:
                _remove(found)
                os.close(lock)


def _remove(place: Path) -> None:
    """Remove a workshop, and put back what was set aside in it and never replaced."""
    for old in place.glob(f"*{_OLD}"):
        target = place.parent / old.name.removesuffix(_OLD)
        if not target.exists():
            os.replace(old, target)
    shutil.rmtree(place, ignore_errors=True)


def _lock(folder: Path) -> int | None:
    """The descriptor of a folder that is now locked; None where another process holds it. Raises `OSError`."""
    if sys.platform == "win32":
        raise OSError("folders cannot be locked")
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
