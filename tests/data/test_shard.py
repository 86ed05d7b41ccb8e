"""A shard's file gives back the rows that were written, or says that it is not what it was."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import pickle
import shutil
import socket
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparksgd.data.shard import Descriptor, ShardWriter, read_records
from sparksgd.errors import ShardMissing

calm = settings(deadline=None, derandomize=True, database=None)  # no clock, no chance

RECORD = np.dtype([("pixels", "<u1", (3,)), ("weight", "<f4"), ("(label)", "<i8")])  # 15 bytes, unaligned
LINE = 15 + 4  # bytes in the file of a record and its checksum


def records_of(count: int) -> np.ndarray:
    """Records whose every byte tells their number."""
    records = np.empty(count, RECORD)
    records["pixels"] = np.arange(3 * count).reshape(-1, 3) % 251
    records["weight"] = np.arange(count) / 8
    records["(label)"] = np.arange(count) * 1_000_003
    return records


def keys_of(features: Sequence[int], labels: Sequence[int] | None = None) -> np.ndarray:
    """Keys uint8[B, 32]: a hash of the features, then one of features and label."""
    keys = np.zeros((len(features), 32), np.uint8)
    keys[:, 0] = features
    keys[:, 16] = keys[:, 24] = features if labels is None else labels
    return keys


def as_bytes(records: np.ndarray) -> np.ndarray:
    return records.view(np.uint8).reshape(len(records), RECORD.itemsize)


def written(folder: Path, records: np.ndarray, shard: int = 0) -> Descriptor:
    with ShardWriter(folder, shard) as writer:
        writer.append(keys_of([row % 251 for row in range(len(records))]), as_bytes(records))
        return writer.close()


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Descriptor:
    return written(tmp_path_factory.mktemp("shards"), records_of(1000))


@calm
@given(st.sets(st.integers(0, 999), min_size=1, max_size=60) | st.just(set(range(1000))))
def test_any_rows_are_read_back_as_they_were_written(thousand: Descriptor, rows: set[int]) -> None:
    numbers = np.array(sorted(rows), np.uint32)
    assert read_records(thousand, numbers, RECORD).tobytes() == records_of(1000)[numbers].tobytes()


@pytest.mark.parametrize("rows", [range(1000), range(7, 8), range(990, 1000), range(5, 5)])
def test_a_range_of_rows_is_read_back_as_it_was_written(thousand: Descriptor, rows: range) -> None:
    read = read_records(thousand, rows, RECORD)
    assert read.tobytes() == records_of(1000)[rows.start : rows.stop].tobytes()


def test_a_descriptor_says_where_a_shard_lies_and_what_it_holds(tmp_path: Path) -> None:
    shard = written(tmp_path / "run", records_of(4), shard=3)
    assert (shard.shard, shard.rows, shard.host) == (3, 4, socket.gethostname())
    assert Path(shard.path).parent == tmp_path / "run"
    assert Path(shard.path).stat().st_size == 4 * LINE
    assert shard.row_digest == (0 + 1 + 2 + 3, 0 + 1 + 2 + 3)  # the sums of the last hashes' halves
    assert pickle.loads(pickle.dumps(shard)) == shard


def test_other_users_cannot_read_a_shard(thousand: Descriptor) -> None:
    assert stat.S_IMODE(Path(thousand.path).stat().st_mode) == 0o600


def test_a_shard_without_rows_is_an_empty_file(tmp_path: Path) -> None:
    shard = written(tmp_path, records_of(0))
    assert (shard.rows, shard.row_digest, Path(shard.path).read_bytes()) == (0, (0, 0), b"")


def test_a_shard_does_not_depend_on_how_its_rows_were_appended(tmp_path: Path) -> None:
    records, keys = records_of(10), keys_of([1, 1, 1, 2, 3, 3, 4, 5, 6, 6])
    with ShardWriter(tmp_path, 0) as writer:
        writer.append(keys, as_bytes(records))
        at_once = writer.close()
    with ShardWriter(tmp_path, 0) as writer:
        for start, end in [(0, 1), (1, 1), (1, 5), (5, 10)]:  # cut inside 1 1 1 and 3 3
            writer.append(keys[start:end], as_bytes(records[start:end]))
        in_parts = writer.close()
    assert dataclasses.replace(in_parts, path=at_once.path) == at_once
    for shard in (in_parts, at_once):
        assert read_records(shard, range(10), RECORD).tobytes() == records.tobytes()


def test_rows_that_repeat_another_s_features_are_counted(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 0) as writer:
        writer.append(keys_of([1, 1, 2, 3, 3, 3], labels=[0, 9, 0, 0, 1, 2]), as_bytes(records_of(6)))
        assert writer.close().repeats == 3


def test_another_byte_is_another_digest(tmp_path: Path) -> None:
    changed = records_of(10)
    changed["weight"][9] += 1
    digests = [written(tmp_path, records).digest for records in (records_of(10), records_of(10), changed)]
    assert digests[0] == digests[1] != digests[2]


def test_a_file_that_is_gone_is_a_missing_shard(tmp_path: Path) -> None:
    shard = written(tmp_path, records_of(10), shard=4)
    Path(shard.path).unlink()
    with pytest.raises(ShardMissing, match=rf"shard 4: {shard.path} on {socket.gethostname()}") as gone:
        read_records(shard, range(10), RECORD)
    assert gone.value.shards == (4,)


@pytest.mark.parametrize("size", [0, 1, 9 * LINE, 10 * LINE - 1, 10 * LINE + 1, 11 * LINE])
def test_a_file_of_another_size_is_a_missing_shard(tmp_path: Path, size: int) -> None:
    shard = written(tmp_path, records_of(10))
    os.truncate(shard.path, size)
    for rows in (range(10), np.array([2, 5]), range(0)):
        with pytest.raises(ShardMissing, match=rf": {size} bytes, but 10 records need 190$"):
            read_records(shard, rows, RECORD)


def test_a_file_that_is_cut_off_while_it_is_read_is_a_missing_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, read = written(tmp_path, records_of(10)), os.preadv

    def cut_and_read(*arguments: Any) -> int:
        os.truncate(shard.path, 9 * LINE)
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", cut_and_read)
    with pytest.raises(ShardMissing, match="it was cut off while it was read"):
        read_records(shard, range(10), RECORD)


def test_a_disk_that_cannot_read_a_file_has_lost_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    shard = written(tmp_path, records_of(10), shard=2)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(ShardMissing, match=r"shard 2: .*: Input/output error") as lost:
        read_records(shard, range(10), RECORD)
    assert lost.value.shards == (2,)


def not_as_written(shard: Descriptor) -> list[int]:
    """Return the records that are refused, each read by itself; all must be refused in the same words."""
    refused = {}
    for row in range(shard.rows):
        try:
            read_records(shard, range(row, row + 1), RECORD)
        except ShardMissing as error:
            refused[row] = error
    where = f"shard {shard.shard}: {shard.path} on {socket.gethostname()}"
    for row, error in refused.items():
        assert str(error) == f"{where}: record {row} is not what was written there"
        assert error.shards == (shard.shard,)
    return list(refused)


def test_any_flipped_bit_is_noticed_and_only_its_record_is_refused(tmp_path: Path) -> None:
    shard = written(tmp_path, records_of(40), shard=3)
    file = Path(shard.path)
    good = file.read_bytes()
    for bit in np.random.default_rng(0).choice(8 * len(good), 200, replace=False).tolist():
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        row = bit // 8 // LINE
        assert not_as_written(shard) == [row]
        for rows in (range(40), np.array(sorted({0, row, 39}), np.uint32)):
            with pytest.raises(ShardMissing, match=rf": record {row} is not what was written there$"):
                read_records(shard, rows, RECORD)
    file.write_bytes(good)
    assert not_as_written(shard) == []


@pytest.mark.parametrize("moved", [LINE, 15], ids=["with its checksum", "without it"])
def test_a_record_that_lies_in_the_place_of_another_is_noticed(tmp_path: Path, moved: int) -> None:
    shard = written(tmp_path, records_of(12))
    good = Path(shard.path).read_bytes()
    for one, other in itertools.permutations(range(12), 2):
        bad = bytearray(good)
        at, there = slice(one * LINE, one * LINE + moved), slice(other * LINE, other * LINE + moved)
        bad[at] = good[there]
        Path(shard.path).write_bytes(bad)
        assert not_as_written(shard) == [one]
        bad[there] = good[at]
        Path(shard.path).write_bytes(bad)
        assert not_as_written(shard) == sorted([one, other])


def test_a_file_in_the_place_of_another_is_noticed_in_every_record(tmp_path: Path) -> None:
    shard = written(tmp_path / "deal", records_of(10), shard=0)
    others = [
        written(tmp_path / "deal", records_of(10)[::-1].copy(), shard=1),
        written(tmp_path / "another deal", records_of(10)[::-1].copy(), shard=0),
        written(tmp_path / "deal", records_of(10), shard=0),
    ]
    for other in others:
        shutil.copy(other.path, shard.path)
        assert not_as_written(shard) == list(range(10))
        assert not_as_written(other) == []


def test_a_shard_may_get_its_number_after_it_was_written(tmp_path: Path) -> None:
    shard = dataclasses.replace(written(tmp_path, records_of(10)), shard=7)
    assert read_records(shard, range(10), RECORD).tobytes() == records_of(10).tobytes()


def test_a_missing_shard_crosses_processes() -> None:
    back = pickle.loads(
        pickle.dumps(ShardMissing("shard 3 is gone", (3,)) + ShardMissing("so is shard 5", (5,)))
    )
    assert (back.shards, str(back)) == ((3, 5), "shard 3 is gone; so is shard 5")


def test_two_writers_of_one_shard_never_share_a_file(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 0) as first, ShardWriter(tmp_path, 0) as second:
        first.append(keys_of([1, 2]), as_bytes(records_of(2)))
        second.append(keys_of([1]), as_bytes(records_of(1)))
        one, two = first.close(), second.close()
    assert one.path != two.path
    assert [Path(shard.path).stat().st_size for shard in (one, two)] == [2 * LINE, LINE]


def test_an_attempt_that_failed_leaves_no_file(tmp_path: Path) -> None:
    def attempt() -> None:
        with ShardWriter(tmp_path, 0) as writer:
            writer.append(keys_of([1]), as_bytes(records_of(1)))
            assert len(list(tmp_path.iterdir())) == 1
            raise InterruptedError

    with pytest.raises(InterruptedError):
        attempt()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_reading_maps_nothing_and_leaves_nothing_open(thousand: Descriptor) -> None:
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    records = read_records(thousand, range(1000), RECORD)
    mapped = Path("/proc/self/maps").read_text()
    assert Path(thousand.path).name not in mapped
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert records.nbytes == 15_000
