"""Whether this process has the code that another one has, or that its own files have.

A module of the user's travels by name, and each process imports it.  It may find another one: an older one
that is installed on a host, one whose file was changed since, or one that it imported before that.
"""

from __future__ import annotations

import importlib
import logging
import pickle
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from sparksgd.errors import ModelError
from sparksgd.imports.loaded_code import Difference, attributes_set, code_of_source, difference
from sparksgd.imports.sources import is_installed, loaded_sources, source_of

__all__ = ["ImportedBefore", "Pickled", "having_code", "needed_code", "refuse_changed_files"]

log = logging.getLogger("sparksgd")

_had: dict[str, tuple[ModuleType, str]] = {}
"""By name: modules of this process that were found to be the code that was needed, and its digests."""

_seen: dict[str, tuple[ModuleSpec, str]] = {}
"""By name: what a module was imported by, and its source when it was first looked at.  To reload it makes
another spec."""

_PATCHES = "IPython.extensions.deduperreload"
"""It changes modules without a reload."""

_warned: set[str] = set()


class ImportedBefore(ModelError):
    """A Python worker imported a module before its file got the code that is needed; a new one would not."""


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
    """Return the digests of what modules are made of, by the names of modules; see `loaded_sources`.

    Warn, once, of constants that have other values here than in the files.

    Args:
        modules: their names.

    Raises:
        ModelError: a file was changed after this process had imported it, or a function was replaced.
    """
    sources = loaded_sources(modules)
    for name, found in _differences(sources):
        if found.kind == "older":
            raise _changed(name, found)
        told = f"{name}.{found.told}, but workers import {_origin(name)} as it is written"
        if found.kind == "replaced":
            raise ModelError(f"{told}: write it into the file, or define the whole class in the notebook")
        if told not in _warned:
            _warned.add(told)
            log.warning("%s: write it into the file, or let it be an argument", told)
    return {name: code_of_source(source) for name, source in sources.items()}


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
    for name, found in _differences(loaded_sources(sorted(homes))):
        if found.kind == "older":
            raise _changed(name, found)


def _differences(sources: Mapping[str, str]) -> Iterator[tuple[str, Difference]]:
    """Yield the modules that are not as their sources say, by their names."""
    are_set = set().union(*map(attributes_set, sources.values()))
    for name, source in sources.items():
        module = sys.modules.get(name)
        spec = getattr(module, "__spec__", None)
        first, before = _seen.get(name, (None, source))
        is_same_import = first is not None and first is spec
        if is_same_import and before == source and is_installed(name):
            continue  # it was looked at, and nobody sets parts of it
        found = difference(module, source, are_set)
        is_other = is_same_import and code_of_source(before) != code_of_source(source)
        if (found is None or found.kind == "set") and is_other and _PATCHES not in sys.modules:
            found = Difference("other lines than functions differ", "older")
        if found is not None:
            yield name, found
        elif isinstance(spec, ModuleSpec):
            _seen[name] = spec, source


def _changed(name: str, found: Difference) -> ModelError:
    return ModelError(
        f"{_origin(name)} was changed after this process had imported {name} ({found.told}), so that other "
        f"processes have other code: start this process again; in a notebook, importlib.reload({name}), and "
        f"build the model anew"
    )


@contextmanager
def having_code(needed: Mapping[str, str]) -> Iterator[None]:
    """See to it that the block imports the code that another process has.

    Args:
        needed: as `needed_code` returned it there.

    Raises:
        ModelError: a module has another source here, or was imported from another one.  A module without a
            source is believed.
    """
    importlib.invalidate_caches()  # of folders, to which files may have come since
    sources: dict[str, str] = {}
    for name, digest in needed.items():
        module, had = sys.modules.get(name), _had.get(name)
        if had is not None and had[0] is module:
            if had[1] != digest:
                raise _imported_before(name, "it was compared then")
            continue  # also if its file was changed since
        spec, source = source_of(name)
        if source is None:
            continue
        if code_of_source(source) != digest:
            raise ModelError(
                f"{name} is other code here ({spec and spec.origin}) than where the run was started: its "
                f"file was changed while the run went on, or another version of it is installed here, or an "
                f"older one was sent to this session before. Let all hosts have the same file, or bring it "
                f"by --py-files to a new session; a run that has checkpoints then goes on"
            )
        sources[name] = source
    _refuse_older(sources)
    yield
    _refuse_older(sources)  # a file of bytecode may be older, though Python believes it
    for name in sources:
        module = sys.modules.get(name)
        if isinstance(module, ModuleType):
            _had[name] = module, needed[name]


def _refuse_older(sources: Mapping[str, str]) -> None:
    """Refuse modules that this process imported from other code than their files have now."""
    for name, found in _differences(sources):
        if found.kind == "older":
            raise _imported_before(name, found.told)


def _imported_before(name: str, told: str) -> ImportedBefore:
    return ImportedBefore(
        f"{_origin(name)} was changed after a Python worker had imported {name} ({told}): start a new Spark "
        f"session; if that does not help, remove the folder __pycache__ beside the file"
    )


def _origin(name: str) -> str:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return getattr(spec, "origin", None) or "a file"
