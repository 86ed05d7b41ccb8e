"""What the trial refuses without computing."""

from __future__ import annotations

import inspect

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from sparksgd.data.schema import RowSchema
from sparksgd.errors import ModelError
from sparksgd.imports.torch_code import users_torch_code
from sparksgd.models.losses import Loss

__all__ = ["refuse_at_sight", "refuse_contexts", "refuse_inference_tensors"]


_GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)


def refuse_contexts() -> None:
    """Refuse a training inside a `with` block that may change what torch computes: workers would not have it.

    Raises:
        ModelError: which one, and what to do.
    """
    modes: list[object] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]  # torch's own
    modes = [mode for mode in [*modes, *_get_current_dispatch_mode_stack()] if not _is_of_the_cpu(mode)]
    if modes and isinstance(modes[0], DeviceContext):
        raise ModelError(
            f"torch's default device is {modes[0].device}, but only the CPU is supported: call "
            f"torch.set_default_device(None) before, or train outside of `with torch.device(...)`"
        )
    names = [f"{type(mode).__module__}.{type(mode).__qualname__}" for mode in modes]
    if _hooks_of_saved_tensors() is not None:
        names.append("torch.autograd.graph.saved_tensors_hooks, or save_on_cpu")
    if names:
        raise ModelError(
            f"the training runs inside {names[0]}, which may change what torch computes in this process "
            f"alone: workers would not have it. Enter it in forward, or train outside of it"
        )


def _hooks_of_saved_tensors() -> object:
    """Return the hooks that all tensors get that are saved for backward; None also before torch 2.8."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return None if top is None else top(True)


def refuse_inference_tensors(module: nn.Module) -> None:
    """Refuse a module that was made in inference mode.

    Raises:
        ModelError: one of its tensors, and what to do.
    """
    for name, tensor in [*nn.Module.named_parameters(module), *nn.Module.named_buffers(module)]:
        if not nn.parameter.is_lazy(tensor) and tensor.is_inference():
            raise ModelError(
                f"{name} was made in torch.inference_mode, so it cannot be trained: make the module outside "
                f"of it"
            )


def _is_of_the_cpu(mode: object) -> bool:
    """Return whether a mode is that of `torch.device("cpu")` or of `torch.set_default_device("cpu")`."""
    return isinstance(mode, DeviceContext) and mode.device.type == "cpu"


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
    for name in _GLOBAL_HOOKS:
        if getattr(torch.nn.modules.module, name):
            raise ModelError(
                f"torch has a hook for all modules ({name.removeprefix('_global_')}), which workers would "
                "not have: register it on the module itself, or remove it before the training"
            )
    names = [feature.name for feature in schema.features]
    _refuse_signature(module, names)
    ours = {id(parameter) for _, parameter in nn.Module.named_parameters(module)}
    if isinstance(loss, nn.Module):
        for name, parameter in nn.Module.named_parameters(loss):
            if parameter.requires_grad and id(parameter) not in ours:
                raise ModelError(
                    f"the loss {type(loss).__name__} has the trainable parameter {name!r}, but only the "
                    "module's are trained: make it a part of the module, whose forward returns what the "
                    "loss needs"
                )
    for name, parameter in nn.Module.named_parameters(module):
        if parameter._post_accumulate_grad_hooks:
            raise ModelError(
                f"parameter {name!r} has a post-accumulate-grad hook, which would run for each piece, not "
                "for each step: use register_hook, or do it in the optimiser"
            )
    with users_torch_code("parameters()"):
        given = list(module.parameters())
    for parameter in given:
        if id(parameter) not in ours:
            raise ModelError(
                f"parameters() of {type(module).__name__} gives a tensor of shape {tuple(parameter.shape)} "
                "that is no parameter of the module: register it as nn.Parameter"
            )


def _refuse_signature(module: nn.Module, features: list[str]) -> None:
    """Refuse a forward that does not take the features."""
    columns = ", ".join(map(repr, features))
    if len(features) > 1 and "self" in features:
        raise ModelError(
            f"data.features is {columns}, but several features reach forward as keyword arguments, of which "
            f"none may be called 'self': rename that column"
        )
    try:
        signature = inspect.signature(module.forward)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*features) if len(features) == 1 else signature.bind(**dict.fromkeys(features))
    except TypeError as error:
        how = (
            "the only feature is passed by position"
            if len(features) == 1
            else "several features are passed by name (*args takes none of them)"
        )
        raise ModelError(
            f"data.features is {columns}, but forward of {type(module).__name__} takes {signature}: {error}; "
            f"{how}. Give forward an argument for each feature, of its name, or set data.features"
        ) from error
