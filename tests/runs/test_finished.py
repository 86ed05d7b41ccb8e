"""A finished run is neither trained twice nor taken for another."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from sparksgd.config import Config
from sparksgd.errors import ConfigError
from sparksgd.runs.finished import fingerprints_of, is_done
from sparksgd.storage import location

FILES = {"data.train": "1", "data.test": "2"}
CONFIG = Config.load(None, ["data.train=/rows", "optimizer.lr=0.5"])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Return the folder of a finished run."""
    write(tmp_path, "finished")
    return tmp_path


def write(folder: Path, status: str) -> None:
    (folder / "summary.json").write_text(json.dumps({"status": status, "parameters_sha256": "abc"}))
    about = {"config": CONFIG.to_dict(), "fingerprints": FILES}
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "model").mkdir(exist_ok=True)
    model = {"weights": "weights.pt", "parameters_sha256": "abc"}
    (folder / "model" / "model.json").write_text(json.dumps(model))
    (folder / "model" / "weights.pt").touch()


def test_the_same_is_done(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sparksgd"):
        assert is_done(location(out), CONFIG, FILES, "skip")
    assert "nothing to do" in caplog.text
    assert "abc" in caplog.text


@pytest.mark.parametrize(
    "setting", ["engine.num_workers=3", "engine.name=allreduce", "data.train=/moved", "train.eval_every=7"]
)
def test_what_does_not_shape_the_parameters_is_no_difference(out: Path, setting: str) -> None:
    config = Config.load(CONFIG.to_dict(), [setting])
    assert is_done(location(out), config, FILES, "skip")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("optimizer.lr=0.25", "optimizer.lr is 0.25, but was 0.5"),
        ("optimizer.momentum=0.9", "optimizer.momentum is 0.9, but was None"),
        ("train.seed=1", "train.seed is 1, but was 0"),
    ],
)
def test_another_configuration_is_refused(out: Path, setting: str, says: str) -> None:
    config = Config.load(CONFIG.to_dict(), [setting])
    with pytest.raises(ConfigError, match=says):
        is_done(location(out), config, FILES, "skip")
    assert not is_done(location(out), config, FILES, "overwrite")


@pytest.mark.parametrize("files", [FILES | {"data.train": "3"}, {"data.train": "1"}, {}])
def test_other_files_are_refused(out: Path, files: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"the files of data\.t"):
        is_done(location(out), CONFIG, files, "skip")


def test_changed_code_is_another_run(out: Path) -> None:
    config = Config.load(CONFIG.to_dict(), ["model.name=theirs:Net"])
    about = {"config": config.to_dict(), "fingerprints": FILES | {"model.name": "5"}}
    (out / "run.json").write_text(json.dumps(about))
    assert is_done(location(out), config, FILES | {"model.name": "5"}, "skip")
    with pytest.raises(ConfigError, match=r"the code of model\.name was changed since \(theirs:Net\)"):
        is_done(location(out), config, FILES | {"model.name": "6"}, "skip")


NO_FILES = ("data.train=none", "data.test=none")


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


def test_a_replay_is_not_the_run_that_it_repeats(out: Path) -> None:
    with pytest.raises(ConfigError, match="only one of the two is a replay"):
        is_done(location(out), CONFIG, FILES | {"replay": "4"}, "skip")


def test_fail_refuses_any_finished_run(out: Path) -> None:
    with pytest.raises(ConfigError, match="--if-exists is fail"):
        is_done(location(out), CONFIG, FILES, "fail")


@pytest.mark.parametrize("policy", ["skip", "fail", "overwrite"])
def test_no_run_or_half_a_run_is_not_done(tmp_path: Path, policy: str) -> None:
    assert not is_done(location(tmp_path), CONFIG, FILES, policy)
    write(tmp_path, "Terminated")
    assert not is_done(location(tmp_path), CONFIG, FILES, policy)
    (tmp_path / "summary.json").unlink()  # as a run that was killed leaves it
    assert not is_done(location(tmp_path), CONFIG, FILES, policy)


@pytest.mark.parametrize("missing", ["weights.pt", "model.json"])
def test_a_run_whose_model_is_gone_is_not_done(out: Path, missing: str) -> None:
    (out / "model" / missing).unlink()
    assert not is_done(location(out), CONFIG, FILES, "skip")


def test_a_run_whose_model_is_of_an_earlier_step_is_not_done(out: Path) -> None:
    about = {"weights": "weights.pt", "parameters_sha256": "of an earlier step"}
    (out / "model" / "model.json").write_text(json.dumps(about))
    assert not is_done(location(out), CONFIG, FILES, "skip")


def test_a_run_of_the_version_before_is_done(out: Path) -> None:
    (out / "run.json").rename(out / "record.json")
    assert is_done(location(out), CONFIG, FILES, "skip")


def test_what_is_no_run_of_ours_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("[]")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds something that is not a run of this version"):
        is_done(location(tmp_path), CONFIG, FILES, "skip")
