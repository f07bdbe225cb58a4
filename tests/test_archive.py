"""Is an archive that would unpack without end, or that readers read differently, stopped by its directory alone?"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from rgc.archive import MOST_RATIO, fault_of_archive, is_archive
from rgc.artifact import load
from rgc.errors import InputError
from rgc.limits import Limits
from rgc.loading import load_model


def archive(members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", compression) as file:
        warnings.simplefilter("ignore", UserWarning)  # a name given twice
        for name, content in members:
            file.writestr(name, content)
    return buffer.getvalue()


def fault(content: bytes, memory: int = 2**30) -> str | None:
    return fault_of_archive(io.BytesIO(content), memory)


def test_a_plain_archive_has_no_fault() -> None:
    assert fault(archive([("a", b"1"), ("b", bytes(10_000))])) is None
    assert fault(archive([("a", bytes(range(256)) * 10)], zipfile.ZIP_DEFLATED)) is None


def test_what_unpacks_to_far_more_than_it_is_is_a_trap() -> None:
    bomb = archive([("a/data.pkl", bytes(2**25))], zipfile.ZIP_DEFLATED)
    assert len(bomb) * MOST_RATIO < 2**25
    assert re.fullmatch(r"is a trap: [\d.]+ KiB that unpack to 32.0 MiB", fault(bomb) or "")


def test_entries_that_share_their_bytes_are_a_trap() -> None:
    whole = archive([("a", bytes(5000)), ("b", b"")])
    start = whole.index(b"PK\x01\x02")
    end = whole.index(b"PK\x05\x06")
    entries = whole[start:end].split(b"PK\x01\x02")[1:]
    many = [b"PK\x01\x02" + entries[0][:-1] + bytes([97 + index]) for index in range(5)]  # a, b, ... at one place
    tail = bytearray(whole[end:])
    struct.pack_into("<HH", tail, 8, 5, 5)
    struct.pack_into("<I", tail, 12, sum(map(len, many)))
    shared = whole[:start] + b"".join(many) + bytes(tail)
    assert (message := fault(shared)) is not None and "so they overlap" in message


def test_two_entries_of_one_name_are_refused() -> None:
    assert (message := fault(archive([("a", b"1"), ("b", b""), ("a", b"2")]))) is not None
    assert message == "has two entries of the name 'a', and readers differ in which they take"


def test_what_unpacks_to_more_than_the_memory_is_refused() -> None:
    assert (message := fault(archive([("a", bytes(2**21))]), 2**20)) is not None
    assert message == "unpacks to 2.0 MiB; at most 1.0 MiB are read (--limit memory=)"


def test_an_end_that_zipfile_does_not_like_is_still_that_of_an_archive() -> None:
    whole = archive([("a", b"1")])
    locator = b"PK\x06\x07" + struct.pack("<LQL", 0, 0, 7)  # of an archive on several disks
    damaged = whole.replace(b"PK\x05\x06", locator + b"PK\x05\x06")
    assert is_archive(io.BytesIO(damaged)) and not is_archive(io.BytesIO(b"no archive"))
    with pytest.raises(zipfile.BadZipFile, match="multiple disks"):
        fault(damaged)


def test_the_loaders_stop_at_a_trap(tmp_path: Path) -> None:
    model = tmp_path / "model.pt"
    torch.save(nn.Linear(100, 100), model)
    with zipfile.ZipFile(model) as saved:
        members = [(name, saved.read(name)) for name in saved.namelist()]
    model.write_bytes(archive([*members, ("archive/data/9", bytes(2**26))], zipfile.ZIP_DEFLATED))
    with pytest.raises(InputError, match=r"model.pt: is a trap: [\d.]+ KiB that unpack to 64.0 MiB"):
        load_model(str(model))
    torch.save(nn.Linear(1000, 1000), model)
    with pytest.raises(InputError, match=r"model.pt: is of 3.8 MiB; at most 1.0 MiB are read"):
        load_model(str(model), limits=Limits(memory=2**20))
    program = tmp_path / "model.pt2"
    program.write_bytes(archive([("model/models/model.json", bytes(2**26))], zipfile.ZIP_DEFLATED))
    for trust in (False, True):
        with pytest.raises(InputError, match="is a trap"):
            load(program, trust=trust)
