"""Make a module by its name in a configuration, to train it or to rebuild a saved model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from sparksgd.arithmetic.generators import generators_seeded
from sparksgd.arithmetic.scripted import as_written
from sparksgd.arithmetic.seeds import seed32
from sparksgd.config import ModelConfig
from sparksgd.errors import ConfigError, ModelError
from sparksgd.imports import resolve, shown, wrong_call
from sparksgd.imports.trust import Trust
from sparksgd.models import MODELS

__all__ = ["build_module", "built_by", "check_call", "check_model"]


def build_module(config: ModelConfig, seed: int, trust: Trust | None = None) -> nn.Module:
    """Return the module that a configuration names, its parameters drawn from the seed.

    Args:
        config: names it.
        seed: of the run.
        trust: whose code may run, if the name comes from a file; None: the user wrote it.
    """
    factory = resolve("model.name", config.name, MODELS, trust)
    return built_by(factory, config.arguments, seed, f"model.name is {config.name!r}")


def built_by(factory: Callable[..., Any], arguments: Mapping[str, Any], seed: int, what: str) -> nn.Module:
    """Return the module that a factory makes, its parameters drawn from the seed.

    Args:
        factory: makes it.
        arguments: of the factory.
        seed: of the run.
        what: how errors begin.
    """
    try:
        with as_written(), generators_seeded(seed32(seed, "module")):
            module = factory(**arguments)
    except Exception as error:
        raise _not_taken(factory, arguments, what, error) from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{what}, which gave a {type(module).__name__}, not a torch module")
    return module


def check_model(config: ModelConfig) -> None:
    """Refuse a model's name and arguments as `build_module` would, as far as no module must be built.

    Args:
        config: names it.

    Raises:
        ConfigError: nothing has that name, or it does not take these arguments.
    """
    factory = resolve("model.name", config.name, MODELS)
    check_call(factory, config.arguments, f"model.name is {config.name!r}")


def check_call(
    factory: Callable[..., Any], arguments: Mapping[str, Any], what: str, filled_in: Sequence[str] = ()
) -> None:
    """Refuse a factory that does not take arguments, without a call of it.

    Args:
        factory: makes a module.
        arguments: of the factory.
        what: how errors begin.
        filled_in: names of arguments that it gets, too.

    Raises:
        ConfigError: it does not take them.
    """
    error: TypeError | None
    if callable(factory):
        error = wrong_call(factory, {**dict.fromkeys(filled_in), **arguments})
    else:
        error = TypeError(f"{type(factory).__name__!r} object is not callable")
    if error is not None:
        raise _not_taken(factory, arguments, what, error) from error


def _not_taken(factory: Any, arguments: Mapping[str, Any], what: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{what}, which does not take {shown(dict(arguments))}: "
        f"{type(error).__name__}: {error}{_signature(factory)}"
    )


def _signature(factory: Any) -> str:
    try:
        return f"; its arguments are {inspect.signature(factory)}"
    except (TypeError, ValueError):
        return ""
