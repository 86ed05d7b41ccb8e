"""Who took part in which step: what backup workers make part of an experiment.

Which gradients come first is chance, so it is recorded, step by step; a run with the same record ends
at the same parameters.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparksgd.config import Config
from sparksgd.errors import ConfigError, DataError
from sparksgd.storage import Location, location

if TYPE_CHECKING:  # it imports torch, which a replay must not before its instruction set is pinned
    from sparksgd.engines.protocol import StepReport

__all__ = ["METRICS", "MODEL", "RECORD", "SUMMARY", "Participation", "Record"]

METRICS = "metrics.jsonl"
MODEL = "model/model.json"
RECORD = "record.json"
SUMMARY = "summary.json"
"""Files of a run's folder: a line for each step, what the run was, and what came of it."""

_KEPT = 10_000  # arrivals of each worker, of which quantiles are taken
_LEAST_SHARE = 0.5  # of an epoch's steps, below which a shard is starved
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


class Participation:
    """Counts in how many steps each shard took part, and when workers answered.

    Args:
        num_shards: S.
    """

    def __init__(self, num_shards: int) -> None:
        self._steps = 0
        self._of_shard = [0] * num_shards
        self._epoch_steps = 0
        self._epoch_of_shard = [0] * num_shards
        self._late: dict[int, int] = defaultdict(int)
        self._answers: dict[int, int] = defaultdict(int)
        self._arrivals_s: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_KEPT))

    def add(self, report: StepReport) -> None:
        """Note a step."""
        self._steps += 1
        self._epoch_steps += 1
        for shard in report.took_part:
            self._of_shard[shard] += 1
            self._epoch_of_shard[shard] += 1
        for worker in report.late:
            self._late[worker] += 1
        for arrival in report.arrivals:
            self._answers[arrival.worker] += 1
            self._arrivals_s[arrival.worker].append(arrival.arrived_s)

    def starved(self) -> dict[int, float]:
        """Return the share of the epoch's steps so far of each shard that took part in fewer than half."""
        steps_made = max(1, self._epoch_steps)
        shares = {shard: steps / steps_made for shard, steps in enumerate(self._epoch_of_shard)}
        return {shard: share for shard, share in shares.items() if share < _LEAST_SHARE}

    def begin_epoch(self) -> None:
        """Count the epoch's steps anew."""
        self._epoch_steps = 0
        self._epoch_of_shard = [0] * len(self._of_shard)

    def shares(self) -> list[float]:
        """Return the share of all steps that each shard took part in."""
        return [steps / max(1, self._steps) for steps in self._of_shard]

    def by_worker(self) -> dict[int, dict[str, float | None]]:
        """Return of each worker that answers by itself how many answers came, in which share of the steps it
        was not waited for, and quantiles of the seconds until its last answers arrived.
        """
        return {
            worker: {
                "answers": self._answers.get(worker, 0),
                "late_share": self._late.get(worker, 0) / self._steps,
                **_quantiles_s(self._arrivals_s.get(worker)),
            }
            for worker in sorted(self._answers.keys() | self._late.keys())
        }


def _quantiles_s(seconds: Iterable[float] | None) -> dict[str, float | None]:
    return {
        f"arrival_{name}_s": float(np.quantile(list(seconds), share)) if seconds else None
        for name, share in _QUANTILES.items()
    }


@dataclass(frozen=True, kw_only=True)
class Record:
    """What decides the parameters of a run that is to be repeated."""

    config: dict[str, Any]
    """Its configuration, as nested tables."""

    data_digest: str
    """Of the rows trained on."""

    model_name: str | None
    """What built the module; None where it was given in Python."""

    took_part: Sequence[frozenset[int]]
    """The shards of each step."""

    deals: Sequence[int]
    """How often the rows had been dealt anew, at each step."""

    parameters_sha256: str | None
    """What it ended at; None where it was killed."""

    @classmethod
    def read(cls, folder: str | Path | Location) -> Record:
        """Read the folder of a run, whole or killed.

        Raises:
            DataError: it has no record.
        """
        try:
            run = location(folder)
            about = json.loads((run / RECORD).read_bytes())
            lines = (run / METRICS).read_bytes().splitlines(keepends=True)
            whole = [json.loads(line) for line in lines if line.endswith(b"\n")]  # the last may be cut off
            steps = [line for line in whole if line["kind"] == "step"]
            ended = run / SUMMARY
            summary = json.loads(ended.read_bytes()) if ended.exists() else {}
            steps = steps[: summary.get("steps")]  # a last one may have been given up
            record = cls(
                config=about["config"],
                data_digest=about["data_digest"],
                model_name=about["model_name"],
                took_part=[frozenset(step["took_part"]) for step in steps],
                deals=[step["deal"] for step in steps],
                parameters_sha256=summary.get("parameters_sha256"),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder} has no record of a run: {type(error).__name__}: {error}. Name the folder that "
                f"jobs/train.py --out wrote, with {RECORD} and {METRICS}"
            ) from error
        if not record.took_part:
            raise DataError(f"{folder} is the record of a run that made no step")
        return record

    def fingerprint(self) -> str:
        """Return a digest of which shards take part when."""
        steps = [(sorted(shards), deal) for shards, deal in zip(self.took_part, self.deals, strict=True)]
        return hashlib.sha256(json.dumps(steps).encode()).hexdigest()

    def check(self, config: Config, data_digest: str) -> None:
        """Refuse another experiment, or other rows.

        Raises:
            ConfigError: a key that shapes the parameters has another value.
            DataError: the rows are others.
        """
        then, now = Config.from_dict(self.config).experiment(), config.experiment()
        for key in sorted(then.keys() | now.keys()):
            if then.get(key) != now.get(key) and key not in ("data.train", "data.test", "train.steps"):
                raise ConfigError(
                    f"{key} is {now.get(key)!r}, but was {then.get(key)!r} in the run to be replayed, and it "
                    f"shapes the parameters: leave it out"
                )
        if data_digest != self.data_digest:
            raise DataError(
                f"the rows are not those of the run to be replayed: their digest is {data_digest}, but was "
                f"{self.data_digest}"
            )
