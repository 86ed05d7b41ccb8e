"""Virtual time against the clock: the server engine is measured with few workers, and more are predicted.

Workers sleep instead of computing, so that there may be more of them than cores: a turn takes 20 ms,
log-normal, and one in twenty 60 ms more.  The times of turns are those of the run with two workers; what the
server and the wire cost is fitted with one.  Then steps and staleness with three to eight are predicted, and
measured twice, which says how far reality repeats itself.

    python tests/bench/predicted.py [--steps 1500]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

from sparksgd.config import Config, TrainConfig
from sparksgd.runs.folder import RunFolder
from sparksgd.spark.session import start_session
from sparksgd.spark.train import train
from sparksgd.training.in_process import train_in_process
from sparksgd.training.state import Observer, Probe

MEDIAN_S, SPREAD, TAIL_SHARE, TAIL_S = 0.02, 0.2, 0.05, 0.06
MOST_WORKERS = 8
SHARES = (0.5, 0.95)


@dataclass(frozen=True)
class Sleeps:
    """Lets a worker sleep as long as its turn would take, drawn by its number and the turn's."""

    seed: int

    def __call__(self, worker: int, turn: int) -> None:
        drawn = np.random.default_rng([self.seed, worker, turn])
        seconds = MEDIAN_S * float(np.exp(SPREAD * drawn.standard_normal()))
        time.sleep(seconds + (TAIL_S if drawn.random() < TAIL_SHARE else 0.0))


class Seen(Observer):
    """Keeps how long steps took, and the staleness of each message."""

    def __init__(self) -> None:
        self.steps_s: list[float] = []
        self.staleness: list[int] = []
        self.beside_s: list[float] = []  # what a step took beside computing
        self.busy_s: list[float] = []

    def stepped(self, training: Any, report: Any) -> None:
        self.steps_s.append(report.timing.total)
        self.staleness += report.staleness
        if report.server is not None:
            self.beside_s.append(report.timing.total - report.server.computed_s)
            self.busy_s.append(report.server.busy_s)

    def figures(self) -> dict[str, float]:
        """Return quantiles, without the first tenth: workers begin together."""
        first = len(self.steps_s) // 10
        return {
            f"p{100 * share:g} {what}": float(np.quantile(values[first:], share))
            for what, values in (
                ("of a step, ms", 1e3 * np.array(self.steps_s)),
                ("staleness", self.staleness),
            )
            for share in SHARES
        }


def configured(workers: int, steps: int, engine: str, cluster: dict[str, Any] | None = None) -> Config:
    return Config.from_dict(
        {
            "data": {"features": "x", "label": "y"},
            "loss": {"name": "squared_error"},
            "optimizer": {"name": "SGD", "lr": 1e-4},
            "solver": {"name": "async_sgd"},
            "engine": {"name": engine, "num_workers": workers},
            "cluster": cluster or {},
            "train": {
                "num_shards": workers, "rows_per_step": 8 * workers, "steps": steps // workers,
                "epochs": 10_000,
            },
        }
    )  # fmt: skip


def main() -> None:
    """Print a line for each number of workers and each figure."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, default=1500)
    steps = options.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/rows.parquet"
        drawn = np.random.default_rng(0).standard_normal((1024, 3)).astype(np.float32)
        pq.write_table(pa.table({"x": drawn.tolist(), "y": drawn.sum(1).tolist()}), path)
        os.environ["PYSPARK_PYTHON"] = sys.executable
        os.environ["PYSPARK_SUBMIT_ARGS"] = f"--master local[{MOST_WORKERS}] pyspark-shell"
        spark = start_session("predicted", TrainConfig())

        def real(workers: int, seed: int, out: str | None = None) -> Seen:
            seen = Seen()
            folders = [] if out is None else [RunFolder(Path(folder) / out)]
            train(
                spark, configured(workers, steps, "server"), path, module=nn.Linear(3, 1),
                observers=[seen, *folders], probe=Probe(before_gradients=Sleeps(seed)),
            )  # fmt: skip
            return seen

        one = real(1, 1)
        real(2, 1, "two")
        server_s, beside_s = statistics.median(one.busy_s), statistics.median(one.beside_s)
        cluster = {
            "recorded": f"{folder}/two", "link_bytes_per_s": 1e18, "server_s": server_s,
            "latency_s": max(0.0, beside_s - server_s) / 2,
        }  # fmt: skip
        print(f"fitted: a message takes the server {1e3 * server_s:.2f} ms, the wire {1e3 * beside_s:.2f} ms")
        errors, repeats = [], []
        for workers in range(3, MOST_WORKERS + 1):
            seen = Seen()
            train_in_process(
                configured(workers, steps, "simulated", cluster),
                path,
                module=nn.Linear(3, 1),
                observers=[seen],
            )
            said, was, again = seen.figures(), real(workers, 1).figures(), real(workers, 2).figures()
            for name, predicted in said.items():
                error, repeat = predicted / was[name] - 1, again[name] / was[name] - 1
                errors.append(abs(error))
                repeats.append(abs(repeat))
                print(
                    f"{workers} workers, {name}: predicted {predicted:.2f}, measured {was[name]:.2f} and "
                    f"{again[name]:.2f}: {error:+.0%} (reality {repeat:+.0%})"
                )
        print(
            f"error of predictions: median {statistics.median(errors):.1%}, largest {max(errors):.1%}; of "
            f"reality by itself: {statistics.median(repeats):.1%}, {max(repeats):.1%}"
        )
        spark.stop()


if __name__ == "__main__":
    main()
