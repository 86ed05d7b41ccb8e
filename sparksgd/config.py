"""The configuration: defaults, then a TOML file, then `--set section.key=value`.

Every key is marked as the *experiment's* (it shapes the parameters, bit for bit) or the *cluster's*
(it does not).  The sections `model`, `optimizer` and `schedule` pass what they do not know to the
factory that they name: `optimizer.momentum = 0.9` reaches torch.optim.SGD.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from sparksgd.errors import ConfigError
from sparksgd.imports import did_you_mean

__all__ = [
    "Config",
    "DataConfig",
    "EngineConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Readable",
    "ScheduleConfig",
    "SolverConfig",
    "TrainConfig",
]


class Readable(Protocol):
    """A file, of this machine or elsewhere."""

    def read_bytes(self) -> bytes:
        """Return what it holds, or raise OSError."""
        ...


_PORTS = re.compile(r"\d{1,5}-\d{1,5}")


def _experiment(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"scope": "experiment"})


def _cluster(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"scope": "cluster"})


def _arguments() -> Any:
    return dataclasses.field(default_factory=dict, metadata={"scope": "experiment"})


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on."""

    train: str | None = _experiment(None)
    """Parquet to train on: a path or URI that Spark can read."""

    test: str | None = _experiment(None)
    """Parquet to evaluate on; None trains without evaluation."""

    features: tuple[str, ...] = _experiment(("features",))
    """Columns; one reaches `forward` as its argument, several as arguments of the columns' names."""

    label: str = _experiment("label")
    """Column of labels."""

    id: str | None = _experiment(None)
    """Column whose hash deals a row to a shard; None hashes the features themselves."""

    placement: Literal["hashed", "in_place"] = _experiment("hashed")
    """hashed: one shuffle, any file layout gives the same shards.  in_place: whole partitions of the
    input become shards where they are, without a shuffle; the layout then shapes the trajectory."""

    on_bad_row: Literal["error", "skip"] = _experiment("error")
    """What null, misshapen, non-finite or wrongly labelled rows do."""

    max_bad_rows: int = _experiment(100)
    """With on_bad_row = "skip": more bad rows than this are an error all the same."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The module; other keys of the section are arguments of its factory."""

    name: str = _experiment("lenet")
    """One of sparksgd.models, or package.module:factory."""

    arguments: Mapping[str, Any] = _arguments()
    """Keyword arguments of the factory."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss: one value per row."""

    name: str = _experiment("cross_entropy")
    """One of sparksgd.losses, or package.module:function(output, label) -> Tensor[B]."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimiser; other keys of the section are arguments of its class."""

    name: str = _experiment("SGD")
    """A class of torch.optim, or package.module:class."""

    arguments: Mapping[str, Any] = _arguments()
    """Keyword arguments of the class."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning-rate schedule; other keys of the section are arguments of its class."""

    name: str | None = _experiment(None)
    """A class of torch.optim.lr_scheduler, or package.module:class; None keeps the rate."""

    interval: Literal["step", "epoch"] = _experiment("step")
    """How often the schedule moves."""

    arguments: Mapping[str, Any] = _arguments()
    """Keyword arguments of the class."""


