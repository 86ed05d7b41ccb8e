"""Whose a tensor is: names of all that a module holds, what overlaps in memory, what a copy must not touch.

A copy of a module is trained, never the caller's own.  So a forward that reaches a tensor of the caller's
module past the copy (by a lambda, a closure, a hook, a weak reference or a global) would read values that
never change.  Only tensors are looked at; other state of Python is not.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from sparksgd.arithmetic.numerics import generator_kept
from sparksgd.engines.operations import storage_of
from sparksgd.errors import ModelError

__all__ = [
    "Owned",
    "digest_of_tensor",
    "left_alone",
    "named_tensors",
    "reached_past_the_copy",
    "refuse_shared_memory",
]

_EXACT = 1 << 22
"""Most elements of two tensors whose addresses are compared one by one."""


def named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor that a module holds, once, with its path: parameters, buffers, then attributes.

    Attributes are those of all submodules and parameters, and what lists, tuples and dicts among them hold.
    """
    known = set[int]()

    def new(tensor: torch.Tensor) -> bool:
        is_new = id(tensor) not in known
        known.add(id(tensor))
        return is_new

    yield from ((name, tensor) for name, tensor in nn.Module.named_parameters(module) if new(tensor))
    yield from ((name, tensor) for name, tensor in nn.Module.named_buffers(module) if new(tensor))
    for prefix, part in module.named_modules():
        for name, value in _attributes(part):
            path = f"{prefix}.{name}" if prefix else name
            yield from ((where, tensor) for where, tensor in _held(path, value) if new(tensor))
    for path, parameter in nn.Module.named_parameters(module):
        for name, value in vars(parameter).items():
            yield from ((where, tensor) for where, tensor in _held(f"{path}.{name}", value) if new(tensor))


def _attributes(part: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from ((n, v) for n, v in vars(part).items() if n not in ("_parameters", "_buffers", "_modules"))


def _held(path: str, value: Any, depth: int = 3) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif depth and isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _held(f"{path}[{index}]", item, depth - 1)
    elif depth and isinstance(value, dict):
        for key, item in value.items():
            yield from _held(f"{path}[{key!r}]", item, depth - 1)


class Owned:
    """The tensors that the caller's module holds.

    Args:
        module: the caller's, not the copy.
    """

    def __init__(self, module: nn.Module) -> None:
        self._places: dict[int, list[tuple[int, int, str]]] = {}
        for name, tensor in named_tensors(module):
            address = storage_of(tensor)
            if address:
                self._places.setdefault(address, []).append((*_extent(tensor), name))

    @property
    def storages(self) -> set[int]:
        """Return the addresses of their storages."""
        return set(self._places)

    def name_of(self, tensor: torch.Tensor) -> str | None:
        """Return the path of the caller's tensor whose memory a tensor is, or is a view of."""
        places = self._places.get(storage_of(tensor), [])
        start, end = _extent(tensor) if places else (0, 0)
        within = [name for first, last, name in places if first < end and start < last]
        return next(iter([*within, *(name for _, _, name in places)]), None)

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
        "lambda, a closure, a hook, a weak reference or a global holds it, and it would never train. "
        "Write it as a method, which gets the copy as self, or give forward what it needs by a submodule"
    )


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first byte in its storage that a strided tensor uses, and the one after the last."""
    if tensor.numel() == 0:
        return 0, 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    start = int(tensor.storage_offset()) * tensor.element_size()
    return start, start + (last + 1) * tensor.element_size()


def refuse_shared_memory(module: nn.Module) -> None:
    """Refuse trainable parameters that share memory with another tensor of the module, or with themselves.

    The same parameter at two places is tied, and stays so.  Two tensors that are views of the same memory
    would come apart, because each parameter gets a place of its own in the vector that is trained.

    Raises:
        ModelError: with both paths.
    """
    places: dict[int, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in named_tensors(module):
        address = storage_of(tensor)
        if address and tensor.numel():
            places.setdefault(address, []).append((name, tensor))
    for held in places.values():
        for number, (name, tensor) in enumerate(held):
            if not _trains(tensor):
                continue
            if any(
                stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
            ):
                raise ModelError(
                    f"parameter {name!r} is expanded: several of its elements are one number in memory, "
                    "and training would part them. Keep the small tensor as the parameter, and expand it "
                    "in forward"
                )
            for index, (other_name, other) in enumerate(held):
                if index == number or (index < number and _trains(other)):
                    continue
                if _overlap(tensor, other) and not _follows(name, other_name):
                    raise ModelError(_shared(name, other_name, other))


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
    """Return whether two views of one storage have an element in common."""
    (start, end), (first, last) = _extent(one), _extent(other)
    if not (start < last and first < end):
        return False
    if one.numel() + other.numel() > _EXACT or one.element_size() != other.element_size():
        return True
    return bool(np.isin(_elements(one), _elements(other)).any())


def _elements(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return the place in its storage of each element."""
    places = np.array([tensor.storage_offset()])
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = (places[:, None] + np.arange(size) * stride).reshape(-1)
    return places


