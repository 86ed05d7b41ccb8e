"""A worker's answer is a function of the weights, the step and the rows, and of nothing else."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_jobs import ROWS, Job, bits, noisy_job, slope, the_sum
from torch import nn
from torch.nn import functional as F

from sparksgd.arithmetic.seeds import seed32
from sparksgd.engines.replies import Evaluation
from sparksgd.errors import NotFinite, UserCodeError
from sparksgd.models.losses import cross_entropy

# Gradients


def test_the_gradient_of_three_rows_is_the_one_that_a_person_works_out(tmp_path: Path) -> None:
    # loss (wx - y)^2 at w = 0: 9, 36, 0; gradient 2 (wx - y) x: -6, -12, 0
    sum_ = the_sum(Job(tmp_path, slope(), [ROWS]).gradients())
    assert (sum_.vectors["gradient"].tolist(), sum_.loss, sum_.rows, sum_.shards) == ([-18.0], 45.0, 3, 1)


class InFloat16(nn.Module):
    """y = w x, in float16."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = slope(1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.float16):
            return self.inner(x).float()


def test_the_gradient_of_many_rows_does_not_overflow_in_float16(tmp_path: Path) -> None:
    # 4,096 times 2 (1 * 1 + 15) 1 is beyond 65,504, the greatest number of float16
    job = Job(tmp_path, InFloat16(), [[((1.0,), -15.0)] * 4096], rows_per_step=4096)
    assert isinstance(job.gradients().failure, NotFinite)
    job.plan = replace(job.plan, float16=True)
    assert the_sum(job.gradients()).vectors["gradient"].tolist() == [32.0 * 4096]
    (tmp_path / "few").mkdir()
    few = Job(tmp_path / "few", InFloat16(), [ROWS])
    plain = bits(the_sum(few.gradients()))
    few.plan = replace(few.plan, float16=True)
    assert bits(the_sum(few.gradients())) == plain


def test_shards_add_up_along_the_tree(tmp_path: Path) -> None:
    job = Job(tmp_path, slope(), [[row] for row in ROWS])
    assert list(job.gradients([0, 1]).partials) == [(0, 2)]
    assert list(job.gradients([1, 2]).partials) == [(1, 2), (2, 3)]
    answer = job.gradients([1, 2])
    answer += job.gradients([0])
    sum_ = the_sum(answer)
    assert (sum_.vectors["gradient"].tolist(), sum_.loss, sum_.rows, sum_.shards) == ([-18.0], 45.0, 3, 3)


def test_a_shard_without_a_row_in_the_step_takes_no_part(tmp_path: Path) -> None:
    job = Job(tmp_path, slope(), [[], ROWS, []])
    answer = job.gradients()
    assert (the_sum(answer).shards, the_sum(answer).rows) == (1, 3)
    assert job.gradients([0]).partials == {(0, 1): None}
    assert [timing.rows for timing in answer.workers] == [3]


def test_the_rows_of_a_step_are_those_of_the_sampling(tmp_path: Path) -> None:
    # Each row's gradient at w = 0 is -2 y: the labels are powers of two, so the sum names the rows.
    job = Job(tmp_path, slope(), [[((1.0,), float(2**row)) for row in range(8)]], rows_per_step=3, seed=5)
    order = job.plan.sampling.shuffled(0, 1)
    for step in (3, 4, 5):  # the second epoch
        start, end = job.plan.sampling.piece_bounds(0, step)
        expected = -2.0 * sum(2 ** int(row) for row in order[start:end])
        assert the_sum(job.gradients(step=step)).vectors["gradient"].tolist() == [expected]


def test_gradients_are_taken_at_the_weights_that_came(tmp_path: Path) -> None:
    job = Job(tmp_path, slope(5.0), [ROWS])
    job.weights = replace(job.weights, parameters=np.array([0.0], np.float32), version=7)
    assert the_sum(job.gradients()).vectors["gradient"].tolist() == [-18.0]


class Area(nn.Module):
    """y = w (a sum(b)): its arguments are named as the columns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, *, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return self.weight * a * b.sum(1)


def test_several_features_reach_the_module_by_their_names(tmp_path: Path) -> None:
    # output 2 (3 + 4) = 14, label 10: loss 16, gradient 2 x 4 x 14
    sum_ = the_sum(Job(tmp_path, Area(), [[(2.0, (3.0, 4.0), 10.0)]]).gradients())
    assert (sum_.loss, sum_.vectors["gradient"].tolist()) == (16.0, [112.0])


class Watched(nn.Module):
    """Logs what it sees as it runs: anything else that it kept would be refused."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = slope()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logging.getLogger("watched").info("rows %d", len(x))
        logging.getLogger("watched").info("threads %d", torch.get_num_threads())
        return self.inner(x)


def logged(caplog: pytest.LogCaptureFixture, word: str) -> list[int]:
    found = [line.split() for line in caplog.messages]
    caplog.clear()
    return [int(number) for name, number in found if name == word]


