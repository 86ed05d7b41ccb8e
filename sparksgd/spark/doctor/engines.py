"""Three steps of a tiny module on every engine that the cluster carries: do they end at the same bits?

On the server engine chance decides whose message comes first: what it made is repeated in this process, and
must end at the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import SparkSession

from sparksgd.config import Config, EngineConfig
from sparksgd.engines.kinds import ALLREDUCE, INLINE, SERVER, STAGES, TREE, EngineKind
from sparksgd.engines.protocol import StepReport
from sparksgd.engines.trace import TraceEvent
from sparksgd.errors import ReplayDiffers
from sparksgd.spark.doctor.findings import Finding, bad, good, unseen
from sparksgd.spark.train import train
from sparksgd.storage.scratch import scratch_folder
from sparksgd.training.in_process import train_in_process
from sparksgd.training.replay import Replay
from sparksgd.training.state import Observer, Training

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
        made = _Made()
        training = self._trained(kind, observers=[made])
        digest = training.flat.parameters_sha256()
        step_ms = 1e3 * training.step_times.medians_s()["total"]
        where = "in this process" if kind is INLINE else f"{len(training.numerics) - 1} workers"
        seen = f"{_STEPS} steps, {where}, {step_ms:,.0f} ms a step, parameters {digest[:12]}"
        if kind is SERVER:
            difference = self._difference_of_replay(training, made)
        else:
            is_first, self._digest = self._digest is None, self._digest or digest
            difference = None if digest == self._digest else f"{self._digest[:12]} by the first one"
            seen += "" if difference or is_first else ": equal"
        if difference is not None:
            yield bad(
                name,
                f"{seen}, but {difference}: machines compute differently",
                "--set train.instruction_set=default, and one environment for driver and executors",
            )
        else:
            yield good(name, f"{seen}: equal when repeated here" if kind is SERVER else seen)

    def _difference_of_replay(self, training: Training, made: _Made) -> str | None:
        """Repeat a run of the server in this process; return what is different, if anything."""
        replay = Replay(
            config=training.config.to_dict(),
            data_digest=training.rows.data_digest,
            model_name=training.model_name,
            took_part=(),
            deals=(),
            parameters_sha256=training.flat.parameters_sha256(),
            arrivals=made.events,
            arrival_losses=made.losses,
        )
        try:
            self._trained(SERVER, replay=replay)
        except ReplayDiffers as error:
            return f"repeated here it differs ({error})"
        return None

    def _trained(
        self, kind: EngineKind, observers: Sequence[Observer] = (), replay: Replay | None = None
    ) -> Training:
        config = self._configured(kind)
        if kind.on_spark and replay is None:
            rows = self.session.range(self._rows).selectExpr(
                f"{_COLUMNS[0]} as features", f"{_COLUMNS[1]} as label"
            )
            return train(self.session, config, rows, run_id=self.run_id, observers=observers)
        features = [[i / 100, float(i % 3)] for i in range(self._rows)]
        with scratch_folder() as folder:
            table = pa.table(
                {
                    "features": pa.array(features, pa.list_(pa.float64())),
                    "label": [i % 2 for i in range(self._rows)],
                }
            )
            pq.write_table(table, folder / "rows.parquet")
            config = replace(config, engine=replace(config.engine, name=INLINE.name))
            return train_in_process(config, f"{folder}/rows.parquet", replay=replay)

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
                **({"solver": {"name": "async_sgd"}} if kind is SERVER else {}),
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


class _Made(Observer):
    """Keeps what a run of arrivals was made of."""

    def __init__(self) -> None:
        self.events: list[TraceEvent] = []
        self.losses: list[float] = []

    def stepped(self, training: Training, report: StepReport) -> None:
        """Keep the events and the loss of a step."""
        self.events += report.trace
        self.losses.append(report.loss)


ENGINES = (INLINE, TREE, STAGES, ALLREDUCE, SERVER)
"""The engines, the reference first."""


def name_of(kind: EngineKind) -> str:
    return "tree, stages" if kind is STAGES else kind.name
