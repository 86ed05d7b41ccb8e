"""Losses: functions of (output, label) with one value for each row; the trainer adds them.

The output is what the module gives: a tensor, or several, see outputs.py; losses of ours take one tensor.

A mean would not do: a mean times the number of rows has other bits than the sum.  The trainer divides the
sum by the number of rows; or, with data.weight, the sum of the losses times the rows' weights by the sum of
these weights.  Weights of classes only weigh rows here: torch's own CrossEntropyLoss(weight=w) divides its
mean by the sum of the rows' weights instead, which differs from batch to batch.

A loss has no parameters that train, and the loss of a row does not depend on other rows; see
ModelConfig.rows_mix.

Legend: B rows, C classes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sparksgd.arithmetic.generators import generators_seeded
from sparksgd.arithmetic.seeds import seed32
from sparksgd.config import LossConfig, LossKind
from sparksgd.errors import ConfigError, ModelError
from sparksgd.imports import did_you_mean, resolve, shown, wrong_call
from sparksgd.imports.trust import Trust

__all__ = [
    "LOSSES",
    "Loss",
    "LossKind",
    "binary_cross_entropy",
    "check_loss",
    "cross_entropy",
    "given_kind",
    "has_accuracy",
    "is_of_classes",
    "known_name",
    "loss_kind",
    "loss_of",
    "make_loss",
    "num_classes",
    "squared_error",
]

Loss = Callable[[Any, torch.Tensor], torch.Tensor]
"""Takes the module's output and the labels."""


