"""A run that goes on from a checkpoint ends as one that was never stopped, or says why it cannot."""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from typing import Any

import carried_kinds
import pyarrow.parquet as pq
import pytest
from resumed_jobs import EVERY_STEP, KINDS, OF_SHARDS, SHORT, Jobs, copied_until, metrics
from rich.console import Console

from sparksgd.arithmetic.numerics import Numerics
from sparksgd.cli.run import run
from sparksgd.cli.terminal import Terminal
from sparksgd.config import Config
from sparksgd.engines.compute import Computer
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


ALL = KINDS | OF_SHARDS | CARRIED
QUICK = (
    "AdamW, norm, dropout, clipping",
    "optimiser and schedule of one's own",
    "local SGD",
    "an optimiser of one's own of each shard",
    "elastic averaging in rounds",
)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.soak) for kind in ALL]
)
def test_a_run_goes_on_from_any_of_its_checkpoints_to_the_same_bits(jobs: Jobs, kind: str) -> None:
    tables = ALL[kind]
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


def test_the_model_of_a_finished_run_is_evaluated_on_other_test_data(jobs: Jobs) -> None:
    before, out = jobs.run("tested", SHORT), jobs.folder / "tested"
    others = str(jobs.folder / "others.parquet")
    pq.write_table(pq.read_table(jobs.folder / "rows.parquet").slice(10, 40), others)
    again = jobs.run("tested", SHORT, {"data": {"test": others}})
    assert again["status"] == "finished"
    assert again["resumed"][0]["step"] == again["steps"] == before["steps"]
    assert again["parameters_sha256"] == before["parameters_sha256"]
    assert again["test_loss"] != before["test_loss"]
    *made, last, new = metrics(out)
    assert [(line["kind"], line["rows"]) for line in (last, new)] == [("evaluation", 100), ("evaluation", 40)]
    assert (last["test_loss"], new["test_loss"]) == (before["test_loss"], again["test_loss"])
    assert [line["step"] for line in made if line["kind"] == "step"] == list(range(1, before["steps"] + 1))
    assert jobs.run("tested", SHORT, {"data": {"test": others}}) == again  # there is nothing to do


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


def test_a_round_that_was_whole_after_synchronous_steps_goes_on(jobs: Jobs) -> None:
    kind = KINDS["local SGD"]  # four synchronous steps, then a round to the epoch's end, then one of 3 turns
    jobs.run("whole after others", kind, {"train": {"steps": 8}})
    again = jobs.run("whole after others", kind, {"train": {"steps": 9}})
    assert again["resumed"][0]["step"] == 6
    alone = jobs.run("whole after others at once", kind, {"train": {"steps": 9}})
    assert again["parameters_sha256"] == alone["parameters_sha256"]


@pytest.mark.parametrize(("steps", "is_whole"), [(6, False), (7, True)])
def test_rounds_of_elastic_averaging_that_were_cut_short(jobs: Jobs, steps: int, is_whole: bool) -> None:
    kind, out = OF_SHARDS["elastic averaging in rounds"], f"elastic until {steps}"
    jobs.run(out, kind, {"train": {"steps": steps}})
    if is_whole:
        alone = jobs.run(f"{out} at once", kind, {"train": {"steps": 9}})
        again = jobs.run(out, kind, {"train": {"steps": 9}})
        assert again["parameters_sha256"] == alone["parameters_sha256"]
    else:
        with pytest.raises(ConfigError, match="the last round of elastic_averaging was cut short"):
            jobs.run(out, kind, {"train": {"steps": 9}})


@pytest.mark.parametrize(("kind", "cut_turn"), [("elastic averaging in rounds", 8), ("gradient push", 7)])
def test_a_step_that_was_cut_off_leaves_no_checkpoint_of_shards_that_are_ahead(
    jobs: Jobs, kind: str, cut_turn: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tables, out = (OF_SHARDS[kind], {"checkpoint": {"every_steps": 4}}), f"cut off {kind}"
    piece, made = Computer._piece, []

    def piece_until(computer: Computer, shard: Any, turn: int, *how: Any) -> Any:
        made.append(turn)
        if turn == cut_turn and made.count(turn) == 3:  # of four shards
            raise KeyboardInterrupt
        return piece(computer, shard, turn, *how)

    monkeypatch.setattr(Computer, "_piece", piece_until)
    with caplog.at_level(logging.INFO, "sparksgd"), pytest.raises(KeyboardInterrupt):
        jobs.run(out, *tables)
    monkeypatch.undo()
    step = manifests(location(jobs.folder / out / "checkpoints"))[0].step
    assert f"a later run can go on from step {step}" in caplog.text
    again = jobs.run(out, *tables)
    assert again["resumed"][0]["step"] == step
    assert again["parameters_sha256"] == jobs.run(f"{out} whole", *tables)["parameters_sha256"]


def test_gossip_goes_on_from_mid_epoch(jobs: Jobs) -> None:
    kind = OF_SHARDS["gradient push"]
    jobs.run("gossip", kind, {"train": {"steps": 7}})
    again = jobs.run("gossip", kind, {"train": {"steps": 9}})
    assert again["resumed"][0]["step"] == 7
    assert (
        again["parameters_sha256"]
        == jobs.run("gossip at once", kind, {"train": {"steps": 9}})["parameters_sha256"]
    )
