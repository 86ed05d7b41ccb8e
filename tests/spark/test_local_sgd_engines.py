"""Local SGD ends at one digest on every engine, with any number of workers, through lost executors."""

from __future__ import annotations

from dataclasses import replace

import pytest
from spark_helpers import LOCAL_CLUSTER, AtStep, configured, digests, undisturbed

from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.inline import InlineEngine
from sparksgd.errors import ConfigError
from sparksgd.spark.train import train
from sparksgd.training.loop import train as train_inline

pytestmark = pytest.mark.session("local[5]")

LOCAL = ("solver.name=local_sgd", "solver.turns_per_round=5", "train.epochs=2")
DILOCO = (
    *LOCAL, "solver.outer_lr=0.7", "solver.outer_momentum=0.9", "optimizer.name=AdamW", "optimizer.lr=0.01",
    "model.name=users_modules:NormNet", "train.rows_per_step=96",
)  # fmt: skip
AVERAGED = (
    *LOCAL, "solver.inner_state=average", "solver.synchronous_steps=3", "schedule.name=StepLR",
    "schedule.step_size=4",
)  # fmt: skip
PLACES = {
    "tree with 2 workers": ("engine.num_workers=2",),
    "tree with 3 workers": ("engine.num_workers=3",),
    "stages with 4 workers": ("engine.num_workers=4", "engine.barrier=false"),
    "allreduce with 2 workers": ("engine.num_workers=2", "engine.name=allreduce"),
    "allreduce with 4 workers": ("engine.num_workers=4", "engine.name=allreduce"),
}


EXPERIMENTS = {"local SGD": LOCAL, "DiLoCo": DILOCO, "averaged states": AVERAGED}
QUICK = {
    ("local SGD", "tree with 2 workers"), ("local SGD", "allreduce with 2 workers"),
    ("DiLoCo", "tree with 3 workers"), ("DiLoCo", "allreduce with 4 workers"),
    ("averaged states", "stages with 4 workers"), ("averaged states", "allreduce with 2 workers"),
}  # fmt: skip
"""Every experiment and every place are among them."""


@pytest.mark.parametrize(
    ("experiment", "place"),
    [
        pytest.param(experiment, place, marks=() if (experiment, place) in QUICK else pytest.mark.soak)
        for experiment in EXPERIMENTS
        for place in PLACES
    ],
)
def test_every_engine_and_every_number_of_workers_end_at_one_digest(spark, small, experiment, place):
    config = configured(*EXPERIMENTS[experiment], *PLACES[place])
    inline = train_inline(config, rows=ParquetRows(small), test=None, make_engine=InlineEngine)
    training = train(spark, config, spark.read.parquet(small))
    assert (training.version, training.turns) == (inline.version, inline.turns)
    assert digests(training) == digests(inline)


@pytest.mark.soak
def test_workers_send_a_vector_a_round_and_not_a_turn(spark, small):
    where = ("engine.name=allreduce", "engine.num_workers=2", "engine.segment_steps=4", "train.steps=16")
    every_turn = train(
        spark, configured(*LOCAL, "solver.turns_per_round=1", *where), spark.read.parquet(small)
    )
    seldom = train(spark, configured(*LOCAL, "solver.turns_per_round=4", *where), spark.read.parquet(small))
    assert every_turn.version == 4 * seldom.version == 16
    assert every_turn.sent_bytes == 4 * seldom.sent_bytes


@pytest.mark.parametrize("engine", ["tree", "allreduce"])
def test_a_state_that_each_shard_keeps_is_refused_with_the_engine_that_carries_it(spark, small, engine):
    config = configured(*LOCAL, "solver.inner_state=keep", f"engine.name={engine}")
    with pytest.raises(ConfigError) as refused:
        train(spark, config, spark.read.parquet(small))
    assert "needs a state of each shard that outlives the round" in str(refused.value)
    assert 'use engine.name = "inline"' in str(refused.value)


@pytest.mark.soak
@pytest.mark.session(LOCAL_CLUSTER)
@pytest.mark.parametrize(
    "where", [("engine.name=tree",), ("engine.name=allreduce",), ("engine.barrier=false",)]
)
def test_a_lost_executor_costs_a_round_and_no_bit(spark, small, flags, where):
    net = ("model.name=users_modules:FlagNet", f"model.folder={flags}")
    config = configured(*LOCAL, *net, *where, "engine.segment_steps=2")
    kill = AtStep(2, lambda _: (flags / "kill-executor").touch())
    training = train(spark, config, spark.read.parquet(small), observers=[kill])
    assert not any(flags.iterdir())
    assert training.recovery.retries >= (0 if "engine.barrier=false" in where else 1)
    assert training.flat.parameters_sha256() == undisturbed(small, replace(config, engine=config.engine))
