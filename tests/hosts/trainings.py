"""The driver program of test_two_hosts.py: trains once for each list of settings, in one session.

python trainings.py TASK.json RESULTS.json MASTER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from pyspark.sql import SparkSession

from sparksgd.config import Config
from sparksgd.spark.train import train
from sparksgd.training.state import Observer


class Hosts(Observer):
    """Observes on which hosts workers ran."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def stepped(self, training, report):
        self.seen |= {worker.host for worker in report.workers}


def main(task_path: Path, results_path: Path, master: str) -> None:
    """Train, and write what came of it."""
    task = json.loads(task_path.read_text())
    os.environ.pop("SPARK_LOCAL_IP", None)
    builder = SparkSession.builder.master(master).config("spark.ui.enabled", "false")
    for key, value in task["spark"].items():
        builder = builder.config(key, value)
    session, results = builder.getOrCreate(), []
    for settings in task["trainings"]:
        hosts = Hosts()
        config = Config.load(None, settings)
        training = train(session, config, config.data.train, config.data.test, observers=[hosts])
        results.append(
            {
                "engine": training.engine,
                "parameters_sha256": training.flat.parameters_sha256(),
                "hosts": sorted(hosts.seen),
                "retries": training.recovery.retries,
                "sent_bytes": training.sent_bytes,
            }
        )
    results_path.write_text(json.dumps(results))
    session.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
