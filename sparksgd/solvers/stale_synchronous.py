"""Stale-synchronous SGD: the centre steps at every arrival, and no shard is more than s turns ahead.

    theta <- optimiser(theta, g)          at every arrival
    shard i waits while   clock_i - min over j of clock_j > s          clock: turns that a shard has made

Ho et al. 2013, "More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server" (NeurIPS).
A large s is asynchronous SGD.  s = 0 is not synchronous SGD: the S gradients of a clock make S steps.
A shard that is lost leaves the minimum; when it is back, it begins at the clock of the slowest.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparksgd.arithmetic.flat import FlatModule, FlatStrip
from sparksgd.config import Config
from sparksgd.solvers.arrival_centre import GradientCentre, GradientSettings
from sparksgd.solvers.arrivals import ArrivalStep, Verdict
from sparksgd.solvers.protocol import Answer, Message, total_weight
from sparksgd.solvers.rules import Experiment, require_at_least

__all__ = ["StaleSynchronous", "StaleSynchronousSettings"]


@dataclass(frozen=True, kw_only=True)
class StaleSynchronousSettings(GradientSettings):
    """The keys of solver.name = "stale_synchronous"."""

    bound: int = 3
    """s: how many turns a shard may be ahead of the slowest one."""

    def check(self, config: Config) -> None:
        """Refuse what does not fit the rest of the configuration."""
        super().check(config)
        require_at_least("solver.bound", self.bound, 0)


class StaleSynchronous(GradientCentre):
    """The central half: it steps at every arrival, and holds back who is too far ahead.

    Args:
        flat: the module; the solver owns its parameters from now on.
        settings: the rule's keys.
        experiment: has the optimiser, the schedule, and how long they are used.
    """

    def __init__(
        self,
        flat: FlatModule | FlatStrip,
        settings: StaleSynchronousSettings,
        experiment: Experiment,
    ) -> None:
        super().__init__(flat, settings, experiment)
        self._bound = settings.bound

    def _hold_nothing(self) -> None:
        self._clocks: dict[int, int] = {}
        self._held: set[int] = set()

    def begin(self, shard: int) -> Answer:
        """Return the newest weights; the shard begins at the clock of the slowest."""
        self._clocks[shard] = min(self._clocks.values(), default=0)
        return self.answer()

    def arrived(self, shard: int, message: Message, version_read: int) -> Verdict:
        """Step along a gradient."""
        self._clocks[shard] += 1
        self._held.add(shard)
        if self.is_too_old(version_read):
            return self._released(is_ignored=True)
        gradient, weight = message.vectors["gradient"], total_weight(message)
        staleness = self.staleness_of(version_read)
        return self._released(self.step_on(message, gradient, weight, [shard], [staleness]))

    def lost(self, shard: int) -> Verdict:
        """Let shards go on that waited for this one alone."""
        del self._clocks[shard]
        self._held.discard(shard)
        return self._released()

    def _released(self, *steps: ArrivalStep, is_ignored: bool = False) -> Verdict:
        slowest = min(self._clocks.values(), default=0)
        free = sorted(shard for shard in self._held if self._clocks[shard] - slowest <= self._bound)
        self._held.difference_update(free)
        answers = {shard: self.answer() for shard in free}
        return Verdict(answers=answers, steps=steps, is_ignored=is_ignored)
