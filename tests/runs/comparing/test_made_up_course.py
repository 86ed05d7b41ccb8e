"""The course of a comparison whose runs are made up: what is shared, and runs that can hold no target."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from comparisons import comparison_file, run_of

from sparksgd.config import Config
from sparksgd.errors import ConfigError, TrainingError
from sparksgd.runs.comparing.course import compare
from sparksgd.runs.comparing.kept_runs import KeptRuns
from sparksgd.runs.comparing.outcomes import Outcome
from sparksgd.runs.comparing.reading import read_question
from sparksgd.storage import location


class MadeUp(KeptRuns):
    """Every run gives one outcome; `configs` has what was asked for."""

    def __init__(self, folder: Path, gives: Outcome) -> None:
        super().__init__(location(folder))
        self._gives = gives
        self.configs: list[Config] = []

    def outcome(self, config: Config) -> Outcome:
        """Return it."""
        self.configs.append(config)
        return self._gives


def _nobody_hears(*_: object) -> None:
    pass


def test_what_is_tuned_once_says_on_which_cluster(tmp_path: Path) -> None:
    question = read_question(comparison_file(tmp_path))
    found = compare(question, MadeUp(tmp_path, run_of([0.5, 0.9, 0.9])), _nobody_hears)
    assert found.one_process.cluster is None
    assert {(entry.cluster, entry.competitor.label): entry.tuned.cluster for entry in found.entries} == {
        ("fast", "synchronous"): "fast",
        ("fast", "async_sgd"): "fast",
        ("fast", "local_sgd"): "fast",
        ("slow", "synchronous"): "fast",
        ("slow", "async_sgd"): "slow",
        ("slow", "local_sgd"): "fast",
    }


@pytest.mark.parametrize(
    ("every", "turns", "message"),
    [
        (
            '"none"', 30,
            "train.eval_every is not set, and one process made 30 turns with 1 evaluation, but a target must "
            "be held at two: set it to 15 or less",
        ),
        ("20", 30, "train.eval_every is 20, and one process made 30 turns with 1 evaluation, but a target"),
        ("4", 30, "but a target must be held at two: an evaluation waits for the end of a round, so train"),
    ],
)  # fmt: skip
def test_the_first_run_with_one_evaluation_is_refused(
    tmp_path: Path, every: str, turns: int, message: str
) -> None:
    question = read_question(comparison_file(tmp_path, f"[set.train]\neval_every = {every}"))
    kept = MadeUp(tmp_path, run_of([0.9], turns=turns))
    with pytest.raises(ConfigError, match=re.escape(message)):
        compare(question, kept, _nobody_hears)
    assert len(kept.configs) == 1


def test_runs_that_diverged_may_have_one_evaluation_but_give_no_target(tmp_path: Path) -> None:
    question = read_question(comparison_file(tmp_path))
    kept = MadeUp(tmp_path, run_of([0.9], diverged=True))
    message = (
        "there is no target: of 1 runs in one process with lr 2.445e-05, momentum 0 most diverged; lower"
    )
    with pytest.raises(TrainingError, match=re.escape(message)):
        compare(question, kept, _nobody_hears)
