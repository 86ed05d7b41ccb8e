"""An IDX file is read as it stands, or refused with the reason."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

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
