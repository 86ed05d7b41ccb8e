"""The trial of what a module keeps from piece to piece, before any row is dealt.

A piece X may leave attributes changed.  They are harmless if the next piece Y is computed to the same bits,
and leaves the same values, whether X ran before it or not: the last activation, a cache of masks, a weight
that a hook computes anew.  A dictionary may have more keys after X, and a table may be longer, of a cache by
length, unless X was Y.
Between X and Y the parameters move, as in training, so that a cache of what depends on them is found out,
too; so is a memory of rows, by rows that are made up of X.  All else is refused: a counter, a list that
grows, a maximum so far; and what an evaluation reads, because each evaluation, and the saved model, starts
from the first state.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sparksgd.arithmetic.copies import copied, parts
from sparksgd.arithmetic.flat import FlatModule
from sparksgd.arithmetic.generators import generators_kept, seed_generators
from sparksgd.arithmetic.settings import HeldSettings
from sparksgd.data.schema import RowSchema
from sparksgd.engines.bytes_of import same_bytes
from sparksgd.engines.forward import back_propagate, forward
from sparksgd.engines.held import is_plain, refusal
from sparksgd.engines.hidden_state import pickled, state_of
from sparksgd.engines.modes import evaluating
from sparksgd.engines.trial.rows import crossed
from sparksgd.engines.trial.unread import is_only_counted
from sparksgd.engines.watch import Watch
from sparksgd.errors import ModelError, UserCodeError
from sparksgd.models.losses import Loss

__all__ = ["harmless_state"]

log = logging.getLogger("sparksgd")

_FAR = 1_000_003
"""Where a counter is set, to see that nothing depends on it."""


def harmless_state(
    module: nn.Module,
    loss: Loss,
    schema: RowSchema,
    records: npt.NDArray[Any],
    dtype: torch.dtype,
    made: tuple[nn.Module, Loss] | None = None,
) -> frozenset[str]:
    """Return the paths of the attributes that a piece may leave changed.

    Args:
        module: not changed; copies are tried.
        loss: likewise.
        schema: of a record.
        records: some rows, [B].
        dtype: the type of the parameters.
        made: copies of module and loss, which are as before afterwards; None: others are made.

    Raises:
        ModelError: something else changes, or a setting of torch or numpy does; or a part cannot be copied.
    """
    graphs = _with_graph(module)
    rows = max(2, len(records) // 2)
    pieces = np.resize(records, 2 * rows).reshape(2, rows)
    with generators_kept(), HeldSettings() as settings:
        first = _Tried(module, loss, schema, dtype, made)
        try:
            with settings.blamed("the module or its loss"):
                first.compute(pieces[0])
            changed = first.watch.changed()
        finally:
            first.put_back()  # also what all copies share: globals, attributes of classes
        for path in graphs:
            if path not in changed:
                raise ModelError(
                    f"{path} is, or holds, a tensor that was computed, with its graph, before the training, "
                    f"and forward does not compute it anew: it would never train. Make it in forward, or "
                    f"detach it"
                )
        if not changed:
            return frozenset()
        counters = [path for path in changed if _is_unread(path, first)]
        _refuse_what_was_kept(module, loss, schema, dtype, changed, counters, pieces[0])
        values = [path for path in changed if path not in counters]
        grows = False
        for one, other in (pieces, pieces[::-1]):
            grows |= _refuse_memory(module, loss, schema, dtype, values, one, other)
        if grows:
            if _refuse_memory(module, loss, schema, dtype, values, pieces[0], pieces[0]):
                raise refusal(" or ".join(values))
            with suppress(UserCodeError):  # it need not bear rows that are made up
                made_up = crossed(records, schema)
                _refuse_memory(module, loss, schema, dtype, values, pieces[0], made_up)
        with settings.blamed("the module or its loss, in evaluation,"):
            _refuse_reading(lambda: _Tried(module, loss, schema, dtype), changed, *pieces)
    return frozenset(changed)


def _refuse_what_was_kept(
    module: nn.Module,
    loss: Loss,
    schema: RowSchema,
    dtype: torch.dtype,
    changed: list[str],
    counters: list[str],
    piece: npt.NDArray[Any],
) -> None:
    """Refuse a module that computes otherwise where it has counted far, or has seen the parameters before."""
    found = []
    for is_new in (True, False):
        one = _Tried(module, loss, schema, dtype)
        one.let_parameters_be(is_new=is_new)
        for path in counters if is_new else ():
            one.watch.set_number(path, _FAR)
        found.append(one.compute(piece))
        one.watch.restore()
    if found[0] != found[1]:
        raise refusal(" or ".join(changed))


def _is_unread(path: str, tried: _Tried) -> bool:
    """Return whether an attribute is a number that is counted on, but never read."""
    if tried.watch.number(path) is None:
        return False
    if not is_only_counted(path.rpartition(".")[2], tried.watch.functions):
        return False
    log.info("nothing reads %s, which counts: it stays as it was", path)
    return True


def _refuse_memory(
    module: nn.Module,
    loss: Loss,
    schema: RowSchema,
    dtype: torch.dtype,
    changed: list[str],
    before: npt.NDArray[Any],
    piece: npt.NDArray[Any],
) -> bool:
    """Refuse a module that computes a piece otherwise, or leaves other values, after another one.

    Returns:
        Whether a dictionary has more keys after both pieces, or a table is longer.
    """
    fresh, used = (_Tried(module, loss, schema, dtype) for _ in range(2))
    used.compute(before, seed=1)  # so that what it draws and keeps is another than it would be anew
    fresh.pass_over()
    used.take_tensors(fresh)
    found = []
    for one in (used, fresh):
        one.move_parameters()
        bits = one.compute(piece)
        found.append((bits, [one.leaves(path) for path in changed]))
        one.watch.restore()
    (bits, values), (fresh_bits, fresh_values) = found
    for path, value, other in zip(changed, values, fresh_values, strict=True):
        if not _has_all_of(value, other):
            raise refusal(path)
    if bits != fresh_bits:
        raise refusal(" or ".join(changed))
    return any(_has_more(value, other) for value, other in zip(values, fresh_values, strict=True))


def _refuse_reading(
    new: Callable[[], _Tried], changed: list[str], piece: npt.NDArray[Any], evaluated: npt.NDArray[Any]
) -> None:
    """Refuse a module whose evaluation is another one after a training piece at other parameters.

    Args:
        new: makes copies.
        changed: paths of what a piece leaves changed.
        piece: rows of training.
        evaluated: other rows.
    """
    fresh, used = new(), new()
    try:
        used.compute_elsewhere(piece, far=True)
    except (ModelError, UserCodeError):  # parameters may have bounds
        used.watch.restore()
        used = new()
        used.compute_elsewhere(piece, far=False)
    used.take_tensors(fresh)
    found = [one.evaluate(evaluated) for one in (used, fresh)]
    if found[0] != found[1] and found[1] == new().evaluate(evaluated):
        raise ModelError(
            f"{' or '.join(changed)} is written in training and read in evaluation, but each piece, each "
            f"evaluation and the saved model start from its first value: make it a buffer, or compute it "
            f"from the parameters in both"
        )


class _Tried:
    """Copies of a module and a loss that are tried."""

    def __init__(
        self,
        module: nn.Module,
        loss: Loss,
        schema: RowSchema,
        dtype: torch.dtype,
        made: tuple[nn.Module, Loss] | None = None,
    ) -> None:
        tried, self._loss = made or copied((module, loss), {"": module, "loss": loss})
        self._flat, self._schema = FlatModule(tried, dtype), schema
        self._buffers = self._flat.statistics(), self._flat.counters()
        self._flat.standing.at(self._flat.parameters.numpy())
        self.watch = Watch(tried, self._loss, original=module)

    def compute(self, records: npt.NDArray[Any], seed: int = 0) -> tuple[bytes, bytes]:
        """Compute a gradient; return the losses' bytes, and its own."""
        seed_generators(seed)
        with self._flat.new_gradient() as gradient, self._flat.standing.piece():
            _, losses = forward(self._flat.module, self._loss, self._schema, records)
            if losses.requires_grad:  # else the trial's steps say what is wrong
                back_propagate(losses, 1.0)
        return losses.detach().numpy().tobytes(), gradient.tobytes()

    def put_back(self) -> None:
        """Let all be as it was before a piece."""
        self.watch.restore()
        self._flat.load_buffers(*self._buffers)

    def let_parameters_be(self, *, is_new: bool) -> None:
        """Let forward see by their versions that parameters are new, or not."""
        self._flat.standing.moves_versions = is_new

    def pass_over(self) -> None:
        """Let the versions of parameters be as after a piece."""
        with self._flat.standing.piece():
            pass

    def leaves(self, path: str) -> _Leaves:
        """Return what an attribute is now; the module's own parts have paths of their own."""
        found: _Leaves = defaultdict(list)
        own = {id(part) for part in self._flat.module.modules()}
        for place, leaf in _leaves(self.watch.value(path), own, ""):
            found[place].append(hashlib.sha256(leaf).digest() if isinstance(leaf, bytes) else leaf)
        return found

    def compute_elsewhere(self, records: npt.NDArray[Any], *, far: bool) -> None:
        """Compute a gradient at other parameters; far: such that masks of what is great are others, too."""
        if far:
            for parameter in self._flat.trainable:
                parameter.data.copy_(parameter.detach().flip(tuple(range(parameter.ndim))) * 1.5)
        self.move_parameters()
        self.compute(records, seed=1)

    def evaluate(self, records: npt.NDArray[Any]) -> str:
        """Evaluate, and return to the first state; return a digest of the losses, or "" where it raised."""
        seed_generators(0)
        try:
            with evaluating(self._flat):
                _, losses = forward(self._flat.module, self._loss, self._schema, records)
            return _sha256([losses.detach().numpy().tobytes()])
        except (ModelError, UserCodeError):
            return ""
        finally:
            self.watch.restore()

    def take_tensors(self, other: _Tried) -> None:
        """Take the parameters and buffers of another one: what changes there is no Python state."""
        names = dict(other._flat.module.named_parameters()) | dict(other._flat.module.named_buffers())
        own = dict(self._flat.module.named_parameters()) | dict(self._flat.module.named_buffers())
        for name, tensor in own.items():
            if name in names and tensor.shape == names[name].shape:
                tensor.data.copy_(names[name].detach())
        self._flat.standing.at(self._flat.parameters.numpy())

    def move_parameters(self) -> None:
        """Move each parameter a little."""
        self._flat.parameters.mul_(1 + 2**-8).add_(2**-10)
        self._flat.standing.at(self._flat.parameters.numpy())


