"""The user's own observers, named by import paths."""

from __future__ import annotations

from typing import Any

from sparksgd.engines.protocol import StepReport
from sparksgd.errors import ConfigError, UserCodeError
from sparksgd.imports import resolve, shown, users_code
from sparksgd.training.state import EvaluationReport, Observer, Training

__all__ = ["Callback"]


class Callback(Observer):
    """An observer of the user's own; what it raises is told as an error of the user's code.

    Args:
        key: the option or Param that names it, for errors.
        name: package.module:Class of a subclass of `sparksgd.Observer`, made without arguments.

    Raises:
        ConfigError: it names something else, or cannot be made.
    """

    def __init__(self, key: str, name: str) -> None:
        kind = resolve(key, name, {})
        if not (isinstance(kind, type) and issubclass(kind, Observer)):
            raise ConfigError(
                f"{key} is {shown(name)}, but must name a subclass of sparksgd.Observer, whose methods "
                f"you override"
            )
        self._name, self._called = name, f"the callback {name}"
        try:
            with users_code(self._called):
                self._own: Observer = kind()
        except UserCodeError as error:
            raise ConfigError(
                f"{key} is {shown(name)}, which cannot be made without arguments: {error}"
            ) from error

    @property
    def checkpoint_name(self) -> str:
        """Return its import path, by which checkpoints know what it remembers."""
        return self._name

    def memory(self) -> dict[str, Any]:
        """Return what it must remember."""
        with users_code(self._called):
            return self._own.memory()

    def recall(self, memory: dict[str, Any]) -> None:
        """Take what it had to remember."""
        with users_code(self._called):
            self._own.recall(memory)

    def started(self, training: Training) -> None:
        """Pass it on."""
        with users_code(self._called):
            self._own.started(training)

    def stepped(self, training: Training, report: StepReport) -> None:
        """Pass it on."""
        with users_code(self._called):
            self._own.stepped(training, report)

    def evaluated(self, training: Training, report: EvaluationReport) -> None:
        """Pass it on."""
        with users_code(self._called):
            self._own.evaluated(training, report)

    def ended(self, training: Training) -> None:
        """Pass it on."""
        with users_code(self._called):
            self._own.ended(training)
