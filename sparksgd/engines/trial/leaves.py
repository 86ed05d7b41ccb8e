"""What the gradient of a loss flows to: each leaf of autograd's graph must be a parameter that is trained."""

from __future__ import annotations

import torch
from torch import nn

from sparksgd.engines.trial.ownership import Owned, named_tensors, reached_past_the_copy
from sparksgd.errors import ModelError

__all__ = ["Leaves", "leaves_of"]


def leaves_of(result: torch.Tensor) -> list[torch.Tensor]:
    """Return the leaves that require a gradient in the graph of a tensor, each once."""
    found: dict[int, torch.Tensor] = {}
    known, waiting = set(), [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in known:
            continue
        known.add(node)
        variable = getattr(node, "variable", None)  # of an AccumulateGrad
        if isinstance(variable, torch.Tensor):
            found[id(variable)] = variable
        waiting += [following for following, _ in node.next_functions]
    return list(found.values())


class Leaves:
    """Looks at the graphs of several steps.

    A leaf that forward makes anew in each step, such as a position that forces are derived for, is no
    parameter in plain torch either.  One that comes again would have to be trained.

    Args:
        copy: the module that is tried.
        loss: the loss.
        owned: the tensors of the caller's module.
    """

    def __init__(self, copy: nn.Module, loss: object, owned: Owned) -> None:
        self._copy, self._loss, self._owned = copy, loss, owned
        # With a parameter that an own `parameters()` leaves out.
        self._ours = {id(parameter) for _, parameter in nn.Module.named_parameters(copy)}
        self._strangers: dict[int, torch.Tensor] = {}  # kept, so that no other tensor gets their ids

    def check(self, losses: torch.Tensor) -> None:
        """Refuse losses whose gradient flows to something that is not trained.

        Raises:
            ModelError: with the path of the tensor, where it has one.
        """
        if not losses.requires_grad:
            raise ModelError(
                "no parameter gets a gradient: the loss does not depend on one by operations that torch "
                "differentiates. Look for detach(), no_grad(), argmax or numpy in forward and in the "
                "loss, or for a forward that uses another module than self"
            )
        for leaf in leaves_of(losses):
            if id(leaf) in self._ours:
                continue
            name = self._owned.name_of(leaf)
            if name is not None:
                raise ModelError(reached_past_the_copy(name))
            if id(leaf) in self._strangers:
                raise ModelError(self._stranger(leaf))
            self._strangers[id(leaf)] = leaf

    def _stranger(self, leaf: torch.Tensor) -> str:
        for name, tensor in named_tensors(self._copy, self._loss):
            if tensor is leaf:
                return (
                    f"{name!r} requires a gradient, but is no parameter of the module, so nothing would "
                    "train it: make it an nn.Parameter of the module, or call requires_grad_(False)"
                )
        return (
            f"the loss depends on a tensor of shape {tuple(leaf.shape)} that requires a gradient, but is no "
            f"parameter of the module: a global, a closure or the loss holds it, and nothing would train it. "
            f"Make it a parameter of the module, or call requires_grad_(False)"
        )
