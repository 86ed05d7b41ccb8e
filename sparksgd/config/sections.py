"""The sections and keys of a configuration.

Every key belongs to the *experiment* (it changes the bits of the trained parameters) or to the *cluster*
(it does not).  The sections `model`, `optimizer`, `schedule` and `solver` name a class or a function, and
pass it all keys that are not their own: `optimizer.momentum = 0.9` reaches torch.optim.SGD.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparksgd.config.cluster_keys import ClusterConfig, check_cluster
from sparksgd.config.data_keys import DataConfig, check_data
from sparksgd.config.scopes import arguments, cluster_key, experiment_key
from sparksgd.config.tables import (
    MOST,
    Readable,
    as_toml,
    checked_section,
    read_section,
    read_setting,
    read_toml,
    require_storable,
    require_text,
)
from sparksgd.errors import ConfigError
from sparksgd.imports import did_you_mean, shown

__all__ = [
    "GIVEN",
    "CheckpointConfig",
    "Config",
    "EarlyStoppingConfig",
    "EngineConfig",
    "LossConfig",
    "LossKind",
    "ModelConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "SolverConfig",
    "TrainConfig",
]

GIVEN = "given in Python"
"""How the name of a loss begins that was given in Python, and has no import path."""

_MOST_SHARDS = 1_000_000
_MOST_SECONDS = 1_000_000
_MOST_THREADS = 4096
_PORTS = re.compile(r"[0-9]{1,5}-[0-9]{1,5}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The module.  Other keys of the section are arguments of its factory."""

    name: str = experiment_key("lenet")
    """A model of sparksgd.models, or your own as package.module:factory."""

    rows_mix: bool = experiment_key(False)
    """Whether the loss of a row may depend on the other rows of its piece, as contrastive losses do.  Then
    the result depends on train.num_shards.  If false, such a model is refused; batch-norm never is."""

    arguments: Mapping[str, Any] = arguments()
    """Keyword arguments of the factory."""


LossKind = Literal["classes", "binary", "several labels", "numbers"]
"""What outputs and labels are; `LossConfig.kind` says what each means."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss: one value for each row.  Other keys of the section are arguments of it."""

    name: str = experiment_key("cross_entropy")
    """A loss of sparksgd.models.losses, or of torch.nn such as SmoothL1Loss, or your own as
    package.module:name: a function (output, label) -> Tensor[B], or a class of such."""

    kind: LossKind | None = experiment_key(None)  # noqa: RUF009  # a field, as that of each key
    """What outputs and labels of your own loss are: classes (a logit for each), binary (one logit), several
    labels (a logit for each; a row's labels are a list of 0 and 1) or numbers.  Then labels are checked, and
    evaluations tell the accuracy of classes and labels.  A loss of ours or of torch.nn has its kind;
    binary_cross_entropy may also be of several labels."""

    arguments: Mapping[str, Any] = arguments()
    """Keyword arguments of the loss."""

    @property
    def is_given(self) -> bool:
        """Return whether the name only tells the loss from others, because it was given in Python."""
        return self.name.startswith(f"{GIVEN} ")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimiser.  Other keys of the section are arguments of its class."""

    name: str = experiment_key("SGD")
    """A class of torch.optim, or your own as package.module:class."""

    arguments: Mapping[str, Any] = arguments()
    """Keyword arguments of the class."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning-rate schedule.  Other keys of the section are arguments of its class."""

    name: str | None = experiment_key(None)
    """A class of torch.optim.lr_scheduler, or your own as package.module:class.  If not set, the rate is
    constant."""

    interval: Literal["step", "epoch"] = experiment_key("step")
    """Whether the schedule moves after each turn (in synchronous SGD a turn is a step) or each epoch."""

    arguments: Mapping[str, Any] = arguments()
    """Keyword arguments of the class."""

    @property
    def metric(self) -> Literal["loss", "accuracy"] | None:
        """Return which number of an evaluation moves the schedule; None: turns move it."""
        if self.name != "ReduceLROnPlateau":
            return None
        return "accuracy" if self.arguments.get("mode") == "max" else "loss"