def cross_entropy(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return -log softmax(output)[label], float[B], of logits float[B, C] and labels int64[B].

    Raises:
        ModelError: the output is not a logit for each class.
    """
    _require_logits("cross_entropy", output, label)
    return F.cross_entropy(output, label, reduction="none")


def _require_tensor(name: str, output: object) -> None:
    if not isinstance(output, torch.Tensor):
        raise ModelError(
            f"the module gives a {type(output).__name__}, but {name} takes one tensor: let the module give "
            f"that, or train with a loss of your own, without loss.kind"
        )


def _require_logits(name: str, output: torch.Tensor, label: torch.Tensor) -> None:
    _require_tensor(name, output)
    if output.shape in (label.shape, (*label.shape, 1)):
        raise ModelError(
            f"the module gives {tuple(output.shape)} for {len(label)} rows, but {name} takes a logit "
            f"for each class: let it give those of two classes or more, or use binary_cross_entropy for one"
        )
    # Within a loss of the user's own, torch.func.vmap hands over the logits and the label, (), of one row.
    if label.ndim and (*output.shape[:1], *output.shape[2:]) != label.shape:
        raise ModelError(
            f"the module gives {tuple(output.shape)} for labels {tuple(label.shape)}, but {name} takes a "
            f"logit for each class, ({len(label)}, C): let it give that"
        )


def _one_per_row(name: str, output: torch.Tensor, label: torch.Tensor, what: str) -> torch.Tensor:
    """Return an output of one number for each row, [B] or [B, 1], as [B].

    Raises:
        ModelError: it has another shape, or the labels are not [B].
    """
    _require_tensor(name, output)
    rows = label.numel()
    if label.ndim != 1:
        raise ModelError(
            f"the labels are of shape {tuple(label.shape)}, but {name} takes one for each row, ({rows},): "
            f"give it label.flatten()"
        )
    if output.numel() != rows or (rows > 1 and len(output) != rows):  # of one row it may be squeezed
        other = "cross_entropy for a logit for each class" if what == "logit" else "a loss of your own"
        raise ModelError(
            f"the module gives {tuple(output.shape)} for labels {tuple(label.shape)}, but {name} takes one "
            f"{what} for each row, ({rows},) or ({rows}, 1): let it give that, or use {other}"
        )
    return output.reshape(rows)


def binary_cross_entropy(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return the logistic loss, float[B], of logits float[B] or [B, 1] and labels 0 or 1, [B].

    Raises:
        ModelError: the output is not one number for each row, or there is not one label for each.
    """
    output = _one_per_row("binary_cross_entropy", output, label, "logit")
    return F.binary_cross_entropy_with_logits(output, label.to(output.dtype), reduction="none")


def squared_error(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return (output - label)^2, float[B], of predictions float[B] or [B, 1] and labels [B].

    Raises:
        ModelError: the output is not one number for each row, or there is not one label for each.
    """
    return (_one_per_row("squared_error", output, label, "number") - label.to(output.dtype)).square()


class _OfTorch(nn.Module):
    """A loss of torch.nn with one value per row; numbers may be [B] or [B, 1]."""

    def __init__(self, loss: nn.Module, kind: LossKind) -> None:
        super().__init__()
        self.loss, self.kind = loss, kind

    def forward(self, output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Return the losses, float[B]."""
        _require_tensor(type(self.loss).__name__, output)
        if output.dtype in (torch.bfloat16, torch.float16):  # arguments are of 32 bits
            output = output.float()
        name = type(self.loss).__name__
        if self.kind == "classes":
            _require_logits(name, output, label)
        elif self.kind == "several labels":
            label = label.to(output.dtype)
            if output.shape != label.shape:
                raise ModelError(_other_labels(tuple(output.shape), tuple(label.shape)))
        else:
            what = "logit" if self.kind == "binary" else "number"
            output, label = _one_per_row(name, output, label, what), label.to(output.dtype)
        self._require_weights(output)
        losses: torch.Tensor = self.loss(output, label)
        return losses.mean(1) if self.kind == "several labels" and losses.ndim == 2 else losses

    def _require_weights(self, output: torch.Tensor) -> None:
        """Refuse weights that are not one for each class or label of the output.

        Raises:
            ConfigError: with both shapes.
        """
        if self.kind == "classes":
            key, of, wanted = "weight", "class", output.shape[min(1, output.ndim - 1)]
        else:
            key, of, wanted = "pos_weight", "label", 1 if self.kind == "binary" else output.shape[-1]
        weights = getattr(self.loss, key, None)
        if weights is None or weights.shape == (wanted,):
            return
        if of == "label" and (weights.numel() == 1 or weights.shape == (1, wanted)):  # torch repeats it
            return
        raise ConfigError(
            f"loss.{key} has the shape {tuple(weights.shape)}, but the module gives {tuple(output.shape)}: "
            f"give a list with one number for each {of}, {wanted} in all"
        )


_PLAIN: dict[str, tuple[Loss, str]] = {
    "binary_cross_entropy": (binary_cross_entropy, "BCEWithLogitsLoss"),
    "cross_entropy": (cross_entropy, "CrossEntropyLoss"),
    "squared_error": (squared_error, "MSELoss"),
}
"""Losses without arguments, and the classes of torch.nn that are the same with arguments."""

_KINDS: dict[str, tuple[LossKind, ...]] = {
    "BCEWithLogitsLoss": ("binary", "several labels"),
    "CrossEntropyLoss": ("classes",),
    "HuberLoss": ("numbers",),
    "L1Loss": ("numbers",),
    "MSELoss": ("numbers",),
    "NLLLoss": ("classes",),
    "SmoothL1Loss": ("numbers",),
}
"""Classes of torch.nn that are losses here, and of what; the first is meant if loss.kind does not say."""

LOSSES = (*_PLAIN, *_KINDS)
"""The names of losses that are no import paths."""

_REFUSED = {
    **dict.fromkeys(("reduction", "reduce", "size_average"), "the trainer adds the rows' losses itself"),
    "ignore_index": "leave such rows out of the data",
}
"""Arguments of torch.nn's losses that are not taken, and what to know."""

_TENSORS = ("weight", "pos_weight")


def loss_kind(config: LossConfig) -> LossKind | None:
    """Return what a loss is of; None if that is not known.

    Raises:
        ConfigError: loss.kind is another than that of a known loss.
    """
    name = _PLAIN[config.name][1] if config.name in _PLAIN else config.name
    return _agreed(config.kind, _KINDS.get(name), f"loss.name is {shown(config.name)}")


def given_kind(config: LossConfig, loss: object) -> LossKind | None:
    """Return what a loss that is given in Python is of; that of an instance of torch.nn's is known.

    Raises:
        ConfigError: loss.kind is another than that.
    """
    return _agreed(config.kind, _of_torchs(type(loss)), f"loss is a {type(loss).__name__}")


def _of_torchs(kind: type) -> tuple[LossKind, ...] | None:
    """Return what a class of torch.nn that is a loss here is of; None: it is another class."""
    return _KINDS.get(kind.__name__) if kind.__module__.startswith("torch.nn.") else None


def _agreed(given: LossKind | None, known: tuple[LossKind, ...] | None, what: str) -> LossKind | None:
    """Return the kind that is given, or else the known one."""
    if known is None:
        return given
    if given not in (None, *known):
        raise ConfigError(
            f'loss.kind is "{given}", but {what}, whose kind is "{known[0]}": leave loss.kind out'
        )
    return given or known[0]


def known_name(loss: object) -> str | None:
    """Return the name of a loss of ours or a class of torch.nn that is given in Python; None: it has none."""
    if isinstance(loss, type) and _of_torchs(loss) is not None:
        return loss.__name__
    return next((name for name, (plain, _) in _PLAIN.items() if plain is loss), None)


def is_of_classes(kind: LossKind | None) -> bool:
    """Return whether labels are classes, numbered from 0."""
    return kind in ("classes", "binary")


def has_accuracy(kind: LossKind | None) -> bool:
    """Return whether outputs choose among classes, or say which labels a row has."""
    return kind not in (None, "numbers")


def _other_labels(output: tuple[int, ...], labels: tuple[int, ...]) -> str:
    return (
        f"the module gives {output} for {labels[0]} rows of {labels[1]} labels each, but a loss of several "
        f"labels takes a logit for each label, {labels}: let it give that"
    )


def num_classes(
    kind: LossKind | None, shapes: Mapping[str, tuple[int, ...]], labels: int | None = None
) -> int | None:
    """Return how many classes a module's output tells apart; None: there are none.

    Args:
        kind: of the loss.
        shapes: of the module's tensors for the first rows, by their names.
        labels: how many labels a row has, if it has several.

    Raises:
        ModelError: a loss of this kind takes another shape.
    """
    if kind is None:
        return None
    if shapes.keys() != {""}:
        raise ModelError(
            f'the module gives tensors by names ({", ".join(shapes)}), but a loss whose kind is "{kind}" '
            f"takes one: let the module give that, or train with a loss of your own, without loss.kind"
        )
    output = shapes[""]
    if labels is not None:
        if output != (output[0], labels):
            raise ModelError(_other_labels(output, (output[0], labels)))
        return None
    width = math.prod(output[1:])
    if kind == "classes" and len(output) == 2 and width > 1:
        return width
    if kind != "classes" and width == 1:
        return 2 if kind == "binary" else None
    rules = {
        "classes": "a logit for each class, [B, C]",
        "binary": "one logit for each row, [B] or [B, 1]",
        "numbers": "one number for each row, [B] or [B, 1]",
    }
    raise ModelError(
        f'the module gives {output} for {output[0]} rows, but a loss whose kind is "{kind}" takes '
        f"{rules[kind]}: let it give that, or set the loss.kind of a loss of your own to what it is"
    )


def make_loss(config: LossConfig, seed: int, trust: Trust | None = None) -> Loss:
    """Return the loss that a configuration names.

    Args:
        config: the name, and arguments.
        seed: of the run; what a class draws when its instance is made follows from it.
        trust: whose code may run, if the name comes from a file; None: the user wrote it.

    Raises:
        ConfigError: there is no such loss, or it does not take these arguments.
        DataError: it is not trusted.
    """
    if config.name in _PLAIN:
        plain, of_torch = _PLAIN[config.name]
        is_plain = not config.arguments and loss_kind(config) != "several labels"
        return plain if is_plain else _of_torch(config, of_torch)
    if config.name in _KINDS:
        return _of_torch(config, config.name)
    if config.is_given:
        raise ConfigError(f"loss.name is {shown(config.name)}: pass that loss, as loss=")
    return loss_of(config, resolve("loss.name", config.name, dict.fromkeys(LOSSES), trust), seed)


def check_loss(config: LossConfig) -> None:
    """Refuse a loss as `make_loss` would, as far as no instance of the user's own class must be made.

    Args:
        config: the name, and arguments.

    Raises:
        ConfigError: there is no such loss, or it does not take these arguments.
    """
    loss_kind(config)
    if config.is_given or config.name in LOSSES:
        make_loss(config, 0)
        return
    found = resolve("loss.name", config.name, dict.fromkeys(LOSSES))
    if not isinstance(found, type):
        loss_of(config, found, 0)
        return
    _refuse_unknown(config, _parameters(found))
    if (error := wrong_call(found, config.arguments)) is not None:
        raise _not_taken(config, config.arguments, error) from error


def loss_of(config: LossConfig, found: object, seed: int) -> Loss:
    """Return the loss that an object is, with the arguments of a configuration.

    Args:
        config: the arguments, and the name for errors.
        found: a function, a class, or an instance.
        seed: see `make_loss`.

    Raises:
        ConfigError: it is none of these, or does not take the arguments.
    """
    if not callable(found):
        raise ConfigError(
            f"loss.name is {shown(config.name)}, which is {shown(found)}, but must be a function (output, "
            f"label), or a class whose instances are such"
        )
    if isinstance(found, nn.Module) and _of_torchs(type(found)) and (kind := given_kind(config, found)):
        found = _OfTorch(found, kind)
    if isinstance(found, type):
        _refuse_unknown(config, _parameters(found))
        with generators_seeded(seed32(seed, "loss")):
            loss: Loss = _instance(config, found, config.arguments)
        if not callable(loss):
            raise ConfigError(
                f"loss.name is {shown(config.name)}, a class whose instances cannot be called: give it "
                f"__call__(self, output, label)"
            )
        return loss
    if not config.arguments:
        return found
    _refuse_unknown(config, _parameters(found, without=2))
    return partial(found, **config.arguments)


def _of_torch(config: LossConfig, name: str) -> Loss:
    kind, of = getattr(nn, name), loss_kind(config) or _KINDS[name][0]
    if name == "BCEWithLogitsLoss" and "weight" in config.arguments:
        raise ConfigError(
            f"loss.weight is no argument of {config.name} here, because torch's is of a batch: use "
            f"loss.pos_weight, or data.weight"
        )
    _refuse_unknown(config, [key for key in _parameters(kind) if key not in _REFUSED])

    def made(**arguments: Any) -> Loss:
        for key in set(arguments).intersection(_TENSORS):
            arguments[key] = torch.tensor(arguments[key], dtype=torch.float32)
        return _OfTorch(kind(**arguments, reduction="none"), of)

    loss: Loss = _instance(config, made, config.arguments)
    return loss


def _instance(config: LossConfig, make: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Return an instance of a class of losses."""
    try:
        return make(**arguments)
    except Exception as error:
        raise _not_taken(config, arguments, error) from error


def _not_taken(config: LossConfig, arguments: Mapping[str, Any], error: Exception) -> ConfigError:
    return ConfigError(
        f"loss.name is {shown(config.name)}, which does not take {shown(dict(arguments))}: "
        f"{type(error).__name__}: {error}"
    )


def _refuse_unknown(config: LossConfig, known: list[str]) -> None:
    for key in config.arguments:
        if key in known or _ANY in known:
            continue
        why = f": {_REFUSED[key]}" if key in _REFUSED else did_you_mean(key, known)
        raise ConfigError(f"loss.{key} is no argument of {config.name}{why}")


_ANY = "**"


def _parameters(function: Any, without: int = 0) -> list[str]:
    """Return the names of what can be passed by name; `_ANY` if that is anything.

    Args:
        function: or a class.
        without: how many of the first ones are passed by their places.
    """
    try:
        found = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # of C, which says nothing
        return [_ANY]
    placed = [one for one in found if one.kind is not inspect.Parameter.VAR_POSITIONAL]
    named = placed[without:] if len(placed) == len(found) else placed
    any_ = [_ANY for one in found if one.kind is inspect.Parameter.VAR_KEYWORD]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [one.name for one in named if one.kind in kinds] + any_
