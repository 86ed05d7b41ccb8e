"""Arm: what LeNet learns of MNIST beside a worker that is always late, with a backup worker and without any.

Without one nobody is late here: its accuracy would be the same, only later.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from measuring import LEARNING_RATE, LENET, MOMENTUM, Task
from product import session_of

sys.path.insert(0, str(Path(__file__).parents[1] / "modules"))

import stragglers  # tests/modules

from sparksgd.config import Config
from sparksgd.spark.frame_rows import read_parquet
from sparksgd.spark.train import train
from sparksgd.training.state import Probe

DELAY_S = 1.0


def main(task_path: Path, answer_path: Path) -> None:
    """Train twice; write both accuracies."""
    task = Task.read(task_path)
    session = session_of(task)
    session.sparkContext.addPyFile(stragglers.__file__)
    found = {}
    for backups in (0, 1):
        config = Config.from_dict(
            {
                "data": {
                    "train": task.data,
                    "test": str(Path(task.data).with_name("test.parquet")),
                    "features": "image",
                },
                "model": LENET,
                "optimizer": {"lr": 5 * LEARNING_RATE, "momentum": MOMENTUM},
                "engine": {"num_workers": task.num_workers},
                "solver": {"backup_workers": backups},
                "train": {"epochs": task.blocks, "rows_per_step": 512, "num_shards": task.num_workers},
            }
        )
        slow = stragglers.Straggler(task.num_workers - 1, DELAY_S) if backups else None
        rows, test = (read_parquet(session, str(path)) for path in (config.data.train, config.data.test))
        training = train(session, config, rows, test, probe=Probe(before_gradients=slow))
        evaluation = training.last_evaluation
        assert evaluation is not None
        found[f"b = {backups}"] = {
            "accuracy": evaluation.accuracy,
            "steps": training.version,
            "shares": training.participation.shares(),
            "times_dealt": 1 + training.plan.deal,
        }
    session.stop()
    answer_path.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
