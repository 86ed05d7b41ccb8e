"""The user's own code, which a configuration names as `package.module:attribute`: import it, and run it.

And how errors show names and values, the user's, too: never longer than a person reads.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import reprlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from sparksgd.errors import ConfigError, OutOfMemory, SparkSGDError, UserCodeError
from sparksgd.imports.trust import Trust

__all__ = [
    "did_you_mean",
    "import_path",
    "out_of_memory_told",
    "resolve",
    "shortened",
    "shown",
    "users_code",
    "wrong_call",
]

T = TypeVar("T")


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """Return " (did you mean X?)" with the nearest valid word, or all of them if none is near."""
    by_lower = {name.lower(): name for name in sorted(valid)}
    nearest = difflib.get_close_matches(word[:_LONGEST].lower(), by_lower, n=1, cutoff=0.5)
    if nearest:
        return f" (did you mean {by_lower[nearest[0]]}?)"
    return f" (valid: {', '.join(by_lower.values())})"


def shown(value: object) -> str:
    """Return a value as errors show it.

    >>> shown("lenet"), shown([0.5, None]), len(shown("x" * 5000)), shown(10**5000)
    ("'lenet'", '[0.5, None]', 100, 'a whole number of about 5,001 digits')
    """
    try:
        return shortened(_REPR.repr(value))
    except Exception:  # what the user's own class raises
        return f"of type {type(value).__qualname__}"


def shortened(text: str, longest: int = 100) -> str:
    """Return a text without its middle, if it is long."""
    half = (longest - 3) // 2
    return text if len(text) <= longest else f"{text[: longest - 3 - half]}...{text[-half:]}"


class _Repr(reprlib.Repr):
    """Values as Python writes them, without most of what is long or deep."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxstring = self.maxother = self.maxlist = self.maxtuple = self.maxdict = _LONGEST

    def repr_int(self, x: int, level: int) -> str:
        """Return a whole number; Python refuses to write thousands of digits."""
        digits = x.bit_length() * 0.30103
        return repr(x) if digits < _LONGEST else f"a whole number of about {int(digits) + 1:,} digits"


_LONGEST = 100
_REPR = _Repr()


def resolve(key: str, name: str, ours: Mapping[str, T], trust: Trust | None = None) -> T | Any:
    """Return the object that a configuration value names.

    Args:
        key: the configuration key, for the error.
        name: a key of `ours`, or an import path `package.module:attribute`.
        ours: what the library offers, by plain names.
        trust: whose code may run, if the name comes from a file of a model or a run; None: the user wrote it.

    Raises:
        ConfigError: the name is unknown, or its module or attribute does not exist.
        DataError: what it names is not trusted.
    """
    if name in ours:
        return ours[name]
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name.strip(".") == module_name and module_name and attribute):
        raise ConfigError(
            f"{key} is {shown(name)}, which is not one of ours{did_you_mean(name, ours)}; "
            f"name your own as package.module:attribute"
        )
    if trust is not None:
        trust.check_name(key, name)
    try:
        module = importlib.import_module(module_name)
        is_there = hasattr(module, attribute)  # a lazy package may import more for it
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{key} is {shown(name)}, but Python finds no module {error.name!r}: put its folder on "
            f"PYTHONPATH, or ship it with --py-files"
        ) from error
    except Exception as error:
        raise ConfigError(
            f"{key} is {shown(name)}, but importing {module_name} raised {type(error).__name__}: {error}"
        ) from error
    if not is_there:
        raise ConfigError(
            f"{key} is {shown(name)}, but {module_name} has no {attribute!r}"
            f"{did_you_mean(attribute, [n for n in dir(module) if not n.startswith('_')])}"
        )
    value = getattr(module, attribute)
    if trust is not None:
        trust.check_value(key, name, value)
    return value


def import_path(value: object) -> str | None:
    """Return the name under which another process imports a function or class; None: it has none."""
    home, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if not isinstance(home, str) or home == "__main__" or not name.isidentifier():
        return None
    try:
        found = getattr(importlib.import_module(home), name, None)
    except ImportError:
        return None
    return f"{home}:{name}" if found is value else None


def wrong_call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> TypeError | None:
    """Return why a function or class does not take arguments by these names; None: it may take them.

    Args:
        function: or a class, or another callable; it is not called.
        arguments: by their names; the values do not matter.

    >>> wrong_call(lambda size: size, {"sizes": 3}), wrong_call(lambda size: size, {"size": 3})
    (TypeError("missing a required argument: 'size'"), None)
    """
    inner = function.func if isinstance(function, partial) else function
    try:
        parts = (inner, type(inner).__call__, inner.__init__, inner.__new__)
        if any(hasattr(part, "__signature__") for part in parts):  # it need not be what a call takes
            return None
        signature = inspect.signature(function, follow_wrapped=False)
    except Exception:  # of C, which says nothing; or of the user's own class
        return None
    try:
        signature.bind(**arguments)
    except TypeError as error:
        return error
    return None


@contextmanager
def out_of_memory_told(what: str) -> Iterator[None]:
    """Turn an error of Python, torch or the system for want of memory into one of ours.

    Args:
        what: the process, or which of the user's code runs in the block.
    """
    try:
        yield
    except SparkSGDError:
        raise
    except Exception as error:
        if OutOfMemory.is_behind(error):
            raise OutOfMemory.in_python(what, error) from error
        raise


@contextmanager
def users_code(what: str) -> Iterator[None]:
    """Turn what the user's code raises in the block into a UserCodeError that holds its traceback.

    Args:
        what: which of the user's code runs in the block, for the error.
    """
    try:
        with out_of_memory_told(what):
            yield
    except SparkSGDError:
        raise
    except Exception as error:
        raise UserCodeError(
            f"{what} raised {type(error).__name__}: {error}\n" + traceback.format_exc().rstrip()
        ) from error
