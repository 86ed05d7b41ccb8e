"""From Arrow batches to records: what a row must be, and the key of its content.

A record is one row as a shard holds it: its features, then its label, packed.  Its content key is a hash of
the features, cast to the record's types, with -0.0 replaced by 0.0, in a fixed order of columns.  So the same
row has the same key, however it was stored.

    Arrow column            record
    binary                  uint8[n]
    list of floats          float32[n]
    list of integers        int64[n]
    float or decimal        float32
    integer or boolean      int64
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sparksgd.errors import BadRows, DataError
from sparksgd.imports import did_you_mean

__all__ = [
    "FEATURE_DTYPES",
    "HASH_BYTES",
    "LABEL_DTYPES",
    "MOST_RECORD_BYTES",
    "Feature",
    "RowReport",
    "RowSchema",
    "Rows",
    "add_digests",
    "content_of",
    "digest_of",
    "read_rows",
]

HASH_BYTES = 16
FEATURE_DTYPES = ("uint8", "int64", "float32")
LABEL_DTYPES = ("int64", "float32")
MOST_RECORD_BYTES = 2**31 - 1
"""numpy makes no larger records."""

_LABEL = "(label)"
_EXAMPLES = 3
_OUTSIDE = "a label outside"
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: SplitMix64's step

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One column of features."""

    name: str
    """The column."""

    dtype: str
    """One of FEATURE_DTYPES."""

    length: int | None
    """Values per row; None for a single number."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row's value."""
        return () if self.length is None else (self.length,)

    @property
    def field(self) -> str:
        """Its name in a record: the column's, except where numpy takes no such name, or the label has it."""
        return f"(column {self.name!r})" if self.name in ("", _LABEL) else self.name


@dataclass(frozen=True, kw_only=True)
class RowSchema:
    """What every row must be."""

    features: tuple[Feature, ...]
    """In the configuration's order."""

    label: str
    """The column of labels."""

    label_dtype: str
    """One of LABEL_DTYPES."""

    id: str | None = None
    """The column whose hash assigns a row to a shard; None hashes the features."""

    classes: int | None = None
    """Labels must be in 0..classes-1; None does not check that."""

    @classmethod
    def of(
        cls,
        schema: pa.Schema,
        first: Mapping[str, Any],
        *,
        features: tuple[str, ...],
        label: str,
        id: str | None,
        whole_labels: bool,
    ) -> Self:
        """Derive the schema from a table's columns and a typical row.

        Args:
            schema: the table's.
            first: {column: value} of that row; it sets the length of each list.
            features: columns of features.
            label: column of labels.
            id: column of identities, if any.
            whole_labels: labels are class numbers, even if the column holds floats.

        Raises:
            DataError: a column is missing, or of a type that cannot be trained on.
        """
        for column in [*features, label, *([id] if id else [])]:
            if column not in schema.names:
                raise DataError(f"the data has no column {column!r}{did_you_mean(column, schema.names)}")
        if id is not None and pa.types.is_nested(schema.field(id).type):
            raise DataError(
                f"data.id is {id!r}, which is {schema.field(id).type}, but must be one value per row, such "
                f"as a number or a text: cast it, for example to_json({id})"
            )
        kind = _dtype(label, schema.field(label).type)
        if kind[1]:
            raise DataError(
                f"label column {label!r} is {schema.field(label).type}, but must be a number per row"
            )
        return cls(
            features=tuple(
                Feature(name=name, dtype=dtype, length=len(first[name]) if is_list else None)
                for name in features
                for dtype, is_list in [_dtype(name, schema.field(name).type)]
            ),
            label=label,
            label_dtype="int64" if whole_labels else kind[0],
            id=id,
        )

    def check_columns(self, columns: pa.Schema, first: pa.Table, where: str) -> None:
        """Refuse another table whose columns are missing, or of other types.

        Args:
            columns: the other table's.
            first: its first complete row, if it has one.
            where: what errors call the table.

        Raises:
            DataError: a column is missing, or of another type.
        """
        lengths = {feature.name: range(feature.length or 0) for feature in self.features}
        theirs = RowSchema.of(
            columns,
            (first.to_pylist() or [lengths])[0],
            features=tuple(feature.name for feature in self.features),
            label=self.label,
            id=self.id,
            whole_labels=self.classes is not None,
        )
        for feature, other in zip(self.features, theirs.features, strict=True):
            if (feature.dtype, feature.length is None) != (other.dtype, other.length is None):
                raise DataError(
                    f"column {feature.name!r} is {other.dtype} in {where}, but {feature.dtype} in the "
                    f"training data: cast one of them"
                )

    @property
    def columns(self) -> list[str]:
        """Return the columns that are read."""
        names = [*(feature.name for feature in self.features), self.label]
        return list(dict.fromkeys([*names, self.id] if self.id else names))

    @cached_property
    def record(self) -> np.dtype[np.void]:
        """Return the packed type of one row."""
        fields = [(f.field, np.dtype(f.dtype).newbyteorder("<"), f.shape) for f in self.features]
        return np.dtype([*fields, (_LABEL, np.dtype(self.label_dtype).newbyteorder("<"))])

    def feature_arrays(self, records: Array) -> dict[str, Array]:
        """Return {column: array[B, ...]} of records."""
        return {feature.name: records[feature.field] for feature in self.features}

    def label_array(self, records: Array) -> Array:
        """Return the labels, [B], of records."""
        return records[_LABEL]


