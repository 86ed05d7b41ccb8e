"""What changes the bits of a training and what does not; what it learns, and leaves as it was."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from counted_trainings import config_of, parquet
from torch import nn

from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.inline import InlineEngine
from sparksgd.training.loop import train


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 3))


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


@pytest.fixture(scope="module")
def classified() -> list[tuple[list[float], int]]:
    """600 rows of ten features and three classes that a line can tell apart, mostly."""
    drawn = np.random.default_rng(0)
    x = drawn.standard_normal((600, 10))
    y = (x[:, :3] + 0.3 * drawn.standard_normal((600, 3))).argmax(1)
    return list(zip(x.tolist(), y.tolist(), strict=True))


def sha256(
    rows: ParquetRows, factory: Callable[[], nn.Module], test: ParquetRows | None = None, **train_keys: Any
) -> tuple[str, str, str]:
    training = train(
        config_of(
            model={"name": f"{__name__}:{factory.__name__}"},
            optimizer={"lr": 0.1, "momentum": 0.9},
            train={"rows_per_step": 64, "num_shards": 4, "epochs": 2} | train_keys,
        ),
        rows=rows,
        test=test,
        make_engine=InlineEngine,
    )
    return training.flat.parameters_sha256(), training.flat.buffers_sha256(), training.rows.data_digest


@pytest.mark.parametrize("factory", [with_dropout, with_batch_norm])
def test_neither_files_nor_their_order_nor_an_evaluation_change_a_bit(
    tmp_path: Path, classified: list[Any], factory: Callable[[], nn.Module]
) -> None:
    shuffled = [classified[row] for row in np.random.default_rng(1).permutation(600)]
    one_file, thirteen = parquet(tmp_path / "1", classified), parquet(tmp_path / "13", shuffled, files=13)
    first = sha256(one_file, factory)
    torch.manual_seed(1234)
    assert sha256(thirteen, factory) == first
    assert sha256(thirteen, factory, test=one_file, eval_every=3) == first


@pytest.mark.parametrize("key", ["seed", "num_shards", "rows_per_step", "rows_per_backward"])
def test_each_key_of_the_experiment_changes_the_bits(tmp_path: Path, classified: list[Any], key: str) -> None:
    rows = parquet(tmp_path, classified)
    other = {"seed": 1, "num_shards": 5, "rows_per_step": 50, "rows_per_backward": 3}[key]
    assert sha256(rows, with_dropout, epochs=1)[0] != sha256(rows, with_dropout, epochs=1, **{key: other})[0]


def test_trainings_in_threads_of_one_process_do_not_mix_their_numbers(
    tmp_path: Path, classified: list[Any]
) -> None:
    rows = parquet(tmp_path, classified)

    def trained(seed: int) -> object:
        return sha256(rows, with_dropout, epochs=1, seed=seed)

    alone = [trained(seed) for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(trained, range(6))) == alone


def test_features_stored_as_doubles_or_floats_train_the_same_module(
    tmp_path: Path, classified: list[Any]
) -> None:
    as_floats = pa.table(
        {
            "y": [y for _, y in classified],
            "x": pa.array([x for x, _ in classified], pa.list_(pa.float64())).cast(
                pa.list_(pa.float32(), 10)
            ),
        }
    )
    pq.write_table(as_floats, tmp_path / "floats.parquet")
    assert sha256(ParquetRows(str(tmp_path / "floats.parquet")), with_dropout, epochs=1) == sha256(
        parquet(tmp_path / "doubles", classified), with_dropout, epochs=1
    )


def test_a_training_learns_what_there_is_to_learn(tmp_path: Path, classified: list[Any]) -> None:
    training = train(
        config_of(
            model={"name": f"{__name__}:with_dropout"},
            optimizer={"lr": 0.1, "momentum": 0.9},
            train={"rows_per_step": 50, "num_shards": 4, "epochs": 8},
        ),
        rows=parquet(tmp_path / "train", classified[:500]),
        test=parquet(tmp_path / "test", classified[500:]),
        make_engine=InlineEngine,
    )
    accuracies = [evaluation.accuracy for evaluation in training.evaluations]
    assert len(accuracies) == 8
    assert accuracies[-1] > 0.75 > 1 / 3


# What it leaves as it was


def test_threads_and_torch_s_generator_are_left_as_they_were(tmp_path: Path, classified: list[Any]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    try:
        sha256(parquet(tmp_path, classified), with_dropout, epochs=1, threads=2)
        assert torch.get_num_threads() == 3
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(before)


def test_a_shard_of_its_share_is_not_worth_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, classified: list[Any]
) -> None:
    with caplog.at_level(logging.WARNING, "sparksgd"):
        sha256(parquet(tmp_path, classified), with_dropout, epochs=1)
    assert caplog.text == ""
