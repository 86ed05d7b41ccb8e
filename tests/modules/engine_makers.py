"""What makes the engine of a training in tests that look at it, or change it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparksgd.engines.kinds import INLINE


@dataclass(frozen=True)
class Inline:
    """Makes inline engines by a function of plan, shards and test shards."""

    make: Callable[..., Any]
    kinds = (INLINE,)

    def check_code(self, *_: Any, **__: Any) -> None:
        """Refuse nothing."""

    def check_memory(self, *_: Any) -> None:
        """Refuse nothing."""

    def __call__(self, *given: Any) -> Any:
        """Return the engine."""
        return self.make(*given)
