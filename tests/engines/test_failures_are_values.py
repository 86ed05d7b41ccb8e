"""What fails in a worker comes back as a value that names the step, the shard and the rows."""

from __future__ import annotations

import pickle
import socket
from pathlib import Path

import torch
from shard_jobs import ROWS, Job, picky, slope
from torch import nn

from sparksgd.engines.replies import Reply
from sparksgd.errors import NotFinite, ShardMissing, UserCodeError


def test_a_loss_that_is_not_finite_names_step_shard_and_rows(tmp_path: Path) -> None:
    def root(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return output.reshape(len(label)) + label.sqrt()

    job = Job(
        tmp_path, slope(), [ROWS, [((1.0,), 4.0), ((1.0,), -1.0), ((1.0,), 9.0), ((1.0,), -2.0)]], loss=root
    )
    failure = job.gradients(worker=3).failure
    assert isinstance(failure, NotFinite)
    assert str(failure) == (
        f"the loss of turn 1 is nan in shard 1, rows 1, 3\n  in turn 1, on worker 3 at {socket.gethostname()}"
    )


def test_a_gradient_that_is_not_finite_is_told_from_the_loss(tmp_path: Path) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight.sqrt() * x  # 0, with an infinite slope

    def itself(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return output.reshape(len(label))

    failure = Job(tmp_path, Root(), [ROWS], loss=itself).gradients().failure
    assert isinstance(failure, NotFinite)
    assert "the gradient of turn 1 is NaN or infinite in shard 0, rows 0, 1, 2, though the loss is 0" in str(
        failure
    )


def test_many_bad_rows_are_not_all_listed(tmp_path: Path) -> None:
    failure = Job(tmp_path, slope(float("nan")), [[((1.0,), 1.0)] * 20]).gradients().failure
    assert "rows 0, 1, 2, 3, 4, 5, 6, 7 and 12 more\n" in str(failure)


def test_what_the_user_s_code_raised_comes_back_with_its_traceback(tmp_path: Path) -> None:
    answer = Job(tmp_path, slope(), [ROWS, ROWS], loss=picky).gradients(worker=1)
    failure = pickle.loads(pickle.dumps(answer.failure))
    assert isinstance(failure, UserCodeError)
    for phrase in ("the module or its loss raised KeyError: 'no such label'", "in picky", "shard_jobs.py"):
        assert phrase in str(failure)
    assert str(failure).endswith(f"in turn 1, on worker 1 at {socket.gethostname()}")


def test_a_file_that_is_gone_is_a_missing_shard_not_an_error_of_training(tmp_path: Path) -> None:
    job = Job(tmp_path, slope(), [ROWS, ROWS])
    Path(job.table[1].path).unlink()
    failure = job.gradients().failure
    assert isinstance(failure, ShardMissing)
    assert failure.shards == (1,)
    assert isinstance(job.computer().evaluations(0, job.table, job.weights).failure, ShardMissing)


def test_of_two_failures_the_one_that_cannot_be_mended_is_kept(tmp_path: Path) -> None:
    missing, wrong = ShardMissing("gone", (0,)), UserCodeError("wrong")
    for left, right in [(missing, wrong), (wrong, missing), (None, wrong), (wrong, None)]:
        answer = Reply(leaves=2, partials={(0, 1): None}, failure=left)
        answer += Reply(leaves=2, partials={(1, 2): None}, failure=right)
        assert (answer.failure, answer.partials) == (wrong, {})


def test_a_failure_leaves_no_shard_in_the_input_or_spark_would_drop_the_worker(tmp_path: Path) -> None:
    job = Job(tmp_path, slope(), [ROWS, ROWS], loss=picky)
    shards = iter(job.table)
    assert job.computer().round(0, shards, job.answer(0)).failure is not None
    assert next(shards, None) is None


def test_two_missing_shards_are_both_told(tmp_path: Path) -> None:
    answer = Reply(leaves=2, failure=ShardMissing("gone", (0,)))
    answer += Reply(leaves=2, failure=ShardMissing("gone", (1,)))
    assert isinstance(answer.failure, ShardMissing)
    assert answer.failure.shards == (0, 1)
