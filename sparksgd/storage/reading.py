"""Files that may have grown without bound, read piece by piece.

No more of a file is held than what is asked for.  On a file system of Hadoop a file is still read at once,
up to MOST_BYTES_AT_ONCE.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from typing import IO

from sparksgd.storage import LocalLocation, Location

__all__ = ["MOST_BYTES_AT_ONCE", "read_beginning", "read_lines", "read_pieces"]

MOST_BYTES_AT_ONCE = 1 << 30
_PIECE_BYTES = 1 << 20


def read_lines(file: Location, most_bytes: int) -> Iterator[bytes]:
    """Yield the whole lines of a regular file with their line ends; an incomplete last one is left out.

    Args:
        file: to be read.
        most_bytes: a line may have.

    Raises:
        OSError: the file cannot be read, or a line is longer.
    """
    if isinstance(file, LocalLocation):
        with file.opened() as (stream, size_bytes):
            yield from _lines(stream, size_bytes, most_bytes, str(file))
    else:
        data = file.read_bytes(MOST_BYTES_AT_ONCE)
        yield from _lines(io.BytesIO(data), len(data), most_bytes, str(file))


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
    if isinstance(file, LocalLocation):
        with file.opened() as (stream, _):
            yield from iter(lambda: stream.read(_PIECE_BYTES), b"")
    else:
        yield file.read_bytes(MOST_BYTES_AT_ONCE)


def read_beginning(file: Location, count: int) -> bytes:
    """Return the first bytes of a regular file; nothing of a shorter one.

    Args:
        file: to be read.
        count: how many bytes.

    Raises:
        OSError: the file cannot be read.
    """
    if isinstance(file, LocalLocation):
        with file.opened() as (stream, size_bytes):
            return stream.read(count) if size_bytes >= count else b""
    sizes = [one.size_bytes for one in file.files()]
    return b"" if sizes and sum(sizes) < count else file.read_bytes(count + MOST_BYTES_AT_ONCE)[:count]
