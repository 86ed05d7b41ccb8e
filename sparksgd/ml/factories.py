"""What `module=` may be: a module, what makes one, or the import path of what makes one."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from sparksgd.arithmetic.copies import copied
from sparksgd.errors import ConfigError
from sparksgd.imports import resolve
from sparksgd.models import MODELS
from sparksgd.spark.given_rows import described_value
from sparksgd.training.modules import built_by

__all__ = ["SIZES", "Asked", "import_path"]

SIZES = ("num_features", "num_classes")
"""The arguments of a factory that are filled in: a Pipeline does not know them before."""


class Asked:
    """What is trained: a module, or the name that builds one.

    Args:
        given: `module=` of an Estimator.

    Raises:
        ConfigError: it is none of the three.
    """

    def __init__(self, given: object) -> None:
        self._module = given if isinstance(given, nn.Module) else None
        self._factory: Callable[..., Any] | None = None
        self.name: str | None = None
        if isinstance(given, str):
            self.name = given
            self._factory = resolve("module", given, MODELS)
        elif self._module is None and callable(given):
            self._factory, self.name = given, import_path(given)
        elif self._module is None:
            raise ConfigError(
                f"module is {described_value(given)}, but must be a torch.nn.Module, a function or class "
                f"that makes one, or the import path of one, as package.module:name"
            )

    def sizes(self) -> tuple[str, ...]:
        """Return which of SIZES must be filled in."""
        if self._factory is None:
            return ()
        try:
            known = inspect.signature(self._factory).parameters
        except (TypeError, ValueError):
            return ()
        return tuple(name for name in SIZES if name in known)

    def module(self, arguments: Mapping[str, Any], seed: int) -> nn.Module | None:
        """Return the module to train, which is nobody else's; None: its name builds it.

        Args:
            arguments: of the factory.
            seed: draws its weights.
        """
        if self._module is not None:
            if arguments:
                raise ConfigError(
                    f"module is a module, so nothing takes the arguments {', '.join(arguments)} of config: "
                    f"leave [model] out of it, or pass what makes the module"
                )
            return copied(self._module)
        if self.name is not None:
            return None
        assert self._factory is not None
        return built_by(self._factory, arguments, seed, f"module is {described_value(self._factory)}")


def import_path(value: object) -> str | None:
    """Return the name under which another process imports a function or class; None: it has none."""
    home, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if not isinstance(home, str) or home == "__main__" or not name.isidentifier():
        return None
    try:
        found = getattr(importlib.import_module(home), name, None)
    except ImportError:
        return None
    return f"{home}:{name}" if found is value else None
