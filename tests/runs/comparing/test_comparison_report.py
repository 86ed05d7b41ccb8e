"""What a comparison says: the sentence, the table, the CSV, the plots."""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import replace

import pytest
from comparisons import TUNED, compared, comparison_file, run_of

from sparksgd.errors import ConfigError
from sparksgd.runs.comparing.plots import drawn, require_matplotlib
from sparksgd.runs.comparing.question import Question
from sparksgd.runs.comparing.reading import read_question
from sparksgd.runs.comparing.report import COLUMNS, csv_of, sentence, table_rows, target_line, tuning_line

SLOW = [run_of([0.5, 0.6, 0.8, 0.9])] * 8
"""They reach the target after 3 seconds."""

SOON = [run_of([0.5, 0.9, 0.9], seconds=0.3)] * 8
"""After 0.6 seconds."""

NEVER = [run_of([0.5, 0.5, 0.9])] * 8


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory) -> Question:
    asked = read_question(comparison_file(tmp_path_factory.mktemp("asked")))
    return replace(asked, budget=replace(asked.budget, seeds=8))


def test_the_best_solver_is_named_with_its_ratio_and_interval(question: Question) -> None:
    found = compared(question, synchronous=SLOW, async_sgd=SOON, local_sgd=NEVER)
    assert sentence(found, "fast") == (
        "On fast: async_sgd is best. It needs 0.2 times the time of synchronous (95 % interval 0.2 to 0.2, "
        "8 seeds)."
    )


def test_a_solver_that_is_shown_to_be_faster_goes_before_one_that_may_be(question: Question) -> None:
    doubtful = [*SOON[:5], *NEVER[:3]]
    certain = [run_of([0.5, 0.9, 0.9], seconds=1.2)] * 8
    found = compared(question, synchronous=SLOW, async_sgd=doubtful, local_sgd=certain)
    assert sentence(found, "fast").startswith("On fast: local_sgd is best. It needs ")


def test_where_the_reference_is_best_the_next_one_is_named(question: Question) -> None:
    found = compared(question, synchronous=SOON, async_sgd=NEVER, local_sgd=SLOW)
    assert sentence(found, "fast").startswith(
        "On fast: synchronous is best. The next is local_sgd. It needs 5 times the time of synchronous (95 %"
    )


def test_where_an_interval_contains_1_no_difference_is_shown(question: Question) -> None:
    found = compared(question, synchronous=SLOW, async_sgd=SLOW, local_sgd=NEVER)
    assert sentence(found, "fast") == (
        "On fast: no difference shown between async_sgd and synchronous. async_sgd needs 1 times the time of "
        "synchronous (95 % interval 1 to 1, 8 seeds)."
    )


def test_a_solver_that_never_comes_needs_no_number_of_times(question: Question) -> None:
    found = compared(question, synchronous=SLOW, async_sgd=NEVER)
    assert sentence(found, "fast") == (
        "On fast: synchronous is best. The next is async_sgd. It does not reach the target in half of the "
        "runs or more, where synchronous does (8 seeds)."
    )
    found = compared(question, synchronous=NEVER, async_sgd=SLOW)
    assert sentence(found, "fast") == (
        "On fast: async_sgd is best. It reaches the target in half of the runs or more, where synchronous "
        "does not (8 seeds)."
    )


def test_an_interval_that_ends_nowhere_is_said_in_words(question: Question) -> None:
    found = compared(question, synchronous=SLOW, async_sgd=[*SOON[:5], *NEVER[:3]])
    assert "(95 % interval 0.2 or more, 8 seeds)" in sentence(found, "fast")


def test_few_seeds_show_nothing(question: Question) -> None:
    found = compared(question, synchronous=SLOW[:3], async_sgd=SOON[:3])
    assert sentence(found, "fast") == (
        "On fast: no difference shown between async_sgd and synchronous. async_sgd needs 0.2 times the time "
        "of synchronous (95 % interval not bounded, 3 seeds). Fewer than 6 seeds cannot show one."
    )
    assert table_rows(found, "fast")[1][COLUMNS.index("95 % interval")] == "not bounded"


def test_where_nobody_reaches_the_target_it_is_said(question: Question) -> None:
    found = compared(question, synchronous=NEVER, async_sgd=NEVER)
    assert sentence(found, "fast").endswith("and synchronous. No run reached the target (8 seeds).")


def test_the_table_has_settings_costs_and_counts(question: Question) -> None:
    found = compared(question, synchronous=SLOW, async_sgd=[*SOON[:7], run_of([0.9, 0.9], diverged=True)])
    first, second = (dict(zip(COLUMNS, row, strict=True)) for row in table_rows(found, "fast"))
    assert first == {
        "solver": "synchronous\nlr 0.1, momentum 0.9\n12 trials, 2,400 rows, 36 s, 1 diverged",
        "time, s": "3", "ratio": "1", "95 % interval": "", "never": "0", "diverged": "0", "rows": "30",
        "MB sent": "0.0003", "worker-s": "6", "staleness": "0.0", "score": "0.8000",
    }  # fmt: skip
    assert (second["ratio"], second["never"], second["diverged"]) == ("0.2", "1", "1")
    assert "the median of 8 tuned runs in one process, less 1" in target_line(found)
    assert tuning_line(found) == (
        "one process: lr 0.1, momentum 0.9; 12 trials, 2,400 rows, 36 s, 1 diverged"
    )


def test_seconds_of_a_tuning_stand_only_in_the_table_of_its_cluster(question: Question) -> None:
    fast = compared(question, synchronous=SLOW)
    (entry,) = fast.entries
    both = replace(fast, entries=(entry, replace(entry, cluster="slow")))
    costs = {cluster: table_rows(both, cluster)[0][0].splitlines()[-1] for cluster in ("fast", "slow")}
    assert costs == {
        "fast": "12 trials, 2,400 rows, 36 s, 1 diverged",
        "slow": "12 trials, 2,400 rows, 1 diverged",
    }


def test_a_best_at_the_edge_is_told(question: Question) -> None:
    found = replace(compared(question, synchronous=SLOW), one_process=replace(TUNED, at_edge=True))
    assert tuning_line(found).endswith("best at the grid's edge")


def test_the_csv_has_a_line_for_each_run(question: Question) -> None:
    lines = list(csv.DictReader(io.StringIO(csv_of(compared(question, synchronous=SLOW, async_sgd=NEVER)))))
    assert [line["seed"] for line in lines] == [str(seed) for seed in range(1, 9)] * 2
    assert (lines[0]["reached_s"], lines[0]["ratio"]) == ("3.0", "1.0")
    assert (lines[0]["reached_rows"], lines[0]["reached_sent_bytes"]) == ("30", "300.0")
    assert (lines[8]["reached_s"], lines[8]["reached_worker_s"], lines[8]["ratio"]) == ("inf", "inf", "inf")


def test_plots_are_drawn_of_runs_that_never_came_or_diverged_too(question: Question) -> None:
    diverged = [run_of([], diverged=True), *[run_of([0.5], diverged=True)] * 7]
    stale = [replace(run, staleness={0: 3, 2: 1}) for run in SOON]
    found = compared(question, synchronous=SLOW, async_sgd=stale, local_sgd=diverged)
    assert drawn(found, "fast").startswith(b"\x89PNG")


def test_without_matplotlib_the_job_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'sparksgd\[plot\]'"):
        require_matplotlib()
