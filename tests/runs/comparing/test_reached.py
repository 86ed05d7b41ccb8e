"""When a run reaches the target, and what its files say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from comparisons import run_of

from sparksgd.runs.comparing.outcomes import Outcome, read_outcome
from sparksgd.storage import location


def test_the_target_is_reached_at_the_first_of_two_evaluations_in_a_row() -> None:
    run = run_of([0.5, 0.85, 0.7, 0.8, 0.9])
    assert run.time_to(0.8) == 4
    reached = run.reached(0.8)
    assert reached is not None
    assert (reached.rows, reached.sent_bytes) == (40, 400)


@pytest.mark.parametrize("scores", [[0.5, 0.6, 0.9], [0.9, 0.7, 0.9], [0.9], []])
def test_a_target_that_is_not_held_is_not_reached(scores: list[float]) -> None:
    assert run_of(scores).time_to(0.8) == math.inf


def test_a_run_that_diverges_later_never_reached_it() -> None:
    run = run_of([0.9, 0.9, 0.9], diverged=True)
    assert run.time_to(0.8) == math.inf
    assert run.score == -math.inf


def test_the_score_is_what_two_evaluations_hold() -> None:
    assert run_of([0.5, 0.9, 0.8]).score == 0.8
    assert run_of([0.9]).score == -math.inf


def step(number: int, **more: object) -> dict[str, object]:
    return {
        "kind": "step",
        "step": number,
        "rows": 8,
        "virtual_s": 1.5 * number,
        "sent_bytes": 100.0 * number,
        **more,
    }


def evaluation(number: int, loss: float | None, accuracy: float | None) -> dict[str, object]:
    return {"kind": "evaluation", "step": number, "test_loss": loss, "test_accuracy": accuracy}


def recorded(folder: Path, lines: list[dict[str, object]]) -> Outcome:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps({"status": "finished", "num_workers": 4, "turns": 2}))
    return read_outcome(location(folder))


def test_time_rows_bytes_and_staleness_are_those_of_the_steps(tmp_path: Path) -> None:
    lines = [step(1, took_part=[2], staleness=[0]), step(2, took_part=[0, 1], staleness=[1, 3])]
    found = recorded(tmp_path, [*lines, evaluation(2, 0.5, 0.75)])
    (evaluated,) = found.evaluations
    assert (evaluated.virtual_s, evaluated.rows, evaluated.sent_bytes) == (3.0, 16, 300)
    assert found.staleness == {0: 1, 1: 1, 3: 1}
    assert found.mean_staleness == pytest.approx(4 / 3)


def test_a_loss_that_is_not_finite_has_no_score(tmp_path: Path) -> None:
    found = recorded(tmp_path, [step(1, took_part=[0, 1]), evaluation(1, None, None)])
    (evaluated,) = found.evaluations
    assert evaluated.score == -math.inf
    assert found.mean_staleness == 0


def test_without_bytes_there_is_no_outcome(tmp_path: Path) -> None:
    line = step(1, took_part=[0])
    del line["sent_bytes"]
    with pytest.raises(LookupError, match="sent_bytes"):
        recorded(tmp_path, [line, evaluation(1, 0.5, 0.75)])


def test_without_an_accuracy_the_score_is_the_negative_loss(tmp_path: Path) -> None:
    line = step(1, took_part=[0], staleness=[0])
    (evaluated,) = recorded(tmp_path, [line, evaluation(1, 0.25, None)]).evaluations
    assert evaluated.score == -0.25
