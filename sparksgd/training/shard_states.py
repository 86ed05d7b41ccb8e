"""What the states of shards in a checkpoint must be: models of their own, and what their optimisers keep."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparksgd.arithmetic.flat import FlatModule
from sparksgd.config import Config
from sparksgd.errors import DataError
from sparksgd.solvers.flat_optimizer import HAS
from sparksgd.solvers.protocol import CentralSolver, Need
from sparksgd.solvers.torch_optimizers import state_names
from sparksgd.training.value_rules import BYTES, FINITE, Array, MapOf, Rule, Table, whole

__all__ = ["bytes_of_shard", "rule_of_shards"]


def rule_of_shards(config: Config, flat: FlatModule, solver: CentralSolver) -> Rule | None:
    """Return what the states of all shards must be, from those of one that was just made.

    It keeps types, shapes and names, and no vectors.

    Args:
        config: names the optimiser of the shards.
        flat: the module.
        solver: as it was made.

    Returns:
        The rule; None: shards keep nothing that a checkpoint must hold.
    """
    if not _keeps_states(solver):
        return None
    made = solver.halves.make(flat, 0).state()
    rules = {name: BYTES if isinstance(value, bytes) else _like(value) for name, value in made.items()}
    is_own = BYTES in rules.values()
    found = {} if is_own else _kept_later(config, flat)
    later = {name: rule for name, rule in found.items() if name not in rules}
    count = config.train.num_shards

    def of_shard(value: Any, path: str) -> None:
        names = value.keys() if isinstance(value, dict) else ()
        Table(rules | {name: rule for name, rule in later.items() if name in names})(value, path)

    def of_shards(value: Any, path: str) -> None:
        MapOf(whole(0, count - 1), of_shard)(value, path)
        if len(value) != count:
            raise DataError(f"{path} has {len(value)} shards, but must have {count}")

    return of_shards


def bytes_of_shard(flat: FlatModule, solver: CentralSolver, optimiser_bytes: int) -> int:
    """Return how many bytes a checkpoint holds for each shard.

    Args:
        flat: the module.
        solver: as it was made.
        optimiser_bytes: what an optimiser keeps after some steps.

    Returns:
        The bytes; 0: shards keep nothing that a checkpoint must hold.
    """
    if not _keeps_states(solver):
        return 0
    made = solver.halves.make(flat, 0).state()
    return optimiser_bytes + sum(value.nbytes for value in made.values() if isinstance(value, np.ndarray))


def _keeps_states(solver: CentralSolver) -> bool:
    return solver.halves.keep_state and Need.ARRIVALS not in solver.needs  # those begin anew


def _kept_later(config: Config, flat: FlatModule) -> dict[str, Rule]:
    """Return the rules of what torch's optimiser may keep after some steps."""
    vectors, numbers = state_names(config.optimizer, {})
    names = {*vectors, "momentum_buffer"}  # a schedule may switch momentum on
    vector, count = _like(flat.parameters.numpy()), len(flat.parts)
    return dict.fromkeys(names, vector) | {
        f"{name}.{part}": _number for name in (HAS, *numbers) for part in range(count)
    }


def _like(array: np.ndarray[Any, Any]) -> Rule:
    return Array(array.dtype, array.shape) if array.ndim else _number


def _number(value: Any, path: str) -> None:
    Array(np.dtype(np.float64), ())(value, path)
    FINITE(value.item(), path)
