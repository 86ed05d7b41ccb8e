"""Repeat a run: the same shards take part in the same steps.

With backup workers, chance decides which gradients come first.  The run's trace says which did.  A run that
uses the same ones ends at the same parameters.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sparksgd.config import Config
from sparksgd.engines.trace import TraceEvent
from sparksgd.errors import ConfigError, DataError, ReplayDiffers
from sparksgd.imports import resolve, shown
from sparksgd.imports.trust import Trust
from sparksgd.solvers.rules import completed, family_of

if TYPE_CHECKING:  # it imports torch, and the instruction set must be pinned before that
    from sparksgd.engines.protocol import StepReport
    from sparksgd.training.state import Training

__all__ = ["Replay", "check_end", "check_steps", "refuse_short_trace"]

log = logging.getLogger("sparksgd")


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What decides the parameters of a run that is to be repeated."""

    config: dict[str, Any]
    """Its configuration, as nested tables."""

    data_digest: str
    """Of the rows trained on."""

    model_name: str | None
    """The name that built the module; None if the module was given in Python."""

    took_part: Sequence[frozenset[int]]
    """The shards of each step; empty if shards made turns at their own pace."""

    deals: Sequence[int]
    """How often the rows had been dealt again, at each step; empty likewise."""

    parameters_sha256: str | None
    """The digest at its end; None if it was killed."""

    test_digest: str | None = None
    """Of the rows evaluated on; None: there were none, or the run is of an earlier version."""

    best_step: int | None = None
    """The step whose weights it ended with, where early stopping returned to one."""

    arrivals: Sequence[TraceEvent] | None = None
    """What happened, where shards made turns at their own pace."""

    arrival_losses: Sequence[float] = ()
    """The losses of the steps that this made."""

    trust: Trust | None = None
    """Whose code may run, if the configuration comes from a file; None: it was made in this process."""

    @property
    def steps(self) -> int:
        """Return how many steps are repeated."""
        return len(self.took_part) if self.arrivals is None else len(self.arrival_losses)

    def deal_of(self, version: int) -> int:
        """Return how often the rows had been dealt again at the step that begins with a version."""
        return self.deals[version] if self.deals else 0

    def names(self) -> dict[str, str]:
        """Return {key: name} of the code that the configuration names, other than by a name of ours."""
        named = {
            "model.name": self.config.get("model", {}).get("name") if self.model_name is not None else None,
            "loss.name": self.config.get("loss", {}).get("name"),
            "optimizer.name": self.config.get("optimizer", {}).get("name"),
            "schedule.name": self.config.get("schedule", {}).get("name"),
            "solver.name": self.config.get("solver", {}).get("name"),
        }
        named["early_stopping.metric"] = self.config.get("early_stopping", {}).get("metric")
        for number, name in enumerate(self.config.get("train", {}).get("metrics") or ()):
            named[f"train.metrics[{number}]"] = name
        return {key: name for key, name in named.items() if name is not None and ":" in name}

    def check_family(self, config: Config) -> None:
        """Refuse a rule whose messages meet otherwise than those of the run.

        Raises:
            ConfigError: with both.
        """
        family = family_of(config.solver)
        if (family == "arrivals") != (self.arrivals is not None):
            then = "arrivals" if self.arrivals is not None else "rounds or gossip"
            raise ConfigError(
                f'solver.name is "{config.solver.name}", a rule of {family}, but the run to be replayed is '
                f"of {then}: leave solver.name out"
            )

    def check_code(self) -> None:
        """Import the code that the configuration names, and refuse what is not of a trusted package.

        Raises:
            DataError: whose code it is, and how to trust it.
            ConfigError: there is no such code.
        """
        for key, name in self.names().items() if self.trust is not None else ():
            resolve(key, name, {}, self.trust)

    def fingerprint(self) -> str:
        """Return a digest of what is repeated: which shards take part in which step, or all events."""
        if self.arrivals is not None:
            return hashlib.sha256(json.dumps([asdict(event) for event in self.arrivals]).encode()).hexdigest()
        steps = [(sorted(shards), deal) for shards, deal in zip(self.took_part, self.deals, strict=True)]
        return hashlib.sha256(json.dumps(steps).encode()).hexdigest()

    def check(
        self, config: Config, data_digest: str, content_digest: str = "", test_digest: str | None = None
    ) -> None:
        """Refuse another experiment, or other rows.

        Args:
            config: of the replay.
            data_digest: of its rows.
            content_digest: of its rows without their ids, if they have some; earlier versions wrote that.
            test_digest: of the rows evaluated on.

        Raises:
            ConfigError: a key that shapes the parameters has another value.
            DataError: the rows are others.
        """
        replayed = Config.from_dict(self.config)
        then, now = completed(replayed).experiment(), completed(config).experiment()
        free = {"data.train", "data.test"}
        if family_of(config.solver) != "rounds" or config.solver.name == "synchronous":
            free.add("train.steps")  # rounds of several turns are cut short there
        # Those of a simulated run; what they decided is in the trace.
        free |= {key for key in then.keys() | now.keys() if key.startswith(("cluster.", "engine."))}
        for key in sorted(then.keys() | now.keys()):
            if then.get(key) != now.get(key) and key not in free:
                is_given = key == "loss.name" and replayed.loss.is_given
                move = "pass the loss of that run, as loss=" if is_given else "leave it out"
                raise ConfigError(
                    f"{key} is {shown(now.get(key))}, but was {shown(then.get(key))} in the run to be "
                    f"replayed, and it shapes the parameters: {move}"
                )
        if then.get("cluster.gradients") is False:
            raise ConfigError(
                "cluster.gradients was false in the run to be replayed: it computed no gradient, so there is "
                "nothing to repeat"
            )
        if self.data_digest not in (data_digest, content_digest):
            raise DataError(
                f"the rows are not those of the run to be replayed: their digest is {data_digest}, but was "
                f"{self.data_digest}"
            )
        if config.is_judged and self.test_digest != test_digest:
            raise DataError(
                f"the rows to evaluate on are not those of the run to be replayed, which shaped its "
                f"parameters: their digest is {test_digest}, but was {self.test_digest}"
            )


