"""The all-reduce engine ends at the reference's bits with any number of workers, or says why it cannot."""

from __future__ import annotations

import logging
import re
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from spark_helpers import (
    ALLREDUCE,
    OVERLAPPING,
    WIDE,
    Reports,
    configured,
    digests,
    read_files_apart,
    undisturbed,
    write_rows,
)

from sparksgd.arithmetic.addition_tree import useful_workers
from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.inline import InlineEngine
from sparksgd.errors import ClusterError, ConfigError
from sparksgd.spark.train import train
from sparksgd.training.loop import train as train_inline

pytestmark = pytest.mark.session("local[2]")

PLACES = [
    (1, 4, ()),
    (2, 4, ("engine.name=tree",)),
    (2, 4, ("engine.segment_steps=7",)),
    (3, 4, ("engine.encrypt=true",)),
    (4, 4, ("engine.segment_steps=20",)),
    (3, 8, ("engine.segment_steps=none",)),
]
EXPERIMENTS = {
    "LeNet with dropout, and momentum": (
        *("model.name=lenet", "model.side=4", "model.maps=[4, 8]", "model.hidden=32"),
        *("schedule.name=CosineAnnealingLR", "schedule.T_max=20"),
    ),
    "batch-norm and Adam": ("model.name=users_modules:NormNet", "optimizer.name=Adam", "optimizer.lr=0.01"),
    "clipping, which needs the whole gradient": ("solver.clip_norm=0.5",),
    "an optimiser that looks at whole tensors": ("optimizer.name=Adafactor", "optimizer.lr=0.01"),
    "a head that some steps do not touch": (
        *("model.name=users_modules:HeadsNet", "optimizer.name=AdamW", "optimizer.lr=0.01"),
    ),
    "an optimiser of the user's own": ("optimizer.name=users_modules:NoisyLookahead", "optimizer.lr=0.05"),
}

LENET, ADAM, CLIPPING, WHOLE_TENSORS, HEADS, OWN = EXPERIMENTS
QUICK = {(LENET, 1), (ADAM, 2), (CLIPPING, 4), (WHOLE_TENSORS, 0), (HEADS, 5), (OWN, 3)}
"""Every experiment and every place are among them."""


@pytest.mark.session("local[5]")
@pytest.mark.parametrize(
    ("experiment", "place"),
    [
        pytest.param(experiment, place, marks=() if (experiment, place) in QUICK else pytest.mark.soak)
        for experiment in EXPERIMENTS
        for place in range(len(PLACES))
    ],
)
def test_every_number_of_workers_ends_at_the_digest_of_the_reference(spark, small, experiment, place):
    workers, shards, cluster = PLACES[place]
    settings = ("train.steps=20", f"train.num_shards={shards}", *EXPERIMENTS[experiment])
    config = configured(*settings, f"engine.num_workers={workers}", *ALLREDUCE, *cluster)
    training = train(spark, config, spark.read.parquet(small))
    inline = train_inline(config, rows=ParquetRows(small), test=None, make_engine=InlineEngine)
    assert digests(training) == digests(inline)
    assert (len(training.step_times), training.recovery.retries) == (20, 0)
    if training.engine == "allreduce" and workers in useful_workers(shards):
        vector = 4 * training.flat.parameters.numel()
        beside = training.sent_bytes_per_worker_step - 2 * (workers - 1) / workers * vector
        assert 0 <= beside <= 256 * (workers - 1)  # a record of loss, rows, statistics for each other


@pytest.mark.soak  # test_same_bits.py has the tree engine's; the sums do not depend on who has which rows
@pytest.mark.session("local[5]")
def test_rows_dealt_in_place_reach_the_digest_of_the_tree_engine(spark, tmp_path):
    path = write_rows(tmp_path / "rows", 600, files=6)
    settings = ("train.steps=6", "data.placement=in_place", "train.num_shards=5", "engine.num_workers=3")
    frame = read_files_apart(spark, path)
    tree = train(spark, configured(*settings), frame)
    allreduce = train(spark, configured(*settings, *ALLREDUCE), frame)
    assert digests(tree) == digests(allreduce)
    assert allreduce.sent_bytes > tree.sent_bytes == 0


@pytest.mark.parametrize("flushes", [True, False])
def test_workers_make_steps_under_the_settings_of_the_driver(spark, small, flushes):
    config = configured(
        "model.name=users_modules:FadingNet", "optimizer.weight_decay=5", "train.steps=4", *ALLREDUCE
    )
    torch.set_flush_denormal(flushes)
    try:
        training = train(spark, config, spark.read.parquet(small))
        inline = train_inline(config, rows=ParquetRows(small), test=None, make_engine=InlineEngine)
        assert (inline.module.small == 0).all() == flushes
    finally:
        torch.set_flush_denormal(False)
    assert digests(training) == digests(inline)


def test_reports_and_evaluations_are_those_of_the_reference(spark, small):
    config = configured(*ALLREDUCE, "train.steps=20", "train.eval_every=6")
    frame, ours, reference = spark.read.parquet(small), Reports(), Reports()
    training = train(spark, config, frame, frame, observers=[ours])
    rows = ParquetRows(small)
    train_inline(config, rows=rows, test=rows, make_engine=InlineEngine, observers=[reference])
    assert ours.seen == reference.seen
    assert len(training.step_times) == 20


