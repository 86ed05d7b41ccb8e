"""Each flipped bit of a run's records, metrics and trace is noticed by whoever reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from resumed_jobs import SHORT, made_jobs, without_digests

from sparksgd.config import Config
from sparksgd.errors import ConfigError, DataError
from sparksgd.runs.asked import Asked
from sparksgd.runs.earlier import earlier_run
from sparksgd.runs.json_files import digest_of, read_record, write_record
from sparksgd.runs.replay import read_replay
from sparksgd.storage import location
from sparksgd.training.replay import Replay

FILES = ["run.json", "summary.json", "metrics.jsonl", "trace.jsonl"]


def replay_of(run: Path) -> Replay:
    return read_replay(run, trust=["torch"])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    jobs = made_jobs(tmp_path_factory.mktemp("records"))
    jobs.run("run", SHORT, {"engine": {"name": "simulated"}, "solver": {"name": "async_sgd"}})
    return jobs.folder / "run"


@pytest.fixture
def run(original: Path) -> Iterator[Path]:
    """Return the folder of a run of arrivals."""
    before = {name: (original / name).read_bytes() for name in FILES}
    yield original
    for name, data in before.items():
        (original / name).write_bytes(data)


def test_each_flipped_bit_is_noticed_by_a_replay(run: Path) -> None:
    chance, replay, unnoticed = Random(7), replay_of(run), 0
    before = {name: (run / name).read_bytes() for name in FILES}
    for number in range(200):
        name = FILES[number % 4]
        data = bytearray(before[name])
        bit = chance.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        (run / name).write_bytes(data)
        try:
            found = replay_of(run)
        except DataError:
            pass
        else:  # 1e-05 may be written 1E-05
            assert name in ("run.json", "summary.json"), (name, bit)
            assert json.loads(data) == json.loads(before[name]), (name, bit)
            assert found == replay
            unnoticed += 1
        (run / name).write_bytes(before[name])
    assert unnoticed < 3


@pytest.mark.parametrize("name", ["run.json", "summary.json"])
def test_a_record_that_was_changed_is_named_by_the_next_run(run: Path, name: str) -> None:
    config = Config.from_dict(json.loads((run / "run.json").read_text())["config"])
    asked = Asked(config=config, fingerprints={})
    text = (run / name).read_text()
    (run / name).write_text(text.replace('"run_id": "r', '"run_id": "s'))
    with pytest.raises(ConfigError, match=rf"{name} is damaged, or was changed by hand: its sha256 is not"):
        earlier_run(location(run), asked)


@pytest.mark.parametrize("key", ["run_id", "data_digest", "model_name", "sha256", "format"])
def test_another_value_in_a_record_is_noticed(run: Path, key: str) -> None:
    about = json.loads((run / "run.json").read_text())
    for other in (about | {key: "other"}, {each: value for each, value in about.items() if each != key}):
        (run / "run.json").write_text(json.dumps(other))
        with pytest.raises(DataError, match=r"run\.json is damaged"):
            replay_of(run)


@pytest.mark.parametrize("name", ["metrics.jsonl", "trace.jsonl"])
def test_lines_that_are_gone_are_noticed(run: Path, name: str) -> None:
    (run / name).write_bytes((run / name).read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{name} is damaged, or was changed by hand: it has [\d,]+ bytes"):
        replay_of(run)
    (run / name).unlink()
    with pytest.raises(DataError, match=rf"{name} is not there, but the run wrote it: restore it"):
        replay_of(run)


def test_a_run_of_the_version_before_has_no_digests_and_is_read(run: Path) -> None:
    replay = replay_of(run)
    without_digests(run)
    assert replay_of(run) == replay


def test_a_record_of_a_later_format_is_refused(tmp_path: Path) -> None:
    file = location(tmp_path) / "run.json"
    write_record(file, {"steps": {10: 1, 9: 2}})  # keys become texts
    assert read_record(file) == {"steps": {"10": 1, "9": 2}}
    later = {"format": 2, "steps": 1}
    (tmp_path / "run.json").write_text(json.dumps(later | {"sha256": digest_of(later)}))
    with pytest.raises(
        ValueError, match="is of format 2, but this version reads 1: read it with the version"
    ):
        read_record(file)
