"""Files that may have grown without bound, read piece by piece: no more is held than what is asked for."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import IO

from sparksgd.storage import Location

__all__ = ["read_beginning", "read_lines", "read_pieces"]

_PIECE_BYTES = 1 << 20


def read_lines(file: Location, most_bytes: int) -> Iterator[bytes]:
    """Yield the whole lines of a regular file with their line ends; an incomplete last one is left out.

    Args:
        file: to be read.
        most_bytes: a line may have.

    Raises:
        OSError: the file cannot be read, or a line is longer.
    """
    with file.opened() as (stream, size_bytes):
        yield from _lines(stream, size_bytes, most_bytes, str(file))


def _lines(stream: IO[bytes], size_bytes: int, most_bytes: int, where: str) -> Iterator[bytes]:
    for number, line in enumerate(iter(lambda: stream.readline(most_bytes + 1), b""), 1):
        if len(line) > most_bytes:
            raise OSError(
                errno.EFBIG,
                f"its line {number} has more than {most_bytes:,} bytes, which no run writes, and all of it "
                f"{size_bytes:,}: restore the file, or remove what does not belong to it",
                where,
            )
        if line.endswith(b"\n"):
            yield line


def read_pieces(file: Location) -> Iterator[bytes]:
    """Yield what a regular file holds, piece by piece.

    Raises:
        OSError: the file cannot be read.
    """
    with file.opened() as (stream, _):
        yield from iter(lambda: stream.read(_PIECE_BYTES), b"")


def read_beginning(file: Location, count: int) -> bytes:
    """Return the first bytes of a regular file; no bytes if it is shorter.

    Args:
        file: to be read.
        count: how many bytes.

    Raises:
        OSError: the file cannot be read.
    """
    with file.opened() as (stream, size_bytes):
        return stream.read(count) if size_bytes >= count else b""
