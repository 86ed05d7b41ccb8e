"""The section [data]: which rows are trained on, which are evaluated, and what their columns are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparksgd.config.scopes import experiment_key
from sparksgd.errors import ConfigError
from sparksgd.imports import shown

__all__ = ["DataConfig", "check_data"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The rows to train on."""

    train: str | None = experiment_key(None)
    """Parquet to train on: a path or URI that Spark can read."""

    test: str | None = experiment_key(None)
    """Parquet to evaluate on.  If not set, and no rows are held out, the run is not evaluated."""

    validation_fraction: float | None = experiment_key(None)
    """The part of the rows, above 0 and below 1, that is held out of the training and evaluated on, in place
    of data.test.  A hash of data.id, or else of the features, chooses them, however the files lie."""

    validation_column: str | None = experiment_key(None)
    """A boolean column: the rows where it is true are held out of the training and evaluated on."""

    features: tuple[str, ...] = experiment_key(("features",))
    """Feature columns.  A single one is the argument of `forward`; several are keyword arguments of their
    names."""

    label: str = experiment_key("label")
    """The column of labels."""

    weight: str | None = experiment_key(None)
    """A column of numbers above 0: how much each row counts in losses, gradients and evaluations.  A row of
    weight 2 counts as two such rows do.  If not set, all rows count equally."""

    id: str | None = experiment_key(None)
    """The column whose hash assigns a row to a shard.  If not set, the features are hashed."""

    placement: Literal["hashed", "in_place"] = experiment_key("hashed")
    """hashed: one shuffle; the shards do not depend on the layout of the files.  in_place: no shuffle;
    whole partitions of the input become shards where they are, so the layout shapes the result."""

    on_bad_row: Literal["error", "skip"] = experiment_key("error")
    """What to do with rows that are null, misshapen, not finite or wrongly labelled."""

    max_bad_rows: int = experiment_key(100)
    """The most bad rows that on_bad_row = "skip" skips; more are an error."""

    @property
    def held_out_by(self) -> str | None:
        """Return the key that holds rows out of the training; None: no key does."""
        if self.validation_fraction is not None:
            return "data.validation_fraction"
        return None if self.validation_column is None else "data.validation_column"

    @property
    def evaluated_rows(self) -> str:
        """Return how messages call the rows to evaluate on."""
        return "test" if self.held_out_by is None else "held-out"


def check_data(data: DataConfig) -> None:
    """Refuse columns, paths and parts of the rows that do not go together."""
    for key, path in (("data.train", data.train), ("data.test", data.test)):
        if path is not None and not path.strip():
            raise ConfigError(f"{key} is {path!r}, but must name a file or folder of Parquet")
    if not data.features:
        raise ConfigError("data.features names no column: name one, or several")
    if len(set(data.features)) < len(data.features):
        twice = next(name for name in data.features if data.features.count(name) > 1)
        raise ConfigError(f"data.features names a column twice: {shown(twice)}")
    if data.label in data.features:
        raise ConfigError(f"data.label is {shown(data.label)}, which data.features names, too")
    if data.id is not None and data.id in (*data.features, data.label):
        raise ConfigError(
            f"data.id is {shown(data.id)}, which is a feature or the label: name another column, or "
            f"leave data.id out to hash the features"
        )
    if data.weight is not None and data.weight in (*data.features, data.label, data.id):
        raise ConfigError(
            f"data.weight is {shown(data.weight)}, which is a feature, the label or data.id: name a column "
            f"that only says how much each row counts"
        )
    fraction, column = data.validation_fraction, data.validation_column
    if fraction is not None and not 0 < fraction < 1:
        raise ConfigError(
            f"data.validation_fraction is {fraction}, but must be above 0 and below 1: it is the part of the "
            f"rows that is held out"
        )
    if column is not None and column in (*data.features, data.label, data.id, data.weight):
        raise ConfigError(
            f"data.validation_column is {shown(column)}, which is a feature, the label, data.weight or "
            f"data.id: name a column that only says which rows are held out"
        )
    given = [key for key, value in (
        ("data.test", data.test),
        ("data.validation_fraction", fraction),
        ("data.validation_column", column),
    ) if value is not None]  # fmt: skip
    if len(given) > 1:
        raise ConfigError(
            f"{' and '.join(given)} are set, but a run evaluates on one set of rows: unset all but one"
        )
