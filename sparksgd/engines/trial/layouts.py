"""Whether a module computes the same however its memory lies: channels last, parameters in one vector."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.autograd.graph import increment_version

from sparksgd.arithmetic.constants import Constants
from sparksgd.engines.forward import back_propagate
from sparksgd.engines.trial.chance import MIDDLE
from sparksgd.engines.trial.measured import Measured, gradient_of, measured
from sparksgd.engines.trial.operations import Operations
from sparksgd.engines.trial.probe import TRIED_ROWS, Probe, without_batch_statistics
from sparksgd.errors import ModelError, UserCodeError
from sparksgd.models.losses import Loss

__all__ = ["channels_last_differs", "refuse_other_memory"]

_MUCH = 0.01


def channels_last_differs(probe: Probe) -> str | None:
    """Return why convolutions cannot be computed channels last; None if they can."""
    rows = probe.piece or range(TRIED_ROWS)
    plain, evaluated = probe.plain(rows), probe.evaluated(rows)
    try:
        with probe.flat.channels_last():
            other = probe.measure(rows)
            in_evaluation = None if evaluated is None else probe.evaluated(rows, refuses=True)
    except UserCodeError as error:
        return f"channels last, the module or its loss raised: {str(error).strip().splitlines()[-1].strip()}"
    found = probe.difference(plain, [other])
    if found is None and evaluated is not None and in_evaluation is not None:
        found = probe.difference(evaluated, [in_evaluation])
    if found is not None and not probe.is_sure():
        return channels_last_differs(probe)
    return None if found is None else f"channels last, the module computes other values: {found}"


def refuse_other_memory(probe: Probe, module: nn.Module, loss: Loss) -> None:
    """Refuse what computes otherwise where parameters are views of one vector.

    Args:
        module: a copy of the user's, whose parameters have memory of their own; it is changed.
        loss: a copy, too.

    Raises:
        ModelError: that it does, with the parameter's name.
        UserCodeError: the module or its loss raised.
    """
    found = _by_memory(probe, module, loss)
    if found is not None:
        raise ModelError(
            "forward computes other values when its parameters are contiguous parts of one vector, as "
            f"they are in training ({found}). It depends on the offset, the strides or the size of their "
            "memory. Let it use values alone: parameter.contiguous(), or as_strided without an offset"
        )


def _by_memory(probe: Probe, module: nn.Module, loss: Loss) -> str | None:
    """Return which parameter's memory matters; None if none does."""
    without_batch_statistics(module)
    named = dict(nn.Module.named_parameters(module))
    own = [named[name] for name in probe.names]
    homes = [parameter.data for parameter in own]
    constants = Constants(module, {id(parameter) for parameter in own})
    constants.stand()
    modes = [(part, part.training) for part in module.modules()]
    rows = range(TRIED_ROWS)

    def measure(evaluates: bool) -> Measured:
        with torch.set_grad_enabled(not evaluates):
            return probe.drawn(partial(compute, evaluates), 0, MIDDLE)

    def compute(evaluates: bool, seen: Operations) -> Measured:
        for parameter, home, values in zip(own, homes, probe.flat.trainable, strict=True):
            parameter.data, parameter.grad = home, None
            home.copy_(values.detach())  # forward may have changed it
            increment_version(parameter)
        constants.restore()
        if evaluates:
            module.eval()
        output, losses = probe.forward(module, loss, rows)
        if losses.requires_grad:
            back_propagate(losses)
        if evaluates:
            module.train(modes[0][1])  # takes out again what an own eval() merged
            for part, training in modes:
                part.training = training
        gradient = losses.new_empty(0) if evaluates else gradient_of(own)
        return measured(output, losses, gradient, seen, None)

    for evaluates in (False, True):
        here = probe.evaluated(rows) if evaluates else probe.plain(rows)
        if here is None:
            return None
        there = measure(evaluates)
        found = probe.difference(there, [here])
        if found is None:
            continue
        if not probe.is_sure():
            return _by_memory(probe, module, loss)
        if not evaluates and probe.is_rounding(rows, here, [there], most=_MUCH):
            return None
        for number, view in enumerate(probe.parts(torch.zeros_like(probe.flat.parameters))):
            home, homes[number] = homes[number], view.view(own[number].shape)
            if probe.difference(there, [measure(evaluates)]) is not None:
                return f"parameter {probe.names[number]!r}: {found}"
            homes[number] = home
        return f"the parameters: {found}"
    return None
