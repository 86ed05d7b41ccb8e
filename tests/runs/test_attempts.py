"""YARN tries an application again: ends on purpose are not repeated, all others are."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from sparksgd.errors import ClusterError, ConfigError, NotFinite, SparkSGDError
from sparksgd.runs import attempts
from sparksgd.runs.attempts import EndedBefore, not_repeated

Work = Callable[[], int]


def of_attempt(number: int, staging: Path) -> dict[str, str]:
    return {
        "CONTAINER_ID": f"container_e17_141_0001_{number:02d}_000001",
        "SPARK_YARN_STAGING_DIR": f"file:{staging}",
    }


def raising(error: BaseException) -> Work:
    def work() -> int:
        raise error

    return work


def untouched() -> int:
    pytest.fail("it is tried again")


@pytest.mark.parametrize("error", [ConfigError("refused: x is 3"), NotFinite("the loss is nan")])
def test_the_next_attempt_ends_with_the_same_status_and_words(tmp_path: Path, error: SparkSGDError) -> None:
    with pytest.raises(type(error)):
        not_repeated(raising(error), of_attempt(1, tmp_path))
    for number in (2, 3):
        says = rf"^attempt 1 of application_141_0001 ended with: {error} \(its log says more: yarn logs -app"
        with pytest.raises(EndedBefore, match=says) as again:
            not_repeated(untouched, of_attempt(number, tmp_path))
        assert again.value.exit_code == error.exit_code


def test_options_that_are_refused_are_refused_once(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    with pytest.raises(SystemExit):
        not_repeated(lambda: bool(parser.parse_args(["--nonsense"])), of_attempt(1, tmp_path))
    with pytest.raises(EndedBefore, match="options that were refused") as again:
        not_repeated(untouched, of_attempt(2, tmp_path))
    assert again.value.exit_code == 2


def test_a_status_that_is_not_0_is_an_end_on_purpose_and_0_is_none(tmp_path: Path) -> None:
    assert not_repeated(lambda: None, of_attempt(1, tmp_path)) == 0
    assert not_repeated(lambda: 7, of_attempt(2, tmp_path)) == 7
    with pytest.raises(EndedBefore, match=r"attempt 2 of .* status 7") as again:
        not_repeated(untouched, of_attempt(3, tmp_path))
    assert again.value.exit_code == 7


@pytest.mark.parametrize(
    "error", [ClusterError("a node is lost"), KeyboardInterrupt(), RuntimeError("of ours")], ids=repr
)
def test_the_next_attempt_tries_again_after_any_other_end(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        not_repeated(raising(error), of_attempt(1, tmp_path))
    assert not_repeated(lambda: 0, of_attempt(2, tmp_path)) == 0


def test_a_container_that_is_taken_away_is_no_end_on_purpose(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(attempts, "ended_by", lambda: 15)
    with pytest.raises(ConfigError):
        not_repeated(raising(ConfigError("met on the way out")), of_attempt(1, tmp_path))
    assert not_repeated(lambda: 0, of_attempt(2, tmp_path)) == 0


@pytest.mark.parametrize("lacking", ["CONTAINER_ID", "SPARK_YARN_STAGING_DIR"])
def test_outside_of_yarn_nothing_is_written(tmp_path: Path, lacking: str) -> None:
    environment = of_attempt(1, tmp_path)
    del environment[lacking]
    with pytest.raises(ConfigError):
        not_repeated(raising(ConfigError("refused")), environment)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", "{", '{"attempt": 1}', '{"attempt": "x"}', "null"])
def test_what_is_no_note_of_ours_refuses_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / attempts.ENDED).write_text(text)
    assert not_repeated(lambda: 0, of_attempt(2, tmp_path)) == 0


def test_a_note_that_cannot_be_written_hides_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="refused"):
        not_repeated(raising(ConfigError("refused")), of_attempt(1, tmp_path / "file" / "staging"))
