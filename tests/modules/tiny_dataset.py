"""A tiny data set for `jobs/prepare_data.py`: 12 + 7 images of 28 x 28 pixels.

Every pixel of image i is i, its label is i % 10.
"""

from __future__ import annotations

import hashlib
import importlib.util
import struct
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq

from sparksgd.data.sets import Dataset, IdxFile, Split

JOB = Path(__file__).parents[2] / "jobs" / "prepare_data.py"


def load_job() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_data_job", JOB)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


job = load_job()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def idx_images(rows: int) -> bytes:
    pixels = b"".join(bytes([i]) * 784 for i in range(rows))
    return struct.pack(">4I", 0x803, rows, 28, 28) + pixels


def idx_labels(rows: int) -> bytes:
    return struct.pack(">2I", 0x801, rows) + bytes(i % 10 for i in range(rows))


CONTENTS = {
    "train-images-idx3-ubyte": idx_images(12),
    "train-labels-idx1-ubyte": idx_labels(12),
    "t10k-images-idx3-ubyte": idx_images(7),
    "t10k-labels-idx1-ubyte": idx_labels(7),
}


def tiny(*, mirrors: tuple[str, ...] = (), npm_package: str | None = None) -> Dataset:
    def split(prefix: str, rows: int) -> Split:
        def file(name: str, shape: tuple[int, ...]) -> IdxFile:
            return IdxFile(name=name, shape=shape, sha256=sha256(CONTENTS[name]))

        return Split(
            images=file(f"{prefix}-images-idx3-ubyte", (rows, 28, 28)),
            labels=file(f"{prefix}-labels-idx1-ubyte", (rows,)),
        )

    return Dataset(
        name="tiny",
        train=split("train", 12),
        test=split("t10k", 7),
        mirrors=mirrors,
        npm_package=npm_package,
        by_hand="ask a friend",
    )


def run(out: Path, source: Path | None = None) -> int:
    argv = ["--dataset", "tiny", "--out", str(out)]
    code = job.main(argv if source is None else [*argv, "--source", str(source)])
    assert isinstance(code, int)
    return code


def assert_complete(out: Path) -> None:
    """The two files hold the tiny data set, and nothing else is left in the folder."""
    assert sorted(path.name for path in out.iterdir()) == ["test.parquet", "train.parquet"]
    for name, prefix, rows in (("train", "train", 12), ("test", "t10k", 7)):
        table = pq.read_table(out / f"{name}.parquet")
        assert table.schema.metadata == {
            b"images_sha256": sha256(CONTENTS[f"{prefix}-images-idx3-ubyte"]).encode(),
            b"labels_sha256": sha256(CONTENTS[f"{prefix}-labels-idx1-ubyte"]).encode(),
        }
        assert table.schema.types == [pa.binary(), pa.int64()]
        assert table.to_pydict() == {
            "image": [bytes([i]) * 784 for i in range(rows)],
            "label": [i % 10 for i in range(rows)],
        }


def flip_last_byte(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])
