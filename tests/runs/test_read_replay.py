"""A run's folder is read so that the run can be repeated: whole, killed, or of the version before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparksgd.config import Config
from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.inline import InlineEngine
from sparksgd.errors import ConfigError, DataError
from sparksgd.runs.asked import Asked
from sparksgd.runs.earlier import earlier_run
from sparksgd.runs.replay import read_replay
from sparksgd.runs.stragglers import read_arrivals
from sparksgd.storage import location
from sparksgd.training.loop import train
from sparksgd.training.preflight import allowed_engines

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


# Whom it trusts


def naming(run: Path, section: str, name: str, **about: Any) -> Path:
    (run / "run.json").write_text(json.dumps(ABOUT | {"config": {section: {"name": name}}} | about))
    return run


@pytest.mark.parametrize("section", ["model", "loss", "optimizer", "schedule"])
def test_a_run_that_names_code_is_read_if_its_package_is_trusted(
    run: Path, section: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    naming(run, section, "kind:Thing")
    with pytest.raises(DataError, match=rf"run\.json: {section}\.name is 'kind:Thing', but kind is not"):
        read_replay(run)
    with pytest.raises(DataError, match="is not trusted"):
        read_replay(run, trust=["kin", "kind.inner"])
    assert read_replay(run, trust=["kind"]).names() == {f"{section}.name": "kind:Thing"}
    monkeypatch.setenv("SPARKSGD_TRUST", "kind")
    assert read_replay(run).names() == {f"{section}.name": "kind:Thing"}


def test_what_comes_with_us_and_torch_needs_no_trust(run: Path) -> None:
    config = {"model": {"name": "lenet"}, "optimizer": {"name": "Adam"}, "schedule": {"name": "StepLR"}}
    (run / "run.json").write_text(json.dumps(ABOUT | {"config": config}))
    assert read_replay(run).names() == {}


def test_the_name_of_a_module_that_was_given_in_python_is_not_used(run: Path) -> None:
    assert read_replay(naming(run, "model", "kind:Net", model_name=None)).names() == {}


def test_a_replay_runs_nothing_that_a_trusted_package_only_imports(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lending_loss.py").write_text("from os import system\n")
    monkeypatch.syspath_prepend(tmp_path)
    replay = read_replay(naming(run, "loss", "lending_loss:system"), trust=["lending_loss"])
    config = Config.from_dict(replay.config)
    with pytest.raises(DataError, match=r"loss.name is 'lending_loss:system', but that is code of posix"):
        allowed_engines(config, replay)
    pq.write_table(pa.table({"features": [0.5], "label": [0]}), tmp_path / "rows.parquet")
    rows = ParquetRows(str(tmp_path / "rows.parquet"))
    with pytest.raises(DataError, match=r"loss.name is 'lending_loss:system', but that is code of posix"):
        train(config, rows=rows, test=None, make_engine=InlineEngine, replay=replay)


def test_a_run_that_is_no_regular_file_is_refused(run: Path) -> None:
    (run / "run.json").unlink()
    (run / "run.json").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="it is not a regular file"):
        read_replay(run)


WHOLE = {
    "run.json": json.dumps(ABOUT),
    "metrics.jsonl": step(1) + step(2),
    "summary.json": json.dumps({"status": "finished", "steps": 2, "parameters_sha256": "1234"}),
    "trace.jsonl": '{"trace": 1, "family": "rounds"}\n'
    '{"order": 0, "kind": "push", "turn": 0, "version": 0, "shard": 0}\n',
}
ODD = [
    "3", "null", "[]", "{}", "NaN", "Infinity", "1e400", '"x"', "[[]]", "true", "-1", "0.5", "[1.0]", '["a"]',
    "[" * 5000, "9" * 5000, f'"{"x" * 5000}"', f'{{"{"k" * 5000}": 1}}', '"\\udcff"', '"\\u0000"', "{",
    '{"train": {"epochs": 0}}', '{"model": {"arguments": 1}}',
]  # fmt: skip
KEYS = [
    "config", "data_digest", "model_name", "kind", "step", "took_part", "deal", "steps", "parameters_sha256",
    "status", "timing", "version", "fingerprints",
]  # fmt: skip


def with_value(text: str, key: str, value: str) -> str:
    """Return JSON lines in whose objects a key has another value, which may be no JSON."""
    first, *rest = text.splitlines(keepends=True)
    return f'{{"{key}": {value}, {first[1:]}' + "".join(f'{line[:-2]}, "{key}": {value}}}\n' for line in rest)


contents = st.sampled_from([*ODD, *(f"{text}\n" for text in ODD)])
changes = st.tuples(st.sampled_from(KEYS), st.sampled_from(ODD))


@given(name=st.sampled_from(list(WHOLE)), new=contents | st.text(max_size=9) | changes)
@settings(
    max_examples=200, derandomize=True, database=None, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_any_folder_is_a_run_or_refused(tmp_path: Path, name: str, new: str | tuple[str, str]) -> None:
    for file, text in WHOLE.items():
        (tmp_path / file).write_text(text)
    changed = with_value(WHOLE[name], *new) if isinstance(new, tuple) else new
    (tmp_path / name).write_bytes(changed.encode("utf-8", "surrogatepass"))
    for read in (
        lambda: read_replay(tmp_path).fingerprint(),
        lambda: read_arrivals(tmp_path),
        lambda: earlier_run(location(tmp_path), Asked(config=Config(), fingerprints={})),
    ):
        refused = ""
        try:
            read()
        except (DataError, ConfigError) as error:
            refused = str(error)
        assert len(refused) < 1500


def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(
        DataError, match=r"holds no run to replay: OSError: .*it is a pipe, a socket or a device"
    ):
        read_replay(run)
