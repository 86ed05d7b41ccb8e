"""Program: train small experiments on an engine, and print the digest at which each ends, as JSON.

    python golden_runs.py inline
    python golden_runs.py tree:1,2,3,4 allreduce:2:adam stages:4:"backup replay"

An argument is an engine, the numbers of workers, and an experiment; without one, all that the engine carries.
The environment must hold torch to the instruction set AVX2 before Python starts.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS, SHARDS, STEPS = 601, 4, 14
NUMERICS = {"torch": "2.13.0+cpu", "instruction_set": "AVX2", "arithmetic": "114241f33252"}
"""What the digests are of: elsewhere nothing is trained."""

SIDE = 12
"""Images are SIDE x SIDE; their labels can be learnt."""

SMALL_LENET = {"model": {"name": "lenet", "maps": [4, 6], "hidden": 24, "classes": 4, "side": SIDE}}
NORM_NET = {"model": {"name": "golden_modules:ConvNormNet"}}
MOMENTUM = {"name": "SGD", "lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}

EXPERIMENTS = {
    "synchronous": {**SMALL_LENET, "optimizer": {"lr": 0.05}},
    "momentum": {**SMALL_LENET, "optimizer": MOMENTUM},
    "schedule": {
        **SMALL_LENET,
        "optimizer": MOMENTUM,
        "schedule": {"name": "OneCycleLR", "max_lr": 0.1, "total_steps": STEPS},
    },
    "adam": {**SMALL_LENET, "optimizer": {"name": "AdamW", "lr": 0.002}},
    "batch-norm": {**NORM_NET, "optimizer": MOMENTUM},
    "clipping": {**SMALL_LENET, "optimizer": MOMENTUM, "solver": {"clip_norm": 0.5}},
    "backup replay": {**NORM_NET, "optimizer": MOMENTUM, "solver": {"backup_workers": 1}},
}
TOOK_PART = [frozenset(range(SHARDS)) - {step % (SHARDS + 1)} for step in range(STEPS)]
"""What the replayed run recorded: in some steps all took part."""
DEALS = [0] * 10 + [1] * (STEPS - 10)
"""An epoch has ten steps; after the first the rows were dealt anew."""


def tables(experiment: str) -> dict[str, dict[str, object]]:
    """Return the configuration of an experiment."""
    return {
        "data": {"features": "image"},
        "train": {
            "rows_per_step": 64, "num_shards": SHARDS, "epochs": 2, "steps": STEPS, "seed": 7,
            "instruction_set": "avx2",
        },
        **EXPERIMENTS[experiment],
    }  # fmt: skip


def write_rows(folder: Path) -> str:
    """Write the rows that all experiments train on; return the file's path."""
    drawn = np.random.default_rng(11)
    images = drawn.integers(0, 128, (ROWS, SIDE, SIDE), dtype=np.uint8)
    labels = drawn.integers(0, 4, ROWS)
    for image, label in zip(images, labels, strict=True):
        half = SIDE // 2
        image[(label // 2) * half :, (label % 2) * half :][:half, :half] += 100
    table = pa.table(
        {"image": pa.array([image.tobytes() for image in images], pa.binary()), "label": pa.array(labels)}
    )
    pq.write_table(table, folder / "rows.parquet")
    return str(folder / "rows.parquet")


def arms(words: list[str]) -> Iterator[tuple[str, int, str]]:
    """Yield (engine, workers, experiment) of every run that the words ask for."""
    for word in words:
        engine, numbers, experiment = [*word.split(":"), "", ""][:3]
        for name in [experiment] if experiment else EXPERIMENTS:
            if runs_on(name, engine):
                for count in map(int, numbers.split(",")) if numbers else [1]:
                    yield engine, SHARDS if name == "backup replay" else count, name


def runs_on(experiment: str, engine: str) -> bool:
    """Return whether an engine carries an experiment: the ordinary stages alone have backups."""
    return experiment != "backup replay" or engine in ("inline", "stages")


def main(words: list[str]) -> None:
    """Print the digests of parameters and buffers, by engine, workers and experiment."""
    from golden_trainings import numerics, run

    found: dict[str, list[str]] = {}
    here = numerics()
    with tempfile.TemporaryDirectory() as folder:
        path = write_rows(Path(folder))
        for engine, workers, name in dict.fromkeys(arms(words) if here == NUMERICS else ()):
            found[f"{name} / {engine} / {workers}"] = list(run(path, engine, workers, name))
    print(json.dumps({"numerics": here, "digests": found}))


if __name__ == "__main__":
    main(sys.argv[1:])
