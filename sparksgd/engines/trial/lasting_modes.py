"""What a module's own `train()` and `eval()`, or a forward in evaluation, would change for good.

An evaluation leaves no trace here, because any worker may make it, at any time.  So what torch's own loops
would keep of it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from sparksgd.arithmetic.copies import copied
from sparksgd.engines.bytes_of import same_bytes
from sparksgd.engines.modes import overrides_modes
from sparksgd.engines.watch import Watch
from sparksgd.errors import ModelError
from sparksgd.imports.torch_code import users_torch_code
from sparksgd.models.losses import Loss

__all__ = ["changed_names", "refuse_lasting_modes", "values_of"]

_CYCLES = 4


def refuse_lasting_modes(module: nn.Module, loss: Loss, harmless: frozenset[str]) -> None:
    """Refuse `train()` and `eval()` of the module's own that leave something changed after both.

    Args:
        module: not changed; a copy is tried.
        loss: likewise.
        harmless: see Plan.harmless.

    Raises:
        ModelError: with the path of what they change.
    """
    if not overrides_modes(module):
        return
    module, loss = copied((module, loss), {"": module, "loss": loss})
    before, modes = values_of(module), [(part, part.training) for part in module.modules()]
    watch: Watch | None = None
    for _ in range(_CYCLES):
        with users_torch_code("the module's eval() or train()"):
            module.eval()
            module.train(modes[0][1])
        for part, training in modes:
            part.training = training
        watch = watch or Watch(module, loss, harmless)  # after the first: a cache may be made once
    assert watch is not None
    kept = [path for path in watch.changed() if path not in harmless]
    for name in [*changed_names(before, module), *kept]:
        raise ModelError(
            f"the module's own eval() or train() changes {name} for good, but an evaluation leaves no trace: "
            f"any worker may make it. Let eval() and train() undo each other, or change it in forward"
        )


def values_of(module: nn.Module, *, buffers_alone: bool = False) -> dict[str, tuple[torch.Tensor, bool]]:
    """Return copies of a module's parameters and buffers, each with whether it requires a gradient.

    Args:
        module: has them.
        buffers_alone: whether parameters may change, as an embedding's with max_norm do.
    """
    return {
        name: (tensor.detach().clone(), tensor.requires_grad)
        for name, tensor in _named(module)
        if not (buffers_alone and isinstance(tensor, nn.Parameter))
    }


def changed_names(before: dict[str, tuple[torch.Tensor, bool]], module: nn.Module) -> list[str]:
    """Return the names of tensors that changed by more than rounding, or became frozen or trained.

    Args:
        before: from `values_of`.
        module: has them now.
    """
    now = dict(_named(module))
    return [
        name
        for name, (value, requires_grad) in before.items()
        if name in now
        and (now[name].requires_grad != requires_grad or not _is_close(value, now[name].detach()))
    ]


def _named(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from nn.Module.named_parameters(module)
    yield from nn.Module.named_buffers(module)


def _is_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.layout is not torch.strided or one.is_quantized or one.is_meta:
        return True  # nothing of torch changes these in place
    if same_bytes(one, other):
        return True
    try:
        return torch.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)
    except RuntimeError:  # of a type without arithmetic, such as float8, which rounds nothing
        return False
