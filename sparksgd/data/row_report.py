"""What was read: counts, bad rows by reason, digests."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Self

from sparksgd.errors import BadRows

__all__ = ["OUTSIDE_CLASSES", "RowReport", "add_digests"]

OUTSIDE_CLASSES = "a label outside"
"""How the reason of a label begins that is none of the classes."""

_EXAMPLES = 3


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

    def check(
        self,
        on_bad_row: str | None,
        max_bad_rows: int = 0,
        *,
        done: str = "trained on",
        move: str = "mend the data",
    ) -> None:
        """Raise BadRows unless the bad rows may be skipped.

        Args:
            on_bad_row: as data.on_bad_row; None if the user has no such choice.
            max_bad_rows: as data.max_bad_rows.
            done: what was to be done with the rows, for the error.
            move: what the user can do who has no such choice.
        """
        bad = self.bad.total()
        if not bad or (on_bad_row == "skip" and bad <= max_bad_rows):
            return
        reasons = "; ".join(
            f"{count:,} with {reason} (such as {', '.join(self.examples[reason])})"
            for reason, count in self.bad.most_common()
        )
        move = {
            None: move,
            "skip": f"more than data.max_bad_rows = {max_bad_rows:,}: mend the data, or raise it",
        }.get(on_bad_row, 'mend the data, or set data.on_bad_row = "skip" and data.max_bad_rows')
        if any(reason.startswith(OUTSIDE_CLASSES) for reason in self.bad):
            move = f"if your classes are numbered from 1, subtract 1; else {move}"
        raise BadRows(f"{bad:,} of {bad + self.rows:,} rows cannot be {done}: {reasons}. Next: {move}")

    @property
    def data_digest(self) -> str:
        """Return the digest as 32 hexadecimal digits."""
        return "{:016x}{:016x}".format(*self.digest)

    @property
    def content_digest(self) -> str:
        """Return the digest without the ids, as 32 hexadecimal digits: earlier versions wrote it."""
        return "{:016x}{:016x}".format(*self.content)


def add_digests(left: tuple[int, int], right: tuple[int, int]) -> tuple[int, int]:
    """Return the digest of two sets of rows together."""
    return (left[0] + right[0]) % (1 << 64), (left[1] + right[1]) % (1 << 64)
