"""The other two families, through protocol and gathering: a toy rule of arrivals, and one of gossip.

Virtual time stands in for tasks: a queue of (when, shard).  One worker is held back, one is lost and comes
again, and the trace replays to the same bits.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from sparksgd.arithmetic.flat import FlatModule, Weights
from sparksgd.engines.gathering.arrivals import ArrivalGathering
from sparksgd.engines.gathering.gossip import GossipGathering
from sparksgd.engines.gathering.shards import Back, Begin, Decided, Deliver, Drop, Lost, Pushed, Start
from sparksgd.engines.trace import TraceEvent, event_line, first_line, read_trace
from sparksgd.solvers.arrivals import ArrivalSolver, ArrivalStep, Verdict
from sparksgd.solvers.gossip import GossipSolver
from sparksgd.solvers.protocol import (  # fmt: skip
    Answer,
    Gradient,
    Halves,
    Message,
    Need,
    Settings,
    SolverState,
    StepOutcome,
    WorkerHalf,
)

SHARDS = 4
NONE = np.empty(0, np.float32)
NO_COUNTERS = np.empty(0, np.int64)
TARGETS = np.array([[1, 4], [2, 3], [3, 2], [6, -1]], np.float32)
"""Shard s wants the parameters to be TARGETS[s]: its gradient at x is x - TARGETS[s], of one row."""


def gradient_of(shard: int, point: np.ndarray) -> Gradient:
    loss = float(((point - TARGETS[shard]) ** 2).sum() / 2)
    return Gradient(vector=point - TARGETS[shard], statistics=NONE, counters=NO_COUNTERS, loss=loss, rows=1)


def weights_of(version: int, parameters: np.ndarray) -> Weights:
    return Weights(version=version, parameters=parameters, statistics=NONE, counters=NO_COUNTERS)


# Arrivals: stale-synchronous SGD with staleness-aware rates


class PushGradient:
    """A half that sends each gradient, and goes on from what it is answered."""

    lag = 0

    def __init__(self, flat: FlatModule | None, shard: int) -> None:
        self._gradient: Gradient | None = None

    def take(self, answer: Answer) -> None:
        self._at = answer.weights.parameters

    def point(self) -> np.ndarray:
        return self._at

    def turn(self, gradient: Gradient, settings: Settings) -> None:
        self._gradient = gradient

    def send(self) -> Message | None:
        assert self._gradient is not None
        return Message.of([self._gradient], {"gradient": self._gradient.vector})

    def state(self) -> dict[str, np.ndarray]:
        return {"at": self._at}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        self._at = state["at"]


class StaleSynchronous:
    """theta <- theta - lr / max(1, staleness) g at each arrival; nobody is more than a bound ahead."""

    needs = frozenset({Need.ARRIVALS})
    halves = Halves(make=PushGradient)

    def __init__(self, bound: int, lr: float = 0.25) -> None:
        self.version, self._bound, self._lr = 0, bound, lr
        self._theta = np.zeros(2, np.float32)
        self._clock = dict.fromkeys(range(SHARDS), 0)
        self._held: list[int] = []

    def begin(self, shard: int) -> Answer:
        self._clock[shard] = max(self._clock.get(shard, 0), min(self._clock.values(), default=0))
        return self._answer()

    def arrived(self, shard: int, message: Message, version_read: int) -> Verdict:
        rate = np.float32(self._lr / max(1, self.version - version_read))
        self._theta = self._theta - rate * message.vectors["gradient"]
        self.version += 1
        self._clock[shard] += 1
        self._held.append(shard)
        outcome = StepOutcome(lr=float(rate), gradient_norm=None)
        staleness = self.version - 1 - version_read
        step = ArrivalStep(
            outcome=outcome, rows=1, weight=1.0, loss=0.0, shards=(shard,), staleness=(staleness,)
        )
        return Verdict(answers=self._released(), steps=(step,))

    def lost(self, shard: int) -> Verdict:
        del self._clock[shard]
        self._held = [other for other in self._held if other != shard]
        return Verdict(answers=self._released())

    def _released(self) -> dict[int, Answer]:
        slowest = min(self._clock.values())
        free = [shard for shard in self._held if self._clock[shard] - slowest <= self._bound]
        self._held = [shard for shard in self._held if shard not in free]
        return {shard: self._answer() for shard in free}

    def _answer(self) -> Answer:
        return Answer(weights=weights_of(self.version, self._theta), turn=0, settings=({"lr": self._lr},))

    def readout(self) -> Weights:
        return weights_of(self.version, self._theta.copy())

    def state(self) -> SolverState:
        return SolverState(weights=self.readout(), turns=0, rest={"clock": dict(self._clock)})

    def load_state(self, state: SolverState) -> None:
        self.version, self._theta = state.weights.version, state.weights.parameters
        self._clock = dict(state.rest["clock"])


def run_arrivals(
    solver: ArrivalSolver,
    time_of: Callable[[int, int], float],
    *,
    pushes: int,
    workers: int = SHARDS,
    lost: Mapping[int, tuple[int, float]] | None = None,
) -> tuple[Weights, list[TraceEvent], list[tuple[int, int]]]:
    """Let shards make turns in virtual time.

    Args:
        solver: the central half.
        time_of: seconds of a shard's turn.
        pushes: how many messages arrive.
        workers: how many there are; each makes the turns of its shards one at a time.
        lost: by the number of pushes, which shard is lost then, and for how many seconds.
    """
    halves: dict[int, WorkerHalf[Answer]] = {s: solver.halves.make(None, s) for s in range(SHARDS)}
    gathering = ArrivalGathering({shard: shard % workers for shard in range(SHARDS)})
    queue: list[tuple[float, int, int, str]] = []
    now, arrived, staleness = 0.0, 0, list[tuple[int, int]]()
    lives = dict.fromkeys(range(SHARDS), 0)

    def do(instructions: Iterable[Start | Deliver | Drop | Begin]) -> None:
        for told in instructions:
            if isinstance(told, Start):
                point = halves[told.shard].point()
                halves[told.shard].turn(gradient_of(told.shard, point), {})
                heapq.heappush(
                    queue, (now + time_of(told.shard, told.turn), told.shard, lives[told.shard], "push")
                )
            elif isinstance(told, Deliver):
                message = halves[told.shard].send()
                assert message is not None
                staleness.append((told.shard, solver.version - told.version))
                answer(solver.arrived(told.shard, message, told.version).answers, told.shard)
            else:
                answers = (
                    solver.lost(told.shard).answers
                    if isinstance(told, Drop)
                    else {told.shard: solver.begin(told.shard)}
                )
                answer(answers, None)

    def answer(answers: Mapping[int, Answer], sender: int | None) -> None:
        for shard, one in answers.items():
            halves[shard].take(one)
        do(
            gathering.handle(
                Decided(answers={s: a.weights.version for s, a in answers.items()}, sender=sender)
            )
        )

    do(gathering.begin())
    while arrived < pushes:
        now, shard, life, kind = heapq.heappop(queue)
        if kind == "back":
            do(gathering.handle(Back(shard=shard)))
        elif life == lives[shard]:
            arrived += 1
            do(gathering.handle(Pushed(shard=shard)))
        if arrived in (lost or {}):
            gone, away = lost.pop(arrived)
            lives[gone] += 1
            do(gathering.handle(Lost(shard=gone)))
            heapq.heappush(queue, (now + away, gone, lives[gone], "back"))
    return solver.readout(), list(gathering.trace.take()), staleness


def replay_arrivals(solver: ArrivalSolver, events: Sequence[TraceEvent]) -> Weights:
    """Make the turns again in the order of the trace, in no time at all."""
    halves: dict[int, WorkerHalf[Answer]] = {s: solver.halves.make(None, s) for s in range(SHARDS)}
    begun: set[int] = set()
    answers: dict[int, Answer] = {}
    for event in events:
        shard = event.shard
        if event.kind == "pull":
            if shard not in begun:
                answers[shard] = solver.begin(shard)
                begun.add(shard)
            assert answers[shard].weights.version == event.version
            halves[shard].take(answers.pop(shard))
        elif event.kind == "push":
            halves[shard].turn(gradient_of(shard, halves[shard].point()), {})
            answers |= solver.arrived(shard, halves[shard].send(), event.version).answers
        elif event.kind == "lost":
            begun.discard(shard)
            answers |= solver.lost(shard).answers
    return solver.readout()


def written_and_read(family: str, events: Sequence[TraceEvent]) -> list[TraceEvent]:
    lines = [first_line(family), *(event_line(number, event) for number, event in enumerate(events))]
    found, again = read_trace([f"{line}\n".encode() for line in lines], "trace.jsonl")
    assert found == family
    return again


def slow_third(shard: int, turn: int) -> float:
    """Seconds of a turn: shard 3 takes ten times as long."""
    return (10.0 if shard == 3 else 1.0) + 0.1 * shard + 0.01 * (turn * 7 % 5)


def test_the_first_steps_of_the_toy_are_those_that_a_person_works_out():
    def in_turn(shard: int, turn: int) -> float:
        return 1.0 + 0.1 * shard

    solver = StaleSynchronous(bound=99)
    run_arrivals(solver, in_turn, pushes=2)
    # g_0 = (0, 0) - (1, 4): theta = (.25, 1).  Shard 1 read version 0, too, so g_1 = -(2, 3) has staleness 1,
    # and adds (.5, .75).
    assert solver.readout().parameters.tolist() == [0.75, 1.75]


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("bound", [0, 1, 3, 99])
def test_a_worker_is_held_back_one_is_lost_and_the_trace_replays_to_the_same_bits(workers: int, bound: int):
    lost = {7: (1, 5.0), 15: (3, 8.0)}
    ended, events, staleness = run_arrivals(
        StaleSynchronous(bound=bound), slow_third, pushes=40, workers=workers, lost=dict(lost)
    )
    again = written_and_read("arrivals", events)
    assert again == events
    kinds = [event.kind for event in events]
    assert kinds.count("lost") == 2
    if workers == SHARDS:
        assert (kinds.count("hold") > 0) == (bound < 99)
    assert kinds.count("push") == 40 == ended.version
    replayed = replay_arrivals(StaleSynchronous(bound=bound), again)
    assert replayed.parameters.tobytes() == ended.parameters.tobytes()
    assert replayed.version == ended.version
    turns = [event.turn for event in events if event.kind == "push" and event.shard == 0]
    assert turns == list(range(len(turns)))
    assert max(found for _, found in staleness) >= min(bound, 3)


def test_with_bound_0_no_shard_is_a_turn_ahead_of_the_slowest():
    _, events, _ = run_arrivals(StaleSynchronous(bound=0), slow_third, pushes=30)
    made = dict.fromkeys(range(SHARDS), 0)
    for event in events:
        if event.kind == "push":
            made[event.shard] += 1
            assert max(made.values()) - min(made.values()) <= 1


def test_another_order_of_arrival_is_another_trace_and_other_bits():
    one, events, _ = run_arrivals(StaleSynchronous(bound=99), slow_third, pushes=30)
    other, others, _ = run_arrivals(StaleSynchronous(bound=99), lambda shard, turn: 1.0 + shard, pushes=30)
    assert events != others
    assert one.parameters.tobytes() != other.parameters.tobytes()


# Gossip: stochastic gradient push on the directed exponential graph


class PushSum:
    """x <- x - lr g(x / w); half of (x, w) goes to one peer (Assran et al. 2019, algorithm 1)."""

    lag = 0

    def __init__(self, flat: FlatModule | None, shard: int) -> None:
        self._x, self._w, self._loss = np.zeros(2, np.float32), 1.0, 0.0

    def take(self, messages: Mapping[int, Message]) -> None:
        for _, message in sorted(messages.items()):
            self._x = self._x + message.vectors["x"]
            self._w += message.scalars["w"]

    def point(self) -> np.ndarray:
        return self._x / np.float32(self._w)

    def turn(self, gradient: Gradient, settings: Settings) -> None:
        self._x = self._x - np.float32(settings["lr"]) * gradient.vector
        self._gradient = gradient

    def send(self) -> Message | None:
        self._x, self._w = self._x / 2, self._w / 2
        return Message.of([self._gradient], {"x": self._x.copy()}, w=self._w)

    def state(self) -> dict[str, np.ndarray]:
        return {"x": self._x.copy(), "w": np.array(self._w)}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        self._x, self._w = state["x"].copy(), float(state["w"])


class ExponentialGraph:
    """To shard + 2 ** (turn mod (floor(log2(S - 1)) + 1)), and the de-biased mean."""

    version = 0
    needs = frozenset({Need.GOSSIP, Need.SHARD_STATE})
    halves = Halves(make=PushSum, have_local_models=True, keep_state=True)

    def peers(self, turn: int, shard: int) -> Sequence[int]:
        return [(shard + 2 ** (turn % ((SHARDS - 1).bit_length()))) % SHARDS]

    def readout(self, states: Iterable[Mapping[str, np.ndarray]]) -> np.ndarray:
        total, weight = np.zeros(2, np.float32), 0.0
        for state in states:
            total, weight = total + state["x"], weight + float(state["w"])
        return total / np.float32(weight)

    def state(self) -> SolverState:
        return SolverState(weights=weights_of(0, NONE), turns=0)

    def load_state(self, state: SolverState) -> None: ...


def run_gossip(
    solver: GossipSolver, time_of: Callable[[int, int], float], *, turns: int, lost: set[tuple[int, int]]
) -> tuple[np.ndarray, list[TraceEvent]]:
    """Let shards gossip in virtual time; `lost` says which shard is lost in which turn, for a while."""
    halves: dict[int, WorkerHalf[Any]] = {shard: solver.halves.make(None, shard) for shard in range(SHARDS)}
    gathering = GossipGathering({shard: shard for shard in range(SHARDS)}, solver, turns)
    kept = {shard: half.state() for shard, half in halves.items()}
    mail: dict[int, dict[int, dict[int, Message]]] = {shard: {} for shard in range(SHARDS)}
    queue: list[tuple[float, int, int, str]] = []
    now = 0.0

    def do(instructions: Iterable[Start | Deliver]) -> None:
        sent: dict[int, Message] = {}
        for told in instructions:
            if isinstance(told, Deliver):
                if told.shard not in sent:
                    half = halves[told.shard]
                    half.turn(gradient_of(told.shard, half.point()), {"lr": 0.1})
                    message = half.send()
                    assert message is not None
                    sent[told.shard] = message
                mail[told.to].setdefault(told.version, {})[told.shard] = sent[told.shard]
            else:
                if told.turn and told.turn - 1 in mail[told.shard]:
                    halves[told.shard].take(mail[told.shard].pop(told.turn - 1))
                kept[told.shard] = halves[told.shard].state()
                heapq.heappush(queue, (now + time_of(told.shard, told.turn), told.shard, told.turn, "push"))

    do(gathering.begin())
    while queue:
        now, shard, turn, kind = heapq.heappop(queue)
        if kind == "back":
            replaced = solver.halves.make(None, shard)
            replaced.load_state(kept[shard])
            halves[shard] = replaced
            do(gathering.handle(Back(shard=shard)))
        elif (shard, turn) in lost:
            lost.remove((shard, turn))
            halves[shard].turn(gradient_of(shard, halves[shard].point()), {"lr": 9.0})  # what went with it
            do(gathering.handle(Lost(shard=shard)))
            heapq.heappush(queue, (now + 20.0, shard, turn, "back"))
        else:
            do(gathering.handle(Pushed(shard=shard)))
    for shard in range(SHARDS):
        halves[shard].take(mail[shard].pop(turns - 1, {}))
    return solver.readout(halves[shard].state() for shard in range(SHARDS)), list(gathering.trace.take())


def test_gossip_has_the_same_bits_whoever_is_slow_or_lost():
    steady, _ = run_gossip(ExponentialGraph(), lambda shard, turn: 1.0, turns=30, lost=set())
    ended, events = run_gossip(ExponentialGraph(), slow_third, turns=30, lost={(1, 4), (3, 9), (0, 29)})
    assert ended.tobytes() == steady.tobytes()
    kinds = [event.kind for event in events]
    assert kinds.count("push") == 30 * SHARDS
    assert kinds.count("lost") == 3
    assert "hold" in kinds
    assert written_and_read("gossip", events) == events
    np.testing.assert_allclose(ended, TARGETS.mean(axis=0), atol=0.3)  # where all gradients cancel


def test_gossip_s_first_turns_are_those_that_a_person_works_out():
    # One turn at lr .1 from 0: x_s = .1 target_s.  Half stays, half comes from the shard before.
    ended, _ = run_gossip(ExponentialGraph(), lambda shard, turn: 1.0, turns=1, lost=set())
    np.testing.assert_allclose(ended, 0.1 * TARGETS.mean(axis=0), rtol=1e-6)
    assert json.dumps(ExponentialGraph().peers(0, 3)) == "[0]"
    assert [ExponentialGraph().peers(turn, 0) for turn in range(4)] == [[1], [2], [1], [2]]
