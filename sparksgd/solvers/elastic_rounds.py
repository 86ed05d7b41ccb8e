"""Synchronous elastic averaging: all shards exchange with the centre at once, after tau turns of each.

    shard:   tau turns      x_s <- optimiser(x_s, g)
             exchange       send x_s;  x_s <- x_s - alpha (x_s - theta)       theta: that of the round
    centre:                 theta <- theta + alpha (sum over s of x_s - S theta)

You, Buluc, Demmel 2017, "Scaling deep learning on GPU and Knights Landing clusters" (SC17): Sync EASGD.  See
elastic_averaging.py for the exchanges one by one.  A shard whose pieces of a round have no row takes no part
in its exchange.  The round is cut short at the end of an epoch and of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from sparksgd.arithmetic.flat import FlatModule, FlatStrip
from sparksgd.solvers.arrival_centre import refuse_changes
from sparksgd.solvers.centre import OfModels
from sparksgd.solvers.elastic_averaging import (
    ALPHA,
    ElasticAveraging,
    ElasticModel,
    ElasticSettings,
    elastic,
)
from sparksgd.solvers.protocol import (
    Answer,
    CentralSolver,
    MakeReplica,
    Message,
    MessageShape,
    Quorum,
    StepOutcome,
)
from sparksgd.solvers.rules import Experiment

__all__ = ["ElasticRoundModel", "ElasticRounds", "ElasticSettings", "make_elastic"]


class ElasticRoundModel(ElasticModel):
    """The worker half: at the end of every round it sends its model, and moves towards the weights."""

    def take(self, answer: Answer) -> None:
        """Take a round's weights; the first ones are where the model begins."""
        if self._has_begun:
            self._local.optimizer.set(answer.settings[0])  # a lookahead needs the rate before the turn
        else:
            super().take(answer)
        self._centre, self._alpha = torch.from_numpy(answer.weights.parameters), answer.scalars[ALPHA]

    def send(self) -> Message | None:
        """Return the model, and exchange; None if no piece of the round had rows."""
        if not self._since:
            return None
        message = self._sent()
        local = self._local.parameters
        local.sub_(elastic(local, self._centre, self._alpha))
        return message


class ElasticRounds(OfModels):
    """The central half: the sum of all models draws the centre towards it.

    Args:
        flat: the module; the solver owns its parameters from now on.
        settings: the rule's keys.
        experiment: has the optimiser, the schedule, and how long they are used.
        took_part: of a run that is replayed; every step is made of all shards.
    """

    def __init__(
        self,
        flat: FlatModule | FlatStrip,
        settings: ElasticSettings,
        experiment: Experiment,
        took_part: Sequence[frozenset[int]] | None = None,
    ) -> None:
        make = partial(
            ElasticRoundModel, settings=settings, optimizer=experiment.optimizer, seed=experiment.seed
        )
        super().__init__(flat, experiment, settings.needs(), make, took_part)
        self._quorum = Quorum.of_all(frozenset(range(experiment.num_shards)))
        self._rule, self._experiment = settings, experiment
        self._make_replica = partial(ElasticRounds, settings=settings, experiment=experiment)

    def turns_at(self, turn: int) -> int:
        """Return tau, or fewer if the epoch or the run ends before."""
        return self._experiment.turns_ahead(turn, self._rule.turns_per_exchange)

    def shape_at(self, turn: int) -> MessageShape:
        """Return the name in every message: the model."""
        return MessageShape(vectors=("model",))

    def quorum(self) -> Quorum:
        """Return that every shard takes part."""
        return self._quorum

    def answer(self) -> Answer:
        """Return the weights, how far the exchange draws, and the settings of each turn."""
        if self._answer is None:
            turns = self.turns_at(self.turns)
            self._answer = Answer(
                weights=self.readout(),
                turn=self.turns,
                turns=turns,
                settings=self._rates.ahead(turns),
                scalars={ALPHA: self._rule.alpha(self._rates.lr, self._experiment.num_shards)},
            )
        return self._answer

    def receive(self, total: Message) -> StepOutcome:
        """Step towards the sum of the models.

        Raises:
            UpdateNotFinite: the step would make a parameter NaN or infinite; the weights stay as before.
            ModelError: forward changed parameters or constants.
        """
        refuse_changes(total.changes)
        lr, turns, before = self._rates.lr, self.turns_at(self.turns), self.readout().parameters
        alpha = self._rule.alpha(lr, self._experiment.num_shards)
        with self._centre.changing(), self._centre.step(total, turns, *self._rule.strength):
            models, centre = torch.from_numpy(total.vectors["model"]), torch.from_numpy(before)
            self.flat.parameters.add_(elastic(models, total.shards * centre, alpha))
        self._rates.move(turns)
        self._answer = None
        return StepOutcome(lr=lr, gradient_norm=None)

    def make_replica(self) -> MakeReplica:
        """Return a function that makes another solver of this kind, at version 0; it can be pickled."""
        return self._make_replica


def make_elastic(
    flat: FlatModule | FlatStrip,
    settings: ElasticSettings,
    experiment: Experiment,
    took_part: Sequence[frozenset[int]] | None = None,
) -> CentralSolver:
    """Return the central half for the order that the keys name."""
    if settings.order == "together":
        return ElasticRounds(flat, settings, experiment, took_part)
    return ElasticAveraging(flat, settings, experiment)
