"""The server engine: workers at their own pace, and the same bits when the run's trace is replayed."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from resumed_jobs import Stops  # tests/modules
from served_runs import SERVER, Flags, events, flagged, rule, served
from spark_helpers import AtStep, StepsMade, configured, flip_bit, write_rows
from stragglers import HeldBack, HeldUntil, HeldWhile, Straggler  # tests/modules
from virtual_trainings import ARRIVALS, OVERLAPPED  # tests/modules

import sparksgd
from sparksgd.errors import ClusterError, NotFinite, UserCodeError
from sparksgd.spark.train import train
from sparksgd.training.state import Observer, Probe, Training

pytestmark = pytest.mark.session("local[5]")


@pytest.mark.parametrize(
    "name",
    [name if name == "async_sgd" else pytest.param(name, marks=pytest.mark.soak) for name in ARRIVALS],
)
def test_every_rule_of_arrivals_trains_and_is_its_own_replay(
    spark: Any, small: str, tmp_path: Path, name: str
) -> None:
    run, reports = served(spark, small, tmp_path / "run", *rule(name, **ARRIVALS[name]))
    assert len({report.took_part for report in reports}) > 1
    assert run.participation.server() is not None
    assert all(report.server is not None for report in reports if report.timing.total)


@pytest.mark.soak
def test_two_runs_differ_and_each_is_its_own_replay(spark: Any, small: str, tmp_path: Path) -> None:
    digests = set()
    for held in (0, 2):
        made = StepsMade(tmp_path / f"made {held}")  # this worker waits until others have made steps
        probe = Probe(before_gradients=HeldBack(worker=held, made=str(made.file), steps=8))
        out = tmp_path / f"run {held}"
        run, _ = served(spark, small, out, *rule("async_sgd"), observers=(made,), probe=probe)
        assert max(run.participation.staleness) >= 3
        digests.add(run.flat.parameters_sha256())
    assert len(digests) == 2


@pytest.mark.soak
@pytest.mark.parametrize("workers", [2, 4])
def test_an_exchange_that_runs_beside_the_next_turn_is_repeated_too(
    spark: Any, small: str, tmp_path: Path, workers: int
) -> None:
    _, reports = served(spark, small, tmp_path / "run", *rule(**OVERLAPPED), f"engine.num_workers={workers}")
    assert len({report.took_part for report in reports}) == 4


def held_until(folder: Path, processes: int, turn: int = 48) -> Probe:
    """Return a probe that holds workers back until those that were lost have successors."""
    seen = folder / "processes"
    seen.mkdir()
    return Probe(before_gradients=HeldUntil(folder=str(seen), processes=processes, turn=turn))


def test_a_killed_worker_begins_anew_and_the_others_go_on(
    spark: Any, small: str, flags: Path, tmp_path: Path
) -> None:
    strikes = Flags(flags, {10: "kill-worker", 20: "kill-worker"})
    settings = (*rule("elastic_averaging", turns_per_exchange=2), *flagged(flags), "train.epochs=6")
    run, reports = served(
        spark, small, tmp_path / "run", *settings, observers=(strikes,), probe=held_until(tmp_path, 6)
    )
    assert run.recovery.retries == 2
    assert run.participation.lost_workers == 2
    found = [event["shard"] for event in events(tmp_path / "run") if event["kind"] == "lost"]
    assert len(found) == 2
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["server"]["lost_workers"] == 2
    assert {shard for report in reports[-20:] for shard in report.took_part} == {0, 1, 2, 3}


RESUMED = ARRIVALS | {
    "softsync, held": {"name": "softsync", "gradients_per_step": 3, "release": "step"},
    "Downpour": {"name": "async_sgd", "push_every": 2, "pull_every": 4},
    "overlapped": OVERLAPPED,
    "overlapped, seldom": OVERLAPPED | {"turns_per_exchange": 3},
    "in the order of shards": {"name": "elastic_averaging", "turns_per_exchange": 2, "order": "shard"},
}


@pytest.mark.usefixtures("every_checkpoint")
@pytest.mark.parametrize(
    "name",
    [name if name == "softsync" else pytest.param(name, marks=pytest.mark.soak) for name in RESUMED],
)
def test_a_run_goes_on_from_a_checkpoint_and_is_one_replay(
    spark: Any, small: str, tmp_path: Path, name: str
) -> None:
    keys = {"name": name} | RESUMED[name]
    settings = (*rule(**keys), "schedule.name=StepLR", "schedule.step_size=9", "train.epochs=3")
    config, out = configured(*SERVER, *settings, "checkpoint.every_steps=1"), tmp_path / "run"
    for last in (11, 23):
        with pytest.raises(KeyboardInterrupt):
            sparksgd.train(
                config, *[spark.read.parquet(small)] * 2, out=out, observers=[Stops(last)],
                resume_from=out if last > 11 else None,
            )  # fmt: skip
    run, _ = served(spark, small, out, *settings, "checkpoint.every_steps=1", resume_from=out)
    first, second = (each.step for each in run.resumed)
    assert 0 < first <= 10 < second <= 22
    assert [event["version"] for event in events(out) if event["kind"] == "anew"] == [first, second]
    turns = [(event["shard"], event["turn"]) for event in events(out) if event["kind"] == "push"]
    assert len(turns) == len(set(turns)), "no turn is used twice"
    assert sum(run.participation.staleness.values()) >= run.version


def shard_files(local_dir: Path) -> list[Path]:
    """Return the files of all shards: first those of the few test rows."""
    return sorted(local_dir.rglob("sparksgd-*/shard-*"), key=lambda file: file.stat().st_size)


@pytest.mark.parametrize("which", [pytest.param("training", marks=pytest.mark.soak), "test"])
def test_a_damaged_shard_is_written_again(
    spark: Any, small: str, local_dir: Path, tmp_path: Path, which: str
) -> None:
    few = write_rows(tmp_path / "few", 100, seed=1)

    def damage(_: Training) -> None:
        files = shard_files(local_dir)
        assert len(files) == 8
        damaged = files[0 if which == "test" else 7]
        (tmp_path / "damaged").write_text(str(damaged))
        flip_bit(damaged)

    settings = (*rule("stale_synchronous", bound=2), "train.epochs=6")
    held = HeldWhile(named_in=str(tmp_path / "damaged"), turn=48)  # until it is written again, elsewhere
    run, _ = served(
        spark, small, tmp_path / "run", *settings, test=few, observers=(AtStep(20, damage),),
        probe=Probe(before_gradients=held),
    )  # fmt: skip
    assert run.recovery.rebuilt_shards == 1
    assert run.recovery.retries == 1


@pytest.mark.parametrize(("flag", "error", "words"), [("raise", UserCodeError, "the user's own mistake")])
def test_a_mistake_of_the_module_ends_the_run_and_says_where(
    spark: Any, small: str, flags: Path, flag: str, error: type[Exception], words: str
) -> None:
    config = configured(*SERVER, *rule("async_sgd"), *flagged(flags))
    with pytest.raises(error) as raised:
        train(spark, config, small, observers=[Flags(flags, {10: flag})])
    assert words in str(raised.value)
    assert re.search(r"in turn \d+ of shard \d, on worker \d at ", str(raised.value))


def test_a_loss_that_is_not_finite_ends_the_run_with_the_weights_before(spark: Any, small: str) -> None:
    config = configured(*SERVER, *rule("async_sgd"), "optimizer.lr=1e30")
    with pytest.raises(NotFinite):
        train(spark, config, small)


def test_a_rule_that_holds_everybody_ends_the_run_in_words(spark: Any, small: str) -> None:
    config = configured(*SERVER, "solver.name=own_rules:Holding")
    with pytest.raises(ClusterError, match="after step 0 every shard waits, and no step can be made"):
        train(spark, config, small)


@pytest.mark.soak
def test_a_turn_that_hangs_is_given_up_and_its_worker_asked_again(
    spark: Any, small: str, flags: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = (*rule("stale_synchronous", bound=1), *flagged(flags), "engine.step_timeout_s=15")
    probe = held_until(tmp_path, 5, turn=28)  # until there is a successor of the process that is ended
    strikes = (Flags(flags, {10: "sleep"}),)
    run, _ = served(spark, small, tmp_path / "run", *settings, observers=strikes, probe=probe)
    assert run.participation.lost_workers == 1  # until it was lost, the others waited for its clock
    assert run.recovery.retries == 1
    assert re.search(r"worker \d is given up: turn \d+ of shard \d took longer than 15 s", caplog.text)
    assert spark.sparkContext.statusTracker().getActiveJobsIds() == []


class Busy(Observer):
    """Takes long after some steps, as a slow disk would."""

    def stepped(self, training: Training, report: Any) -> None:
        if report.step in (20, 40):
            time.sleep(3.0)


@pytest.mark.soak
def test_time_in_which_nobody_listens_is_not_that_of_turns(spark: Any, small: str, tmp_path: Path) -> None:
    settings = (*rule("async_sgd"), "engine.step_timeout_s=2")
    run, _ = served(spark, small, tmp_path / "run", *settings, observers=(Busy(),))
    assert (run.participation.lost_workers, run.recovery.retries) == (0, 0)


class RaisesAtTheEnd(Observer):
    """Lets a turn fail that nobody waits for."""

    def __init__(self, flags: Path) -> None:
        self.flags = flags

    def stepped(self, training: Training, report: Any) -> None:
        if report.turn >= training.total_turns:
            (self.flags / "raise").touch()

    def ended(self, training: Training) -> None:
        (self.flags / "raise").unlink(missing_ok=True)  # or the replay would obey it


def test_what_fails_beyond_the_last_step_fails_no_run(
    spark: Any, small: str, flags: Path, tmp_path: Path
) -> None:
    probe = Probe(before_gradients=Straggler(worker=1, delay_s=0.05))
    settings = (*rule("async_sgd"), *flagged(flags), "train.epochs=1")
    run, _ = served(
        spark, small, tmp_path / "run", *settings, observers=(RaisesAtTheEnd(flags),), probe=probe
    )
    assert run.last_evaluation is not None


@pytest.mark.soak
def test_who_is_back_before_an_evaluation_ends_gets_no_order_of_before(
    spark: Any, small: str, flags: Path, tmp_path: Path
) -> None:
    class Slow(Flags):
        def evaluated(self, training: Training, report: Any) -> None:
            (self.folder / "slow").unlink(missing_ok=True)

    (flags / "slow").touch()
    probe = Probe(before_gradients=Straggler(worker=1, delay_s=0.05))
    settings = (
        *rule("async_sgd"), "model.name=users_modules:EvaluationFlagNet", f"model.folder={flags}",
        "engine.num_workers=2", "train.epochs=3",
    )  # fmt: skip
    strikes = (Slow(flags, {20: "kill"}),)
    run, _ = served(spark, small, tmp_path / "run", *settings, observers=strikes, probe=probe)
    assert run.participation.lost_workers == 1


@pytest.mark.soak
@pytest.mark.session("local[4]")
def test_an_evaluation_that_needs_all_slots_while_a_worker_is_away_loses_nobody(
    spark: Any, small: str, flags: Path, local_dir: Path, tmp_path: Path
) -> None:
    few = write_rows(tmp_path / "few", 100, seed=1)
    settings = (*rule("async_sgd"), *flagged(flags), "train.epochs=16", "train.eval_every=1")
    strikes = (
        Flags(flags, {20: "kill-worker"}),
        AtStep(24, lambda _: shard_files(local_dir)[0].unlink()),
    )
    probe = held_until(tmp_path, 5, turn=160)
    run, reports = served(spark, small, tmp_path / "run", *settings, test=few, observers=strikes, probe=probe)
    shares = [report.took_part for report in reports[-200:]]
    assert {shard for shards in shares for shard in shards} == {0, 1, 2, 3}
    assert run.recovery.rebuilt_shards >= 1


def test_bytes_are_those_of_messages_and_answers(spark: Any, small: str, tmp_path: Path) -> None:
    settings = (*rule("async_sgd"), "train.eval_every=1")
    run, _ = served(spark, small, tmp_path / "run", *settings)
    moved = sum(event["kind"] in ("push", "pull") for event in events(tmp_path / "run"))
    vector_bytes = 4 * run.flat.parameters.numel()
    assert abs(run.sent_bytes - moved * vector_bytes) <= 8 * vector_bytes  # those of turns beyond the end


@pytest.mark.soak
def test_a_worker_that_fails_again_and_again_ends_the_run(spark: Any, small: str, flags: Path) -> None:
    config = configured(*SERVER, *rule("async_sgd"), *flagged(flags), "engine.max_attempts=2")
    with pytest.raises(ClusterError, match=r"worker \d failed 2 times without a turn between"):
        train(spark, config, small, observers=[Flags(flags, {10: "kill-always"})])
