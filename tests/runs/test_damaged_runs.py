"""A run whose files are damaged, removed or another's is refused by name, or goes on to the same bits."""

from __future__ import annotations

import random
import re
import shutil
from typing import Any

import pytest
import torch
from resumed_jobs import SHORT, Jobs, forge, metrics

import sparksgd
from sparksgd.errors import ConfigError, DataError, ModelError, SparkSGDError
from sparksgd.runs.checkpoints import manifests
from sparksgd.storage import LocalLocation, location

pytestmark = pytest.mark.usefixtures("every_checkpoint", "log")

ANEW = "train anew with --resume never, in another --out or with --if-exists overwrite$"


@pytest.mark.parametrize("flips", [20, pytest.param(200, marks=pytest.mark.soak)])
def test_each_flipped_bit_is_noticed(
    jobs: Jobs, whole: dict[str, Any], caplog: pytest.LogCaptureFixture, flips: int
) -> None:
    two = SHORT | {"checkpoint": {"every_steps": 1, "keep": 2}}
    out = f"flipped {flips}"
    jobs.stopped_at(out, 3, two)
    folder, chance = jobs.folder / out, random.Random(flips)
    newest = manifests(location(folder / "checkpoints"))[0].name
    files = [*(folder / "checkpoints").glob(f"{newest}*"), folder / "metrics.jsonl"]
    before = {file: file.read_bytes() for file in (folder).rglob("*") if file.is_file()}
    for _ in range(flips):
        file = chance.choice(files)
        size = before[file].index(b'"step": 4') - 50 if file.suffix == ".jsonl" else len(before[file])
        bit = chance.randrange(8 * size)  # the line of step 4 is written again
        changed = bytearray(before[file])
        changed[bit // 8] ^= 1 << bit % 8
        for path in folder.rglob("*"):
            if path.is_file() and path not in before:
                path.unlink()
        for path, data in before.items():
            path.write_bytes(data)
        file.write_bytes(changed)
        caplog.clear()
        if file.name == "metrics.jsonl":
            with pytest.raises(DataError, match=r"metrics.jsonl is damaged"):
                jobs.run(out, two)
            continue
        again = jobs.run(out, two)
        assert "left out" in caplog.text, (file, bit)
        assert again["resumed"][-1]["step"] == 2
        assert again["parameters_sha256"] == whole["parameters_sha256"]


@pytest.mark.parametrize("damaged", ["*.solver.pt", "*.json"])
def test_where_no_checkpoint_is_whole_the_run_is_refused_and_all_is_kept(jobs: Jobs, damaged: str) -> None:
    out = f"none whole, {damaged[2:]}"
    jobs.stopped_at(out, 3, SHORT | {"checkpoint": {"every_steps": 1, "keep": 2}})
    for file in (jobs.folder / out / "checkpoints").glob(damaged):
        file.write_bytes(file.read_bytes()[:-9])
    before = {file.name for file in (jobs.folder / out / "checkpoints").iterdir()}
    with pytest.raises(SparkSGDError, match=r"has no whole checkpoint.*--if-exists overwrite"):
        jobs.run(out, SHORT)
    assert {file.name for file in (jobs.folder / out / "checkpoints").iterdir()} == before
    assert jobs.run(out, SHORT, resume="never")["steps"] == 4


def test_a_checkpoint_that_cannot_be_written_is_said_and_leaves_nothing(
    jobs: Jobs, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = LocalLocation.write_bytes

    def full(where: LocalLocation, data: bytes) -> None:
        if where.path.name.endswith((".run.pt", ".observers.pt")):
            raise OSError(28, "No space left on device", str(where))
        write(where, data)

    monkeypatch.setattr(LocalLocation, "write_bytes", full)
    summary = jobs.run("full", SHORT)
    assert summary["parameters_sha256"] == whole["parameters_sha256"]
    assert "no checkpoint can be written now, but training goes on: No space left on device" in caplog.text
    assert list((jobs.folder / "full" / "checkpoints").iterdir()) == []


def test_without_its_metrics_a_run_goes_on_and_says_so(jobs: Jobs, caplog: pytest.LogCaptureFixture) -> None:
    jobs.stopped_at("without lines", 2, SHORT)
    (jobs.folder / "without lines" / "metrics.jsonl").unlink()
    jobs.run("without lines", SHORT)
    assert "metrics.jsonl is not there: it begins after the checkpoint's step" in caplog.text
    assert [line["step"] for line in metrics(jobs.folder / "without lines")] == [3, 4, 4]


REMOVED = {
    "run.json": "resumed from step 2",
    "summary.json": "resumed from step 2",
    "model/model.json": "resumed from step 2",
    "model/weights.pt": "resumed from step 2",
    "metrics.jsonl": "metrics.jsonl is not there: it begins after",
    "checkpoints/*.json": "without a checkpoint: training anew",
    "checkpoints/*.run.pt": "has no whole checkpoint",
    "checkpoints/*.solver.pt": "has no whole checkpoint",
    "checkpoints/*.observers.pt": "has no whole checkpoint",
}
REFUSALS = ("has no whole checkpoint", "something that is not a run of this version", "is damaged")
EMPTIED = REMOVED | {
    "run.json": "something that is not a run of this version",
    "summary.json": "something that is not a run of this version",
    "metrics.jsonl": "is damaged",
    "checkpoints/*.json": "has no whole checkpoint",
}


@pytest.mark.parametrize(
    ("deed", "name", "words"),
    [("removed", *each) for each in REMOVED.items()] + [("emptied", *each) for each in EMPTIED.items()],
)
def test_a_file_that_was_removed_or_emptied_by_hand_is_named_or_written_anew(
    jobs: Jobs, whole: dict[str, Any], caplog: pytest.LogCaptureFixture, deed: str, name: str, words: str
) -> None:
    if not (jobs.folder / "by hand").exists():
        jobs.stopped_at("by hand", 2, SHORT)
    out = jobs.folder / f"{deed} {name.replace('/', ' ').replace('*', 'all')}"
    shutil.copytree(jobs.folder / "by hand", out)
    for file in out.glob(name):
        file.unlink() if deed == "removed" else file.write_bytes(b"")
    caplog.clear()
    if words in REFUSALS:
        with pytest.raises(SparkSGDError, match=rf"{re.escape(str(out))}.*{words}"):
            jobs.run(out.name, SHORT)
        return
    again = jobs.run(out.name, SHORT)
    assert words in caplog.text
    assert again["parameters_sha256"] == whole["parameters_sha256"]
    sparksgd.load_model(out / "model", trust=["torch"])
    if name != "metrics.jsonl":
        assert metrics(out) == metrics(jobs.folder / "reference")


def test_rows_that_changed_behind_the_same_file_are_refused(jobs: Jobs) -> None:
    jobs.stopped_at("other rows", 2, SHORT)
    for manifest in (jobs.folder / "other rows" / "checkpoints").glob("*.json"):
        forge(manifest, data_digest="another")
    with pytest.raises(DataError, match=rf"the rows are not those of the run to go on with.*, or {ANEW}"):
        jobs.run("other rows", SHORT)


def test_an_end_before_the_checkpoint_is_refused(jobs: Jobs) -> None:
    jobs.stopped_at("too short", 3, SHORT)
    with pytest.raises(ConfigError, match=rf"ask for 2 turns, but .* has made 3: ask for more, or {ANEW}"):
        jobs.run("too short", SHORT, {"train": {"steps": 2}})


def test_a_job_under_other_settings_is_refused_and_trains_anew_as_it_was_told(jobs: Jobs) -> None:
    jobs.stopped_at("other settings", 2, SHORT)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ModelError, match=f"torch.autocast was False, but is True.*, or {ANEW}"):
            jobs.run("other settings", SHORT)
        with pytest.raises(ModelError, match=f"torch.autocast was False, but is True.*, or {ANEW}"):
            jobs.run("under others", SHORT, resume=str(jobs.folder / "other settings"))
        again = jobs.run("other settings", SHORT, resume="never", if_exists="overwrite")
    assert "resumed" not in again
