"""A data set that is larger than its container trains in it, while YARN counts every page."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkouts import ROOT, Checkout, sets
from users_modules import BIG_ROW_BYTES  # tests/modules

pytestmark = pytest.mark.cluster

HEAP_MIB, OVERHEAD_MIB = 512, 1536  # as conf/spark-yarn.conf has it: two pools of Python workers, torch
ROWS = 3 * (HEAP_MIB + OVERHEAD_MIB) * (1 << 20) // BIG_ROW_BYTES
ROWS_PER_GROUP = 128
"""Spark reads a group of rows at once, into the heap."""


def write_big_rows(file: Path) -> None:
    """Write rows of 64 kB, almost all of them zeros, so that they are small on the way."""
    schema = pa.schema([("features", pa.binary()), ("label", pa.int32())])
    rest = bytes(BIG_ROW_BYTES - 8)
    with pq.ParquetWriter(file, schema, use_dictionary=False, compression="zstd") as writer:
        for start in range(0, ROWS, ROWS_PER_GROUP):
            numbers = range(start, min(start + ROWS_PER_GROUP, ROWS))
            features = pa.array([number.to_bytes(8, "little") + rest for number in numbers], pa.binary())
            labels = pa.array([number % 2 for number in numbers], pa.int32())
            writer.write_table(pa.table([features, labels], schema=schema))


@pytest.mark.timeout(900)
def test_rows_of_three_times_a_containers_memory_train_under_yarns_own_check(
    checkout: Checkout, tmp_path: Path
) -> None:
    write_big_rows(tmp_path / "big.parquet")
    put = checkout.run("hdfs", "dfs", "-put", str(tmp_path / "big.parquet"), "/data/big.parquet")
    assert put.returncode == 0, put.stdout
    words = checkout.on_yarn(
        *sets(
            "data.train=hdfs:///data/big.parquet", "data.test=none", "data.features=features",
            "model.name=users_modules:WideNet", "schedule.name=none", "schedule.max_lr=none",
            "schedule.total_steps=none", "schedule.pct_start=none", "schedule.cycle_momentum=none",
            "optimizer.lr=0.001", f"train.rows_per_step={ROWS // 10}", "train.rows_per_backward=64",
            "train.steps=10", "train.num_shards=8",
        ),
        "--out", "hdfs:///models/big",
        modules=[ROOT / "tests" / "modules" / "users_modules.py"],
        settings=["--num-executors", "1", "--executor-memory", f"{HEAP_MIB}m", "--conf",
                  f"spark.executor.memoryOverhead={OVERHEAD_MIB}m"],
    )  # fmt: skip
    done = checkout.run(*words, timeout_s=850)
    assert done.returncode == 0, done.stdout
    summary = checkout.summary("/models/big")
    assert (summary["train_rows"], summary["steps"], summary["retried_steps"]) == (ROWS, 10, 0)
    assert "is lost" not in done.stdout
