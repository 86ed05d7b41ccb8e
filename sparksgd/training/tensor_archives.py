"""What may be in a file of torch.save: looked at before torch parses it.

`torch.load(weights_only=True)` runs no code of the file's choice.  But it believes sizes: of compressed
members, of storages, of tensors, of what the pickle asks it to make.  `check_archive` reads the list of
members, and the pickle with stand-ins that make nothing, and refuses what asks for more than the file has.
`check_values` looks at what came out.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

import torch

from sparksgd.errors import DataError

__all__ = ["BoundedUnpickler", "check_archive", "check_tree", "check_values", "makes_little"]

_NAME = re.compile(r"[!-~]+")
_MOST_PICKLED_BYTES = 64 << 20
_FREE_BYTES = 1 << 20
"""What small files may ask for beyond their own size."""

_FREE_CONTAINERS = 1 << 18
_FREE_VALUES = 1 << 24
"""As many may a small file hold, if a list holds another one many times."""

_DEEPEST = 100

_ITEM_BYTES = {
    "Bool": 1, "Byte": 1, "Char": 1, "Untyped": 1, "QInt8": 1, "QUInt8": 1, "QUInt4x2": 1, "QUInt2x4": 1,
    "Short": 2, "Half": 2, "BFloat16": 2, "Int": 4, "Float": 4, "QInt32": 4, "Long": 8, "Double": 8,
    "ComplexFloat": 8, "ComplexDouble": 16,
}  # fmt: skip
"""By the name of a storage, without "Storage"; torch writes newer types of numbers as Untyped."""

_OF_STORAGE = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor")
_CALLED = {
    *(f"torch._utils.{name}" for name in _OF_STORAGE),
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._utils._rebuild_sparse_tensor",
    "torch._tensor._rebuild_from_type_v2",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
    "torch.Size",
    "torch.device",
    "collections.OrderedDict",
    "collections.Counter",
    "_codecs.encode",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.set",
}
"""What a pickle may call, besides what the user let torch load by torch.serialization.add_safe_globals."""

_TORCHS = ("torch", "collections", "_codecs", "builtins")


def check_archive(data: bytes) -> None:
    """Refuse a file of torch.save that asks for more than it has.

    Raises:
        DataError: it does, or is no such file.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        _check_ends(data)
        sizes = _check_members(archive, len(data))
        top = next(iter(sizes)).partition("/")[0]
        if f"{top}/data.pkl" not in sizes:
            raise DataError("it has no data.pkl, so torch.save did not write it")
        if sizes[f"{top}/data.pkl"] > _MOST_PICKLED_BYTES:
            raise DataError(
                f"{sizes[f'{top}/data.pkl']:,} bytes of it are no tensors, but may be "
                f"{_MOST_PICKLED_BYTES:,}: keep long lists as tensors"
            )
        order = archive.read(f"{top}/byteorder").decode() if f"{top}/byteorder" in sizes else "little"
        if order != sys.byteorder:
            raise DataError(f"its byte order is {order!r}, but this machine's is {sys.byteorder}")
        pickled = archive.read(f"{top}/data.pkl")
    _Scan(
        pickled, {name.removeprefix(f"{top}/data/"): size for name, size in sizes.items()}, len(data)
    ).load()


def _check_ends(data: bytes) -> None:
    """Refuse an archive in which two readers could see two lists of members."""
    end, list_end = data[-22:], len(data) - 22
    size, start = struct.unpack("<LL", end[12:20]) if len(end) == 22 else (0, 0)
    if data[-42:-38] == b"PK\x06\x07":
        list_end = len(data) - 98
        if struct.unpack("<Q", data[-34:-26])[0] != list_end or data[-98:-94] != b"PK\x06\x06":
            raise DataError("the end of the archive is not as torch.save writes it")
        size, start = struct.unpack("<QQ", data[-58:-42])
    if not (end.startswith(b"PK\x05\x06") and end.endswith(b"\0\0") and start + size == list_end):
        raise DataError("the end of the archive is not as torch.save writes it")


def _check_members(archive: zipfile.ZipFile, size_bytes: int) -> dict[str, int]:
    """Return the size of each member of an archive of this many bytes."""
    sizes: dict[str, int] = {}
    seen: set[str] = set()
    for member in archive.infolist():
        name = member.orig_filename
        if not _NAME.fullmatch(name) or name != member.filename or name.lower() in seen:
            raise DataError(f"its member {name[:80]!r} has a strange name, or is there twice")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise DataError(
                f"its member {name[:80]} is compressed or encrypted, but torch.save stores its members"
            )
        if member.file_size != member.compress_size or member.header_offset + member.file_size > size_bytes:
            raise DataError(
                f"its member {name[:80]} is said to have {member.file_size:,} bytes, but the file has "
                f"{size_bytes:,}"
            )
        _check_extra(member)
        seen.add(name.lower())
        sizes[name] = member.file_size
    if sum(sizes.values()) > size_bytes:
        raise DataError(f"its members have {sum(sizes.values()):,} bytes, but the file has {size_bytes:,}")
    if len({name.partition("/")[0] for name in sizes}) != 1:
        raise DataError("its members are not in one folder, so torch.save did not write it")
    return sizes


