"""A file of torch.save that asks for more than it has is refused before torch does what it asks."""

from __future__ import annotations

import io
import pickle
import struct
import tracemalloc
import zipfile
from _codecs import encode
from collections import OrderedDict
from collections.abc import Callable
from functools import reduce
from typing import Any

import pytest
import torch
from torch import _utils

from sparksgd.errors import DataError, ModelError
from sparksgd.training import tensor_archives
from sparksgd.training.saved_state import load_state, saved_state
from sparksgd.training.tensor_archives import BoundedUnpickler, check_archive, check_tree, check_values

VALID_PER_BYTE = 13
"""Bytes of memory that torch.load takes for each byte of a pickle of 2,400 tensors, as measured."""


class Calls:
    """Is pickled as a call."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save({"value": value}, stream)
    return stream.getvalue()


def members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(content: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", kind) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return stream.getvalue()


ALLOWED: dict[str, Callable[[], Any]] = {
    "tensors": lambda: [
        torch.ones(2, 3),
        torch.zeros(0),
        torch.tensor(3),
        torch.arange(9)[2:5],
        torch.ones(2, 3).t(),
    ],
    "types": lambda: [
        torch.ones(3).to(dtype) for dtype in (torch.bool, torch.half, torch.complex64, torch.uint16)
    ],
    "new types": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "sparse": lambda: [torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr()],
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "by channel": lambda: torch.quantize_per_channel(
        torch.ones(3, 2), torch.ones(3), torch.zeros(3), 0, torch.qint8
    ),
    "parameters": lambda: [torch.nn.Parameter(torch.ones(3)), torch.ones(3, requires_grad=True)],
    "conjugates": lambda: torch.ones(2, dtype=torch.complex64).conj(),
    "plain values": lambda: [1, 2.5, "x", None, True, 10**30, 1 + 2j, b"bytes", bytearray(b"more")],
    "containers": lambda: [{"a": {1, 2}}, OrderedDict(b=(1,)), [[]], torch.Size([1]), torch.float32],
}


@pytest.mark.filterwarnings("ignore")  # torch calls some of these deprecated or new
@pytest.mark.parametrize("name", ALLOWED)
def test_what_a_module_may_have_is_allowed(name: str) -> None:
    data = saved(ALLOWED[name]())
    check_archive(data)
    check_values(torch.load(io.BytesIO(data), weights_only=True), len(data))


def storage() -> Any:
    return torch.zeros(3).storage()


HUGE = 10**11
LONG = "x" * 100_000

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a bytearray": (lambda: Calls(bytearray, (HUGE,)), "an empty bytearray of any size"),
    "a storage": (lambda: Calls(torch.UntypedStorage, (HUGE,)), r"calls torch\.storage\.UntypedStorage"),
    "a tensor": (lambda: Calls(torch.Tensor, (HUGE,)), r"calls torch\.Tensor"),
    "a tensor of no memory": (
        lambda: Calls(_utils._rebuild_meta_tensor_no_storage, (torch.float32, (HUGE,), (1,), False)),
        r"calls torch\._utils\._rebuild_meta_tensor_no_storage",
    ),
    "more than the storage": (
        lambda: Calls(_utils._rebuild_tensor_v2, (storage(), 0, (HUGE,), (1,), False, None)),
        r"a tensor of shape \(100000000000,\) is larger than the 12 bytes",
    ),
    "behind the storage": (
        lambda: Calls(_utils._rebuild_tensor_v2, (storage(), 3, (1,), (1,), False, None)),
        r"a tensor of shape \(1,\) is larger than the 12 bytes",
    ),
    "before the storage": (
        lambda: Calls(_utils._rebuild_tensor_v2, (storage(), 2, (2,), (-1,), False, None)),
        "a tensor of it has a strange shape",
    ),
    "the same number often": (lambda: torch.zeros(1).expand(HUGE), r"larger than the 4 bytes"),
    "another type": (
        lambda: Calls(
            _utils._rebuild_tensor_v3,
            (torch.zeros(4, dtype=torch.uint8).untyped_storage(), 0, (4,), (1,), False, None, torch.float64),
        ),
        r"a tensor of shape \(4,\) is larger than the 4 bytes",
    ),
    "quantised": (
        lambda: Calls(
            _utils._rebuild_qtensor,
            (storage(), 0, (HUGE,), (1,), (torch.per_tensor_affine, 1.0, 0), False, OrderedDict()),
        ),
        r"is larger than the 12 bytes",
    ),
    "changed afterwards": (
        lambda: Calls(
            _utils._rebuild_tensor_v2, (storage(), 0, (3,), (1,), False, None), (storage(), 0, (HUGE,), (1,))
        ),
        r"changes what torch\._utils\._rebuild_tensor_v2 gave",
    ),
    "within another call": (
        lambda: Calls(
            torch._tensor._rebuild_from_type_v2,
            (_utils._rebuild_tensor_v2, torch.Tensor, (storage(), 0, (HUGE,), (1,), False, None), {}),
        ),
        r"a tensor of shape \(100000000000,\) is larger",
    ),
    "a call within another": (
        lambda: Calls(torch._tensor._rebuild_from_type_v2, (torch.UntypedStorage, torch.Tensor, (HUGE,), {})),
        r"calls torch\.storage\.UntypedStorage",
    ),
    "a text again and again": (
        lambda: [Calls(encode, (LONG, "latin1")) for _ in range(100)],
        "its pickle makes more than the file has",
    ),
}


@pytest.mark.filterwarnings("ignore")  # of typed storages
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_take_more_than_the_file_has_is_refused(name: str) -> None:
    make, says = REFUSED[name]
    with pytest.raises(DataError, match=says):
        check_archive(saved(make()))


def test_a_storage_larger_than_its_member_is_refused() -> None:
    content = members(saved(torch.ones(4, dtype=torch.uint8)))
    content["archive/data.pkl"] = content["archive/data.pkl"].replace(b"K\x04tq", b"M\x00\x40tq")
    with pytest.raises(DataError, match="a tensor of it is not of the size of its member"):
        check_archive(zipped(content))


def test_names_of_python_2_are_the_same_calls() -> None:
    content = members(saved(1))
    call = b"\x80\x02}X\x05\x00\x00\x00valuec__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85Rs."
    with pytest.raises(DataError, match="an empty bytearray of any size"):
        check_archive(zipped(content | {"archive/data.pkl": call}))


CONTENT = members(saved(torch.ones(1000)))


def with_end(data: bytes, **change: int) -> bytes:
    """Change a number in the last record of a zip file."""
    places = {"size": 12, "start": 16, "comment": 20}
    end = bytearray(data[-22:])
    for name, value in change.items():
        struct.pack_into("<H" if name == "comment" else "<L", end, places[name], value)
    return data[:-22] + bytes(end)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (zipped(CONTENT, zipfile.ZIP_DEFLATED), "is compressed or encrypted"),
        (zipped(CONTENT, zipfile.ZIP_LZMA), "is compressed or encrypted"),
        (zipped(CONTENT | {"archive/DATA/0": b""}), "has a strange name, or is there twice"),
        (zipped(CONTENT | {"archive/a b": b""}), "has a strange name"),
        (zipped(CONTENT | {"other/data/0": b""}), "are not in one folder"),
        (zipped(CONTENT | {"archive/byteorder": b"big"}), "its byte order is 'big'"),
        (zipped({"archive/version": b"3"}), r"it has no data\.pkl"),
        (b"before" + zipped(CONTENT), "the end of the archive is not as torch.save writes it"),
        (zipped(CONTENT) + b"behind", "the end of the archive is not as torch.save writes it"),
        (with_end(zipped(CONTENT) + b"", comment=1), "the end of the archive is not|truncated"),
    ],
    ids=[
        "deflated", "lzma", "twice", "space", "two folders", "byte order", "no pickle", "before", "behind",
        "comment",
    ],
)  # fmt: skip
def test_another_archive_than_torch_writes_is_refused(data: bytes, says: str) -> None:
    with pytest.raises((DataError, zipfile.BadZipFile), match=says):
        check_archive(data)


def test_members_that_are_the_same_bytes_of_the_file_are_refused() -> None:
    data = zipped({"archive/data.pkl": members(saved(1))["archive/data.pkl"], "archive/data/0": bytes(5000)})
    start = struct.unpack("<L", data[-6:-2])[0]
    entries = data[start:-22]
    last = entries[entries.rindex(b"PK\x01\x02") :]
    for number in range(1, 9):
        entries += last.replace(b"data/0", f"data/{number}".encode())
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 10, 10, len(entries), start, 0)
    with pytest.raises(DataError, match=r"its members have [\d,]+ bytes, but the file has"):
        check_archive(data[:start] + entries + end)


def test_a_member_with_two_sizes_is_refused() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        info = zipfile.ZipInfo("archive/data.pkl")
        info.extra = struct.pack("<HHQ", 0x7777, 8, 1) * 2
        archive.writestr(info, b"x")
    with pytest.raises(DataError, match="has strange extra fields"):
        check_archive(stream.getvalue())


@pytest.mark.parametrize(
    "pickled",
    [
        pickle.BYTEARRAY8 + struct.pack("<Q", 1 << 40) + b".",
        b"N"
        + pickle.LONG_BINPUT
        + struct.pack("<L", 1 << 31)
        + pickle.LONG_BINGET
        + struct.pack("<L", 1)
        + b".",
        pickle.EXT1 + b"\x01.",
    ],
    ids=["bytes", "memory", "extension"],
)
def test_a_pickle_takes_no_more_memory_than_it_has_bytes(pickled: bytes) -> None:
    with pytest.raises((KeyError, pickle.UnpicklingError, DataError)):
        BoundedUnpickler(b"\x80\x05" + pickled).load()


TENSOR = (  # a storage is value 5, a function and the arguments of a tensor are 9 and 11
    b"X\7\0\0\0storageq\0ctorch\nFloatStorage\nq\1X\1\0\0\x000q\2X\3\0\0\0cpuq\3K\1q\4(h\0h\1h\2h\3h\4tq\5h\5Qq\6K\0q\7)q\x08"
    b"ctorch._utils\n_rebuild_tensor_v2\nq\x09ccollections\nOrderedDict\nq\x0a(h\6h\7h\x08h\x08\x89h\x0a)Rtq\x0b"
)
REPEATED = {
    "lists": b"]", "tables": b"}", "marks": b"(", "sets": b"\x8f", "tuples": b")" + 15 * b"\x85",
    "storages": b"h\5Q", "tensors": b"h\x09h\x0bR", "tables by calls": b"h\x0a)R",
}  # fmt: skip


@pytest.mark.parametrize("name", [*REPEATED, "names", "places in memory"])
def test_instructions_of_a_byte_that_make_much_are_counted(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 1 << 16
    monkeypatch.setattr(tensor_archives, "_FREE_MADE_BYTES", size)
    repeated = {
        "names": b"".join(b"cA\n%x\n" % number for number in range(size // 8)),
        "places in memory": b"Nr\xff\xff\xff\0",
    } | {name: each * (size // len(each)) for name, each in REPEATED.items()}
    content = members(saved(torch.ones(1))) | {"archive/data.pkl": b"\x80\2" + TENSOR + repeated[name] + b"."}
    data = zipped(content)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"far more lists, tables or calls than bytes|remembers value 16,777"):
        check_archive(data)
    most_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most_bytes < 3 * VALID_PER_BYTE * len(data)


def test_many_small_tensors_lists_and_tables_are_no_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_archives, "_FREE_MADE_BYTES", 1 << 16)
    for value in (
        {str(number): torch.tensor(1.0) for number in range(500)},
        [[number] for number in range(500)],
        [{"a": {}} for _ in range(500)],
        [((), (None,)) for _ in range(500)],
        [OrderedDict() for _ in range(200)],
    ):
        data = saved(value)
        pickled_bytes = len(members(data)["archive/data.pkl"])
        tracemalloc.start()
        check_archive(data)
        torch.load(io.BytesIO(data), weights_only=True)
        assert tracemalloc.get_traced_memory()[1] < 3 * VALID_PER_BYTE * pickled_bytes + (1 << 16)
        tracemalloc.stop()


def test_lists_that_hold_each_other_are_refused() -> None:
    doubled = reduce(lambda inner, _: [inner, inner], range(60), [1])
    with pytest.raises(DataError, match="hold each other so often"):
        check_tree(doubled, 1000)
    itself: list[Any] = []
    itself.append(itself)
    with pytest.raises(DataError, match="nested more than 100 deep"):
        check_tree(itself, 1000)
    with pytest.raises(DataError, match="hold each other so often"):
        check_tree([[0] * 100_000] * 200, 1000)
    check_tree([[1, {"a": (2, 3)}]] * 1000, 1000)
    check_tree([[0] * 10_000] * 200, 1000)


@pytest.mark.parametrize("values", [[1], 5, None, {1: 2}, {"a": torch.ones(1, device="meta")}])
def test_what_is_no_table_of_values_is_refused(values: Any) -> None:
    with pytest.raises(DataError, match=r"but must hold values by their names|is on meta"):
        check_values(values, 100)


class Holds(torch.nn.Module):
    """Has a plain value that its users set."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def test_many_views_of_one_storage_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_archives, "_FREE_MADE_BYTES", 1 << 16)
    storage, stream = torch.zeros(100), io.BytesIO()
    torch.save({"views": [storage[number % 90 : number % 90 + 2] for number in range(5_000)]}, stream)
    check_archive(stream.getvalue())


@pytest.mark.parametrize("length", [10, 4000])
def test_what_makes_so_much_that_it_could_not_be_loaded_is_not_saved(
    monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setattr(tensor_archives, "_FREE_MADE_BYTES", 1 << 16)
    monkeypatch.setattr(tensor_archives, "_MADE_OF_EACH_BYTE", 16)  # as if instructions made more
    module = Holds([{} for _ in range(length)])
    if length == 10:
        load_state(Holds([]), saved_state(module, {"value"}))
        return
    with pytest.raises(ModelError, match=r"^value cannot be saved, because nobody could read it: "):
        saved_state(module, {"value"})
