"""Jobs on a few rows that are stopped, and go on."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from sparksgd.cli.run import run
from sparksgd.cli.terminal import Terminal
from sparksgd.config import Config
from sparksgd.runs.checkpoints import manifests
from sparksgd.runs.json_files import digest_of
from sparksgd.storage import location
from sparksgd.training.state import Observer, Training

EVERY_STEP = {"checkpoint": {"every_steps": 1, "keep": 1000}}
SHORT = {"train": {"epochs": 1, "rows_per_step": 32}, "checkpoint": {"every_steps": 1, "keep": 1}}

KINDS: dict[str, dict[str, Any]] = {
    "momentum, one cycle": {
        "optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9, "nesterov": True},
        "schedule": {"name": "OneCycleLR", "max_lr": 0.1, "total_steps": 10},
    },
    "AdamW, norm, dropout, clipping": {
        "model": {"name": "resumed_modules:with_norm"},
        "optimizer": {"name": "AdamW", "lr": 0.01},
        "solver": {"clip_norm": 0.5},
    },
    "heads that steps leave out": {
        "model": {"name": "resumed_modules:TwoHeads"},
        "optimizer": {"name": "Adam", "lr": 0.02},
    },
    "a projection in forward": {
        "model": {"name": "resumed_modules:Projected"},
        "optimizer": {"name": "RMSprop", "lr": 0.02},
        "schedule": {"name": "MultiStepLR", "milestones": [3, 9]},
    },
    "optimiser and schedule of one's own": {
        "optimizer": {"name": "resumed_modules:Slow", "lr": 0.02},
        "schedule": {"name": "resumed_modules:Steps"},
    },
    "local SGD": {
        "optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9},
        "solver": {
            "name": "local_sgd", "turns_per_round": 3, "outer_lr": 0.7, "outer_momentum": 0.9,
            "inner_state": "average", "synchronous_steps": 4,
        },
    },
}  # fmt: skip

_MOMENTUM = {"name": "SGD", "lr": 0.05, "momentum": 0.9}
_KEEP = {"name": "local_sgd", "turns_per_round": 2, "inner_state": "keep"}

OF_SHARDS: dict[str, dict[str, Any]] = {
    "momentum of each shard, after synchronous steps": {
        "optimizer": _MOMENTUM, "solver": _KEEP | {"synchronous_steps": 3},
    },
    "Adam of each shard, heads that steps leave out": {
        "model": {"name": "resumed_modules:TwoHeads"},
        "optimizer": {"name": "Adam", "lr": 0.02},
        "solver": _KEEP,
    },
    "an optimiser of one's own of each shard": {
        "optimizer": {"name": "resumed_modules:Slow", "lr": 0.02}, "solver": {"name": "gradient_push"},
    },
    "momentum that a schedule switches on": {
        "optimizer": {"name": "SGD", "lr": 0.05},
        "schedule": {"name": "resumed_modules:MomentumLater"},
        "solver": _KEEP,
    },
    "elastic averaging in rounds": {
        "optimizer": _MOMENTUM,
        "schedule": {"name": "StepLR", "step_size": 3, "gamma": 0.5},  # which a lookahead reads
        "solver": {
            "name": "elastic_averaging", "order": "together", "turns_per_exchange": 2, "lookahead": True,
        },
    },
    "gradient push": {"optimizer": _MOMENTUM, "solver": {"name": "gradient_push"}},
    "gradient push, overlapped": {
        "optimizer": {"name": "AdamW", "lr": 0.02}, "solver": {"name": "gradient_push", "overlap": True},
    },
    "decentralised": {"optimizer": _MOMENTUM, "solver": {"name": "decentralised"}},
    "shards without rows": {
        "train": {"num_shards": 60, "rows_per_step": 9}, "optimizer": _MOMENTUM, "solver": _KEEP,
    },
}  # fmt: skip
"""Rules in rounds and gossip whose shards keep a state between steps."""


def without_turns_of_shards(run: dict[str, Any]) -> dict[str, Any]:
    """Return the part "run" of a checkpoint as version 4 had it."""
    new = {"staleness", "ignored", "lost_workers", "next_turns"}
    participation = {key: value for key, value in run["participation"].items() if key not in new}
    return without_attributes(run) | {"participation": participation}


def without_attributes(run: dict[str, Any]) -> dict[str, Any]:
    """Return the part "run" of a checkpoint as version 5 had it."""
    return {key: value for key, value in run.items() if key != "attributes"}


class Stops(Observer):
    """Interrupts a run when it tells of a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def stepped(self, training: Training, report: Any) -> None:
        """Raise at the step."""
        if report.step == self._step:
            raise KeyboardInterrupt