@dataclass(kw_only=True)
class RowReport:
    """What was read: counts, bad rows by reason, a digest that ignores the order.  Reports can be added."""

    rows: int = 0
    """Good rows."""

    digest: tuple[int, int] = (0, 0)
    """Of the good rows and their ids, see `digest_of`; each half modulo 2^64."""

    content: tuple[int, int] = (0, 0)
    """The same without the ids."""

    shard_digests: dict[int, tuple[int, int]] = field(default_factory=dict)
    """The same for each shard, if rows are dealt by their content."""

    bad: Counter[str] = field(default_factory=Counter)
    """Bad rows by reason; a row counts for its first reason only."""

    examples: dict[str, list[str]] = field(default_factory=dict)
    """A few bad values for each reason."""

    def __iadd__(self, other: RowReport) -> Self:
        self.rows += other.rows
        self.digest = add_digests(self.digest, other.digest)
        self.content = add_digests(self.content, other.content)
        for shard, digest in other.shard_digests.items():
            self.shard_digests[shard] = add_digests(self.shard_digests.get(shard, (0, 0)), digest)
        self.bad += other.bad
        for reason, examples in other.examples.items():
            known = self.examples.setdefault(reason, [])
            known += examples[: _EXAMPLES - len(known)]
        return self

    def found(self, reason: str, values: list[Any]) -> None:
        """Count bad rows of one reason."""
        if values:
            examples = [repr(value)[:60] for value in values[:_EXAMPLES]]
            self += RowReport(bad=Counter({reason: len(values)}), examples={reason: examples})

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON holds it; `from_json` reads it back."""
        return vars(self) | {"bad": dict(self.bad)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return the report that `to_json` wrote."""
        return cls(
            **values
            | {
                "bad": Counter(values["bad"]),
                "digest": tuple(values["digest"]),
                "content": tuple(values["content"]),
                "shard_digests": {int(k): tuple(v) for k, v in values["shard_digests"].items()},
            }
        )

    def check(self, on_bad_row: str | None, max_bad_rows: int = 0, *, done: str = "trained") -> None:
        """Raise BadRows unless the bad rows may be skipped.

        Args:
            on_bad_row: as data.on_bad_row; None if the user has no such choice.
            max_bad_rows: as data.max_bad_rows.
            done: what was to be done with the rows, for the error.
        """
        bad = self.bad.total()
        if not bad or (on_bad_row == "skip" and bad <= max_bad_rows):
            return
        reasons = "; ".join(
            f"{count:,} with {reason} (such as {', '.join(self.examples[reason])})"
            for reason, count in self.bad.most_common()
        )
        move = {
            None: "mend the data",
            "skip": f"more than data.max_bad_rows = {max_bad_rows:,}: mend the data, or raise it",
        }.get(on_bad_row, 'mend the data, or set data.on_bad_row = "skip" and data.max_bad_rows')
        if any(reason.startswith(_OUTSIDE) for reason in self.bad):
            move = f"if your classes are numbered from 1, subtract 1; else {move}"
        raise BadRows(f"{bad:,} of {bad + self.rows:,} rows cannot be {done} on: {reasons}. Next: {move}")

    @property
    def data_digest(self) -> str:
        """Return the digest as 32 hexadecimal digits."""
        return "{:016x}{:016x}".format(*self.digest)

    @property
    def content_digest(self) -> str:
        """Return the digest without the ids, as 32 hexadecimal digits: earlier versions wrote it."""
        return "{:016x}{:016x}".format(*self.content)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The good rows of a batch."""

    records: Array
    """The packed rows, [B]."""

    keys: Array
    """Keys, uint8[B, K]: hashes of the id (if there is one), of the features, and of features and label."""

    report: RowReport
    """What was good and bad."""

    def shards(self, num_shards: int, deal: int = 0) -> npt.NDArray[np.int32]:
        """Return the shard of each row, [B]: its key, mixed with the number of the deal, modulo S."""
        leading = np.ascontiguousarray(self.keys[:, :8]).view("<u8")[:, 0]
        if deal:
            leading = _stirred(leading + np.uint64(deal * _GOLDEN % 2**64))
        return (leading % np.uint64(num_shards)).astype(np.int32)

    def shard_digests(self, num_shards: int) -> dict[int, tuple[int, int]]:
        """Return the digest of the rows of each shard that has rows."""
        shards = self.shards(num_shards)
        return {int(shard): digest_of(self.keys[shards == shard]) for shard in np.unique(shards)}


def _stirred(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return the values mixed by SplitMix64's finaliser, a bijection (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def read_rows(batch: pa.RecordBatch, schema: RowSchema) -> Rows:
    """Check, cast and hash the rows of an Arrow batch; bad ones are counted and left out."""
    report = RowReport()
    batch = _without(batch, report, schema)
    records = np.empty(batch.num_rows, schema.record)
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
    labels, whole = _labels(batch.column(schema.label), schema)
    for reason, right in (
        (f"a label that is no whole number in {schema.label!r}", whole),
        (f"{_OUTSIDE} 0..{(schema.classes or 0) - 1}", _in_range(labels, schema.classes)),
        (f"a label that is NaN or infinite in {schema.label!r}", np.isfinite(labels)),
    ):
        wrong = np.flatnonzero(good & ~right)
        report.found(reason, batch.column(schema.label).take(pa.array(wrong)).to_pylist())
        good &= right
    with np.errstate(invalid="ignore"):
        records[_LABEL] = labels
    ids = _ids(batch.column(schema.id).filter(pa.array(good))) if schema.id else None
    records = records[good]
    keys = _hash(records, ids, schema, report)
    return Rows(records=records, keys=keys, report=report)


def _dtype(name: str, kind: pa.DataType) -> tuple[str, bool]:
    """Return the type that a column has in a record, and whether a row has a list of values."""
    types = pa.types
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return "uint8", True
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    value = kind.value_type if is_list else kind
    if types.is_floating(value) or types.is_decimal(value):
        return "float32", is_list
    if (types.is_integer(value) and not types.is_uint64(value)) or types.is_boolean(value):
        return "int64", is_list
    raise DataError(
        f"column {name!r} is {kind}, but must be binary, a number, or a flat list of numbers: "
        f"cast it, or name another in data.features and data.label"
    )


def _without(batch: pa.RecordBatch, report: RowReport, schema: RowSchema) -> pa.RecordBatch:
    """Return the batch without the rows that have nulls, or lists of another length."""
    for name in schema.columns:
        null = batch.column(name).is_null()
        report.found(f"null in {name!r}", [None] * (pc.sum(null).as_py() or 0))
        batch = batch.filter(pc.invert(null))
    for feature in schema.features:
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


def _labels(column: pa.Array, schema: RowSchema) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Return the labels as numbers, and which of them fit the label's type."""
    labels = _numbers(column)
    if schema.label_dtype == "float32":
        with np.errstate(over="ignore"):
            return labels.astype(np.float32), np.ones(len(labels), bool)
    if labels.dtype.kind == "f":
        return labels, labels == np.floor(labels)
    return labels.astype(np.int64), np.ones(len(labels), bool)


