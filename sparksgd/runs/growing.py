"""Files of lines that grow during a run, and are noticed if they were changed since.

A checkpoint has the size and the digest of what they were at its step, and summary.json of what they were at
the run's end.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from sparksgd.errors import DataError
from sparksgd.storage import Location
from sparksgd.storage.reading import read_pieces

__all__ = ["Growing", "Kept", "check_kept"]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """How much of a file belongs to a checkpoint, or to a run, and its digest."""

    bytes: int
    sha256: str


class Growing:
    """A file of lines that knows its length and digest.

    Args:
        file: a file of this name is replaced.
        kept: what it begins with.
    """

    def __init__(self, file: Location, kept: bytes = b"") -> None:
        self._lines = file.lines(kept)
        self._bytes, self._digest = len(kept), hashlib.sha256(kept)
        self.is_known = True
        """Whether its length and digest are; a line that was written in part makes them unknown."""

    def write(self, text: str) -> None:
        """Append whole lines."""
        try:
            self._lines.write(text)
        except OSError:
            self.is_known = False
            raise
        data = text.encode()
        self._bytes += len(data)
        self._digest.update(data)

    def flush(self) -> None:
        """Let others read it, but for the last seconds."""
        self._lines.flush()

    def close(self) -> None:
        """Let others read all of it."""
        try:
            self._lines.close()
        except OSError:
            self.is_known = False
            raise

    def memory(self) -> dict[str, Any]:
        """Return its length and digest; others can read that much from now on."""
        self._lines.flush_all()
        return asdict(self.kept())

    def kept(self) -> Kept:
        """Return its length and digest, whether others can read it or not."""
        return Kept(bytes=self._bytes, sha256=self._digest.hexdigest())


def check_kept(file: Location, about: Any) -> None:
    """Check that a file is what a run wrote.

    Args:
        file: of the run.
        about: what its summary has of the file.

    Raises:
        OSError: it cannot be read.
        DataError: it is another one, or is not there.
        TypeError: there is nothing that `Kept` holds.
    """
    digest, size_bytes, kept = hashlib.sha256(), 0, Kept(**about)
    try:
        for piece in read_pieces(file):
            digest.update(piece)
            size_bytes += len(piece)
    except FileNotFoundError as error:
        raise DataError(f"{file} is not there, but the run wrote it: restore it") from error
    if kept != Kept(bytes=size_bytes, sha256=digest.hexdigest()):
        raise DataError(
            f"{file} is damaged, or was changed by hand: it has {size_bytes:,} bytes, and is not the file of "
            f"{kept.bytes:,} bytes that the run wrote. Restore it"
        )
