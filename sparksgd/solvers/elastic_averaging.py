"""Elastic averaging: each shard trains a model of its own, and a spring draws it and the centre together.

    shard:   each turn      x <- optimiser(x, g)                g: mean gradient of the piece at x
             each tau       send x;  e = alpha (x - theta);  x <- x - e
    centre:                 e = alpha (x - theta);  theta <- theta + e       both with the same x and theta

    alpha    beta / S, or eta rho, which follows the learning rate

Zhang, Choromanska, LeCun 2015, "Deep learning with Elastic Averaging SGD" (NeurIPS), algorithm 1, which uses
alpha = beta / S.  You et al. 2017, "Scaling deep learning on GPU and Knights Landing clusters" (SC17) use
alpha = eta rho: first come, first served is their Async EASGD; in the order of the shards, Original EASGD.
With torch's momentum inside it is their Async MEASGD.  With `lookahead`, too, it is EAMSGD (algorithm 2 of
2015), for a constant rate: the gradient is taken where the momentum leads.

    m <- mu m + g(x - eta mu m);  x <- x - eta m

With `overlap` the exchange runs beside the next turn, and e is taken after that: algorithm 1 of 2015.

    x' <- optimiser(x, g(x)) - e           e: of the x that was sent, and of theta when it arrived

alpha = 0 leaves each shard alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from sparksgd.arithmetic.flat import FlatModule, FlatStrip, Weights
from sparksgd.config import Config, OptimizerConfig
from sparksgd.errors import ConfigError, UpdateNotFinite
from sparksgd.solvers.arrival_centre import ArrivalSettings, ModelCentre
from sparksgd.solvers.arrivals import ArrivalStep, Verdict
from sparksgd.solvers.local_model import LocalModel
from sparksgd.solvers.protocol import (
    Answer,
    Gradient,
    HalfState,
    Message,
    Need,
    Settings,
    SolverState,
    StepOutcome,
    Vector,
)
from sparksgd.solvers.rules import Experiment, require_at_least

__all__ = ["ALPHA", "ElasticAveraging", "ElasticModel", "ElasticSettings", "elastic"]

ALPHA = "alpha"
"""What an answer calls it."""


@dataclass(frozen=True, kw_only=True)
class ElasticSettings(ArrivalSettings):
    """The keys of solver.name = "elastic_averaging"."""

    turns_per_exchange: int = 10
    """tau: how many turns a shard makes between two exchanges with the centre."""

    beta: float = 0.9
    """The strength of the spring between the centre and all shards: alpha = beta / train.num_shards."""

    rho: float | None = None
    """The strength of the spring, in place of beta: alpha = learning rate * rho."""

    lookahead: bool = False
    """Whether gradients are taken where the momentum of optimizer.name = "SGD" leads: EAMSGD."""

    order: Literal["arrival", "shard", "together"] = "arrival"
    """In which order the centre serves the shards: as they arrive, each in its turn (shard), or all at once,
    in rounds (together)."""

    overlap: bool = False
    """Whether a shard makes its next turn while it exchanges, and moves towards the centre after that."""

    clip_norm: float | None = None
    """The largest Euclidean norm of a gradient that an optimiser takes.  If not set, gradients are not
    clipped."""

    def check(self, config: Config) -> None:
        """Refuse what does not fit the rest of the configuration."""
        super().check(config)
        require_at_least("solver.turns_per_exchange", self.turns_per_exchange, 1)
        require_at_least("solver.beta", self.beta, 0)
        require_at_least("solver.rho", self.rho, 0)
        require_at_least("solver.clip_norm", self.clip_norm, 0, above=True)
        if self.beta > config.train.num_shards:
            raise ConfigError(
                f"solver.beta is {self.beta}, but there are {config.train.num_shards} shards, so alpha would "
                f"be above 1, and an exchange go past the other side: set beta to 1 or less"
            )
        lr = config.optimizer.arguments.get("lr", 0)
        if self.rho is not None and isinstance(lr, int | float) and lr * self.rho > 1:
            raise ConfigError(
                f"solver.rho is {self.rho} and optimizer.lr {lr}, so alpha = {lr * self.rho:g} would be "
                f"above 1, and an exchange go past the other side: set rho to {1 / lr:g} or less"
            )
        if self.order != "arrival" and self.max_staleness is not None:
            raise ConfigError(
                f'solver.max_staleness is {self.max_staleness}, but solver.order is "{self.order}": shards '
                f"are served in turn, so the staleness of each is the same. Leave max_staleness out"
            )
        if self.overlap and self.order != "arrival":
            raise ConfigError(
                f'solver.overlap is true, but solver.order is "{self.order}": a shard that waits for others '
                f'cannot compute meanwhile. Set solver.order = "arrival", or leave overlap out'
            )
        given = config.optimizer
        if self.lookahead and (
            given.name != "SGD" or not given.arguments.get("momentum") or given.arguments.get("nesterov")
        ):
            raise ConfigError(
                'solver.lookahead is true, which needs optimizer.name = "SGD" with momentum and without '
                f"nesterov, but the section [optimizer] has {given.name} with {dict(given.arguments)}: set "
                f"optimizer.momentum, such as 0.9, or leave lookahead out"
            )

    def needs(self) -> frozenset[Need]:
        """Return what the engine must carry."""
        if self.order == "together":
            return frozenset({Need.ROUNDS, Need.SHARD_STATE})
        return super().needs() | ({Need.LAG} if self.overlap else set())

    @property
    def strength(self) -> tuple[str, float]:
        """Return the key that says how strong the spring is, and its value."""
        return ("solver.beta", self.beta) if self.rho is None else ("solver.rho", self.rho)

    def alpha(self, lr: float, num_shards: int) -> float:
        """Return how far an exchange draws both sides: 0 not at all, 1 to the other one's place.

        Args:
            lr: the learning rate.
            num_shards: S.
        """
        return self.beta / num_shards if self.rho is None else lr * self.rho


class ElasticModel:
    """The worker half: a model that an optimiser moves, and that keeps near the centre's.

    Args:
        flat: a module of the run's shapes.
        shard: the shard that it belongs to.
        settings: the rule's keys.
        optimizer: which class of torch.optim, and its arguments.
        seed: of the run.
    """

    def __init__(
        self,
        flat: FlatModule,
        shard: int,
        *,
        settings: ElasticSettings,
        optimizer: OptimizerConfig,
        seed: int,
    ) -> None:
        self._settings, self.lag = settings, int(settings.overlap)
        self._exchanged: Vector | None = None  # the model that was sent last
        self._local = LocalModel(flat, optimizer, seed, settings.clip_norm)
        self._turns = 0
        self._since: list[Gradient] = []
        self._has_begun = False

    def take(self, answer: Answer) -> None:
        """Begin at the centre's weights; later, move towards the weights that the centre had."""
        self._local.optimizer.set(answer.settings[0])  # a lookahead needs the rate before the turn
        local, centre = self._local.parameters, torch.from_numpy(answer.weights.parameters)
        if self._has_begun:
            assert self._exchanged is not None
            local.sub_(elastic(torch.from_numpy(self._exchanged), centre, answer.scalars[ALPHA]))
        else:
            local.copy_(centre)
            self._has_begun = True

    def point(self) -> Vector:
        """Return the model, or where its momentum leads."""
        local = self._local.parameters.numpy()
        if not self._settings.lookahead:
            return local
        momentum = self._local.optimizer.state()[0].get("momentum_buffer")
        if momentum is None:
            return local
        kind, group = local.dtype.type, self._local.optimizer.group
        ahead: Vector = local - kind(group["lr"] * group["momentum"]) * momentum
        return ahead

    def turn(self, gradient: Gradient, settings: Settings) -> None:
        """Let the optimiser make a step with the piece's mean gradient.

        Raises:
            UpdateNotFinite: a parameter became NaN or infinite.
        """
        self._local.step(gradient, settings)
        self._since.append(replace(gradient, vector=np.empty(0, gradient.vector.dtype)))
        self._turns += 1

    def send(self) -> Message | None:
        """Return the model, if an exchange is due."""
        if self._turns % self._settings.turns_per_exchange:
            return None
        message = self._sent()
        self._exchanged = message.vectors["model"]
        return message

    def _sent(self) -> Message:
        message = Message.of(self._since, {"model": self._local.parameters.numpy().copy()})
        self._since = []
        return message

    def state(self) -> HalfState:
        """Return its model, how far it is, what its optimiser keeps, and what it sent last."""
        counts = np.array([self._turns, self._has_begun])
        exchanged = {} if self._exchanged is None else {"exchanged": self._exchanged}
        return {"model": self._local.parameters.numpy(), "counts": counts, **exchanged, **self._local.kept()}

    def load_state(self, state: HalfState) -> None:
        """Continue from the state of another half of the same shard."""
        kept = dict(state)
        self._local.parameters.copy_(torch.from_numpy(kept.pop("model")))
        exchanged = kept.pop("exchanged", None)
        self._exchanged = None if exchanged is None else exchanged.copy()
        turns, begun = kept.pop("counts").tolist()
        self._turns, self._has_begun = turns, bool(begun)
        self._local.load_kept(kept)


