"""What a worker computes: its shards' turns of a round, and evaluations of shards.

Results depend only on the round's answer, the turn and the rows, and never on the worker or the process that
computes a shard.

Legend: P parameters.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sparksgd.arithmetic.addition_tree import add_partial
from sparksgd.arithmetic.changes import unite
from sparksgd.arithmetic.copies import copied
from sparksgd.arithmetic.flat import FlatModule, TakePart, Weights
from sparksgd.arithmetic.generators import generators_kept, seed_generators
from sparksgd.arithmetic.numerics import Numerics, thread_count
from sparksgd.arithmetic.scripted import as_written, forget_optimised
from sparksgd.arithmetic.seeds import seed32
from sparksgd.arithmetic.settings import HeldSettings, Settings
from sparksgd.data.sampling import Sampling
from sparksgd.data.schema import RowSchema
from sparksgd.data.shard import Descriptor, read_records
from sparksgd.engines.forward import (
    back_propagate,
    evaluated_parts,
    forward,
    gradient_shift,
    predicted_labels,
    weighted,
)
from sparksgd.engines.modes import evaluating
from sparksgd.engines.replies import Evaluation, Reply, WorkerReport, with_place
from sparksgd.engines.watch import Watch
from sparksgd.errors import (
    NotFinite,
    SparkSGDError,
    UpdateNotFinite,
)
from sparksgd.imports import out_of_memory_told
from sparksgd.models.losses import Loss
from sparksgd.models.metrics import metric_sums, weight_of_hits
from sparksgd.solvers.protocol import Answer, Gradient, Halves, Message, Vector, WorkerHalf
from sparksgd.solvers.protocol import Settings as RateSettings

__all__ = ["Computer", "Plan"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every worker must know; it is the same for the whole run."""

    module: nn.Module
    """The module before training; weights are sent with each step."""

    loss: Loss
    """One value per row."""

    schema: RowSchema
    """The schema of a record."""

    sampling: Sampling
    """Which rows take part in which turn."""

    halves: Halves
    """The worker halves of the solver."""

    threads: int
    """How many threads torch uses."""

    rows_per_backward: int | None = None
    """Rows of one backward pass; None: a whole piece."""

    dtype: torch.dtype = torch.float32
    """Type of the parameters; tests also use float64."""

    channels_last: bool = False
    """Whether 2-d convolutions are computed channels last: faster, but not every module can use their
    output."""

    float16: bool = False
    """Whether the module computes in float16, where the gradient of a sum of many rows overflows."""

    deal: int = 0
    """How often the rows were dealt again."""

    settings: Settings | None = None
    """The driver's settings of torch and numpy, which all workers take; None: each keeps its own."""

    metrics: tuple[str, ...] = ()
    """What evaluations tell beside the loss and the accuracy, see `models.metrics`."""

    harmless: frozenset[str] = frozenset()
    """Paths of attributes that a piece writes, but never reads from an earlier one."""

    before_gradients: Callable[[int, int], None] | None = None
    """Called with a worker and a round's first turn (from 0) before the worker computes; tests and benchmarks
    make stragglers by it."""


