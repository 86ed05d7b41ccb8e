"""A question on 40 points of two numbers, and outcomes that are made up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

from sparksgd.runs.comparing.course import Comparison, Entry, Tuned
from sparksgd.runs.comparing.grid import Settings
from sparksgd.runs.comparing.outcomes import Evaluated, Outcome
from sparksgd.runs.comparing.question import Competitor, Question

TUNED = Tuned(
    cluster="fast", chosen=Settings(rate=0.1, momentum=0.9), trials=12, diverged=1, rows=2400,
    virtual_s=36.0, at_edge=False,
)  # fmt: skip


def points_net() -> nn.Module:
    return nn.Linear(2, 2)


def numbers_net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))


def comparison_file(folder: Path, *more: str, trials: int = 4) -> Path:
    """Write rows, and a comparison of three solvers on two clusters."""
    source = np.random.default_rng(5)
    points = source.normal(size=(40, 2)).astype(np.float32)
    labels = (points[:, 0] > points[:, 1]).astype(np.int64)
    pq.write_table(pa.table({"x": list(points), "y": labels}), folder / "rows.parquet")
    text = f"""
        [base.data]
        train = "{folder}/rows.parquet"
        validation_fraction = 0.4
        features = "x"
        label = "y"
        [base.model]
        name = "comparisons:points_net"
        [base.train]
        rows_per_step = 8
        num_shards = 2
        eval_every = 1
        [compare]
        trials = {trials}
        seeds = 1
        margin = 1.0
        rates = [0.1, 0.4]
        [solvers.async_sgd]
        [solvers.local_sgd]
        knob = {{ turns_per_round = [2] }}
        [clusters.fast]
        [clusters.slow]
        num_workers = 1
        turn_s = 0.1
    """
    file = folder / "compared.toml"
    file.write_text("\n".join([text, *more]))
    return file


def run_of(
    scores: Sequence[float],
    *,
    seconds: float = 1.0,
    diverged: bool = False,
    workers: int = 2,
    turns: int | None = None,
) -> Outcome:
    """Return a run with an evaluation after each of its steps, `seconds` long, of 10 rows and 100 bytes."""
    evaluations = tuple(
        Evaluated(virtual_s=n * seconds, rows=10 * n, sent_bytes=100.0 * n, loss=1 / n, accuracy=score)
        for n, score in enumerate(scores, 1)
    )
    return Outcome(
        folder="0123", diverged=diverged, workers=workers, virtual_s=len(scores) * seconds,
        rows=10 * len(scores), turns=turns or len(scores), evaluations=evaluations, staleness={},
    )  # fmt: skip


def compared(question: Question, **runs: Sequence[Outcome]) -> Comparison:
    """Return a comparison on one cluster, `fast`, with the target 0.8."""
    entries = tuple(
        Entry(
            cluster="fast", competitor=Competitor(label=label, rule={"name": label}), tuned=TUNED,
            outcomes=tuple(outcomes),
        )
        for label, outcomes in runs.items()
    )  # fmt: skip
    one_process = replace(TUNED, cluster=None)
    return Comparison(question=question, target=0.8, one_process=one_process, entries=entries)
