"""What chance decided is written to trace.jsonl, and a replay reads it from there."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from at_once import every_checkpoint
from resumed_jobs import without_digests
from torch import nn

from sparksgd.config import Config
from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.inline import InlineEngine
from sparksgd.engines.protocol import StepReport
from sparksgd.engines.trace import TraceEvent, event_line, first_line, read_trace
from sparksgd.errors import DataError
from sparksgd.runs.checkpoints import manifests
from sparksgd.runs.earlier import Found
from sparksgd.runs.folder import RunFolder
from sparksgd.runs.replay import read_replay
from sparksgd.solvers.protocol import Need
from sparksgd.storage import location
from sparksgd.training.loop import train
from sparksgd.training.state import Training

SHARDS = [[0, 1], [0, 2], [1, 2], [0, 1], [2], [0, 1, 2]]
"""Who takes part in each step, as the made-up reports say."""

DEALS = [0, 0, 0, 1, 1, 3]


class MadeUp(RunFolder):
    """Writes a run of one process as if chance had decided who took part."""

    def __init__(self, folder: Path, events_of: Callable[[StepReport], Sequence[TraceEvent]]) -> None:
        super().__init__(folder)
        self._events_of = events_of

    def started(self, training: Training) -> None:
        """Begin as a run with backup workers."""
        training.needs |= {Need.QUORUM}
        super().started(training)

    def stepped(self, training: Training, report: StepReport) -> None:
        """Write the step with who took part, which deal it was, and its events."""
        number = report.version
        report = replace(report, took_part=tuple(SHARDS[number]), deal=DEALS[number])
        super().stepped(training, replace(report, trace=tuple(self._events_of(report))))


def event(kind: Any, report: StepReport, shard: int) -> TraceEvent:
    return TraceEvent(kind=kind, turn=report.version, version=report.version, shard=shard, worker=shard)


def starts_and_pushes(report: StepReport) -> list[TraceEvent]:
    starts = [event("start", report, shard) for shard in range(3)]
    return starts + [event("push", report, shard) for shard in reversed(report.took_part)]


def nothing(report: StepReport) -> list[TraceEvent]:
    return []


def run(
    folder: Path,
    events_of: Callable[[StepReport], Sequence[TraceEvent]] = starts_and_pushes,
    epochs: int = 2,
    kind: type[MadeUp] = MadeUp,
    found: Found | None = None,
) -> Path:
    """Make a run of three steps an epoch, and return its folder."""
    rows = [{"features": [float(x)], "label": 2.0 * x} for x in range(12)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    config = Config.from_dict(
        {
            "loss": {"name": "squared_error"},
            "optimizer": {"lr": 1e-3},
            "train": {"num_shards": 3, "rows_per_step": 4, "epochs": epochs, "seed": 1},
            "checkpoint": {"every_steps": 1},
        }
    )
    out = folder / "out"
    source = ParquetRows(str(folder / "rows.parquet"))
    made = kind(out, events_of)
    torch.manual_seed(1)
    train(
        config, rows=source, test=None, make_engine=InlineEngine, module=nn.Linear(1, 1), observers=[made],
        checkpoints=None if found is None else made.checkpoints(config, found),
    )  # fmt: skip
    return out


def goes_on(folder: Path) -> Path:
    (manifest, *_) = starts = manifests(location(folder / "out" / "checkpoints"))
    assert manifest.step == 4
    return run(folder, found=Found(starts=starts, origin=location(folder / "out")))


def traced(out: Path) -> list[TraceEvent]:
    family, events = read_trace((out / "trace.jsonl").read_bytes().splitlines(keepends=True), "trace.jsonl")
    assert family == "rounds"
    return events


def change(file: Path, change: Callable[[list[str]], list[str]]) -> None:
    without_digests(file.parent)
    file.write_text("".join(change(file.read_text().splitlines(keepends=True))))


def stopped(folder: Path) -> Path:
    """Make a run that is interrupted after its fourth step."""

    class Stops(MadeUp):
        def stepped(self, training: Training, report: StepReport) -> None:
            super().stepped(training, report)
            if report.step == 5:
                raise KeyboardInterrupt

    Stops.__qualname__ = MadeUp.__qualname__  # a checkpoint knows it by its name
    with every_checkpoint(), pytest.raises(KeyboardInterrupt):
        run(folder, kind=Stops, found=Found())
    return folder / "out"


# Written


def test_the_events_of_all_steps_are_numbered_through(tmp_path: Path) -> None:
    out = run(tmp_path, epochs=1)
    lines = (out / "trace.jsonl").read_text().splitlines()
    assert lines[0] == '{"trace": 1, "family": "rounds"}'
    assert lines[1] == '{"order": 0, "kind": "start", "turn": 0, "version": 0, "worker": 0, "shard": 0}'
    assert [json.loads(line)["order"] for line in lines[1:]] == list(range(3 * 3 + 6))
    pushes = [(found.version, found.shard) for found in traced(out) if found.kind == "push"]
    assert pushes == [(0, 1), (0, 0), (1, 2), (1, 0), (2, 2), (2, 1)]


def test_a_new_deal_stands_before_the_first_event_of_its_first_step(tmp_path: Path) -> None:
    def with_late_news(report: StepReport) -> list[TraceEvent]:
        late = replace(event("lost", report, 2), version=max(0, report.version - 1), turn=0)
        return [late, *starts_and_pushes(report)]

    events = traced(run(tmp_path, with_late_news))
    where = [number for number, found in enumerate(events) if found.kind == "deal"]
    assert [events[number] for number in where] == [
        TraceEvent(kind="deal", turn=3, version=3),
        TraceEvent(kind="deal", turn=5, version=5),
        TraceEvent(kind="deal", turn=5, version=5),
    ]
    around = [(events[number - 1].kind, events[number + 1].kind) for number in where]
    assert around == [("lost", "start"), ("lost", "deal"), ("deal", "start")]


def test_a_trace_begins_with_the_first_event_and_there_is_none_where_nothing_is_chance(
    tmp_path: Path,
) -> None:
    out = run(tmp_path, nothing, epochs=1)
    assert (out / "metrics.jsonl").exists()
    assert not (out / "trace.jsonl").exists()
    out = run(tmp_path, lambda report: starts_and_pushes(report) if report.step == 2 else [], epochs=1)
    assert {found.version for found in traced(out)} == {1}


def test_a_new_run_in_the_folder_removes_the_trace_of_the_one_before(tmp_path: Path) -> None:
    assert (run(tmp_path, epochs=1) / "trace.jsonl").exists()
    assert not (run(tmp_path, nothing, epochs=1) / "trace.jsonl").exists()


def test_each_step_can_be_read_as_soon_as_it_was_made(tmp_path: Path) -> None:
    found: list[int] = []

    def look(report: StepReport) -> list[TraceEvent]:
        if report.version:
            found.append(traced(tmp_path / "out")[-1].version)
        return starts_and_pushes(report)

    run(tmp_path, look)
    assert found == [0, 1, 2, 3, 4]


# Gone on with


def test_a_run_that_goes_on_has_the_trace_of_one_that_was_never_stopped(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = run(tmp_path / "whole").joinpath("trace.jsonl").read_text()
    out = stopped(tmp_path)
    goes_on(tmp_path)
    assert (out / "trace.jsonl").read_text() == whole


@pytest.mark.parametrize(
    ("deed", "words"),
    [
        (Path.unlink, "is not there, but says who took part"),
        (lambda file: file.write_bytes(b""), "is damaged"),
        (lambda file: file.write_bytes(file.read_bytes()[:40]), "is damaged"),
    ],
    ids=["removed", "emptied", "cut off"],
)
def test_without_its_trace_a_run_does_not_go_on(
    tmp_path: Path, deed: Callable[[Path], object], words: str
) -> None:
    out = stopped(tmp_path)
    deed(out / "trace.jsonl")
    with pytest.raises(DataError, match=rf"trace.jsonl {words}.*Restore it, or train anew") as refused:
        goes_on(tmp_path)
    assert "move it away" not in str(refused.value)


# Read


def test_a_replay_is_that_of_the_trace(tmp_path: Path) -> None:
    out = run(tmp_path)
    replay = read_replay(out)
    assert replay.took_part == [frozenset(shards) for shards in SHARDS]
    assert replay.deals == DEALS
    assert replay.parameters_sha256 == json.loads((out / "summary.json").read_text())["parameters_sha256"]


def test_the_trace_is_believed_where_the_metrics_differ(tmp_path: Path) -> None:
    out = run(tmp_path)
    change(out / "metrics.jsonl", lambda lines: [line.replace("[0, 1]", "[2]") for line in lines])
    assert read_replay(out).took_part == [frozenset(shards) for shards in SHARDS]
    (out / "trace.jsonl").unlink()
    assert read_replay(out).took_part[0] == {2}


def test_shards_that_the_run_did_not_have_are_refused(tmp_path: Path) -> None:
    out = run(tmp_path)
    (out / "trace.jsonl").unlink()
    change(out / "metrics.jsonl", lambda lines: [line.replace("[0, 1]", "[9]") for line in lines])
    with pytest.raises(DataError, match="shards 9 took part, but the run has 3 shards"):
        read_replay(out)


def test_a_folder_of_the_version_before_gives_the_same_replay(tmp_path: Path) -> None:
    out = run(tmp_path)
    replay = read_replay(out)
    without_digests(out)
    (out / "run.json").rename(out / "record.json")
    (out / "trace.jsonl").unlink()
    assert read_replay(out) == replay


def test_a_step_that_the_run_gave_up_is_left_out(tmp_path: Path) -> None:
    out = run(tmp_path)
    without_digests(out)
    summary = json.loads((out / "summary.json").read_text())
    (out / "summary.json").write_text(json.dumps(summary | {"steps": 4}))
    replay = read_replay(out)
    assert (replay.took_part, replay.deals) == ([frozenset(shards) for shards in SHARDS[:4]], DEALS[:4])
    assert replay.parameters_sha256 == summary["parameters_sha256"]


def test_of_a_killed_run_the_steps_count_whose_metrics_are_there(tmp_path: Path) -> None:
    out = run(tmp_path)
    (out / "summary.json").unlink()
    change(out / "metrics.jsonl", lambda lines: [*lines[:4], lines[4][:30]])
    change(out / "trace.jsonl", lambda lines: [*lines[:-2], lines[-2][:10]])
    replay = read_replay(out)
    assert replay.took_part == [frozenset(shards) for shards in SHARDS[:4]]
    assert replay.deals == DEALS[:4]
    assert replay.parameters_sha256 is None


def test_a_trace_that_ends_before_the_run_did_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    out = run(tmp_path)
    change(out / "trace.jsonl", lambda lines: [line for line in lines if '"version": 5' not in line])
    replay = read_replay(out)
    assert replay.took_part == [frozenset(shards) for shards in SHARDS[:5]]
    assert replay.parameters_sha256 is None  # that was after a step more


def test_a_trace_that_lacks_lines_is_refused(tmp_path: Path) -> None:
    out = run(tmp_path)
    change(out / "trace.jsonl", lambda lines: lines[:3] + lines[4:])
    with pytest.raises(DataError, match=r"trace\.jsonl is not whole"):
        read_replay(out)


def test_a_trace_of_another_family_is_refused(tmp_path: Path) -> None:
    out = run(tmp_path)
    change(out / "trace.jsonl", lambda lines: [first_line("arrivals") + "\n", *lines[1:]])
    with pytest.raises(
        DataError, match=r"is a trace of arrivals, but the steps of metrics.jsonl are of rounds"
    ):
        read_replay(out)


def test_events_after_the_last_push_change_nothing(tmp_path: Path) -> None:
    out = run(tmp_path)
    replay, number = read_replay(out), len(traced(out))
    lost = TraceEvent(kind="lost", turn=5, version=5, shard=2)
    change(out / "trace.jsonl", lambda lines: [*lines, event_line(number, lost) + "\n"])
    assert read_replay(out) == replay
