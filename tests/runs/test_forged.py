"""Files of a run whose digests are right, and whose values are not: an error of ours, or a run.

Whoever can write to a folder can write digests, too.  One value of a valid file is changed at a time.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from at_once import every_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from resumed_jobs import EVERY_STEP, Jobs, made_jobs

from sparksgd.arithmetic.flat import FlatModule
from sparksgd.config import Config
from sparksgd.engines.inline import InlineEngine
from sparksgd.errors import DataError, SparkSGDError
from sparksgd.runs.asked import Asked
from sparksgd.runs.checkpoints import manifests
from sparksgd.runs.earlier import earlier_run
from sparksgd.runs.folder import RunFolder, summary
from sparksgd.runs.json_files import digest_of
from sparksgd.runs.model import load_model
from sparksgd.runs.replay import read_replay
from sparksgd.solvers.protocol import Message, RoundSolver
from sparksgd.solvers.rules import completed
from sparksgd.storage import location
from sparksgd.training import loop
from sparksgd.training.checkpoint import Checkpoint, RunIdentity, Start, go_on
from sparksgd.training.checkpoint_rules import SolverRules
from sparksgd.training.state import Resumed, Training

KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "momentum, one cycle": {
        "optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9},
        "schedule": {"name": "OneCycleLR", "max_lr": 0.1, "total_steps": 10},
        "model": {"name": "resumed_modules:with_norm"},
    },
    "Adam, heads": {
        "optimizer": {"name": "Adam", "lr": 0.02},
        "model": {"name": "resumed_modules:TwoHeads"},
    },
    "local SGD": {
        "optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9},
        "schedule": {"name": "StepLR", "step_size": 3},
        "solver": {
            "name": "local_sgd", "turns_per_round": 2, "outer_momentum": 0.9, "inner_state": "average",
            "synchronous_steps": 1,
        },
    },
    "own": {
        "optimizer": {"name": "resumed_modules:Slow", "lr": 0.02},
        "schedule": {"name": "resumed_modules:Steps"},
    },
}  # fmt: skip


def deep(times: int) -> Any:
    found: Any = 1
    for _ in range(times):
        found = [found]
    return found


PLAIN: list[Any] = [
    "x", "", "3", "\ud800", -1, 0, 1, 3, 10**30, -(10**30), True, None, 1.5, -0.5, math.nan, math.inf, [], {},
    [0], ["x"], [None], {"x": "y"}, {"x": 1}, deep(90), deep(500),
]  # fmt: skip
TENSORS: list[Any] = [
    torch.zeros(0), torch.zeros(1), torch.zeros(2, 3), torch.zeros(10, dtype=torch.float64),
    torch.zeros(10, dtype=torch.int32), torch.zeros(4, 4).t(), torch.zeros(10, dtype=torch.complex64),
    torch.zeros(10).to_sparse(), torch.full((10,), math.nan), torch.zeros(10, dtype=torch.bfloat16),
    torch.zeros(10, dtype=torch.bool), torch.zeros(10, requires_grad=True),
    torch.zeros(40, dtype=torch.uint8), torch.nn.Parameter(torch.zeros(10)),
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all values within a value."""
    if path:
        yield path
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list | tuple)
        else ()
    )
    for key, one in inner:
        yield from places(one, (*path, key))


def changed(value: Any, path: tuple[Any, ...], deed: Callable[[Any, Any], Any]) -> Any:
    """Return a value where a deed was done to the container of what lies at a path."""
    key, *rest = path
    inner = dict(value) if isinstance(value, dict) else list(value)
    if rest:
        inner[key] = changed(inner[key], tuple(rest), deed)
    else:
        deed(inner, key)
    return tuple(inner) if isinstance(value, tuple) else inner


def mutated(draw: Callable[[Any], Any], values: Any, pool: list[Any]) -> Any:
    path = draw(st.sampled_from(sorted(places(values), key=repr)))
    what = draw(st.sampled_from(["set", "remove", "add"]))
    new = draw(st.sampled_from(pool))

    def deed(inner: Any, key: Any) -> None:
        if what == "remove":
            del inner[key]
        elif what == "add" and isinstance(inner, dict):
            inner["extra"] = new
        elif what == "add":
            inner.append(new)
        else:
            inner[key] = new

    return changed(values, path, deed)


