"""Files that vanish while a run writes to them are written again, or the run ends with an error."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from resumed_jobs import EVERY_STEP, Jobs, metrics

import sparksgd
from sparksgd.errors import ClusterError
from sparksgd.storage import LocalLocation
from sparksgd.training.state import Observer, Training

pytestmark = pytest.mark.usefixtures("every_checkpoint", "log")


class At(Observer):
    """Does something once, when it is told of a step."""

    def __init__(self, step: int, deed: Callable[[], object]) -> None:
        self._step, self._deed = step, deed

    def stepped(self, training: Training, report: Any) -> None:
        if report.step == self._step:
            self._deed()


def run(jobs: Jobs, out: Path, step: int, deed: Callable[[], object]) -> Training:
    rows = str(jobs.folder / "rows.parquet")
    config = jobs.config(EVERY_STEP, {"checkpoint": {"every_steps": 2}})
    return sparksgd.train(config, rows, out=out, observers=[At(step, deed)])


@pytest.mark.parametrize("step", [5, 10])
def test_a_file_that_was_removed_is_written_again(
    jobs: Jobs, tmp_path: Path, caplog: pytest.LogCaptureFixture, step: int
) -> None:
    out = tmp_path / "out"
    run(jobs, out, step, (out / "metrics.jsonl").unlink)
    assert [line["step"] for line in metrics(out)] == list(range(1, 11))
    assert "metrics.jsonl was removed while the run wrote to it" in caplog.text
    rows = str(jobs.folder / "rows.parquet")
    again = sparksgd.train(jobs.config(EVERY_STEP), rows, out=out, resume_from=out)
    assert again.resumed[0].step == 10


def replaced(file: Path) -> None:
    file.with_name("new").write_text("mine")
    file.with_name("new").replace(file)


def test_a_file_that_another_one_replaced_is_written_beside_it(
    jobs: Jobs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ClusterError, match=r"all lines are in .*/metrics\.jsonl\.1 now"):
        run(jobs, out, 5, lambda: replaced(out / "metrics.jsonl"))
    assert "no checkpoint can be written now, but training goes on: " in caplog.text
    assert "took the place of the one that the run writes: move it away, and the run goes on" in caplog.text
    assert (out / "metrics.jsonl").read_text() == "mine"
    (out / "metrics.jsonl.1").replace(out / "metrics.jsonl")
    assert [line["step"] for line in metrics(out)] == list(range(1, 11))


def test_a_file_whose_place_is_free_again_is_written_there(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    lines = LocalLocation(file).lines(b"0\n")
    replaced(file)
    with pytest.raises(OSError, match="is another file"):
        lines.flush_all()
    file.unlink()
    lines.write("1\n")
    lines.flush_all()
    lines.write("2\n")
    lines.close()
    assert file.read_text() == "0\n1\n2\n"


@pytest.mark.parametrize("vanishes", ["removed", "moved"])
def test_where_the_folder_vanishes_the_run_ends_with_an_error_and_what_it_made(
    jobs: Jobs, tmp_path: Path, caplog: pytest.LogCaptureFixture, vanishes: str
) -> None:
    out, away = tmp_path / "out", tmp_path / "away"
    deed = (lambda: shutil.rmtree(out)) if vanishes == "removed" else (lambda: out.rename(away))
    with pytest.raises(ClusterError, match="was moved away or removed while the run wrote to it: move it"):
        run(jobs, out, 5, deed)
    assert "no checkpoint can be written now, but training goes on: " in caplog.text
    assert json.loads((out / "summary.json").read_text())["status"] == "FileNotFoundError"
    assert [line["step"] for line in metrics(out)] == list(range(1, 11))
    assert (out / "model" / "model.json").exists()


def test_a_folder_that_is_moved_back_is_no_matter(jobs: Jobs, tmp_path: Path) -> None:
    out, away = tmp_path / "out", tmp_path / "away"
    lines = LocalLocation(out / "lines").lines(b"0\n")
    out.rename(away)
    lines.write("1\n")
    with pytest.raises(OSError, match="was moved away or removed"):
        lines.flush_all()
    away.rename(out)
    lines.flush_all()
    lines.write("2\n")
    lines.close()
    assert (out / "lines").read_text() == "0\n1\n2\n"


def test_a_file_system_that_numbers_files_anew_raises_no_alarm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sparksgd.storage.lines.os.path.samestat", lambda one, other: False)
    lines = LocalLocation(tmp_path / "lines").lines()
    lines.write("1\n")
    lines.flush_all()
    lines.close()
    assert (tmp_path / "lines").read_text() == "1\n"
    assert "was removed" not in caplog.text


@pytest.mark.parametrize("step", [5, 10])
def test_a_file_that_was_cut_short_is_told_once(
    jobs: Jobs, tmp_path: Path, caplog: pytest.LogCaptureFixture, step: int
) -> None:
    out = tmp_path / "out"
    run(jobs, out, step, lambda: os.truncate(out / "metrics.jsonl", 20))
    assert caplog.text.count("metrics.jsonl has ") == 1
    assert "somebody else changed it meanwhile, and what is lost cannot be written again" in caplog.text
