"""Where rows come from, and the shards that they are dealt into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import pyarrow as pa

from sparksgd.data.row_report import RowReport
from sparksgd.data.schema import RowSchema
from sparksgd.data.shard import Descriptor

__all__ = ["RowSource", "Shards"]


class Shards(Protocol):
    """Dealt rows."""

    @property
    def table(self) -> Sequence[Descriptor]:
        """The descriptors of all shards, in their order."""
        ...

    def close(self) -> None:
        """Remove the files."""
        ...


class RowSource(Protocol):
    """Rows of a DataFrame, or of files."""

    def first_rows(self, columns: list[str], count: int) -> tuple[pa.Schema, pa.Table]:
        """Return the schema of all columns, and the first rows that have no null in the given columns."""
        ...

    def inspect(self, schema: RowSchema, num_shards: int) -> RowReport:
        """Read every row once; return the report, with digests of each shard if rows are dealt by content."""
        ...

    def deal(self, schema: RowSchema, num_shards: int, expected: RowReport, deal: int = 0) -> Shards:
        """Write every good row to its shard.  Another number of the deal gives other shards."""
        ...
