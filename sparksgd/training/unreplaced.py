"""What no solver's state replaces in a module: numbers, texts, and tensors and arrays that are not trained.

A run that goes on must have the same.  A module that is built from its name may draw some of the tensors
anew each time, as a table of random features without a seed.  Checkpoints hold these, if they are small, and
the run goes on with those that it had.  All else must be built the same again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sparksgd.arithmetic.changes import bits
from sparksgd.arithmetic.flat import FlatModule
from sparksgd.errors import DataError
from sparksgd.training.encoding import as_plain
from sparksgd.training.plain_values import plain_values
from sparksgd.training.saved_state import values_of
from sparksgd.training.value_rules import TEXT, MapOf, Table

__all__ = ["Unreplaced", "check_constants", "take_up", "unreplaced_of"]

log = logging.getLogger("sparksgd")

_MOST_KEPT_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Unreplaced:
    """What a run keeps of its module beside the solver's state, as it is before the first step."""

    digest: str
    """Of numbers, texts, frozen parameters and buffers."""

    attributes: str | None
    """Digest of the tensors and arrays that are neither parameters nor buffers; None: there are none."""

    constants: Mapping[str, Any]
    """What checkpoints hold of it, as `as_plain` gives it: in "tensors", by their paths, copies of the
    tensors and arrays that are drawn anew; empty if there are none.  It is one object in the whole run, so
    that a store need not write it again."""


def unreplaced_of(
    flat: FlatModule, drawn: frozenset[str] = frozenset(), harmless: frozenset[str] = frozenset()
) -> Unreplaced:
    """Return what no solver's state replaces in a module.

    Args:
        flat: the module, before its first step.
        drawn: paths of tensors, arrays and plain values that are others when it is built again.
        harmless: see Plan.harmless; attributes that forward makes anew are not looked at, unless they are
            drawn.
    """
    constants, attributes = dict(flat.constants()), dict(_attributes(flat, harmless, drawn))
    plain, digest, of_attributes = list(plain_values(flat.module)), hashlib.sha256(), hashlib.sha256()
    for held in plain:
        digest.update(f"{held.path}={held.value!r}\n".encode())
    for piece in _digested({path: _dense(tensor) for path, tensor in constants.items()}):
        digest.update(piece)
    for piece in _digested(attributes):
        of_attributes.update(piece)
    kept = {path: value for path, value in (constants | attributes).items() if path in drawn}
    lost = [held.path for held in plain if held.path in drawn]
    lost += [path for path, value in kept.items() if not _can_be_written(value)]
    if not lost and sum(value.nbytes for value in kept.values()) > _MOST_KEPT_BYTES:
        lost = list(kept)
    if lost:  # where it goes on, the run would be refused
        log.warning(
            "the module draws %s anew whenever it is built, which checkpoints cannot hold: if this run is "
            "killed, it cannot go on. Draw with a seed, or let it be a tensor of at most %d MiB in all",
            _listed(lost),
            _MOST_KEPT_BYTES >> 20,
        )
    return Unreplaced(
        digest=digest.hexdigest(),
        attributes=of_attributes.hexdigest() if attributes else None,
        constants=as_plain({"tensors": kept}) if kept and not lost else {},
    )


def check_constants(values: Mapping[str, Any]) -> None:
    """Refuse what cannot be the constants of a checkpoint.

    Args:
        values: `Unreplaced.constants`, decoded.

    Raises:
        DataError: with the path of the value, and the rule.
    """
    Table({"tensors": MapOf(TEXT, _tensor_or_array)})(values, "constants")


def _tensor_or_array(value: Any, path: str) -> None:
    if type(value) not in (torch.Tensor, np.ndarray):
        raise DataError(f"{path} is a {type(value).__name__}, but must be a tensor or an array")


def take_up(flat: FlatModule, kept: Mapping[str, Any]) -> None:
    """Give a module the tensors and arrays that a checkpoint holds; what does not fit is left as it is.

    Args:
        flat: the module, before it is copied or makes a step.
        kept: the tensors and arrays, by their paths.
    """
    held, taken = dict(flat.constants()) | dict(_attributes(flat, frozenset(), frozenset())), []
    for path, value in kept.items():
        now = held.get(path)
        if now is None or _form(now) != _form(value) or not _can_be_written(now):
            continue
        if _bytes(now) == _bytes(value):
            continue
        taken.append(path)
        if isinstance(now, torch.Tensor):
            with torch.no_grad():
                now.detach().copy_(value)
        else:
            now[...] = value
    if taken:
        log.info(
            "the module was built with other values of %s than before: the run goes on with the earlier ones",
            _listed(taken),
        )


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(paths[:5]) + (", ..." if len(paths) > 5 else "")


def _attributes(
    flat: FlatModule, harmless: frozenset[str], drawn: frozenset[str]
) -> Iterator[tuple[str, Any]]:
    """Yield the tensors and arrays that are neither parameters nor buffers, with their paths."""
    module = flat.module
    named = {path for path, _ in (*module.named_parameters(), *module.named_buffers())}
    for path, value in values_of(module):
        is_made_anew = any(path == one or path.startswith((f"{one}[", f"{one}.")) for one in harmless)
        if path not in named and (path in drawn or not is_made_anew):
            yield path, value


def _digested(values: Mapping[str, Any]) -> Iterator[Any]:
    for path, value in sorted(values.items(), key=lambda named: named[0]):
        yield f"{path} {value.dtype} {tuple(value.shape)}\n".encode()
        yield _bytes(value)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return a frozen parameter or buffer as digests of the version before had it."""
    return tensor if tensor.layout is torch.strided else tensor.detach().to_dense()


def _bytes(value: Any) -> bytes | memoryview:
    return value.tobytes() if isinstance(value, np.ndarray) else bits(value).data


def _form(value: Any) -> tuple[object, ...]:
    kind = torch.Tensor if isinstance(value, torch.Tensor) else type(value)
    return kind, value.dtype, tuple(value.shape)


def _can_be_written(value: Any) -> bool:
    """Return whether a checkpoint gives back the same, and a module that was built anew can take it up."""
    if isinstance(value, np.ndarray):
        described = np.lib.format.dtype_to_descr(value.dtype)
        is_whole = type(value) is np.ndarray and np.lib.format.descr_to_dtype(described) == value.dtype
        return bool(is_whole and value.flags.writeable)
    is_plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided
    return is_plain and not value.is_quantized and value.device.type == "cpu"
