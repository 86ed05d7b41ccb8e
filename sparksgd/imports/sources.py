"""The digest of the code that a name leads to, so that other code of the same name is noticed."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import pkgutil
import sys
import sysconfig
import warnings
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from threading import RLock

__all__ = [
    "code_digest",
    "code_digests",
    "compiling_quietly",
    "is_installed",
    "loaded_sources",
    "parsed",
    "source_of",
]

_MOST_CHARACTERS = 16_000_000
"""A package that has more source is followed no further."""

_ALONE = ("torch",)
"""Packages of which only the named module is read: their version says more, and they are large."""

_MOST_COMPARED = 2_000_000
"""Characters of source that are compared between processes, at about a second for each million."""

_VERSIONS = ("__about__", "_version", "version")

_EVERYWHERE = sys.stdlib_module_names | {
    "__main__", "__mp_main__", "numpy", "pandas", "py4j", "pyarrow", "pyspark", "sparksgd", "torch",
}  # fmt: skip
"""What every process has, and is compared by its version, or travels by value."""

_OURS = "sparksgd"
"""It may lie beside the user's code, or be installed."""

_INSTALLED = ("site-packages", "dist-packages")


def code_digest(name: str | None) -> str | None:
    """Return the digest of the code that a `package.module:attribute` is made of.

    It covers the source of the module, and of what that imports from its own package, or from the folder
    that the package or the file lies in (a folder of installed packages excepted); then what those import,
    and so on.  The sources are only read, never imported: the digest is the same wherever the files are.
    What is imported by another way than a statement (importlib, exec, an entry point) is not seen, nor is
    code without a source.

    Args:
        name: as a configuration has it.

    Returns:
        64 hexadecimal digits; None: it is a name of ours, or there is no source.
    """
    module, colon, _ = (name or "").partition(":")
    if not colon or module == "__main__" or not all(part.isidentifier() for part in module.split(".")):
        return None
    try:
        return _Sources(module).digest()
    except Exception:  # of a strange finder, a loader or a path; `resolve` will say why
        return None


def code_digests(names: Mapping[str, str | None]) -> dict[str, str]:
    """Return the digests of code by the keys that name it; names of ours have none.

    Args:
        names: {key: name} of a configuration.
    """
    digests = {key: code_digest(name) for key, name in names.items()}
    return {key: digest for key, digest in digests.items() if digest is not None}


def loaded_sources(modules: Iterable[str]) -> dict[str, str]:
    """Return the sources of modules that this process has imported, and of what those import, by their names.

    That is, of their own packages and of all others that are not installed.  Libraries that every process
    has, and what was not imported, are left out.  Where it is much, the last ones are.

    Args:
        modules: their names.
    """
    found: dict[str, str] = {}
    seen: set[str] = set()
    waiting, later = deque(modules), deque[str]()  # those of installed packages come later
    characters = 0
    while (waiting or later) and characters <= _MOST_COMPARED:
        for name in _with_parents((waiting or later).popleft()):
            top, spec = name.partition(".")[0], _imported(name)
            is_version = name.rpartition(".")[2] in _VERSIONS  # builds for other devices differ by it
            if name in seen or spec is None or top in _EVERYWHERE or is_version:
                continue
            seen.add(name)
            source = _source(spec)
            if source is None:
                continue
            found[name] = source
            characters += len(source)
            is_package = spec.submodule_search_locations is not None
            for each in _imports(source, name, is_package):
                if each in sys.modules and not is_installed(each):
                    waiting.append(each)
                elif each in sys.modules and each.partition(".")[0] == top:
                    later.append(each)
    return found


def is_installed(name: str) -> bool:
    """Return whether a module that this process has imported is of an installed package, or of Python."""
    return _folder_of(_imported(name.partition(".")[0])) is None


def source_of(name: str) -> tuple[ModuleSpec | None, str | None]:
    """Return where a module was imported from, or would be, and its source; None where there is none."""
    try:
        spec = _imported(name) or _Sources(name).spec(name)
        return spec, None if spec is None else _source(spec)
    except Exception:  # of a strange finder, a loader or a path; `import` will say why
        return None, None


