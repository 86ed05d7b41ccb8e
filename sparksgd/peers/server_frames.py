"""What the server and its workers say to each other, as frames.

    worker   here          host, numerics: the first frame
    server   turn          make a turn of a shard, from this answer, or from the last one
    worker   sent, turned  the turn is made: its message, or nothing to send
    server   evaluate      a test shard, with these weights, or with those of the order before
    worker   evaluated     the sums of one test shard
    worker   missing       the file of a test shard is gone, or damaged
    worker   failed        its last frame: the error that ends the run
    server   leave         the run, or the worker's part in it, ends

Legend: P parameters, Q running statistics, C counters, K trainable parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sparksgd import errors
from sparksgd.arithmetic.flat import Weights
from sparksgd.arithmetic.numerics import Numerics
from sparksgd.data.shard import Descriptor
from sparksgd.engines.replies import Evaluation
from sparksgd.errors import ConfigError, PeerLost, SparkSGDError
from sparksgd.peers.frames import Array, Frame
from sparksgd.solvers.protocol import Answer, Message, Settings

__all__ = [
    "EVALUATE",
    "EVALUATED",
    "FAILED",
    "HERE",
    "LEAVE",
    "MISSING",
    "SENT",
    "TURN",
    "TURNED",
    "Here",
    "Times",
    "Vectors",
    "answer_in",
    "descriptor_in",
    "evaluate_frame",
    "evaluated_frame",
    "evaluation_in",
    "failed_frame",
    "failure_in",
    "field_of",
    "here_frame",
    "here_in",
    "message_in",
    "missing_frame",
    "sent_frame",
    "times_in",
    "turn_frame",
    "turned_frame",
    "weights_in",
]

HERE, TURN, SENT, TURNED = "here", "turn", "sent", "turned"
EVALUATE, EVALUATED, MISSING = "evaluate", "evaluated", "missing"
FAILED, LEAVE = "failed", "leave"

_MOST_LETTERS = 80_000  # 12 bytes each in JSON, which a frame's head has room for


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """What vectors of the run look like."""

    parameters: int
    """P."""

    statistics: int
    """Q."""

    counters: int
    """C."""

    trainable: int
    """K."""

    type: np.dtype[Any]
    """Of the parameters."""

    statistics_type: np.dtype[Any]

    @classmethod
    def of(cls, weights: Weights, trainable: int) -> Vectors:
        """Return what vectors look like beside these weights, of so many trainable parameters."""
        return cls(
            trainable=trainable,
            parameters=len(weights.parameters),
            statistics=len(weights.statistics),
            counters=len(weights.counters),
            type=weights.parameters.dtype,
            statistics_type=weights.statistics.dtype,
        )

    @property
    def shapes(self) -> set[tuple[int, ...]]:
        """Return the shapes of arrays that come with every message or answer."""
        return {(length,) for length in (self.parameters, self.statistics, self.counters, self.trainable)}

    def most_bytes(self, vectors: int, evaluated_rows: int = 0) -> int:
        """Return the most bytes that the arrays of a frame have: vectors, or sums over so many rows."""
        sums = (1 << 20) + 32 * evaluated_rows  # metrics have some for each class, or for each row
        each = self.parameters * self.type.itemsize
        return vectors * each + (self.statistics + self.counters) * 8 + self.trainable + sums

    def checked(self, arrays: Mapping[str, Array], name: str) -> Array:
        """Return an array of a frame that must be there.

        Raises:
            PeerLost: it is not, or looks otherwise than it must.
        """
        kinds = {
            "statistics": (self.statistics, self.statistics_type),
            "counters": (self.counters, np.dtype(np.int64)),
        }
        length, kind = kinds.get(name, (self.parameters, self.type))
        array = arrays.get(name)
        if array is None or array.shape != (length,) or array.dtype != kind:
            got = "none" if array is None else f"{array.dtype}{list(array.shape)}"
            raise PeerLost(f"a frame has {got} as {name}, where {kind}[{length}] was due")
        return array


@dataclass(frozen=True, kw_only=True)
class Times:
    """When a worker made a turn."""

    started_at_s: float
    """By the clock of its host."""

    computed_s: float
    waited_s: float
    """For what the server told it, since its turn before."""


def field_of(frame: Frame, name: str, *kinds: type) -> Any:
    """Return a field of a frame that must be there, of one of these types.

    Raises:
        PeerLost: it is not.
    """
    value = frame.fields.get(name)
    if type(value) not in kinds:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise PeerLost(
            f'a frame of kind "{frame.kind}" has {value!r:.80} as {name}, where {expected} was due'
        )
    return value


def here_frame(host: str, numerics: Numerics) -> Frame:
    """Return the first frame of a worker."""
    return Frame(kind=HERE, fields={"host": host, "numerics": asdict(numerics)})


@dataclass(frozen=True, kw_only=True)
class Here:
    """A worker that has said who it is."""

    seat: int
    """Which of its connections this is."""

    host: str
    numerics: Numerics


def here_in(seat: int, frame: Frame) -> Here:
    """Return who a worker says that it is."""
    return Here(seat=seat, host=field_of(frame, "host", str), numerics=_numerics_in(frame))


def _numerics_in(frame: Frame) -> Numerics:
    given, names = field_of(frame, "numerics", dict), Numerics.__dataclass_fields__
    if given.keys() != names.keys() or not all(type(value) in (str, int) for value in given.values()):
        raise PeerLost(f"a worker's numerics are {given!r:.200}, where {', '.join(names)} were due")
    return Numerics(**given)


def turn_frame(shard: int, turn: int, answer: Answer | None) -> Frame:
    """Return the order to make a turn; None: of what the shard was answered last.

    Raises:
        ConfigError: a schedule has set something else than plain numbers.
    """
    fields: dict[str, Any] = {"shard": shard, "turn": turn, "answer": None}
    if answer is None:
        return Frame(kind=TURN, fields=fields)
    for settings in answer.settings:
        for name, value in settings.items():
            if not _is_plain(value):
                raise ConfigError(
                    f"the schedule sets {name} of the optimiser to {value!r:.80}, which is no plain number, "
                    f"and cannot travel to workers: use a schedule that sets numbers"
                )
    fields["answer"] = {
        "version": answer.weights.version,
        "turn": answer.turn,
        "turns": answer.turns,
        "settings": list(map(dict, answer.settings)),
        "scalars": dict(answer.scalars),
        "vectors": list(answer.vectors),
    }
    return Frame(kind=TURN, fields=fields, arrays=_of_weights(answer.weights) | _named(answer.vectors))


def answer_in(frame: Frame, vectors: Vectors) -> Answer | None:
    """Return the answer in an order to make a turn; None: there is none."""
    told = field_of(frame, "answer", dict, type(None))
    if told is None:
        return None
    inner = Frame(kind=frame.kind, fields=told, arrays=frame.arrays)
    return Answer(
        weights=weights_in(inner, vectors),
        turn=field_of(inner, "turn", int),
        turns=field_of(inner, "turns", int),
        settings=tuple(map(_settings, _listed(inner, "settings", dict))),
        vectors=_vectors_in(inner, vectors),
        scalars=_numbers(inner, "scalars"),
    )


def sent_frame(shard: int, turn: int, message: Message, times: Times) -> Frame:
    """Return what a shard sends after a turn, in which forward changed nothing."""
    assert message.changes is None
    fields = {
        "shard": shard,
        "turn": turn,
        "times": asdict(times),
        "scalars": message.scalars,
        "loss": message.loss,
        "rows": message.rows,
        "weight": message.weight,
        "vectors": list(message.vectors),
    }
    arrays = {"statistics": message.statistics, "counters": message.counters, **_named(message.vectors)}
    if message.touched is not None:
        arrays["touched"] = message.touched
    return Frame(kind=SENT, fields=fields, arrays=arrays)


def message_in(
    frame: Frame, vectors: Vectors, rows_due: int | None = None, names: tuple[str, ...] | None = None
) -> Message:
    """Return what a shard has sent.

    Args:
        frame: of the shard's worker.
        vectors: what they look like.
        rows_due: how many rows its turns since the message before had; None: any number.
        names: which vectors it must have; None: any.

    Raises:
        PeerLost: it is no message of these turns.
    """
    touched = frame.arrays.get("touched")
    if touched is not None and (touched.dtype != np.bool_ or touched.shape != (vectors.trainable,)):
        raise PeerLost(
            f"a frame has {touched.dtype}{list(touched.shape)} as touched, where bool[{vectors.trainable}] "
            f"was due"
        )
    rows, weight = _count(frame, "rows"), field_of(frame, "weight", float, int, type(None))
    if not rows or (rows_due is not None and rows > rows_due):
        raise PeerLost(
            f"a message is of {rows} rows, where its turns had {'some' if rows_due is None else rows_due}"
        )
    if weight is not None and not 0 < weight < math.inf:
        raise PeerLost(f"a message is of rows that weigh {weight!r:.80}")
    named = _vectors_in(frame, vectors)
    if names is not None and named.keys() != set(names):
        raise PeerLost(f"a message has vectors {list(named)!r:.80}, where {', '.join(names)} was due")
    return Message(
        vectors=named,
        scalars=_numbers(frame, "scalars"),
        statistics=vectors.checked(frame.arrays, "statistics"),
        counters=vectors.checked(frame.arrays, "counters"),
        loss=float(field_of(frame, "loss", float, int)),
        rows=rows,
        weight=None if weight is None else float(weight),
        touched=touched,
    )


def turned_frame(shard: int, turn: int, times: Times) -> Frame:
    """Return that a turn is made, after which nothing is sent."""
    return Frame(kind=TURNED, fields={"shard": shard, "turn": turn, "times": asdict(times)})


def times_in(frame: Frame) -> Times:
    """Return when a turn was made."""
    given = _numbers(frame, "times")
    if given.keys() != Times.__dataclass_fields__.keys():
        raise PeerLost(f"the times of a turn are {given!r:.200}")
    return Times(**given)


def evaluate_frame(shard: Descriptor, version: int, weights: Weights | None) -> Frame:
    """Return the order to evaluate a test shard; None: with the weights of the order before."""
    arrays = {} if weights is None else _of_weights(weights)
    return Frame(kind=EVALUATE, fields={"shard": asdict(shard), "version": version}, arrays=arrays)


def descriptor_in(frame: Frame) -> Descriptor:
    """Return where the test shard is that an order is of."""
    given = field_of(frame, "shard", dict)
    if given.keys() != Descriptor.__dataclass_fields__.keys():
        raise PeerLost(f"an order to evaluate is of {given!r:.200}")
    return Descriptor(**{**given, "row_digest": tuple(given["row_digest"])})


def weights_in(frame: Frame, vectors: Vectors) -> Weights:
    """Return the weights in a frame."""
    return Weights(
        version=field_of(frame, "version", int),
        parameters=vectors.checked(frame.arrays, "parameters"),
        statistics=vectors.checked(frame.arrays, "statistics"),
        counters=vectors.checked(frame.arrays, "counters"),
    )


def evaluated_frame(shard: int, version: int, sums: Evaluation | None) -> Frame:
    """Return the sums of a test shard; None: it has no rows."""
    fields: dict[str, Any] = {"shard": shard, "version": version, "rows": 0}
    if sums is None:
        return Frame(kind=EVALUATED, fields=fields)
    fields |= {"loss": sums.loss, "correct": sums.correct, "rows": sums.rows, "weight": sums.weight}
    return Frame(kind=EVALUATED, fields=fields, arrays={f"sums/{name}": v for name, v in sums.sums.items()})


def missing_frame(shard: int, version: int) -> Frame:
    """Return that a test shard cannot be evaluated, because its file is gone, or damaged."""
    return Frame(kind=MISSING, fields={"shard": shard, "version": version})


def evaluation_in(frame: Frame) -> Evaluation | None:
    """Return the sums of a test shard; None: it has no rows."""
    rows = _count(frame, "rows")
    if not rows:
        return None
    for name, values in frame.arrays.items():
        if not name.startswith("sums/") or values.dtype != np.float64:
            raise PeerLost(f"the sums of a test shard have {values.dtype} as {name:.80}")
    correct, weight = (field_of(frame, name, float, int, type(None)) for name in ("correct", "weight"))
    return Evaluation(
        loss=float(field_of(frame, "loss", float, int)),
        correct=correct,
        rows=rows,
        weight=weight,
        sums={name.removeprefix("sums/"): values for name, values in frame.arrays.items()},
    )


def failed_frame(failure: SparkSGDError) -> Frame:
    """Return what ends a worker, and the run."""
    return Frame(kind=FAILED, fields={"error": type(failure).__name__, "text": str(failure)[:_MOST_LETTERS]})


def failure_in(frame: Frame) -> SparkSGDError:
    """Return the error that ended a worker."""
    name, text = field_of(frame, "error", str), field_of(frame, "text", str)
    kind = getattr(errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, SparkSGDError)):
        raise PeerLost(f"a worker failed with {name!r:.80}, which is no error of ours: {text:.200}")
    failure: SparkSGDError = kind(text)
    return failure


def _of_weights(weights: Weights) -> dict[str, Array]:
    assert not weights.constants, "rules of arrivals refuse what forward changes"
    return {
        "parameters": weights.parameters,
        "statistics": weights.statistics,
        "counters": weights.counters,
    }


def _named(vectors: Mapping[str, npt.NDArray[np.floating]]) -> dict[str, Array]:
    return {f"vector/{name}": vector for name, vector in vectors.items()}


def _vectors_in(frame: Frame, vectors: Vectors) -> dict[str, Array]:
    names = _listed(frame, "vectors", str)
    return {name: vectors.checked(frame.arrays, f"vector/{name}") for name in names}


def _listed(frame: Frame, name: str, kind: type) -> list[Any]:
    """Return a field that is a list of one type."""
    values: list[Any] = field_of(frame, name, list)
    if not all(type(value) is kind for value in values):
        raise PeerLost(f'a frame of kind "{frame.kind}" has {values!r:.80} as {name}')
    return values


def _count(frame: Frame, name: str) -> int:
    """Return a field that is a number of things."""
    value: int = field_of(frame, name, int)
    if value < 0:
        raise PeerLost(f'a frame of kind "{frame.kind}" has {value} as {name}')
    return value


def _numbers(frame: Frame, name: str) -> dict[str, float]:
    """Return a field that is numbers by name."""
    values = field_of(frame, name, dict)
    if not all(type(value) in (int, float) for value in values.values()):
        raise PeerLost(f'a frame of kind "{frame.kind}" has {values!r:.80} as {name}')
    return {key: float(value) for key, value in values.items()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _settings(given: dict[str, Any]) -> Settings:
    """Return the settings of a turn; JSON knows no tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
