"""From Arrow batches to records, and to the keys of their content.

The content key of a row is a hash of the features, cast to the record's types, with -0.0 replaced by 0.0, in
a fixed order of columns.  So the same row has the same key, however it was stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sparksgd.data.hashes import leading_words, stirred
from sparksgd.data.held_out import Side
from sparksgd.data.row_report import OUTSIDE_CLASSES, RowReport
from sparksgd.data.schema import LABEL_FIELD, WEIGHT_FIELD, Array, Feature, RowSchema

__all__ = [
    "HASH_BYTES",
    "WEIGHTS",
    "FeatureRows",
    "Rows",
    "content_of",
    "digest_of",
    "read_features",
    "read_rows",
]

HASH_BYTES = 16

WEIGHTS = (1e-12, 1e12)
"""The least and the greatest weight of a row, so that sums of losses times weights fit into float32."""

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: SplitMix64's step


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The good rows of a batch."""

    records: Array
    """The packed rows, [B]."""

    keys: Array
    """Keys, uint8[B, K]: hashes of the id (if there is one), of the features, and of the whole record."""

    report: RowReport
    """What was good and bad."""

    def shards(self, num_shards: int, deal: int = 0) -> npt.NDArray[np.int32]:
        """Return the shard of each row, [B]: its key, mixed with the number of the deal, modulo S."""
        leading = leading_words(self.keys)
        if deal:
            leading = stirred(leading + np.uint64(deal * _GOLDEN % 2**64))
        return (leading % np.uint64(num_shards)).astype(np.int32)

    def shard_digests(self, num_shards: int) -> dict[int, tuple[int, int]]:
        """Return the digest of the rows of each shard that has rows."""
        shards = self.shards(num_shards)
        return {int(shard): digest_of(self.keys[shards == shard]) for shard in np.unique(shards)}


@dataclass(frozen=True, kw_only=True)
class FeatureRows:
    """The rows of a batch whose features are good; they have no labels."""

    records: Array
    """The packed rows, [B]; their labels are 0."""

    positions: npt.NDArray[np.int64]
    """Where each row stands in the batch, [B]."""

    report: RowReport
    """What was bad."""


def read_features(batch: pa.RecordBatch, schema: RowSchema) -> FeatureRows:
    """Check and cast the features of an Arrow batch; bad rows are counted and left out."""
    report = RowReport()
    position = "".join(batch.schema.names) + "+"  # no other column has this name
    placed = batch.append_column(position, pa.array(np.arange(batch.num_rows)))
    placed = _without(placed, report, schema, [feature.name for feature in schema.features])
    records, good = _features(placed, report, schema)
    positions = placed.column(position).to_numpy()[good]
    report.rows = len(positions)
    return FeatureRows(records=records[good], positions=positions, report=report)


def read_rows(batch: pa.RecordBatch, schema: RowSchema, side: Side | None = None) -> Rows:
    """Check, cast and hash the rows of an Arrow batch; bad ones are counted and left out.

    Args:
        batch: the rows, with the columns that the schema and the side name.
        schema: what a row must be.
        side: the only one that counts; None: all rows count.
    """
    report = RowReport()
    if side is not None:
        batch = side.by_column(batch, report)
    batch = _without(batch, report, schema, schema.columns)
    records, good = _features(batch, report, schema)
    labels, rules = _labels(batch.column(schema.label), schema)
    for reason, right, examples in rules:
        wrong = np.flatnonzero(good & ~right)
        report.found(reason, examples.take(pa.array(wrong)).to_pylist())
        good &= right
    if schema.weight is not None:
        column = batch.column(schema.weight)
        with np.errstate(over="ignore"):
            records[WEIGHT_FIELD] = weights = _numbers(column).astype(np.float32)
        least, most = WEIGHTS
        right = (weights >= least) & (weights <= most)
        report.found(
            f"a weight that is not from {least:g} to {most:g} in {schema.weight!r}",
            column.take(pa.array(np.flatnonzero(good & ~right))).to_pylist(),
        )
        good &= right
    with np.errstate(invalid="ignore"):
        records[LABEL_FIELD] = labels
    ids = _ids(batch.column(schema.id).filter(pa.array(good))) if schema.id else None
    records = records[good]
    keys = _hash(records, ids, schema)
    if side is not None:
        mine = side.by_hash(keys)
        records, keys = records[mine], keys[mine]
        if side.is_held_out and side.fraction is not None:
            report.bad.clear()  # they have no hash, and are reported with the rows to train on
            report.examples.clear()
    report += RowReport(rows=len(records), digest=digest_of(keys), content=content_of(keys))
    return Rows(records=records, keys=keys, report=report)