class _Sources:
    """The sources that a module is made of."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._top = module.partition(".")[0]
        self._specs: dict[str, ModuleSpec | None] = {self._top: _imported(self._top) or _found(self._top)}
        self._folder = _folder_of(self._specs[self._top])

    def digest(self) -> str | None:
        """Return the digest of all of them; None if the module has no source."""
        sources: dict[str, str | None] = {}
        waiting = [self._module]
        characters = 0
        while waiting:
            name = waiting.pop(0)
            for each in _with_parents(name):
                spec = None if each in sources else self.spec(each)
                if spec is None:
                    continue
                source = sources[each] = _source(spec)
                characters += len(source or "")
                if source is not None and self._top not in _ALONE and characters <= _MOST_CHARACTERS:
                    is_package = spec.submodule_search_locations is not None
                    waiting += _imports(source, each, is_package)
        if sources.get(self._module) is None:
            return None
        digest = hashlib.sha256()
        for name, source in sorted(sources.items()):
            told = "no source" if source is None else hashlib.sha256(source.encode()).hexdigest()
            digest.update(f"{name} {told}\n".encode())
        return digest.hexdigest()

    def spec(self, name: str) -> ModuleSpec | None:
        """Return where a module is, if it is one of the same package or folder."""
        if name not in self._specs:
            parent = name.rpartition(".")[0]
            if parent:
                around = self.spec(parent)
                folders = list(around.submodule_search_locations or ()) if around else []
            else:
                folders = [self._folder] if self._folder and name != _OURS else []
            self._specs[name] = _found_in(folders, name)
        return self._specs[name]


def _with_parents(name: str) -> list[str]:
    """Return a module's name after those of the packages around it, which are imported before it."""
    parts = name.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def _imported(name: str) -> ModuleSpec | None:
    """Return where a module was imported from, if it was."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return spec if isinstance(spec, ModuleSpec) else None


def _found(name: str) -> ModuleSpec | None:
    """Return where Python would import a module from that is in no package; nothing is imported."""
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        if find is not None and (spec := find(name, None)) is not None:
            return spec if isinstance(spec, ModuleSpec) else None
    return None


def _found_in(folders: list[str], name: str) -> ModuleSpec | None:
    """Return where in some folders or zip files a module is."""
    portions: list[str] = []
    for folder in folders:
        finder = pkgutil.get_importer(folder)
        spec = None if finder is None else finder.find_spec(name)
        if spec is not None and spec.loader is not None:
            return spec
        portions += [] if spec is None else (spec.submodule_search_locations or [])
    if not portions:
        return None
    namespace = ModuleSpec(name, None, is_package=True)
    namespace.submodule_search_locations = portions
    return namespace


def _folder_of(spec: ModuleSpec | None) -> str | None:
    """Return the folder or zip file that a package or a file is in; None for one of installed packages."""
    if spec is None:
        return None
    places = list(spec.submodule_search_locations or ())
    place = places[0] if places else spec.origin
    if place is None or not (places or spec.has_location):
        return None
    folder = Path(place).parent
    libraries = {Path(sysconfig.get_path(kind)) for kind in ("stdlib", "platstdlib")}
    return None if folder.name in _INSTALLED or libraries & {folder, folder.parent} else str(folder)


def _source(spec: ModuleSpec) -> str | None:
    get_data, get_source = (getattr(spec.loader, name, None) for name in ("get_data", "get_source"))
    try:
        if get_data is not None and spec.origin is not None and spec.origin.endswith(".py"):
            return importlib.util.decode_source(get_data(spec.origin))  # the same of files and of zip files
        if get_source is not None:
            source = get_source(spec.name)
            return source if isinstance(source, str) else None
    except (ImportError, OSError, SyntaxError, UnicodeError, EOFError, zlib.error):
        pass  # the last ones of a zip file that was replaced
    return None


@cache
def _imports(source: str, name: str, is_package: bool) -> tuple[str, ...]:
    """Return the names of what a module may import: also of attributes, which are no modules."""
    return tuple(sorted(set(_each_import(source, name, is_package))))


def parsed(source: str) -> ast.Module:
    """Return the syntax tree of a source; its warnings were shown when it was imported.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: as `ast.parse`.
    """
    with compiling_quietly():
        for _ in range(_MOST_ATTEMPTS):
            with suppress(SystemError):  # Python 3.11 may fail so while another thread does the same
                return ast.parse(source)
        return ast.parse(source)


@contextmanager
def compiling_quietly() -> Iterator[None]:
    """Run a block that compiles, without warnings; one thread at a time: filters are of the whole process."""
    with _COMPILES, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_COMPILES = RLock()
_MOST_ATTEMPTS = 10


def _each_import(source: str, name: str, is_package: bool) -> Iterator[str]:
    try:
        tree = parsed(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    package = name.split(".") if is_package else name.split(".")[:-1]
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            around = package[: len(package) - node.level + 1] if node.level else []
            if node.level > len(package):
                continue
            home = ".".join([*around, *([node.module] if node.module else [])])
            yield home
            yield from (f"{home}.{alias.name}" for alias in node.names if alias.name != "*")
        elif isinstance(node, ast.If) and _is_type_checking(node.test):
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def _is_type_checking(test: ast.expr) -> bool:
    """Return whether a test is TYPE_CHECKING alone; what has it within another test may be run."""
    name = test.id if isinstance(test, ast.Name) else test.attr if isinstance(test, ast.Attribute) else ""
    return name == "TYPE_CHECKING"
