"""What a worker computes: gradient sums of pieces, and evaluations of shards.

The only caller of `backward()`.  Everything here is a function of the weights, the step and the
rows; which worker computes a shard, in which process, makes no difference.

Legend: B rows of a piece, P parameters, S shards, C classes.
"""

from __future__ import annotations

import copy
import logging
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sparksgd.errors import ModelError, NotFinite, ShardMissing, SparkSGDError, UserCodeError
from sparksgd.flat import FlatModule, TakePart, Weights, has_convolutions
from sparksgd.losses import Loss
from sparksgd.numerics import Numerics, generator_kept, thread_count
from sparksgd.rows import RowSchema
from sparksgd.sampling import Sampling
from sparksgd.seeds import seed32
from sparksgd.shard import Descriptor, read_records
from sparksgd.solvers.protocol import GradientSum, WorkerHalf
from sparksgd.treesum import Addable, Partials, add_partial, merge_partials
from sparksgd.users_code import users_code

__all__ = [
    "EVALUATION_ROWS",
    "Answer",
    "Computer",
    "Evaluation",
    "Plan",
    "WorkerReport",
    "forward",
    "located",
    "predictions",
    "try_out",
    "worse",
]

log = logging.getLogger("sparksgd")

EVALUATION_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every worker must know, the same for the whole run."""

    module: nn.Module
    """As it was before training; weights come with each step."""

    loss: Loss
    """One value per row."""

    schema: RowSchema
    """What a record is."""

    sampling: Sampling
    """Which rows take part in which step."""

    worker_half: WorkerHalf
    """What the solver does beside the gradients."""

    threads: int
    """Threads of torch."""

    rows_per_backward: int | None = None
    """Rows of one backward pass; None takes a piece at once."""

    dtype: torch.dtype = torch.float32
    """Type of the parameters; tests use float64."""

    channels_last: bool = False
    """Whether 2-d convolutions are computed so: faster, if the module's forward takes what they make."""

    deal: int = 0
    """How often the rows were dealt anew."""

    before_gradients: Callable[[int, int], None] | None = None
    """Called with worker and step, from 0, before a worker computes: makes stragglers for tests and
    benchmarks."""


@dataclass(kw_only=True)
class Evaluation:
    """Sums over rows in evaluation mode."""

    loss: float
    """Sum of the loss."""

    correct: int | None
    """Rows whose greatest output is that of their label; None where there are no classes."""

    rows: int
    """How many rows."""

    def __iadd__(self, other: Self) -> Self:
        self.loss += other.loss
        if self.correct is not None and other.correct is not None:
            self.correct += other.correct
        self.rows += other.rows
        return self


@dataclass(frozen=True, kw_only=True)
class WorkerReport:
    """Who worked, and when, by its own host's clock."""

    worker: int
    host: str
    rows: int
    started_at_s: float
    ended_at_s: float

    numerics: Numerics
    """Its arithmetic: an executor that takes another's place may have another."""

    @property
    def compute_s(self) -> float:
        """Seconds of work."""
        return self.ended_at_s - self.started_at_s


@dataclass(kw_only=True)
class Answer:
    """What workers answer to one request, and what answers add up to on their way to the driver."""

    leaves: int
    """S, the leaves of the addition tree."""

    partials: Partials = field(default_factory=dict)
    """Sums by node of the tree."""

    workers: list[WorkerReport] = field(default_factory=list)
    """Who took part."""

    shards: list[int] = field(default_factory=list)
    """Which shards were asked, and are in the sums."""

    failure: SparkSGDError | None = None
    """What went wrong, as a value: how Spark treats a raising task depends on the partitions."""

    def __iadd__(self, other: Self) -> Self:
        self.workers += other.workers
        self.shards += other.shards
        if self.failure is None or other.failure is None:
            self.failure = self.failure or other.failure
        else:
            self.failure = worse(self.failure, other.failure)
        if self.failure is not None:
            self.partials = {}
        else:
            merge_partials(self.partials, other.partials, self.leaves)
        return self

    def total(self) -> Addable:
        """Return the sum over all shards."""
        total = self.partials[(0, self.leaves)]
        assert total is not None, "a step without a row"
        return total


def worse(one: SparkSGDError, other: SparkSGDError) -> SparkSGDError:
    """Return which of two failures to tell: missing shards can be mended, and are told together."""
    if isinstance(one, ShardMissing):
        return one + other if isinstance(other, ShardMissing) else other
    return one


