"""Asynchronous SGD: the centre steps at every arrival, and its answer goes to the sender alone.

    shard:   each turn     u <- u + g;  x <- x - eta g           g: mean gradient of the piece at x
             each n_push   send u;  u <- 0
             each n_fetch  x <- theta
    centre:  theta <- optimiser(theta, u)

n_push = n_fetch = 1, the default, is asynchronous SGD with any optimiser at the centre.  Larger numbers are
Downpour SGD (Dean et al. 2012, "Large Scale Distributed Deep Networks", algorithm 1): what is pushed is the
sum of the mean gradients since the last push, not their mean.  With plain SGD at the centre, and a constant
rate, that is the sum of the shard's own updates, because both multiply by eta.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from sparksgd.arithmetic.flat import FlatModule, FlatStrip
from sparksgd.config import Config
from sparksgd.errors import ConfigError
from sparksgd.solvers.arrival_centre import GradientCentre, GradientSettings
from sparksgd.solvers.arrivals import Verdict
from sparksgd.solvers.centre import refuse_statistics
from sparksgd.solvers.protocol import (
    Answer,
    Gradient,
    HalfState,
    Halves,
    Message,
    Settings,
    Vector,
    total_weight,
)
from sparksgd.solvers.rules import Experiment, require_at_least
from sparksgd.solvers.synchronous import SendGradients

__all__ = ["AsyncSGD", "AsyncSGDSettings", "Downpour"]


@dataclass(frozen=True, kw_only=True)
class AsyncSGDSettings(GradientSettings):
    """The keys of solver.name = "async_sgd"."""

    push_every: int = 1
    """How many turns a shard makes between two messages; it moves a model of its own meanwhile."""

    pull_every: int = 1
    """How many turns a shard makes until it takes the centre's weights: a multiple of push_every."""

    def check(self, config: Config) -> None:
        """Refuse what does not fit the rest of the configuration."""
        super().check(config)
        require_at_least("solver.push_every", self.push_every, 1)
        require_at_least("solver.pull_every", self.pull_every, 1)
        if self.pull_every % self.push_every:
            raise ConfigError(
                f"solver.pull_every is {self.pull_every}, but must be a multiple of solver.push_every "
                f"({self.push_every}), because the centre answers a push"
            )


class Downpour:
    """The worker half: plain SGD on a model of its own, between the centre's answers.

    Args:
        flat: a module of the run's shapes.
        shard: the shard that it belongs to.
        settings: the rule's keys.
    """

    lag = 0

    def __init__(self, flat: FlatModule, shard: int, *, settings: AsyncSGDSettings) -> None:
        self._push_every, self._pull_every = settings.push_every, settings.pull_every
        self._turns = 0
        self._model: Vector | None = None
        self._sum: Vector | None = None
        self._since: list[Gradient] = []

    def take(self, answer: Answer) -> None:
        """Take the centre's weights, if they are due."""
        if self._model is None or self._turns % self._pull_every == 0:
            self._model = answer.weights.parameters

    def point(self) -> Vector:
        """Return the shard's own model."""
        assert self._model is not None
        return self._model

    def turn(self, gradient: Gradient, settings: Settings) -> None:
        """Move the model, and add the mean gradient to the sum."""
        mean = gradient.vector / np.asarray(total_weight(gradient), gradient.vector.dtype)
        self._model = self.point() - mean.dtype.type(settings["lr"]) * mean
        self._sum = mean if self._sum is None else self._sum + mean
        self._since.append(replace(gradient, vector=np.empty(0, mean.dtype)))
        self._turns += 1

    def send(self) -> Message | None:
        """Return the sum, if it is due."""
        if self._turns % self._push_every or self._sum is None:
            return None
        message = Message.of(self._since, {"gradient": self._sum})
        self._sum, self._since = None, []
        return message

    def state(self) -> HalfState:
        """Return its model, and how many turns it has made."""
        return {"model": self.point(), "turns": np.array(self._turns)}

    def load_state(self, state: HalfState) -> None:
        """Continue from the state of another half of the same shard, after a push."""
        self._model, self._turns = state["model"], int(state["turns"])


class AsyncSGD(GradientCentre):
    """The central half: it steps at every arrival, and answers at once.

    Args:
        flat: the module; the solver owns its parameters from now on.
        settings: the rule's keys.
        experiment: has the optimiser, the schedule, and how long they are used.
    """

    def __init__(
        self,
        flat: FlatModule | FlatStrip,
        settings: AsyncSGDSettings,
        experiment: Experiment,
    ) -> None:
        self._pushes_per_pull = settings.pull_every // settings.push_every
        self._is_plain = settings.push_every == settings.pull_every == 1
        halves = Halves(make=SendGradients, names=("gradient",))
        if not self._is_plain:
            halves = Halves(
                make=partial(Downpour, settings=settings),
                have_local_models=True,
                keep_state=True,
                names=("gradient",),
            )
        super().__init__(flat, settings, experiment, halves)
        if not self._is_plain:
            refuse_statistics(self.readout())

    def _hold_nothing(self) -> None:
        self._read: dict[int, int] = {}  # the version that each shard has
        self._pushes: dict[int, int] = {}

    def begin(self, shard: int) -> Answer:
        """Return the newest weights."""
        self._read[shard], self._pushes[shard] = self.version, 0
        return self.answer()

    def arrived(self, shard: int, message: Message, version_read: int) -> Verdict:
        """Step along what a shard sent; a shard takes the answer's weights only where that is due."""
        read = self._read[shard]
        self._pushes[shard] += 1
        if self.is_too_old(read):
            verdict = self.ignored(shard)
        else:
            weight = total_weight(message) if self._is_plain else 1.0
            gradient, staleness = message.vectors["gradient"], self.staleness_of(read)
            step = self.step_on(message, gradient, weight, [shard], [staleness])
            verdict = Verdict(answers={shard: self.answer()}, steps=(step,))
        if self._pushes[shard] % self._pushes_per_pull == 0:
            self._read[shard] = self.version
        return verdict
