"""Whether the loss of a row depends on other rows, whether gradients scale, and in which layout to compute.

The gradient of a piece must be the sum of its rows' gradients, else the result depends on how many shards
there are.  So a few rows are computed together and in parts, and compared beyond rounding.  Batch-norms are
in evaluation mode for that, because they may mix; random operations give constants.  The weights are slightly
moved, because parameters of 0 hide what depends on them.

Legend: B rows, P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparksgd.arithmetic.changes import Changes, equal_changes, unite
from sparksgd.arithmetic.copies import copied
from sparksgd.arithmetic.flat import FlatModule
from sparksgd.arithmetic.generators import seed_generators
from sparksgd.data.schema import RowSchema
from sparksgd.engines.forward import back_propagate, forward
from sparksgd.engines.modes import evaluating
from sparksgd.engines.operations import Operations
from sparksgd.errors import ModelError, UserCodeError
from sparksgd.losses import Loss

__all__ = ["DIFFERENT_ROWS", "TRIED_ROWS", "Probe", "without_batch_statistics"]

TRIED_ROWS = 4
DIFFERENT_ROWS = 8

_SPLITS = (
    ([4, 5, 6, 7, 0, 1, 2, 3], ([4, 5, 6, 7], [0, 1, 2, 3])),
    ([0, 1, 0, 2], ([0, 1], [0, 2])),
    ([0, 1, 2, 3], ([0], [1, 2, 3])),
)
"""Rows, and the parts to compare them with."""

_MOVED = 0.1
"""How far weights are moved, relative to the root mean square of their tensor."""


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """Losses and gradient of some rows."""

    output: Any
    """The module's."""

    losses: torch.Tensor
    """float64[B]."""

    gradient: torch.Tensor
    """Of their sum, [P]."""

    epsilon: float
    """The rounding error of its least precise operation."""

    float16: bool
    """Whether an operation gave float16."""

    changes: Changes | None
    """What forward made of parameters and constants."""

    @property
    def is_finite(self) -> bool:
        """Whether all losses and gradients are finite."""
        return bool(torch.isfinite(self.losses.sum() + self.gradient.sum()))


