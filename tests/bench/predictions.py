"""How fast `sparksgd.predict` is: against a bare loop of the module, and against a UDF of one row.

    python tests/bench/predictions.py [--data DIR] [--times N]

Arms run in turns in one session, each over the same rows, whose predictions go nowhere (Spark's noop sink);
medians are compared.  The bare loop is one process with one thread, in batches of 512 rows; its rows/s are
doubled, as if two such processes ran without disturbing each other.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import pyarrow.parquet as pq
import torch
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from rich.console import Console
from rich.table import Table
from torch import nn

import sparksgd
from sparksgd.data.schema import Feature, RowSchema
from sparksgd.models import LeNet
from sparksgd.models.losses import cross_entropy
from sparksgd.runs.model import SavedModel

SLOTS = 2
COPIES = 2  # of the 60,000 images
FEW_ROWS = 20_000  # of the arm that computes one by one


def small_net() -> nn.Module:
    """Return a net that costs next to nothing."""
    return nn.Sequential(nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 10))


class Floats(nn.Module):
    """Feeds images of bytes to a module that wants numbers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.inner(image.float() / 255)


def model_of(module: nn.Module) -> SavedModel:
    """Return a module as a model of images."""
    schema = RowSchema(
        features=(Feature(name="image", dtype="uint8", length=784),),
        label="label",
        label_dtype="int64",
        classes=10,
    )
    return SavedModel(module=module.eval(), schema=schema, loss=cross_entropy, kind="classes")


def bare_loop(module: nn.Module, images: torch.Tensor) -> None:
    """Compute probabilities as one would without Spark."""
    with torch.inference_mode():
        for start in range(0, len(images), 512):
            torch.softmax(module(images[start : start + 512]), 1).numpy()


def row_udf(module: nn.Module) -> Callable[[DataFrame], DataFrame]:
    """Return what adds a module's predictions by a UDF that gets one row."""

    def predicted(image: bytes) -> list[float]:
        torch.set_num_threads(1)
        with torch.inference_mode():
            batch = torch.frombuffer(bytearray(image), dtype=torch.uint8)[None]
            return torch.softmax(module(batch), 1)[0].tolist()

    function = F.udf(predicted, "array<float>")
    return lambda rows: rows.withColumn("probability", function("image"))


def consumed(rows: DataFrame) -> None:
    rows.write.format("noop").mode("overwrite").save()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="data/mnist", help="has train.parquet")
    parser.add_argument("--times", type=int, default=5, help="how often each arm runs")
    args = parser.parse_args(argv)
    session = SparkSession.builder.master(f"local[{SLOTS}]").config("spark.ui.enabled", "false").getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    path = f"{args.data}/train.parquet"
    rows = session.read.parquet(path).select("image").crossJoin(session.range(COPIES)).repartition(8).cache()
    few = rows.limit(FEW_ROWS).repartition(8).cache()
    count = rows.count() + 0 * few.count()
    images = np.frombuffer(b"".join(pq.read_table(path)["image"].to_pylist()), np.uint8).reshape(-1, 784)
    tensor = torch.from_numpy(images.copy())
    torch.set_num_threads(1)
    torch.manual_seed(0)
    nets = {
        "LeNet of 431,080 parameters": LeNet(maps=(20, 50), hidden=500, padding=0),
        "a small net": Floats(small_net()),
    }
    arms: dict[str, tuple[int, Callable[[], object]]] = {}
    for name, module in nets.items():
        model, module = model_of(module), module.eval()
        arms[f"{name}: bare loop"] = (len(tensor) * SLOTS, lambda module=module: bare_loop(module, tensor))
        arms[f"{name}: sparksgd.predict"] = (
            count,
            lambda model=model: consumed(sparksgd.predict(rows, model)),
        )
        arms[f"{name}: UDF of one row"] = (FEW_ROWS, lambda module=module: consumed(row_udf(module)(few)))
    took_s: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(args.times + 1):
        for name, (_, run) in arms.items():
            started = time.perf_counter()
            run()
            if turn:  # the first one loads modules and code
                took_s[name].append(time.perf_counter() - started)
    table = Table(title=f"Predictions on {SLOTS} slots, median of {args.times}", title_justify="left")
    for column in ("arm", "rows/s", "of the bare loop"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    speed = {name: arms[name][0] / statistics.median(seconds) for name, seconds in took_s.items()}
    for name, rate in speed.items():
        bare = speed[f"{name.partition(':')[0]}: bare loop"]
        table.add_row(name, f"{rate:,.0f}", f"{rate / bare:.2f}")
    Console().print(table)
    session.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
