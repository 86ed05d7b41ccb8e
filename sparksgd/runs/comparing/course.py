"""The course of a comparison: tune the run in one process, set the target, tune the solvers, make the runs.

Trials share one seed.  The runs that are reported have fresh seeds, the same for every solver and cluster: a
seed decides the initial weights, the order of rows and the cluster's noise.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from sparksgd.config import Config
from sparksgd.errors import ConfigError, TrainingError
from sparksgd.runs.comparing.grid import (
    MOST_EXTENSIONS,
    Settings,
    best_of,
    extension,
    is_at_edge,
    trials_of,
)
from sparksgd.runs.comparing.kept_runs import KeptRuns
from sparksgd.runs.comparing.outcomes import Outcome
from sparksgd.runs.comparing.question import Competitor, Question
from sparksgd.runs.comparing.statistics import Difference, difference, target_of
from sparksgd.solvers.protocol import Need
from sparksgd.solvers.rules import completed, settings_of
from sparksgd.training.preflight import allowed_engines

__all__ = ["Comparison", "Entry", "Told", "Tuned", "compare", "refuse_what_cannot_run"]

log = logging.getLogger("sparksgd")

Told = Callable[[int, int, str], None]
"""Called before each run, and at the end: how many are over, how many there will be, and what comes."""

_DEPENDS_ON_TIME = frozenset({Need.ARRIVALS, Need.QUORUM})


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """How a solver was tuned, and what was chosen."""

    chosen: Settings
    trials: int
    diverged: int
    """How many of the trials."""

    rows: int
    """Of all trials."""

    virtual_s: float
    """Of all trials."""

    at_edge: bool
    """Whether the best rate still is the smallest or the largest, after the last extension."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A solver on a cluster."""

    cluster: str
    competitor: Competitor
    tuned: Tuned
    outcomes: tuple[Outcome, ...]
    """One for each seed."""

    def times(self, target: float) -> list[float]:
        """Return the virtual seconds to the target, for each seed."""
        return [outcome.time_to(target) for outcome in self.outcomes]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a comparison found."""

    question: Question
    target: float
    one_process: Tuned
    entries: tuple[Entry, ...]
    """By cluster, then by solver; the reference is the first of each cluster."""

    def of(self, cluster: str) -> list[Entry]:
        """Return the solvers on a cluster, the reference first."""
        return [entry for entry in self.entries if entry.cluster == cluster]

    def difference(self, entry: Entry) -> Difference:
        """Return the ratio of an entry's times to the reference's on the same cluster."""
        reference = self.of(entry.cluster)[0]
        return difference(entry.times(self.target), reference.times(self.target))


def compare(question: Question, kept: KeptRuns, told: Told) -> Comparison:
    """Answer a question; runs that are kept are not made again.

    Args:
        question: what is compared.
        kept: makes the runs.
        told: hears of the progress.

    Raises:
        ConfigError: a run is refused, before the first one is made.
        TrainingError: there is no target, because most runs in one process diverged.
        SparkSGDError: a run failed otherwise than by values that are not finite.
    """
    refuse_what_cannot_run(question)
    return _Course(question, kept, told).run()


def refuse_what_cannot_run(question: Question) -> None:
    """Check every configuration that will be run, but for its seed and for rates beyond the grid.

    Raises:
        ConfigError: it names the solver and the cluster.
    """
    pairs: list[tuple[Competitor, str | None]] = [(question.one_process, None)]
    pairs += [(each, cluster) for cluster in question.clusters for each in question.competitors]
    for competitor, cluster in pairs:
        for trial in _trials(question, competitor):
            try:
                allowed_engines(_config(question, competitor, cluster, trial, question.first_seed))
            except ConfigError as error:
                where = "" if cluster is None else f" on {cluster}"
                raise ConfigError(f"{competitor.label}{where}: {error}") from error


def _trials(question: Question, competitor: Competitor) -> list[Settings]:
    budget = question.budget
    return trials_of(budget.rates, budget.trials, question.momenta, competitor.knob_values)


def _config(
    question: Question, competitor: Competitor, cluster: str | None, chosen: Settings, seed: int
) -> Config:
    return completed(question.config(competitor, cluster, chosen, seed))


class _Course:
    """Makes the runs in their order, and counts them."""

    def __init__(self, question: Question, kept: KeptRuns, told: Told) -> None:
        self._question, self._kept, self._told = question, kept, told
        self._tuned_once: dict[str, Tuned] = {}
        self._done = 0
        budget = question.budget
        tunings = 1 + sum(
            len(question.clusters) if self._depends_on_time(each) else 1 for each in question.competitors
        )
        entries = len(question.competitors) * len(question.clusters)
        self._total = tunings * budget.trials + (1 + entries) * budget.seeds

    def run(self) -> Comparison:
        """Return what was found."""
        question = self._question
        one_process = self._tune(question.one_process, None)
        scores = [run.score for run in self._reported(question.one_process, None, one_process)]
        target = target_of(scores, question.budget.margin)
        if not math.isfinite(target):
            raise TrainingError(
                f"there is no target: of {len(scores)} runs in one process with {_told(one_process.chosen)} "
                f"most diverged; lower compare.rates, now {list(question.budget.rates)}"
            )
        log.info("the target is a score of %.4f, held at two evaluations", target)
        entries = [
            self._entry(each, cluster) for cluster in question.clusters for each in question.competitors
        ]
        self._told(self._done, self._total, "over")
        return Comparison(question=question, target=target, one_process=one_process, entries=tuple(entries))

    def _entry(self, competitor: Competitor, cluster: str) -> Entry:
        tuned = self._tuned_once.get(competitor.label)
        if tuned is None:
            tuned = self._tune(competitor, cluster)
            if not self._depends_on_time(competitor):
                self._tuned_once[competitor.label] = tuned
        outcomes = self._reported(competitor, cluster, tuned)
        return Entry(cluster=cluster, competitor=competitor, tuned=tuned, outcomes=tuple(outcomes))

    def _depends_on_time(self, competitor: Competitor) -> bool:
        """Return whether what is trained depends on who comes first."""
        configs = (
            _config(self._question, competitor, cluster, trial, 0)
            for cluster in self._question.clusters
            for trial in _trials(self._question, competitor)
        )
        return any(settings_of(config.solver).needs() & _DEPENDS_ON_TIME for config in configs)

    def _tune(self, competitor: Competitor, cluster: str | None) -> Tuned:
        """Try settings, and choose those of the highest score on the validation rows."""
        seed, scores, outcomes = self._question.first_seed, dict[Settings, float](), list[Outcome]()

        def trial(settings: Settings) -> None:
            outcomes.append(self._outcome(competitor, cluster, settings, seed, "tunes"))
            scores[settings] = outcomes[-1].score

        for settings in _trials(self._question, competitor):
            trial(settings)
        for _ in range(MOST_EXTENSIONS):
            following = extension(scores)
            if following is None:
                break
            self._total += 1
            trial(following)
        if is_at_edge(scores):
            log.warning(
                "%s: the best rate is still at the edge of the grid, after %d extensions", competitor.label,
                MOST_EXTENSIONS,
            )  # fmt: skip
        return Tuned(
            chosen=best_of(scores),
            trials=len(outcomes),
            diverged=sum(outcome.diverged for outcome in outcomes),
            rows=sum(outcome.rows for outcome in outcomes),
            virtual_s=sum(outcome.virtual_s for outcome in outcomes),
            at_edge=is_at_edge(scores),
        )

    def _reported(self, competitor: Competitor, cluster: str | None, tuned: Tuned) -> list[Outcome]:
        return [
            self._outcome(competitor, cluster, tuned.chosen, seed, "runs") for seed in self._question.seeds
        ]

    def _outcome(
        self, competitor: Competitor, cluster: str | None, settings: Settings, seed: int, does: str
    ) -> Outcome:
        where = "" if cluster is None else f" on {cluster}"
        what = f"{competitor.label} {does}{where}: {_told(settings)}, seed {seed}"
        self._told(self._done, self._total, what)
        outcome = self._kept.outcome(_config(self._question, competitor, cluster, settings, seed))
        self._done += 1
        return outcome


def _told(settings: Settings) -> str:
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in vars(settings).items()
        if value is not None
    )
