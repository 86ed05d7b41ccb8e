"""The user's own modules that workers will import: which they are, and whether executors have them.

A plan travels as a pickle.  What a notebook or `__main__` defines, or what the user registered with
cloudpickle, is in it by value.  All else is in it by name, and a worker imports it; so it does with what the
sections of the optimiser and the schedule name, where worker halves or replicas read them.
"""

from __future__ import annotations

import sys
import types
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from pyspark import SparkContext, cloudpickle

from sparksgd.arithmetic.copies import pickled
from sparksgd.config import OptimizerConfig, ScheduleConfig
from sparksgd.errors import ModelError
from sparksgd.imports.same_code import Pickled, needed_code
from sparksgd.spark.cluster.cluster import Cluster
from sparksgd.spark.cluster.environments import NEEDED, missing_module
from sparksgd.spark.cluster.jobs import spark_job
from sparksgd.spark.tasks import import_tasks
from sparksgd.spark.tasks.import_tasks import NotImported

__all__ = ["code_for", "computing", "refuse_not_imported", "require_modules", "users_modules", "with_code"]

_THERE = frozenset(NEEDED) | {"pyspark", "__main__"} | sys.stdlib_module_names


def users_modules(*parts: object) -> list[str]:
    """Return the modules that a process imports to unpickle these parts, but for those that all have.

    Args:
        parts: of a plan, or of what goes to workers beside it.
    """
    found: set[str] = set()

    class Listing(cloudpickle.Pickler):
        def persistent_id(self, value: Any) -> int | None:
            return 0 if isinstance(value, torch.UntypedStorage) else None  # its bytes import nothing

        def reducer_override(self, value: Any) -> Any:
            reduced = super().reducer_override(value)  # type: ignore[no-untyped-call]  # it has no types
            if isinstance(value, types.ModuleType):
                if self.dispatch_table[types.ModuleType](value)[1] == (value.__name__,):  # else by value
                    found.add(value.__name__)
            elif isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
                if reduced is NotImplemented and isinstance(value.__module__, str):  # else by value
                    found.add(value.__module__)
            elif isinstance(value, OptimizerConfig | ScheduleConfig):
                module, colon, _ = (value.name or "").partition(":")
                found.update([module] if colon else [])
            return reduced

    with suppress(ModelError):  # the trial refuses what cannot be pickled, and says why it tried
        pickled(parts, {str(number): part for number, part in enumerate(parts)}, Listing)
    return sorted(module for module in found if module.partition(".")[0] not in _THERE)


def require_modules(cluster: Cluster, modules: Sequence[str]) -> None:
    """Let executors import modules of the user's, as workers will.

    Args:
        cluster: whose executors.
        modules: their names; without any nobody is asked.

    Raises:
        ModelError: an executor cannot import one, or has other code, with its host.
    """
    if modules:
        code = code_for(modules, cluster.context)
        task = partial(import_tasks.import_modules, modules, code)
        with spark_job(cluster.context, "importing your modules on the executors"):
            found = cluster.visit(task)
            if any(one.was_imported_before for one in found):
                _renew_workers(cluster.context)
                found = cluster.visit(task)
            refuse_not_imported(found)
        cluster.users_modules.update(modules)


def with_code(part: object, named: Mapping[str, object], context: SparkContext | None) -> Pickled:
    """Pickle what workers load, with the digests of the modules that they import for it.

    Args:
        part: of a class of ours; classes of a notebook or of `__main__` are pickled by value.
        named: what of it is the user's, see `pickled`.
        context: see `code_for`.

    Raises:
        ModelError: see `needed_code`.
    """
    return Pickled(pickled(part, named, cloudpickle.Pickler), code_for(users_modules(part), context))


def code_for(modules: Iterable[str], context: SparkContext | None) -> dict[str, str]:
    """Return the code that workers need; if they may have imported other code, let there be new ones.

    PySpark has workers of their own for each environment.

    Args:
        modules: the names of modules of the user's.
        context: of the session whose workers import them; None: it is Spark Connect's.

    Raises:
        ModelError: see `needed_code`.
    """
    code = needed_code(modules)
    if context is None:
        return code
    before = _code_of_session.setdefault(context.applicationId, {})
    if any(before.get(name, digest) != digest for name, digest in code.items()):
        _renew_workers(context)
        before.clear()
    before.update(code)
    return code


computing: dict[object, str] = {}
"""Engines that are open, with the applications of their sessions: they go on with the workers they have."""

_GENERATION = "SPARKSGD_GENERATION_OF_CODE"
_code_of_session: dict[str, dict[str, str]] = {}
"""What was sent to the workers of a session, by its application; digests by the names of modules."""


def _renew_workers(context: SparkContext) -> None:
    """Let all jobs of a session have new Python workers from now on; idle ones stay with their executors.

    Raises:
        ModelError: another run of the session would lose its workers, and then find code that was changed.
    """
    if context.applicationId in computing.values():
        raise ModelError(
            "another run of this Spark session computes by modules as they were before they were changed: "
            "wait for its end, or start another session"
        )
    context.environment[_GENERATION] = uuid.uuid4().hex


def refuse_not_imported(found: Sequence[NotImported]) -> None:
    """Raise the error of the first module that an executor could not import."""
    for one in found:
        if one.is_other_code:
            raise ModelError(f"on {one.host} ({one.executable}): {one.told}")
        if one.missing is not None:
            raise missing_module(
                one.missing,
                where=f" on {one.host} ({one.executable})",
                by="" if one.missing == one.module else f", which {one.module} imports",
            )
        raise ModelError(
            f"importing {one.module} raised {one.told}, in the executors' Python on {one.host} "
            f"({one.executable}): find out what that host lacks which the driver has, and bring it by "
            f"--py-files, --files or --archives; or import it where it is used"
        )
