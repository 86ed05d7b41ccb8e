"""Progress shown to a person: bars on a terminal, a short line for each step elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

__all__ = ["Report"]


class Report:
    """Shows what is being done, and the progress."""

    def __init__(self, console: Console | None = None) -> None:
        """Args: console: where to write; None means standard output."""
        self._console = console

    def say(self, text: str) -> None:
        """Write one line."""
        self._target().print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Show a step, and yield a function that advances it.

        Args:
            title: what the step does.
            total: its size, in the unit of the advances; None if unknown.
        """
        console = self._target()
        if not console.is_terminal:
            self.say(title)
            yield lambda _: None
            return
        with Progress(console=console) as progress:
            task = progress.add_task(title.replace("[", r"\["), total=total)
            yield lambda amount: progress.advance(task, amount)

    def _target(self) -> Console:
        return self._console or Console()
