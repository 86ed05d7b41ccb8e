"""A run's folder is read so that the run can be repeated: whole, killed, or of the version before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparksgd.errors import DataError
from sparksgd.runs.replay import read_replay

ABOUT = {"config": {}, "data_digest": "abc", "model_name": "lenet"}


def step(number: int, **more: Any) -> str:
    return json.dumps({"kind": "step", "step": number, "took_part": [0, number], "deal": 0} | more) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the folder of a run of three steps that was evaluated once."""
    (tmp_path / "run.json").write_text(json.dumps(ABOUT))
    lines = [step(1), step(2), json.dumps({"kind": "evaluation", "step": 2}) + "\n", step(3, deal=1)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 3, "parameters_sha256": "1234"}))
    return tmp_path


def test_a_finished_run_is_read_whole(run: Path) -> None:
    replay = read_replay(run)
    assert (replay.config, replay.data_digest, replay.model_name) == ({}, "abc", "lenet")
    assert replay.took_part == [{0, 1}, {0, 2}, {0, 3}]
    assert replay.deals == [0, 0, 1]
    assert replay.parameters_sha256 == "1234"


def test_of_a_killed_run_the_whole_lines_are_read(run: Path) -> None:
    (run / "summary.json").unlink()
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write(step(4, deal=1) + step(5)[:30])
    replay = read_replay(run)
    assert len(replay.took_part) == 4
    assert replay.parameters_sha256 is None


def test_a_step_that_the_run_gave_up_is_left_out(run: Path) -> None:
    (run / "summary.json").write_text(json.dumps({"steps": 2, "parameters_sha256": "1233"}))
    assert len(read_replay(run).took_part) == 2


def test_a_folder_of_the_version_before_is_read(run: Path) -> None:
    (run / "run.json").rename(run / "record.json")
    assert read_replay(run).data_digest == "abc"


@pytest.mark.parametrize("missing", ["run.json", "metrics.jsonl"])
def test_what_is_missing_is_named(run: Path, missing: str) -> None:
    (run / missing).unlink()
    with pytest.raises(DataError, match=rf"holds no run to replay: FileNotFoundError: .*{missing}"):
        read_replay(run)


def test_a_run_without_a_step_is_refused(run: Path) -> None:
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="holds a run that made no step"):
        read_replay(run)


def test_a_run_is_read_before_torch_is_imported() -> None:
    code = "import sys, sparksgd.runs.replay, sparksgd.runs.asked, jobs.train; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"  # the run's own instruction set must be pinned first