def test_a_piece_is_cut_into_backward_passes_of_so_many_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "watched")
    rows = [((float(row),), 1.0) for row in range(5)]
    whole = the_sum(Job(tmp_path, Watched(), [rows]).gradients())
    assert logged(caplog, "rows") == [5]
    in_chunks = the_sum(Job(tmp_path, Watched(), [rows], rows_per_backward=2).gradients())
    assert logged(caplog, "rows") == [2, 2, 1]
    assert (in_chunks.vectors["gradient"].tolist(), in_chunks.loss, in_chunks.rows) == ([-20.0], 5.0, 5)
    assert (whole.vectors["gradient"].tolist(), whole.loss, whole.rows) == ([-20.0], 5.0, 5)


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_runs_as_many_threads_as_planned_and_then_as_many_as_before(
    tmp_path: Path, threads: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "watched")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        job = Job(tmp_path, Watched(), [ROWS], threads=threads)
        job.gradients()
        job.evaluation()
        assert logged(caplog, "threads") == [threads, threads]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


class Convolved(nn.Module):
    """Two convolutions of 4 x 4 images of one channel, and what a user may do with what they make."""

    def __init__(self, *, views: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Conv2d(3, 2, 2))
        self.views = views

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        made = self.layers(image.view(-1, 1, 4, 4))
        return (made.view(-1, 8) if self.views else made.flatten(1)).sum(1)


@pytest.mark.parametrize("views", [True, False])
def test_convolutions_are_computed_channels_last_where_the_module_takes_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, views: bool
) -> None:
    image = tuple(number / 16 for number in range(16))
    job = Job(tmp_path, Convolved(views=views), [[(image, 1.0)] * 3])
    with caplog.at_level(logging.INFO, "sparksgd"):
        assert job.tried() == ((4,), not views)
    assert ("computed channels first" in caplog.text) == views
    plain = the_sum(job.gradients())
    job.plan = replace(job.plan, channels_last=not views)
    again = the_sum(job.gradients())
    np.testing.assert_allclose(again.vectors["gradient"], plain.vectors["gradient"], rtol=1e-4)
    assert job.evaluation().rows == 3


# Randomness


def test_dropout_is_drawn_from_seed_shard_and_step(tmp_path: Path) -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (F.dropout(x, 0.5) * self.weight).sum(1)

    def minus_one(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return -output  # so the gradient is minus the mask

    ones = [((1.0,) * 16, 0.0)] * 2
    seen = set()
    for seed in (0, 1):
        job = Job(tmp_path, Dropped(), [ones, ones], loss=minus_one, rows_per_step=2, seed=seed)
        for shard in (0, 1):
            for step in (0, 1):
                sum_ = job.gradients([shard], step).partials[(shard, shard + 1)]
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed32(seed, "dropout", shard, step))
                    mask = F.dropout(torch.ones(1, 16), 0.5)[0]
                assert sum_.vectors["gradient"].tolist() == (-mask).tolist()
                seen.add(bits(sum_))
    assert len(seen) == 8


def test_a_piece_does_not_depend_on_what_was_computed_before_it(tmp_path: Path) -> None:
    job = noisy_job(tmp_path)
    alone = job.gradients([1], step=2).partials[(1, 2)]
    busy = job.computer()
    for step, shards in [(0, [0, 1, 2]), (5, [2]), (2, [0])]:
        busy.round(0, [job.table[shard] for shard in shards], job.answer(step))
    busy.evaluations(0, job.table, job.weights)
    torch.manual_seed(99)
    torch.rand(7)
    after_all_that = busy.round(0, [job.table[1]], job.answer(2)).partials[(1, 2)]
    assert bits(after_all_that) == bits(alone)
    in_company = busy.round(0, [job.table[2], job.table[1]], job.answer(2)).partials
    assert list(in_company) == [(2, 3), (1, 2)]
    assert bits(in_company[(1, 2)]) == bits(alone)


def test_torch_s_own_generator_is_left_as_it_was(tmp_path: Path) -> None:
    def refuse(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        torch.rand(1)
        raise RuntimeError

    torch.manual_seed(1)
    state = torch.get_rng_state()
    job = noisy_job(tmp_path)
    job.gradients()
    job.tried()
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(noisy_job(tmp_path, loss=refuse).gradients().failure, UserCodeError)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_plan_s_own_module_is_left_as_it_was(tmp_path: Path) -> None:
    job = noisy_job(tmp_path)
    before = copy.deepcopy(job.plan.module.state_dict())
    job.gradients()
    job.evaluation()
    job.tried()
    assert all(torch.equal(before[name], value) for name, value in job.plan.module.state_dict().items())
    assert job.plan.module.weight.grad is None


# Evaluation


class Logits(nn.Module):
    """The features are the logits, scaled by a weight of one; in training it answers nonsense."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale * (float("nan") if self.training else 1)


def test_an_evaluation_counts_hits_and_sums_the_loss(tmp_path: Path) -> None:
    rows = [((0.0, 0.0, 5.0), 2), ((9.0, 0.0, 0.0), 1), ((0.0, 1.0, 0.0), 1)]
    total = Job(tmp_path, Logits(), [rows[:1], [], rows[1:]], loss=cross_entropy).evaluation()
    losses = [np.log(np.exp(x).sum()) - x[label] for x, label in rows]
    assert (total.correct, total.rows) == (2, 3)
    assert total.loss == pytest.approx(sum(losses), rel=1e-6)


def test_an_evaluation_reads_every_row_of_a_long_shard(tmp_path: Path) -> None:
    rows = [((1.0,), float(row % 7)) for row in range(1300)]
    total = Job(tmp_path, slope(), [rows]).evaluation()
    assert total == Evaluation(
        loss=float(sum((row % 7) ** 2 for row in range(1300))), correct=None, rows=1300
    )
