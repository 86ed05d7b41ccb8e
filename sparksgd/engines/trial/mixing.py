"""Whether the loss of a row depends on other rows.

The gradient of a piece must be the sum of its rows' gradients, else the result depends on how many shards
there are.  So a few rows are computed together and in parts, and compared: in all ways in the parameters'
type, and in one way in float64, which finds little mixing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial, reduce
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparksgd.arithmetic.changes import equal_changes, unite
from sparksgd.arithmetic.copies import copied
from sparksgd.engines.trial.chance import BETWEEN, HIGH, LOW, MIDDLE
from sparksgd.engines.trial.measured import Measured
from sparksgd.engines.trial.probe import Probe
from sparksgd.errors import ModelError, UserCodeError

__all__ = ["FIRST_COMPARED", "LAST_COMPARED", "mixing", "refuse_sums_of_rows", "suspects"]

_Split = tuple[Sequence[int], Sequence[Sequence[int]]]
_SPLITS: tuple[_Split, ...] = (
    ([4, 5, 6, 7, 0, 1, 2, 3], ([4, 5, 6, 7], [0, 1, 2, 3])),
    ([0, 1, 0, 2], ([0, 1], [0, 2])),
    ([0, 1, 2, 3], ([0], [1, 2, 3])),
)
"""Rows, and the parts to compare them with."""
FIRST_COMPARED, LAST_COMPARED = _SPLITS[0][0], _SPLITS[-1][0]
"""Which rows the first way compares, and which the last, by itself after steps."""
_CROSSED: _Split = ([0, 1, 2, 3, 8, 9, 10, 11], ([0, 1, 2, 3], [8, 9, 10, 11]))
"""Rows, and those that are made up of them: each of these has a fellow in each column."""

_MOST_WIDE = 10_000_000
"""Most parameters of a module that is computed in float64, which takes the memory of twenty copies."""

_DRAWS_ITS_OWN = (
    "the loss of a row is another when the generators are seeded otherwise, though they were held to see "
    "whether rows mix: the module or its loss draws by a function that a default, an attribute or a partial "
    "holds, or in a loop until it gets another number. Call functions of torch, numpy.random or random by "
    "their names; or set model.rows_mix = true if rows do not mix, or are meant to in each piece"
)


def mixing(probe: Probe, splits: int = len(_SPLITS), *, evaluates: bool = False) -> str | None:
    """Return how rows mix, for an error, after some ways to part them; None if they do not.

    Args:
        splits: how many ways.
        evaluates: whether they must not mix in evaluation mode, either.

    Raises:
        ModelError: it is a parameter or a constant that mixes them, because forward changes it; or it
            cannot be seen, because it draws numbers that cannot be held.
    """
    found = _in_all_ways(probe, splits, evaluates=evaluates)
    if found is None and splits == len(_SPLITS) and len(probe.whole_piece) > len(probe.piece):
        found = _mixing_of_many(probe, evaluates=evaluates)
        if found is not None:
            return found
    first, *_ = ways = _ways(probe, splits)
    looks = found is not None or (len(ways) > 1 and probe.flat.parameters.numel() <= _MOST_WIDE)
    wide = probe.in_float64(first[0]) if looks else None
    if wide is not None:
        with suppress(UserCodeError):  # it cannot compute all rows in float64
            if found is None:
                return _mixing(wide, [first], MIDDLE)
            return _in_all_ways(wide, splits, evaluates=evaluates)
    return found


def _ways(probe: Probe, splits: int) -> Sequence[_Split]:
    half = len(probe.piece) // 2
    of_piece = (probe.piece, (probe.piece[:half], probe.piece[half:]))
    chosen = _SPLITS[-splits:]
    return [of_piece, *chosen] if half and splits == len(_SPLITS) else chosen


def _in_all_ways(probe: Probe, splits: int, *, evaluates: bool) -> str | None:
    found = _mixing(probe, _ways(probe, splits), MIDDLE)
    if splits == len(_SPLITS):
        with suppress(UserCodeError):  # it need not bear rows that are made up
            found = found or _mixing(probe, [_CROSSED], MIDDLE)
        for level in (HIGH, *((LOW, *BETWEEN) if probe.graded else ())) if probe.draws else ():
            with suppress(UserCodeError):  # it need not bear any number
                found = found or _mixing(probe, _SPLITS[-1:], level)
    if not evaluates or found is not None:
        return found
    return _mixing_in_evaluation(probe, _SPLITS[0]) or _mixing_in_evaluation(probe, _CROSSED)


def _mixing_of_many(probe: Probe, *, evaluates: bool) -> str | None:
    """Return how the losses of a piece differ from those of its halves: few rows never reach some bound."""
    half = len(probe.whole_piece) // 2
    split = probe.whole_piece, (probe.whole_piece[:half], probe.whole_piece[half:])
    with suppress(UserCodeError):  # forward may need gradients
        found = _by_losses(probe, probe.losses, split, may_round=True)
        if found is not None:
            return found
    return _mixing_in_evaluation(probe, split) if evaluates else None


def _mixing_in_evaluation(probe: Probe, split: _Split) -> str | None:
    found = _by_losses(probe, probe.evaluated, split)
    return None if found is None else f"in evaluation mode, {found}"


def _by_losses(
    probe: Probe,
    losses: Callable[[Sequence[int]], Measured | None],
    split: _Split,
    *,
    may_round: bool = False,
) -> str | None:
    """Return how the losses of rows differ from those of their parts.

    Args:
        probe: has the rows.
        losses: of some rows; None: they cannot be computed.
        split: rows, and the parts to compare them with.
        may_round: whether a rounding of the weights may explain what differs.
    """
    whole, parts = split
    together, *apart = (losses(rows) for rows in (whole, *parts))
    known = [part for part in apart if part is not None]
    if together is None or len(known) < len(apart):
        return None
    found = probe.difference(together, known)
    if found is None:
        return None
    if not probe.is_sure():
        return _by_losses(probe, losses, split, may_round=may_round)
    again = losses(whole)
    if again is None or probe.difference(together, [again]) is not None:
        return None  # it keeps something, and each evaluation starts anew
    if may_round and probe.is_rounding(whole, together, known):
        return None
    return f"{len(whole)} rows together against the same rows in {len(parts)} parts: {found}"


def _mixing(probe: Probe, splits: Sequence[_Split], level: int) -> str | None:
    def measure(rows: Sequence[int]) -> Measured:
        return (level == MIDDLE and probe.known(rows)) or probe.measure(rows, level=level)

    for whole, parts in splits:
        together = probe.plain(whole) if level == MIDDLE else measure(whole)
        try:
            apart = [measure(part) for part in parts]
        except UserCodeError:  # of a single row, perhaps, which is tried later; two may do
            parts = (whole[:2], whole[2:])
            apart = [measure(part) for part in parts]
        found = probe.difference(together, apart)
        if found is None:
            continue
        if not probe.is_sure():
            return _mixing(probe, splits, level)
        again = probe.measure(whole, seed=1, level=level)
        if probe.difference(together, [again]) is not None:
            raise ModelError(_DRAWS_ITS_OWN)
        if probe.is_rounding(whole, together, apart, level=level):
            continue
        if _compute_by_running_statistics(probe.flat.module):
            probe.forget()
            return _mixing(probe, splits, level)
        if probe.has_pieces:
            probe.flat.apply(reduce(unite, (part.changes for part in apart)))  # more to the point
        return f"{len(whole)} rows together against the same rows in {len(parts)} parts: {found}"
    return None


def refuse_sums_of_rows(probe: Probe) -> None:
    """Refuse a module whose forward changes something by the rows of a piece.

    Raises:
        ModelError: that it does, with its name.
    """
    for whole, parts in _SPLITS[:2]:  # rows that differ; and pieces that have a row in common
        apart = reduce(unite, (probe.plain(part).changes for part in parts))
        together = probe.plain(whole).changes
        if apart is None or apart.conflicts or equal_changes(apart, together):
            continue
        if not probe.is_sure():
            refuse_sums_of_rows(probe)
            return
        name = next(iter({**apart.parts, **({} if together is None else together.parts)}))
        raise ModelError(
            f"forward changes {name} by the rows of a piece: pieces would leave what one of them counts, "
            "not what all of them do. Keep it fixed, or make it depend on the parameters alone"
        )


def suspects(module: nn.Module) -> str:
    """Return what in the module is known to mix rows, as a sentence."""
    for path, part in module.named_modules():
        if getattr(part, "batch_first", True) is False:
            return f" {path or 'The module'} ({type(part).__name__}) has batch_first=False."
        if getattr(part, "scale_grad_by_freq", False):
            return f" {path or 'The module'} ({type(part).__name__}) has scale_grad_by_freq=True."
    return ""


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
