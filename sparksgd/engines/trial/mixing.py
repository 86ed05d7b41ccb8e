"""Whether the loss of a row depends on other rows, whether gradients scale, and in which layout to compute.

The gradient of a piece must be the sum of its rows' gradients, else the result depends on how many shards
there are.  So a few rows are computed together and in parts, and compared beyond rounding.  Batch-norms are
in evaluation mode for that, because they may mix; random operations give constants.  The weights are slightly
moved, because parameters of 0 hide what depends on them.  Where the first piece draws no number and has no
half precision, the others are computed without a look at each operation; what is found so, or draws a number,
is computed again with it.

Legend: B rows, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial, reduce
from typing import Any

import numpy.typing as npt
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparksgd.arithmetic.changes import equal_changes, unite
from sparksgd.arithmetic.constants import Constants
from sparksgd.arithmetic.copies import copied
from sparksgd.arithmetic.flat import FlatModule
from sparksgd.arithmetic.generators import seed_generators
from sparksgd.data.schema import RowSchema
from sparksgd.engines.forward import back_propagate, forward
from sparksgd.engines.modes import evaluating
from sparksgd.engines.trial.chance import HIGH, LOW, MIDDLE, Chance
from sparksgd.engines.trial.measured import Measured, distance, gradient_of, measured, sum_of
from sparksgd.engines.trial.operations import Operations
from sparksgd.errors import ModelError, UserCodeError
from sparksgd.losses import Loss

__all__ = ["DIFFERENT_ROWS", "TRIED_ROWS", "Probe", "without_batch_statistics"]

TRIED_ROWS = 4
DIFFERENT_ROWS = 8

_Split = tuple[Sequence[int], Sequence[Sequence[int]]]
_SPLITS: tuple[_Split, ...] = (
    ([4, 5, 6, 7, 0, 1, 2, 3], ([4, 5, 6, 7], [0, 1, 2, 3])),
    ([0, 1, 0, 2], ([0, 1], [0, 2])),
    ([0, 1, 2, 3], ([0], [1, 2, 3])),
)
"""Rows, and the parts to compare them with."""

_SINGLE = torch.finfo(torch.float32).eps
_WIDE_COARSE, _WIDE_FLOOR = 1e-8, 1e-10
"""In float64, what of a loss or a gradient may be rounding: relative to itself, and to the greatest one."""
_MUCH = 0.01
_AMPLIFIED = 100.0
"""Rounding happens in many places: it is so many times what a rounding of the weights alone does."""

_DRAWS_ITS_OWN = (
    "the loss of a row is another when the generators are seeded otherwise, though they were held to see "
    "whether rows mix: the module or its loss draws by a function that a default, an attribute or a partial "
    "holds, or in a loop until it gets another number. Call functions of torch, numpy.random or random by "
    "their names; or set model.rows_mix = true if rows do not mix, or are meant to in each piece"
)

_MOVED = 0.1
"""How far weights are moved, relative to the root mean square of their tensor."""


class Probe:
    """Computes losses and gradients of a few rows at some weights, as often as needed, with the same bits.

    Args:
        module: a copy of the user's; it is changed.
        loss: one value per row.
        schema: of a record.
        records: rows that differ, [DIFFERENT_ROWS]; after them as many as a piece has.
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
        self._has_pieces, self._is_wide = has_pieces, twin_of is not None
        self._chance: Chance = Chance() if twin_of is None else twin_of._chance
        self._draws = False
        self._first = self.flat.parameters.clone()
        self._piece = list(range(DIFFERENT_ROWS, len(records)))
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
                output, losses = self._forward(self.flat.module, self._loss, rows)
                if losses.requires_grad:  # else the trial's steps say what is wrong
                    back_propagate(losses, scale)
            vector = torch.from_numpy(gradient)
            return measured(output, losses, vector if scale == 1 else vector.div_(scale), seen, made.changes)

        return self._drawn(compute, seed, level)

    def _drawn(self, compute: Callable[[Operations], Measured], seed: int, level: int | None) -> Measured:
        """Return what is computed at a level of chance, with a look at operations where that may matter.

        Args:
            compute: with the operations that were seen; it may be called twice.
            seed: of the generators.
            level: of chance.
        """
        watches = self._watches is not False or level in (LOW, HIGH)
        seed_generators(seed)
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
            return self._drawn(compute, seed, level)
        if self._watches is None:
            self._watches, self._dtypes = not seen.is_ordinary, seen.dtypes
        self._draws = self._draws or seen.draws > 0 or self._chance.was_drawn
        return made

    def _is_sure(self) -> bool:
        """Return whether all operations were watched; from now on they are, and nothing is known yet."""
        if self._watches:
            return True
        self._watches = True
        self._plain.clear()
        return False

    def _forward(self, module: nn.Module, loss: Loss, rows: Sequence[int]) -> tuple[Any, torch.Tensor]:
        return forward(module, loss, self._schema, self._records[list(rows)], self.flat.dtype)

    def move(self, parameters: torch.Tensor | None = None) -> None:
        """Go to weights near some parameters, float[P]; None: near the first ones.

        Where losses are not finite there, nothing could be compared: then it goes to these parameters.
        """
        start = self._first if parameters is None else parameters
        chance = torch.Generator().manual_seed(16)
        noise = torch.rand(start.shape, generator=chance, dtype=self.flat.dtype).sub_(0.5)
        moved = start.clone()
        for values, away in zip(self._parts(moved), self._parts(noise), strict=True):
            if len(values):
                size = float(values.norm()) / len(values) ** 0.5
                values.add_(away, alpha=2 * _MOVED * (size + _MOVED))
        self._go_to(moved)
        if not self.plain(range(DIFFERENT_ROWS)).is_finite:
            self._go_to(start)

    def _go_to(self, parameters: torch.Tensor) -> None:
        self._plain.clear()
        self.flat.parameters.copy_(parameters)
        self.flat.standing.at(self.flat.parameters.numpy())

    def _parts(self, vector: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return each parameter's part of a vector, [P]."""
        return torch.split(vector, [parameter.numel() for parameter in self.flat.trainable])

    def mixing(self, splits: int = len(_SPLITS), *, evaluates: bool = False) -> str | None:
        """Return how rows mix, for an error, after some ways to part them; None if they do not.

        Args:
            splits: how many ways.
            evaluates: whether they must not mix in evaluation mode, either.

        Raises:
            ModelError: it is a parameter or a constant that mixes them, because forward changes it; or it
                cannot be seen, because it draws numbers that cannot be held.
        """
        found = self._in_all_ways(splits, evaluates=evaluates)
        first, *_ = ways = self._ways(splits)
        wide = None if found is None and len(ways) == 1 else self._in_float64(first[0])
        if wide is not None:
            with suppress(UserCodeError):  # it cannot compute all rows in float64
                if found is None:
                    return wide._mixing([first], MIDDLE)
                return wide._in_all_ways(splits, evaluates=evaluates)
        return found

    def _ways(self, splits: int) -> Sequence[_Split]:
        half = len(self._piece) // 2
        of_piece = (self._piece, (self._piece[:half], self._piece[half:]))
        chosen = _SPLITS[-splits:]
        return [of_piece, *chosen] if half and splits == len(_SPLITS) else chosen

    def _in_all_ways(self, splits: int, *, evaluates: bool) -> str | None:
        found = self._mixing(self._ways(splits), MIDDLE)
        for level in (LOW, HIGH) if self._draws and splits == len(_SPLITS) else ():
            with suppress(UserCodeError):  # it need not bear any number
                found = found or self._mixing(_SPLITS[-1:], level)
        return self._mixing_in_evaluation() if evaluates and found is None else found

    def _mixing_in_evaluation(self) -> str | None:
        whole, parts = _SPLITS[0]
        together, *apart = (self._evaluated(rows) for rows in (whole, *parts))
        known = [part for part in apart if part is not None]
        if together is None or len(known) < len(apart):
            return None
        found = self._difference(together, known)
        again = None if found is None else self._evaluated(whole)
        if again is None or self._difference(together, [again]) is not None:
            return None  # it keeps something: each evaluation starts anew
        return f"in evaluation mode, {found}"

    def _mixing(
        self, splits: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], level: int
    ) -> str | None:
        def measure(rows: Sequence[int]) -> Measured:
            return self.plain(rows) if level == MIDDLE else self.measure(rows, level=level)

        for whole, parts in splits:
            together = measure(whole)
            try:
                apart = [measure(part) for part in parts]
            except UserCodeError:  # of a single row, perhaps, which is tried later; two may do
                parts = (whole[:2], whole[2:])
                apart = [measure(part) for part in parts]
            found = self._difference(together, apart)
            if found is None:
                continue
            if not self._is_sure():
                return self._mixing(splits, level)
            again = self.measure(whole, seed=1, level=level)
            if self._difference(together, [again]) is not None:
                raise ModelError(_DRAWS_ITS_OWN)
            if self._is_rounding(whole, together, apart, level=level):
                continue
            if _compute_by_running_statistics(self.flat.module):
                self._plain.clear()
                return self._mixing(splits, level)
            if self._has_pieces:
                self.flat.apply(reduce(unite, (part.changes for part in apart)))  # more to the point
            return f"{len(whole)} rows together against the same rows in {len(parts)} parts: {found}"
        return None

    def _in_float64(self, rows: Sequence[int]) -> Probe | None:
        """Return a copy at these weights that computes in float64; None if it does not compute these rows."""
        if self.flat.dtype == torch.float64:
            return None
        try:
            module, loss = copied((self.flat.module, self._loss))
            if isinstance(loss, nn.Module):
                loss.double()
            wide = Probe(
                module.double(), loss, self._schema, self._records, torch.float64,
                has_pieces=self._has_pieces, twin_of=self,
            )  # fmt: skip
            return wide if wide.plain(rows).is_finite else None
        except (UserCodeError, ModelError, RuntimeError, TypeError):
            return None

    def _is_rounding(
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
        if self._difference(one, other, most) is not None:
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
        if self._difference(once, [again], _SINGLE) is not None:
            raise ModelError(
                "the loss of the same rows is another when it is computed again, though the generators of "
                "torch, numpy and Python are seeded: two runs of one seed would differ. Draw from these, not "
                "from default_rng() without a seed, os.urandom, secrets or the time"
            )

    def scaling(self) -> str | None:
        """Return whose gradient is not proportional to the loss, for an error; None if all are."""
        rows = range(TRIED_ROWS)
        plain = self.plain(rows)
        # In float16, greater ones leave its range by themselves.
        powers = (-4, 2) if plain.float16 else (-12, 12)
        for power in powers:
            found = self._difference(plain, [self.measure(rows, scale=2.0**power)])
            if found is not None and not self._is_sure():
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
        if found is not None and not self._is_sure():
            return self.channels_last()
        return None if found is None else f"channels last, the module computes other values: {found}"

    def refuse_other_memory(self, module: nn.Module, loss: Loss) -> None:
        """Refuse what computes otherwise where parameters are views of one vector.

        Args:
            module: a copy of the user's, whose parameters have memory of their own; it is changed.
            loss: a copy, too.

        Raises:
            ModelError: that it does, with the parameter's name.
            UserCodeError: the module or its loss raised.
        """
        found = self._by_memory(module, loss)
        if found is not None:
            raise ModelError(
                "forward computes other values when its parameters are contiguous parts of one vector, as "
                f"they are in training ({found}). It depends on the offset, the strides or the size of their "
                "memory. Let it use values alone: parameter.contiguous(), or as_strided without an offset"
            )

    def _by_memory(self, module: nn.Module, loss: Loss) -> str | None:
        """Return which parameter's memory matters; None if none does."""
        without_batch_statistics(module)
        named = dict(nn.Module.named_parameters(module))
        own = [named[name] for name in self.names]
        homes = [parameter.data for parameter in own]
        constants = Constants(module, {id(parameter) for parameter in own})
        constants.stand()
        modes = [(part, part.training) for part in module.modules()]
        rows = range(TRIED_ROWS)

        def measure(evaluates: bool) -> Measured:
            with torch.set_grad_enabled(not evaluates):
                return self._drawn(partial(compute, evaluates), 0, MIDDLE)

        def compute(evaluates: bool, seen: Operations) -> Measured:
            for parameter, home, values in zip(own, homes, self.flat.trainable, strict=True):
                parameter.data, parameter.grad = home, None
                home.copy_(values.detach())  # forward may have changed it
            constants.restore()
            if evaluates:
                module.eval()
            output, losses = self._forward(module, loss, rows)
            if losses.requires_grad:
                back_propagate(losses)
            if evaluates:
                module.train(modes[0][1])  # takes out again what an own eval() merged
                for part, training in modes:
                    part.training = training
            return measured(output, losses, gradient_of(own), seen, None)

        for evaluates in (False, True):
            here = self._evaluated(rows) if evaluates else self.plain(rows)
            if here is None:
                return None
            there = measure(evaluates)
            found = self._difference(there, [here])
            if found is None:
                continue
            if not self._is_sure():
                return self._by_memory(module, loss)
            if not evaluates and self._is_rounding(rows, here, [there], most=_MUCH):
                return None
            for number, view in enumerate(self._parts(torch.zeros_like(self.flat.parameters))):
                home, homes[number] = homes[number], view.view(own[number].shape)
                if self._difference(there, [measure(evaluates)]) is not None:
                    return f"parameter {self.names[number]!r}: {found}"
                homes[number] = home
            return f"the parameters: {found}"
        return None

    def _evaluated(self, rows: Sequence[int], *, refuses: bool = False) -> Measured | None:
        """Return the losses of rows in evaluation mode, without a gradient; None if it cannot be computed.

        Raises:
            UserCodeError: it cannot, and `refuses`.
        """

        def compute(seen: Operations) -> Measured:
            output, losses = self._forward(self.flat.module, self._loss, rows)
            return measured(output, losses, torch.zeros_like(self.flat.parameters), seen, None)

        try:
            with evaluating(self.flat):
                return self._drawn(compute, 0, MIDDLE)
        except (UserCodeError, ModelError):
            if refuses:
                raise
            return None  # the trial's evaluations say what is wrong

    def sums_of_rows(self) -> str | None:
        """Return the name of what forward changes by the rows of a piece; None if there is nothing."""
        whole, parts = _SPLITS[0]
        apart = reduce(unite, (self.plain(part).changes for part in parts))
        together = self.plain(whole).changes
        if apart is None or apart.conflicts or equal_changes(apart, together):
            return None
        if not self._is_sure():
            return self.sums_of_rows()
        names = {} if together is None else together.parts
        return next(iter({**apart.parts, **names}))

    def _difference(
        self, together: Measured, apart: Sequence[Measured], precision: float = 0.0
    ) -> str | None:
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
        error = sum_of(apart) - together.gradient
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
