"""An IDX file is read as it stands, or refused with the reason."""

from __future__ import annotations

import gzip
import os
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparksgd.data.sets.idx import idx_header, read_idx
from sparksgd.errors import DataError

TWO_BY_THREE = bytes.fromhex("00000802 00000002 00000003 0a0b0c 0d0e0f")


def written(folder: Path, content: bytes) -> Path:
    path = folder / "file"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("content", [TWO_BY_THREE, gzip.compress(TWO_BY_THREE)], ids=["plain", "gz"])
def test_a_file_is_read_plain_or_gzipped_whatever_its_name(tmp_path: Path, content: bytes) -> None:
    array = read_idx(written(tmp_path, content))
    assert array.tolist() == [[10, 11, 12], [13, 14, 15]]
    assert array.dtype == "uint8"


def test_the_header_of_a_shape_is_the_one_in_the_file() -> None:
    assert idx_header((2, 3)) == TWO_BY_THREE[:12]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "truncated: its 0 bytes are no whole IDX header"),
        (TWO_BY_THREE[:2], "truncated: its 2 bytes are no whole IDX header"),
        (TWO_BY_THREE[:7], "truncated: its 7 bytes are no whole IDX header"),
        (TWO_BY_THREE[:-1], "truncated: its header promises 12 + 2 x 3 = 18 bytes, but it has 17"),
        (TWO_BY_THREE + b"!", "damaged: its header promises 12 + 2 x 3 = 18 bytes, but it has 19"),
        (b"<html>404</html>", "foreign: it begins with 3c 68 74 6d"),
        (b"\x00\x00\x0d" + TWO_BY_THREE[3:], "foreign: it begins with 00 00 0d 02"),
        (b"\x00\x00\x08\x00", "foreign: it begins with 00 00 08 00"),
        (gzip.compress(TWO_BY_THREE)[:-9], "truncated: its gzip stream stops before its end"),
        (gzip.compress(TWO_BY_THREE)[:-8] + bytes(8), "damaged: CRC check failed"),
    ],
    ids=[
        "empty",
        "half a magic number",
        "half a header",
        "a byte short",
        "a byte long",
        "web page",
        "floats",
        "no dimensions",
        "half a gzip",
        "wrong CRC",
    ],
)
def test_a_flawed_file_is_refused_with_the_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(DataError) as caught:
        read_idx(path)
    assert f"{path} is {reason}" in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere cannot be read: No such file"):
        read_idx(tmp_path / "nowhere")


def test_a_gzip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparksgd.data.sets.idx.MAX_UNPACKED_BYTES", 17)
    with pytest.raises(DataError, match="foreign: it unpacks to more than 17 bytes"):
        read_idx(written(tmp_path, gzip.compress(TWO_BY_THREE)))


MANY = 2**22
"""Bytes of values of a valid file."""


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize(
    ("shape", "values"),
    [((MANY,), MANY), ((2**32 - 1,), MANY), ((2**31, 2**31, 2**31), MANY), ((6,), 2**25), ((0,), 2**25)],
    ids=["valid", "promises 4 GB", "promises more than there is", "a bomb", "a bomb of nothing"],
)
def test_no_file_takes_more_memory_than_a_valid_one_needs(
    tmp_path: Path, pack: type[bytes], shape: tuple[int, ...], values: int
) -> None:
    path = written(tmp_path, pack(idx_header(shape) + bytes(values)))
    tracemalloc.start()
    try:
        if values == MANY and shape == (MANY,):
            assert read_idx(path).shape == (4_194_304,)
        else:
            with pytest.raises(DataError, match=r"truncated|damaged|foreign"):
                read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 3 * MANY
    finally:
        tracemalloc.stop()


def test_of_a_plain_file_of_the_wrong_size_nothing_is_kept(tmp_path: Path) -> None:
    path = written(tmp_path, idx_header((MANY,)) + bytes(MANY - 1))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="truncated: its header promises 8 "):
            read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < MANY / 4
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((1,) * 255, "foreign: its header declares 1 x 1 x 1"),
        ((2**32 - 1,) * 255, "= far more bytes, but it has"),
        ((2**32 - 1, 2**32 - 1, 2**32 - 1, 0), "foreign: its header declares 4294967295 x 4294967295"),
    ],
    ids=["dimensions", "sizes", "sizes of nothing"],
)
def test_a_shape_that_no_array_has_is_refused(tmp_path: Path, shape: tuple[int, ...], reason: str) -> None:
    content = idx_header(shape) + b"x" * (max(shape) == 1)
    with pytest.raises(DataError) as refused:
        read_idx(written(tmp_path, content))
    assert reason in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(DataError, match=f"{path} cannot be read: it is not a regular file"):
            read_idx(path)
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_idx(tmp_path)


WHOLE = [TWO_BY_THREE, gzip.compress(TWO_BY_THREE)]
headers = st.builds(
    idx_header, st.lists(st.sampled_from([0, 1, 2, 3, 2**16, 2**32 - 1]), max_size=5).map(tuple)
)
flawed = st.builds(
    lambda content, at, new, end: (content[:at] + new + content[at + len(new) :])[: len(content) - end],
    st.sampled_from(WHOLE), st.integers(0, 40), st.binary(max_size=4), st.integers(0, 3),
)  # fmt: skip


@given(st.binary(max_size=30) | flawed | st.builds(bytes.__add__, headers, st.binary(max_size=8)))
@settings(max_examples=200, derandomize=True, database=None, deadline=None)
def test_any_bytes_are_an_array_or_refused(content: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            found = str(read_idx(Path(file.name)).dtype)
        except DataError as error:
            found = str(error)
    assert len(found) < 1000