def _check_extra(member: zipfile.ZipInfo) -> None:
    """Refuse a member that has sizes of 64 bits twice."""
    kinds, rest = [], member.extra
    while len(rest) >= 4:
        kind, length = struct.unpack("<HH", rest[:4])
        kinds.append(kind)
        rest = rest[4 + length :]
    if rest or len(set(kinds)) != len(kinds):
        raise DataError(f"its member {member.filename[:80]} has strange extra fields")


_MADE_BYTES = {
    pickle.MARK: 64, pickle.EMPTY_LIST: 72, pickle.LIST: 72, pickle.EMPTY_DICT: 80, pickle.DICT: 80,
    pickle.EMPTY_SET: 232, pickle.FROZENSET: 232, pickle.TUPLE: 64, pickle.TUPLE1: 64, pickle.TUPLE2: 64,
    pickle.TUPLE3: 72, pickle.REDUCE: 240, pickle.NEWOBJ: 240, pickle.NEWOBJ_EX: 240, pickle.OBJ: 240,
    pickle.INST: 240, pickle.BUILD: 104, pickle.PERSID: 200, pickle.BINPERSID: 200,
}  # fmt: skip
"""What instructions of one byte make.  The other ones have the more bytes, the more they make."""

_NAMED_BYTES, _TENSOR_BYTES = 2200, 600
_FREE_MADE_BYTES = 16 << 20
_MADE_OF_EACH_BYTE = 34
"""So many bytes may be made for each byte of a pickle, beyond the free ones.  What torch.save writes makes
from 6 (tensors with names of 200 letters) to 33 (views of one storage in a list)."""


_OF_PLAIN = (
    pickle.MARK, pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2,
    pickle.TUPLE3, pickle.REDUCE,
)  # fmt: skip
_LEFT_OUT = {*pickle.BYTEARRAY8, *pickle.NEXT_BUFFER, *pickle.EXT1, *pickle.EXT2, *pickle.EXT4}


def _counted(code: int, load: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return what loads an instruction, and counts what it makes."""
    made_bytes = _MADE_BYTES.get(bytes([code]))
    if made_bytes is None:
        return load

    def counted(unpickler: BoundedUnpickler) -> None:
        unpickler.makes(made_bytes)
        load(unpickler)

    return counted


class BoundedUnpickler(pickle._Unpickler):
    """Reads a pickle in memory that is bounded by its size.

    The one in C makes room for as many remembered values as a pickle says, and some instructions for as many
    bytes.

    Args:
        pickled: the pickle.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        code: _counted(code, load)
        for code, load in pickle._Unpickler.dispatch.items()
        if code not in _LEFT_OUT
    }

    def __init__(self, pickled: bytes) -> None:
        super().__init__(io.BytesIO(pickled))
        self.memo = _Memo()
        self._unmade_bytes = _FREE_MADE_BYTES + _MADE_OF_EACH_BYTE * len(pickled)

    def makes(self, made_bytes: int) -> None:
        """Count what is made, and refuse more than any file needs that torch.save wrote."""
        self._unmade_bytes -= made_bytes
        if self._unmade_bytes < 0:
            raise DataError(
                "its pickle makes far more lists, tables or calls than bytes: keep what is that much in a "
                "tensor or an array"
            )


def makes_little(pickled: bytes) -> bool:
    """Return whether a pickle is so far from the bound of `BoundedUnpickler` that it need not be read.

    Args:
        pickled: plain values, as the pickler in C writes them in protocol 4.
    """
    made_bytes = sum(pickled.count(code) * _MADE_BYTES[code] for code in _OF_PLAIN)  # texts have some, too
    return made_bytes <= _FREE_MADE_BYTES + _MADE_OF_EACH_BYTE * len(pickled)


class _Memo(list[Any]):
    """What a pickle remembers: by numbers from 0 on, as every pickler gives them."""

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise KeyError(number)
        return super().__getitem__(number)

    def __setitem__(self, number: Any, value: Any) -> None:
        if number > len(self):
            raise DataError(f"its pickle remembers value {number:,}, but {len(self):,} are there before it")
        if number == len(self):
            self.append(value)
        else:
            super().__setitem__(number, value)


class _Storage:
    """Stands for a storage of the file."""

    def __init__(self, size_bytes: int, item_bytes: int) -> None:
        self.size_bytes, self.item_bytes = size_bytes, item_bytes

    def __setstate__(self, state: Any) -> None:
        raise DataError("its pickle changes a storage")


