"""YARN tries an application again: ends on purpose are not repeated, all others are."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparksgd.errors import ClusterError, ConfigError, NotFinite, SparkSGDError
from sparksgd.runs.attempts import EndedBefore, ends_noted
from sparksgd.runs.holder import Holder
from sparksgd.storage import location


def attempt(number: int, application: int = 1) -> Holder:
    name = f"container_e17_141_{application:04d}_{number:02d}_000001"
    return Holder.here("run", {"CONTAINER_ID": name})


def end(folder: Path, holder: Holder, error: BaseException) -> None:
    with pytest.raises(type(error)), ends_noted(location(folder), holder):
        raise error


@pytest.mark.parametrize("error", [ConfigError("refused: x is 3"), NotFinite("the loss is nan")])
def test_the_next_attempt_ends_with_the_same_status_and_words(tmp_path: Path, error: SparkSGDError) -> None:
    end(tmp_path, attempt(1), error)
    says = f"attempt 1 of application_141_0001 ended with: {error}"
    with pytest.raises(EndedBefore, match=says) as again, ends_noted(location(tmp_path), attempt(2)):
        pytest.fail("it is tried again")
    assert again.value.exit_code == error.exit_code


@pytest.mark.parametrize(
    "error", [ClusterError("a node is lost"), KeyboardInterrupt(), RuntimeError("of ours")], ids=repr
)
def test_the_next_attempt_tries_again_after_any_other_end(tmp_path: Path, error: BaseException) -> None:
    end(tmp_path, attempt(1), error)
    with ends_noted(location(tmp_path), attempt(2)):
        pass


def test_another_application_and_one_that_is_no_application_try_anyway(tmp_path: Path) -> None:
    end(tmp_path, attempt(1), ConfigError("refused"))
    for holder in (attempt(1), attempt(2, application=2), Holder.here("run", {})):
        with ends_noted(location(tmp_path), holder):
            pass


def test_without_yarn_nothing_is_written(tmp_path: Path) -> None:
    end(tmp_path, Holder.here("run", {}), ConfigError("refused"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", "{", '{"application": 3}', "null"])
def test_what_is_no_note_of_ours_refuses_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "ended.json").write_text(text)
    with ends_noted(location(tmp_path), attempt(2)):
        pass
