"""What `module=` may be: a module, what makes one, or the import path of what makes one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparksgd.arithmetic.copies import copied
from sparksgd.errors import ConfigError
from sparksgd.imports import import_path, resolve
from sparksgd.models import MODELS
from sparksgd.spark.given_rows import described_value
from sparksgd.training.modules import built_by, check_call

__all__ = ["ModuleSpec"]

_SIZES = ("num_features", "num_classes")
"""Arguments that are filled in: who writes a Pipeline does not know them."""


@dataclass(frozen=True, kw_only=True)
class ModuleSpec:
    """What is trained: a module, or what makes one."""

    given: nn.Module | None = None
    """A module."""

    factory: Callable[..., Any] | None = None
    """What makes one."""

    name: str | None = None
    """The import path of that, or the name of one of ours; None: other processes cannot import it."""

    @classmethod
    def of(cls, value: object) -> ModuleSpec:
        """Return what `module=` of an Estimator means; what an import path names is imported.

        Raises:
            ConfigError: it is none of the three.
        """
        if isinstance(value, nn.Module):
            return cls(given=value)
        if isinstance(value, str):
            return cls(factory=resolve("module", value, MODELS), name=value)
        if callable(value):
            return cls(factory=value, name=import_path(value))
        raise ConfigError(
            f"module is {described_value(value)}, but must be a torch.nn.Module, a function or class that "
            f"makes one, or the import path of one, as package.module:name"
        )

    def sizes(self) -> tuple[str, ...]:
        """Return which of num_features and num_classes the factory asks for."""
        if self.factory is None:
            return ()
        try:
            known = inspect.signature(self.factory).parameters
        except (TypeError, ValueError):
            return ()
        return tuple(name for name in _SIZES if name in known)

    def module(self, arguments: Mapping[str, Any], seed: int) -> nn.Module | None:
        """Return the module to train, which is nobody else's; None: its name builds it.

        Args:
            arguments: of the factory.
            seed: draws its weights.
        """
        if self.given is not None:
            if arguments:
                raise ConfigError(
                    f"module is an nn.Module, which takes no arguments, but config sets model."
                    f"{min(arguments)}: leave [model] out of config, or pass what makes the module"
                )
            return copied(self.given)
        if self.name is not None:
            return None
        assert self.factory is not None
        return built_by(self.factory, arguments, seed, self._called())

    def check_call(self, arguments: Mapping[str, Any]) -> None:
        """Refuse a factory that does not take arguments, without a call of it.

        Args:
            arguments: of the factory, without num_features and num_classes.

        Raises:
            ConfigError: it does not take them.
        """
        if self.factory is not None:
            check_call(self.factory, arguments, self._called(), self.sizes())

    def _called(self) -> str:
        """Return how errors call the factory."""
        if self.name is not None:
            return f"module is {self.name!r}"
        return f"module is {getattr(self.factory, '__qualname__', type(self.factory).__qualname__)}"