class Computer:
    """Computes gradient sums of pieces; made once per process and run.

    Args:
        plan: what to compute; its module is copied.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.flat = FlatModule(copy.deepcopy(plan.module), plan.dtype)
        self.numerics = Numerics.here(plan.threads)
        self._orders: dict[int, tuple[int, npt.NDArray[np.uint32]]] = {}

    def gradients(
        self,
        worker: int,
        shards: Iterable[Descriptor],
        weights: Weights | None,
        step: int,
        asked: frozenset[int] | None = None,
        take_part: TakePart | None = None,
    ) -> Answer:
        """Answer a step: the gradient sums of these shards' pieces, as partial sums of the tree.

        Args:
            worker: who is asked, for reports.
            shards: its shards.
            weights: the weights to compute at; None takes those that `flat` holds.
            step: which step, from 0.
            asked: those of all shards that take part; None: all of them.
            take_part: told of each part of the gradient as soon as it is there; for one shard, whose piece
                is one backward pass.
        """
        if weights is None:
            statistics, counters = self.flat.statistics(), self.flat.counters()
        else:
            statistics, counters = weights.statistics, weights.counters

        def gradient(shard: Descriptor) -> GradientSum | None:
            self.flat.load_buffers(statistics, counters)  # each piece starts from the same ones
            fresh = self._piece(shard, step, take_part)
            return None if fresh is None else self.plan.worker_half.outgoing(fresh)

        if self.plan.before_gradients is not None:
            self.plan.before_gradients(worker, step)
        with generator_kept():
            return self._answer(worker, shards, weights, gradient, f"step {step + 1}", asked)

    def evaluations(self, worker: int, shards: Iterable[Descriptor], weights: Weights) -> Answer:
        """Answer an evaluation: sums over all rows of these shards."""

        def evaluation(shard: Descriptor) -> Evaluation | None:
            with self.flat.evaluating():
                return self._whole(shard)

        return self._answer(
            worker, shards, weights, evaluation, f"the evaluation of version {weights.version}"
        )

    def _answer(
        self,
        worker: int,
        shards: Iterable[Descriptor],
        weights: Weights | None,
        compute: Any,
        doing: str,
        asked: frozenset[int] | None = None,
    ) -> Answer:
        started = time.time()
        answer = Answer(leaves=len(self.plan.sampling.shard_rows))
        rows = 0
        remaining = iter(shards)
        try:
            with thread_count(self.plan.threads), ExitStack() as layout:
                if weights is not None:
                    self.flat.load(weights)
                if self.plan.channels_last:
                    layout.enter_context(self.flat.channels_last())
                for shard in remaining:
                    result = None
                    if asked is None or shard.shard in asked:
                        result = compute(shard)
                        answer.shards.append(shard.shard)
                    rows += 0 if result is None else result.rows
                    node = (shard.shard, shard.shard + 1)
                    add_partial(answer.partials, node, result, answer.leaves)
        except SparkSGDError as error:
            answer.failure = located(error, worker, doing)
            list(remaining)  # Spark keeps a Python worker only if its input was drained
        answer.workers.append(
            WorkerReport(
                worker=worker,
                host=socket.gethostname(),
                rows=rows,
                started_at_s=started,
                ended_at_s=time.time(),
                numerics=self.numerics,
            )
        )
        return answer

    def _piece(self, shard: Descriptor, step: int, take_part: TakePart | None) -> GradientSum | None:
        """Return the gradient sum of a shard's piece; None where the step has no row of it."""
        start, end = self.plan.sampling.piece_bounds(shard.shard, step)
        if start == end:
            return None
        rows = np.sort(self._order(shard.shard, self.plan.sampling.epoch_of(step))[start:end])
        records = read_records(shard, rows, self.plan.schema.record)
        seed = seed32(self.plan.sampling.seed, "dropout", shard.shard, step)
        torch.default_generator.manual_seed(seed)
        chunk = self.plan.rows_per_backward or len(records)
        loss = 0.0
        with self.flat.new_gradient(take_part) as gradient:
            for first in range(0, len(records), chunk):
                _, losses = forward(
                    self.flat.module, self.plan.loss, self.plan.schema, records[first : first + chunk]
                )
                total = losses.sum()
                self._require_finite(losses, rows[first : first + chunk], shard, step)
                with users_code("the module or its loss"):
                    total.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                loss += float(total.detach())
        if not np.isfinite(gradient.sum()) and not np.isfinite(gradient).all():
            raise NotFinite(
                f"the gradient of step {step + 1} is NaN or infinite in shard {shard.shard}, rows "
                f"{_listed(rows)}, though the loss is {loss:g}"
            )
        statistics = self.flat.statistics()
        return GradientSum(
            gradient=gradient,
            statistics=statistics * np.asarray(len(records), statistics.dtype),
            counters=self.flat.counters(),
            loss=loss,
            rows=len(records),
        )

    def _whole(self, shard: Descriptor) -> Evaluation | None:
        """Return the sums over a shard's rows, in evaluation mode; None where it is empty."""
        total = None
        for first in range(0, shard.rows, EVALUATION_ROWS):
            rows = range(first, min(first + EVALUATION_ROWS, shard.rows))
            records = read_records(shard, rows, self.plan.schema.record)
            output, losses = self._forward(records)
            label = torch.from_numpy(self.plan.schema.label_array(records).copy())
            classifies = self.plan.schema.classes is not None
            hits = (predictions(output) == label).sum() if classifies else None
            part = Evaluation(
                loss=float(losses.double().sum()),
                correct=None if hits is None else int(hits),
                rows=len(records),
            )
            if total is None:
                total = part
            else:
                total += part
        return total

    def _forward(self, records: npt.NDArray[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return forward(self.flat.module, self.plan.loss, self.plan.schema, records)

    def _order(self, shard: int, epoch: int) -> npt.NDArray[np.uint32]:
        """Return the shard's row numbers as shuffled for an epoch; kept until the next one."""
        known = self._orders.get(shard)
        if known is None or known[0] != epoch:
            self._orders = {s: order for s, order in self._orders.items() if order[0] == epoch}
            known = self._orders[shard] = epoch, self.plan.sampling.shuffled(shard, epoch)
        return known[1]

    def _require_finite(
        self, losses: torch.Tensor, rows: npt.NDArray[np.uint32], shard: Descriptor, step: int
    ) -> None:
        bad = ~torch.isfinite(losses.detach()).numpy()
        if bad.any():
            raise NotFinite(
                f"the loss of step {step + 1} is {float(losses.detach()[bad][0])} in shard "
                f"{shard.shard}, rows {_listed(rows[bad])}"
            )


def forward(
    module: nn.Module, loss: Loss, schema: RowSchema, records: npt.NDArray[Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a module and its loss over records.

    Returns:
        The module's output, and the loss of each row, float[B].

    Raises:
        UserCodeError: the module or the loss raised.
        ModelError: the loss is not one value per row.
    """
    features = {name: _tensor(values) for name, values in schema.feature_arrays(records).items()}
    label = _tensor(schema.label_array(records))
    with users_code("the module or its loss"):
        output = module(*features.values()) if len(features) == 1 else module(**features)
        losses = loss(output, label)
    if not isinstance(losses, torch.Tensor) or losses.shape != (len(records),):
        shape = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
        raise ModelError(
            f"the loss gave {shape} for {len(records)} rows, but must give one value per row, "
            f"({len(records)},): use reduction='none'"
        )
    if losses.device.type != "cpu":
        raise ModelError(
            f"the loss is on {losses.device}, but only the CPU is supported: let forward move nothing"
        )
    return output, losses


def predictions(output: torch.Tensor) -> torch.Tensor:
    """Return the classes, int64[B], of logits float[B, C], or of one logit per row, [B] or [B, 1]."""
    if output.ndim == 2 and output.shape[1] > 1:
        return output.argmax(1)
    return (output.reshape(len(output)) > 0).long()


def try_out(
    module: nn.Module, loss: Loss, schema: RowSchema, records: npt.NDArray[Any], dtype: torch.dtype
) -> tuple[torch.Size, bool]:
    """Take a gradient of a few rows, and refuse a module or loss that cannot be trained.

    Args:
        module: left as it is; a copy is tried.
        loss: one value per row.
        schema: what a record is.
        records: some rows, [B].
        dtype: what the parameters must be.

    Returns:
        The shape of the output, and whether the module can be computed channels last.
    """
    if has_convolutions(module):
        try:
            return _trial(module, loss, schema, records, dtype, channels_last=True), True
        except UserCodeError as error:
            # What is wrong in itself raises here again.
            as_it_is = _trial(module, loss, schema, records, dtype, channels_last=False)
            log.info(
                "convolutions are computed channels first, which takes longer: channels last, the module or "
                "its loss raised: %s", str(error).strip().splitlines()[-1].strip(),
            )  # fmt: skip
            return as_it_is, False
    return _trial(module, loss, schema, records, dtype, channels_last=False), False


def _trial(
    module: nn.Module, loss: Loss, schema: RowSchema, records: npt.NDArray[Any], dtype: torch.dtype,
    *, channels_last: bool,
) -> torch.Size:  # fmt: skip
    """Take a gradient of a few rows, and return the shape of the output."""
    records = np.resize(records, max(2, len(records)))  # batch-norm wants two rows
    flat = FlatModule(copy.deepcopy(module), dtype)
    before = {name: tensor.detach().numpy().tobytes() for name, tensor in flat.constants()}
    with generator_kept(), flat.channels_last() if channels_last else nullcontext():
        output, losses = forward(flat.module, loss, schema, records)
        with users_code("the module or its loss"):
            losses.sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    for name, tensor in flat.constants():
        if before.get(name) != tensor.detach().numpy().tobytes():
            raise ModelError(
                f"{name} changes as the module trains, and only batch-norm's buffers may: its value would "
                f"depend on which worker ran last. Keep it fixed, or make it a trainable parameter"
            )
    if not isinstance(output, torch.Tensor):
        raise ModelError(f"the module gives a {type(output).__name__}, but must give one tensor")
    return output.shape


def _tensor(values: npt.NDArray[Any]) -> torch.Tensor:
    """Copy an array into torch's own memory: its alignment is part of what decides the bits."""
    tensor = torch.empty(values.shape, dtype=getattr(torch, values.dtype.name))
    tensor.numpy()[...] = values
    return tensor


def _listed(rows: npt.NDArray[np.integer]) -> str:
    shown = ", ".join(map(str, rows[:8]))
    return shown if len(rows) <= 8 else f"{shown} and {len(rows) - 8} more"


def located(error: SparkSGDError, worker: int, doing: str) -> SparkSGDError:
    """Return an error that says where it was, too."""
    if isinstance(error, ShardMissing):
        return error
    return type(error)(f"{error}\n  in {doing}, on worker {worker} at {socket.gethostname()}")
