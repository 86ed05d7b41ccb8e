"""An evaluation by the workers of the server: each takes test rows of its host, when its turn has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from sparksgd.arithmetic.flat import Weights
from sparksgd.data.shard import Descriptor
from sparksgd.engines.gathering.evaluations import EvaluationGathering
from sparksgd.engines.replies import Evaluation
from sparksgd.errors import PeerLost
from sparksgd.peers.server_desk import Came, Joined, Left, ServerDesk
from sparksgd.peers.server_frames import (
    EVALUATED,
    HERE,
    MISSING,
    Here,
    evaluate_frame,
    evaluation_in,
    field_of,
    here_in,
)

__all__ = ["evaluated_by_workers"]

_LOOK_S = 0.5


def evaluated_by_workers(
    desk: ServerDesk,
    here: Mapping[int, Here],
    table: Sequence[Descriptor],
    weights: Weights,
    *,
    hold: Callable[[Joined | Left | Came], object],
    meanwhile: Callable[[], object],
    timeout_s: float,
) -> dict[int, Evaluation | None] | None:
    """Let workers evaluate, and return the sums of each test shard; None if they cannot.

    Args:
        desk: reaches the workers.
        here: who is known to be here.
        table: the test shards.
        weights: what to evaluate.
        hold: called with what else happens, in its order; the run goes on with that.
        meanwhile: called now and then.
        timeout_s: how long may pass without an answer.
    """
    gathering = EvaluationGathering({shard.shard: shard.host for shard in table})
    of_shard = {shard.shard: shard for shard in table}
    known = {worker: one for worker, one in here.items() if desk.seats.get(worker) == one.seat}
    has_weights: set[int] = set()

    def give(worker: int) -> None:
        shard = gathering.give(worker, known[worker].host)
        if shard is not None:
            given = None if worker in has_weights else weights
            desk.send(worker, known[worker].seat, evaluate_frame(of_shard[shard], weights.version, given))
            has_weights.add(worker)

    def came(event: Came) -> bool:
        """Take a frame of the evaluation; return whether it answers something."""
        frame, worker = event.frame, event.worker
        if frame.kind == HERE:
            known[worker] = here_in(event.seat, frame)
            give(worker)
        elif frame.kind == EVALUATED and worker in has_weights:
            is_of_this = bool(field_of(frame, "version", int) == weights.version)
            if is_of_this:  # else of the one before
                gathering.answered(field_of(frame, "shard", int), evaluation_in(frame))
            give(worker)
            return is_of_this
        return False

    for worker in sorted(known):
        give(worker)
    answered_s = time.monotonic()
    while not gathering.is_complete:
        if not gathering.can_go_on({one.host for one in known.values()}):
            return None
        meanwhile()
        event = desk.next(_LOOK_S)
        if event is None:
            if time.monotonic() - answered_s > timeout_s:
                return None
            continue
        if not (isinstance(event, Came) and event.frame.kind in (EVALUATED, MISSING)):
            hold(event)
        if isinstance(event, Left):
            gathering.left(event.worker)
            has_weights.discard(event.worker)
            known.pop(event.worker, None)
        elif isinstance(event, Came):
            if event.frame.kind == MISSING:
                return None
            try:
                if came(event):
                    answered_s = time.monotonic()
            except PeerLost as error:
                desk.drop(event.worker, event.seat, str(error))
    return gathering.found
