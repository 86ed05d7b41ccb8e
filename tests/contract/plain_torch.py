"""One experiment twice: by the product on shards, and by plain torch on the rows of each step together.

The reference uses nothing of the product but the rows that it dealt, and `Sampling`, which says which of them
are in a step.  It is the loop that torch's tutorials show:

    zero_grad(set_to_none=True)  ->  mean of the loss  ->  backward  ->  optimizer.step  ->  schedule.step

and for each evaluation `eval()`, `no_grad`, and `train()` again.

Legend: B rows of a step, F features.
"""

from __future__ import annotations

import copy
import importlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from contract_layers import FEATURES
from engine_makers import Inline
from torch import nn
from torch.nn.parameter import is_lazy

from sparksgd.config import Config
from sparksgd.data.local_files import ParquetRows
from sparksgd.data.sampling import Sampling
from sparksgd.data.shard import Descriptor, read_records
from sparksgd.engines.inline import InlineEngine
from sparksgd.errors import SparkSGDError
from sparksgd.training.loop import train
from sparksgd.training.state import Observer, Probe

ROWS, TEST_ROWS = 40, 9
STEPS, ROWS_PER_STEP = 4, 14
"""An epoch has three steps: the fourth is of the next epoch."""

EVAL_EVERY = 2

Make = Callable[[], nn.Module]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a module is trained; everything but the module."""

    loss: str = "contract_losses:pulled"
    optimizer: Mapping[str, Any] = field(default_factory=lambda: {"name": "SGD", "lr": 0.02, "momentum": 0.9})
    schedule: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    """float64 tells mistakes from rounding; the product's own type is float32."""

    steps: int = STEPS

    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """More of the product's configuration."""

    def config(self, num_shards: int) -> Config:
        """Return the product's configuration."""
        train = {
            "rows_per_step": ROWS_PER_STEP, "num_shards": num_shards, "epochs": 2, "steps": self.steps,
            "seed": 3, "eval_every": EVAL_EVERY,
        }  # fmt: skip
        tables: dict[str, Any] = {
            "loss": {"name": self.loss}, "optimizer": dict(self.optimizer), "schedule": dict(self.schedule),
            "train": train,
        }  # fmt: skip
        for section, table in self.sections.items():
            tables[section] = tables.get(section, {}) | dict(table)
        return Config.from_dict(tables)


