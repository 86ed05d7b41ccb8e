"""A file of tensors is the one that its entry names, or it is refused before it is parsed."""

from __future__ import annotations

import hashlib
import os
import tracemalloc
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparksgd.errors import DataError, ModelError
from sparksgd.runs.checked_files import FileEntry, read_checked, read_unlisted, write_checked
from sparksgd.storage import location

VALUES = {"weight": torch.arange(6.0).view(2, 3), "steps": 5, "names": ["a", ("b", None)], "deep": {"x": 1.5}}


@pytest.fixture
def entry(tmp_path: Path) -> FileEntry:
    return write_checked(location(tmp_path), "weights.pt", VALUES)


def test_what_is_written_is_read_back(tmp_path: Path, entry: FileEntry) -> None:
    read = read_checked(location(tmp_path), entry)
    assert torch.equal(read.pop("weight"), VALUES["weight"])
    assert read == {"steps": 5, "names": ["a", ("b", None)], "deep": {"x": 1.5}}


def test_the_entry_has_the_size_and_the_digest_of_the_file(tmp_path: Path, entry: FileEntry) -> None:
    data = (tmp_path / "weights.pt").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    assert entry == FileEntry(name="weights.pt", size_bytes=len(data), sha256=digest)
    assert FileEntry.of(asdict(entry), "model.json: weights") == entry


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"size_bytes": 7}, r"it has [\d,]+ bytes, but may have 7 at most"),
        ({"size_bytes": 10**12}, r"has [\d,]+ bytes, but its manifest says 1,000,000,000,000"),
        (
            {"sha256": "0" * 64},
            r"is not the file that its manifest names: its SHA-256 is \w{16}\.\.\., but",
        ),
        ({"name": "nothing.pt"}, r"nothing.pt cannot be read: No such file"),
    ],
)
def test_a_file_that_is_not_that_of_its_entry_is_refused(
    tmp_path: Path, entry: FileEntry, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        read_checked(location(tmp_path), replace(entry, **change))


def test_every_flipped_bit_is_noticed(tmp_path: Path, entry: FileEntry) -> None:
    data = (tmp_path / "weights.pt").read_bytes()
    for bit in range(0, 8 * len(data), 97):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "weights.pt").write_bytes(flipped)
        with pytest.raises(DataError, match="is not the file that its manifest names"):
            read_checked(location(tmp_path), entry)


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", ".hidden", "-x", "../weights.pt", "a/weights.pt", "/dev/zero", "a\\b", "weights.pt\n",
        "w\0", "hdfs:x", "é", "x" * 201, 5, None, ["weights.pt"],
    ],
)  # fmt: skip
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, entry: FileEntry, name: Any) -> None:
    for read in (
        lambda: FileEntry.of(asdict(entry) | {"name": name}, "model.json: weights"),
        lambda: read_checked(location(tmp_path), replace(entry, name=name)),
        lambda: read_unlisted(location(tmp_path), name),
        lambda: write_checked(location(tmp_path), name, {}),
    ):
        with pytest.raises(DataError, match="must be the name of a file in the same folder"):
            read()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"size_bytes": -1}, "size_bytes is -1, but must be a whole number from 0"),
        ({"size_bytes": True}, "size_bytes is True, but"),
        ({"size_bytes": 5.0}, r"size_bytes is 5\.0, but"),
        ({"sha256": "A" * 64}, "sha256 is 'AAAA.*, but must be 64 hexadecimal digits"),
        ({"sha256": None}, "sha256 is None, but"),
        ({"more": 1}, "must have name, size_bytes and sha256"),
    ],
)
def test_an_entry_that_cannot_be_is_refused(entry: FileEntry, change: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=rf"^model\.json: weights.*{says}"):
        FileEntry.of(asdict(entry) | change, "model.json: weights")


@pytest.mark.parametrize("size_bytes", [None, 10**9])
def test_what_is_no_regular_file_is_not_read(
    tmp_path: Path, entry: FileEntry, size_bytes: int | None
) -> None:
    (tmp_path / "zero.pt").symlink_to("/dev/zero")
    (tmp_path / "link.pt").symlink_to("zero.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "folder.pt").mkdir()
    for name in ("zero.pt", "link.pt", "pipe.pt", "folder.pt"):
        said = rf"{name} cannot be read: (it is not a regular|Is a directory)"
        with pytest.raises(DataError, match=said):
            read_unlisted(location(tmp_path), name)
        with pytest.raises(DataError, match=said):
            read_checked(location(tmp_path), replace(entry, name=name, size_bytes=10**9))


def test_a_link_to_a_regular_file_is_one(tmp_path: Path, entry: FileEntry) -> None:
    (tmp_path / "weights.pt").rename(tmp_path / "elsewhere")
    (tmp_path / "weights.pt").symlink_to("elsewhere")
    assert read_checked(location(tmp_path), entry)["steps"] == 5


def test_a_file_that_grows_by_decompression_is_refused_before_it_does(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(8_000_000)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "weights.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in plain.infolist():
            bomb.writestr(member.filename, plain.read(member))
    data = (tmp_path / "weights.pt").read_bytes()
    entry = FileEntry(name="weights.pt", size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    assert len(data) < 100_000
    tracemalloc.start()
    try:
        for read in (
            lambda: read_checked(location(tmp_path), entry),
            lambda: read_unlisted(location(tmp_path), "weights.pt"),
        ):
            with pytest.raises(DataError, match=r"is refused: its member plain/data\.pkl is compressed"):
                read()
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not written, because nobody could read it: a tensor of shape"):
        write_checked(location(tmp_path), "weights.pt", {"weight": torch.zeros(1).expand(1000)})
    assert not (tmp_path / "weights.pt").exists()


def test_what_is_no_file_of_torch_is_refused(tmp_path: Path) -> None:
    for data in (b"", b"PK", b"PK\x05\x06" + bytes(18), b"no zip file at all" * 10):
        (tmp_path / "weights.pt").write_bytes(data)
        with pytest.raises(DataError, match=r"weights\.pt (is refused|holds no tensors and plain values)"):
            read_unlisted(location(tmp_path), "weights.pt")