def _with_graph(module: nn.Module) -> list[str]:
    """Return the paths of attributes that are, or hold, tensors with a graph."""
    return [
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if _has_graph(value)
    ]


def _has_graph(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_leaf
    if is_plain(value):
        return False
    return isinstance(value, list | tuple | dict) and any(_has_graph(part) for _, part in parts(value))


def _sha256(values: Any) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(value)
    return digest.hexdigest()


_Leaf = bytes | tuple[str, ...] | torch.Tensor
_Leaves = dict[str, list[_Leaf]]
"""By place: digests of values, the keys of dictionaries, in their order, and copies of tensors."""


def _has_all_of(one: _Leaves, other: _Leaves) -> bool:
    """Return whether values are the same, but for more keys and longer tables of the first."""
    return all(
        len(one.get(place, ())) == len(leaves) and all(map(_is_same, one[place], leaves))
        for place, leaves in other.items()
    )


def _is_same(leaf: _Leaf, other: _Leaf) -> bool:
    if isinstance(leaf, tuple) and isinstance(other, tuple):
        return tuple(key for key in leaf if key in set(other)) == other
    if isinstance(leaf, torch.Tensor) and isinstance(other, torch.Tensor):
        if leaf.dtype != other.dtype or leaf.ndim != other.ndim:
            return False
        return same_bytes(leaf[tuple(slice(size) for size in other.shape)], other)
    return type(leaf) is type(other) and leaf == other


def _has_more(one: _Leaves, other: _Leaves) -> bool:
    """Return whether values that are the same in part have more in the first."""
    return len(one) > len(other) or any(
        isinstance(mine, torch.Tensor) and isinstance(leaf, torch.Tensor) and mine.shape != leaf.shape
        for place, leaves in other.items()
        for mine, leaf in zip(one[place], leaves, strict=True)
    )


def _leaves(value: object, seen: set[int], place: str) -> Iterator[tuple[str, _Leaf]]:
    """Yield what tells two objects apart by their values, each with its place."""
    if isinstance(value, torch.Tensor):
        if value.is_nested:
            for number, component in enumerate(value.unbind()):
                yield from _leaves(component, seen, f"{place}[{number}]")
            return
        if value.is_meta:
            yield place, f"{value.dtype} {tuple(value.shape)}".encode()
        else:
            yield place, value.detach().to_dense().clone()
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if (state := state_of(value)) is not None:
        yield place, pickled(state[0]())
        return
    inner = list(parts(value))
    if isinstance(value, dict | list | set | deque):
        inner += [(f".{name}", part) for name, part in getattr(value, "__dict__", {}).items()]
    names = tuple(name for name, _ in inner)
    yield place, type(value).__qualname__.encode()
    if isinstance(value, dict):
        yield place, names
    if inner:
        if not isinstance(value, dict):
            yield place, "\n".join(names).encode()
        for name, part in inner:
            yield from _leaves(part, seen, place + name)
    elif not isinstance(value, dict):
        try:
            yield place, pickle.dumps(value)
        except Exception:
            yield place, repr(type(value)).encode()