@dataclass(frozen=True, kw_only=True)
class SolverConfig:
    """What the solver does around the optimiser."""

    clip_norm: float | None = _experiment(None)
    """Largest Euclidean norm of the gradient of a step; None does not clip."""

    backup_workers: int = _experiment(0)
    """b: a step ends when all shards but b have arrived, and later gradients are dropped.  One shard per
    worker, tree engine, in ordinary stages; which shards took part is recorded, and can be replayed."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Who computes, and how the sums travel; none of it shapes the parameters."""

    name: Literal["tree", "allreduce", "auto", "inline"] = _cluster("tree")
    """tree: one barrier-mode Spark job per step.  allreduce: one for many steps, workers sum among
    themselves.  auto: allreduce where there are several workers that reach each other, else tree.
    inline: this process alone, without Spark."""

    num_workers: int | None = _cluster(None)
    """Gradient computers (Spark tasks); None takes as many as there are slots and shards for,
    less those that would only wait for others."""

    slots_timeout_s: float = _cluster(300.0)
    """How long to wait for the slots that the workers need; nodes may unpack an environment first."""

    barrier: bool = _cluster(True)
    """tree: barrier mode.  false: ordinary stages, whose tasks arrive at the driver one by one, for
    sessions with dynamic allocation; solver.backup_workers needs them, too."""

    max_attempts: int = _cluster(4)
    """How often one step, or segment, is tried, through lost executors, before the run is given up."""

    step_timeout_s: float = _cluster(600.0)
    """How long the tasks of a step may run before they are taken for hung, and the step is tried again; of
    a segment, by as much longer as its steps should take."""

    segment_steps: int | None = _cluster(None)
    """allreduce: steps of one Spark job; None takes as many as some seconds hold."""

    peer_timeout_s: float = _cluster(30.0)
    """allreduce: how long a worker waits for another before the segment is run again."""

    encrypt: bool = _cluster(False)
    """allreduce: TLS between workers, also where Spark's own traffic is not encrypted."""

    overlap: Literal["auto", "always", "never"] = _cluster("auto")
    """allreduce: whether gradients of the last layers go out while those of earlier ones are computed,
    which takes one shard per worker.  auto: where a sum takes 2 ms or more, as between hosts."""

    ports: str | None = _cluster(None)
    """allreduce: ports that driver and workers may listen on, as "40000-40099"; None takes any."""

    @property
    def port_range(self) -> range | None:
        """`ports` as numbers."""
        if self.ports is None:
            return None
        first, last = map(int, self.ports.split("-"))
        return range(first, last + 1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    epochs: int = _experiment(1)
    """Passes over the rows."""

    steps: int | None = _experiment(None)
    """Stop after so many steps; None runs all epochs."""

    rows_per_step: int = _experiment(128)
    """At most so many rows take part in one step: the mini-batch of the whole cluster."""

    num_shards: int = _experiment(8)
    """Slices that the rows are dealt into; it shapes every mini-batch, so it is never read off the
    cluster."""

    seed: int = _experiment(0)
    """Keys the initial parameters, the shuffles and dropout."""

    threads: int = _experiment(1)
    """Threads of torch in each worker; another number gives other bits."""

    rows_per_backward: int | None = _experiment(None)
    """Rows of one backward pass; None takes a shard's whole piece at once."""

    instruction_set: Literal["default", "avx2", "avx512"] | None = _experiment(None)
    """Instruction set that torch is held to, on every machine; None takes each machine's best."""

    eval_every: int | None = _cluster(None)
    """Steps between evaluations; None evaluates at the end of each epoch."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run: what is trained (the experiment) and by whom (the cluster)."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    solver: SolverConfig = SolverConfig()
    engine: EngineConfig = EngineConfig()
    train: TrainConfig = TrainConfig()

    def __post_init__(self) -> None:
        for key, value, least in (
            ("engine.num_workers", self.engine.num_workers, 1),
            ("engine.max_attempts", self.engine.max_attempts, 1),
            ("engine.slots_timeout_s", self.engine.slots_timeout_s, 0),
            ("engine.segment_steps", self.engine.segment_steps, 1),
            ("engine.step_timeout_s", self.engine.step_timeout_s, 1),
            ("engine.peer_timeout_s", self.engine.peer_timeout_s, 1),
            ("train.epochs", self.train.epochs, 1),
            ("train.steps", self.train.steps, 1),
            ("train.rows_per_step", self.train.rows_per_step, 1),
            ("train.num_shards", self.train.num_shards, 1),
            ("solver.backup_workers", self.solver.backup_workers, 0),
            ("train.threads", self.train.threads, 1),
            ("train.rows_per_backward", self.train.rows_per_backward, 1),
            ("train.eval_every", self.train.eval_every, 1),
            ("data.max_bad_rows", self.data.max_bad_rows, 0),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{key} is {value}, but must be at least {least}")
        if self.engine.ports is not None and not (
            _PORTS.fullmatch(self.engine.ports)
            and (ports := self.engine.port_range)
            and 0 < ports.start < ports.stop <= 65_536
        ):
            raise ConfigError(f"engine.ports is {self.engine.ports!r}, but must be like 40000-40099")
        if not self.data.features:
            raise ConfigError("data.features names no column: name one, or several")
        if len(set(self.data.features)) < len(self.data.features):
            raise ConfigError(f"data.features names a column twice: {', '.join(self.data.features)}")
        if self.data.label in self.data.features:
            raise ConfigError(f"data.label is {self.data.label!r}, which data.features names, too")
        if self.data.id is not None and self.data.id in (*self.data.features, self.data.label):
            raise ConfigError(
                f"data.id is {self.data.id!r}, which is a feature or the label: leave data.id out, and the "
                f"features themselves are hashed, or name a column of its own"
            )
        if self.data.placement == "in_place" and self.engine.name == "inline":
            raise ConfigError(
                'data.placement is "in_place", but engine.name is "inline", which has no partitions: '
                'use "hashed", or engine.name = "tree"'
            )
        self._check_backups()
        if self.solver.clip_norm is not None and not self.solver.clip_norm > 0:
            raise ConfigError(f"solver.clip_norm is {self.solver.clip_norm}, but must be above 0")

    @property
    def needs_barrier(self) -> bool:
        """Whether steps run in barrier mode, all tasks at once."""
        return self.engine.barrier and not self.solver.backup_workers

    def _check_backups(self) -> None:
        backups, shards = self.solver.backup_workers, self.train.num_shards
        if not self.needs_barrier and self.engine.name == "allreduce":
            asked = f"solver.backup_workers is {backups}" if backups else "engine.barrier is false"
            raise ConfigError(
                f'{asked}, but engine.name is "allreduce", whose workers sum among themselves and so wait '
                f'for each other: use engine.name = "tree"'
            )
        if not backups:
            return
        if backups >= shards:
            raise ConfigError(
                f"solver.backup_workers is {backups}, but train.num_shards is {shards}, and a step needs "
                f"one at least: set backup_workers to {shards - 1} or less (about 4 of 100 were best)"
            )
        if self.engine.num_workers not in (None, shards):
            raise ConfigError(
                f"solver.backup_workers is {backups}, which takes one shard per worker, but "
                f"engine.num_workers is {self.engine.num_workers} and train.num_shards {shards}: set both "
                f"to one number"
            )
        if self.data.placement == "in_place":
            raise ConfigError(
                f'solver.backup_workers is {backups}, but data.placement is "in_place": starved rows could '
                f'not be dealt anew; use "hashed"'
            )

    @classmethod
    def from_dict(cls, tables: Mapping[str, Any]) -> Config:
        """Build a configuration from nested tables, as TOML gives them.

        Raises:
            ConfigError: a section, key, type or value is not valid.
        """
        sections = {field.name: type(field.default) for field in dataclasses.fields(cls)}
        for name, table in tables.items():
            if name not in sections:
                raise ConfigError(f"unknown section [{name}]{did_you_mean(name, sections)}")
            if not isinstance(table, Mapping):
                raise ConfigError(f"{name} is {table!r}, but is a section: write {name}.key = value")
        return cls(**{name: _section(name, sections[name], table) for name, table in tables.items()})

    @classmethod
    def load(
        cls, path: str | Readable | Mapping[str, Any] | None = None, settings: Iterable[str] = ()
    ) -> Config:
        """Read a TOML file, if any, and lay `section.key=value` settings over it.

        Args:
            path: the TOML file, or what one holds as nested tables.
            settings: values are TOML; a bare word is a string; `none` unsets a key.
        """
        tables: dict[str, Any] = {}
        if isinstance(path, Mapping):
            tables = {name: dict(table) for name, table in path.items()}
        elif path is not None:
            file = Path(path) if isinstance(path, str) else path
            try:
                tables = tomllib.loads(file.read_bytes().decode())
            except OSError as error:
                raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise ConfigError(f"{path} is not valid TOML: {error}") from error
        for setting in settings:
            name, equals, text = setting.partition("=")
            section, dot, key = name.strip().partition(".")
            if not (equals and dot and key):
                raise ConfigError(f"--set {setting!r} is not of the form section.key=value")
            table = tables.setdefault(section, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{section} is {table!r}, but is a section")
            table[key] = _value(text.strip())
        return cls.from_dict(tables)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return nested tables of all keys that are set, `from_dict`'s inverse."""
        tables = {}
        for section, values in dataclasses.asdict(self).items():
            arguments = values.pop("arguments", {})
            values = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
            tables[section] = {k: v for k, v in values.items() if v is not None} | arguments
        return tables

    def experiment(self) -> dict[str, Any]:
        """Return {section.key: value} of what shapes the parameters."""
        scopes = {key: scope for key, (scope, _) in self.keys().items()}
        return {
            f"{section}.{key}": value
            for section, values in self.to_dict().items()
            for key, value in values.items()
            if scopes.get(f"{section}.{key}", "experiment") == "experiment"
        }

    @classmethod
    def keys(cls) -> dict[str, tuple[str, Any]]:
        """Return {section.key: (scope, default)} of every key, for documentation and tests."""
        return {
            f"{section.name}.{field.name}": (field.metadata["scope"], field.default)
            for section in dataclasses.fields(cls)
            for field in dataclasses.fields(type(section.default))  # type: ignore[arg-type]  # each section's default is an instance of its dataclass
            if field.name != "arguments"
        }


def _value(text: str) -> Any:
    if text.lower() == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _section(section: str, kind: type[Any], table: Mapping[str, Any]) -> Any:
    hints = get_type_hints(kind)
    takes_arguments = "arguments" in hints
    keys = [name for name in hints if name != "arguments"]
    values: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    for key, value in table.items():
        if key in keys:
            values[key] = _checked(f"{section}.{key}", value, hints[key])
        elif takes_arguments:
            if value is not None:  # `none` unsets
                arguments[key] = value
        else:
            raise ConfigError(f"unknown key {section}.{key}{did_you_mean(key, keys)}")
    if takes_arguments:
        values["arguments"] = arguments
    return kind(**values)


def _checked(key: str, value: Any, hint: Any) -> Any:
    """Return the value as the type that the field declares, or refuse it."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if get_origin(option) is Literal:
            if value in get_args(option):
                return value
        elif get_origin(option) is tuple:
            texts = [value] if isinstance(value, str) else value
            if isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts):
                return tuple(texts)
        elif option is float and type(value) in (int, float):
            return float(value)
        elif type(value) is option:
            return value
    raise ConfigError(f"{key} is {value!r}, but must be {_described(options)}")


def _described(options: tuple[Any, ...]) -> str:
    words: list[str] = []
    for option in options:
        if get_origin(option) is Literal:
            words += [repr(choice) for choice in get_args(option)]
        elif get_origin(option) is tuple:
            words.append("a name or a list of names")
        else:
            words.append({int: "a whole number", float: "a number", str: "a text"}.get(option, "none"))
    return " or ".join(words)