class _StandIn:
    """Stands for anything that a pickle names; its subclasses for one name each."""

    path: ClassVar[str]
    scan: ClassVar[_Scan]

    def __new__(cls, *args: Any) -> _StandIn:
        cls.scan.called(cls.path, args)
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if self.path.startswith(_TORCHS) and self.path != "collections.OrderedDict":
            raise DataError(f"its pickle changes what {self.path} gave")

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _Scan(BoundedUnpickler):
    """Reads a pickle, makes nothing, and refuses what would make too much."""

    def __init__(self, pickled: bytes, storages: Mapping[str, int], size_bytes: int) -> None:
        super().__init__(pickled)
        self._storages, self._left = storages, size_bytes + _FREE_BYTES
        self._names: dict[str, type[_StandIn]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name."""
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        path = f"{module}.{name}"
        if path not in self._names:
            self.makes(_NAMED_BYTES)
            self._names[path] = type("StandIn", (_StandIn,), {"path": path, "scan": self})
        return self._names[path]

    def persistent_load(self, pid: Any) -> _Storage:
        """Return what stands for a storage, after its size is compared with its member's."""
        match pid:
            case ("storage", type() as kind, str() as key, str(), int() as count) if issubclass(
                kind, _StandIn
            ):
                module, _, name = kind.path.rpartition(".")
                item_bytes = _ITEM_BYTES.get(name.removesuffix("Storage"))
                if (
                    module in ("torch", "torch.storage")
                    and name.endswith("Storage")
                    and item_bytes is not None
                    and self._storages.get(key) == count * item_bytes
                ):
                    return _Storage(count * item_bytes, item_bytes)
        raise DataError("a tensor of it is not of the size of its member")

    def called(self, path: str, args: tuple[Any, ...]) -> None:
        """Refuse a call that makes more than the file has.

        Args:
            path: what is called.
            args: its arguments.
        """
        if path.partition(".")[0] in _TORCHS and path not in _CALLED:
            raise DataError(f"its pickle calls {path}, which no file of tensors and plain values needs")
        self._left -= sum(
            len(arg) for arg in args if isinstance(arg, str | bytes | list | tuple | dict | set)
        )
        if self._left < 0:
            raise DataError("its pickle makes more than the file has")
        if path == "builtins.bytearray" and args and isinstance(args[0], int):
            raise DataError("its pickle makes an empty bytearray of any size")
        if path.removeprefix("torch._utils.") in _OF_STORAGE:
            self.makes(_TENSOR_BYTES)
            self._check_tensor(args)
        if path == "torch._tensor._rebuild_from_type_v2":
            make, _, inner, *_ = args
            if not (isinstance(make, type) and issubclass(make, _StandIn)):
                raise DataError("its pickle calls something that it made itself")
            make(*inner)

    @staticmethod
    def _check_tensor(args: tuple[Any, ...]) -> None:
        storage, offset, size, stride, *others = args
        numbers = [offset, *size, *stride]
        if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in numbers):
            raise DataError("a tensor of it has a strange shape")
        dtype = getattr(torch, others[2].path.removeprefix("torch."), None) if _has_dtype(others) else None
        item_bytes = dtype.itemsize if isinstance(dtype, torch.dtype) else storage.item_bytes
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else 0
        if (max(count, last + 1) if count else 0) * item_bytes > storage.size_bytes:
            raise DataError(
                f"a tensor of shape {tuple(size)} is larger than the {storage.size_bytes:,} bytes that the "
                f"file has of it"
            )


def _has_dtype(others: list[Any]) -> bool:
    """Return whether the arguments after the strides name the type of the numbers."""
    return len(others) > 2 and isinstance(others[2], type) and issubclass(others[2], _StandIn)


def check_values(values: object, size_bytes: int) -> None:
    """Refuse what torch read from a file unless it is a dictionary of tensors and plain values.

    Args:
        values: what it read.
        size_bytes: of the file.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise DataError(f"it holds a {type(values).__name__}, but must hold values by their names")
    check_tree(values, size_bytes)


def check_tree(values: Collection[object], size_bytes: int) -> None:
    """Refuse values that are nested deeply, or that are far more than what they were read from.

    A list may hold another one many times; whoever walks through it or prints it then takes forever.

    Args:
        values: what was read, a list or another collection.
        size_bytes: of what it was read from.

    Raises:
        DataError: they are nested too deeply, or too many.
    """
    waiting: list[tuple[Any, int]] = [(values, 0)]
    containers, held = size_bytes + _FREE_CONTAINERS, size_bytes + _FREE_VALUES
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, torch.Tensor):
            if value.device.type != "cpu":
                raise DataError(f"a tensor of it is on {value.device}")
            continue
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        containers, held = containers - 1, held - len(inner)
        if containers < 0 or held < 0:
            raise DataError("its lists hold each other so often that they are far more than the file")
        if depth > _DEEPEST:
            raise DataError(f"its values are nested more than {_DEEPEST} deep")
        if any(issubclass(kind, _LOOKED_INTO) for kind in set(map(type, inner))):  # a long list has few types
            waiting += [(each, depth + 1) for each in inner if isinstance(each, _LOOKED_INTO)]


_LOOKED_INTO = (dict, list, tuple, set, frozenset, torch.Tensor)
