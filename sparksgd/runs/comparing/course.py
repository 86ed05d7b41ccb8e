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
from sparksgd.solvers.protocol import CHANCES
from sparksgd.solvers.rules import completed, settings_of
from sparksgd.training.preflight import allowed_engines

__all__ = ["Comparison", "Entry", "OnProgress", "Tuned", "compare", "refuse_what_cannot_run"]

log = logging.getLogger("sparksgd")

OnProgress = Callable[[int, int, str], None]
"""Called before each run, and at the end: how many are over, how many there will be, and what comes."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """How a solver was tuned, and what was chosen."""

    cluster: str | None
    """Where the trials ran; None: in one process."""

    chosen: Settings
    trials: int
    diverged: int
    """How many of the trials."""

    rows: int
    """Of all trials."""

    virtual_s: float
    """Of all trials, on that cluster."""

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


def compare(question: Question, kept: KeptRuns, on_progress: OnProgress) -> Comparison:
    """Answer a question; runs that are kept are not made again.

    Args:
        question: what is compared.
        kept: makes the runs.
        on_progress: is called before each run, and at the end.

    Raises:
        ConfigError: a run is refused, before the first one is made; or one had fewer than two evaluations.
        TrainingError: there is no target, because most runs in one process diverged.
        SparkSGDError: a run failed otherwise than by values that are not finite.
    """
    refuse_what_cannot_run(question)
    return _Course(question, kept, on_progress).run()


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

    def __init__(self, question: Question, kept: KeptRuns, on_progress: OnProgress) -> None:
        self._question, self._kept, self._on_progress = question, kept, on_progress
        self._depend_on_time = {
            each.label for each in question.competitors if _depends_on_time(question, each)
        }
        self._tuned_once: dict[str, Tuned] = {}
        self._done = 0
        budget = question.budget
        tunings = 1 + sum(
            len(question.clusters) if each.label in self._depend_on_time else 1
            for each in question.competitors
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
                f"there is no target: of {len(scores)} runs in one process with "
                f"{one_process.chosen.text(None)} most diverged; lower compare.rates, now "
                f"{list(question.budget.rates)}"
            )
        log.info("the target is a score of %.4f, held at two evaluations", target)
        entries = [
            self._entry(each, cluster) for cluster in question.clusters for each in question.competitors
        ]
        self._on_progress(self._done, self._total, "over")
        return Comparison(question=question, target=target, one_process=one_process, entries=tuple(entries))

    def _entry(self, competitor: Competitor, cluster: str) -> Entry:
        tuned = self._tuned_once.get(competitor.label)
        if tuned is None:
            tuned = self._tune(competitor, cluster)
            if competitor.label not in self._depend_on_time:
                self._tuned_once[competitor.label] = tuned
        outcomes = self._reported(competitor, cluster, tuned)
        return Entry(cluster=cluster, competitor=competitor, tuned=tuned, outcomes=tuple(outcomes))

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
            cluster=cluster,
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
        what = f"{competitor.label} {does}{where}: {settings.text(competitor.knob)}, seed {seed}"
        self._on_progress(self._done, self._total, what)
        config = _config(self._question, competitor, cluster, settings, seed)
        outcome = self._kept.outcome(config)
        _require_two_evaluations(outcome, f"{competitor.label}{where}", config.train.eval_every)
        self._done += 1
        return outcome


def _depends_on_time(question: Question, competitor: Competitor) -> bool:
    """Return whether what is trained depends on who comes first."""
    cluster = next(iter(question.clusters))  # rules say what they need from their own keys
    configs = (_config(question, competitor, cluster, trial, 0) for trial in _trials(question, competitor))
    return any(settings_of(config.solver).needs() & CHANCES for config in configs)


def _require_two_evaluations(outcome: Outcome, who: str, every: int | None) -> None:
    """Refuse a run that can hold no target, although it did not diverge.

    Raises:
        ConfigError: it has fewer than two evaluations.
    """
    count, most = len(outcome.evaluations), outcome.turns // 2
    if outcome.diverged or count >= 2:
        return
    if most and (every is None or every > most):
        move = f"set it to {most} or less"
    else:
        move = "an evaluation waits for the end of a round, so train longer (train.epochs, train.steps)"
    raise ConfigError(
        f"train.eval_every is {'not set' if every is None else every}, and {who} made {outcome.turns} turns "
        f"with {count} evaluation{'s' * (count != 1)}, but a target must be held at two: {move}"
    )