@dataclass(frozen=True, kw_only=True)
class SolverConfig:
    """The rule.  Other keys of the section are the rule's own."""

    name: str = experiment_key("synchronous")
    """The rule that makes the steps: synchronous, local_sgd (local SGD and DiLoCo), async_sgd, softsync,
    stale_synchronous, delay_compensated, gap_aware, delayed_nesterov, elastic_averaging,
    gradient_push, decentralised, or your own as package.module:class."""

    arguments: Mapping[str, Any] = arguments()
    """Keys of the rule."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Who computes, and how the sums travel.  None of it changes the trained parameters."""

    name: str = cluster_key("tree")
    """tree: one Spark job for each step.  allreduce: one Spark job for many steps; workers exchange their
    sums directly.  server: one Spark job for each worker; workers exchange with the driver at their own pace,
    for solvers of arrivals.  auto: server for these; else allreduce if there are several workers and they can
    reach each other, or tree.
    inline: in this process, without Spark.  simulated: in this process, too, on the cluster of the section
    [cluster], in virtual time."""

    num_workers: int | None = cluster_key(None)
    """How many Spark tasks compute gradients.  If not set: as many as the slots and the shards allow, but
    none that would only wait for others; simulated: one for each shard."""

    slots_timeout_s: float = cluster_key(300.0)
    """How long to wait for the slots that the workers need.  Nodes may unpack an environment first."""

    barrier: bool = cluster_key(True)
    """tree: true uses barrier mode.  false uses ordinary stages, whose tasks answer the driver one by one:
    for sessions with dynamic allocation.  Backup workers always use ordinary stages."""

    max_attempts: int = cluster_key(4)
    """How often a step is tried before the run fails, when executors are lost (allreduce: a segment; server:
    how often a worker may fail without a turn between)."""

    step_timeout_s: float = cluster_key(600.0)
    """How long the tasks of a step may run.  After that they count as hung, and the step is tried again.  A
    segment may take longer, by the time that its steps should take.  server: how long a shard's turn may
    take; then its worker is given up and asked again, and the others go on."""

    segment_steps: int | None = cluster_key(None)
    """allreduce: steps of one Spark job.  If not set: as many as fit into some seconds."""

    peer_timeout_s: float = cluster_key(30.0)
    """allreduce: how long a worker waits for another.  After that the segment is tried again.  server: how
    long a worker tries to reach the driver."""

    encrypt: bool = cluster_key(False)
    """allreduce, server: use TLS between workers, and with the driver, even if Spark's own traffic is not
    encrypted."""

    overlap: Literal["auto", "always", "never"] = cluster_key("auto")
    """allreduce: whether the gradients of the last layers are sent while those of earlier layers are still
    computed.  It needs one shard for each worker.  auto: if a sum takes 2 ms or more, as between hosts."""

    ports: str | None = cluster_key(None)
    """allreduce: the ports that driver and workers may listen on, such as "40000-40099"; server: that the
    driver may.  If not set: any."""

    @property
    def port_range(self) -> range | None:
        """Return `ports` as numbers."""
        if self.ports is None:
            return None
        first, last = map(int, self.ports.split("-"))
        return range(first, last + 1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    epochs: int = experiment_key(1)
    """How many passes over the rows."""

    steps: int | None = experiment_key(None)
    """Stop after this many turns (in synchronous SGD a turn is a step).  If not set, all epochs run."""

    rows_per_step: int = experiment_key(128)
    """The mini-batch of the whole cluster: at most this many rows in one turn of all shards."""

    num_shards: int = experiment_key(8)
    """How many shards the rows are divided into.  It shapes every mini-batch, so it never follows from the
    cluster."""

    seed: int = experiment_key(0)
    """The seed of the initial parameters, of the shuffles and of dropout."""

    threads: int = experiment_key(1)
    """How many threads torch uses in each worker.  Another number gives other bits."""

    rows_per_backward: int | None = experiment_key(None)
    """Rows of one backward pass.  If not set, it takes all rows that a shard uses in a turn."""

    instruction_set: Literal["default", "avx2", "avx512"] | None = experiment_key(None)
    """The instruction set that torch may use, on every machine.  If not set: the best of each machine."""

    eval_every: int | None = cluster_key(None)
    """Turns between two evaluations; an evaluation waits for the end of the round.  If not set: evaluate at
    the end of each epoch."""

    metrics: tuple[str, ...] = cluster_key(())
    """What evaluations tell beside the loss and the accuracy: f1_macro, top_3, rmse and others, or a function
    of your own, package.module:function."""

    max_wall_s: float | None = cluster_key(None)
    """End after this many seconds, counted from the submission of a job, or from the call of train().  The
    model is saved, and the same command goes on.  If not set: no time ends a run."""


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingConfig:
    """When a run ends before its last epoch, because its evaluations no longer get better."""

    patience: int | None = experiment_key(None)
    """End after this many evaluations in a row that are no better than the best one before.  If not set: no
    evaluation ends a run."""

    metric: str = experiment_key("loss")
    """What evaluations are judged by: loss, accuracy, or a name that train.metrics may have.  The best one
    has the least loss, log_loss, rmse or mae, or the greatest of any other; of a function of your own, as its
    attribute higher_is_better says."""

    min_delta: float = experiment_key(0.0)
    """By more than this an evaluation must be better than the best one before, or it does not count."""

    keep_best: bool = experiment_key(True)
    """Whether the run ends with the weights of its best evaluation.  If false: with the last step's."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state of a run is written, so that it can go on from there.  The run's end always is."""

    every_s: float = cluster_key(60.0)
    """Seconds between two checkpoints.  They take 3 % of the time at most: if one takes longer to write, they
    are written less often."""

    every_steps: int | None = cluster_key(None)
    """Also write one after this many turns (in synchronous SGD a turn is a step)."""

    every_epochs: int | None = cluster_key(None)
    """Also write one after this many epochs."""

    keep: int = cluster_key(2)
    """How many of the last checkpoints are kept, and beside them the one of the smallest test loss. If none
    could be taken at that evaluation, the log says so at the end."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run: what is trained (the experiment), and where (the cluster)."""

    data: DataConfig = DataConfig()  # noqa: RUF009  # it is frozen, too
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    solver: SolverConfig = SolverConfig()
    engine: EngineConfig = EngineConfig()
    train: TrainConfig = TrainConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig = ClusterConfig()  # noqa: RUF009  # it is frozen, too

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # as types go; what Python code passed may be anything
            section = checked_section(field.name, type(field.default), getattr(self, field.name))
            object.__setattr__(self, field.name, section)
        for key, value, least, most in (
            ("engine.num_workers", self.engine.num_workers, 1, _MOST_SHARDS),
            ("engine.max_attempts", self.engine.max_attempts, 1, MOST),
            ("engine.slots_timeout_s", self.engine.slots_timeout_s, 0, _MOST_SECONDS),
            ("engine.segment_steps", self.engine.segment_steps, 1, MOST),
            ("engine.step_timeout_s", self.engine.step_timeout_s, 1, _MOST_SECONDS),
            ("engine.peer_timeout_s", self.engine.peer_timeout_s, 1, _MOST_SECONDS),
            ("train.epochs", self.train.epochs, 1, MOST),
            ("train.steps", self.train.steps, 1, MOST),
            ("train.rows_per_step", self.train.rows_per_step, 1, MOST),
            ("train.num_shards", self.train.num_shards, 1, _MOST_SHARDS),
            ("train.threads", self.train.threads, 1, _MOST_THREADS),
            ("train.rows_per_backward", self.train.rows_per_backward, 1, MOST),
            ("train.eval_every", self.train.eval_every, 1, MOST),
            ("train.max_wall_s", self.train.max_wall_s, 0, _MOST_SECONDS),
            ("early_stopping.patience", self.early_stopping.patience, 1, MOST),
            ("early_stopping.min_delta", self.early_stopping.min_delta, 0, MOST),
            ("data.max_bad_rows", self.data.max_bad_rows, 0, MOST),
            ("checkpoint.every_s", self.checkpoint.every_s, 0, _MOST_SECONDS),
            ("checkpoint.every_steps", self.checkpoint.every_steps, 1, MOST),
            ("checkpoint.every_epochs", self.checkpoint.every_epochs, 1, MOST),
            ("checkpoint.keep", self.checkpoint.keep, 1, MOST),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{key} is {shown(value)}, but must be at least {least}")
            if value is not None and value > most:
                raise ConfigError(f"{key} is {shown(value)}, but may be {most} at most")
        if not -(2**63) <= self.train.seed < 2**64:
            raise ConfigError(f"train.seed is {self.train.seed}, but must be a number of 64 bits")
        if self.engine.ports is not None and not (
            _PORTS.fullmatch(self.engine.ports)
            and (ports := self.engine.port_range)
            and 0 < ports.start < ports.stop <= 65_536
        ):
            raise ConfigError(f"engine.ports is {shown(self.engine.ports)}, but must be like 40000-40099")
        check_data(self.data)
        check_cluster(self.cluster)
        _check_early_stopping(self.early_stopping)

    @classmethod
    def from_dict(cls, tables: Mapping[str, Any]) -> Config:
        """Build a configuration from nested tables, as TOML gives them.

        Raises:
            ConfigError: a section, key, type or value is not valid.
        """
        if not isinstance(tables, Mapping):
            raise ConfigError(f"the configuration is {shown(tables)}, but must be a dict of its sections")
        sections = {field.name: type(field.default) for field in dataclasses.fields(cls)}
        for name, table in tables.items():
            require_text(name, "the name of a section")
            if name not in sections:
                raise ConfigError(f"unknown section [{shown(name)[1:-1]}]{did_you_mean(name, sections)}")
            if not isinstance(table, Mapping):
                raise ConfigError(f"{name} is {shown(table)}, but is a section: write {name}.key = value")
        return cls(**{name: read_section(name, sections[name], table) for name, table in tables.items()})

    @classmethod
    def load(
        cls, path: str | Path | Readable | Mapping[str, Any] | None = None, settings: Iterable[str] = ()
    ) -> Config:
        """Read a TOML file, if any, and override its keys by `section.key=value` settings.

        Args:
            path: the TOML file, or its content as nested tables.
            settings: a value is TOML; a bare word is a string; `none` unsets the key.

        Raises:
            ConfigError: the file cannot be read, or a section, key, type or value is not valid.
        """
        if path is None or isinstance(path, Mapping):
            given: Mapping[str, Any] = path or {}
        else:
            given = read_toml(path)
        tables = {name: dict(table) if isinstance(table, Mapping) else table for name, table in given.items()}
        for setting in settings:
            section, key, value = read_setting(setting)
            table = tables.setdefault(section, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{section} is {shown(table)}, but is a section: write [{section}]")
            table[key] = value
        config = cls.from_dict(tables)
        config.require_storable("and write a date in quotes")
        return config

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return nested tables of all keys that are set: the inverse of `from_dict`."""
        tables = {}
        for section, of_section in vars(self).items():
            values = dict(vars(of_section))
            arguments = values.pop("arguments", {})
            tables[section] = as_toml({k: v for k, v in values.items() if v is not None} | arguments)
        return tables

    @property
    def is_judged(self) -> bool:
        """Return whether evaluations shape the parameters: they end the run, or move the schedule."""
        return self.early_stopping.patience is not None or self.schedule.metric is not None

    def experiment(self) -> dict[str, Any]:
        """Return {section.key: value} of the keys that shape the parameters."""
        scopes = {key: scope for key, (scope, _) in self.keys().items()}
        if self.is_judged:
            scopes["train.eval_every"] = "experiment"
        if self.engine.name == "simulated":  # its times are what the run is for, and decide who comes first
            of_cluster = [key for key in scopes if key.startswith("cluster.")]
            scopes |= dict.fromkeys([*of_cluster, "engine.name", "engine.num_workers"], "experiment")
        return {
            f"{section}.{key}": value
            for section, values in self.to_dict().items()
            if section != "early_stopping" or self.early_stopping.patience is not None
            for key, value in values.items()
            if scopes.get(f"{section}.{key}", "experiment") == "experiment"
        }

    def require_storable(self, otherwise: str) -> None:
        """Refuse a value that a run's folder cannot hold: Python code, and TOML's dates, may give such.

        Args:
            otherwise: what else one may do, for the error.

        Raises:
            ConfigError: with the key and the value.
        """
        for key, value in self.experiment().items():
            require_storable(key, value, otherwise)

    @classmethod
    def keys(cls) -> dict[str, tuple[str, Any]]:
        """Return {section.key: (scope, default)} of every key, for documentation and tests."""
        return {
            f"{section.name}.{field.name}": (field.metadata["scope"], field.default)
            for section in dataclasses.fields(cls)
            for field in dataclasses.fields(type(section.default))  # type: ignore[arg-type]  # each section's default is an instance of its dataclass
            if field.name != "arguments"
        }


def _check_early_stopping(config: EarlyStoppingConfig) -> None:
    """Refuse keys that would do nothing."""
    if config.patience is not None:
        return
    for name, default in vars(EarlyStoppingConfig()).items():
        if getattr(config, name) != default:
            raise ConfigError(
                f"early_stopping.{name} is set, but early_stopping.patience is not, so no run would end "
                f"early: set patience, or leave {name} out"
            )
