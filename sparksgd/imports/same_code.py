"""Whether this process has the code that another one has, or that its own files have.

A module of the user's travels by name, and each process imports it.  It may find another one: an older one
that is installed on a host, one whose file was changed since, or one that it imported before that.
"""

from __future__ import annotations

import importlib
import logging
import pickle
import sys
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from sparksgd.errors import ModelError
from sparksgd.imports.given_code import NOT_THE_USERS
from sparksgd.imports.loaded_code import Difference, attributes_set, difference
from sparksgd.imports.sources import digest_of_source, source_of, sources_of

__all__ = ["Pickled", "having_code", "needed_code", "refuse_changed_files"]

log = logging.getLogger("sparksgd")

_imported: dict[str, tuple[ModuleType, str]] = {}
"""By name: modules that a block of `having_code` imported, and the digests of their sources."""


@dataclass(frozen=True)
class Pickled:
    """A pickle, and the code that it needs where it is loaded."""

    data: bytes

    code: Mapping[str, str]
    """As `needed_code` returned it."""

    def load(self) -> Any:
        """Return what was pickled.

        Raises:
            ModelError: a module is other code here.
        """
        with having_code(self.code):
            return pickle.loads(self.data)


def needed_code(modules: Iterable[str]) -> dict[str, str]:
    """Return the digests of what modules are made of, by the names of modules; see `sources_of`.

    Warn of constants that have other values here than in the files.

    Args:
        modules: their names.

    Raises:
        ModelError: a file was changed after this process had imported it, or a function was replaced.
    """
    sources = sources_of(modules)
    are_set = set().union(*map(attributes_set, sources.values()))
    for name, found in _differences(sources, are_set):
        if found.kind == "older":
            raise _changed(name, found)
        told = f"{name}.{found.told}: workers import {_origin(sys.modules[name].__spec__)} as it is written"
        if found.kind == "replaced":
            raise ModelError(f"{told}. Write it there, or let the whole class be one of __main__")
        log.warning("%s, so write it there, or let it be an argument", told)
    return {name: digest_of_source(source) for name, source in sources.items()}


def refuse_changed_files(classes: Iterable[type], names: Iterable[str | None]) -> None:
    """Refuse code that this process imported before its file was changed.

    Args:
        classes: of the user's, or of others.
        names: `package.module:attribute`, as a configuration has them, or names of ours.

    Raises:
        ModelError: the functions of a module, or of one that it imports, are not those of its source.
    """
    homes = {each.__module__ for each in classes}
    homes |= {name.partition(":")[0] for name in names if name is not None and ":" in name}
    sources = sources_of(home for home in homes if home.partition(".")[0] not in NOT_THE_USERS)
    for name, found in _differences(sources):
        if found.kind == "older":
            raise _changed(name, found)


def _differences(
    sources: Mapping[str, str], are_set: Set[str] = frozenset()
) -> Iterator[tuple[str, Difference]]:
    """Yield the modules that are not as their sources say, by their names."""
    for name, source in sources.items():
        module = sys.modules.get(name)
        found = None if module is None else difference(module, source, are_set)
        if found is not None:
            yield name, found


def _changed(name: str, found: Difference) -> ModelError:
    return ModelError(
        f"{_origin(sys.modules[name].__spec__)} was changed after this process had imported {name} "
        f"({found.told}), and others would compute by the new file: start this process again; in a notebook, "
        f"importlib.reload({name}), and make the module anew"
    )


@contextmanager
def having_code(needed: Mapping[str, str]) -> Iterator[None]:
    """See to it that the block imports the code that another process has.

    A module that was imported before its file got that code is forgotten, so that it is imported anew.

    Args:
        needed: as `needed_code` returned it there.

    Raises:
        ModelError: a module has another source here.  A module without a source is believed.
    """
    is_stale = False
    for name, digest in needed.items():
        module = sys.modules.get(name)
        imported, before = _imported.get(name, (None, ""))
        if module is not None and imported is module and before == digest:
            continue  # also if its file was changed since
        spec, source = source_of(name)
        if source is None:
            continue
        if digest_of_source(source) != digest:
            raise ModelError(
                f"{name} is other code here ({_origin(spec)}) than where the run was started: its file was "
                f"changed while the run went on, or another version of it is installed here. Put the same "
                f"file on all hosts, or bring it by --py-files; a run that has checkpoints then goes on"
            )
        if module is not None:
            is_stale = is_stale or imported is module or _is_old(module, source)
    for name in needed if is_stale else ():
        sys.modules.pop(name, None)
    importlib.invalidate_caches()  # of folders, to which files may have come since
    yield
    for name, digest in needed.items():
        if name in sys.modules:
            _imported[name] = sys.modules[name], digest


def _origin(spec: ModuleSpec | None) -> str:
    return getattr(spec, "origin", None) or "a file"


def _is_old(module: ModuleType, source: str) -> bool:
    """Return whether a module was imported before its file was changed."""
    found = difference(module, source)
    return found is not None and found.kind == "older"