def digest_of_tensor(tensor: torch.Tensor) -> int:
    """Return a checksum of a tensor's bytes, of any type; of a sparse one, of its values."""
    values = tensor.detach()
    if values.layout != torch.strided:
        return hash(tuple(digest_of_tensor(part) for part in _strided_parts(values)))
    if values.is_meta or not values.numel():
        return 0
    flat = values.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data)


def _strided_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if tensor.layout == torch.sparse_coo:
        whole = tensor.coalesce()
        return whole.indices(), whole.values()
    return (tensor.to_dense(),)


@contextmanager
def left_alone(module: nn.Module) -> Iterator[None]:
    """In the block, copies of a module may run; then everything of the caller's is as it was before.

    The generators of torch, numpy and random, torch's threads and default type, and the attributes of the
    module are restored.

    Raises:
        ModelError: a tensor or an attribute of the module itself changed, though only copies ran.
    """
    parts = [(path, part, _contents(part)) for path, part in module.named_modules()]
    tensors = [(name, tensor, digest_of_tensor(tensor), tensor.grad if tensor.is_leaf else None)
               for name, tensor in named_tensors(module)]  # fmt: skip
    generators = [
        (value, value.get_state())
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, torch.Generator)
    ]
    default, numbers, others = (
        torch.get_default_dtype(),
        np.random.get_state(),
        random.getstate(),
    )  # the global one is what is restored
    changed: str | None = None
    threads = torch.get_num_threads()
    with generator_kept():
        try:
            yield
            changed = next((name for name, t, before, _ in tensors if digest_of_tensor(t) != before), None)
        finally:
            torch.set_default_dtype(default)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            np.random.set_state(numbers)
            random.setstate(others)
            for generator, state in generators:
                generator.set_state(state)
            for name, tensor, _, gradient in tensors:
                if tensor.is_leaf and tensor.grad is not gradient:
                    tensor.grad, changed = gradient, changed or name
            attribute = _restored(parts)
    if changed is not None:
        raise ModelError(reached_past_the_copy(changed))
    if attribute is not None:
        raise ModelError(
            f"a forward of a copy set {attribute!r} of the module that was copied: a lambda, a closure or "
            "a hook holds that module. Register a method as the hook, which copies take along, or keep "
            "nothing"
        )


def _contents(part: nn.Module) -> dict[str, dict[str, Any]]:
    kinds = ("_parameters", "_buffers", "_modules")
    own = {kind: dict(vars(part)[kind]) for kind in kinds if isinstance(vars(part).get(kind), dict)}
    return {"": dict(vars(part)), **own}


def _restored(parts: list[tuple[str, nn.Module, dict[str, dict[str, Any]]]]) -> str | None:
    """Give modules the attributes that they had; return the path of one that had changed."""
    changed = None
    for path, part, contents in parts:
        for kind, before in contents.items():
            now = vars(part)[kind] if kind else vars(part)
            differing = [n for n in {**now, **before} if now.get(n, now) is not before.get(n, before)]
            if differing:
                changed = changed or ".".join(filter(None, [path, differing[0]]))
                now.clear()
                now.update(before)
    return changed
