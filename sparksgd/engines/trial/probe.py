"""Computes losses and gradients of a few rows, as often as the trial needs them, and compares them.

Batch-norms are in evaluation mode for that, because they may mix rows; random operations give constants.  The
weights are slightly moved, because parameters of 0 hide what depends on them.  Where the first piece draws no
number and has no half precision, the others are computed without a look at each operation; what is found so,
or draws a number, is computed again with it.

Legend: B rows, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy.typing as npt
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparksgd.arithmetic.changes import Words, equal_changes
from sparksgd.arithmetic.copies import copied
from sparksgd.arithmetic.flat import FlatModule
from sparksgd.arithmetic.generators import seed_generators
from sparksgd.data.schema import RowSchema
from sparksgd.engines.forward import back_propagate, forward
from sparksgd.engines.modes import evaluating
from sparksgd.engines.trial.chance import MIDDLE, Chance
from sparksgd.engines.trial.measured import Measured, distance, excess, measured
from sparksgd.engines.trial.operations import Operations
from sparksgd.engines.trial.rows import FIRST_ROWS
from sparksgd.errors import ModelError, UserCodeError
from sparksgd.models.losses import Loss

__all__ = ["MANY_ROWS", "TRIED_ROWS", "Probe", "without_batch_statistics"]

TRIED_ROWS = 4
_GRADIENT_ROWS, MANY_ROWS = 16, 64
"""Of a piece, whose gradients are computed, and whose losses are."""
_FIRST_SEED = 1_600_000_000
"""Forward gives generators of its own others: they are told apart by their state."""

_SINGLE = torch.finfo(torch.float32).eps
_WIDE_COARSE, _WIDE_FLOOR = 1e-8, 1e-10
"""In float64, what of a loss or a gradient may be rounding: relative to itself, and to the greatest one."""
_AMPLIFIED = 100.0
"""Rounding happens in many places: it is so many times what a rounding of the weights alone does."""

_MOVED = 0.1
"""How far weights are moved, relative to the root mean square of their tensor."""


class Probe:
    """A module at some weights, whose losses and gradients have the same bits each time.

    Args:
        module: a copy of the user's; it is changed.
        loss: one value per row.
        schema: of a record.
        records: rows that differ, those that are made up of them, [FIRST_ROWS] in all; after them as many as
            a piece has.
        dtype: type of the parameters.
        has_pieces: whether a step has several pieces, in which forward could leave different values.
        twin_of: of what it is a copy in float64.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Loss,
        schema: RowSchema,
        records: npt.NDArray[Any],
        dtype: torch.dtype,
        *,
        has_pieces: bool = True,
        twin_of: Probe | None = None,
    ) -> None:
        without_batch_statistics(module)
        self.flat = FlatModule(module, dtype)
        self.flat.standing.at(self.flat.parameters.numpy())
        self.names = [
            name for name, parameter in nn.Module.named_parameters(module) if self._is_trained(parameter)
        ]
        self._loss, self._schema, self._records = loss, schema, records
        self.has_pieces, self._is_wide = has_pieces, twin_of is not None
        self._chance: Chance = Chance() if twin_of is None else twin_of._chance
        self.draws = False
        self.graded = False
        """Whether what was drawn is more than masks, see `Operations.graded`."""
        self._first = self.flat.parameters.clone()
        self._scratch = torch.empty_like(self._first)
        self.whole_piece = list(range(FIRST_ROWS, len(records)))
        self.piece = self.whole_piece[:_GRADIENT_ROWS]
        self._plain: dict[tuple[int, ...], Measured] = {}  # what was measured at these weights
        self._watches: bool | None = None  # operations, which takes half of the time; None: not decided
        self._dtypes: set[torch.dtype] = set()  # of operations, when they were watched last

    def _is_trained(self, parameter: nn.Parameter) -> bool:
        return any(parameter is trained for trained in self.flat.trainable)

    def plain(self, rows: Sequence[int]) -> Measured:
        """Return the losses of rows and their gradient, as they were measured before at these weights."""
        key = tuple(rows)
        if key not in self._plain:
            self._plain[key] = self.measure(rows)
        return self._plain[key]

    def known(self, rows: Sequence[int]) -> Measured | None:
        """Return what was measured at these weights, if it is kept."""
        return self._plain.get(tuple(rows))

    def measure(
        self, rows: Sequence[int], *, scale: float = 1.0, seed: int = 0, level: int | None = MIDDLE
    ) -> Measured:
        """Return the losses of rows, and `scale` times their gradient.

        Args:
            rows: which.
            scale: of the loss.
            seed: of the generators.
            level: what random operations give; None: random numbers.
        """

        def compute(seen: Operations) -> Measured:
            with self.flat.new_gradient() as gradient, self.flat.standing.piece() as made:
                output, losses = self.forward(self.flat.module, self._loss, rows)
                if losses.requires_grad:  # else the trial's steps say what is wrong
                    back_propagate(losses, scale)
            vector = torch.from_numpy(gradient)
            return measured(output, losses, vector if scale == 1 else vector.div_(scale), seen, made.changes)

        return self.drawn(compute, seed, level)

    def losses(self, rows: Sequence[int]) -> Measured:
        """Return the losses of rows alone, which takes less memory; the gradient is empty.

        Args:
            rows: which; up to as many as a piece has.
        """

        def compute(seen: Operations) -> Measured:
            with torch.no_grad(), self.flat.standing.piece():
                output, losses = self.forward(self.flat.module, self._loss, rows)
            return measured(output, losses, self.flat.parameters.new_empty(0), seen, None)

        return self.drawn(compute, 0, MIDDLE)

    def drawn(self, compute: Callable[[Operations], Measured], seed: int, level: int | None) -> Measured:
        """Return what is computed at a level of chance, with a look at operations where that may matter.

        Args:
            compute: with the operations that were seen; it may be called twice.
            seed: of the generators.
            level: of chance.
        """
        watches = self._watches is not False or level not in (None, MIDDLE)
        seed_generators(_FIRST_SEED + seed)
        before = torch.default_generator.get_state()
        seen = Operations(steady=level, wide=self._is_wide)
        seen.dtypes = set() if watches else self._dtypes
        with ExitStack() as held:
            if watches:
                held.enter_context(seen)
            if level is not None:
                held.enter_context(self._chance.steady(level))
            made = compute(seen)
        if not watches and level is not None and not torch.equal(before, torch.default_generator.get_state()):
            self._watches = True
            return self.drawn(compute, seed, level)
        if self._watches is None:
            self._watches, self._dtypes = not seen.is_ordinary, seen.dtypes
        self.draws = self.draws or seen.draws > 0 or self._chance.was_drawn
        self.graded = self.graded or seen.graded or self._chance.was_drawn
        return made

    def is_sure(self) -> bool:
        """Return whether all operations were watched; from now on they are, and nothing is known yet."""
        if self._watches:
            return True
        self._watches = True
        self._plain.clear()
        return False

    def forward(self, module: nn.Module, loss: Loss, rows: Sequence[int]) -> tuple[Any, torch.Tensor]:
        return forward(module, loss, self._schema, self._records[list(rows)], self.flat.dtype)

    def forget(self) -> None:
        """Measure anew what was measured at these weights."""
        self._plain.clear()

    def move(
        self,
        parameters: torch.Tensor | None = None,
        constants: Mapping[str, Words] | None = None,
        *,
        rows: Sequence[int],
    ) -> None:
        """Go to weights near some parameters, float[P]; None: near the first ones.

        Where losses are not finite there, or forward raises, nothing could be compared: then it goes to these
        parameters.

        Args:
            parameters: near which.
            constants: the bytes of frozen parameters and buffers; others are as at first.
            rows: that are to be compared.
        """
        if constants is not None:
            self.flat.load_constants(constants)
        start = self._first if parameters is None else parameters
        chance = torch.Generator().manual_seed(16)
        noise = torch.rand(start.shape, generator=chance, dtype=self.flat.dtype).sub_(0.5)
        moved = start.clone()
        for values, away in zip(self.parts(moved), self.parts(noise), strict=True):
            if len(values):
                size = float(values.norm()) / len(values) ** 0.5
                values.add_(away, alpha=2 * _MOVED * (size + _MOVED))
        self._go_to(moved)
        try:
            is_finite = self.plain(rows).is_finite
        except UserCodeError:  # a scale is negative there, or a matrix is singular
            is_finite = False
        if not is_finite:
            self._go_to(start)

    def _go_to(self, parameters: torch.Tensor) -> None:
        self.forget()
        self.flat.parameters.copy_(parameters)
        self.flat.standing.at(self.flat.parameters.numpy())

    def parts(self, vector: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return each parameter's part of a vector, [P]."""
        return torch.split(vector, [parameter.numel() for parameter in self.flat.trainable])

    def in_float64(self, rows: Sequence[int]) -> Probe | None:
        """Return a copy at these weights that computes in float64; None if it does not compute these rows."""
        if self.flat.dtype == torch.float64:
            return None
        try:
            module, loss = copied((self.flat.module, self._loss))
            if isinstance(loss, nn.Module):
                loss.double()
            wide = Probe(
                module.double(), loss, self._schema, self._records, torch.float64,
                has_pieces=self.has_pieces, twin_of=self,
            )  # fmt: skip
            return wide if wide.plain(rows).is_finite else None
        except (UserCodeError, ModelError, RuntimeError, TypeError):
            return None

    def is_rounding(
        self,
        rows: Sequence[int],
        one: Measured,
        other: Sequence[Measured],
        *,
        level: int = MIDDLE,
        most: float = _SINGLE,
    ) -> bool:
        """Return whether two ways to compute rows differ by no more than rounding explains.

        Weights that are one rounding away change what an ill-conditioned module computes by as much.

        Args:
            rows: which.
            one: what they give in one way.
            other: what they give in parts, or in the other way.
            level: of chance.
            most: rounding of this size explains as much as is ever explained.
        """
        if self.difference(one, other, most) is not None:
            return False
        here = self.flat.parameters.clone()
        held = dict(self._plain)
        signs = torch.randint(0, 2, here.shape, generator=torch.Generator().manual_seed(16)).mul_(2).sub_(1)
        self._go_to(here + here * signs * torch.finfo(here.dtype).eps)
        shaken = self.measure(rows, level=level)
        self._go_to(here)
        self._plain.update(held)
        return distance(one, other) <= _AMPLIFIED * distance(one, [shaken])

    def refuse_what_does_not_repeat(self) -> None:
        """Refuse what draws from a source that no seed reaches.

        Raises:
            ModelError: that it does.
        """
        rows = range(TRIED_ROWS)
        once, again = (self.measure(rows, level=None) for _ in range(2))
        if self.difference(once, [again], _SINGLE) is not None:
            raise ModelError(
                "the loss of the same rows is another when it is computed again, though the generators of "
                "torch, numpy and Python are seeded: two runs of one seed would differ. Draw from these, not "
                "from default_rng() without a seed, os.urandom, secrets or the time"
            )

    def scaling(self) -> str | None:
        """Return whose gradient is not proportional to the loss, for an error; None if all are.

        Raises:
            ModelError: the backward pass changes a parameter or a constant by the size of gradients.
        """
        rows = range(TRIED_ROWS)
        plain = self.plain(rows)
        # In float16, greater ones leave its range by themselves.
        powers = (-4, 2) if plain.float16 else (-12, 12)
        for power in powers:
            scaled = self.measure(rows, scale=2.0**power)
            found = self.difference(plain, [scaled])
            if found is None and not equal_changes(plain.changes, scaled.changes):
                named = [changes.parts for changes in (plain.changes, scaled.changes) if changes is not None]
                raise ModelError(
                    f"the backward pass changes {next(iter(named[0]))} by the size of gradients, which are "
                    "of the sum over a piece here, and of the mean over all rows elsewhere: let no backward "
                    "hook or autograd function keep what it sees"
                )
            if found is not None and not self.is_sure():
                return self.scaling()
            if found is not None:
                hooked = [
                    n for n, p in zip(self.names, self.flat.trainable, strict=True) if p._backward_hooks
                ]
                where = f"parameter {hooked[0]!r} has a hook" if hooked else f"found at {found}"
                return (
                    f"the gradient of 2^{power} times the loss is not 2^{power} times the gradient: {where}"
                )
        return None

    def evaluated(self, rows: Sequence[int], *, refuses: bool = False) -> Measured | None:
        """Return the losses of rows in evaluation mode, without a gradient; None if it cannot be computed.

        Raises:
            UserCodeError: it cannot, and `refuses`.
        """

        def compute(seen: Operations) -> Measured:
            output, losses = self.forward(self.flat.module, self._loss, rows)
            return measured(output, losses, self.flat.parameters.new_empty(0), seen, None)

        try:
            with evaluating(self.flat):
                return self.drawn(compute, 0, MIDDLE)
        except (UserCodeError, ModelError):
            if refuses:
                raise
            return None  # the trial's evaluations say what is wrong

    def difference(self, together: Measured, apart: Sequence[Measured], precision: float = 0.0) -> str | None:
        """Return where losses or gradients differ by more than rounding; None: nowhere.

        Args:
            together: of some rows.
            apart: of the same rows, in parts.
            precision: the rounding error that is allowed at least.
        """
        if not together.is_finite or not all(part.is_finite for part in apart):
            return None
        precision = max(precision, together.epsilon, *(part.epsilon for part in apart))
        coarse, floor = (1e-3, 2e-5) if precision >= _SINGLE else (_WIDE_COARSE, _WIDE_FLOOR)
        coarse, floor = max(coarse, 16 * precision), max(floor, 8 * precision)
        losses = torch.cat([part.losses for part in apart])
        if len(losses) == len(together.losses):
            error = (losses - together.losses).abs()
            limit = coarse * torch.maximum(losses.abs(), together.losses.abs()) + floor * losses.abs().max()
            worst = int((error - limit).argmax())
            if error[worst] > limit[worst]:
                return f"the loss of row {worst + 1} is {together.losses[worst]:.9g} and {losses[worst]:.9g}"
        error = excess(apart, together, self._scratch[: len(together.gradient)])
        size = float(together.gradient.norm())
        if float(error.norm()) <= floor * size:
            return None
        for index, name in enumerate(self.names):
            reach = sum(float(self.parts(part.gradient)[index].norm()) for part in [together, *apart])
            wrong = float(self.parts(error)[index].norm())
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
