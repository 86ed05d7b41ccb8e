"""What the parts of a checkpoint must be, so that a run of this experiment can go on from them.

Files have digests, but whoever can write them can write digests, too.  So every value is compared with what
a run has that was just made: types, shapes, keys and bounds.  What an optimiser or a schedule of the user's
own keeps is bytes here, and believed.py says what these may be.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from sparksgd.arithmetic.changes import bits
from sparksgd.arithmetic.flat import FlatModule
from sparksgd.arithmetic.numerics import Numerics
from sparksgd.engines.protocol import Recovery
from sparksgd.errors import DataError
from sparksgd.solvers.protocol import CentralSolver, Need
from sparksgd.training.state import EvaluationReport, NumericsChange, Resumed, Training
from sparksgd.training.value_rules import (
    BOOL,
    BYTES,
    FINITE,
    TEXT,
    WHOLE,
    Array,
    Like,
    ListOf,
    MapOf,
    Rule,
    Table,
    of_fields,
    optional,
    whole,
)

__all__ = ["SolverRules", "check_run"]


def check_run(run: Mapping[str, Any], version: int, training: Training, step: int, turns: int) -> None:
    """Refuse the part "run" of a checkpoint where a value is none that a run of this can have.

    Args:
        run: the part.
        version: of the part.
        training: the run that is to go on.
        step: of the checkpoint.
        turns: that each shard had made.

    Raises:
        DataError: with the path of the value, and the rule.
    """
    steps = whole(0, step)
    # A step of arrivals may use several messages of one shard.
    counts = ListOf(WHOLE if Need.ARRIVALS in training.needs else steps, training.config.train.num_shards)
    participation: dict[str, Rule] = {
        "steps": steps,
        "of_shard": counts,
        "epoch_steps": steps,
        "epoch_of_shard": counts,
        "late": MapOf(WHOLE, steps),
        "answers": MapOf(WHOLE, WHOLE),
    }
    if version > 4:
        participation |= {
            "staleness": MapOf(WHOLE, WHOLE),
            "ignored": WHOLE,
            "lost_workers": WHOLE,
            "next_turns": ListOf(WHOLE, training.config.train.num_shards),
        }
    rules: dict[str, Rule] = {
        "structure": MapOf(TEXT, TEXT),
        "deal": steps,
        "participation": Table(participation),
        "evaluations": ListOf(of_fields(EvaluationReport, () if version > 3 else ("metrics",))),
        "numerics": ListOf(of_fields(Numerics), least=2),
        "numerics_changes": ListOf(of_fields(NumericsChange)),
        "recovery": of_fields(Recovery),
        "sent_bytes": WHOLE,
        "settled_turns": whole(0, turns),
        "resumed": ListOf(of_fields(Resumed)),
        "decided": Table({"channels_last": BOOL, "float16": BOOL}),
        "unreplaced": optional(TEXT),
        "test_digest": optional(TEXT),
    }
    if version > 1:
        rules["settings"] = MapOf(TEXT, TEXT)
    if version > 2:
        rules |= {
            "total_turns": WHOLE,
            "stopped_by": optional(TEXT),
            "is_off_grid": BOOL,
            "best_step": optional(WHOLE),
        }
    if version > 5:
        rules["attributes"] = optional(TEXT)
    Table(rules)(run, "run")
    made = [report["step"] for report in run["evaluations"]]
    if made != sorted(set(made)) or (made and not 1 <= made[0] <= made[-1] <= step):
        raise DataError(f"run.evaluations are of steps that do not grow from 1 to {step}")


class SolverRules:
    """What the part "solver" of a checkpoint must be: what a solver has that was just made, at other values.

    It keeps types and shapes, and no vectors.  So it can be asked while the solver makes steps.

    Args:
        flat: the module.
        solver: as it was made.
        shards: of what shards keep; None: they keep nothing that a checkpoint must hold.
    """

    def __init__(self, flat: FlatModule, solver: CentralSolver, shards: Rule | None = None) -> None:
        self._shards = None if shards is None else Table({"states": shards})
        made = solver.state()
        arrays = {name: getattr(made.weights, name) for name in ("parameters", "statistics", "counters")}
        self._arrays = {name: _like(array) for name, array in arrays.items()}
        self._constants = {name: _like(bits(tensor)) for name, tensor in flat.constants()}
        self._names, self._rest, self._count = list(made.vectors), deepcopy(made.rest), len(flat.parts)
        self._optimizers = {
            type(one.optimizer): one.optimizer.defaults.keys() for one in getattr(solver, "optimizers", ())
        }

    def check(self, values: Mapping[str, Any], step: int, turns: int) -> None:
        """Refuse the part where a value is none that this solver can have.

        Args:
            values: the part.
            step: of the checkpoint.
            turns: that each shard had made.

        Raises:
            DataError: with the path of the value, and the rule.
        """

        def weights(value: Any, path: str) -> None:
            self.check_weights(value, step, path)

        Table(
            {
                "weights": weights,
                "turns": whole(turns, turns),
                "vectors": MapOf(TEXT, self._arrays["parameters"]),
                "rest": _of_rest(self._rest, self._count, turns),
            }
        )(values, "solver")
        for name in self._names:
            if name not in values["vectors"]:
                raise DataError(f"solver.vectors has no {name}")
        for path, state in _elementwise_in(values["rest"], "solver.rest"):
            _check_names(state, values["vectors"], path)
            for kind, defaults in self._optimizers.items():
                if defaults <= state["groups"][0].keys():
                    _check_ranges(kind, state["groups"][0], path)

    def keeps_shards(self, step: int) -> bool:
        """Return whether a checkpoint of this step holds what shards keep; at step 0 they keep nothing."""
        return self._shards is not None and step > 0

    def check_shards(self, values: Any) -> None:
        """Refuse what shards of this run cannot keep.

        Args:
            values: the part "shards".

        Raises:
            DataError: with the path of the value, and the rule.
        """
        assert self._shards is not None
        self._shards(values, "shards")

    def check_weights(self, values: Any, step: int, path: str) -> None:
        """Refuse weights that the module cannot have.

        Args:
            values: the fields of `Weights`.
            step: that they must be of.
            path: of the values.

        Raises:
            DataError: with the path of the value, and the rule.
        """

        def constant(value: Any, inner: str) -> None:
            name = inner.removeprefix(f"{path}.constants.")
            if name not in self._constants:
                raise DataError(f"{inner} is no frozen parameter or buffer of the module")
            self._constants[name](value, inner)

        rules: dict[str, Rule] = {
            "version": whole(step, step),
            **self._arrays,
            "constants": MapOf(TEXT, constant),
        }
        Table(rules)(values, path)


def _like(array: np.ndarray[Any, Any]) -> Array:
    return Array(array.dtype, array.shape)


_ELEMENTWISE = {"groups", "divided", "vectors", "numbers"}
"""The keys of the state of an optimiser that treats each element by itself."""


def _of_rest(made: Any, count: int, turns: int, name: str = "") -> Rule:
    """Return the rule of what a solver keeps beside vectors, from what it keeps at first."""
    if name == "scalars":
        return MapOf(TEXT, FINITE)
    if name == "turn":
        return whole(0, turns)
    if name == "moved":
        return ListOf(TEXT)
    if isinstance(made, bytes):
        return BYTES
    if isinstance(made, Mapping) and made.keys() == _ELEMENTWISE:
        (group,) = made["groups"]
        number = optional(MapOf(TEXT, _of_number))
        return Table(
            {
                "groups": ListOf(Like(group), 1),
                "divided": BOOL,
                "vectors": _either(ListOf(ListOf(TEXT), 1), ListOf(ListOf(TEXT), count)),
                "numbers": _either(ListOf(number, 1), ListOf(number, count)),
            }
        )
    if isinstance(made, Mapping) and name != "schedule" and name != "group":
        return Table({key: _of_rest(value, count, turns, key) for key, value in made.items()})
    return Like(made)


def _either(one: ListOf, other: ListOf) -> Rule:
    def check(value: Any, path: str) -> None:
        (one if isinstance(value, list | tuple) and len(value) == 1 else other)(value, path)

    return check


def _of_number(value: Any, path: str) -> None:
    """Check a number that an optimiser keeps for a parameter, as its count of steps."""
    if isinstance(value, np.ndarray):
        Array(value.dtype if value.dtype.kind in "fiu" else np.dtype(np.float32), ())(value, path)
        value = value.item()
    if value is not None and type(value) is not bool:
        FINITE(value, path)


def _elementwise_in(value: Any, path: str) -> list[tuple[str, Mapping[str, Any]]]:
    if not isinstance(value, Mapping):
        return []
    if value.keys() == _ELEMENTWISE:
        return [(path, value)]
    return [found for key, inner in value.items() for found in _elementwise_in(inner, f"{path}.{key}")]


def _check_names(state: Mapping[str, Any], vectors: Mapping[str, Any], path: str) -> None:
    prefix = "centre." if path.endswith(".centre") else ""
    is_whole = len(state["vectors"]) == len(state["numbers"]) == 1
    if (state["divided"] == is_whole and len(state["vectors"]) != 1) or (
        len(state["vectors"]) != len(state["numbers"])
    ):
        raise DataError(f"{path} has not one entry of vectors and of numbers for each tensor")
    for number, names in enumerate(state["vectors"]):
        for name in names:
            if prefix + name not in vectors:
                raise DataError(f"{path}.vectors[{number}] names {name!r}, which solver.vectors has not")


def _check_ranges(kind: type[Optimizer], group: Mapping[str, Any], path: str) -> None:
    """Let torch check the ranges, as where an optimiser is made; a schedule may set any rate."""
    known = inspect.signature(kind).parameters
    arguments = {name: value for name, value in group.items() if name in known and name != "lr"}
    try:
        kind([nn.Parameter(torch.zeros(1))], **arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{path}.groups[0]: {kind.__name__} does not take it: {error}") from error
