"""n-softsync: the centre steps at every c gradients, from whichever shards, and may trust stale ones less.

    g = (sum over the c messages of f_i G_i) / (sum of their rows)        G_i: sum of gradients over its rows
    theta <- optimiser(theta, g)

    tau_i   staleness: steps made since the shard read its weights
    f_i     1 (ignore), 1 / tau_i where tau_i > 1 (divide), or c / S (average)

Zhang, Gupta, Lian, Liu 2016, "Staleness-aware Async-SGD for Distributed Deep Learning" (IJCAI), where S is
lambda, and n = S / c; `divide` is their modulation of the rate, for each gradient.
`average` divides every gradient by n, the mean staleness (Gupta, Zhang, Wang 2016, arXiv:1509.04210).
With weights of rows, the sum is over these in place of the rows.

c = 1 with `ignore` is asynchronous SGD.  c = S with `release = "step"` is synchronous SGD.  c = S with
`release = "push"` and max_staleness is asynchronous aggregation at the synchronous batch (GBA: Su et al.
2022, arXiv:2205.11048).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from sparksgd.arithmetic.addition_tree import Partials, add_partial
from sparksgd.arithmetic.flat import FlatModule, FlatStrip
from sparksgd.config import Config
from sparksgd.errors import ConfigError
from sparksgd.solvers.arrival_centre import GradientCentre, GradientSettings
from sparksgd.solvers.arrivals import ArrivalStep, Verdict
from sparksgd.solvers.protocol import Answer, Message, total_weight
from sparksgd.solvers.rules import Experiment, require_at_least

__all__ = ["Softsync", "SoftsyncSettings"]

_SCALE_FREE = (
    "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam", "RMSprop",
    "Rprop",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SoftsyncSettings(GradientSettings):
    """The keys of solver.name = "softsync"."""

    gradients_per_step: int = 1
    """c: how many gradients make a step; n-softsync has c = train.num_shards / n."""

    staleness: Literal["ignore", "divide", "average"] = "divide"
    """What a gradient of staleness tau counts: 1 (ignore), 1 / tau (divide), or c / train.num_shards whatever
    tau is (average)."""

    release: Literal["push", "step"] = "push"
    """When a shard goes on that has sent a gradient: at once, with the weights of that moment (push); or with
    those of the step that uses it (step)."""

    def check(self, config: Config) -> None:
        """Refuse what does not fit the rest of the configuration."""
        super().check(config)
        require_at_least("solver.gradients_per_step", self.gradients_per_step, 1)
        if self.release == "step" and self.gradients_per_step > config.train.num_shards:
            raise ConfigError(
                f'solver.release is "step" and solver.gradients_per_step {self.gradients_per_step}, but '
                f"there are {config.train.num_shards} shards, which would all wait for a step: set "
                f'gradients_per_step to {config.train.num_shards} or less, or solver.release = "push"'
            )
        if self.staleness == "average" and self.gradients_per_step > config.train.num_shards:
            raise ConfigError(
                f'solver.staleness is "average", which multiplies by gradients_per_step / num_shards, but '
                f"{self.gradients_per_step} / {config.train.num_shards} is above 1: set gradients_per_step "
                f'to {config.train.num_shards} or less, or solver.staleness = "ignore"'
            )
        if self.staleness != "ignore" and config.optimizer.name in _SCALE_FREE:
            raise ConfigError(
                f'solver.staleness is "{self.staleness}", which scales gradients, but optimizer.name is '
                f'"{config.optimizer.name}", whose steps do not depend on their scale: use '
                f'solver.staleness = "ignore", or optimizer.name = "SGD"'
            )


class Softsync(GradientCentre):
    """The central half: it gathers c gradients, and steps.

    Args:
        flat: the module; the solver owns its parameters from now on.
        settings: the rule's keys.
        experiment: has the optimiser, the schedule, and how long they are used.
    """

    def __init__(
        self,
        flat: FlatModule | FlatStrip,
        settings: SoftsyncSettings,
        experiment: Experiment,
    ) -> None:
        super().__init__(flat, settings, experiment)
        self._rule, self._num_shards = settings, experiment.num_shards

    def _hold_nothing(self) -> None:
        self._waiting: list[tuple[int, int, Message]] = []
        self._held: set[int] = set()
        self._there: set[int] = set()

    def begin(self, shard: int) -> Answer:
        """Return the newest weights."""
        self._there.add(shard)
        return self.answer()

    def arrived(self, shard: int, message: Message, version_read: int) -> Verdict:
        """Keep a gradient; step if it is the c-th."""
        if self.is_too_old(version_read):
            return self.ignored(shard)
        staleness = self.staleness_of(version_read)
        self._weaken(message, staleness)
        self._waiting.append((shard, staleness, message))
        self._held.add(shard)
        if len(self._waiting) < self._rule.gradients_per_step:
            return self._released()
        return self._released(self._step_of_all())

    def lost(self, shard: int) -> Verdict:
        """Let the others go on, if all of them wait for a step that cannot come."""
        self._there.discard(shard)
        self._held.discard(shard)
        return self._released()

    def _released(self, *steps: ArrivalStep) -> Verdict:
        is_due = bool(steps) or self._rule.release == "push" or self._held >= self._there
        free, self._held = (self._held, set()) if is_due else (set(), self._held)
        return Verdict(answers={shard: self.answer() for shard in sorted(free)}, steps=steps)

    def _weaken(self, message: Message, staleness: int) -> None:
        """Scale a gradient as its staleness asks, in place."""
        gradient = message.vectors["gradient"]
        if self._rule.staleness == "divide" and staleness > 1:
            gradient /= np.asarray(staleness, gradient.dtype)
        if self._rule.staleness == "average":
            gradient *= np.asarray(self._rule.gradients_per_step / self._num_shards, gradient.dtype)

    def _step_of_all(self) -> ArrivalStep:
        """Step along the sum of what waits, added in the tree in the order of (shard, turn)."""
        shards, staleness, messages = zip(*sorted(self._waiting, key=lambda one: one[0]), strict=True)
        self._waiting = []
        partials: Partials = {}
        for number, message in enumerate(messages):
            add_partial(partials, (number, number + 1), message, len(messages))
        total = partials[(0, len(messages))]
        assert isinstance(total, Message)
        gradient = total.vectors["gradient"]
        return self.step_on(total, gradient, total_weight(total), shards, staleness)
