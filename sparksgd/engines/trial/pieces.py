"""The pieces of the trial's steps and evaluations: computed as in a run, with a look at all that they do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy.typing as npt
import torch

from sparksgd.arithmetic.changes import Changes, unite
from sparksgd.arithmetic.flat import FlatModule
from sparksgd.engines.forward import back_propagate, forward, gradient_shift, predictions
from sparksgd.engines.modes import evaluating
from sparksgd.engines.trial.lasting_modes import changed_names, values_of
from sparksgd.engines.trial.leaves import Leaves
from sparksgd.engines.trial.operations import Operations
from sparksgd.engines.trial.ownership import Owned
from sparksgd.engines.trial.use import Use
from sparksgd.engines.watch import Watch
from sparksgd.errors import ModelError, UserCodeError
from sparksgd.models.losses import Loss
from sparksgd.models.outputs import Output, outputs_of, shapes_of

__all__ = ["Piece"]


class Piece:
    """Computes pieces on a copy, and looks at all that they do.

    Args:
        flat: the copy.
        loss: one value per row.
        use: how the module will be used.
        owned: what the copy must not touch.
        harmless: see Plan.harmless.
        dtypes: takes the half types that are seen.
        channels_last: in which layout to compute.
        float16: whether to scale gradients.
    """

    def __init__(
        self, flat: FlatModule, loss: Loss, use: Use, owned: Owned, harmless: frozenset[str],
        dtypes: set[torch.dtype], *, channels_last: bool, float16: bool,
    ) -> None:  # fmt: skip
        self._flat, self._loss, self._use, self._owned, self._dtypes = flat, loss, use, owned, dtypes
        self._channels_last, self._float16 = channels_last, float16
        self._leaves = Leaves(flat.module, loss, owned)
        self._watch = Watch(flat.module, loss, harmless)
        self.touched = [False] * len(flat.trainable)
        self.sparse: dict[int, int] = {}
        """The numbers of parameters with sparse gradients, with their sparse dimensions."""
        self._changes: Changes | None = None
        self._buffers = flat.statistics(), flat.counters()

    def begin(self) -> None:
        """Begin a step at the copy's parameters: its pieces start from there."""
        self._flat.standing.at(self._flat.parameters.numpy())
        self._buffers = self._flat.statistics(), self._flat.counters()
        self._changes = None

    def take_changes(self) -> None:
        """Let what forward made of parameters and constants be theirs.

        Raises:
            ModelError: pieces left different values in an element.
        """
        self._flat.apply(self._changes)

    def gradient(self, records: npt.NDArray[Any]) -> torch.Tensor:
        """Return the mean gradient of some rows, float[P].

        Raises:
            ModelError: the piece did what it must not do.
        """
        shift = gradient_shift(len(records)) if self._float16 else 0
        self._flat.load_buffers(*self._buffers)  # as each piece of a step does
        with self._computing(len(records)), self._flat.new_gradient(shift=shift) as gradient:
            with self._flat.standing.piece() as made:
                _, losses = forward(self._flat.module, self._loss, self._use.schema, records)
                self._leaves.check(losses)
                back_propagate(losses, 2.0**-shift)
            self._changes = unite(self._changes, made.changes)
            for number, parameter in enumerate(self._flat.trainable):
                self.touched[number] |= parameter.grad is not None
                if parameter.grad is not None and parameter.grad.layout is torch.sparse_coo:
                    self.sparse[number] = parameter.grad.sparse_dim()
        self._watch.require_unchanged()
        return torch.from_numpy(gradient).div_(len(records))

    def evaluate(
        self, records: npt.NDArray[Any], trained: Mapping[str, tuple[int, ...]]
    ) -> tuple[Output, ...]:
        """Evaluate some rows, and return what a row's outputs are.

        Raises:
            ModelError: evaluations after an epoch could not use it.
        """
        rows = len(records)
        try:
            with evaluating(self._flat), self._computing(rows):
                before = values_of(self._flat.module, buffers_alone=True)
                output, _ = forward(self._flat.module, self._loss, self._use.schema, records)
                changed = changed_names(before, self._flat.module)
        except UserCodeError as error:
            raise UserCodeError(f"in evaluation mode, with {_counted(rows)}: {error}") from error
        except ModelError as error:
            raise ModelError(f"in evaluation mode, with {_counted(rows)}: {error}") from error
        self._watch.restore()
        constants = {name for name, _ in self._flat.constants()} if self._use.evaluates else set()
        for name in [name for name in changed if name in constants]:
            raise ModelError(
                f"forward changes {name} in evaluation, but an evaluation leaves no trace: any worker may "
                "make it. Change it in training only: if self.training"
            )
        shapes = shapes_of(output)
        wanted = {name: (rows, *shape[1:]) for name, shape in trained.items()}
        if (
            shapes.keys() != wanted.keys()
            or any(shape[:1] != (rows,) for shape in shapes.values())
            or (self._use.classifies and shapes != wanted)
        ):
            raise ModelError(
                f"in evaluation mode the module gives {_told(shapes)} for {_counted(rows)}, but "
                f"{_told(wanted)} in training: give the same form in both modes, a row of it for each row"
            )
        if self._use.classifies and isinstance(output, torch.Tensor):
            predictions(output)
        return outputs_of(output)

    @contextmanager
    def _computing(self, rows: int) -> Iterator[None]:
        """Watch what the block computes, in the layout of the run."""
        with Operations(self._owned.storages) as seen, ExitStack() as layout:
            if self._channels_last:
                layout.enter_context(self._flat.channels_last())
            try:
                yield
            except UserCodeError as error:
                self._owned.refuse(seen.met)  # more to the point
                if rows == 1:
                    raise UserCodeError(
                        f"with a single row, which a small piece or the end of an evaluation may be: {error}"
                    ) from error
                raise
        self._owned.refuse(seen.met)
        self._dtypes |= seen.dtypes


def _told(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return str(shapes.get("", dict(shapes)))


def _counted(rows: int) -> str:
    return "one row" if rows == 1 else f"{rows} rows"