def must_resume_from(out: Path) -> int | None:
    """Return the step that the same command must go on from; None: it begins anew, or has nothing to do."""
    summary = out / "summary.json"
    if summary.exists() and json.loads(summary.read_text())["status"] == "finished":
        return None
    found = manifests(location(out / "checkpoints"))
    return found[0].step if found else None


def resumed_from(summary: dict[str, Any]) -> int | None:
    """Return the step that a run went on from; None: it began anew."""
    return summary["resumed"][-1]["step"] if "resumed" in summary else None


@dataclass(frozen=True)
class Jobs:
    """Runs jobs on the same rows."""

    folder: Path

    def config(self, *tables: dict[str, dict[str, Any]]) -> dict[str, Any]:
        rows = str(self.folder / "rows.parquet")
        found: dict[str, Any] = {
            "data": {"train": rows, "test": rows},
            "model": {"name": "torch.nn:Linear", "in_features": 4, "out_features": 2},
            "optimizer": {"name": "Adam", "lr": 0.01},
            "engine": {"name": "inline"},
            "train": {"epochs": 2, "rows_per_step": 20, "num_shards": 4, "seed": 5},
        }
        for table in tables:
            for section, keys in table.items():
                same = keys.get("name", None) in (None, found.get(section, {}).get("name"))
                found[section] = (found.get(section, {}) if same else {}) | keys
        return found

    def run(self, out: str, *tables: dict[str, dict[str, Any]], **how: Any) -> dict[str, Any]:
        terminal = Terminal(Console(file=io.StringIO()), tables=False)
        run(
            Config.from_dict(self.config(*tables)),
            str(self.folder / out),
            run_id=out,
            terminal=terminal,
            **how,
        )
        found: dict[str, Any] = json.loads((self.folder / out / "summary.json").read_text())
        return found

    def stopped_at(self, out: str, step: int, *tables: dict[str, dict[str, Any]]) -> None:
        """Run a job that is interrupted while it tells of the step after this one."""

        def stepped(_: Observer, training: Training, report: Any) -> None:
            if report.step == step + 1:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Terminal, "stepped", stepped)
            with pytest.raises(KeyboardInterrupt):
                self.run(out, *tables)


def made_jobs(folder: Path) -> Jobs:
    """Return jobs on 100 rows, which are written to the folder."""
    source = np.random.default_rng(3)
    x = source.normal(size=(100, 4)).astype("f4")
    label = (x[:, 0] + x[:, 1] > 0).astype("i8")
    pq.write_table(pa.table({"features": x.tolist(), "label": label}), folder / "rows.parquet")
    return Jobs(folder)


def metrics(out: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl, but for how long things took."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "timing"} for line in lines]


def copied_until(run: Path, to: Path, names: list[str]) -> None:
    """Copy a run's folder as it was when these checkpoints were there."""
    (to / "checkpoints").mkdir(parents=True)
    for file in (run / "checkpoints").iterdir():
        if file.name.partition(".")[0] in names:
            (to / "checkpoints" / file.name).write_bytes(file.read_bytes())
    for name in ("metrics.jsonl", "run.json"):
        (to / name).write_bytes((run / name).read_bytes())


def forge(manifest: Path, **changes: Any) -> None:
    """Change a manifest, with a digest that fits."""
    values = json.loads(manifest.read_text()) | changes
    manifest.write_text(json.dumps(values | {"sha256": digest_of(values)}))


def without_digests(run: Path) -> None:
    """Let the records of a run be those of the version before, so that its files may be changed."""
    for name in ("run.json", "summary.json"):
        if (run / name).exists():
            values = json.loads((run / name).read_text())
            for key in ("format", "sha256", "files"):
                values.pop(key, None)
            (run / name).write_text(json.dumps(values))
