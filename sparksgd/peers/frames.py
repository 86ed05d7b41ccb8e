"""Frames that say themselves what is in them: where either end may speak next, in any order.

    header   run, bytes of the head, bytes of the arrays
    head     JSON: kind, fields, and name, type and shape of each array
    arrays   their bytes, one after the other

No frame is longer than both ends agreed, and nothing but plain values and arrays of numbers is in it.
"""

from __future__ import annotations

import json
import math
import struct
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from sparksgd.arithmetic.reused import ReusedArrays
from sparksgd.errors import PeerLost
from sparksgd.peers.wire import Connection, advanced

__all__ = ["Array", "Frame", "FrameReader", "FrameWriter"]

Array = npt.NDArray[Any]

_HEADER = struct.Struct(">8sIQ")
_MOST_HEAD = 1 << 20
_MOST_DIMENSIONS = 4
_MOST_ARRAYS = 256
_MOST_BUFFERS = 64  # of one system call
_TYPES = frozenset({"<f4", "<f8", "<i8", "|b1"})


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One frame."""

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Plain values: what JSON holds."""

    arrays: Mapping[str, Array] = field(default_factory=dict)

    @property
    def array_bytes(self) -> int:
        """Return the bytes of its arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def buffers(self, run: bytes) -> list[memoryview]:
        """Return what is sent; the arrays are not copied, and must not change until they are sent."""
        arrays = {name: np.asarray(array, order="C") for name, array in self.arrays.items()}
        assert len(arrays) <= _MOST_ARRAYS, f"{len(arrays)} arrays are too many for a frame"
        described = [(name, array.dtype.str, array.shape) for name, array in arrays.items()]
        head = json.dumps([self.kind, self.fields, described]).encode()
        header = _HEADER.pack(run, len(head), self.array_bytes)
        return [memoryview(header + head), *(_bytes_of(array) for array in arrays.values() if array.nbytes)]


class FrameWriter:
    """Sends frames, as fast as the other end takes them.

    Args:
        connection: to the other end.
        run: which run, 8 bytes.
    """

    def __init__(self, connection: Connection, run: bytes) -> None:
        self._connection, self._run = connection, run
        self._waiting: deque[memoryview] = deque()

    @property
    def is_empty(self) -> bool:
        """Return whether all was sent."""
        return not self._waiting

    def put(self, frame: Frame) -> None:
        """Add a frame behind the others."""
        self._waiting += frame.buffers(self._run)

    def write(self) -> None:
        """Send what can be sent now.

        Raises:
            OSError: the connection broke.
        """
        while self._waiting:
            sent = self._connection.send_some([*islice(self._waiting, _MOST_BUFFERS)])
            if sent < 0:
                return
            advanced(self._waiting, sent)


class FrameReader:
    """Receives frames.

    Args:
        connection: to the other end.
        run: which run, 8 bytes.
        name: the other end's, for errors.
        most_bytes: how many bytes the arrays of a frame may have.
        arrays: which arrays are received into; None: new ones.
    """

    def __init__(
        self,
        connection: Connection,
        run: bytes,
        name: str,
        most_bytes: int,
        arrays: ReusedArrays | None = None,
    ) -> None:
        self._connection, self._run, self._name, self._most_bytes = connection, run, name, most_bytes
        self._take = np.empty if arrays is None else arrays.take
        self._begin()

    def _begin(self) -> None:
        self._header = bytearray(_HEADER.size)
        self._head: bytearray | None = None
        self._kind, self._fields = "", dict[str, Any]()
        self._arrays: dict[str, Array] | None = None
        self._due = deque([memoryview(self._header)])

    def read(self) -> Frame | None:
        """Receive what is there; return a frame if one is whole now, None if more must arrive.

        Raises:
            PeerLost: the other end has ended, or sent what is no frame of this run.
            OSError: the connection broke.
        """
        while True:
            while self._due:
                received = self._connection.receive_some(self._due[0])
                if received < 0:
                    return None
                if received == 0:
                    raise PeerLost(f"{self._name} closed its connection")
                advanced(self._due, received)
            if self._head is None:
                self._expect_head()
            elif self._arrays is None:
                self._expect_arrays(self._head)
            if not self._due and self._arrays is not None:
                frame = Frame(kind=self._kind, fields=self._fields, arrays=self._arrays)
                self._begin()
                return frame

    def _expect_head(self) -> None:
        run, head_bytes, array_bytes = _HEADER.unpack(self._header)
        if run != self._run or not 0 < head_bytes <= _MOST_HEAD or array_bytes > self._most_bytes:
            raise PeerLost(
                f"{self._name} sent a frame of run {run.hex()} with {head_bytes:,} and {array_bytes:,} "
                f"bytes, where run {self._run.hex()} was due, with {_MOST_HEAD:,} and "
                f"{self._most_bytes:,} at most"
            )
        self._array_bytes = array_bytes
        self._head = bytearray(head_bytes)
        self._due.append(memoryview(self._head))

    def _expect_arrays(self, head: bytearray) -> None:
        try:
            self._kind, self._fields, described = json.loads(bytes(head), parse_int=_whole)
            if type(self._kind) is not str or type(self._fields) is not dict:
                raise TypeError("its kind is no text, or its fields are no object")
            if type(described) is not list or len(described) > _MOST_ARRAYS:
                raise ValueError(f"its arrays are no list of {_MOST_ARRAYS} at most")
            shapes = {_text(name): _checked(kind, shape) for name, kind, shape in described}
            if sum(kind.itemsize * math.prod(shape) for kind, shape in shapes.values()) != self._array_bytes:
                raise ValueError("its arrays have other lengths than it says")
            self._arrays = {name: self._take(shape, kind) for name, (kind, shape) in shapes.items()}
        except (ValueError, TypeError, RecursionError) as error:
            raise PeerLost(f"{self._name} sent what is no frame: {error}") from error
        self._due += [_bytes_of(array) for array in self._arrays.values() if array.nbytes]


def _text(name: Any) -> str:
    if type(name) is not str:
        raise ValueError(f"{name!r:.40} is no name")
    return name


def _whole(digits: str) -> int:
    """Return a whole number of 64 bits and a sign at most: what frames count is less."""
    number = int(digits)
    if number.bit_length() > 64:
        raise ValueError(f"{digits[:40]} is too large")
    return number


def _bytes_of(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _checked(kind: Any, shape: Any) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Return the type and the shape of an array that is announced.

    Raises:
        ValueError: it is none that frames may have.
    """
    is_shape = type(shape) is list and len(shape) <= _MOST_DIMENSIONS
    if kind not in _TYPES or not is_shape or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"an array of type {kind!r} and shape {shape!r} is none of numbers")
    return np.dtype(kind), tuple(shape)