class ElasticAveraging(ModelCentre):
    """The central half: every model that arrives draws the centre towards it.

    Args:
        flat: the module; the solver owns its parameters from now on.
        settings: the rule's keys.
        experiment: has the optimiser, the schedule, and how long they are used.
    """

    def __init__(
        self,
        flat: FlatModule | FlatStrip,
        settings: ElasticSettings,
        experiment: Experiment,
    ) -> None:
        make = partial(ElasticModel, settings=settings, optimizer=experiment.optimizer, seed=experiment.seed)
        super().__init__(flat, settings, experiment, make, ("model",))
        self._rule, self._num_shards = settings, experiment.num_shards
        self._next = 0

    def _hold_nothing(self) -> None:
        self._there: set[int] = set()
        self._queue: dict[int, tuple[Message, int]] = {}
        self._failure: UpdateNotFinite | None = None

    def begin(self, shard: int) -> Answer:
        """Return the newest weights."""
        self._there.add(shard)
        return self.answer()

    def arrived(self, shard: int, message: Message, version_read: int) -> Verdict:
        """Exchange with a shard, or with all whose turn it is."""
        if self.is_too_old(version_read):
            return Verdict(answers={shard: self._answer_of(self.readout(), 0.0)}, is_ignored=True)
        if self._rule.order == "arrival":
            answer, step = self._meet(shard, message, version_read)
            return Verdict(answers={shard: answer}, steps=(step,))
        if self._failure is not None:
            raise self._failure
        self._queue[shard] = message, version_read
        return self._served()

    def lost(self, shard: int) -> Verdict:
        """Serve those who waited for this shard alone."""
        self._there.discard(shard)
        self._queue.pop(shard, None)
        return self._served()

    def _served(self) -> Verdict:
        """Serve the shards in their order, as long as the next one is there."""
        answers: dict[int, Answer] = {}
        steps: list[ArrivalStep] = []
        while self._queue:
            shard = min((one for one in self._there if one >= self._next), default=min(self._there))
            if shard not in self._queue:
                break
            try:
                answers[shard], step = self._meet(shard, *self._queue.pop(shard))
            except UpdateNotFinite as error:
                if not steps:
                    raise
                self._failure = error  # told after the steps that were made are
                break
            steps.append(step)
            self._next = shard + 1
        return Verdict(answers=answers, steps=tuple(steps))

    def _meet(self, shard: int, message: Message, version_read: int) -> tuple[Answer, ArrivalStep]:
        """Draw the centre towards a model; return what draws the model towards the centre."""
        lr = self._rates.lr
        alpha = self._rule.alpha(lr, self._num_shards)
        before, staleness = self.readout(), self.staleness_of(version_read)
        model, centre = torch.from_numpy(message.vectors["model"]), torch.from_numpy(before.parameters)
        with self._exchange(message, *self._rule.strength):
            self.flat.parameters.add_(elastic(model, centre, alpha))
        step = self._made(message, [shard], [staleness], StepOutcome(lr=lr, gradient_norm=None))
        return self._answer_of(before, alpha), step

    def _answer_of(self, weights: Weights, alpha: float) -> Answer:
        """Return weights for an exchange that draws this far, and the settings of now.

        They count as of this version: the shard's own exchange makes nothing stale.
        """
        weights = replace(weights, version=self.version)
        return replace(self.answer(), weights=weights, scalars={ALPHA: alpha})

    def _kept(self) -> tuple[dict[str, Vector], dict[str, Any]]:
        vectors, rest = super()._kept()
        return vectors, {**rest, "next": self._next}

    def _load_kept(self, state: SolverState) -> None:
        super()._load_kept(state)
        self._next = state.rest["next"]


def elastic(model: torch.Tensor, centre: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return alpha (model - centre), which both sides compute from the same values."""
    return (model - centre).mul_(alpha)
