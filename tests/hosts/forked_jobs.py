"""Runs a job in a fork of this process for each line of its input, which is the job's folder.

It imports torch once.  A fork waits until it is told to begin, so that a tracer can be attached before.
For each line it prints the fork's process, and once more its exit status.
"""

from __future__ import annotations

import io
import os
import sys

from rich.console import Console

import sparksgd.training.in_process  # noqa: F401  # imported once, for all forks
from sparksgd.cli.run import run
from sparksgd.cli.terminal import Terminal
from sparksgd.config import Config
from sparksgd.training import checkpointing


def main(rows: str, model: str) -> None:
    """Fork for each line."""
    checkpointing.SHARE = 1e9
    for line in sys.stdin:
        ours, theirs = os.pipe()
        child = os.fork()
        if not child:
            print(os.getpid(), flush=True)
            os.close(theirs)
            _job(rows, model, line.strip())
        os.close(ours)
        _, status = os.waitpid(child, 0)
        os.close(theirs)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _job(rows: str, model: str, out: str) -> None:
    while not os.path.exists(f"{out}.go"):  # noqa: PTH110  # the tracer is attached then
        os.sched_yield()
    config = {
        "data": {"train": rows, "test": rows},
        "model": {"name": model},
        "optimizer": {"name": "Adam", "lr": 0.01},
        "engine": {"name": "inline"},
        "train": {"epochs": 1, "rows_per_step": 32, "num_shards": 4, "seed": 5, "eval_every": 2},
        "checkpoint": {"every_steps": 1, "keep": 1},
    }
    try:
        terminal = Terminal(Console(file=io.StringIO()), tables=False)
        run(Config.from_dict(config), out, run_id="r", terminal=terminal)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
