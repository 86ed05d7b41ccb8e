"""Read the folder of a run, so that the run can be repeated."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparksgd.config import Config
from sparksgd.engines.trace import MOST_LINE_BYTES, TraceEvent, read_trace, took_part_of
from sparksgd.errors import ConfigError, DataError
from sparksgd.imports import out_of_memory_told, shortened, shown
from sparksgd.imports.trust import trusted
from sparksgd.runs.growing import check_kept
from sparksgd.runs.json_files import read_about_run, read_record
from sparksgd.runs.metrics import read_metrics
from sparksgd.runs.names import METRICS, RUN, SUMMARY, TRACE
from sparksgd.storage import Location, location
from sparksgd.storage.reading import read_lines
from sparksgd.training.replay import Replay

__all__ = ["read_replay"]

_NO_RUN = (OSError, ValueError, LookupError, TypeError, AttributeError, ConfigError)
"""Errors of reading something else than a run."""


def read_replay(folder: str | Path | Location, *, trust: Iterable[str] = ()) -> Replay:
    """Read the folder of a run that has ended or was killed.

    Args:
        folder: where `jobs/train.py --out` or `RunFolder` wrote, a path or URI.
        trust: packages whose code may run, if the run's configuration names it for the model, the loss, the
            optimiser or the schedule, as ["mymodels"]; besides those of `sparksgd.trust` and of
            SPARKSGD_TRUST.  What comes with sparksgd, and torch's optimisers and schedules, need no trust.

    Raises:
        DataError: it holds no run, or one that made no step, or names code that is not trusted.
        ConfigError: trust is no list of names of packages.
    """
    trusting = trusted(trust, where=f"{folder}/{RUN}")
    try:
        run = location(folder)
        about = read_about_run(run)
        ended = run / SUMMARY
        summary = read_record(ended) if ended.exists() else {}
        for name, kept in summary.get("files", {}).items():
            if name in (METRICS, TRACE):
                check_kept(run / name, kept)
        steps = read_metrics(run / METRICS).steps
        made = summary.get("steps", len(steps))
        _check_texts(about, summary)
        numbers = [step["step"] for step in steps]
        if steps and (numbers != list(range(1, len(steps) + 1)) or not 0 <= made <= len(steps)):
            raise DataError(
                f"{folder} is not whole: {METRICS} has {len(steps)} steps, but the run made {shown(made)}, "
                f"numbered from 1 without a gap: lines are missing, or of another run"
            )
        steps = steps[:made]  # the last step may have been undone
        took_part = [frozenset(step["took_part"]) for step in steps]
        deals = [step["deal"] for step in steps]
        events, is_of_arrivals = None, any("staleness" in step for step in steps)
        if (run / TRACE).exists():
            events = _traced(run / TRACE, "arrivals" if is_of_arrivals else "rounds")
            if not is_of_arrivals:
                took_part, deals = took_part_of(events)
                took_part, deals, events = took_part[: len(steps)], deals[: len(steps)], None
        elif is_of_arrivals:
            raise DataError(
                f"{folder} has no {TRACE}, and a run of arrivals can be repeated from it alone: restore it"
            )
        is_whole = len(took_part) == summary.get("steps")
        _check_shards(folder, about["config"], took_part, deals)
        replay = Replay(
            config=about["config"],
            data_digest=about["data_digest"],
            model_name=about["model_name"],
            took_part=took_part if events is None else (),
            deals=deals if events is None else (),
            arrivals=events,
            arrival_losses=[] if events is None else [_loss(step) for step in steps],
            parameters_sha256=summary.get("parameters_sha256") if is_whole else None,
            test_digest=about.get("test_digest"),
            best_step=_best_step(summary),
            trust=trusting,
        )
        names = replay.names()
    except _NO_RUN as error:
        raise DataError(
            f"{folder} holds no run to replay: {type(error).__name__}: {shortened(str(error), 400)}. Name "
            f"the folder that a run wrote (jobs/train.py --out, or out= of sparksgd.train), with {RUN} and "
            f"{METRICS}"
        ) from error
    for key, name in names.items():
        trusting.check_name(key, name)
    if not replay.steps:
        raise DataError(f"{folder} holds a run that made no step: there is nothing to replay")
    return replay


def _loss(step: dict[str, Any]) -> float:
    """Return the loss of a step's line."""
    loss = step["loss"]
    if type(loss) not in (int, float):
        raise TypeError(f"a loss is {shown(loss)}, but must be a number")
    return float(loss)


def _best_step(summary: dict[str, Any]) -> int | None:
    """Return the step whose weights a run ended with, where early stopping returned to one."""
    step = summary.get("best_step")
    if step is not None and type(step) is not int:
        raise TypeError(f"best_step is {shown(step)}, but must be a whole number")
    return step


def _check_texts(about: dict[str, Any], summary: dict[str, Any]) -> None:
    """Raise TypeError if a digest or a name is something else."""
    for key, value in (
        ("data_digest", about["data_digest"]),
        ("model_name", about["model_name"] or ""),
        ("test_digest", about.get("test_digest") or ""),
        ("parameters_sha256", summary.get("parameters_sha256") or ""),
    ):
        if not isinstance(value, str):
            raise TypeError(f"{key} is {shown(value)}, but must be a text")


def _check_shards(
    folder: object, config: dict[str, Any], took_part: list[frozenset[int]], deals: list[int]
) -> None:
    """Refuse shards and deals that the run cannot have had."""
    num_shards = Config.from_dict(config).train.num_shards
    strange = sorted(
        {
            shown(shard)
            for shards in took_part
            for shard in shards
            if type(shard) is not int or shard not in range(num_shards)
        }
    )
    if strange or not all(took_part):
        what = (
            f"shards {shortened(', '.join(strange))} took part" if strange else "no shard took part in a step"
        )
        raise DataError(f"{folder} is not whole: {what}, but the run has {num_shards} shards, from 0")
    if any(type(deal) is not int for deal in deals) or deals != sorted(deals):
        raise DataError(f"{folder} is not whole: its deals must be whole numbers that grow with the steps")


def _traced(file: Location, family: str) -> list[TraceEvent]:
    """Return the events of a trace, which must be of the family of the run's steps."""
    with out_of_memory_told(f"reading {file}"):
        found, events = read_trace(read_lines(file, MOST_LINE_BYTES), str(file))
    if found != family:
        raise DataError(f"{file} is a trace of {found}, but the steps of {METRICS} are of {family}")
    return events
