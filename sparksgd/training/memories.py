"""What observers must remember, by their names in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparksgd.errors import ConfigError
from sparksgd.training.encoding import stranger_in
from sparksgd.training.state import Observer

__all__ = ["memories_of", "recall_all"]


def memories_of(observers: Sequence[Observer]) -> dict[str, dict[str, Any]]:
    """Return what each observer must remember.

    Raises:
        ConfigError: a checkpoint cannot hold it.
    """
    return {name: _memory_of(name, observer) for name, observer in _named(observers)}


def recall_all(observers: Sequence[Observer], remembered: Mapping[str, Any]) -> None:
    """Give each observer what it had to remember."""
    for name, observer in _named(observers):
        if name in remembered:
            observer.recall(remembered[name])


def _memory_of(name: str, observer: Observer) -> dict[str, Any]:
    memory = observer.memory()
    strange = stranger_in(memory, f"{name}.memory()")
    if strange is not None or not isinstance(memory, dict):
        raise ConfigError(
            f"{strange or f'{name}.memory() is no dict'}, which a checkpoint cannot hold: return numbers, "
            f"texts, arrays and containers of them"
        )
    return memory


def _named(observers: Sequence[Observer]) -> Iterator[tuple[str, Observer]]:
    """Yield each observer with its name, numbered where several have one."""
    counts: dict[str, int] = {}
    for observer in observers:
        kind = observer.checkpoint_name
        counts[kind] = counts.get(kind, 0) + 1
        yield kind if counts[kind] == 1 else f"{kind} {counts[kind]}", observer
