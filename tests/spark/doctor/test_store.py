"""A checkpoint goes to the output folder and back, and nothing of it is left.  Needs no JVM."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparksgd.runs.checkpoints import CheckpointFolder
from sparksgd.spark.doctor.store import look_at_store
from sparksgd.training.checkpoint import Checkpoint


@pytest.mark.parametrize(("state_bytes", "size"), [(8_000, "8.0 kB"), (None, "1.0 MB"), (1 << 40, "67.1 MB")])
def test_a_new_folder_takes_it_and_is_gone_afterwards(tmp_path, state_bytes, size):
    (finding,) = look_at_store(str(tmp_path / "runs" / "mine"), state_bytes)
    assert finding.status == "pass"
    assert finding.seen.startswith(f"a checkpoint of {size} written in ")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_there_stays_as_it_is(tmp_path):
    kept = tmp_path / "checkpoints" / "checkpoint-00000001-01234567.json"
    kept.parent.mkdir()
    kept.write_text("{}")
    (finding,) = look_at_store(str(tmp_path), 4)
    assert finding.status == "pass"
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [kept]
    assert list(tmp_path.iterdir()) == [kept.parent]


def test_a_folder_that_cannot_be_written_fails_with_a_runs_words(tmp_path):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "run"
    (finding,) = look_at_store(str(out), 4)
    assert (finding.status, finding.fix) == ("fail", "name another folder")
    assert finding.seen == f"--out is {out}, which cannot be written: Not a directory"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_what_is_given_back_changed_or_is_not_removed_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(CheckpointFolder, "remove", lambda folder, name: None)
    (finding,) = look_at_store(str(tmp_path / "kept"), 4)
    assert finding.status == "fail"
    assert "keeps what is removed: checkpoint-" in finding.seen
    monkeypatch.undo()
    monkeypatch.setattr(Checkpoint, "values", lambda checkpoint, part: {"parameters": _other()})
    (finding,) = look_at_store(str(tmp_path / "changed"), 4)
    assert (finding.status, "gave back another checkpoint" in finding.seen) == ("fail", True)
    assert not Path(tmp_path / "changed").exists()


def _other():
    import torch

    return torch.full([1], 7.0)
