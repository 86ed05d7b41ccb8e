"""Three steps of a tiny module on every engine that the cluster carries: do they end at the same bits?"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import SparkSession

from sparksgd.config import Config, EngineConfig
from sparksgd.engines.kinds import ALLREDUCE, INLINE, STAGES, TREE, EngineKind
from sparksgd.spark.doctor.findings import Finding, bad, good, unseen
from sparksgd.spark.train import train
from sparksgd.training.in_process import train_in_process
from sparksgd.training.state import Training

__all__ = ["ENGINES", "Steps", "name_of"]

_STEPS = 3
_ROWS_OF_SHARD = 4  # in a step
_MOST_WORKERS = 8
_COLUMNS = ("array(float(id) / 100, float(id % 3))", "id % 2")


@dataclass(kw_only=True)
class Steps:
    """Trains a tiny module, engine by engine.

    Args:
        session: where.
        config: has the settings that shape bits or connections: threads, instruction set, ports.
        workers: how many the run would have.
        run_id: the group of the jobs.
        patience_s: how long a worker, or a step, may be waited for.
    """

    session: SparkSession
    config: Config
    workers: int
    run_id: str
    patience_s: float
    _digest: str | None = None

    def look(self, kind: EngineKind) -> Iterator[Finding]:
        """Train, and yield whether it ends where the engines before it did."""
        name = name_of(kind)
        if kind is ALLREDUCE and self.workers == 1:
            yield unseen(name, "there is one worker, which has no other to exchange sums with")
            return
        training = self._trained(kind)
        digest = training.flat.parameters_sha256()
        is_first = self._digest is None
        self._digest = self._digest or digest
        step_ms = 1e3 * training.step_times.medians_s()["total"]
        where = "in this process" if kind is INLINE else f"{len(training.numerics) - 1} workers"
        seen = f"{_STEPS} steps, {where}, {step_ms:,.0f} ms a step, parameters {digest[:12]}"
        if digest != self._digest:
            yield bad(
                name,
                f"{seen}, but {self._digest[:12]} by the one before: machines compute differently",
                "--set train.instruction_set=default, and one environment for driver and executors",
            )
        else:
            yield good(name, seen if is_first else f"{seen}: equal")

    def _trained(self, kind: EngineKind) -> Training:
        config = self._configured(kind)
        if kind is not INLINE:
            rows = self.session.range(self._rows).selectExpr(
                f"{_COLUMNS[0]} as features", f"{_COLUMNS[1]} as label"
            )
            return train(self.session, config, rows, run_id=self.run_id)
        features = [[i / 100, float(i % 3)] for i in range(self._rows)]
        with tempfile.TemporaryDirectory(prefix="sparksgd-doctor-") as folder:
            table = pa.table(
                {
                    "features": pa.array(features, pa.list_(pa.float32())),
                    "label": [i % 2 for i in range(self._rows)],
                }
            )
            pq.write_table(table, Path(folder) / "rows.parquet")
            return train_in_process(config, f"{folder}/rows.parquet")

    @property
    def _shards(self) -> int:
        return max(2, min(self.workers, _MOST_WORKERS))

    @property
    def _rows(self) -> int:
        return _STEPS * _ROWS_OF_SHARD * self._shards

    def _configured(self, kind: EngineKind) -> Config:
        train, shards = self.config.train, self._shards
        tiny = Config.from_dict(
            {
                "model": {"name": "torch.nn:Linear", "in_features": 2, "out_features": 2},
                "optimizer": {"name": "SGD", "lr": 0.1, "momentum": 0.9},
                "train": {
                    "steps": _STEPS,
                    "rows_per_step": _ROWS_OF_SHARD * shards,
                    "num_shards": shards,
                    "threads": train.threads,
                    "instruction_set": train.instruction_set,
                },
            }
        )
        engine = EngineConfig(
            name=kind.name,
            num_workers=min(self.workers, shards),
            barrier=kind is not STAGES,
            slots_timeout_s=self.patience_s,
            step_timeout_s=self.patience_s,
            peer_timeout_s=self.patience_s,
            max_attempts=1,
            encrypt=self.config.engine.encrypt,
            ports=self.config.engine.ports,
        )
        return replace(tiny, engine=engine)


ENGINES = (INLINE, TREE, STAGES, ALLREDUCE)
"""The engines, the reference first."""


def name_of(kind: EngineKind) -> str:
    return "tree, stages" if kind is STAGES else kind.name
