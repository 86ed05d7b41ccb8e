"""PySpark's daemon, with torch imported: workers that it forks need not do it, which takes each two seconds.

Faults, cancelled jobs and errors end many workers.  Jobs that are submitted have PySpark's own daemon.
"""

from __future__ import annotations

import gc

from pyspark import daemon

import sparksgd.spark.tasks.step_tasks  # noqa: F401  # it imports torch

if __name__ == "__main__":
    gc.freeze()  # workers collect garbage after each task: not over all of torch, whose pages they share
    daemon.manager()