class Computer:
    """Computes what a worker is asked for; there is one in each process of a run.

    Args:
        plan: what to compute; its module and its loss are copied.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        module, self.loss = copied((plan.module, plan.loss), {"": plan.module, "loss": plan.loss})
        self.flat = FlatModule(module, plan.dtype)
        self._watch = Watch(module, self.loss, plan.harmless)
        forget_optimised(self._watch.scripted)
        self._settings = HeldSettings(plan.settings)
        self.numerics = Numerics.here(plan.threads)
        self._orders: dict[int, tuple[int, npt.NDArray[np.uint32]]] = {}
        self.halves: dict[int, WorkerHalf[Answer]] = {}
        """The worker halves that were made, by their shards; one for all where they keep no state."""

        self._around_a_reply: Callable[[], AbstractContextManager[object]] = self._as_the_driver

    @contextmanager
    def many_rounds(self) -> Iterator[None]:
        """Let the process be as the driver is once for all rounds in the block, and for what is done between.

        No other thread of the process can compute meanwhile: see `generators_kept`.
        """
        with self._as_the_driver():
            self._around_a_reply = nullcontext
            try:
                yield
            finally:
                self._around_a_reply = self._as_the_driver

    @contextmanager
    def _as_the_driver(self) -> Iterator[None]:
        """In the block, let this process compute as the driver does; then let all be as before."""
        with thread_count(self.plan.threads), generators_kept(), self._settings, as_written():
            yield

    def round(
        self,
        worker: int,
        shards: Iterable[Descriptor],
        answer: Answer,
        asked: frozenset[int] | None = None,
        take_part: TakePart | None = None,
    ) -> Reply:
        """Make the turns of a round for these shards; reply with partial sums of their messages.

        Args:
            worker: its number, for reports.
            shards: its shards.
            answer: what the round begins with.
            asked: the shards that take part; None: all.
            take_part: called for each part of the gradient as soon as it is computed; only for one shard
                with a single backward pass.
        """
        if self.plan.before_gradients is not None:
            self.plan.before_gradients(worker, answer.turn)

        def compute(shard: Descriptor) -> tuple[Message | None, bool]:
            message = self._turns(shard, answer, standing, take_part)
            if message is not None:
                return message, True
            turns = range(answer.turn, answer.turn + answer.turns)
            return None, not self.plan.sampling.rows_of_round(turns, [shard.shard])

        def is_asked(shard: int) -> bool:
            return asked is None or shard in asked

        with ExitStack() as layout:
            standing = _Standing(self.flat, layout, self.plan)
            return self._reply(worker, shards, compute, is_asked, _turns_named(answer.turn, answer.turns))

    def turn(
        self, shard: Descriptor, turn: int, half: WorkerHalf[Any], answer: Answer, worker: int = 0
    ) -> Gradient | None:
        """Let a shard make one turn; return its gradient, or None if the piece had no rows.

        Args:
            shard: the shard.
            turn: which of its turns.
            half: of the shard; it has taken the answer.
            answer: what the centre answered last.
            worker: its number, for errors.

        Raises:
            SparkSGDError: as `round` replies.
        """
        with ExitStack() as stack:
            stack.enter_context(out_of_memory_told("a worker's Python"))
            stack.enter_context(self._around_a_reply())
            standing = _Standing(self.flat, stack.enter_context(ExitStack()), self.plan)
            self.flat.load_buffers(answer.weights.statistics, answer.weights.counters)
            self.flat.load_constants(answer.weights.constants)
            settings, is_own = (
                answer.settings[0] if answer.settings else {},
                self.plan.halves.have_local_models,
            )
            try:
                return self._turn(shard, turn, half, settings, standing, has_moved=is_own)
            except SparkSGDError as error:
                raise with_place(error, worker, f"turn {turn + 1} of shard {shard.shard}") from error

    def evaluations(self, worker: int, shards: Iterable[Descriptor], weights: Weights) -> Reply:
        """Reply to an evaluation: sums over all rows of these shards."""

        def compute(shard: Descriptor) -> tuple[Evaluation | None, bool]:
            seed = seed32(self.plan.sampling.seed, "evaluation", shard.shard, weights.version)
            seed_generators(seed)
            with self._settings.blamed("the module or its loss, in evaluation,"), evaluating(self.flat):
                evaluation = self._whole(shard)
            self._watch.restore()
            return evaluation, True

        doing = f"the evaluation of version {weights.version}"
        with ExitStack() as layout:
            self.flat.load(weights)
            self.flat.standing.at(weights.parameters)
            if self.plan.channels_last:
                layout.enter_context(self.flat.channels_last())
            return self._reply(worker, shards, compute, lambda shard: True, doing)

    def _reply(
        self,
        worker: int,
        shards: Iterable[Descriptor],
        compute: Callable[[Descriptor], tuple[Message | Evaluation | None, bool]],
        is_asked: Callable[[int], bool],
        doing: str,
    ) -> Reply:
        started = time.time()
        reply = Reply(leaves=len(self.plan.sampling.shard_rows))
        rows = 0
        remaining = iter(shards)
        try:
            with out_of_memory_told("a worker's Python"), self._around_a_reply():
                for shard in remaining:
                    result, takes_part = None, False
                    if is_asked(shard.shard):
                        result, takes_part = compute(shard)
                    if takes_part:
                        reply.shards.append(shard.shard)
                    rows += 0 if result is None else result.rows
                    node = (shard.shard, shard.shard + 1)
                    add_partial(reply.partials, node, result, reply.leaves)
        except SparkSGDError as error:
            reply.failure = with_place(error, worker, doing)
            list(remaining)  # Spark keeps a Python worker only if its input was drained
        reply.workers.append(
            WorkerReport(
                worker=worker,
                host=socket.gethostname(),
                rows=rows,
                started_at_s=started,
                ended_at_s=time.time(),
                numerics=self.numerics,
            )
        )
        return reply

    def _turns(
        self, shard: Descriptor, answer: Answer, standing: _Standing, take_part: TakePart | None
    ) -> Message | None:
        """Return the message of a shard after its turns of a round; None if these had no row."""
        half = self.half(shard.shard)
        half.take(answer)
        # Each shard starts from the same ones.
        self.flat.load_buffers(answer.weights.statistics, answer.weights.counters)
        self.flat.load_constants(answer.weights.constants)
        has_moved = False
        for index in range(answer.turns):
            turn = answer.turn + index
            settings = answer.settings[index] if answer.settings else {}
            gradient = self._turn(shard, turn, half, settings, standing, take_part, has_moved=has_moved)
            if gradient is None:
                continue
            has_moved = True
            if gradient.changes is not None and index + 1 < answer.turns:
                self.flat.standing.apply_constants(gradient.changes)
        return half.send()

    def _turn(
        self,
        shard: Descriptor,
        turn: int,
        half: WorkerHalf[Any],
        settings: RateSettings,
        standing: _Standing,
        take_part: TakePart | None = None,
        *,
        has_moved: bool,
    ) -> Gradient | None:
        """Give a half the gradient of a piece, and return it; None if the piece is empty.

        Args:
            has_moved: whether the half has left the weights that it was given, which may be good although
                this gradient is not finite.
        """
        standing.move_to(half.point())
        try:
            gradient = self._piece(shard, turn, take_part)
        except NotFinite as error:
            if has_moved:
                raise UpdateNotFinite(str(error)) from error
            raise
        if gradient is not None:
            try:
                half.turn(gradient, settings)
            except UpdateNotFinite as error:
                raise UpdateNotFinite(f"turn {turn + 1} of shard {shard.shard}: {error}") from error
        return gradient

    def half(self, shard: int) -> WorkerHalf[Answer]:
        """Return the worker half of a shard; where halves keep no state, one serves all shards in turn."""
        key = shard if self.plan.halves.keep_state else 0
        if key not in self.halves:
            self.halves[key] = self.plan.halves.make(self.flat, shard)
        return self.halves[key]

    def _piece(self, shard: Descriptor, turn: int, take_part: TakePart | None) -> Gradient | None:
        """Return the gradient of a shard's piece; None if the piece is empty."""
        start, end = self.plan.sampling.piece_bounds(shard.shard, turn)
        if start == end:
            return None
        rows = np.sort(self._order(shard.shard, self.plan.sampling.epoch_of(turn))[start:end])
        records = read_records(shard, rows, self.plan.schema.record)
        seed = seed32(self.plan.sampling.seed, "dropout", shard.shard, turn)
        seed_generators(seed)
        chunk = self.plan.rows_per_backward or len(records)
        loss, changes = 0.0, None
        weights = self.plan.schema.weight_array(records)
        weight = None if weights is None else _total(weights)
        shift = 0
        if self.plan.float16:
            each = np.ones(len(records)) if weights is None else weights
            firsts = range(0, len(records), chunk)
            shift = gradient_shift(max(_total(each[first : first + chunk]) for first in firsts))
        with (
            self._settings.blamed("the module or its loss"),
            self.flat.new_gradient(take_part, shift) as gradient,
        ):
            for first in range(0, len(records), chunk):
                with self.flat.standing.piece() as made:
                    part = records[first : first + chunk]
                    _, losses = self._forward(part)
                    self._require_finite(losses, rows[first : first + chunk], shard, turn)
                    loss += back_propagate(weighted(losses, self.plan.schema, part), 2.0**-shift)
                changes = unite(changes, made.changes)
        self._watch.require_unchanged()
        total = torch.from_numpy(gradient).sum()  # a third of numpy's time
        if not math.isfinite(total) and not np.isfinite(gradient).all():
            raise NotFinite(
                f"the gradient of turn {turn + 1} is NaN or infinite in shard {shard.shard}, rows "
                f"{_listed(rows)}, though the loss is {loss:g}"
            )
        return Gradient(
            vector=gradient,
            statistics=self.flat.statistics(),
            counters=self.flat.counters(),
            loss=loss,
            rows=len(records),
            weight=weight,
            touched=self.flat.touched,
            changes=changes,
            shard=shard.shard,
            turn=turn,
        )

    def _whole(self, shard: Descriptor) -> Evaluation | None:
        """Return the sums over a shard's rows, in evaluation mode; None if the shard is empty."""
        total = None
        for rows in evaluated_parts(shard.rows, self.flat.module):
            records = read_records(shard, rows, self.plan.schema.record)
            output, losses = self._forward(records)
            label = torch.from_numpy(self.plan.schema.label_array(records).copy())
            predicted = predicted_labels(self.plan.schema, output)
            weights = self.plan.schema.weight_array(records)
            part = Evaluation(
                loss=float(weighted(losses.double(), self.plan.schema, records).sum()),
                correct=None if predicted is None else weight_of_hits(predicted, label, weights),
                rows=len(records),
                weight=None if weights is None else _total(weights),
                sums=metric_sums(
                    self.plan.metrics, output, label, predicted, weights, self.plan.schema.classes
                ),
            )
            if total is None:
                total = part
            else:
                total += part
        return total

    def _forward(self, records: npt.NDArray[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return forward(self.flat.module, self.loss, self.plan.schema, records)

    def _order(self, shard: int, epoch: int) -> npt.NDArray[np.uint32]:
        """Return the shard's row numbers in the shuffled order of an epoch; cached for the epoch."""
        known = self._orders.get(shard)
        if known is None or known[0] != epoch:
            self._orders = {s: order for s, order in self._orders.items() if order[0] == epoch}
            known = self._orders[shard] = epoch, self.plan.sampling.shuffled(shard, epoch)
        return known[1]

    def _require_finite(
        self, losses: torch.Tensor, rows: npt.NDArray[np.uint32], shard: Descriptor, turn: int
    ) -> None:
        bad = ~np.isfinite(losses.detach().numpy())
        if bad.any():
            raise NotFinite(
                f"the loss of turn {turn + 1} is {float(losses.detach()[bad][0])} in shard "
                f"{shard.shard}, rows {_listed(rows[bad])}"
            )


class _Standing:
    """The parameters that the module has now; they change when a half points elsewhere.

    Args:
        flat: the module.
        layout: keeps the channels-last copies, and removes them at its end.
        plan: says whether to make such copies.
    """

    def __init__(self, flat: FlatModule, layout: ExitStack, plan: Plan) -> None:
        self._flat, self._layout, self._channels_last = flat, layout, plan.channels_last
        self._point: Vector | None = None

    def move_to(self, point: Vector) -> None:
        """Give the module the parameters of a point, float32[P]."""
        if point is self._point:
            return
        self._layout.close()
        self._flat.standing.at(point)
        self._point = point
        if self._channels_last:
            self._layout.enter_context(self._flat.channels_last())


def _total(values: npt.NDArray[Any]) -> float:
    return float(values.sum(dtype=np.float64))


def _turns_named(first: int, turns: int) -> str:
    """Return the name of a round for errors: its turns, from 1."""
    return f"turn {first + 1}" if turns == 1 else f"turns {first + 1} to {first + turns}"


def _listed(rows: npt.NDArray[np.integer]) -> str:
    shown = ", ".join(map(str, rows[:8]))
    return shown if len(rows) <= 8 else f"{shown} and {len(rows) - 8} more"
