"""All engines by their names: what each carries, and where its class is; and which one a run gets.

An engine that lacks what a solver needs is refused before training, with the engines that have it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sparksgd.config import EngineConfig
from sparksgd.errors import ConfigError
from sparksgd.imports import did_you_mean, shown
from sparksgd.solvers.protocol import Need

__all__ = [
    "ALLREDUCE",
    "INLINE",
    "KINDS",
    "SERVER",
    "SIMULATED",
    "STAGES",
    "TREE",
    "EngineKind",
    "candidates",
    "first_of_each_name",
    "refuse_uncarried",
]


@dataclass(frozen=True, kw_only=True)
class EngineKind:
    """An engine, in one of its modes."""

    name: str
    """The value of engine.name."""

    mode: str
    """How its steps run, for reports."""

    carries: frozenset[Need]
    """The needs of solvers that it fulfils."""

    home: str
    """Where its class is, as package.module:name."""

    on_spark: bool = True
    """Whether it computes on a cluster."""

    barrier: bool = False
    """Whether its Spark jobs start all tasks together; this excludes dynamic allocation."""

    resumes: bool = True
    """Whether its runs have checkpoints to go on from."""

    setting: str = ""
    """What selects it, besides engine.name."""

    def __str__(self) -> str:
        return f'engine.name = "{self.name}"{self.setting}'


INLINE = EngineKind(
    name="inline",
    mode="in one process",
    carries=frozenset(
        {Need.ROUNDS, Need.REPLAY, Need.RECORDED_ARRIVALS, Need.GOSSIP, Need.SHARD_STATE, Need.LAG}
    ),
    home="sparksgd.engines.inline:InlineEngine",
    on_spark=False,
)
SIMULATED = EngineKind(
    name="simulated",
    mode="in one process, in virtual time",
    carries=frozenset({Need.ROUNDS, Need.ARRIVALS, Need.GOSSIP, Need.QUORUM, Need.SHARD_STATE, Need.LAG}),
    home="sparksgd.engines.simulated.engine:SimulatedEngine",
    on_spark=False,
    resumes=False,
    setting=" (in virtual time)",
)
TREE = EngineKind(
    name="tree",
    mode="a barrier stage for each step",
    carries=frozenset({Need.ROUNDS, Need.REPLAY}),
    home="sparksgd.spark.engines.tree:TreeEngine",
    barrier=True,
)
STAGES = EngineKind(
    name="tree",
    mode="an ordinary stage for each step",
    carries=frozenset({Need.ROUNDS, Need.REPLAY, Need.QUORUM}),
    home="sparksgd.spark.engines.stages:StagesEngine",
    setting=" (in ordinary stages)",
)
ALLREDUCE = EngineKind(
    name="allreduce",
    mode="a barrier stage for many steps",
    carries=frozenset({Need.ROUNDS}),
    home="sparksgd.spark.engines.allreduce:AllReduceEngine",
    barrier=True,
)

SERVER = EngineKind(
    name="server",
    mode="a Spark job for each worker, as long as the run",
    carries=frozenset({Need.ARRIVALS, Need.LAG}),
    home="sparksgd.spark.engines.server:ServerEngine",
)

KINDS = (INLINE, TREE, STAGES, ALLREDUCE, SERVER, SIMULATED)

_AUTO = "auto"
_NAMES = (*dict.fromkeys(kind.name for kind in KINDS), _AUTO)


def candidates(config: EngineConfig, needs: Iterable[Need], solver: str) -> list[EngineKind]:
    """Return the engines that a configuration allows for a solver, in the order in which to try them.

    Args:
        config: names the engine, or "auto".
        needs: of the solver.
        solver: its name, for the error.

    Raises:
        ConfigError: there is no engine of that name, or it does not carry the solver.
    """
    if config.name not in _NAMES:
        raise ConfigError(
            f"engine.name is {shown(config.name)}, which is no engine{did_you_mean(config.name, _NAMES)}"
        )
    wanted = frozenset(needs)
    named = [kind for kind in KINDS if kind.name == config.name]
    if config.name == _AUTO:
        named = [ALLREDUCE, TREE, STAGES, SERVER]
    if not config.barrier:
        named = [kind for kind in named if not kind.barrier] or named
    able = [kind for kind in named if wanted <= kind.carries]
    if not config.barrier and any(kind.barrier for kind in able):
        raise ConfigError(
            f'engine.barrier is false, but engine.name is "{config.name}", whose workers all wait for each '
            f'other: use engine.name = "tree"'
        )
    if not able:
        refuse_uncarried(min(named, key=lambda kind: len(wanted - kind.carries)), wanted, solver)
    return able


def first_of_each_name(kinds: Iterable[EngineKind]) -> list[EngineKind]:
    """Return of each engine's modes the first one, which a run takes."""
    found: dict[str, EngineKind] = {}
    for kind in kinds:
        found.setdefault(kind.name, kind)
    return list(found.values())


def refuse_uncarried(kind: EngineKind, needs: frozenset[Need], solver: str) -> None:
    """Refuse an engine that lacks what a solver needs.

    Raises:
        ConfigError: names what it lacks, and the engines that have it.
    """
    lacking = [need.value for need in Need if need in needs - kind.carries]
    if not lacking:
        return
    others = [str(other) for other in KINDS if needs <= other.carries]
    instead = f"use {' or '.join(others)}" if others else "no engine of this version does"
    raise ConfigError(f"{solver} needs {' and '.join(lacking)}, which {kind} does not carry: {instead}")
