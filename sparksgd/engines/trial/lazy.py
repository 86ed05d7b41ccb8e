"""torch's lazy modules: they get their shapes from the first rows, and are ordinary from then on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from sparksgd.arithmetic.flat import is_lazy
from sparksgd.arithmetic.generators import generators_seeded
from sparksgd.arithmetic.seeds import seed32
from sparksgd.errors import ModelError

__all__ = ["has_lazy_parts", "take_shapes"]


def has_lazy_parts(module: nn.Module) -> bool:
    """Return whether a parameter or a buffer of the module has no shape yet."""
    tensors = [*nn.Module.parameters(module), *nn.Module.buffers(module)]
    return any(is_lazy(tensor) for tensor in tensors)


def take_shapes(module: nn.Module, twin: nn.Module, run: Callable[[], object], seed: int) -> list[str]:
    """Give lazy parts the shapes and first values that they take in a forward; return their paths.

    A copy runs, so that forward changes nothing else of the module.  The values are drawn from the seed.

    Args:
        module: changed in place; its parameters and buffers stay the same objects.
        twin: a copy of it.
        run: computes a forward of the copy.
        seed: of the experiment.

    Raises:
        ModelError: forward does not reach a lazy part.
    """
    for part in twin.modules():
        part.training = False  # so that no running statistics move
    with generators_seeded(seed32(seed, "lazy")), torch.no_grad():
        run()
    shaped = []
    with torch.no_grad():
        for (path, part), (_, other) in zip(module.named_modules(), twin.named_modules(), strict=True):
            if _is_lazy(part) and not _is_lazy(other):
                _become(part, other)
                shaped.append(path)
    for name, tensor in [*nn.Module.named_parameters(module), *nn.Module.named_buffers(module)]:
        if is_lazy(tensor):
            raise ModelError(
                f"{name} has no shape yet, because no forward reached its lazy module: remove it, or use it"
            )
    return shaped


def _is_lazy(part: nn.Module) -> bool:
    return isinstance(part, LazyModuleMixin)


def _become(part: nn.Module, other: nn.Module) -> None:
    """Make a lazy part what its copy has become, as torch does it itself after the first forward."""
    for mine, theirs in ((part._parameters, other._parameters), (part._buffers, other._buffers)):
        for name, tensor in mine.items():
            values = theirs[name]
            if tensor is None or values is None:
                continue
            if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
                tensor.materialize(values.shape)
            tensor.data.copy_(values)
    for hook in ("_initialize_hook", "_load_hook"):
        getattr(part, hook).remove()
        delattr(part, hook)
    kept = ("training", "_parameters", "_buffers", "_modules")
    own = {name: value for name, value in vars(other).items() if name not in kept and "hook" not in name}
    vars(part).update(own)
    part.__class__ = type(other)
