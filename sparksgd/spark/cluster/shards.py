"""Shards on the executors' disks: written once, and written again when an executor is lost."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from pyspark import RDD, StorageLevel

from sparksgd.data.schema import RowSchema
from sparksgd.data.shard import Descriptor
from sparksgd.errors import ShardChanged
from sparksgd.spark.cluster.arrow_batches import small_batches
from sparksgd.spark.cluster.cluster import Cluster
from sparksgd.spark.cluster.failures import gist
from sparksgd.spark.cluster.jobs import cleanup
from sparksgd.spark.tasks import row_tasks

__all__ = ["SparkShards"]

log = logging.getLogger("sparksgd")

_INPUT_GONE = re.compile(r"FILE_NOT_EXIST|PATH_NOT_FOUND|underlying files have been updated")


class SparkShards:
    """Shards on the executors' disks; `write` puts them there.

    `rdd` holds the descriptors, one partition for each worker, without their lineage.  Otherwise every task
    of every step would carry the lineage (49 kB instead of 8, 6 ms a step), and a barrier stage may not
    gather partitions.  Another RDD keeps the lineage; lost shards are written again from it.

    Args:
        cluster: where they are.
        written: an RDD that writes the shards when it is computed, and holds their descriptors.
        schema: of the rows.
        deal_id: names the folders of their files.
        shuffled: whether the last shuffle behind it is ours, and is removed with the shards.
    """

    def __init__(
        self, cluster: Cluster, written: RDD[Descriptor], schema: RowSchema, deal_id: str, *, shuffled: bool
    ) -> None:
        self._cluster = cluster
        self._schema = schema
        self._deal_id = deal_id
        self._shuffled = shuffled
        self._written = written
        self._rdd: RDD[Descriptor] | None = None
        self._partition_of: dict[int, int] = {}
        self._folders: set[str] = set()  # those of lost executors, too
        self.table: list[Descriptor] = []
        self.is_shared = False
        """Whether other trainings use them, too: then `close` leaves them to `remove`."""

    def write(self) -> None:
        """Write all shards; if that fails, remove what was written."""
        self._written.persist(StorageLevel.MEMORY_AND_DISK)
        try:
            self._cut_off()
        except BaseException:
            self.close()
            raise

    @property
    def rdd(self) -> RDD[Descriptor]:
        """Return the descriptors, one partition for each worker."""
        assert self._rdd is not None, "write() comes first"
        return self._rdd

    @property
    def partition_of(self) -> dict[int, int]:
        """Which partition each shard is in."""
        return dict(self._partition_of)

    def places(self) -> list[str | None]:
        """Return the place of each partition's shards, as Spark names places; None if unknown."""
        return [self.place_of(number) for number in range(self.rdd.getNumPartitions())]

    def place_of(self, partition: int) -> str | None:
        """Return the place of one partition's shards, as Spark names places; None if unknown."""
        return self._cluster.placement.place_of(self.rdd, partition)

    def recover(self, missing: Collection[int]) -> int:
        """Write lost shards again; return how many they were.

        Args:
            missing: shards whose file is gone or damaged although Spark has their descriptor.  Shards of lost
                executors need not be named: Spark knows them.

        Raises:
            ShardChanged: a shard now holds other rows, or its input is gone.
        """
        self._cluster.context.setJobDescription("sparksgd: writing lost shards again")
        self._cluster.placement.unpersist(self.rdd)
        for partition in {self._partition_of[shard] for shard in missing}:
            self._cluster.placement.drop_block(self._written, partition)
        before = self.table
        lost = [
            shard
            for shard, partition in sorted(self._partition_of.items())
            if not self._cluster.placement.has_block(self._written, partition)
        ]
        try:
            with small_batches(self._cluster.session, self._schema):
                self._cut_off()
        except Exception as error:
            if _INPUT_GONE.search(str(error)) is None:
                raise
            raise ShardChanged(
                f"shard {', '.join(map(str, lost))} was lost, and cannot be written again: files of the "
                f"input are gone. Something rewrote the table while training ran: train on a copy of it"
            ) from error
        moved = []
        for old, new in zip(before, self.table, strict=True):
            if new.digest != old.digest:
                self.table = before  # whoever asks again must find it again
                raise ShardChanged(
                    f"shard {new.shard} was lost and written again, but now holds other rows: "
                    f"{new.rows:,} (digest {new.digest}) where it held {old.rows:,} (digest "
                    f"{old.digest}). The input changed while training ran, or gives other rows on "
                    f"every reading: write it to Parquet first, and train on that"
                )
            if new.path != old.path:
                moved.append(old)
        if moved:
            with cleanup():
                self._remove(partial(row_tasks.remove, [shard.path for shard in moved]), moved)
        return len(moved)

    def close(self) -> None:
        """Remove the shards, unless they are shared."""
        if not self.is_shared:
            self.remove()

    def remove(self) -> None:
        """Remove the files on all executors, the descriptors, and the shuffle behind them."""
        if self._cluster.is_stopped():
            return  # and Spark removes its local directories
        try:
            self._cluster.context.setJobDescription("sparksgd: removing shards")
            self._remove(partial(row_tasks.remove_deal, self._deal_id, sorted(self._folders)), self.table)
        except Exception as error:
            if self._cluster.is_stopped():
                return
            log.warning("shard files remain until the application ends: %s", gist(str(error)))
        with cleanup():
            if self._rdd is not None:
                self._cluster.placement.unpersist(self._rdd)
            self._cluster.placement.unpersist(self._written)
            if self._shuffled:
                _remove_shuffle(self._written)

    def _cut_off(self) -> None:
        """Make the copy of the descriptors without lineage; missing shards are written for it."""
        descriptors = self._written.mapPartitions(list)
        descriptors.persist(StorageLevel.MEMORY_AND_DISK)
        descriptors.localCheckpoint()
        partitions = descriptors.glom().collect()
        self._partition_of = {
            shard.shard: number for number, shards in enumerate(partitions) for shard in shards
        }
        self._rdd = descriptors
        self.table = sorted(chain.from_iterable(partitions), key=lambda shard: shard.shard)
        self._folders |= {str(Path(shard.path).parent) for shard in self.table}

    def _remove(self, task: Callable[[Iterable[int]], Iterator[str]], shards: Sequence[Descriptor]) -> None:
        hosts = set(self._cluster.visit(task))
        left = sorted({shard.host for shard in shards} - hosts)
        if left:
            log.warning(
                "shard files remain on %s until the application ends: no slot was free there", ", ".join(left)
            )


def _remove_shuffle(rdd: RDD[Descriptor]) -> None:
    """Remove the files of the last shuffle behind an RDD; Spark would do so only at a garbage collection."""
    cleaner, parent = rdd.ctx._jsc.sc().cleaner(), rdd._jrdd.rdd()
    while parent.dependencies().size():
        dependency = parent.dependencies().apply(0)
        if dependency.getClass().getSimpleName() == "ShuffleDependency":
            if cleaner.isDefined():
                cleaner.get().doCleanupShuffle(dependency.shuffleId(), True)
            return
        parent = dependency.rdd()
