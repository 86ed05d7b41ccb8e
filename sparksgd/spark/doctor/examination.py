"""The whole examination of a cluster: all looks, in an order in which one may spare the next.

    driver ── slots ── settings ── executors ── model: memory, disk ── network ── output ── training

A rule of a run is never written down here a second time: its own check is called, and what it raises, or
warns of, becomes a finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

from pyspark.sql import SparkSession
from torch import nn

from sparksgd.arithmetic.instruction_set import Machine
from sparksgd.config import Config
from sparksgd.engines.kinds import ALLREDUCE, SERVER, EngineKind, first_of_each_name
from sparksgd.errors import SparkSGDError
from sparksgd.models.losses import make_loss
from sparksgd.solvers.protocol import RoundSolver
from sparksgd.spark.cluster.cluster import Cluster
from sparksgd.spark.cluster.environments import own_version
from sparksgd.spark.cluster.jobs import cancel_jobs, cleanup, keep_names, no_locality_wait
from sparksgd.spark.cluster.slots import Slots, WorkerDemand
from sparksgd.spark.cluster.users_modules import require_modules, users_modules
from sparksgd.spark.doctor.engines import ENGINES, Steps, name_of
from sparksgd.spark.doctor.findings import Finding, broken, good, unseen
from sparksgd.spark.doctor.looks import Looks
from sparksgd.spark.doctor.machines import (
    PACKAGES,
    Executor,
    judge_cores,
    judge_driver,
    judge_executors,
    judge_instruction_sets,
    judge_java,
)
from sparksgd.spark.doctor.network import (
    Network,
    empty_job_s,
    judge_empty_job,
    judge_network,
    measured_network,
    measured_with_driver,
)
from sparksgd.spark.doctor.settings import judge_session, judge_settings, judge_slots
from sparksgd.spark.doctor.sizes import (
    Model,
    has_rows,
    judge_disk,
    judge_hosts_memory,
    judge_memory,
    measured_model,
)
from sparksgd.spark.doctor.store import look_at_store
from sparksgd.spark.session import refuse_lost_output
from sparksgd.spark.train import class_of, demand_of
from sparksgd.training.modules import build_module

__all__ = ["Examination", "Group"]

_SHORT, _LONG, _LONGEST = 1 / 4, 1 / 2, 2 / 3  # of the time for all looks, one may take
_PATIENCE = 1 / 3  # of it, for slots
_OF_STEP = 1 / 6  # of it, for a worker, or a step
_PYTHON = frozenset({"executors", "their Python"})
_CODE = "your code"
_REFUSING = frozenset({"threads", "encryption", _CODE}) | _PYTHON
"""Names of findings; if one of these fails, no run starts on this cluster."""

_OTHER_MODEL = "name other rows (data.train), or another model: a training would be refused with these words"
_NO_WORKERS = "there are no workers"
_EXECUTORS_LACK = "the executors' Python cannot train, see there"

Look = Callable[[], Iterable[Finding]]


@dataclass(frozen=True, kw_only=True)
class Group:
    """What was found of one thing."""

    title: str
    findings: Sequence[Finding]


class Examination:
    """Looks at a session as the place of a run.

    Args:
        session: where the run would compute.
        config: of the run, with every key of its rule.
        kinds: the engines that it allows.
        out: where its results would go; None: not said.
        within_s: how long all looks may take.
        is_submitted: whether spark-submit started this process.
        say: called with the name of what is looked at next.
    """

    def __init__(
        self,
        session: SparkSession,
        config: Config,
        kinds: Sequence[EngineKind],
        *,
        out: str | None = None,
        within_s: float = 60.0,
        is_submitted: bool = False,
        say: Callable[[str], object] = str,
    ) -> None:
        self._session, self._config, self._kinds = session, config, kinds
        self._out, self._is_submitted, self._say = out, is_submitted, say
        self._demand = replace(demand_of(config), slots_timeout_s=_PATIENCE * within_s)
        self._cluster = Cluster(session, self._demand)
        self._context, self._run_id = self._cluster.context, self._cluster.run_id
        self._within_s = within_s
        self._looks = Looks(within_s, lambda: cancel_jobs(self._context, self._run_id))
        self._workers = 0  # until they are settled
        self._refused_by: list[str] = []
        self._executors: list[Executor] = []
        self._module: nn.Module | None = None
        self._model: Model | None = None
        self._network: Network | None = None
        self._reaches_driver = False

    def run(self) -> Iterator[Group]:
        """Make all looks; yield what they found, group by group."""
        make = self._make
        keep_names(self._cluster.jvm)
        try:
            yield Group(title="Driver", findings=make("driver", self._driver))
            slots = [*make("dynamic allocation", self._limits), *make("slots", self._settle, _LONGEST)]
            yield Group(title="Slots", findings=slots)
            waits = make("locality wait", self._locality)
            told = [*make("settings", self._settings), *make("settings", self._wanted, is_told=True), *waits]
            yield Group(title="Settings", findings=told)
            yield Group(title="Executors", findings=make("executors", self._survey, _LONG))
            model = [*make("model", self._build), *make("model", self._measure_model, _LONG)]
            sizes = [*make("memory", self._fit), *make(_CODE, self._code)]
            yield Group(title="Model", findings=[*model, *sizes])
            links = [*make("network", self._links, _LONG), *make("empty job", self._empty_job)]
            yield Group(title="Network", findings=links)
            yield Group(title="Output", findings=make("--out", self._store, _LONG))
            yield Group(title="Three steps", findings=self._three_steps())
        finally:
            self._cluster.job_watch.close()

    def facts(self) -> dict[str, Any]:
        """Return what was measured, as plain values, for programs."""
        model, network = self._model, self._network
        executors = {(one.host, one.process): one for one in self._executors}
        facts = ("process", "java", "python_version", "versions", "cpus", "memory_bytes", "free_bytes")
        return {
            "executors": [
                {"host": host, "python": one.python.executable} | {name: getattr(one, name) for name in facts}
                for (host, _), one in executors.items()
            ],
            "model": model
            and {"parameters": model.parameters, "rows": model.rows, "bytes": asdict(model.sizes)},
            "links": [] if network is None else network.facts(),
        }

    def _make(self, name: str, look: Look, share: float = _SHORT, *, is_told: bool = False) -> list[Finding]:
        """Make a look, which may take a share of the time; its Spark jobs are in the examination's group."""

        def in_group() -> Iterator[Finding]:
            self._context.setJobGroup(self._run_id, "sparksgd doctor")
            yield from look()

        self._say(name)
        findings = self._looks.make(name, in_group, share * self._within_s, is_told=is_told)
        failing = [finding.name for finding in findings if finding.status == "fail"]
        self._refused_by += [name for name in failing if name in _REFUSING]
        return findings

    # The looks

    def _driver(self) -> Iterator[Finding]:
        yield judge_driver(self._session.version, own_version(), _own_versions())

    def _limits(self) -> Iterator[Finding]:
        slots = Slots(self._context, self._demand, self._cluster.placement)
        yield from judge_slots(slots, self._cluster.is_elastic, self._demand.threads)

    def _settle(self) -> Iterator[Finding]:
        """Settle the number of workers; if that of the configuration is refused, what there is must do."""
        able = replace(self._demand, barrier=False, threads=1)  # of these `_limits` tells
        try:
            self._settle_for(able)
        except SparkSGDError as error:
            yield broken("slots", error, "see that executors start")
            if not (slots := self._cluster.slots()):
                return
            self._settle_for(replace(able, num_workers=min(slots, self._demand.num_shards)))
        else:
            more = "; more come when they are asked for" if self._cluster.is_elastic else ""
            workers = f"{self._workers} workers of {self._demand.num_shards} shards"
            yield good("slots", f"{self._cluster.slots()}, for {workers}{more}")

    def _settle_for(self, demand: WorkerDemand) -> None:
        with cleanup():
            self._cluster.job_watch.close()
        self._cluster = Cluster(self._session, demand, self._run_id)
        self._cluster.settle()
        self._workers = self._cluster.num_workers

    def _settings(self) -> Iterator[Finding]:
        yield from judge_settings(self._context.getConf().get)

    def _wanted(self) -> Iterator[Finding]:
        yield from judge_session(self._session, self._config)

    def _locality(self) -> Iterator[Finding]:
        with no_locality_wait(self._context._jsc.sc()):
            yield good("locality wait", "0 during a run, so that its tasks start together")

    def _survey(self) -> Iterator[Finding]:
        train = self._config.train
        if not self._cluster.slots() and not self._cluster.is_elastic:
            yield unseen("their Python", "there is no executor")
            return
        self._executors = [Executor.of(answer) for answer in self._cluster.survey(PACKAGES)]
        yield from judge_executors(
            self._executors,
            len(self._cluster.places()),
            own=own_version(),
            versions=_own_versions(),
            instruction_set=train.instruction_set,
        )
        yield judge_java(str(self._cluster.jvm.java.lang.System.getProperty("java.version")), self._executors)
        yield judge_instruction_sets(Machine.here(), self._executors, train.instruction_set)
        each = -(-self._cluster.slots() // max(1, len(self._cluster.places())))
        yield judge_cores(self._executors, each, train.threads)

    def _build(self) -> Iterator[Finding]:
        """Make the module; nothing is told of one that is made."""
        try:
            self._module = build_module(self._config.model, self._config.train.seed)
        except SparkSGDError as error:
            yield broken("model", error, _OTHER_MODEL)

    def _code(self) -> Iterator[Finding]:
        """Yield whether executors have the modules that the run's module, loss and solver are made of."""
        module, model = self._module, self._model
        if module is None or not self._workers or _PYTHON.intersection(self._refused_by):
            why = _NO_WORKERS if not self._workers else _EXECUTORS_LACK
            yield unseen(_CODE, "the model could not be made" if module is None else why)
            return
        loss = make_loss(self._config.loss, self._config.train.seed)
        parts = [module, loss] if model is None else [module, loss, model.solver.halves]
        modules = users_modules(*parts)
        replica = []
        if model is not None and ALLREDUCE in self._kinds:
            replica = users_modules(cast(RoundSolver, model.solver).make_replica())
        for needed, kinds in ((modules, self._kinds), (replica, [ALLREDUCE])):
            try:
                require_modules(self._cluster, needed)
            except SparkSGDError as error:
                refused = broken(_CODE, error, "--py-files, or --archives")
                yield refused if set(self._kinds) <= set(kinds) else replace(refused, status="warn")
                return
        named = ", ".join(dict.fromkeys([*modules, *replica]))
        yield good(_CODE, f"executors import {named}" if named else "workers import none of yours by name")

    def _measure_model(self) -> Iterator[Finding]:
        if self._module is None:
            return
        if not has_rows(self._config):
            yield unseen("model", "its rows are not known: name them, --set data.train=PATH")
            return
        try:
            model = self._model = measured_model(self._session, self._config, self._cluster, self._module)
        except SparkSGDError as error:
            yield broken("model", error, _OTHER_MODEL)
            return
        yield good(
            "model", f"{self._config.model.name}, {model.parameters:,} parameters, tried on {model.rows_from}"
        )

    def _fit(self) -> Iterator[Finding]:
        model, shards = self._model, self._config.train.num_shards
        if model is None or not self._workers:
            yield unseen("memory", "the model was not measured" if model is None else _NO_WORKERS)
            return
        yield from judge_memory(self._cluster, first_of_each_name(self._kinds), model, shards)
        if self._executors:
            hosts = judge_hosts_memory(self._cluster, self._kinds[0], model, shards, self._executors)
            yield from [] if hosts is None else [hosts]
            placement = self._config.data.placement
            yield judge_disk(model.schema, model.rows, placement, self._executors)

    def _links(self) -> Iterator[Finding]:
        if not self._workers or _PYTHON.intersection(self._refused_by):
            yield unseen("network", _EXECUTORS_LACK if self._workers else _NO_WORKERS)
            return
        engine, kinds = self._config.engine, first_of_each_name(self._kinds)
        for kind in kinds:
            try:
                class_of(kind).check(self._cluster, engine)
            except SparkSGDError as error:
                refused = broken("network", error, "see engine.ports")
                yield refused if len(kinds) == 1 else replace(refused, status="warn")
                return
        patience_s = min(engine.peer_timeout_s, max(1.0, _OF_STEP * self._within_s))
        patient = replace(engine, peer_timeout_s=patience_s)
        star = None
        with no_locality_wait(self._context._jsc.sc()):
            network = measured_network(self._cluster, patient)
            if network.failures:
                star = measured_with_driver(self._cluster, patient)
        self._network, self._reaches_driver = network, not (star or network).failures
        gradient_bytes = None if self._model is None else self._model.sizes.weights
        yield from judge_network(
            network,
            gradient_bytes,
            self._workers,
            is_needed={ALLREDUCE, SERVER}.issuperset(kinds),
            star=star if kinds == [SERVER] else None,
        )

    def _empty_job(self) -> Iterator[Finding]:
        if not self._workers or "executors" in self._refused_by:
            yield unseen("empty job", _EXECUTORS_LACK if self._workers else _NO_WORKERS)
            return
        with self._cluster.job_watch.over(1):
            yield judge_empty_job(empty_job_s(self._cluster, self._workers), self._workers)

    def _three_steps(self) -> list[Finding]:
        if not self._workers:
            return [unseen("training", _NO_WORKERS)]
        if self._refused_by:
            why = ", ".join(dict.fromkeys(self._refused_by))
            return [unseen("training", f"a run is refused here: see {why}")]
        steps = Steps(
            session=self._session,
            config=self._config,
            workers=self._workers,
            run_id=self._run_id,
            patience_s=max(1.0, _OF_STEP * self._within_s),
        )
        findings, no_barrier = list[Finding](), "Spark runs no barrier-mode job with dynamic allocation"
        for kind in ENGINES:
            if kind.barrier and self._cluster.is_elastic:
                findings.append(unseen(name_of(kind), no_barrier))
            elif kind in (ALLREDUCE, SERVER) and not self._connects(kind):
                findings.append(unseen(name_of(kind), "that workers reach whom they must was not seen"))
            else:
                findings += self._make(name_of(kind), partial(steps.look, kind), _LONG)
        return findings

    def _connects(self, kind: EngineKind) -> bool:
        """Return whether workers were seen to reach whom an engine lets them talk to."""
        if kind == SERVER:
            return self._reaches_driver
        return self._network is not None and not self._network.failures

    def _store(self) -> Iterator[Finding]:
        if self._out is None:
            yield unseen("--out", "not given: name the folder that a run would write to")
            return
        if self._is_submitted:
            refuse_lost_output(self._out, "--out")
        sizes = None if self._model is None else self._model.sizes
        yield from look_at_store(self._out, None if sizes is None else sizes.weights + sizes.optimiser)


def _own_versions() -> dict[str, str | None]:
    """Return the versions of the driver's packages."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
