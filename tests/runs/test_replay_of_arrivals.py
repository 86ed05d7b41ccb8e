"""A run of arrivals is repeated from its trace, on inline, to the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from resumed_jobs import without_digests
from virtual_trainings import ARRIVALS, CONSTANT, OVERLAPPED, trained, written

import sparksgd
from sparksgd.errors import ConfigError, DataError, NotFinite, ReplayDiffers

INLINE = {"name": "inline"}
NOISY = {"spread": 0.6, "tail_share": 0.1, "worker_life_s": 0.5, "worker_back_s": 0.05}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("replayed"))


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "trace.jsonl").read_text().splitlines()]


def changed(out: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    found = lines(out)
    change(found)
    for number, line in enumerate(found[1:]):
        line["order"] = number
    without_digests(out)
    (out / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))


@pytest.mark.parametrize("rule", ARRIVALS)
@pytest.mark.parametrize("workers", [2, 4])
def test_a_run_with_lost_workers_is_repeated_to_the_same_bits(
    rows: str, tmp_path: Path, rule: str, workers: int
) -> None:
    solver, engine = {"name": rule} | ARRIVALS[rule], {"name": "simulated", "num_workers": workers}
    out = tmp_path / "run"
    run, reports = trained(rows, solver, NOISY, engine=engine, out=out, epochs=3, test=rows)
    assert sum(line.get("kind") == "lost" for line in lines(out)) > 0
    replay = sparksgd.read_replay(out)
    again, repeated = trained(rows, solver, {}, engine=INLINE, replay=replay, epochs=3, test=rows)
    assert again.flat.parameters_sha256() == run.flat.parameters_sha256()
    assert [(r.version, r.took_part, r.staleness, r.loss) for r in repeated] == [
        (r.version, r.took_part, r.staleness, r.loss) for r in reports
    ]
    assert [e.loss for e in again.evaluations] == [e.loss for e in run.evaluations]


def test_the_order_of_the_shards_and_downpour_are_repeated_too(rows: str, tmp_path: Path) -> None:
    for number, solver in enumerate(
        [
            {"name": "elastic_averaging", "turns_per_exchange": 2, "order": "shard"},
            {"name": "async_sgd", "push_every": 2, "pull_every": 4},
            {"name": "softsync", "gradients_per_step": 3, "release": "step"},
            {"name": "async_sgd", "max_staleness": 2},
            OVERLAPPED,
            OVERLAPPED | {"turns_per_exchange": 3},
        ]
    ):
        out = tmp_path / str(number)
        run, _ = trained(rows, solver, NOISY, out=out, epochs=4)
        again, _ = trained(rows, solver, engine=INLINE, replay=sparksgd.read_replay(out), epochs=4)
        assert again.flat.parameters_sha256() == run.flat.parameters_sha256()


def test_two_runs_differ_and_each_is_its_own_replay(rows: str, tmp_path: Path) -> None:
    solver = {"name": "async_sgd"}
    digests = set()
    for seed in (1, 2):
        out = tmp_path / str(seed)
        run, _ = trained(rows, solver, {"seed": seed, "spread": 0.6}, out=out)
        assert max(run.participation.staleness) >= 3
        again, _ = trained(rows, solver, engine=INLINE, replay=sparksgd.read_replay(out))
        assert again.flat.parameters_sha256() == run.flat.parameters_sha256()
        digests.add(run.flat.parameters_sha256())
    assert len(digests) == 2


def test_two_arrivals_that_are_swapped_are_noticed(rows: str, tmp_path: Path) -> None:
    solver = {"name": "softsync", "gradients_per_step": 4, "staleness": "ignore"}
    out = tmp_path / "run"
    trained(rows, solver, {"spread": 0.6}, out=out)
    kept = (out / "trace.jsonl").read_text()
    pushes = [number for number, line in enumerate(lines(out)) if line.get("kind") == "push"]
    noticed = 0
    for one, other in pairwise(pushes[4:13]):
        (out / "trace.jsonl").write_text(kept)

        def swap(found: list[dict[str, Any]], one: int = one, other: int = other) -> None:
            found[one], found[other] = found[other], found[one]

        changed(out, swap)
        with pytest.raises((DataError, ReplayDiffers)):
            trained(rows, solver, engine=INLINE, replay=sparksgd.read_replay(out))
        noticed += 1
    assert noticed == 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found[1].update(shard=7), "there are 4 shards"),
        (lambda found: found[1].update(version=5), "the centre's answer is version 0"),
        (lambda found: found.pop(1), "the shard has taken version None"),
        (lambda found: found[2].update(turn=3), "its next turn is 0"),
        (lambda found: found[2].update(version=1), "the shard has taken version 0"),
        (lambda found: found.pop(2), "the shard has not started that turn"),
    ],
)
def test_a_trace_that_does_not_fit_is_refused(rows: str, tmp_path: Path, change: Any, words: str) -> None:
    out = tmp_path / "run"
    trained(rows, {"name": "async_sgd"}, CONSTANT, out=out)
    changed(out, change)
    with pytest.raises(DataError) as refused:
        trained(rows, {"name": "async_sgd"}, engine=INLINE, replay=sparksgd.read_replay(out))
    assert words in str(refused.value)


def test_a_run_that_was_killed_is_repeated_as_far_as_it_went(rows: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    _, reports = trained(rows, {"name": "async_sgd"}, {"spread": 0.6}, out=out)
    (out / "summary.json").unlink()
    for name, keep in (("metrics.jsonl", 12), ("trace.jsonl", 1 + 4 * 2 + 3 * 11 + 1)):
        found = (out / name).read_text().splitlines(keepends=True)
        (out / name).write_text("".join(found[:keep]))
    again, repeated = trained(rows, {"name": "async_sgd"}, engine=INLINE, replay=sparksgd.read_replay(out))
    assert again.version == len(repeated) >= 10
    assert [r.loss for r in repeated] == [r.loss for r in reports[: len(repeated)]]


def test_a_trace_that_ends_too_early_is_refused(rows: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run, _ = trained(rows, {"name": "async_sgd"}, CONSTANT, out=out)
    changed(out, lambda found: found.__delitem__(slice(-6, None)))
    with pytest.raises(DataError, match=rf"the trace ends after \d+ steps, but the run made {run.version}"):
        trained(rows, {"name": "async_sgd"}, engine=INLINE, replay=sparksgd.read_replay(out))
    (out / "trace.jsonl").unlink()
    with pytest.raises(DataError, match=r"has no trace.jsonl, and a run of arrivals can be repeated from it"):
        sparksgd.read_replay(out)


def test_a_trace_of_another_run_is_noticed_at_its_first_other_step(rows: str, tmp_path: Path) -> None:
    for seed in (1, 2):
        trained(rows, {"name": "async_sgd"}, {"seed": seed, "spread": 0.6}, out=tmp_path / str(seed))
    (tmp_path / "1" / "summary.json").unlink()  # as if it was killed: no digest
    (tmp_path / "1" / "trace.jsonl").write_bytes((tmp_path / "2" / "trace.jsonl").read_bytes())
    with pytest.raises(ReplayDiffers, match=r"of the replay has a loss of .* the trace was changed or is of"):
        trained(rows, {"name": "async_sgd"}, engine=INLINE, replay=sparksgd.read_replay(tmp_path / "1"))


def test_a_run_that_undid_its_last_step_is_repeated_without_it(rows: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(NotFinite):
        trained(rows, {"name": "async_sgd"}, CONSTANT, out=out, optimizer={"name": "SGD", "lr": 1e30})
    summary = json.loads((out / "summary.json").read_text())
    again, _ = trained(
        rows,
        {"name": "async_sgd"},
        engine=INLINE,
        replay=sparksgd.read_replay(out),
        optimizer={"name": "SGD", "lr": 1e30},
    )
    assert again.version == summary["steps"] > 0
    assert again.flat.parameters_sha256() == summary["parameters_sha256"]


def test_virtual_backup_workers_and_gossip_are_repeated_on_inline(rows: str, tmp_path: Path) -> None:
    for number, solver in enumerate([{"backup_workers": 1}, {"name": "decentralised"}]):
        out = tmp_path / str(number)
        run, _ = trained(rows, solver, {"spread": 0.6}, out=out)
        again, _ = trained(rows, solver, engine=INLINE, replay=sparksgd.read_replay(out))
        assert again.flat.parameters_sha256() == run.flat.parameters_sha256()


def test_a_run_without_gradients_has_nothing_to_repeat(rows: str, tmp_path: Path) -> None:
    trained(rows, {"name": "async_sgd"}, {"gradients": False}, out=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"cluster.gradients was false"):
        trained(rows, {"name": "async_sgd"}, engine=INLINE, replay=sparksgd.read_replay(tmp_path / "run"))


def test_a_run_of_arrivals_is_not_repeated_by_other_engines_or_rules(rows: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trained(rows, {"name": "async_sgd"}, CONSTANT, out=out)
    replay = sparksgd.read_replay(out)
    with pytest.raises(ConfigError, match=r'messages in the order of a trace.*use engine.name = "inline"'):
        trained(rows, {"name": "async_sgd"}, replay=replay)
    with pytest.raises(ConfigError, match=r"a rule of rounds, but the run to be replayed is of arrivals"):
        trained(rows, {"name": "synchronous"}, engine=INLINE, replay=replay)


def test_a_run_of_arrivals_needs_an_engine_that_carries_them(rows: str) -> None:
    with pytest.raises(ConfigError) as refused:
        trained(rows, {"name": "async_sgd"}, engine=INLINE)
    assert 'use engine.name = "server" or engine.name = "simulated" (in virtual time)' in str(refused.value)


def test_what_a_folder_says_of_virtual_time(rows: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run, reports = trained(rows, {"name": "async_sgd"}, CONSTANT, out=out)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["virtual_s"] == run.virtual_s == reports[-1].virtual_s
    assert summary["staleness"] == {str(k): v for k, v in sorted(run.participation.staleness.items())}
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["staleness"] for line in steps] == [list(report.staleness) for report in reports]
    assert [line["virtual_s"] for line in steps] == [report.virtual_s for report in reports]
    trace = (out / "trace.jsonl").read_bytes()
    assert json.loads(trace.splitlines()[0]) == {"trace": 1, "family": "arrivals"}
