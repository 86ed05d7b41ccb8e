"""How many backup workers pay: the published setting, small cases by hand, and the job."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sparksgd.errors import DataError
from sparksgd.runs.stragglers import best_of, choices, read_arrivals

JOB = Path(__file__).parents[2] / "jobs" / "stragglers.py"


@pytest.fixture(scope="module")
def published() -> np.ndarray:
    """Draw arrivals of 100 workers as Chen et al. measured them: 1.45 s, and rare long tails."""
    source = np.random.default_rng(0)
    seconds = source.lognormal(np.log(1.45), 0.04, (20_000, 100))
    tails = 0.6 * (1 + source.pareto(1.2, seconds.shape))
    return seconds + tails * (source.random(seconds.shape) < 0.012)


@pytest.mark.parametrize("exponent", [1.0, 0.8516])
def test_of_a_hundred_published_workers_about_four_are_backups(
    published: np.ndarray, exponent: float
) -> None:
    found = choices(published, exponent)
    assert 94 <= 100 - best_of(found).backups <= 97
    assert found[0].relative_time >= 2 * best_of(found).relative_time


def test_three_workers_by_hand() -> None:
    arrivals_s = np.array([[1.0, 2.0, 9.0], [3.0, 1.0, 6.0]])
    none, one, two = choices(arrivals_s)
    assert (none.step_s, one.step_s, two.step_s) == (7.5, 2.5, 1.0)
    assert none.relative_time == 1
    assert one.relative_time == pytest.approx(2.5 / 2 / (7.5 / 3))
    assert two.relative_time == pytest.approx(1.0 / (7.5 / 3))
    assert best_of([none, one, two]) is two
    assert one.quantiles_s[0] == 2.5


def test_equal_workers_need_no_backup() -> None:
    assert best_of(choices(np.ones((20, 8)))).backups == 0


def record(folder: Path, lines: list[dict]) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def arriving(version: int, seconds: dict[int, float]) -> dict:
    arrivals = [{"worker": w, "version": version, "arrived_s": s} for w, s in seconds.items()]
    return {"kind": "step", "version": version, "timing": {"arrivals": arrivals}}


@pytest.mark.parametrize(
    ("worker", "arrived_s"), [(0, float("nan")), (0, 1e400), (0, "soon"), (0, None), ([], 1.0), ("a", 1.0)]
)
def test_a_time_that_is_none_is_refused(tmp_path: Path, worker: object, arrived_s: object) -> None:
    steps = [arriving(version, {0: 1.0, 1: 1.0}) for version in range(10)]
    steps[3]["timing"]["arrivals"][0] |= {"worker": worker, "arrived_s": arrived_s}
    with pytest.raises(DataError, match=r"metrics\.jsonl holds no steps of a run: "):
        read_arrivals(record(tmp_path, steps))


def test_late_arrivals_count_for_the_step_that_asked(tmp_path: Path) -> None:
    lines = [arriving(version, {0: 0.1, 1: 0.2}) for version in range(12)]
    (last,) = lines[0]["timing"]["arrivals"][1:]
    lines[0]["timing"]["arrivals"].remove(last)
    lines[3]["timing"]["arrivals"].append(last | {"arrived_s": 3.5})  # asked at version 0, came in step 3
    lines[5]["timing"]["arrivals"].pop()  # never asked, or never came
    found = read_arrivals(record(tmp_path, lines))
    assert found.shape == (11, 2)
    assert found[0].tolist() == [0.1, 3.5]


def test_where_sums_come_together_the_workers_own_times_count(tmp_path: Path) -> None:
    workers = [{"worker": 0, "compute": 0.3}, {"worker": 1, "compute": 0.4}]
    lines = [{"kind": "step", "version": v, "timing": {"workers": workers}} for v in range(10)]
    assert read_arrivals(record(tmp_path, lines)).tolist() == [[0.3, 0.4]] * 10


def test_too_few_steps_and_no_steps_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 2 steps in which all of 2 workers answered"):
        read_arrivals(record(tmp_path, [arriving(v, {0: 0.1, 1: 0.2}) for v in range(2)]))
    with pytest.raises(DataError, match="holds no steps of a run"):
        read_arrivals(tmp_path / "nowhere")


def test_the_job_prints_a_table_and_draws_a_plot(tmp_path: Path) -> None:
    source = np.random.default_rng(1)
    lines = [
        arriving(v, {w: 0.1 + (1.0 if w == 2 and source.random() < 0.5 else 0.0) for w in range(4)})
        for v in range(50)
    ]
    plot = tmp_path / "stragglers.png"
    command = [sys.executable, str(JOB), str(record(tmp_path, lines)), "--plot", str(plot)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "train.num_shards=4 solver.backup_workers=1: " in done.stdout
    assert "3 of 4" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    nonsense = subprocess.run(
        [*command[:2], str(tmp_path / "no")], capture_output=True, text=True, check=False
    )
    assert nonsense.returncode == 2
    assert nonsense.stderr.startswith("error: ")