@pytest.mark.session("local[5]")
@pytest.mark.soak
def test_two_runs_at_once_on_the_same_executors_do_not_meet(spark, small):
    frame = spark.read.parquet(small)
    configs = [configured(*ALLREDUCE, "train.steps=12", f"train.seed={seed}") for seed in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        trainings = list(pool.map(lambda config: train(spark, config, frame), configs))
    for training, config in zip(trainings, configs, strict=True):
        assert training.flat.parameters_sha256() == undisturbed(small, config)
        assert (training.recovery.strangers, training.recovery.retries) == (0, 0)


# Sums that begin before gradients are complete


@pytest.mark.session("local[5]")
@pytest.mark.parametrize(
    ("workers", "settings"),
    [
        (2, ("engine.encrypt=true", "engine.segment_steps=3")),
        pytest.param(3, ("optimizer.name=Adam",), marks=pytest.mark.soak),
        pytest.param(2, ("solver.clip_norm=0.5",), marks=pytest.mark.soak),
    ],
    ids=str,
)
def test_gradients_that_go_out_while_others_are_computed_change_no_bit(spark, small, workers, settings):
    sized = ("train.steps=8", f"train.num_shards={workers}", f"engine.num_workers={workers}")
    config = configured(*ALLREDUCE, *OVERLAPPING, *sized, *settings)
    training = train(spark, config, spark.read.parquet(small))
    assert training.flat.parameters_sha256() == undisturbed(small, config)
    vector = 4 * training.flat.parameters.numel()
    assert training.sent_bytes_per_worker_step == pytest.approx(
        2 * (workers - 1) / workers * vector, rel=1e-3
    )


@pytest.mark.parametrize(
    ("shards", "overlap", "said"),
    [
        (2, "auto", 1),
        (2, "never", 0),
        (4, "auto", 0),
    ],
)
@pytest.mark.soak
def test_sums_begin_early_once_they_have_taken_long(spark, small, caplog, monkeypatch, shards, overlap, said):
    monkeypatch.setattr("sparksgd.spark.engines.allreduce._OVERLAP_PAYS_S", 0.0)
    settings = ("train.steps=12", *WIDE)
    config = configured(*ALLREDUCE, *settings, f"train.num_shards={shards}", f"engine.overlap={overlap}")
    with caplog.at_level(logging.INFO, "sparksgd"):
        training = train(spark, config, spark.read.parquet(small))
    assert training.flat.parameters_sha256() == undisturbed(small, config)
    assert caplog.text.count("from now on it begins before gradients are complete") == said


@pytest.mark.soak
def test_gradients_that_come_in_parts_go_out_whole(spark, small, caplog):
    config = configured(
        *ALLREDUCE, *OVERLAPPING, "model.name=users_modules:TwiceNet", "train.num_shards=2", "train.steps=8"
    )
    with caplog.at_level(logging.WARNING, "sparksgd"):
        training = train(spark, config, spark.read.parquet(small))
    assert training.flat.parameters_sha256() == undisturbed(small, config)
    assert training.recovery.retries == 0
    assert caplog.text.count("from now on gradients are sent whole") == 1


# Where it cannot work


@pytest.mark.session("local[5]")
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("engine.encrypt=true",), "pip install 'sparksgd[tls]'"),
        (("engine.ports={taken}-{taken}",), "cannot listen on a port of {taken} to {taken}"),
    ],
)
def test_what_cannot_work_at_the_driver_is_refused_before_rows_are_dealt(
    spark, small, monkeypatch, settings, says
):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.setattr("sparksgd.spark.train.DataFrameRows", None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        config = configured(*ALLREDUCE, *(setting.format(taken=taken) for setting in settings))
        with pytest.raises((ClusterError, ConfigError), match=re.escape(says.format(taken=taken))):
            train(spark, config, spark.read.parquet(small))


@pytest.mark.parametrize(
    ("workers", "listens", "chosen", "why"),
    [
        (2, True, "allreduce", "engine: allreduce, because all 2 workers reach each other"),
        (1, True, "tree", "engine: tree, because there is only one worker"),
        (
            2,
            False,
            "tree",
            "engine: tree, because workers cannot sum among themselves: cannot listen on",
        ),
    ],
)
def test_auto_chooses_and_says_why(spark, small, caplog, workers, listens, chosen, why):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ports = f"{port}-{port + 9 * listens}"  # one is enough for the driver alone
    config = configured(
        "engine.name=auto",
        f"engine.num_workers={workers}",
        f"engine.ports={ports}",
        "engine.peer_timeout_s=2",
        "train.steps=3",
    )
    with caplog.at_level(logging.INFO, "sparksgd"):
        training = train(spark, config, spark.read.parquet(small))
    assert training.engine == chosen
    assert why in caplog.text
    assert training.flat.parameters_sha256() == undisturbed(small, config)