def _features(
    batch: pa.RecordBatch, report: RowReport, schema: RowSchema
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Return records with the features of a batch, and which of them are good."""
    records = np.zeros(batch.num_rows, schema.record)
    good = np.ones(batch.num_rows, bool)
    for feature in schema.features:
        values = _values(batch.column(feature.name), feature)
        if feature.dtype == "float32":
            values = values + np.float32(0)  # -0.0 becomes 0.0
            by_row = values.reshape(len(values), 1 if feature.length is None else feature.length)
            finite = np.isfinite(by_row).all(axis=1)
            wrong = np.flatnonzero(good & ~finite)
            report.found(
                f"NaN or infinity (as float32) in {feature.name!r}",
                [float(row[~np.isfinite(row)][0]) for row in by_row[wrong]],
            )
            good &= finite
        records[feature.field] = values
    return records, good


def _without(
    batch: pa.RecordBatch, report: RowReport, schema: RowSchema, columns: Sequence[str]
) -> pa.RecordBatch:
    """Return the batch without the rows that have nulls in some columns, or lists of another length."""
    for name in columns:
        null = batch.column(name).is_null()
        report.found(f"null in {name!r}", [None] * (pc.sum(null).as_py() or 0))
        batch = batch.filter(pc.invert(null))
    several = [schema.labels] if schema.labels is not None and schema.label in columns else []
    for feature in (*schema.features, *several):
        if feature.length is None:
            continue
        column = batch.column(feature.name)
        binary = feature.dtype == "uint8" and not hasattr(column.type, "value_type")
        lengths = pc.binary_length(column) if binary else pc.list_value_length(column)
        right = pc.equal(lengths, feature.length)
        report.found(
            f"a number of values other than {feature.length} (most rows') in {feature.name!r}",
            lengths.filter(pc.invert(right)).to_pylist(),
        )
        batch = batch.filter(right)
        column = batch.column(feature.name)
        if not binary and column.flatten().null_count:
            holes = np.array([None in row for row in column.to_pylist()])
            report.found(f"null inside the list in {feature.name!r}", [None] * int(holes.sum()))
            batch = batch.filter(pa.array(~holes))
    return batch


def _values(column: pa.Array, feature: Feature) -> Array:
    """Return a column without nulls as an array, [B, ...]."""
    if feature.length is not None and not hasattr(column.type, "value_type"):
        fixed = column.cast(pa.binary(feature.length))
        data = np.frombuffer(fixed.buffers()[1], np.uint8) if len(fixed) else np.empty(0, np.uint8)
        start = fixed.offset * feature.length
        return data[start : start + len(fixed) * feature.length].reshape(-1, feature.length)
    flat = column if feature.length is None else column.flatten()
    with np.errstate(over="ignore"):
        return _numbers(flat).astype(feature.dtype).reshape(len(column), *feature.shape)


def _numbers(column: pa.Array) -> Array:
    if pa.types.is_decimal(column.type):
        column = column.cast(pa.float64())
    numbers: Array = column.to_numpy(zero_copy_only=False)
    return numbers


def _labels(
    column: pa.Array, schema: RowSchema
) -> tuple[Array, list[tuple[str, npt.NDArray[np.bool_], pa.Array]]]:
    """Return the labels as numbers, and the rules: what is said, which rows keep it, an example of each."""
    if schema.labels is not None:
        several = _values(column, schema.labels) + np.float32(0)  # -0.0 becomes 0.0
        right = (several == 0) | (several == 1)
        first = pa.array(several[np.arange(len(several)), (~right).argmax(axis=1)])
        return several, [(f"a label that is neither 0 nor 1 in {schema.label!r}", right.all(axis=1), first)]
    labels = _numbers(column)
    is_whole = np.ones(len(labels), bool)
    if schema.label_dtype == "float32":
        with np.errstate(over="ignore"):
            labels = labels.astype(np.float32)
    elif labels.dtype.kind == "f":
        is_whole = labels == np.floor(labels)
    else:
        labels = labels.astype(np.int64)
    return labels, [
        (f"a label that is no whole number in {schema.label!r}", is_whole, column),
        (f"{OUTSIDE_CLASSES} 0..{(schema.classes or 0) - 1}", _in_range(labels, schema.classes), column),
        (f"a label that is NaN or infinite in {schema.label!r}", np.isfinite(labels), column),
    ]


def _in_range(labels: Array, classes: int | None) -> npt.NDArray[np.bool_]:
    return np.ones(len(labels), bool) if classes is None else (labels >= 0) & (labels < classes)


def _ids(column: pa.Array) -> list[Any]:
    """Return the values of an id column; instants are of UTC, whatever the session's time zone is."""
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("us"), safe=False).cast(pa.timestamp("us", "UTC"))
    values: list[Any] = column.to_pylist()
    return values


def _hash(records: Array, ids: list[Any] | None, schema: RowSchema) -> npt.NDArray[np.uint8]:
    """Return the rows' keys, uint8[B, K]."""
    width = schema.record.itemsize
    assert schema.record.fields is not None
    features = schema.record.fields[LABEL_FIELD][1]  # bytes before the label
    data = memoryview(np.ascontiguousarray(records).view(np.uint8).data)
    keys = bytearray()
    for row, start in enumerate(range(0, len(data), width)):
        content = blake2b(data[start : start + features], digest_size=HASH_BYTES)
        if ids is not None:
            identity = ids[row] if isinstance(ids[row], bytes) else str(ids[row]).encode()
            keys += blake2b(identity, digest_size=HASH_BYTES).digest()
        keys += content.digest()
        content.update(data[start + features : start + width])
        keys += content.digest()
    array = np.frombuffer(bytes(keys), np.uint8)
    return array.reshape(len(records), HASH_BYTES * (2 if ids is None else 3))


def digest_of(keys: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """Return a digest of rows, and of their ids if they have some, that ignores their order.

    It sums the last hash of each key, uint8[B, K].  An id is mixed into it first: the same rows with their
    ids exchanged would lie in other places.
    """
    hashes = np.ascontiguousarray(keys[:, -HASH_BYTES:]).view("<u8")
    if keys.shape[1] > 2 * HASH_BYTES:
        ids = np.ascontiguousarray(keys[:, :HASH_BYTES]).view("<u8")
        hashes = stirred(hashes ^ stirred(ids))
    low, high = hashes.sum(axis=0, dtype=np.uint64)
    return int(low), int(high)


def content_of(keys: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """Return the digest of the rows without their ids."""
    return digest_of(keys[:, -2 * HASH_BYTES :])
