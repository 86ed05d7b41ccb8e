"""Whose code may run, where a file names it: the folder of a model, or that of a run to be repeated.

Such a file may come from anybody, and `os:system` is a name as good as `mymodels:Net`.  So what loads it runs
nothing but our own models and losses, and code of packages that its caller trusts:

    load_model(folder, trust=["mymodels"])      also read_replay
    --trust mymodels                            of jobs/evaluate.py, jobs/predict.py, jobs/train.py --replay
    sparksgd.trust("mymodels")                  for all that this process loads
    SPARKSGD_TRUST=mymodels,others              in the environment

A package is trusted with all that is in it, and with what importing it runs.  `mymodels` is also
`mymodels.nets`, but not `mymodels_of_others`; `mymodels.nets` is not `mymodels`.  What a package only imports
from elsewhere is not of it: `mymodels:system` is refused if mymodels says `from os import system`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sparksgd.errors import ConfigError, DataError

__all__ = ["Trust", "trust", "trusted"]

_VARIABLE = "SPARKSGD_TRUST"

_of_process: set[str] = set()


def trust(*packages: str) -> None:
    """Trust packages, for all that this process loads: their code may run if a model or a run names it.

    Args:
        packages: names, such as "mymodels" or "mymodels.nets".

    Raises:
        ConfigError: an argument is no name of a package.
    """
    _of_process.update(_checked(packages, "an argument of sparksgd.trust"))


@dataclass(frozen=True, kw_only=True)
class Trust:
    """The packages whose code may run."""

    packages: frozenset[str]
    """Dotted names."""

    where: str
    """The file that names code, for errors."""

    def check_name(self, key: str, name: str) -> None:
        """Refuse a name of code that is not trusted, before anything is imported.

        Args:
            key: what has the name, such as model.name.
            name: package.module:attribute.

        Raises:
            DataError: what would have been run, and how to trust it.
        """
        module, colon, attribute = name.partition(":")
        if not (colon and _is_dotted(module) and attribute.isidentifier()):
            raise DataError(
                f"{self.where}: {key} is {name!r}, but must be one of ours, or like package.module:attribute"
            )
        if not self._covers(module):
            raise DataError(
                f"{self.where}: {key} is {name!r}, but {module} is not trusted, and loading would run it. "
                f"If you know whose code this is, {_ways(key, module)}"
            )

    def check_value(self, key: str, name: str, value: Any) -> None:
        """Refuse what a trusted module has only imported from another one.

        Args:
            key: what has the name.
            name: package.module:attribute.
            value: what it names.

        Raises:
            DataError: whose it is, and the next move.
        """
        home = _home(value)
        if home is None:
            raise DataError(
                f"{self.where}: {key} is {name!r}, a {type(value).__name__} of no known module: name "
                f"a class or a function that a trusted module defines"
            )
        if not self._covers(home):
            raise DataError(
                f"{self.where}: {key} is {name!r}, but that is code of {home}, which is not trusted. If you "
                f"know what it does, {_ways(key, home)}"
            )

    def _covers(self, module: str) -> bool:
        return any(module == package or module.startswith(f"{package}.") for package in self.packages)


def trusted(packages: Iterable[str] = (), *, where: object) -> Trust:
    """Return whom a loader trusts: the packages of its caller, of the process, and of the environment.

    Args:
        packages: the caller's.
        where: the file or folder that names code.

    Raises:
        ConfigError: one of them is no name of a package.
    """
    if isinstance(packages, str) or not isinstance(packages, Iterable):
        raise ConfigError(
            f"trust is {packages!r}, but must be a list of names of packages: trust=['mymodels']"
        )
    of_environment = os.environ.get(_VARIABLE, "").strip()
    names = [
        *_checked(packages, "a package to trust"),
        *_checked(
            [n.strip() for n in of_environment.split(",")] if of_environment else [], f"a part of {_VARIABLE}"
        ),
        *_of_process,
    ]
    return Trust(packages=frozenset(names), where=str(where))


def _checked(packages: Iterable[object], what: str) -> list[str]:
    names: list[str] = []
    for package in packages:
        if not (isinstance(package, str) and _is_dotted(package)):
            raise ConfigError(
                f"{what} is {package!r}, but must be the name of one package, such as mymodels or "
                f"mymodels.nets"
            )
        names.append(package)
    return names


def _is_dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def _home(value: Any) -> str | None:
    """Return the module that a class, a function or any other object is of."""
    if isinstance(value, functools.partial):
        return _home(value.func)
    home = getattr(value, "__module__", None)
    return home if isinstance(home, str) else None


def _ways(key: str, module: str) -> str:
    """Return how a module is trusted, for errors."""
    package = module.partition(".")[0]
    ways = (
        f"trust it: trust=[{package!r}] of load_model, read_replay or a Model's load, --trust {package} of "
        f"jobs/evaluate.py, jobs/predict.py or jobs/train.py --replay, sparksgd.trust({package!r}) in "
        f"Python, or {_VARIABLE}={package} in the environment"
    )
    return (
        f"{ways}; or build the module yourself, and pass it to load_model as module="
        if key == "model.name"
        else ways
    )
