"""The driver program of the benchmark's two hosts: runs the arms on their cluster, in turns.

python on_hosts.py TASK.json BLOCKS.json MASTER
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from measuring import Task
from processes import run_in_turns


def main(task_path: Path, blocks_path: Path, master: str) -> None:
    """Run the arms, and write their blocks."""
    os.environ.pop("SPARK_LOCAL_IP", None)  # loopback, which no host reaches
    task = replace(Task.read(task_path), master=master)
    documented = replace(task, plain_session=True)
    whole = replace(task, overlap="never")
    arms = [("allreduce.py", task), ("allreduce.py", whole), ("ddp.py", documented), ("ddp.py", task)]
    blocks_path.write_text(json.dumps([block for found in run_in_turns(arms) for block in found]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