def check_steps(reports: Sequence[StepReport], replay: Replay) -> None:
    """Check that the steps of a replay of arrivals are those of the run.

    Raises:
        DataError: the trace has fewer steps than the run made.
        ReplayDiffers: a step has another loss.
    """
    if replay.arrivals is None:
        return
    for report in reports:
        then = replay.arrival_losses[report.version]
        if report.loss != then and not (math.isnan(report.loss) and math.isnan(then)):
            raise ReplayDiffers(
                f"step {report.step} of the replay has a loss of {report.loss}, but had {then} in the run: "
                f"the trace was changed or is of another run, or torch computes differently here (see "
                f"numerics in summary.json; train.instruction_set holds machines to one)"
            )


def refuse_short_trace(steps: int, replay: Replay) -> None:
    """Refuse a trace that ends before the steps that the run made.

    Raises:
        DataError: with both numbers.
    """
    if steps < replay.steps:
        raise DataError(
            f"the trace ends after {steps} steps, but the run made {replay.steps}: lines are missing at its "
            f"end"
        )


def check_end(training: Training, replay: Replay) -> None:
    """Check that a replay ended at the parameters of the run, and log it.

    Raises:
        ReplayDiffers: it made the same steps, but has other parameters.
    """
    if replay.parameters_sha256 is None or training.version != replay.steps:
        log.info("replayed %d steps; there is no digest of the run after that many", training.version)
        return
    ended = training.flat.parameters_sha256()
    if ended != replay.parameters_sha256:
        raise ReplayDiffers(
            f"the replay ended at parameters {ended}, but the run at {replay.parameters_sha256}: the same "
            f"rows and shards, so torch computes differently here, or the trace was changed (see numerics in "
            f"both summary.json; train.instruction_set holds machines to one)"
        )
    log.info("replayed: the same %d steps, the same parameters", training.version)
