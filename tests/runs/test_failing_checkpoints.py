"""A checkpoint that cannot be written or removed leaves no manifest without parts, and no file for ever."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from sparksgd import storage
from sparksgd.config import Config
from sparksgd.runs.checkpoints import CheckpointFolder, manifests
from sparksgd.storage import LocalLocation, location
from sparksgd.training.checkpoint import Checkpoint, Part, RunIdentity


@pytest.fixture
def checkpoints(tmp_path: Path) -> CheckpointFolder:
    config = Config.load(None, ["data.train=/rows", "checkpoint.keep=1"])
    about = {"run_id": "r", "config": config.to_dict(), "fingerprints": {}}
    folder = CheckpointFolder(location(tmp_path), about)
    folder.begin(RunIdentity(experiment={}, data_digest="d", total_turns=9, turns_per_epoch=9))
    return folder


def write(folder: CheckpointFolder, step: int) -> str:
    parts = {name: Part(version=1, values={"a": step}) for name in ("run", "solver")}
    return folder.write(Checkpoint(step=step, turns=step, parts=parts))


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def no_disk(name: object = "") -> OSError:
    return OSError(errno.EIO, "the disk failed", str(name))


@pytest.fixture
def unsure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let the disk fail after the manifest was moved to its place."""
    kept_on_disk = storage._kept_on_disk

    def failing(path: Path) -> None:
        kept_on_disk(path)
        if path == tmp_path and list(tmp_path.glob("*.json")):
            raise no_disk(path)

    monkeypatch.setattr(storage, "_kept_on_disk", failing)


def test_a_manifest_that_may_not_outlast_a_loss_of_power_is_removed_before_its_parts(
    tmp_path: Path, checkpoints: CheckpointFolder, unsure: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed, remove = [], LocalLocation.remove

    def told(where: LocalLocation) -> None:
        removed.append(where.path.suffix)
        remove(where)

    monkeypatch.setattr(LocalLocation, "remove", told)
    with pytest.raises(OSError, match="the disk failed"):
        write(checkpoints, 1)
    assert removed == [".json", ".pt", ".pt"]
    assert names(tmp_path) == []


def test_the_parts_of_a_manifest_that_cannot_be_removed_stay(
    tmp_path: Path, checkpoints: CheckpointFolder, unsure: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(where: LocalLocation) -> None:
        raise no_disk(where)

    monkeypatch.setattr(LocalLocation, "remove", failing)
    with pytest.raises(OSError, match="the disk failed"):
        write(checkpoints, 1)
    (found,) = manifests(location(tmp_path))
    assert found.checkpoint().parts["solver"].values == {"a": 1}


@pytest.mark.parametrize("fails", [".json", ".run.pt", ".solver.pt"])
def test_a_checkpoint_that_could_not_be_removed_is_removed_with_the_next_one(
    tmp_path: Path,
    checkpoints: CheckpointFolder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fails: str,
) -> None:
    remove = LocalLocation.remove

    def failing(where: LocalLocation) -> None:
        if where.path.name.endswith(fails):
            raise no_disk(where)
        remove(where)

    write(checkpoints, 1)
    with monkeypatch.context() as patch:
        patch.setattr(LocalLocation, "remove", failing)
        write(checkpoints, 2)
    assert "older checkpoints cannot be removed now: the disk failed" in caplog.text
    for found in manifests(location(tmp_path)):
        found.checkpoint()  # whole
    last = write(checkpoints, 3)
    assert names(tmp_path) == [f"{last}.json", f"{last}.run.pt", f"{last}.solver.pt"]