class Probe:
    """Computes losses and gradients of a few rows at some weights, as often as needed, with the same bits.

    Args:
        module: a copy of the user's; it is changed.
        loss: one value per row.
        schema: of a record.
        records: rows that differ, [DIFFERENT_ROWS]; after them as many as a piece has.
        dtype: type of the parameters.
    """

    def __init__(
        self, module: nn.Module, loss: Loss, schema: RowSchema, records: npt.NDArray[Any], dtype: torch.dtype
    ) -> None:
        without_batch_statistics(module)
        self.flat = FlatModule(module, dtype)
        self.flat.standing.at(self.flat.parameters.numpy())
        self.names = [
            name for name, parameter in nn.Module.named_parameters(module) if self._is_trained(parameter)
        ]
        self._loss, self._schema, self._records = loss, schema, records
        self._piece = list(range(DIFFERENT_ROWS, len(records)))
        self._plain: dict[tuple[int, ...], _Measured] = {}  # what was measured at these weights

    def _is_trained(self, parameter: nn.Parameter) -> bool:
        return any(parameter is trained for trained in self.flat.trainable)

    def plain(self, rows: Sequence[int]) -> _Measured:
        """Return the losses of rows and their gradient, as they were measured before at these weights."""
        key = tuple(rows)
        if key not in self._plain:
            self._plain[key] = self.measure(rows)
        return self._plain[key]

    def measure(self, rows: Sequence[int], *, scale: float = 1.0, seed: int = 0) -> _Measured:
        """Return the losses of rows, and `scale` times their gradient."""
        seed_generators(seed)
        with (
            Operations(steady=True) as seen,
            self.flat.new_gradient() as gradient,
            self.flat.standing.piece() as made,
        ):
            output, losses = forward(
                self.flat.module, self._loss, self._schema, self._records[list(rows)], self.flat.dtype
            )
            if losses.requires_grad:  # else the trial's steps say what is wrong
                back_propagate(losses, scale)
        return _Measured(
            output=output.detach() if isinstance(output, torch.Tensor) else output,
            losses=losses.detach().double().clone(),
            gradient=torch.from_numpy(gradient).div_(scale),
            epsilon=seen.epsilon,
            float16=torch.float16 in seen.dtypes,
            changes=made.changes,
        )

    def move(self, parameters: torch.Tensor | None = None) -> None:
        """Go to weights near some parameters, float[P]; None: near the first ones."""
        self._plain.clear()
        if parameters is not None:
            self.flat.parameters.copy_(parameters)
        chance = torch.Generator().manual_seed(16)
        noise = torch.rand(self.flat.parameters.shape, generator=chance, dtype=self.flat.dtype).sub_(0.5)
        for values, away in zip(self._parts(self.flat.parameters), self._parts(noise), strict=True):
            if len(values):
                size = float(values.norm()) / len(values) ** 0.5
                values.add_(away, alpha=2 * _MOVED * (size + _MOVED))
        self.flat.standing.at(self.flat.parameters.numpy())

    def _parts(self, vector: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return each parameter's part of a vector, [P]."""
        return torch.split(vector, [parameter.numel() for parameter in self.flat.trainable])

    def mixing(self, splits: int = len(_SPLITS), *, has_pieces: bool = True) -> str | None:
        """Return how rows mix, for an error, after some ways to part them; None if they do not.

        Args:
            splits: how many ways.
            has_pieces: whether a step has several pieces, in which forward could leave different values.

        Raises:
            ModelError: it is a parameter or a constant that mixes them, because forward changes it.
        """
        half = len(self._piece) // 2
        of_piece = (self._piece, (self._piece[:half], self._piece[half:]))
        chosen = _SPLITS[-splits:]
        for whole, parts in [of_piece, *chosen] if half and splits == len(_SPLITS) else chosen:
            together = self.plain(whole)
            try:
                apart = [self.measure(part) for part in parts]
            except UserCodeError:  # of a single row, perhaps, which is tried later; two may do
                parts = (whole[:2], whole[2:])
                apart = [self.measure(part) for part in parts]
            found = self._difference(together, apart)
            if found is None:
                continue
            again = self.measure(whole, seed=1)
            if self._difference(together, [again]) is not None:
                return None  # it differs from itself: that is not about rows, and found elsewhere
            if self._is_rounding(whole, parts):
                continue
            if _compute_by_running_statistics(self.flat.module):
                self._plain.clear()
                return self.mixing(splits, has_pieces=has_pieces)
            if has_pieces:
                self.flat.apply(reduce(unite, (part.changes for part in apart)))  # more to the point
            return f"{len(whole)} rows together against the same rows in {len(parts)} parts: {found}"
        return None

    def _is_rounding(self, whole: Sequence[int], parts: Sequence[Sequence[int]]) -> bool:
        """Return whether the rows do not mix in float64, where the module can be computed so."""
        if self.flat.dtype == torch.float64:
            return False
        try:
            module, loss = copied((self.flat.module, self._loss))
            exact = Probe(module.double(), loss, self._schema, self._records, torch.float64)
            together = exact.measure(whole)
            apart = [exact.measure(part) for part in parts]
        except (UserCodeError, ModelError, RuntimeError, TypeError):
            return False
        return together.is_finite and self._difference(together, apart) is None

    def scaling(self) -> str | None:
        """Return whose gradient is not proportional to the loss, for an error; None if all are."""
        rows = range(TRIED_ROWS)
        plain = self.plain(rows)
        # In float16, greater ones leave its range by themselves.
        powers = (-4, 2) if plain.float16 else (-12, 12)
        for power in powers:
            found = self._difference(plain, [self.measure(rows, scale=2.0**power)])
            if found is not None:
                hooked = [
                    n for n, p in zip(self.names, self.flat.trainable, strict=True) if p._backward_hooks
                ]
                where = f"parameter {hooked[0]!r} has a hook" if hooked else f"found at {found}"
                return (
                    f"the gradient of 2^{power} times the loss is not 2^{power} times the gradient: {where}"
                )
        return None

    def channels_last(self) -> str | None:
        """Return why convolutions cannot be computed channels last; None if they can."""
        rows = self._piece or range(TRIED_ROWS)
        plain, evaluated = self.plain(rows), self._evaluated(rows)
        try:
            with self.flat.channels_last():
                other = self.measure(rows)
                in_evaluation = None if evaluated is None else self._evaluated(rows, refuses=True)
        except UserCodeError as error:
            return (
                f"channels last, the module or its loss raised: {str(error).strip().splitlines()[-1].strip()}"
            )
        found = self._difference(plain, [other])
        if found is None and evaluated is not None and in_evaluation is not None:
            found = self._difference(evaluated, [in_evaluation])
        return None if found is None else f"channels last, the module computes other values: {found}"

    def _evaluated(self, rows: Sequence[int], *, refuses: bool = False) -> _Measured | None:
        """Return the losses of rows in evaluation mode, without a gradient; None if it cannot be computed.

        Raises:
            UserCodeError: it cannot, and `refuses`.
        """
        seed_generators(0)
        try:
            with evaluating(self.flat), Operations(steady=True) as seen:
                output, losses = forward(
                    self.flat.module, self._loss, self._schema, self._records[list(rows)], self.flat.dtype
                )
        except (UserCodeError, ModelError):
            if refuses:
                raise
            return None  # the trial's evaluations say what is wrong
        return _Measured(
            output=output,
            losses=losses.double().clone(),
            gradient=torch.zeros(0),
            epsilon=seen.epsilon,
            float16=False,
            changes=None,
        )

    def sums_of_rows(self) -> str | None:
        """Return the name of what forward changes by the rows of a piece; None if there is nothing."""
        whole, parts = _SPLITS[0]
        apart = reduce(unite, (self.plain(part).changes for part in parts))
        together = self.plain(whole).changes
        if apart is None or apart.conflicts or equal_changes(apart, together):
            return None
        names = {} if together is None else together.parts
        return next(iter({**apart.parts, **names}))

    def _difference(self, together: _Measured, apart: Sequence[_Measured]) -> str | None:
        """Return where losses or gradients differ by more than rounding; None: nowhere."""
        if not together.is_finite or not all(part.is_finite for part in apart):
            return None
        precision = max(together.epsilon, *(part.epsilon for part in apart))
        if self.flat.dtype == torch.float64:
            precision = float(np.sqrt(torch.finfo(torch.float64).eps))
        coarse, floor = max(1e-3, 16 * precision), max(2e-5, 8 * precision)
        losses = torch.cat([part.losses for part in apart])
        if len(losses) == len(together.losses):
            error = (losses - together.losses).abs()
            limit = coarse * torch.maximum(losses.abs(), together.losses.abs()) + floor * losses.abs().max()
            worst = int((error - limit).argmax())
            if error[worst] > limit[worst]:
                return f"the loss of row {worst + 1} is {together.losses[worst]:g} and {losses[worst]:g}"
        error = apart[0].gradient - together.gradient
        for part in apart[1:]:
            error += part.gradient
        size = float(together.gradient.norm())
        if float(error.norm()) <= floor * size:
            return None
        for index, name in enumerate(self.names):
            reach = sum(float(self._parts(part.gradient)[index].norm()) for part in [together, *apart])
            wrong = float(self._parts(error)[index].norm())
            if wrong > coarse * reach + floor * size:
                return f"the gradient of {name!r} differs by {wrong:g}, where norms add up to {reach:g}"
        return None


def without_batch_statistics(module: nn.Module) -> None:
    """Let batch-norms use running statistics, so that they do not mix rows."""
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.training = False
            if part.running_mean is None and part.running_var is None:
                like = part.weight if part.affine else torch.empty(0)
                part.running_mean = like.new_zeros(part.num_features)
                part.running_var = like.new_ones(part.num_features)


def _compute_by_running_statistics(module: nn.Module) -> bool:
    """Let batch-norms of the user's own, which may ignore their mode, compute as torch's in evaluation do.

    Returns:
        Whether there were any that did not yet.
    """
    found = [
        part
        for part in module.modules()
        if isinstance(part, _BatchNorm)
        and "forward" not in vars(part)
        and not type(part).forward.__module__.startswith("torch.")
        and part.running_mean is not None
    ]
    for part in found:
        vars(part)["forward"] = partial(_by_running_statistics, part, copied(part))
    return bool(found)


def _by_running_statistics(
    norm: _BatchNorm, twin: _BatchNorm, x: torch.Tensor, *rest: Any, **named: Any
) -> Any:
    with torch.no_grad():
        own = twin(x, *rest, **named)
    if not isinstance(own, torch.Tensor) or own.shape != x.shape:
        return type(norm).forward(norm, x, *rest, **named)
    return nn.functional.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
    )
