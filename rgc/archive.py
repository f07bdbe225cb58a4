"""Is a zip archive what it seems, before anything in it is unpacked?

A few kilobytes can unpack into terabytes: by compression, or by entries that share the same bytes. Models are stored
uncompressed by everything that writes them, so an archive is refused by what its directory says.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from typing import IO

from rgc.limits import human_bytes

#: What `zipfile` raises for an archive that it cannot read.
UNREADABLE_ARCHIVE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, RuntimeError, ValueError,
                      OverflowError, struct.error)  # fmt: skip
#: Bytes unpacked for each byte of the file: weights do not compress, and zeros are not what one ships.
MOST_RATIO = 100
#: Entries of one archive.
MOST_ENTRIES = 100_000


def is_archive(file: IO[bytes]) -> bool:
    """Does the file end like a zip archive, also one that is damaged?"""
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:  # an end that it recognises and does not like
        return True


def fault_of_archive(file: IO[bytes], memory: int) -> str | None:
    """What is wrong with an archive, in words that follow its name; None for one that may be unpacked.

    ``memory`` is how many bytes it may unpack to. Raises what `zipfile` raises for what it cannot read.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if len(entries) > MOST_ENTRIES:
            return f"has {len(entries):,} entries; at most {MOST_ENTRIES:,} are read"
        names = [entry.filename for entry in entries]
        if len(set(names)) < len(names):
            repeated = next(name for name in names if names.count(name) > 1)
            return f"has two entries of the name {repeated[:80]!r}, and readers differ in which they take"
        unpacked = sum(entry.file_size for entry in entries)
        packed = sum(entry.compress_size for entry in entries)
        size = file.seek(0, 2)
        if packed > size:
            return (
                f"is a trap: its entries take {human_bytes(packed)} of a file of {human_bytes(size)}, so they overlap"
            )
        if unpacked > MOST_RATIO * size:
            return f"is a trap: {human_bytes(size)} that unpack to {human_bytes(unpacked)}"
        if unpacked > memory:
            return f"unpacks to {human_bytes(unpacked)}; at most {human_bytes(memory)} are read (--limit memory=)"
        damaged = archive.testzip()
    return None if damaged is None else f"is damaged: {damaged!r} fails its checksum; copy or save it again"
