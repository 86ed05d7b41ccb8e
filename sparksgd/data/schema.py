"""What a row must be, and the type of its record.

A record is one row as a shard holds it: its features, its label, and its weight if rows have weights, packed.

    Arrow column            record
    binary                  uint8[n]
    list of floats          float32[n]
    list of integers        int64[n]
    float or decimal        float32
    integer or boolean      int64
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sparksgd.errors import DataError
from sparksgd.imports import did_you_mean

__all__ = [
    "FEATURE_DTYPES",
    "LABEL_DTYPES",
    "LABEL_FIELD",
    "MOST_RECORD_BYTES",
    "WEIGHT_FIELD",
    "Array",
    "Feature",
    "RowSchema",
    "require_column",
]

FEATURE_DTYPES = ("uint8", "int64", "float32")
LABEL_DTYPES = ("int64", "float32")
MOST_RECORD_BYTES = 2**31 - 1
"""numpy makes no larger records."""

LABEL_FIELD = "(label)"
"""The name that the label has in a record."""

WEIGHT_FIELD = "(weight)"
"""The name that the weight has in a record."""

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
        """Its name in a record: the column's, except where numpy takes no such name, or another has it."""
        taken = ("", LABEL_FIELD, WEIGHT_FIELD)
        return f"(column {self.name!r})" if self.name in taken else self.name


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

    weight: str | None = None
    """The column of weights; None: rows have none, and count equally."""

    num_labels: int | None = None
    """L, where a row has several labels, each 0 or 1; None: it has one label."""

    @classmethod
    def of(
        cls,
        schema: pa.Schema,
        first: Mapping[str, Any],
        *,
        features: tuple[str, ...],
        label: str,
        id: str | None,
        weight: str | None = None,
        whole_labels: bool,
        several_labels: bool = False,
    ) -> Self:
        """Derive the schema from a table's columns and a typical row.

        Args:
            schema: the table's.
            first: {column: value} of that row; it sets the length of each list; it may have no label.
            features: columns of features.
            label: column of labels.
            id: column of identities, if any.
            weight: column of weights, if any.
            whole_labels: labels are class numbers, even if the column holds floats.
            several_labels: a row has a list of labels.

        Raises:
            DataError: a column is missing, or of a type that cannot be trained on.
        """
        for column in [*features, label, id, weight]:
            if column is not None:
                require_column(column, schema)
        if id is not None and pa.types.is_nested(schema.field(id).type):
            raise DataError(
                f"data.id is {id!r}, which is {schema.field(id).type}, but must be one value per row, such "
                f"as a number or a text: cast it, for example to_json({id})"
            )
        for what, column in (("label", label), ("weight", weight)):
            if column is None:
                continue
            is_several = several_labels and what == "label"
            if _record_type(column, kind := schema.field(column).type)[1] != is_several:
                rule = "a list of 0 and 1 per row, as loss.kind says" if is_several else "a number per row"
                other = ': for a list of 0 and 1 set loss.kind = "several labels"'
                move = other if what == "label" and not is_several else ""
                raise DataError(f"{what} column {column!r} is {kind}, but must be {rule}{move}")
        num_labels = len(first[label]) if several_labels and label in first else None
        return cls(
            features=tuple(
                Feature(name=name, dtype=dtype, length=len(first[name]) if is_list else None)
                for name in features
                for dtype, is_list in [_record_type(name, schema.field(name).type)]
            ),
            label=label,
            label_dtype=_label_type(schema.field(label).type, label, whole_labels, several_labels),
            id=id,
            weight=weight,
            num_labels=num_labels,
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
        lengths[self.label] = range(self.num_labels or 0)
        RowSchema.of(  # refuses a label or an id
            columns,
            (first.to_pylist() or [lengths])[0],
            features=tuple(feature.name for feature in self.features),
            label=self.label,
            id=self.id,
            weight=self.weight,
            whole_labels=self.classes is not None,
            several_labels=self.num_labels is not None,
        )
        self.check_features(columns, where)

    def check_features(self, columns: pa.Schema, where: str) -> None:
        """Refuse another table whose features are missing, or of other types; see `check_columns`."""
        for feature in self.features:
            require_column(feature.name, columns)
            dtype, is_list = _record_type(feature.name, columns.field(feature.name).type)
            if (dtype, is_list) != (feature.dtype, feature.length is not None):
                raise DataError(
                    f"column {feature.name!r} is {dtype} in {where}, but {feature.dtype} in the training "
                    f"data: cast one of them"
                )

    @property
    def labels(self) -> Feature | None:
        """Return the column of labels as one of features; None: it is one number for each row."""
        if self.num_labels is None:
            return None
        return Feature(name=self.label, dtype="float32", length=self.num_labels)

    @property
    def columns(self) -> list[str]:
        """Return the columns that are read."""
        names = [*(feature.name for feature in self.features), self.label, self.id, self.weight]
        return list(dict.fromkeys(name for name in names if name is not None))

    @cached_property
    def record(self) -> np.dtype[np.void]:
        """Return the packed type of one row."""
        fields = [(f.field, np.dtype(f.dtype).newbyteorder("<"), f.shape) for f in self.features]
        of_label = () if self.num_labels is None else (self.num_labels,)
        fields.append((LABEL_FIELD, np.dtype(self.label_dtype).newbyteorder("<"), of_label))
        if self.weight is not None:
            fields.append((WEIGHT_FIELD, np.dtype("<f4"), ()))
        return np.dtype(fields)

    def feature_arrays(self, records: Array) -> dict[str, Array]:
        """Return {column: array[B, ...]} of records."""
        return {feature.name: records[feature.field] for feature in self.features}

    def label_array(self, records: Array) -> Array:
        """Return the labels, [B], or [B, L] where a row has several, of records."""
        return records[LABEL_FIELD]

    def weight_array(self, records: Array) -> Array | None:
        """Return the weights, float32[B], of records; None if rows have none."""
        return None if self.weight is None else records[WEIGHT_FIELD]


def _label_type(kind: pa.DataType, label: str, whole: bool, several: bool) -> str:
    if several:
        return "float32"
    return "int64" if whole else _record_type(label, kind)[0]


def require_column(name: str, columns: pa.Schema) -> None:
    """Refuse a table without a column."""
    if name not in columns.names:
        raise DataError(f"the data has no column {name!r}{did_you_mean(name, columns.names)}")


def _record_type(name: str, kind: pa.DataType) -> tuple[str, bool]:
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
        f"cast it, or name another in data.features, data.label or data.weight"
    )
