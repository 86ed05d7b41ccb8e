"""What the trial refuses without computing, and how it names what forward made or cannot be saved."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from sparksgd.data.schema import RowSchema
from sparksgd.errors import ModelError
from sparksgd.imports import did_you_mean, users_code
from sparksgd.losses import Loss

__all__ = ["refuse_at_sight", "refuse_new_structure", "refuse_unsavable", "structure"]


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


def structure(module: nn.Module) -> dict[str, tuple[str, int]]:
    """Return the paths of a module's parts and tensors, each with what it is, and which object."""
    return {
        **{path: ("the submodule", 0) for path, _ in module.named_modules()},
        **{path: ("the buffer", 0) for path, _ in nn.Module.named_buffers(module)},
        **{path: ("the parameter", id(parameter)) for path, parameter in nn.Module.named_parameters(module)},
    }


def refuse_new_structure(before: dict[str, tuple[str, int]], after: dict[str, tuple[str, int]]) -> None:
    """Refuse a forward that makes or removes parts of its module.

    Raises:
        ModelError: with the path of the part.
    """
    for path in {**before, **after}:
        if before.get(path) != after.get(path):
            what, _ = after.get(path) or before[path]
            did = "replaces" if path in before and path in after else "makes" if path in after else "removes"
            raise ModelError(
                f"forward {did} {what} {path!r}, which would be lost: workers share values, not parts. "
                "Make all parts in __init__ (torch's lazy modules get their shapes from the first rows), "
                "and change only values in forward"
            )


def refuse_unsavable(module: nn.Module) -> None:
    """Refuse a module whose state_dict cannot be saved and loaded again.

    Raises:
        ModelError: with the key.
    """
    with users_code("the module's state_dict"):
        state = module.state_dict()
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ModelError(
                f"state_dict() holds {key!r}, a {type(value).__name__}, but a saved model holds tensors "
                "alone: keep it as a buffer instead of get_extra_state or a state_dict hook"
            )
    try:
        module.load_state_dict(state)
    except Exception as error:
        raise ModelError(
            f"the module cannot load its own state_dict(), so no saved model could be used "
            f"({type(error).__name__}: {error}): let its state_dict hooks and load_state_dict hooks fit"
        ) from error