def _in_range(labels: Array, classes: int | None) -> npt.NDArray[np.bool_]:
    return np.ones(len(labels), bool) if classes is None else (labels >= 0) & (labels < classes)


def _ids(column: pa.Array) -> list[Any]:
    """Return the values of an id column; instants are of UTC, whatever the session's time zone is."""
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("us"), safe=False).cast(pa.timestamp("us", "UTC"))
    values: list[Any] = column.to_pylist()
    return values


def _hash(
    records: Array, ids: list[Any] | None, schema: RowSchema, report: RowReport
) -> npt.NDArray[np.uint8]:
    """Return the rows' keys, and add the rows and their digest to the report."""
    width = schema.record.itemsize
    features = width - np.dtype(schema.label_dtype).itemsize
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
    array = array.reshape(len(records), HASH_BYTES * (2 if ids is None else 3))
    report += RowReport(rows=len(records), digest=digest_of(array), content=content_of(array))
    return array


def digest_of(keys: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """Return a digest of rows, and of their ids if they have some, that ignores their order.

    It sums the last hash of each key, uint8[B, K].  An id is mixed into it first: the same rows with their
    ids exchanged would lie in other places.
    """
    hashes = np.ascontiguousarray(keys[:, -HASH_BYTES:]).view("<u8")
    if keys.shape[1] > 2 * HASH_BYTES:
        ids = np.ascontiguousarray(keys[:, :HASH_BYTES]).view("<u8")
        hashes = _stirred(hashes ^ _stirred(ids))
    low, high = hashes.sum(axis=0, dtype=np.uint64)
    return int(low), int(high)


def content_of(keys: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """Return the digest of the rows without their ids."""
    return digest_of(keys[:, -2 * HASH_BYTES :])


def add_digests(left: tuple[int, int], right: tuple[int, int]) -> tuple[int, int]:
    """Return the digest of two sets of rows together."""
    return (left[0] + right[0]) % (1 << 64), (left[1] + right[1]) % (1 << 64)
