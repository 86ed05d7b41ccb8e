"""What the checksums of records cost: turns of a shard with them and without, alternating.

    python tests/bench/checksums.py [--turns N]

A turn reads 64 rows of 3,144 bytes from a shard file, and computes their gradient on one thread: with LeNet
of 431,080 parameters, and with a softmax regression, whose turns are the shortest that a user may have.
Medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from sparksgd.arithmetic.flat import FlatModule
from sparksgd.data import shard as shards
from sparksgd.data.sampling import Sampling
from sparksgd.data.schema import Feature, RowSchema
from sparksgd.data.shard import Descriptor, ShardWriter
from sparksgd.engines.compute import Computer, Plan
from sparksgd.models import LeNet
from sparksgd.models.losses import cross_entropy
from sparksgd.solvers.protocol import Answer, Halves
from sparksgd.solvers.synchronous import SendGradients

ROWS, PIECE = 6_400, 64
SCHEMA = RowSchema(
    features=(Feature(name="image", dtype="float32", length=784),),
    label="label",
    label_dtype="int64",
    classes=10,
)


def written(folder: Path) -> Descriptor:
    """Return a shard of random rows."""
    drawn = np.random.default_rng(1)
    records = np.empty(ROWS, SCHEMA.record)
    records["image"] = drawn.random((ROWS, 784))
    records["(label)"] = drawn.integers(0, 10, ROWS)
    with ShardWriter(folder, 0) as writer:
        writer.append(np.zeros((ROWS, 32), np.uint8), records.view(np.uint8).reshape(ROWS, -1))
        return writer.close()


def turns_s(module: nn.Module, shard: Descriptor, turns: int) -> tuple[float, float]:
    """Return the median seconds of a turn, with checksums and without."""
    plan = Plan(
        module=module,
        loss=cross_entropy,
        schema=SCHEMA,
        sampling=Sampling(shard_rows=(ROWS,), rows_per_step=PIECE, seed=0),
        halves=Halves(make=SendGradients),
        threads=1,
    )
    computer, weights = Computer(plan), FlatModule(module).weights(0)
    took_s: dict[bool, list[float]] = {True: [], False: []}
    with computer.many_rounds():
        for number in range(2 * turns + 20):
            is_checked = number % 2 == 0
            skipped = mock.patch.object(shards, "_require_written", return_value=None)
            with nullcontext() if is_checked else skipped:
                began_s = time.perf_counter()
                reply = computer.round(0, [shard], Answer(weights=weights, turn=number))
                ended_s = time.perf_counter()
            assert reply.failure is None, reply.failure
            if number >= 20:
                took_s[is_checked].append(ended_s - began_s)
    return statistics.median(took_s[True]), statistics.median(took_s[False])


def main(argv: Sequence[str]) -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=400, help="turns of each kind")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    modules = {
        "LeNet, 431,080 parameters": nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)), LeNet(maps=(20, 50), hidden=500)
        ),
        "softmax regression, 7,850 parameters": nn.Linear(784, 10),
    }
    table = Table("module", "turn", "without checksums", "their share")
    with tempfile.TemporaryDirectory() as temporary:
        shard = written(Path(temporary))
        for name, module in modules.items():
            with_s, without_s = turns_s(module, shard, options.turns)
            share = 1 - without_s / with_s
            table.add_row(name, f"{1e3 * with_s:.3f} ms", f"{1e3 * without_s:.3f} ms", f"{share:.1%}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