# A checkpoint, and a run that is about to begin


_HELD: dict[str, tuple[Training, RoundSolver]] = {}


class Run:
    """A run of a kind: its last checkpoint, and one of the same that has made no step.

    Args:
        jobs: runs it.
        kind: of KINDS.
    """

    def __init__(self, jobs: Jobs, kind: str) -> None:
        self.jobs, self.kind = jobs, kind
        out = f"of {kind}"
        if not (jobs.folder / out).exists():
            jobs.stopped_at(out, 3, KINDS[kind], EVERY_STEP)
        self.folder = jobs.folder / out
        (manifest, *_) = manifests(location(self.folder / "checkpoints"))
        self.manifest = manifest
        if kind not in _HELD:
            _HELD[kind] = self._held()
        self.training, self.solver = _HELD[kind]

    def _held(self) -> tuple[Training, RoundSolver]:
        found: list[Any] = []

        def keep(training: Training, engine: Any, solver: RoundSolver, *_: Any, **__: Any) -> None:
            found.extend((training, solver))
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "_loop", keep)
            with pytest.raises(KeyboardInterrupt):
                self.jobs.run(f"held {self.kind}", KINDS[self.kind], EVERY_STEP)
        training, solver = found
        return training, solver

    def identity(self) -> RunIdentity:
        """Return what must be the same where it goes on."""
        return RunIdentity(
            experiment=self.training.config.experiment(),
            data_digest=self.training.rows.data_digest,
            total_turns=self.training.total_turns,
            turns_per_epoch=self.training.plan.sampling.turns_per_epoch,
        )

    def parts(self) -> dict[str, Any]:
        """Return the values of its checkpoint."""
        return {name: part.values for name, part in self.manifest.checkpoint().parts.items()}

    def go_on(self, parts: dict[str, Any]) -> None:
        """Let the run go on from other values, make a step, and tell of it."""
        checkpoint = self.manifest.checkpoint()
        forged = {
            name: type(part)(version=part.version, values=parts[name])
            for name, part in checkpoint.parts.items()
        }
        start = Start(
            checkpoint=Checkpoint(step=checkpoint.step, turns=checkpoint.turns, parts=forged),
            resumed=Resumed(step=checkpoint.step, lost_steps=0, written_at="now"),
            anew="train anew",
        )
        training, solver = self.training, self.solver
        rules = SolverRules(training.flat, solver)
        go_on(
            training, solver, [RunFolder(self.folder)], start, rules, InlineEngine(training.plan, None, None)
        )
        solver.state()
        step(solver, training.flat)
        training.version, training.turns = solver.version, solver.turns
        training.participation.starved()
        json.dumps(summary(training, 1.0))


def step(solver: RoundSolver, flat: FlatModule) -> None:
    shape = solver.shape_at(solver.turns)
    width = flat.parameters.numel()
    weights = solver.readout()
    scalars = dict.fromkeys(getattr(shape, "scalars", ()), 1.0)
    solver.receive(
        Message(
            vectors={name: np.full(width, 0.5, np.float32) for name in shape.vectors},
            statistics=weights.statistics.copy(),
            counters=weights.counters.copy(),
            loss=1.0,
            rows=1,
            scalars=scalars,
        )
    )


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    with every_checkpoint():
        yield made_jobs(tmp_path_factory.mktemp("forged"))


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, jobs: Jobs) -> Run:
    return Run(jobs, request.param)


