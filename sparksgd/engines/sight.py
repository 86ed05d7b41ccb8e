"""What the trial refuses without computing."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from sparksgd.data.schema import RowSchema
from sparksgd.errors import ModelError
from sparksgd.imports import did_you_mean, users_code
from sparksgd.losses import Loss

__all__ = ["refuse_at_sight"]


def refuse_at_sight(module: nn.Module, loss: Loss, schema: RowSchema) -> None:
    """Refuse what can be seen without computing.

    Raises:
        ModelError: with what to do.
    """
    if torch.get_default_dtype() != torch.float32:
        raise ModelError(
            f"torch's default type is {torch.get_default_dtype()}, but must be torch.float32, as on "
            "workers: call torch.set_default_dtype(torch.float32) before the module is made"
        )
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise ModelError(
                f"{path or 'the module'} is a scripted module, whose copies cannot be trained apart: give "
                "the module that torch.jit was given"
            )
    names = [feature.name for feature in schema.features]
    if len(names) > 1:
        _refuse_signature(module, names)
    if isinstance(loss, nn.Module):
        for name, parameter in nn.Module.named_parameters(loss):
            if parameter.requires_grad:
                raise ModelError(
                    f"the loss {type(loss).__name__} has the trainable parameter {name!r}, but only the "
                    "module's are trained: make it a part of the module, whose forward returns what the "
                    "loss needs"
                )
    ours = {id(parameter) for _, parameter in nn.Module.named_parameters(module)}
    for name, parameter in nn.Module.named_parameters(module):
        if parameter._post_accumulate_grad_hooks:
            raise ModelError(
                f"parameter {name!r} has a post-accumulate-grad hook, which would run for each piece, not "
                "for each step: use register_hook, or do it in the optimiser"
            )
    with users_code("parameters()"):
        given = list(module.parameters())
    for parameter in given:
        if id(parameter) not in ours:
            raise ModelError(
                f"parameters() of {type(module).__name__} gives a tensor of shape {tuple(parameter.shape)} "
                "that is no parameter of the module: register it as nn.Parameter"
            )


def _refuse_signature(module: nn.Module, names: list[str]) -> None:
    """Refuse a forward that does not take the features by their names."""
    if "self" in names:
        raise ModelError("the feature 'self' cannot be an argument of forward: rename the column")
    try:
        takes = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return
    if any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in takes):
        return
    if any(argument.kind is inspect.Parameter.VAR_POSITIONAL for argument in takes):
        raise ModelError(
            "forward takes *args, but several features are given by name: write forward(self, "
            f"{', '.join(names)})"
        )
    by_name = [a.name for a in takes if a.kind is not inspect.Parameter.POSITIONAL_ONLY]
    for name in names:
        if name not in by_name:
            raise ModelError(
                f"data.features has {name!r}, which is no argument of forward{did_you_mean(name, by_name)}"
            )
    for argument in takes:
        if argument.default is inspect.Parameter.empty and argument.name not in names:
            raise ModelError(
                f"forward needs {argument.name!r}, which data.features does not name: add the column, or "
                "give the argument a default"
            )
