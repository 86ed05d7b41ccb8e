"""Training and evaluation mode, as torch's own loops set them.

A class may override `train` or `eval`: adapters merge into the weights, a backbone stays frozen, a cache is
made.  Torch's loops call `train()` before the first step, `eval()` before an evaluation, and `train()` after
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sparksgd.arithmetic.flat import FlatModule
from sparksgd.imports.torch_code import users_torch_code

__all__ = ["begin_training", "evaluating", "overrides_modes"]


def overrides_modes(module: nn.Module) -> bool:
    """Return whether a class in the module has its own `train` or `eval`."""
    return any(
        kind.train is not nn.Module.train or kind.eval is not nn.Module.eval
        for kind in {type(part) for part in module.modules()}
    )


def begin_training(module: nn.Module) -> None:
    """Call a module's own `train`, once before the first copy is made; what the caller set to eval() stays.

    Raises:
        UserCodeError: it raised.
    """
    if not overrides_modes(module):
        return
    modes, trains = [(part, part.training) for part in module.modules()], module.training
    with users_torch_code("the module's train()"):
        module.train(trains)
    for part, training in modes:
        part.training = training and (part.training or not trains)


@contextmanager
def evaluating(flat: FlatModule) -> Iterator[None]:
    """Keep a module in evaluation mode in the block, without gradients; then all is as before.

    Modes, parameters and buffers are restored, so that it does not matter who evaluates, or when.

    Args:
        flat: the module, which `flat.standing.at` gave its parameters.

    Raises:
        UserCodeError: the module's own `train` or `eval` raised.
        ModelError: the evaluation made, removed or replaced a parameter or submodule.
    """
    module = flat.module
    modes = [(part, part.training) for part in module.modules()]
    statistics, counters = flat.statistics(), flat.counters()
    calls_train = overrides_modes(module)
    try:
        with flat.standing.unchanged():
            try:
                with users_torch_code("the module's eval()"):
                    module.eval()
                with torch.no_grad():  # inference_mode would spoil what a module caches
                    yield
            finally:
                if calls_train:
                    with users_torch_code("the module's train()"):
                        module.train(modes[0][1])
    finally:
        for part, training in modes:
            part.training = training
        flat.load_buffers(statistics, counters)
