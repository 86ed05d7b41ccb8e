"""Local SGD and DiLoCo: each shard makes H turns by itself, then the centre steps along the mean difference.

    x_s = theta;  in each of H turns  x_s <- optimiser(x_s, (sum of the piece's gradients) / rows)
    Delta = (sum over shards of r_s (theta - x_s)) / (sum over shards of r_s)       r_s: rows of shard s
    (with data.weight: gradients times the rows' weights, and the weight of the rows in place of their number)
    m <- beta m + Delta
    theta <- theta - epsilon (Delta + beta m)

epsilon = 1 and beta = 0 averages the shards' models: local SGD (Stich 2019, arXiv:1805.09767).
epsilon = 0.7, beta = 0.9 and H = 500 with AdamW inside is DiLoCo (Douillard et al. 2023, arXiv:2311.08105).
The first `synchronous_steps` steps may be synchronous SGD: post-local SGD (Lin et al. 2020,
arXiv:1808.07217).  A round is cut short at the end of an epoch and of the run.  Batch-norm's statistics are
the row-weighted mean of the shards' statistics at the end of the round.  What forward changes of parameters
belongs to the local model; what it changes of constants goes on from turn to turn, and all shards must end
with one value.

Legend: P parameters, H turns of a round.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from sparksgd.arithmetic.flat import FlatModule, FlatStrip
from sparksgd.arithmetic.seeds import seed32
from sparksgd.errors import ConfigError
from sparksgd.solvers.centre import OnCentre, refuse_replay_of_fewer, step_along
from sparksgd.solvers.flat_optimizer import HAS, FlatOptimizer, means
from sparksgd.solvers.local_turns import LocalSGDSettings, LocalTurns
from sparksgd.solvers.protocol import (
    Answer,
    Halves,
    MakeReplica,
    Message,
    MessageShape,
    Need,
    Quorum,
    SolverState,
    StepOutcome,
    Vector,
    total_weight,
)
from sparksgd.solvers.rules import Experiment
from sparksgd.solvers.schedules import Rates
from sparksgd.solvers.synchronous import GRADIENT
from sparksgd.solvers.torch_optimizers import another_optimizer, make_optimizer, state_names

__all__ = ["LocalSGD", "LocalSGDSettings"]


class LocalSGD(OnCentre):
    """The central half: it steps along the mean of the shards' differences.

    Args:
        flat: the module, or a strip of it; the solver owns its parameters from now on.
        settings: the rule's keys.
        experiment: optimiser and schedule, and how long they are used.
        took_part: of a run that is replayed; every step is made of all shards.
        is_replica: whether it repeats the steps of another solver: its optimiser was tried before, and a
            step that fails is not undone, because it is then forgotten.
    """

    def __init__(
        self,
        flat: FlatModule | FlatStrip,
        settings: LocalSGDSettings,
        experiment: Experiment,
        took_part: Sequence[frozenset[int]] | None = None,
        *,
        is_replica: bool = False,
    ) -> None:
        refuse_replay_of_fewer(experiment.num_shards, took_part)
        super().__init__(flat, is_replica=is_replica)
        self._quorum = Quorum.of_all(frozenset(range(experiment.num_shards)))
        self.needs = settings.needs()
        self._settings, self._experiment = settings, experiment
        self._make_replica = partial(LocalSGD, settings=settings, experiment=experiment, is_replica=True)
        optimizer = None  # a strip has no optimiser: that of a worker half moves whole models
        if isinstance(flat, FlatModule):
            make = another_optimizer if is_replica else make_optimizer
            optimizer = make(flat, experiment.optimizer, experiment.seed)
            _refuse_several_groups(optimizer, experiment)
        self._rates = Rates.of(experiment, flat)
        if settings.inner_state != "drop" and not self._rates.is_elementwise:
            raise ConfigError(
                f'solver.inner_state is "{settings.inner_state}", but optimizer.name is '
                f"{experiment.optimizer.name!r}, whose state is not one value for each parameter: use "
                f'"drop", or an optimiser of torch.optim that treats each element by itself'
            )
        self.by_strips = settings.inner_state == "drop" and not settings.synchronous_steps
        self._inner = optimizer if settings.synchronous_steps else None
        is_averaged = settings.inner_state == "average"
        self._state_names = state_names(experiment.optimizer, self._rates.now) if is_averaged else ((), ())
        self.halves = Halves(
            make=partial(
                LocalTurns,
                settings=settings,
                optimizer=experiment.optimizer,
                state_names=self._state_names,
                seed=experiment.seed,
            ),
            have_local_models=True,
            keep_state=Need.SHARD_STATE in self.needs,
            vectors=1 + len(self._state_names[0]),
        )
        self.remarks = self._rates.remarks + _remarks(settings, experiment, self._rates)
        self._momentum = torch.zeros_like(flat.parameters) if settings.outer_momentum else None
        self._vectors: dict[str, Vector] = {}
        self._scalars: dict[str, float] = {}

    @property
    def optimizers(self) -> Sequence[FlatOptimizer]:
        """Return the optimisers that make its steps: that of the synchronous ones."""
        return [] if self._inner is None else [self._inner]

    @property
    def _is_local(self) -> bool:
        """Whether the next round has local turns."""
        return self.turns >= self._settings.synchronous_steps

    def turns_at(self, turn: int) -> int:
        """Return H, or fewer if the epoch or the run ends before; 1 before the local turns begin."""
        if turn < self._settings.synchronous_steps:
            return 1
        return self._experiment.turns_ahead(turn, self._settings.turns_per_round)

    def shape_at(self, turn: int) -> MessageShape:
        """Return the names in the messages: the gradient, or the difference and what else is averaged."""
        if turn < self._settings.synchronous_steps:
            return GRADIENT
        vectors, scalars = self._state_names
        count = len(self.flat.parts) if self._settings.inner_state == "average" else 0
        of_each = [f"{name}.{k}" for name in (HAS, *scalars) for k in range(count)]
        return MessageShape(vectors=("difference", *vectors), scalars=tuple(of_each))

    def answer(self) -> Answer:
        """Return the weights, and the settings of each turn; the same object until the next step."""
        if self._answer is None:
            turns = self.turns_at(self.turns)
            self._answer = Answer(
                weights=self._centre.readout(),
                turn=self.turns,
                turns=turns,
                settings=self._rates.ahead(turns) if self._is_local else (),
                vectors=self._vectors,
                scalars=self._scalars,
            )
        return self._answer

    def quorum(self) -> Quorum:
        """Return that every shard takes part."""
        return self._quorum

    def receive(self, total: Message) -> StepOutcome:
        """Step along the mean difference; or, before the local turns begin, along the mean gradient.

        Raises:
            UpdateNotFinite: the step would make a parameter NaN or infinite; the weights stay as before.
        """
        lr, turns, step = self._rates.lr, self.turns_at(self.turns), self._centre.step
        with self._centre.changing():
            if self._is_local:
                norm = None
                with step(total, turns, "solver.outer_lr", self._settings.outer_lr):
                    momentum = self._step_outside(total)
                self._momentum, given = momentum, self._averaged(total)
            else:
                with step(total, turns, "optimizer.lr", lr):
                    norm = self._step_inside(total)
                given = self._of_centre() if self._is_local else ({}, {})
            self._rates.move(turns)
            (self._vectors, self._scalars), self._answer = given, None
        return StepOutcome(lr=lr, gradient_norm=norm)

    def _of_centre(self) -> tuple[dict[str, Vector], dict[str, float]]:
        """Return the state of the centre's optimiser, with which those of the shards begin."""
        assert self._inner is not None
        return self._inner.averageable() if self._rates.is_elementwise else ({}, {})

    def _step_outside(self, total: Message) -> torch.Tensor | None:
        """Make the outer step: SGD with Nesterov momentum, whose gradient is the mean difference.

        Returns:
            The momentum after it; None without one.
        """
        weight = np.asarray(total_weight(total), np.float32)
        difference = torch.from_numpy(total.vectors["difference"] / weight)
        step, momentum, beta = difference, self._momentum, self._settings.outer_momentum
        if momentum is not None:
            momentum = beta * momentum + difference
            step = difference + beta * momentum
        self.flat.parameters.sub_(self._settings.outer_lr * step)
        return momentum

    def _step_inside(self, total: Message) -> float | None:
        """Make a step of synchronous SGD; return the norm of the mean gradient if gradients are clipped."""
        assert self._inner is not None
        self._inner.set(self._rates.now)
        return step_along(
            self._inner,
            total.vectors["gradient"],
            total_weight(total),
            total.touched,
            self._settings.clip_norm,
            seed32(self._experiment.seed, "optimizer", self.version),
        )

    def _averaged(self, total: Message) -> tuple[dict[str, Vector], dict[str, float]]:
        """Return the mean state of the shards' optimisers, where it is averaged."""
        if self._settings.inner_state != "average":
            return {}, {}
        vectors = {name: total.vectors[name] for name in self._state_names[0]}
        return means(vectors, total.scalars, total_weight(total), self.flat.parts)

    def state(self) -> SolverState:
        """Return what its next step depends on."""
        vectors, rest = ({}, None) if self._inner is None else self._inner.state()
        momentum = {} if self._momentum is None else {"outer.momentum": self._momentum.numpy()}
        return SolverState(
            weights=self.readout(),
            turns=self.turns,
            vectors={
                **momentum,
                **{f"centre.{name}": vector for name, vector in vectors.items()},
                **{f"halves.{name}": vector for name, vector in self._vectors.items()},
            },
            rest={"centre": rest, "rates": self._rates.state(), "scalars": dict(self._scalars)},
        )

    def load_state(self, state: SolverState) -> None:
        """Continue from the state of another solver, at any step."""

        def named(prefix: str) -> dict[str, Vector]:
            found = state.vectors.items()
            return {name.removeprefix(prefix): vector for name, vector in found if name.startswith(prefix)}

        with self._centre.changing():
            if self._momentum is not None:
                self._momentum = torch.from_numpy(state.vectors["outer.momentum"].copy())
            if self._inner is not None:
                self._inner.load_state(named("centre."), state.rest["centre"])
            self._vectors = {name: vector.copy() for name, vector in named("halves.").items()}
            self._scalars = dict(state.rest["scalars"])
            self._rates.load_state(state.rest["rates"])
            self._centre.load(state)
            self._answer = None

    def make_replica(self) -> MakeReplica:
        """Return a function that makes another solver of this kind, at version 0; it can be pickled."""
        return self._make_replica


def _refuse_several_groups(optimizer: FlatOptimizer, experiment: Experiment) -> None:
    """Refuse a schedule of several rates, because the answer to the halves has one of each name."""
    count = len(optimizer.optimizer.param_groups)
    if count > 1 and experiment.schedule.name is not None:
        raise ConfigError(
            f"schedule.name is {experiment.schedule.name!r}, but {experiment.optimizer.name} divides the "
            f'parameters into {count} groups, and solver.name = "local_sgd" moves the rate of one: leave the '
            f'schedule out, or use solver.name = "synchronous"'
        )


def _remarks(settings: LocalSGDSettings, experiment: Experiment, rates: Rates) -> list[str]:
    """Return remarks on settings that have no effect, or not the expected one."""
    found, first = [], settings.synchronous_steps
    if first >= experiment.total_turns > 0:
        found.append(
            f"solver.synchronous_steps is {first}, but the run has {experiment.total_turns} turns: no round "
            f"of local turns is made"
        )
    elif first and not rates.is_elementwise:
        found.append(
            f"optimizer.name is {experiment.optimizer.name!r}, whose state cannot be copied: after "
            f"solver.synchronous_steps the shards' optimisers begin without one"
        )
    return found
