"""IDX files, the format of MNIST and similar data sets, plain or gzipped.

An IDX file has two zero bytes, a byte for the type (0x08: unsigned bytes, the only one read here), a byte for
the number of dimensions, the size of each dimension as a big-endian 32-bit number, then the values, with the
last dimension running fastest.  Any other file is refused, with the reason.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparksgd.errors import DataError
from sparksgd.imports import shortened
from sparksgd.storage import require_regular

__all__ = ["Unpacked", "idx_header", "parse_idx", "parse_shape", "read_idx", "unpack"]

MAX_UNPACKED_BYTES = 2**28
"""A longer file is refused: the largest of ours has 47 MB, and a gzip bomb must not fill the memory."""

_GZIP_MAGIC = b"\x1f\x8b"
_UNSIGNED_BYTES = b"\x00\x00\x08"
_LONGEST_HEADER_BYTES = 4 + 4 * 255
_CHUNK_BYTES = 2**18
_LARGEST_SAID = 10**18


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes, plain or gzipped.

    Returns:
        A read-only array with the shape that the file declares, dtype uint8.

    Raises:
        DataError: the file is unreadable, damaged, truncated or not IDX.
    """
    return parse_idx(unpack(path), str(path))


@dataclass(frozen=True, kw_only=True)
class Unpacked:
    """What a file holds, unpacked if it begins like gzip, whatever its name is."""

    content: bytes
    """All of it, if its size is the one that its header promises; else its beginning."""

    size_bytes: int
    sha256: str


def unpack(path: Path) -> Unpacked:
    """Read a file piece by piece; only what its header promises is kept.

    Raises:
        DataError: it is unreadable or too large, or its gzip stream is damaged.
    """
    kept: list[bytes] = []
    size_bytes = room_bytes = 0
    digest = hashlib.sha256()
    try:
        require_regular(path)
        with path.open("rb") as raw:
            packed = raw.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
            raw.seek(0)
            stream = gzip.GzipFile(fileobj=raw) if packed else raw
            while chunk := stream.read(_CHUNK_BYTES):
                if not kept:
                    room_bytes = _promised_bytes(chunk, None if packed else path.stat().st_size)
                    kept.append(chunk if room_bytes else chunk[:_LONGEST_HEADER_BYTES])
                elif size_bytes < room_bytes:
                    kept.append(chunk)
                size_bytes += len(chunk)
                digest.update(chunk)
                if size_bytes > MAX_UNPACKED_BYTES:
                    raise DataError(
                        f"{path} is foreign: it unpacks to more than {MAX_UNPACKED_BYTES:,} bytes"
                    )
    except EOFError:
        raise DataError(
            f"{path} is truncated: its gzip stream stops before its end; copy or download it again"
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}; copy or download it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    return Unpacked(content=b"".join(kept), size_bytes=size_bytes, sha256=digest.hexdigest())


def _promised_bytes(head: bytes, size_bytes: int | None) -> int:
    """Return the size that a header promises; 0 if the file cannot have it.

    Args:
        head: how the content begins.
        size_bytes: of the content, if it is known.
    """
    try:
        shape = parse_shape(head, "")
    except DataError:
        return 0
    promised = 4 + 4 * len(shape) + math.prod(shape)
    return promised if promised <= MAX_UNPACKED_BYTES and size_bytes in (None, promised) else 0


def idx_header(shape: tuple[int, ...]) -> bytes:
    """Return the header of an IDX file that holds unsigned bytes of this shape."""
    return _UNSIGNED_BYTES + struct.pack(f">B{len(shape)}I", len(shape), *shape)


def parse_shape(content: bytes, name: str) -> tuple[int, ...]:
    """Return the shape that an IDX header declares; `name` is what an error calls the file."""
    if content[:3] != _UNSIGNED_BYTES[: len(content)] or content[3:4] == b"\x00":
        raise DataError(
            f"{name} is foreign: it begins with {content[:4].hex(' ')}, but an IDX file of "
            "unsigned bytes begins with 00 00 08 and its number of dimensions"
        )
    ndim = content[3] if len(content) > 3 else 0
    if len(content) < 4 + 4 * ndim or not ndim:
        raise DataError(f"{name} is truncated: its {len(content)} bytes are no whole IDX header")
    return struct.unpack_from(f">{ndim}I", content, 4)


def parse_idx(file: Unpacked, name: str) -> NDArray[np.uint8]:
    """Return the array that an unpacked IDX file holds; `name` is what an error calls the file."""
    shape = parse_shape(file.content, name)
    header_bytes = 4 + 4 * len(shape)
    promised_bytes = header_bytes + math.prod(shape)
    sizes = shortened(" x ".join(str(n) for n in shape))
    if file.size_bytes != promised_bytes:
        flaw = "truncated" if file.size_bytes < promised_bytes else "damaged"
        promised = f"{promised_bytes:,}" if promised_bytes <= _LARGEST_SAID else "far more"
        raise DataError(
            f"{name} is {flaw}: its header promises {header_bytes} + {sizes} = {promised} bytes, "
            f"but it has {file.size_bytes:,}; copy or download it again"
        )
    try:
        return np.frombuffer(file.content, np.uint8, offset=header_bytes).reshape(shape)
    except ValueError as error:
        raise DataError(f"{name} is foreign: its header declares {sizes}, which no array has") from error
