"""Arm: torch's DistributedDataParallel over gloo, as documented or with what sparksgd sets.

On this machine its processes start without Spark; on a cluster they are tasks, as TorchDistributor has it.

What sparksgd sets for every module are malloc's thresholds, and that convolutions' weights lie channels last.

The same model, rows and threads per worker as sparksgd's workers; every process holds all rows in memory.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from measuring import LEARNING_RATE, MODELS, MOMENTUM, Block, Task, answer
from one_process import load
from product import session_of
from pyspark import BarrierTaskContext
from torch import multiprocessing
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from turns import TURNS, Turns

from sparksgd.models import LeNet

_INTERFACE = "eth0"
_PORT = 29500


def work(rank: int, task: Task, folder: str, meeting: str) -> None:
    """Be one process of all; rank 0 writes the blocks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=task.num_workers)
    images, labels = load(task.data)
    turns = Turns() if rank == 0 else None
    blocks, arm = [], "DistributedDataParallel" if task.plain_session else "with sparksgd's settings"
    for size, (name, rows, block_steps) in enumerate(task.sizes):
        torch.manual_seed(0)
        memory_format = torch.contiguous_format if task.plain_session else torch.channels_last
        module = LeNet(**MODELS[name]).to(memory_format=memory_format)
        model = DistributedDataParallel(module)
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        step_s = []
        order = torch.randperm(len(labels))
        for step in range((1 + task.blocks) * block_steps):
            if (size or step) and step % block_steps == 0:  # each size's warm-up has a turn, too
                if turns is not None:
                    turns.next()
                dist.barrier()
            started = time.perf_counter()
            first = (step * task.num_workers + rank) * rows % (len(labels) - rows)
            batch = order[first : first + rows]
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            step_s.append(time.perf_counter() - started)
        blocks += [
            Block(
                what=f"{arm}, {name}, {rows} rows",
                rows_per_step=rows * task.num_workers,
                step_s=tuple(step_s[start : start + block_steps]),
            )
            for start in range(block_steps, len(step_s), block_steps)
        ]
    if rank == 0:
        Path(folder, "blocks").write_text(json.dumps([asdict(block) for block in blocks]))
    dist.destroy_process_group()


def measure(task: Task) -> list[Block]:
    """Start the processes; return the blocks of the first."""
    with tempfile.TemporaryDirectory() as folder:
        if task.master is None:
            multiprocessing.spawn(work, (task, folder, f"file://{folder}/store"), nprocs=task.num_workers)
        else:
            _on_cluster(task, folder)
        return [Block.from_dict(block) for block in json.loads(Path(folder, "blocks").read_text())]


def _on_cluster(task: Task, folder: str) -> None:
    """Run the processes as the tasks of a barrier stage."""
    session = session_of(task)
    turns = os.environ[TURNS]

    def be_one(_: Iterable[int]) -> Iterator[None]:
        from ddp import work  # not by value: what it uses is of this module

        context = BarrierTaskContext.get()
        os.environ |= {"GLOO_SOCKET_IFNAME": _INTERFACE, TURNS: turns}  # the host's name resolves to loopback
        first = context.getTaskInfos()[0].address.partition(":")[0]
        work(context.partitionId(), task, folder, f"tcp://{first}:{_PORT + task.plain_session}")
        yield None

    ranks = session.sparkContext.parallelize(range(task.num_workers), task.num_workers)
    ranks.barrier().mapPartitions(be_one).collect()
    session.stop()


if __name__ == "__main__":
    answer(measure)
