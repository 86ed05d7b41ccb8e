"""What an output folder holds is gone on with, kept, or replaced, by the table in runs/earlier.py."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed_jobs import SHORT, Jobs, forge

from sparksgd.config import Config
from sparksgd.errors import ConfigError
from sparksgd.runs.asked import Asked
from sparksgd.runs.checked_files import write_checked
from sparksgd.runs.checkpoints import CheckpointFolder
from sparksgd.runs.earlier import Found, earlier_run
from sparksgd.runs.fingerprints import fingerprints_of
from sparksgd.runs.manifest import FORMAT, write_manifest
from sparksgd.runs.model import load_model
from sparksgd.storage import location
from sparksgd.training.checkpoint import Checkpoint, Part, RunIdentity

FILES = {"data.train": "1", "data.test": "2"}
CONFIG = Config.load(None, ["data.train=/rows", "optimizer.lr=0.5"])
ANOTHER = Config.load(CONFIG.to_dict(), ["optimizer.lr=0.25"])
DIGEST = "abc" + 61 * "0"
LONGER = Config.load(CONFIG.to_dict(), ["train.epochs=2"])


OURS, ANOTHERS = "application_1_0001", "application_1_0002"


def write(folder: Path, status: str | None, config: Config = CONFIG) -> None:
    """Write the folder of a run: of a killed one if the status is None."""
    if status is not None:
        (folder / "summary.json").write_text(json.dumps({"status": status, "parameters_sha256": DIGEST}))
    about = {"config": config.to_dict(), "fingerprints": FILES, "attempt": [OURS, 1]}
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "metrics.jsonl").write_text('{"kind": "step", "step": 9}\n{"kind": "st')
    write_model(folder)


def write_model(folder: Path, parameters_sha256: str = DIGEST) -> None:
    place = location(folder / "model")
    write_manifest(
        place,
        {
            "format": FORMAT,
            "weights": asdict(write_checked(place, "weights.pt", {"w": torch.ones(3)})),
            "constants": asdict(write_checked(place, "constants.pt", {"c": torch.zeros(2)})),
            "finished": True,
            "model": {"name": "lenet", "arguments": {}},
            "seed": 0,
            "structure": {},
            "parts": None,
            "features": [{"name": "x", "dtype": "float32", "length": None}],
            "label": {"name": "y", "dtype": "int64", "classes": 2, "num_labels": None},
            "loss": {"name": "cross_entropy", "kind": None, "arguments": {}},
            "outputs": [],
            "code": {},
            "version": 9,
            "parameters_sha256": parameters_sha256,
            "buffers_sha256": DIGEST,
        },
    )


def write_checkpoint(folder: Path, step: int, config: Config = CONFIG) -> None:
    about = {"run_id": "r", "config": config.to_dict(), "fingerprints": FILES}
    checkpoints = CheckpointFolder(location(folder / "checkpoints"), about)
    checkpoints.begin(RunIdentity(experiment={}, data_digest="d", total_turns=9, turns_per_epoch=9))
    parts = {"solver": Part(version=1, values={})}
    checkpoints.write(Checkpoint(step=step, turns=step, parts=parts))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """Return the folder of a finished run."""
    write(tmp_path, "finished")
    write_checkpoint(tmp_path, 9)
    return tmp_path


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """Return the folder of a run that was killed after its second checkpoint."""
    write(tmp_path, None)
    write_checkpoint(tmp_path, 4)
    write_checkpoint(tmp_path, 6)
    return tmp_path


def look(
    out: Path,
    config: Config = CONFIG,
    files: dict[str, str] = FILES,
    *,
    if_exists: Any = "skip",
    resume: str = "auto",
    attempt: tuple[str, int] | None = None,
) -> Found:
    asked = Asked(config=config, fingerprints=files, if_exists=if_exists, resume=resume, attempt=attempt)
    return earlier_run(location(out), asked)


def steps(found: Found) -> list[int]:
    return [start.step for start in found.starts]


# A finished run


def test_the_same_is_done(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sparksgd"):
        assert look(finished).is_done
    assert "nothing to do" in caplog.text
    assert DIGEST in caplog.text


@pytest.mark.parametrize("how", ["archive", "skip"])
@pytest.mark.parametrize("resume", ["auto", "never", "must"])
def test_the_same_is_done_however_it_may_go_on(finished: Path, how: str, resume: str) -> None:
    assert look(finished, if_exists=how, resume=resume).is_done


@pytest.mark.parametrize(
    "setting",
    [
        "engine.num_workers=3",
        "engine.name=allreduce",
        "data.train=/moved",
        "train.eval_every=7",
        "checkpoint.keep=3",
    ],
)
def test_what_does_not_shape_the_parameters_is_no_difference(finished: Path, setting: str) -> None:
    assert look(finished, Config.load(CONFIG.to_dict(), [setting])).is_done


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("optimizer.lr=0.25", "optimizer.lr is 0.25, but was 0.5"),
        ("optimizer.momentum=0.9", "optimizer.momentum is 0.9, but was None"),
        ("train.seed=1", "train.seed is 1, but was 0"),
    ],
)
def test_another_configuration_is_refused(finished: Path, setting: str, says: str) -> None:
    config = Config.load(CONFIG.to_dict(), [setting])
    with pytest.raises(ConfigError, match=says):
        look(finished, config)
    found = look(finished, config, if_exists="overwrite")
    assert not found.is_done
    assert not found.starts


def test_other_rows_to_train_on_are_refused(finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"the files of data\.train are different ones"):
        look(finished, files=FILES | {"data.train": "8"})


@pytest.mark.parametrize("config", [CONFIG, LONGER])
@pytest.mark.parametrize("how", ["skip", "archive"])
def test_other_test_data_goes_on_from_its_end(finished: Path, config: Config, how: str) -> None:
    assert steps(look(finished, config, FILES | {"data.test": "8"}, if_exists=how)) == [9]


def test_no_test_data_is_refused_for_a_finished_run_which_would_lose_its_results(finished: Path) -> None:
    config = Config.load(CONFIG.to_dict(), ["data.test=none"])
    files = {key: digest for key, digest in FILES.items() if key != "data.test"}
    with pytest.raises(ConfigError, match=r"data\.test"):
        look(finished, config, files)


def test_other_test_data_is_refused_where_steps_are_left_after_the_last_checkpoint(finished: Path) -> None:
    (manifest,) = (finished / "checkpoints").glob("checkpoint-*.json")
    forge(manifest, total_turns=99)
    with pytest.raises(ConfigError, match=r"the files of data\.test are different ones"):
        look(finished, files=FILES | {"data.test": "8"})


def test_other_test_data_is_refused_where_nothing_tells_its_end(finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"the files of data\.test are different ones"):
        look(finished, files=FILES | {"data.test": "8"}, resume="never")


def test_other_test_data_is_refused_where_evaluations_shaped_its_parameters(tmp_path: Path) -> None:
    judged = Config.load(CONFIG.to_dict(), ["early_stopping.patience=2"])
    write(tmp_path, "finished", judged)
    write_checkpoint(tmp_path, 9, judged)
    assert look(tmp_path, judged).is_done
    with pytest.raises(ConfigError, match=r"the files of data\.test are different ones"):
        look(tmp_path, judged, FILES | {"data.test": "8"})


def test_other_code_is_refused(finished: Path) -> None:
    about = json.loads((finished / "run.json").read_text())
    (finished / "run.json").write_text(json.dumps(about | {"fingerprints": FILES | {"model.name": "5"}}))
    assert look(finished, files=FILES | {"model.name": "5"}).is_done
    with pytest.raises(ConfigError, match=r"the code of model\.name was changed since"):
        look(finished, files=FILES | {"model.name": "6"})


def test_code_that_the_code_imports_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs_here.py").write_text("import theirs_beside\n")
    config = Config.load(
        CONFIG.to_dict(), ["loss.name=theirs_here:loss", "data.train=none", "data.test=none"]
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for number in (1, 2):
        (tmp_path / "theirs_beside.py").write_text(f"NUMBER = {number}\n")
        found.append(fingerprints_of(config))
    assert [list(digests) for digests in found] == [["loss.name"]] * 2
    assert found[0] != found[1]


def test_a_replay_is_no_run_of_its_own(finished: Path) -> None:
    with pytest.raises(ConfigError, match="only one of the two is a replay"):
        look(finished, files=FILES | {"replay": "4"})


def test_fail_refuses_any_finished_run(finished: Path) -> None:
    with pytest.raises(ConfigError, match="--if-exists is fail"):
        look(finished, if_exists="fail")


def test_more_epochs_go_on_from_its_end(finished: Path) -> None:
    assert steps(look(finished, LONGER)) == [9]
    assert steps(look(finished, LONGER, if_exists="archive")) == [9]
    with pytest.raises(ConfigError, match=r"train\.epochs is 2, but was 1"):
        look(finished, LONGER, resume="never")


@pytest.mark.parametrize("name", ["weights.pt", "constants.pt", "model.json"])
@pytest.mark.parametrize("how", ["gone", "cut off", "flipped"])
def test_a_run_whose_model_cannot_be_loaded_goes_on_from_its_end(
    finished: Path, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    file = finished / "model" / name
    data = bytearray(file.read_bytes())
    data[data.index(b"seed" if name == "model.json" else b"\0")] ^= 1
    file.unlink()
    if how != "gone":
        file.write_bytes(data[:-9] if how == "cut off" else data)
    assert steps(look(finished)) == [9]
    assert f"holds a finished run of this, but not its model: {file}" in caplog.text


def test_a_run_whose_model_cannot_be_loaded_begins_anew_where_it_may_not_go_on(finished: Path) -> None:
    (finished / "model" / "constants.pt").unlink()
    assert look(finished, resume="never") == Found()
    with pytest.raises(ConfigError, match="--if-exists is fail"):
        look(finished, if_exists="fail")


def test_a_run_whose_model_is_of_an_earlier_step_goes_on_from_its_end(finished: Path) -> None:
    write_model(finished, 64 * "1")
    assert steps(look(finished)) == [9]


def test_a_run_of_the_version_before_is_done(finished: Path) -> None:
    (finished / "run.json").rename(finished / "record.json")
    about = json.loads((finished / "record.json").read_text())
    del about["config"]["checkpoint"]
    (finished / "record.json").write_text(json.dumps(about))
    assert look(finished).is_done


# One that ended early


@pytest.mark.parametrize("how", ["skip", "fail", "archive"])
@pytest.mark.parametrize("resume", ["auto", "must"])
def test_a_killed_run_goes_on_from_its_last_checkpoint(killed: Path, how: str, resume: str) -> None:
    found = look(killed, if_exists=how, resume=resume)
    assert steps(found) == [6, 4]
    assert found.last_step == 9
    assert found.origin == location(killed)


@pytest.mark.parametrize(("how", "resume"), [("overwrite", "auto"), ("skip", "never")])
def test_a_killed_run_is_replaced_where_that_is_asked_for(killed: Path, how: str, resume: str) -> None:
    assert look(killed, if_exists=how, resume=resume) == Found()


@pytest.mark.parametrize("how", ["skip", "fail"])
@pytest.mark.parametrize("resume", ["auto", "never", "must"])
def test_a_killed_run_of_another_configuration_is_kept(killed: Path, how: str, resume: str) -> None:
    with pytest.raises(ConfigError, match=r"ended early \(killed\), but not of this: optimizer.lr is 0.25"):
        look(killed, ANOTHER, if_exists=how, resume=resume)


def test_it_may_go_on_with_another_end_and_other_test_data(killed: Path) -> None:
    config = Config.load(LONGER.to_dict(), ["data.test=/others", "engine.name=inline"])
    assert steps(look(killed, config, FILES | {"data.test": "8"})) == [6, 4]


def test_one_without_a_checkpoint_begins_anew_but_not_where_it_must_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "sparksgd")
    write(tmp_path, "Terminated")
    assert look(tmp_path) == Found()
    assert "without a checkpoint: training anew" in caplog.text
    caplog.clear()
    with pytest.raises(
        ConfigError,
        match=r"ended early \(Terminated\), without a checkpoint: leave --resume out to train anew$",
    ):
        look(tmp_path, resume="must")
    assert not caplog.messages


def test_one_without_a_checkpoint_may_begin_anew_with_another_end(tmp_path: Path) -> None:
    write(tmp_path, None)
    assert look(tmp_path, LONGER, FILES | {"data.test": "8"}) == Found()


def test_checkpoints_of_another_run_beside_its_own_are_left_out(
    killed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(killed, 5, ANOTHER)
    assert steps(look(killed)) == [6, 4]
    assert steps(look(killed.parent / "new", resume=str(killed))) == [6, 4]
    assert "the checkpoint of step 5 in" in caplog.text
    assert "of another run: optimizer.lr is 0.5, but was 0.25" in caplog.text


@pytest.mark.parametrize("of_summary", ["b", 7])
def test_a_summary_of_another_run_is_not_believed(finished: Path, of_summary: object) -> None:
    for name, run_id in (("run.json", "a"), ("summary.json", of_summary)):
        about = json.loads((finished / name).read_text()) | {"run_id": run_id}
        (finished / name).write_text(json.dumps(about))
    with pytest.raises(ConfigError, match=rf"is of run 'a', but summary\.json is of run {of_summary!r}"):
        look(finished)


def test_one_without_a_checkpoint_is_kept_from_another(tmp_path: Path) -> None:
    write(tmp_path, None)
    with pytest.raises(ConfigError, match="--if-exists archive"):
        look(tmp_path, ANOTHER)


def test_a_manifest_of_which_a_bit_flipped_is_left_out(
    killed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = max((killed / "checkpoints").glob("*6-*.json"))
    newest.write_bytes(newest.read_bytes().replace(b'"turns": 6', b'"turns": 7'))
    assert steps(look(killed)) == [4]
    assert f"{newest} is damaged" in caplog.text


def test_a_run_that_is_refused_leaves_the_model_before_it_where_it_was(jobs: Jobs, tmp_path: Path) -> None:
    jobs.run(str(tmp_path / "out"), SHORT)
    too_many = {"train": {"num_shards": 1000}}
    with pytest.raises(ConfigError, match=r"train\.num_shards"):
        jobs.run(str(tmp_path / "out"), SHORT, too_many, if_exists="archive")
    load_model(tmp_path / "out" / "model", trust=["torch.nn"])
    assert not (tmp_path / "out.1").exists()


# Something else


def test_an_empty_folder_holds_nothing(tmp_path: Path) -> None:
    assert look(tmp_path) == Found()
    assert look(tmp_path / "missing", if_exists="fail") == Found()
    with pytest.raises(ConfigError, match="holds no run of this"):
        look(tmp_path, resume="must")


def test_another_run_is_moved_aside_where_that_is_asked_for(finished: Path) -> None:
    assert look(finished, ANOTHER, if_exists="archive").archives
    aside = location(finished).moved_aside()
    assert aside == f"{finished}.1"
    assert Path(aside, "summary.json").exists()
    assert not finished.exists()
    finished.mkdir()
    assert location(finished).moved_aside() == f"{finished}.2"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"summary.json": "[]", "run.json": "{}"}, "holds something that is not a run of this version"),
        ({"run.json": "[" * 100_000}, "holds something that is not a run of this version"),
        ({"metrics.jsonl": ""}, "holds metrics.jsonl, but no run.json"),
        ({"model/model.json": "{}"}, "holds model/model.json, but no run.json"),
    ],
)
def test_what_is_no_run_of_ours_is_not_written_over(tmp_path: Path, files: dict[str, str], says: str) -> None:
    (tmp_path / "model").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=says):
        look(tmp_path)
    assert look(tmp_path, if_exists="archive").archives
    assert look(tmp_path, if_exists="overwrite") == Found()


# Another folder


def test_a_run_of_another_folder_goes_on_in_an_empty_one(killed: Path) -> None:
    found = look(killed / "empty", resume=str(killed))
    assert (steps(found), found.origin) == ([6, 4], location(killed))


def test_a_run_of_another_folder_must_be_of_this(killed: Path) -> None:
    with pytest.raises(ConfigError, match=r"--resume .* but not of this: optimizer.lr is 0.25, but was 0.5"):
        look(killed / "empty", ANOTHER, resume=str(killed))
    with pytest.raises(ConfigError, match="holds no whole checkpoint"):
        look(killed / "empty", resume=str(killed / "missing"))


# The run of an earlier attempt of the same application


@pytest.mark.parametrize(
    ("if_exists", "resume"),
    [("overwrite", "auto"), ("skip", "never"), ("overwrite", "never"), ("fail", "never")],
)
def test_a_later_attempt_of_an_application_goes_on_with_its_own_run(
    killed: Path, if_exists: str, resume: str
) -> None:
    asked = {"if_exists": if_exists, "resume": resume}
    assert steps(look(killed, attempt=(OURS, 2), **asked)) == [6, 4]
    for other in (None, (OURS, 1), (ANOTHERS, 2)):
        assert steps(look(killed, attempt=other, **asked)) == []


@pytest.mark.parametrize("if_exists", ["overwrite", "fail"])
def test_a_later_attempt_finds_that_an_earlier_one_was_done(finished: Path, if_exists: str) -> None:
    assert look(finished, if_exists=if_exists, attempt=(OURS, 2)).is_done
