"""Files of tensors that are checked before they are believed: name, size, digest, then what is in them.

`write_checked` returns an entry: name, size and SHA-256.  The entry goes into a manifest, such as model.json.
`read_checked` reads the file of an entry, and believes nothing of it before it is checked:

    name        one plain name, so that it lies in the folder
    file        a regular file of the size that the entry states; a longer one is not read
    digest      that of the entry, before anything is parsed
    archive     members are stored, not compressed, and no larger than the file (tensor_archives.py)
    content     tensors and plain values, by torch.load(weights_only=True), none larger than what was read

So reading takes a few times the memory that the file has on the disk, and runs no code.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from sparksgd.errors import DataError, ModelError, SparkSGDError
from sparksgd.imports import out_of_memory_told
from sparksgd.storage import Location, unanswered
from sparksgd.training.tensor_archives import check_archive, check_values

__all__ = [
    "FileEntry",
    "check_name",
    "checked_bytes",
    "is_sha256",
    "read_checked",
    "read_unlisted",
    "shown",
    "write_checked",
]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """What a manifest says of a file."""

    name: str
    """Letters, digits, `_`, `.` and `-`: it lies in the folder of the manifest."""

    size_bytes: int
    """Its size."""

    sha256: str
    """The digest of its bytes, as 64 hexadecimal digits."""

    @classmethod
    def of(cls, values: object, where: str) -> Self:
        """Return the entry that a manifest has as a table of these three keys.

        Args:
            values: what the manifest has.
            where: what errors call it, such as "model.json: files.weights".

        Raises:
            DataError: it is not such a table, or a value is out of range.
        """
        if not isinstance(values, Mapping) or set(values) != {"name", "size_bytes", "sha256"}:
            raise DataError(f"{where} is {shown(values)}, but must have name, size_bytes and sha256")
        name, size, sha256 = values["name"], values["size_bytes"], values["sha256"]
        check_name(name, f"{where}.name")
        if type(size) is not int or size < 0:
            raise DataError(f"{where}.size_bytes is {shown(size)}, but must be a whole number from 0")
        if not is_sha256(sha256):
            raise DataError(f"{where}.sha256 is {shown(sha256)}, but must be 64 hexadecimal digits")
        return cls(name=name, size_bytes=size, sha256=sha256)


def check_name(name: object, where: str) -> None:
    """Refuse a name of a file that could lead out of its folder.

    Args:
        name: what a manifest has.
        where: what errors call it.

    Raises:
        DataError: it is not one plain name.
    """
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise DataError(
            f"{where} is {shown(name)}, but must be the name of a file in the same folder: at most 200 "
            f"letters, digits, _, . and -, without a separator, and not beginning with . or -"
        )


def write_checked(folder: Location, name: str, values: Mapping[str, Any]) -> FileEntry:
    """Write tensors and plain values to a file, and return what a manifest must say of it.

    Args:
        folder: created if it does not exist.
        name: of the file.
        values: by name, what torch.load(weights_only=True) reads.

    Raises:
        OSError: it cannot be written.
        ModelError: `read_checked` would refuse it; nothing is written.
    """
    check_name(name, "the name of a file to write")
    stream = io.BytesIO()
    torch.save(dict(values), stream)
    data = stream.getvalue()
    try:
        check_archive(data)
        check_values(dict(values), len(data))
    except DataError as error:
        raise ModelError(f"{folder}/{name} is not written, because nobody could read it: {error}") from error
    (folder / name).write_bytes(data)
    return FileEntry(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def read_checked(folder: Location, entry: FileEntry) -> dict[str, Any]:
    """Return the tensors and plain values of a file, which `write_checked` wrote.

    Args:
        folder: has the file.
        entry: of the manifest.

    Raises:
        DataError: the file is missing, is another one, or holds anything else.
        ClusterError: its file system does not answer.
    """
    return _parsed(checked_bytes(folder, entry), f"{folder}/{entry.name}")


def checked_bytes(folder: Location, entry: FileEntry) -> bytes:
    """Return what a file holds, if it is the one of the manifest.

    Raises:
        DataError: the file is missing, or is another one.
        ClusterError: its file system does not answer.
    """
    where = f"{folder}/{entry.name}"
    check_name(entry.name, "the name of a file to read")
    data = _bytes_of(folder, entry.name, entry.size_bytes)
    if len(data) != entry.size_bytes:
        raise DataError(
            f"{where} has {len(data):,} bytes, but its manifest says {entry.size_bytes:,}: it is cut off, "
            f"or of another run"
        )
    found = hashlib.sha256(data).hexdigest()
    if found != entry.sha256:
        raise DataError(
            f"{where} is not the file that its manifest names: its SHA-256 is {found[:16]}..., but must be "
            f"{entry.sha256[:16]}.... It is damaged, or of another run: restore it"
        )
    return data


def read_unlisted(folder: Location, name: str) -> dict[str, Any]:
    """Return the tensors and plain values of a file that no manifest has a size and a digest of.

    Args:
        folder: has the file.
        name: of the file.

    Raises:
        DataError: the file is missing, or holds anything else.
        ClusterError: its file system does not answer.
    """
    check_name(name, "the name of a file to read")
    return _parsed(_bytes_of(folder, name, None), f"{folder}/{name}")


def _bytes_of(folder: Location, name: str, most_bytes: int | None) -> bytes:
    """Return what a regular file holds.

    Args:
        folder: has the file.
        name: of the file.
        most_bytes: a longer one is not read.

    Raises:
        DataError: it is missing, too long, or a device, a pipe or a folder.
        ClusterError: its file system does not answer.
    """
    try:
        with out_of_memory_told(f"reading {folder}/{name}"):
            return (folder / name).read_bytes(most_bytes)
    except OSError as error:
        refusal = DataError(f"{folder}/{name} cannot be read: {error.strerror}")
        raise unanswered(error, refusal) from error


def _parsed(data: bytes, where: str) -> dict[str, Any]:
    try:
        with out_of_memory_told(f"reading {where}"):
            check_archive(data)
            with torch.sparse.check_sparse_tensor_invariants():  # type: ignore[no-untyped-call]  # torch gives no types
                values = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            check_values(values, len(data))
    except DataError as error:
        raise DataError(f"{where} is refused: {error}") from error
    except SparkSGDError:
        raise
    except Exception as error:  # what torch and zipfile raise for strange bytes is not documented
        told = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = next((line for line in told if not line.startswith("Weights only load failed")), "")
        raise DataError(
            f"{where} holds no tensors and plain values as torch.save writes them: "
            f"{type(error).__name__}: {why}"
        ) from error
    return dict(values)


def is_sha256(value: object) -> bool:
    """Return whether a value is 64 hexadecimal digits."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def shown(value: object) -> str:
    """Return a value of a manifest as errors show it."""
    if not isinstance(value, str | int | float | None) or (type(value) is int and abs(value) > 1 << 64):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
