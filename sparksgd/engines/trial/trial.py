"""The trial: some steps of a copy, before any row is dealt, that refuse what would go wrong in silence.

    at sight ── lazy shapes ── shared memory ── a few rows: do they mix? which layout? do gradients scale?
        ── steps with updates, an evaluation between them ── can the result be saved?

All of it runs on copies; the caller's own objects are left as they were, except for lazy modules, which get
their shapes.

Legend: B rows, P parameters, C classes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sparksgd.arithmetic.copies import copied
from sparksgd.arithmetic.flat import FlatModule, has_convolutions, mixes_rows, mixes_rows_of_evaluations
from sparksgd.arithmetic.generators import seed_generators
from sparksgd.arithmetic.numerics import thread_count
from sparksgd.arithmetic.seeds import seed32
from sparksgd.engines.forward import EVALUATION_ROWS, TRIAL_ROWS, forward
from sparksgd.engines.trial.hooks import hook_that_is_not_linear
from sparksgd.engines.trial.lasting_modes import refuse_lasting_modes
from sparksgd.engines.trial.later import STEPS_LATER, Later
from sparksgd.engines.trial.layouts import channels_last_differs, refuse_other_memory
from sparksgd.engines.trial.lazy import has_lazy_parts, take_shapes
from sparksgd.engines.trial.mixing import (
    FIRST_COMPARED,
    LAST_COMPARED,
    mixing,
    refuse_sums_of_rows,
    suspects,
)
from sparksgd.engines.trial.outside import Outside, refuse_later_moves
from sparksgd.engines.trial.ownership import Owned, left_alone, refuse_shared_memory
from sparksgd.engines.trial.pieces import Piece
from sparksgd.engines.trial.probe import MANY_ROWS, TRIED_ROWS, Probe
from sparksgd.engines.trial.rows import (
    CROSSED_ROWS,
    DIFFERENT_ROWS,
    FIRST_ROWS,
    crossed,
    distinct,
    labelled_0,
    varied,
)
from sparksgd.engines.trial.sight import refuse_at_sight, refuse_contexts, refuse_inference_tensors
from sparksgd.engines.trial.state_trial import harmless_state
from sparksgd.engines.trial.use import Found, Use
from sparksgd.errors import ModelError, UserCodeError
from sparksgd.models.losses import Loss
from sparksgd.models.outputs import Output
from sparksgd.solvers.schedules import make_schedule, own_schedule
from sparksgd.solvers.torch_optimizers import make_optimizer, own_optimizer, treats_sparse_alike

__all__ = ["Found", "Use", "try_out"]

log = logging.getLogger("sparksgd")

_STEPS = 4
_FEW_ROWS = 8
"""Of the other steps."""


def try_out(module: nn.Module, records: npt.NDArray[Any], use: Use) -> Found:
    """Try a module as it will be used, and refuse what cannot be trained, or would be wrong in silence.

    Args:
        module: only its lazy parts change.
        records: some rows, [B].
        use: how it will be used.

    Raises:
        ModelError: it cannot be trained; with the path of what is wrong, and the next move.
        UserCodeError: the module, the loss or the optimiser raised.
    """
    started = time.perf_counter()
    refuse_contexts()
    refuse_inference_tensors(module)
    copies = [_copied(module, use.loss) for _ in range(3)]  # first: it refuses what cannot be copied
    refuse_at_sight(module, use.loss, use.schema)
    few = distinct(records, use.schema)
    records = records.copy()
    if has_lazy_parts(module):
        (twin, _), *_ = copies
        shaped = take_shapes(module, twin, lambda: _output_of(twin, few, use), use.seed)
        log.info("lazy modules have their shapes from the first rows: %s", ", ".join(shaped))
        copies = [_copied(module, use.loss) for _ in range(3)]
    refuse_shared_memory(module, use.loss)
    with (
        _pairs_explained(),
        left_alone(module, use.loss) as changing,
        thread_count(use.threads),
    ):
        labelled = labelled_0(few, use.schema, classifies=use.classifies)
        harmless = harmless_state(module, use.loss, use.schema, labelled, use.dtype, copies[0])
        changing |= harmless
        trial = _Trial(module, copies, records, few, use, harmless)
        found = trial.run()
    log.info("trial: %s (%.2f s)", "; ".join(trial.remarks), time.perf_counter() - started)
    if trial.untouched:
        log.warning(
            "no gradient reached %s in the trial's %d steps: the optimiser skips a parameter until one does",
            ", ".join(trial.untouched), _STEPS,
        )  # fmt: skip
    return found


@contextmanager
def _pairs_explained() -> Iterator[None]:
    """Say what to do where pairs of numbers cannot be viewed as complex ones."""
    try:
        yield
    except UserCodeError as error:
        if "storage_offset divisible by 2" not in str(error):
            raise
        raise ModelError(
            "forward views a parameter as complex numbers, but all parameters are parts of one vector, and "
            "this one begins at an odd place of it: use torch.view_as_complex(parameter.clone()), which "
            "trains the same"
        ) from error


def _copied(module: nn.Module, loss: Loss) -> tuple[nn.Module, Loss]:
    return copied((module, loss), {"": module, "loss": loss})


class _Trial:
    """One trial.

    Args:
        module: the caller's; not changed.
        copies: three, of it and its loss; the last is dropped early.
        records: some rows.
        few: rows that differ, [DIFFERENT_ROWS].
        use: how the module will be used.
        harmless: see Plan.harmless.
    """

    def __init__(
        self,
        module: nn.Module,
        copies: list[tuple[nn.Module, Loss]],
        records: npt.NDArray[Any],
        few: npt.NDArray[Any],
        use: Use,
        harmless: frozenset[str],
    ) -> None:
        self._module, self._copies, self._use, self._harmless = module, copies, use, harmless
        self._records, self._few = records, few
        self._owned = Owned(module)
        self.remarks: list[str] = []
        self.untouched: list[str] = []
        self._optimiser_bytes = 0
        self._outputs: tuple[Output, ...] = ()
        self._dtypes: set[torch.dtype] = set()

    def run(self) -> Found:
        """Try everything; see the module's docstring."""
        use = self._use
        piece = min(use.piece_rows, MANY_ROWS)
        whole = self._rows(piece if piece > DIFFERENT_ROWS else 0, 0)
        tried = np.concatenate([self._few, self._few[:CROSSED_ROWS], whole])
        labels = [use.schema.label_array(records) for records in (self._records, tried)]
        wanted = [label.copy() for label in labels]
        if use.classifies:
            for label in labels:
                label[:] = 0
        probe = Probe(*self._copies[0], use.schema, tried, use.dtype, has_pieces=use.has_pieces)
        measured = probe.measure(range(TRIED_ROWS))
        shapes = measured.shapes
        first = shapes.get("", ())
        if use.classifies:
            classes = first[1] if len(first) == 2 and first[1] > 1 else 2
            for label, values in zip(labels, wanted, strict=True):
                label[:] = np.where((values >= 0) & (values < classes), values, 0)
        labels[1][:DIFFERENT_ROWS] = varied(labels[1], first)[:DIFFERENT_ROWS]
        tried[DIFFERENT_ROWS:FIRST_ROWS] = crossed(tried, use.schema)
        probe.move(rows=FIRST_COMPARED)
        probe.refuse_what_does_not_repeat()
        refuse_other_memory(probe, *self._copies.pop())
        if use.has_pieces:
            refuse_sums_of_rows(probe)
        if use.evaluates:
            refuse_lasting_modes(self._module, use.loss, self._harmless)
        plainly = channels_last_differs(probe) if has_convolutions(self._module) else None
        channels_last = has_convolutions(self._module) and plainly is None
        if (hooked := hook_that_is_not_linear(self._module)) is not None:
            self._refuse_scaling(f"parameter {hooked!r} has a hook, which makes another gradient of a sum")
        self._refuse_scaling(probe.scaling())  # first: what clips depends on the other rows, too
        if not use.rows_mix:
            self._refuse_mixing(mixing(probe, evaluates=use.evaluates))
        later = self._steps(shapes, channels_last=channels_last, float16=measured.float16)
        if later is not None and not use.rows_mix:
            self._refuse_later_mixing(probe, later)
        if plainly is not None:
            self.remarks.append(f"convolutions are computed channels first, which takes longer: {plainly}")
        elif channels_last:
            self.remarks.append("convolutions are computed channels last")
        float16 = measured.float16 or torch.float16 in self._dtypes
        if float16:
            self.remarks.append("it computes in float16: gradients are scaled by a power of 2")
        return Found(
            shapes=shapes,
            outputs=self._outputs,
            channels_last=channels_last,
            float16=float16,
            harmless=self._harmless,
            optimiser_bytes=self._optimiser_bytes,
        )

    def _refuse_mixing(self, found: str | None) -> None:
        if found is not None:
            raise ModelError(
                "the loss of a row depends on the other rows of its piece "
                f"({found}).{suspects(self._module)} Such are recurrent or attention layers without "
                "batch_first, means over rows, and losses that compare rows or divide by their number. "
                "Compute each row by itself; or set model.rows_mix = true if it is meant for each piece: "
                "then results depend on train.num_shards"
            )

    def _refuse_later_mixing(self, probe: Probe, later: Later) -> None:
        """Refuse rows that mix after some steps: at other weights, or once forward has counted them."""
        evaluates = self._use.evaluates and later.has_changes
        probe.move(later.parameters, later.constants(), rows=LAST_COMPARED)
        self._refuse_mixing(mixing(probe, splits=1, evaluates=evaluates))
        for steps in STEPS_LATER if later.counters else ():
            probe.move(later.parameters, later.constants(steps), rows=LAST_COMPARED)
            with suppress(UserCodeError):  # a table may have no place for so many steps
                found = mixing(probe, splits=1, evaluates=evaluates)
                counted = " and ".join(later.counters)
                self._refuse_mixing(found and f"where {counted} is as after {steps:,} steps, {found}")

    def _refuse_scaling(self, found: str | None) -> None:
        if found is not None:
            raise ModelError(
                f"{found}. A hook or an autograd function that clips would see the sum over a piece here, "
                "and a mean over all rows elsewhere. Use solver.clip_norm, or let it be proportional to "
                "the gradient"
            )

    def _steps(
        self, shapes: Mapping[str, tuple[int, ...]], *, channels_last: bool, float16: bool
    ) -> Later | None:
        """Make steps with updates, and evaluate between them; return what they made, if it is finite."""
        use = self._use
        module, loss = self._copies[1]
        flat = FlatModule(module, use.dtype)
        piece = Piece(
            flat, loss, use, self._owned, self._harmless, self._dtypes,
            channels_last=channels_last, float16=float16,
        )  # fmt: skip
        seed_generators(seed32(use.seed, "trial"))
        optimizer = make_optimizer(flat, use.optimizer, use.seed, shaped=own_schedule(use.schedule))
        schedule = make_schedule(optimizer, use.schedule, 0, use.seed)
        outside, later = Outside(optimizer, self._module, self._owned), Later(flat)
        moves = min(_STEPS, (schedule and schedule.limit) or _STEPS)
        least = 2 if mixes_rows(flat.module) else 1  # `check_pieces` tells of a batch-norm with one row
        most = max(least, min(use.piece_rows, TRIAL_ROWS))
        few = max(least, min(most, _FEW_ROWS, len(self._records) // 2))
        alone = 2 if mixes_rows_of_evaluations(module) else 1  # `check_evaluation` tells of a single row
        evaluated = [alone, max(alone, min(most, EVALUATION_ROWS))]
        steps = 0
        for step in range(_STEPS):
            rows = most if step == 0 else few
            piece.begin()
            gradient = piece.gradient(self._rows(rows, step))
            is_finite = _are_finite(gradient)
            if step == 1 or (step == 0 and not is_finite):
                for size in evaluated:
                    self._outputs = piece.evaluate(self._rows(size, 0), shapes)
            if not is_finite:
                break  # the run will say in which rows
            touched = flat.touched
            if use.has_pieces:
                piece.gradient(self._rows(few, step + rows))  # other rows: forward may change by them
            piece.take_changes()
            later.note()
            steps += 1
            then = partial(schedule.move, steps) if schedule is not None and steps < moves else None
            with outside.watched():
                optimizer.step(optimizer.new_gradient().copy_(gradient), touched, use.seed, then)
        self._optimiser_bytes = optimizer.state_bytes()
        if not (mixes_rows(flat.module) or use.rows_mix):
            piece.begin()
            piece.gradient(self._rows(1, _STEPS))
        names = [n for n, p in nn.Module.named_parameters(flat.module) if any(p is t for t in flat.trainable)]
        refuse_later_moves(flat.trainable, use.optimizer, use.schedule, self._module, self._owned)
        self._refuse_sparse(names, flat, piece)
        self.untouched = [name for name, was in zip(names, piece.touched, strict=True) if not was]
        if len(self.untouched) == len(names):
            raise ModelError(
                f"no parameter of {type(self._module).__name__} gets a gradient: the loss depends on none "
                "of them, so nothing would be trained. Let forward use them by self"
            )
        self.remarks.append(
            f"{steps} steps of {most:,} rows, evaluations of {evaluated[0]} and {evaluated[1]:,}; "
            f"{len(names) - len(self.untouched)} of {len(names)} parameters get a gradient; "
            + ("rows may mix, as model.rows_mix says" if use.rows_mix else "rows do not mix")
        )
        return later if _are_finite(flat.parameters) else None

    def _refuse_sparse(self, names: list[str], flat: FlatModule, piece: Piece) -> None:
        config = self._use.optimizer
        if not piece.sparse or not own_optimizer(config):
            return
        if not treats_sparse_alike(flat.trainable, config, piece.sparse):
            raise ModelError(
                f"the gradient of {names[min(piece.sparse)]!r} is sparse, and the optimiser {config.name} "
                "makes other steps with sparse gradients than with dense ones. But gradients are summed as "
                "dense vectors here: set sparse=False, or let the optimiser treat both alike"
            )

    def _rows(self, number: int, first: int) -> npt.NDArray[Any]:
        """Return some records, [number], others for another `first`."""
        return np.resize(np.roll(self._records, -first, axis=0), number)


def _are_finite(values: torch.Tensor) -> bool:
    # A sum is made sooner; finite numbers, too, may have one that is not.
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def _output_of(module: nn.Module, records: npt.NDArray[Any], use: Use) -> object:
    """Run a module, without its loss."""
    return forward(module, _no_loss, use.schema, records)


def _no_loss(output: Any, label: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(label))