@dataclass
class Course:
    """What a training did: after each step the module's tensors by name, and the losses."""

    first: dict[str, torch.Tensor] = field(default_factory=dict)
    """The tensors before the first step."""

    tensors: list[dict[str, torch.Tensor]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    test_losses: list[float] = field(default_factory=list)
    refusal: SparkSGDError | None = None

    def note(self, module: nn.Module, loss: float) -> None:
        """Keep copies of all that the module has."""
        self.tensors.append(_tensors_of(module))
        self.losses.append(loss)


def _tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


# Rows


class KnownRows:
    """The same few rows for many trainings: they are read and dealt once.

    Args:
        folder: gets the files.
        count: how many rows.
        seed: of the rows.
    """

    def __init__(self, folder: Path, count: int, seed: int) -> None:
        drawn = np.random.default_rng(seed)
        features = drawn.standard_normal((count, FEATURES)).astype(np.float32)
        labels = drawn.integers(0, 3, count)
        table = pa.table(
            {
                "features": pa.array(features.tolist(), pa.list_(pa.float32())),
                "label": pa.array(labels.astype(np.int64)),
            }
        )
        path = folder / f"rows-{count}.parquet"
        pq.write_table(table, path)
        self._rows = ParquetRows(str(path))
        self._dealt: list[Any] = []
        self.first_rows = cache(lambda columns, count: self._rows.first_rows(list(columns), count))
        self.inspect = cache(self._rows.inspect)
        self._deal = cache(self._deal_once)

        first_rows = self.first_rows
        self.first_rows = lambda columns, count: first_rows(tuple(columns), count)

    def deal(self, schema: Any, num_shards: int, expected: Any, deal: int = 0) -> Any:
        """Return the shards, which the training may not remove."""
        return self._deal(schema, num_shards, deal, _Held(expected))

    def _deal_once(self, schema: Any, num_shards: int, deal: int, expected: _Held) -> Any:
        self._dealt.append(self._rows.deal(schema, num_shards, expected.value, deal))
        return _Kept(self._dealt[-1].table)

    def close(self) -> None:
        """Remove the shards."""
        for shards in self._dealt:
            shards.close()


@dataclass(frozen=True)
class _Held:
    """A value that is equal to any other: no part of a key."""

    value: Any = field(compare=False)


@dataclass
class _Kept:
    """Shards that stay when they are closed."""

    table: list[Descriptor]

    def close(self) -> None:
        """Keep the files."""


class Data:
    """Rows to train on and to evaluate on, for a `with` block.

    Args:
        folder: gets the files.
    """

    train: KnownRows
    test: KnownRows

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Self:
        self.train, self.test = KnownRows(self._folder, ROWS, 1), KnownRows(self._folder, TEST_ROWS, 2)
        return self

    def __exit__(self, *_: object) -> None:
        self.train.close()
        self.test.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @cache  # noqa: B019  # as long as the tests
    def union(self, num_shards: int) -> Union:
        """Return the rows of each step, as a training deals them to so many shards."""
        found = []

        def engine(plan: Any, shards: Any, test: Any) -> InlineEngine:
            read = [
                [read_records(s, range(s.rows), plan.schema.record) for s in dealt.table]
                for dealt in (shards, test)
            ]
            found.append(Union(tuple(read[0]), plan.sampling, np.concatenate(read[1])))
            return InlineEngine(plan, shards, test)

        train(
            Recipe().config(num_shards), rows=self.train, test=self.test, make_engine=Inline(engine),
            module=nn.Linear(FEATURES, 2),
        )  # fmt: skip
        return found[0]


@dataclass(frozen=True)
class Union:
    """The rows of each step, of all shards together."""

    records: tuple[np.ndarray[Any, Any], ...]
    sampling: Sampling
    test: np.ndarray[Any, Any]

    def of_step(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features float32[B, F] and labels [B]."""
        epoch = step // self.sampling.turns_per_epoch
        pieces = [
            records[
                np.sort(self.sampling.shuffled(shard, epoch)[slice(*self.sampling.piece_bounds(shard, step))])
            ]
            for shard, records in enumerate(self.records)
        ]
        return _tensors(np.concatenate(pieces))

    @property
    def of_test(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all test rows."""
        return _tensors(self.test)


def _tensors(records: np.ndarray[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(records["features"].copy()), torch.from_numpy(records["(label)"].copy())


# The two trainings


class _Watching(Observer):
    def __init__(self, course: Course) -> None:
        self.course = course

    def started(self, training: Any) -> None:
        self.course.first = _tensors_of(training.module)

    def stepped(self, training: Any, report: Any) -> None:
        self.course.note(training.module, report.loss)

    def evaluated(self, training: Any, report: Any) -> None:
        self.course.test_losses.append(report.loss)


def by_sparksgd(make: Make, recipe: Recipe, data: Data, num_shards: int) -> Course:
    """Train on shards with the inline engine."""
    course, module = Course(), made(make, recipe)
    try:
        train(
            recipe.config(num_shards),
            rows=data.train,
            test=data.test,
            make_engine=InlineEngine,
            module=module,
            observers=[_Watching(course)],
            probe=Probe(dtype=recipe.dtype),
        )
    except SparkSGDError as error:
        course.refusal = error
    return course


def by_plain_torch(
    make: Make, recipe: Recipe, union: Union, first: Mapping[str, torch.Tensor] | None = None
) -> Course:
    """Train in one process, each step on the rows of all shards.

    Args:
        make: returns the module.
        recipe: how to train it.
        union: the rows.
        first: what lazy parts begin with: their first values come with the first rows.
    """
    course, module, loss = Course(), made(make, recipe), copy.deepcopy(named(recipe.loss))
    _fill_lazy(module, union.of_step(0)[0], first or {})
    optimizer = _made(torch.optim, recipe.optimizer, _parameters(module, loss))
    schedule = _made(torch.optim.lr_scheduler, recipe.schedule, optimizer) if recipe.schedule else None
    for step in range(recipe.steps):
        features, label = union.of_step(step)
        optimizer.zero_grad(set_to_none=True)
        mean = loss(module(features), label).mean()
        mean.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        course.note(module, mean.item())
        if (step + 1) % EVAL_EVERY == 0 or step + 1 == recipe.steps:
            course.test_losses.append(_evaluated(module, loss, *union.of_test))
    return course


def _fill_lazy(module: nn.Module, features: torch.Tensor, first: Mapping[str, torch.Tensor]) -> None:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    lazy = [name for name, tensor in tensors if is_lazy(tensor)]
    if not lazy:
        return
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    with torch.no_grad():
        module(features)
    for part, training in modes:
        part.training = training
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name in lazy and name in first:
                tensor.copy_(first[name])


def _evaluated(module: nn.Module, loss: Any, features: torch.Tensor, label: torch.Tensor) -> float:
    """Return the mean loss in evaluation mode; parts that were in evaluation mode before stay in it.

    The product's evaluations leave parameters as they were, where `max_norm` would shorten them.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    with torch.no_grad():
        before = [parameter.clone() for parameter in module.parameters()]
        mean = loss(module(features), label).mean().item()
        for parameter, values in zip(module.parameters(), before, strict=True):
            parameter.copy_(values)
    module.train()
    for part, training in modes:
        part.training = training
    return mean


def made(make: Make, recipe: Recipe) -> nn.Module:
    """Return the module as both sides begin with it."""
    torch.manual_seed(5)
    module = make()
    return module.double() if recipe.dtype == torch.float64 else module


def named(name: str) -> Any:
    """Return what an import path names."""
    home, _, attribute = name.partition(":")
    return getattr(importlib.import_module(home), attribute)


def _made(home: Any, section: Mapping[str, Any], *given: Any) -> Any:
    arguments = {key: value for key, value in section.items() if key not in ("name", "interval")}
    name = section["name"]
    kind = named(name) if ":" in name else getattr(home, name)
    return kind(*given, **arguments)


def _parameters(module: nn.Module, loss: Any) -> list[nn.Parameter]:
    of_loss = list(loss.parameters()) if isinstance(loss, nn.Module) else []
    return [parameter for parameter in (*module.parameters(), *of_loss) if parameter.requires_grad]


# The comparison


def difference(ours: Course, theirs: Course, tolerance: float) -> str | None:
    """Return where two courses differ by more than rounding; None if nowhere.

    A course that ended early by an error, or diverged, is compared as far as it went.
    """
    for step, (one, other) in enumerate(zip(ours.tensors, theirs.tensors, strict=False), start=1):
        if one.keys() != other.keys():
            return f"step {step}: tensors {sorted(one.keys() ^ other.keys())} are on one side only"
        if diverged(theirs.losses[step - 1]):
            return None
        for name, expected in other.items():
            off = _off(one[name], expected)
            if not off <= tolerance:
                return f"step {step}: {name} is off by {off:.3g}"
        off = _off(_number(ours.losses[step - 1]), _number(theirs.losses[step - 1]))
        if not off <= tolerance:
            return f"step {step}: the loss is off by {off:.3g}"
    for number, (loss, expected_loss) in enumerate(
        zip(ours.test_losses, theirs.test_losses, strict=False), 1
    ):
        off = _off(_number(loss), _number(expected_loss))
        if not off <= tolerance:
            return f"evaluation {number}: the loss is off by {off:.3g}"
    if ours.refusal is None and len(ours.tensors) != len(theirs.tensors):
        return f"{len(ours.tensors)} steps instead of {len(theirs.tensors)}"
    return None


def diverged(loss: float) -> bool:
    """Return whether a loss is so large that squares overflow, or not finite."""
    return not abs(loss) < 1e20


def _number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _off(one: torch.Tensor, other: torch.Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    if not one.numel():
        return 0.0
    wide = torch.complex128 if other.is_complex() else torch.float64
    one, other = one.to_dense().to(wide), other.to_dense().to(wide)
    return float(((one - other).abs() / (1 + other.abs())).max())


def compared(make: Make, recipe: Recipe, data: Data, num_shards: int, tolerance: float) -> Verdict:
    """Train both ways, and say how that ended."""
    ours = by_sparksgd(make, recipe, data, num_shards)
    if ours.refusal is not None and not ours.tensors:
        return Verdict(ours.refusal, 0, None)
    try:
        theirs = by_plain_torch(make, recipe, data.union(num_shards), ours.first)
    except RuntimeError as error:
        return Verdict(ours.refusal, len(ours.tensors), f"plain torch refuses it: {error}", by_torch=True)
    return Verdict(ours.refusal, len(ours.tensors), difference(ours, theirs, tolerance))


@dataclass(frozen=True)
class Verdict:
    """How an experiment ended."""

    refusal: SparkSGDError | None
    """The error that ended it."""

    steps: int
    """Steps before that."""

    difference: str | None
    """Where it differs from plain torch."""

    by_torch: bool = False
    """Whether torch itself refuses it in one process, as most optimisers do sparse gradients."""

    @property
    def is_right(self) -> bool:
        """Return whether it is plain torch's to rounding, in all steps."""
        return self.refusal is None and self.difference is None

    @property
    def is_refused(self) -> bool:
        """Return whether it was refused before the first step."""
        return self.refusal is not None and self.steps == 0

    def __str__(self) -> str:
        if self.refusal is not None:
            kind = type(self.refusal).__name__
            return f"refused after {self.steps} steps: {kind}: {self.refusal}; {self.difference}"
        return f"different: {self.difference}" if self.difference else "right"
