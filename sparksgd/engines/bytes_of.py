"""The bytes of tensors and arrays of any layout: copies of them, and whether they are the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

__all__ = ["components", "copy_of", "same_bytes"]


def copy_of(value: Any) -> Any:
    """Return a copy of a tensor, an array or a bytearray."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return value.copy()


def same_bytes(before: Any, now: Any) -> bool:
    """Return whether two of one kind have the same form and bytes; objects in arrays must be the same."""
    if isinstance(before, bytearray):
        return bool(before == now)
    if isinstance(before, np.ndarray):
        if before.shape != now.shape or before.dtype != now.dtype:
            return False
        if before.dtype.hasobject:
            return all(
                a is b for a, b in zip(before.ravel().tolist(), now.ravel().tolist(), strict=True)
            ) or bool(np.array_equal(before, now))
        return bool(before.tobytes() == now.tobytes())
    if before.dtype != now.dtype or before.layout != now.layout or before.is_nested != now.is_nested:
        return False
    if before.is_nested:
        mine, theirs = components(before), components(now)
        return len(mine) == len(theirs) and all(map(same_bytes, mine, theirs))
    if before.shape != now.shape:
        return False
    if before.is_meta or now.is_meta:
        return bool(before.is_meta and now.is_meta)
    if before.layout is not torch.strided or before.is_quantized:
        mine, theirs = components(before), components(now)
        return len(mine) == len(theirs) and all(map(same_bytes, mine, theirs))
    return torch.equal(_as_bytes(before), _as_bytes(now))


def components(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the strided tensors that a nested, sparse or quantised one consists of."""
    tensor = tensor.detach()
    if tensor.is_nested:
        if tensor.layout is torch.jagged:
            return [tensor.values(), tensor.offsets()]  # type: ignore[attr-defined]  # jagged ones have it
        return list(tensor.unbind())
    if tensor.is_quantized:
        return [tensor.int_repr()]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor.to_dense()]


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else flat