EXAMPLES = int(os.environ.get("SPARKSGD_EXAMPLES", 0))
fuzzed = settings(
    max_examples=EXAMPLES or 40,
    deadline=None,
    derandomize=not EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def test_what_was_not_forged_goes_on(run: Run) -> None:
    run.go_on(run.parts())
    assert run.solver.version == run.manifest.step + 1


@fuzzed
@given(data=st.data())
def test_a_part_of_a_checkpoint_that_was_forged(run: Run, data: st.DataObject) -> None:
    parts = run.parts()
    name = data.draw(st.sampled_from(sorted(parts)))
    parts[name] = mutated(data.draw, parts[name], PLAIN + TENSORS)
    with suppress(SparkSGDError):
        run.go_on(parts)


# Named cases


FORGED: dict[str, tuple[str, str, Any, str]] = {
    "no shard": ("run", "participation.of_shard", [], "has 0 values, but must have 4"),
    "a late text": ("run", "participation.late", {"x": "y"}, "is 'x', but must be a whole number from 0"),
    "a step as text": ("run", "participation.steps", "3", "is '3', but must be a whole number"),
    "true steps": ("run", "participation.steps", True, "is True, but must be a whole number"),
    "more steps than made": ("run", "participation.epoch_steps", 10**30, "must be a whole number from 0 to"),
    "settled later": ("run", "settled_turns", 10**6, "must be a whole number from 0 to"),
    "no worker": ("run", "numerics", [], "has 0 values, but must have at least 2"),
    "a rate as text": ("solver", "rest.optimizer.groups.0.lr", "x", "is 'x', but must be a finite number"),
    "a rate that is NaN": ("solver", "rest.optimizer.groups.0.lr", math.nan, "must be a finite number"),
    "three betas": ("solver", "rest.optimizer.groups.0.betas", (0.9, 0.9, 0.9), "a tuple of 2 values"),
    "a large beta": ("solver", "rest.optimizer.groups.0.betas", (1.5, 0.9), "Adam does not take it"),
    "a name without vector": ("solver", "rest.optimizer.vectors.0", ("x",), "names 'x', which"),
    "another version": ("solver", "weights.version", 7, "must be a whole number from"),
    "other parameters": ("solver", "turns", -1, "is -1, but must be a whole number from"),
    "a file of no length": ("observers", "RunFolder.files.metrics.jsonl", {}, "has no bytes"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_value_is_named(jobs: Jobs, case: str) -> None:
    part, path, value, words = FORGED[case]
    run = Run(jobs, "Adam, heads")
    parts, keys = run.parts(), tuple(int(key) if key.isdecimal() else key for key in path.split("."))
    if keys[-2:] == ("metrics", "jsonl"):
        keys = (*keys[:-2], "metrics.jsonl")

    def deed(inner: Any, key: Any) -> None:
        inner[key] = value

    parts[part] = changed(parts[part], keys, deed)
    with pytest.raises(SparkSGDError, match=words):
        run.go_on(parts)


def test_a_part_without_the_settings_of_torch_is_refused(jobs: Jobs) -> None:
    """Version 1 had none; without them, a version 2 would go on under any."""
    run = Run(jobs, "Adam, heads")
    parts = run.parts()
    parts["run"] = {key: value for key, value in parts["run"].items() if key != "settings"}
    with pytest.raises(DataError, match=r"^run has no settings$"):
        run.go_on(parts)


# Small files of JSON


@fuzzed
@given(data=st.data())
def test_a_file_of_json_that_was_forged(jobs: Jobs, data: st.DataObject, tmp_path_factory: Any) -> None:
    run = Run(jobs, "Adam, heads")
    out = tmp_path_factory.mktemp("j") / "out"
    shutil.copytree(run.folder, out)
    files = [f"checkpoints/{run.manifest.name}.json", "model/model.json"]
    files += ["run.json", "summary.json", "metrics.jsonl"]
    file = out / data.draw(st.sampled_from(files))
    lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
    number = data.draw(st.integers(0, len(lines) - 1))
    values = mutated(data.draw, json.loads(lines[number]), PLAIN[:-1])
    if file.name.startswith("checkpoint"):
        values["sha256"] = digest_of(values)
    elif file.name == "model.json":
        values["sha256"] = digest_of(values, in_order=True)
    lines[number] = json.dumps(values)
    if data.draw(st.integers(0, 9)) == 0:
        lines[number] = lines[number].replace(":", ":" + "[" * 10_000, 1)
    file.write_text("\n".join(lines) + "\n")
    config = Config.from_dict(run.jobs.config(KINDS[run.kind], EVERY_STEP))
    fingerprints = run.manifest.values["fingerprints"]
    with suppress(SparkSGDError):
        asked = Asked(config=completed(config), fingerprints=fingerprints)
        found = earlier_run(location(out), asked)
        RunFolder(out, fingerprints).checkpoints(config, found).begin(run.identity())
    with suppress(SparkSGDError):
        load_model(out / "model", trust=["torch", "resumed_modules"])
    with suppress(SparkSGDError):
        read_replay(out, trust=["torch", "resumed_modules"])
    shutil.rmtree(out)
