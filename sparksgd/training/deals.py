"""Dealing rows into shards: first, with a check, and again if shards starve."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

from sparksgd.config import Config, DataConfig
from sparksgd.data.row_report import RowReport
from sparksgd.data.sampling import Sampling
from sparksgd.data.schema import RowSchema
from sparksgd.data.shard import Descriptor
from sparksgd.data.source import RowSource, Shards
from sparksgd.engines.compute import Plan
from sparksgd.engines.protocol import Engine
from sparksgd.errors import ModelError, ShardChanged
from sparksgd.training.preflight import check_pieces
from sparksgd.training.replay import Replay
from sparksgd.training.state import Training

__all__ = ["Deals", "dealt"]

log = logging.getLogger("sparksgd")


class Deals:
    """The shards of the rows to train on, for a `with` block: dealt at its start, and again if some starve.

    Args:
        source: the rows.
        schema: what a row must be.
        config: what to train, and how.
        report: on all rows.
        number: of the first deal; more than 0 in a run that goes on from a checkpoint.
    """

    def __init__(
        self, source: RowSource, schema: RowSchema, config: Config, report: RowReport, number: int = 0
    ) -> None:
        self._source, self._schema, self._config, self._report = source, schema, config, report
        self._shards: Shards | None = None
        self.number = number
        """How often the rows were dealt again."""

    def __enter__(self) -> Self:
        self._shards = self._dealt(self.number)
        return self

    def __exit__(self, *_: object) -> None:
        self.shards.close()

    @property
    def shards(self) -> Shards:
        """Return the shards of the newest deal."""
        assert self._shards is not None, "the rows are dealt inside with"
        return self._shards

    def _dealt(self, number: int) -> Shards:
        report = replace(self._report, shard_digests={}) if number else self._report  # they are of the first
        return dealt(self._source, self._schema, self._config, report, "training", number)

    def sampling(self) -> Sampling:
        """Return which of their rows take part in which turn."""
        return Sampling(
            shard_rows=tuple(shard.rows for shard in self.shards.table),
            rows_per_step=self._config.train.rows_per_step,
            seed=self._config.train.seed,
        )

    def end_epoch(self, training: Training, engine: Engine, replay: Replay | None) -> None:
        """Deal the rows again if a shard hardly took part; in a replay, if the run did so."""
        starved = training.participation.starved()
        training.participation.begin_epoch()
        goes_on = not training.is_over
        if starved and replay is None:
            log.warning(
                "starved: %s; their rows were hardly used%s",
                ", ".join(
                    f"shard {shard} took part in {part:.0%} of steps" for shard, part in starved.items()
                ),
                ", and all rows are dealt anew for the next epoch" if goes_on else "",
            )
        if goes_on and (starved if replay is None else replay.deal_of(training.version) != self.number):
            self._deal_anew(training, engine)

    def _deal_anew(self, training: Training, engine: Engine) -> None:
        """Deal the rows by another hash, and let the engine continue with the new shards."""
        before, number = self.shards, self.number + 1

        def deal() -> tuple[Plan, Shards]:
            self._shards = self._dealt(number)
            sampling = self.sampling()
            check_pieces(training.module, sampling, self._config.train.rows_per_backward)
            training.plan = replace(training.plan, sampling=sampling, deal=number)
            return training.plan, self.shards

        try:
            engine.deal_anew(deal)
        except ModelError as error:
            self._shards, refused = before, self.shards
            refused.close()
            log.warning("the rows stay in their shards: %s", error)
            return
        self.number = number
        before.close()


def dealt(
    source: RowSource,
    schema: RowSchema,
    config: Config,
    expected: RowReport,
    which: str,
    deal: int = 0,
) -> Shards:
    """Deal rows into shards; warn of shards that are heavy or empty."""
    started = time.perf_counter()
    num_shards = config.train.num_shards
    shards = source.deal(schema, num_shards, expected, deal)
    try:
        log.info(
            "%s rows: dealt %sinto %d shards (%.1f s)",
            which,
            "anew " if deal else "",
            num_shards,
            time.perf_counter() - started,
        )
        _check_deal(shards.table, expected, config.data, which)
    except BaseException:
        shards.close()
        raise
    return shards


def _check_deal(table: Sequence[Descriptor], expected: RowReport, data: DataConfig, which: str) -> None:
    dealt = RowReport()
    for shard in table:
        dealt += RowReport(rows=shard.rows, digest=shard.row_digest)
    changed = [
        str(shard.shard)
        for shard in table
        if expected.shard_digests and shard.row_digest != expected.shard_digests.get(shard.shard, (0, 0))
    ]
    if changed or (dealt.rows, dealt.digest) != (expected.rows, expected.digest):
        where = f"; shards {', '.join(changed)} hold other rows" if changed else ""
        ids = "" if data.id is None else f" (maybe data.id, {data.id!r})"
        raise ShardChanged(
            f"the {which} data changed while it was read: {expected.rows:,} rows (digest "
            f"{expected.data_digest}) were checked, but {dealt.rows:,} (digest {dealt.data_digest}) "
            f"were dealt{where}. Something rewrites the table, or a column{ids} or the order of rows is "
            f"other on every reading, as rand(), uuid() and monotonically_increasing_id() make them: write "
            f"the DataFrame to Parquet or checkpoint() it first, and train on that"
        )
    share = expected.rows / len(table)
    for shard in table:
        if shard.rows > 2 * share:
            log.warning(
                "%s shard %d holds %s rows, %.1f times its share, because %s; the worker that owns it is "
                "slower than the others",
                which,
                shard.shard,
                f"{shard.rows:,}",
                shard.rows / share,
                _why_heavy(shard, share, data, which),
            )
    empty = [shard.shard for shard in table if not shard.rows]
    if empty:
        log.warning("%s shards %s are empty: they take part in no step", which, empty)


def _why_heavy(shard: Descriptor, share: float, data: DataConfig, which: str) -> str:
    """Return why a shard holds more than twice its share."""
    if data.placement == "in_place" and which == "training":
        return "its partitions are larger than others (repartition the data, or deal it hashed)"
    if shard.rows - shard.repeats > 2 * share:
        return "so few rows do not spread evenly (fewer shards would be more even)"
    if data.id is not None:
        return (
            f"{shard.repeats:,} of them repeat the {data.id!r} of another and the same id always meets in "
            f"one shard"
        )
    return (
        f"{shard.repeats:,} of them repeat the features of another and the same features always meet in one "
        f"shard (an id column, data.id, would spread them)"
    )
