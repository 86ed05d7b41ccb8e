"""What no solver's state replaces in a module: numbers, texts, and tensors and arrays that are not trained.

A run that goes on must have the same.  A module that is built from its name may draw some of the tensors
anew each time, as a table of random features without a seed.  Checkpoints hold these, if they are small, and
the run goes on with those that it had.  All else must be built the same again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
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
from sparksgd.training.value_rules import TEXT, MapOf, Table, optional

__all__ = ["Unreplaced", "checked_constants", "take_up", "unreplaced_of"]

log = logging.getLogger("sparksgd")

_MOST_KEPT_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Unreplaced:
    """What a run keeps of its module beside the solver's state, as it is before the first step."""

    digest: str
    """Of numbers, texts, frozen parameters and buffers."""

    attributes: str | None
    """Digest of the tensors and arrays that are neither parameters nor buffers; None: there are none."""

    values: Mapping[str, Any]
    """What checkpoints hold of it, as `as_plain` gives it: "attributes", and in "values", by their paths,
    copies of the tensors and arrays that are drawn anew.  It is one object in the whole run, so that a store
    need not write it again."""


def unreplaced_of(
    flat: FlatModule, drawn: Iterable[str] = (), harmless: frozenset[str] = frozenset()
) -> Unreplaced:
    """Return what no solver's state replaces in a module.

    Args:
        flat: the module, before its first step.
        drawn: paths of tensors, arrays and plain values that are others when it is built again.
        harmless: see Plan.harmless; attributes that forward makes anew are not looked at.
    """
    constants, attributes = dict(flat.constants()), dict(_attributes(flat, harmless))
    digest = hashlib.sha256()
    plain = list(plain_values(flat.module))
    for held in plain:
        digest.update(f"{held.path}={held.value!r}\n".encode())
    for piece in _told(constants):
        digest.update(piece)
    of_attributes = hashlib.sha256()
    for piece in _told(attributes):
        of_attributes.update(piece)
    others = set(drawn)
    kept = {path: value for path, value in (constants | attributes).items() if path in others}
    is_kept = others.isdisjoint(held.path for held in plain) and all(map(_can_be_written, kept.values()))
    if not is_kept or sum(value.nbytes for value in kept.values()) > _MOST_KEPT_BYTES:
        kept = {}  # the run is refused where it goes on, with the reason
    said = of_attributes.hexdigest() if attributes else None
    values = as_plain({"attributes": said, "values": kept})
    return Unreplaced(digest=digest.hexdigest(), attributes=said, values=values)


def checked_constants(values: dict[str, Any]) -> Mapping[str, Any]:
    """Return what a checkpoint holds of `Unreplaced.values`, decoded.

    Raises:
        DataError: it is something else.
    """
    Table({"attributes": optional(TEXT), "values": MapOf(TEXT, _tensor_or_array)})(values, "constants")
    return values


def _tensor_or_array(value: Any, path: str) -> None:
    if type(value) not in (torch.Tensor, np.ndarray):
        raise DataError(f"{path} is a {type(value).__name__}, but must be a tensor or an array")


def take_up(flat: FlatModule, kept: Mapping[str, Any]) -> None:
    """Give a module the tensors and arrays that a checkpoint holds; what does not fit is left as it is.

    Args:
        flat: the module, before it is copied or makes a step.
        kept: by path, what `Unreplaced.values` had, decoded.
    """
    held, others = dict(flat.constants()) | dict(_attributes(flat, frozenset())), []
    for path, value in kept.items():
        now = held.get(path)
        if now is None or _form(now) != _form(value) or not _can_be_written(now):
            continue
        if _bytes(now) == _bytes(value):
            continue
        others.append(path)
        if isinstance(now, torch.Tensor):
            with torch.no_grad():
                now.detach().copy_(value)
        else:
            now[...] = value
    if others:
        log.info(
            "the module was built with other values of %s than before: the run goes on with the earlier ones",
            ", ".join(others[:5]) + (", ..." if len(others) > 5 else ""),
        )


def _attributes(flat: FlatModule, harmless: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """Yield the tensors and arrays that are neither parameters nor buffers, with their paths."""
    module = flat.module
    named = {path for path, _ in (*module.named_parameters(), *module.named_buffers())}
    for path, value in values_of(module):
        is_made_anew = any(path == one or path.startswith((f"{one}[", f"{one}.")) for one in harmless)
        if path not in named and not is_made_anew:
            yield path, value


def _told(values: Mapping[str, Any]) -> Iterator[Any]:
    for path, value in sorted(values.items(), key=lambda named: named[0]):
        is_sparse = isinstance(value, torch.Tensor) and value.layout is not torch.strided
        dense = value.detach().to_dense() if is_sparse else value
        yield f"{path} {dense.dtype} {tuple(dense.shape)}\n".encode()
        yield _bytes(dense)


def _bytes(value: Any) -> bytes | memoryview:
    return value.tobytes() if isinstance(value, np.ndarray) else bits(value).data


def _form(value: Any) -> tuple[object, ...]:
    kind = torch.Tensor if isinstance(value, torch.Tensor) else type(value)
    return kind, value.dtype, tuple(value.shape)


def _can_be_written(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return bool(value.flags.writeable)
    return value.layout is torch.strided and not value.is_quantized and value.device.type == "cpu"
