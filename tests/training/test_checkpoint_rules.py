"""Every checkpoint that a run writes passes what a resume asks of it, whatever the rule and its pace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from at_once import every_checkpoint
from engine_makers import Inline
from hypothesis import Phase, given, reject, settings
from hypothesis import strategies as st
from virtual_trainings import net, written

from sparksgd.config import Config
from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.kinds import SIMULATED
from sparksgd.engines.simulated.engine import SimulatedEngine
from sparksgd.errors import ConfigError
from sparksgd.training.checkpoint import Checkpoint, RunIdentity
from sparksgd.training.checkpointing import Checkpointing
from sparksgd.training.loop import train


class Kept:
    """Keeps all checkpoints of a run."""

    def __init__(self) -> None:
        self.checkpoints: list[Checkpoint] = []

    def begin(self, run: RunIdentity) -> None:
        return None

    def write(self, checkpoint: Checkpoint) -> str:
        self.checkpoints.append(checkpoint)
        return str(len(self.checkpoints) - 1)

    def read(self, name: str) -> Checkpoint:
        return self.checkpoints[int(name)]

    def remove(self, name: str) -> None:
        """Take away one that a resume would refuse."""
        self.checkpoints = []

    def stopped(self, parameters: str | None) -> None:
        pass


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    never = property(lambda keeper: False, lambda keeper, value: None)
    with every_checkpoint(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpointing, "_is_tried", never, raising=False)  # each one is read back
        yield written(tmp_path_factory.mktemp("rows"), 48)


def checkpoints_of(rows: str, sections: dict[str, Any]) -> list[Checkpoint]:
    """Return the checkpoints of a run, of every turn; each went the way of a resume."""
    config, store = Config.from_dict(sections), Kept()

    def engine(plan: Any, shards: Any, test: Any) -> SimulatedEngine:
        return SimulatedEngine(plan, shards, test, config.cluster, config.train.num_shards)

    make = Inline(engine)
    object.__setattr__(make, "kinds", (replace(SIMULATED, resumes=True),))
    training = train(
        config,
        rows=ParquetRows(rows),
        test=ParquetRows(rows),
        make_engine=make,
        module=net(),
        checkpoints=store,
    )
    assert store.checkpoints
    assert store.checkpoints[-1].step == training.version
    return store.checkpoints


def sections(solver: dict[str, Any], **other: Any) -> dict[str, Any]:
    return {
        "data": {"features": "x", "label": "y"},
        "loss": {"name": "squared_error"},
        "optimizer": {"name": "SGD", "lr": 0.01},
        "solver": solver,
        "engine": {"name": "simulated"},
        "checkpoint": {"every_steps": 1},
        **other,
        "train": {"rows_per_step": 12, "num_shards": 3, "epochs": 2, "seed": 3} | other.get("train", {}),
    }


def test_a_step_may_use_several_messages_of_one_shard(rows: str) -> None:
    last = checkpoints_of(
        rows, sections({"name": "softsync", "gradients_per_step": 4}, train={"num_shards": 2})
    )[-1]
    assert max(last.values("run")["participation"]["of_shard"]) > last.step


_number = st.integers(1, 6)
_turns = st.integers(1, 3)
_pace = st.sampled_from([None, 0, 2])
ARRIVALS = st.one_of(
    st.fixed_dictionaries({"name": st.just("async_sgd"), "max_staleness": _pace}),
    st.fixed_dictionaries(
        {
            "name": st.just("softsync"),
            "gradients_per_step": _number,
            "staleness": st.sampled_from(["ignore", "divide"]),
            "max_staleness": _pace,
        }
    ),
    st.fixed_dictionaries({"name": st.just("stale_synchronous"), "bound": st.integers(0, 3)}),
    st.fixed_dictionaries({"name": st.just("delay_compensated"), "max_staleness": _pace}),
    st.fixed_dictionaries({"name": st.just("gap_aware")}),
    st.fixed_dictionaries({"name": st.just("delayed_nesterov"), "turns_per_push": _turns, "delay": _turns}),
    st.fixed_dictionaries({"name": st.just("elastic_averaging"), "turns_per_exchange": _turns}),
)
OTHERS = st.one_of(
    st.fixed_dictionaries({"name": st.just("synchronous"), "backup_workers": st.integers(0, 2)}),
    st.fixed_dictionaries(
        {
            "name": st.just("local_sgd"),
            "turns_per_round": _number,
            "synchronous_steps": st.integers(0, 5),
            "inner_state": st.sampled_from(["drop", "average"]),
        }
    ),
)
OPTIMISERS = st.sampled_from(
    [
        {"name": "SGD", "lr": 0.01},
        {"name": "SGD", "lr": 0.01, "momentum": 0.9},
        {"name": "SGD", "lr": 0.01, "momentum": 0.9, "nesterov": True},
    ]
)
KEYS: dict[str, dict[str, Any]] = {
    "CosineAnnealingLR": {"T_max": 8},
    "StepLR": {"step_size": 2},
    "ReduceLROnPlateau": {},
}
SCHEDULES = st.sampled_from(
    [
        {},
        {"name": "CosineAnnealingLR", "T_max": 8},
        {"name": "StepLR", "step_size": 2},
        {"name": "ReduceLROnPlateau"},
    ]
)
SLOW = {"turn_times": "exponential", "turn_s": 1.0, "latency_s": 0.0, "link_bytes_per_s": 1e9}


@settings(max_examples=8, deadline=None, phases=[Phase.generate])  # each is a training
@given(
    solver=st.one_of(ARRIVALS, OTHERS),
    optimizer=OPTIMISERS,
    schedule=SCHEDULES,
    rows_per_step=st.sampled_from([6, 12, 48]),
    shards=st.sampled_from([3, 4]),
    patience=st.sampled_from([None, 2]),
)
def test_every_checkpoint_can_be_gone_on_from(
    rows: str,
    solver: dict[str, Any],
    optimizer: dict[str, Any],
    schedule: dict[str, Any],
    rows_per_step: int,
    shards: int,
    patience: int | None,
) -> None:
    asked = sections(
        {key: value for key, value in solver.items() if value is not None},
        optimizer=optimizer,
        schedule=schedule,
        cluster=SLOW,
        train={"rows_per_step": rows_per_step, "num_shards": shards},
        **({} if patience is None else {"early_stopping": {"patience": patience}}),
    )
    try:
        checkpoints_of(rows, asked)
    except ConfigError:  # this rule has no such schedule
        reject()
