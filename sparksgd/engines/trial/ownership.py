"""Whose a tensor is: names of all that a module holds, what overlaps in memory, what a copy must not touch.

A copy of a module is trained, never the caller's own.  So a forward that reaches a tensor of the caller's
module past the copy (by a global, an attribute of a class, an argument's default) would read values that
never change.  What the module itself refers to is copied along: closures, hooks, weak references.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from sparksgd.arithmetic.copies import parts
from sparksgd.arithmetic.generators import generators_kept
from sparksgd.arithmetic.settings import HeldSettings
from sparksgd.arithmetic.standing import extent
from sparksgd.arithmetic.structure import Structure
from sparksgd.engines.held import HeldBytes, is_opaque, is_plain
from sparksgd.engines.trial.operations import storage_of
from sparksgd.engines.watch import Watch
from sparksgd.errors import ModelError

__all__ = [
    "Owned",
    "left_alone",
    "named_tensors",
    "reached_past_the_copy",
    "refuse_shared_memory",
]

_EXACT = 1 << 22
"""Most elements of two tensors whose addresses are compared one by one."""

_PLAIN = (int, float, complex, str, bytes, type(None), type)


def named_tensors(module: nn.Module, loss: object = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor that a module and a loss hold, once, with its path: parameters, buffers, then others.

    Others are in attributes, in lists and objects among these, in hooks, and in what functions close over.
    An array of numpy is given as a tensor that shares its memory.
    """
    seen = set[int]()
    named = [*nn.Module.named_parameters(module), *nn.Module.named_buffers(module)]
    for name, tensor in named:
        seen.add(id(tensor))
        yield name, tensor
    waiting: list[tuple[str, Any]] = [("loss", loss), ("", module)]
    waiting += [(path + step, part) for path, tensor in reversed(named) for step, part in parts(tensor)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield path.lstrip("."), value
        elif isinstance(value, np.ndarray):
            if value.dtype.kind in "fiub" and value.flags.writeable:
                yield path.lstrip("."), torch.from_numpy(value)
            continue
        elif is_plain(value) or (is_opaque(value) and not isinstance(value, nn.Module)):
            continue
        waiting += [(path + step, part) for step, part in reversed(list(parts(value)))]


class Owned:
    """The tensors that the caller's module holds.

    Args:
        module: the caller's, not the copy.
    """

    def __init__(self, module: nn.Module) -> None:
        self._places: dict[int, list[tuple[range, str]]] = {}
        for name, tensor in named_tensors(module):
            address = storage_of(tensor)
            if address:
                self._places.setdefault(address, []).append((extent(tensor), name))

    @property
    def storages(self) -> set[int]:
        """Return the addresses of their storages."""
        return set(self._places)

    def name_of(self, tensor: torch.Tensor) -> str | None:
        """Return the path of the caller's tensor whose memory a tensor is, or is a view of."""
        places = self._places.get(storage_of(tensor), [])
        mine = extent(tensor)
        within = [name for its, name in places if its.start < mine.stop and mine.start < its.stop]
        return next(iter([*within, *(name for _, name in places)]), None)

    def refuse(self, met: dict[int, torch.Tensor]) -> None:
        """Refuse a copy that used one of them.

        Raises:
            ModelError: with the path of the tensor.
        """
        for tensor in met.values():
            raise ModelError(reached_past_the_copy(self.name_of(tensor) or "a tensor"))


def reached_past_the_copy(name: str) -> str:
    """Return what is wrong with a forward that uses a tensor of the caller's module."""
    return (
        f"forward, the loss or a hook uses {name!r} of the module that was copied, not of the copy: a "
        "global, a class or an argument's default holds it, which is not copied, so it would never train. "
        "Reach it by self, or by a variable that the function closes over"
    )


def refuse_shared_memory(module: nn.Module, loss: object = None) -> None:
    """Refuse trainable parameters that share memory with another tensor or array, or with themselves.

    The same parameter at two places is tied, and stays so.  Two tensors that are views of the same memory
    would come apart, because each parameter gets a place of its own in the vector that is trained.

    Raises:
        ModelError: with both paths.
    """
    held = [
        (where.start, where.stop, number, name, tensor)
        for number, (name, tensor) in enumerate(named_tensors(module, loss))
        if storage_of(tensor) and (where := extent(tensor))
    ]
    for *_, name, tensor in held:
        if _trains(tensor) and any(
            stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ):
            raise ModelError(
                f"parameter {name!r} is expanded: several of its elements are one number in memory, and "
                "training would part them. Keep the small tensor as the parameter, and expand it in forward"
            )
    held.sort(key=lambda one: one[:3])
    for index, (_, end, number, name, tensor) in enumerate(held):
        for start, _, other_number, other_name, other in held[index + 1 :]:
            if start >= end:
                break
            two = sorted([(number, name, tensor), (other_number, other_name, other)], key=lambda one: one[0])
            two.sort(key=lambda one: not _trains(one[2]))
            (_, first_name, first), (_, second_name, second) = two
            if _trains(first) and _overlap(first, second) and not _follows(first_name, second_name):
                raise ModelError(_shared(first_name, second_name, second))


def _shared(name: str, other_name: str, other: torch.Tensor) -> str:
    move = (
        "give both the same parameter, and transpose or slice it in forward"
        if isinstance(other, nn.Parameter)
        else "compute it in forward, or keep a clone"
    )
    return (
        f"parameter {name!r} and {other_name!r} share memory, but are two tensors: training would part "
        f"them, as each parameter becomes a view of its own. Next: {move}"
    )


def _trains(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad


def _follows(name: str, other: str) -> bool:
    """Return whether a hook of torch makes the other tensor anew in each forward, as spectral_norm does."""
    return name == f"{other}_orig"


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors, whose extents overlap, have an element in common."""
    if one.is_nested or other.is_nested:
        return True
    if one.numel() + other.numel() > _EXACT or one.element_size() != other.element_size():
        return True
    return bool(np.isin(_elements(one), _elements(other)).any())


def _elements(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return the address of each element."""
    places = np.array([tensor.data_ptr()])
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = (places[:, None] + np.arange(size) * stride * tensor.element_size()).reshape(-1)
    return places


@contextmanager
def left_alone(module: nn.Module, loss: object) -> Iterator[set[str]]:
    """In the block, copies may run; then everything of the caller's is as it was before.

    Copies share with the caller's own objects what is global: generators, settings of torch and numpy,
    variables of Python files, attributes of classes.

    Yields:
        Takes the paths of what a piece may leave changed; see `harmless_state`.

    Raises:
        ModelError: a setting changed; or a tensor or an attribute of the module itself did, though only
            copies ran.
    """
    harmless: set[str] = set()
    watch, structure = Watch(module, loss), Structure(module)
    tensors = [*nn.Module.named_parameters(module), *nn.Module.named_buffers(module)]
    held = [HeldBytes(name, tensor) for name, tensor in tensors if not tensor.is_meta]
    gradients = [(tensor, tensor.grad) for _, tensor in tensors if tensor.is_leaf]
    changed: list[str] = []
    attributes: list[str] = []
    with generators_kept(), HeldSettings() as settings:
        try:
            with settings.blamed("the module or its loss"):
                yield harmless
            structure.check()
            changed = [one.path for one in held if one.is_changed()]
            attributes = [path for path in watch.changed() if path not in harmless]
        finally:
            structure.restore()
            watch.restore()
            for one in held:
                if one.is_changed():
                    one.restore()
            for tensor, gradient in gradients:
                if tensor.grad is not gradient:
                    tensor.grad = gradient
    for path in changed:
        raise ModelError(reached_past_the_copy(path))
    for path in attributes:
        raise ModelError(
            f"forward, the loss or a hook set {path!r} of the module that was copied, not of the copy: a "
            "global, a class or an argument's default holds that module. Let it set an attribute of self, or "
            "keep nothing"
        )
