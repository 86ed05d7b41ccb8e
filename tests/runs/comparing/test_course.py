"""The course of a comparison: who is tuned where, which runs are shared, what is made again.

The runs are real: lines of their steps must have sent_bytes.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from comparisons import comparison_file
from jobs_in_process import run_job

from sparksgd.runs.comparing.course import Comparison, compare
from sparksgd.runs.comparing.grid import Settings
from sparksgd.runs.comparing.kept_runs import KeptRuns
from sparksgd.runs.comparing.question import Competitor
from sparksgd.runs.comparing.reading import read_question
from sparksgd.solvers.rules import completed
from sparksgd.storage import location


def made(file: Path, folder: Path) -> tuple[Comparison, int, list[tuple[int, int]]]:
    """Return a comparison, how many runs it made, and the progress that was told."""
    kept, progress = KeptRuns(location(folder)), list[tuple[int, int]]()
    found = compare(read_question(file), kept, lambda done, total, _: progress.append((done, total)))
    return found, kept.made, progress


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    without_momenta = '[base.optimizer]\nname = "Adam"'  # fewer trials are enough
    return comparison_file(tmp_path_factory.mktemp("compared"), without_momenta, trials=2)


@pytest.fixture(scope="module")
def found(file: Path) -> tuple[Comparison, int, list[tuple[int, int]]]:
    return made(file, file.parent / "runs")


def test_rules_of_rounds_are_tuned_once_and_rules_of_arrivals_on_each_cluster(found) -> None:
    comparison, _, _ = found
    tuned = {(entry.cluster, entry.competitor.label): entry.tuned for entry in comparison.entries}
    for label in ("synchronous", "local_sgd"):
        assert tuned["fast", label] is tuned["slow", label]
    assert tuned["fast", "async_sgd"] is not tuned["slow", "async_sgd"]


def test_runs_of_a_pair_share_weights_rows_and_noise(found) -> None:
    comparison, _, _ = found
    configs = [
        comparison.question.config(entry.competitor, entry.cluster, entry.tuned.chosen, seed)
        for entry in comparison.entries
        for seed in comparison.question.seeds
    ]
    assert {(config.train.seed, config.cluster.seed) for config in configs} == {(1, 1)}


def test_bits_of_rounds_do_not_depend_on_the_cluster_but_times_do(found) -> None:
    comparison, _, _ = found
    fast, slow = (comparison.of(cluster)[0].outcomes[0] for cluster in ("fast", "slow"))
    assert [at.loss for at in fast.evaluations] == [at.loss for at in slow.evaluations]
    assert slow.virtual_s > 2 * fast.virtual_s
    assert (fast.workers, slow.workers) == (2, 1)


def test_solvers_of_every_family_send_bytes(file, found) -> None:
    comparison, _, _ = found
    question = comparison.question
    gossip = Competitor(label="gradient_push", rule={"name": "gradient_push"})
    runs = {entry.competitor.label: entry.outcomes[0] for entry in comparison.of("fast")}
    config = completed(question.config(gossip, "fast", Settings(rate=0.1), 1))
    runs["gradient_push"] = KeptRuns(location(file.parent / "gossip")).outcome(config)
    for label, run in runs.items():
        sent = [at.sent_bytes for at in run.evaluations]
        assert 0 < sent[0] < sent[-1], label


def test_every_run_is_kept_and_none_is_made_twice(file, found) -> None:
    first, runs, progress = found
    folders = list((file.parent / "runs").iterdir())
    assert len(folders) == runs
    assert progress[-1] == (runs, runs)
    again, made_again, _ = made(file, file.parent / "runs")
    assert made_again == 0
    assert again == first
    shutil.rmtree(folders[0])
    (folders[1] / "summary.json").write_text('{"status": "KeyboardInterrupt"}')
    restored, made_again, _ = made(file, file.parent / "runs")
    assert made_again == 2
    assert restored == first


DIVERGES = """
[base.loss]
name = "MSELoss"
[set.model]
name = "comparisons:numbers_net"
"""


def diverging(folder: Path) -> Path:
    """Return a comparison of runs that all diverge."""
    file = comparison_file(folder, DIVERGES)
    file.write_text(file.read_text().replace("rates = [0.1, 0.4]", "rates = [1e30, 2e30]"))
    return file


def test_a_run_that_diverges_is_kept_and_counts_as_infinite(tmp_path: Path) -> None:
    question, kept = read_question(diverging(tmp_path)), KeptRuns(location(tmp_path / "runs"))
    for competitor in (question.one_process, *question.competitors):
        config = completed(question.config(competitor, "fast", Settings(rate=1e30, momentum=0.9), 1))
        for _ in range(2):
            outcome = KeptRuns(location(tmp_path / "runs")).outcome(config)
            assert outcome.diverged
            assert (outcome.score, outcome.time_to(-1e300)) == (-math.inf, math.inf)
        kept.outcome(config)
    assert kept.made == 0


def test_the_job_writes_a_table_a_csv_plots_and_a_sentence(file, found) -> None:
    out = file.parent
    done = run_job("compare.py", str(file), "--out", str(out))
    assert done.returncode == 0, done.stdout
    assert "0 runs were made" in done.stdout
    for cluster in ("fast", "slow"):
        assert f"On {cluster}: no difference shown between " in done.stdout
        assert (out / f"{cluster}.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "table.txt").read_text()
    assert "On slow: no difference shown" in table
    assert "target: a score of" in table
    lines = (out / "runs.csv").read_text().splitlines()
    assert len(lines) == 1 + 6
    assert lines[1].startswith("fast,synchronous,")
    refused = run_job("compare.py", str(out / "nowhere.toml"), "--out", str(out))
    assert refused.returncode == 2
    assert "error: cannot read the configuration" in refused.stdout
