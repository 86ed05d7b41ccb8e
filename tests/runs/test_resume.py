"""A run that goes on from a checkpoint ends as one that was never stopped, or says why it cannot."""

from __future__ import annotations

import io
import logging
from dataclasses import replace

import carried_kinds
import pytest
from resumed_jobs import EVERY_STEP, KINDS, SHORT, Jobs, copied_until, metrics
from rich.console import Console

from sparksgd.arithmetic.numerics import Numerics
from sparksgd.cli.run import run
from sparksgd.cli.terminal import Terminal
from sparksgd.config import Config
from sparksgd.errors import ConfigError
from sparksgd.runs.checkpoints import manifests
from sparksgd.storage import location

pytestmark = pytest.mark.usefixtures("every_checkpoint", "log")

CARRIED = {
    f"carried: {kind}": {
        section: {"name": f"carried_kinds:{named.__name__}"} | rate[section]
        for section, named in classes.items()
    }
    for rate in [{"optimizer": {"lr": 0.02}, "schedule": {}}]
    for kind, classes in carried_kinds.RIGHT.items()
}


QUICK = ("AdamW, norm, dropout, clipping", "optimiser and schedule of one's own", "local SGD")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.soak) for kind in (*KINDS, *CARRIED)],
)
def test_a_run_goes_on_from_any_of_its_checkpoints_to_the_same_bits(jobs: Jobs, kind: str) -> None:
    tables = (KINDS | CARRIED)[kind]
    whole = jobs.run(f"whole {kind}", tables, EVERY_STEP)
    made = manifests(location(jobs.folder / f"whole {kind}" / "checkpoints"))
    assert len(made) == whole["steps"] >= 5
    for number, manifest in enumerate(made):
        out = f"{kind} from {manifest.step}"
        copied_until(jobs.folder / f"whole {kind}", jobs.folder / out, [each.name for each in made[number:]])
        again = jobs.run(out, tables, EVERY_STEP)
        assert again["resumed"][-1]["step"] == manifest.step
        assert again["parameters_sha256"] == whole["parameters_sha256"], manifest.step
        assert again["buffers_sha256"] == whole["buffers_sha256"]
        assert again["test_loss"] == whole["test_loss"]
        assert metrics(jobs.folder / out) == metrics(jobs.folder / f"whole {kind}")


def test_a_finished_run_goes_on_to_more_epochs(jobs: Jobs) -> None:
    jobs.run("longer", {"train": {"epochs": 1}})
    again = jobs.run("longer", {"train": {"epochs": 2}})
    assert (again["steps"], again["resumed"][0]["step"], again["resumed"][0]["lost_steps"]) == (10, 5, 0)
    whole = jobs.run("two epochs")
    assert again["parameters_sha256"] == whole["parameters_sha256"]
    assert metrics(jobs.folder / "longer") == metrics(jobs.folder / "two epochs")


def test_a_run_that_goes_on_with_other_arithmetic_says_so(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    jobs.stopped_at("another machine", 2, SHORT)
    here = Numerics.here
    monkeypatch.setattr(Numerics, "here", lambda threads: replace(here(threads), torch="9.9+other"))
    with caplog.at_level(logging.WARNING, "sparksgd"):
        again = jobs.run("another machine", SHORT)
    changes = again["numerics"]["changes"]
    assert [(change["worker"], change["numerics"]["torch"]) for change in changes] == [
        (None, "9.9+other"), (0, "9.9+other")
    ]  # fmt: skip
    assert {change["step"] for change in changes} == {again["resumed"][-1]["step"]}
    assert "the run goes on with other arithmetic: the driver differs (before / now): torch" in caplog.text


def test_a_run_of_another_folder_goes_on(jobs: Jobs) -> None:
    jobs.stopped_at("elsewhere", 4, EVERY_STEP)
    again = jobs.run("here", resume=str(jobs.folder / "elsewhere"))
    assert again["resumed"][0]["step"] == 4
    assert again["parameters_sha256"] == jobs.run("at once")["parameters_sha256"]
    assert metrics(jobs.folder / "here") == metrics(jobs.folder / "at once")


def test_where_no_step_is_left_the_job_says_so_in_a_table(jobs: Jobs) -> None:
    jobs.run("at its end", SHORT)
    shown = io.StringIO()
    terminal = Terminal(Console(file=shown), tables=True)
    config = Config.from_dict(jobs.config(SHORT))
    run(
        config,
        str(jobs.folder / "copied"),
        run_id="c",
        terminal=terminal,
        resume=str(jobs.folder / "at its end"),
    )
    assert "0 rows in 0 steps" in shown.getvalue()


def test_the_last_ones_and_the_best_are_kept(jobs: Jobs) -> None:
    summary = jobs.run(
        "kept", {"checkpoint": {"every_steps": 1, "keep": 3}, "train": {"rows_per_step": 50, "epochs": 3}}
    )
    kept = manifests(location(jobs.folder / "kept" / "checkpoints"))
    losses = [line["test_loss"] for line in metrics(jobs.folder / "kept") if line["kind"] == "evaluation"]
    best = 2 * (1 + losses.index(min(losses)))
    assert summary["steps"] == 6
    assert [each.step for each in kept] == sorted({4, 5, 6, best}, reverse=True)
    files = {file.name.partition(".")[0] for file in (jobs.folder / "kept" / "checkpoints").iterdir()}
    assert files == {each.name for each in kept}


# Rounds of local SGD


def test_a_round_that_was_cut_short_at_the_end_does_not_go_on(jobs: Jobs) -> None:
    kind = KINDS["local SGD"]
    jobs.run("cut short", kind, {"train": {"steps": 7}})
    with pytest.raises(ConfigError, match="the last round of local_sgd was cut short"):
        jobs.run("cut short", kind, {"train": {"steps": 9}})


def test_a_round_that_was_whole_at_the_end_goes_on(jobs: Jobs) -> None:
    whole_rounds = {"solver": {"name": "local_sgd", "turns_per_round": 2, "inner_state": "drop"}}
    jobs.run("whole rounds", whole_rounds, {"train": {"steps": 4}})
    again = jobs.run("whole rounds", whole_rounds, {"train": {"steps": 9}})
    assert again["resumed"][0]["step"] == 2
    alone = jobs.run("whole rounds at once", whole_rounds, {"train": {"steps": 9}})
    assert again["parameters_sha256"] == alone["parameters_sha256"]


def test_local_sgd_that_keeps_the_states_of_shards_has_no_checkpoints_and_says_so(
    jobs: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    keeps = {"solver": {"name": "local_sgd", "turns_per_round": 3, "inner_state": "keep"}}
    jobs.run("keeps", EVERY_STEP, keeps, {"optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9}})
    assert "this run has no checkpoints, and cannot go on if it is killed: they do not hold" in caplog.text
    assert not (jobs.folder / "keeps" / "checkpoints").exists()
