"""From TOML, `--set` and Python's values to checked sections; whatever else comes in is a ConfigError.

A value that passes can be written to a run's folder, read again, and compared with another run's.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from sparksgd.errors import ConfigError
from sparksgd.imports import did_you_mean, shortened, shown
from sparksgd.storage import location

__all__ = [
    "MOST",
    "Readable",
    "as_toml",
    "checked_section",
    "read_section",
    "read_setting",
    "read_toml",
    "require_storable",
    "require_text",
]

MOST = 2**31 - 1
"""The largest count of a configuration; the product of two of them still has 64 bits."""

_MOST_BYTES = 2**20
_LONGEST_TEXT = 4096  # as paths
_DEEPEST = 32
_INTEGERS = range(-(2**63), 2**64)
_LONGEST_NAME = 100


class Readable(Protocol):
    """A file, on this machine or elsewhere."""

    def read_bytes(self, most_bytes: int | None = None, /) -> bytes:
        """Return its content, or raise OSError, also if it is longer."""
        ...


def read_toml(file: str | Path | Readable) -> dict[str, Any]:
    """Return the tables of a TOML file.

    Raises:
        ConfigError: it cannot be read, or is no TOML.
    """
    if not isinstance(file, str | Path) and not hasattr(file, "read_bytes"):
        raise ConfigError(f"the configuration is {shown(file)}, but must be a path, or a dict of sections")
    name = shortened(str(file), 3 * _LONGEST_NAME)
    try:
        source: Readable = location(file) if isinstance(file, str | Path) else file
        content = source.read_bytes(_MOST_BYTES)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot read the configuration {name}: {reason}") from error
    try:
        text = content.decode("utf-8-sig")  # some editors write a byte order mark
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not valid TOML: {error}; save it as UTF-8") from error
    try:
        return _parsed(text, name)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is not valid TOML: {shortened(str(error), 3 * _LONGEST_NAME)}") from error


def read_setting(setting: str) -> tuple[str, str, Any]:
    """Return section, key and value of a `section.key=value`.

    Raises:
        ConfigError: it has another form.
    """
    if not isinstance(setting, str):
        raise ConfigError(f"a setting is {shown(setting)}, but must be a text like section.key=value")
    name, equals, text = setting.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and key):
        raise ConfigError(f"--set {shown(setting)} is not of the form section.key=value")
    text = text.strip()
    if text.lower() == "none":
        return section, key, None
    where = f"--set {shown(setting)}"
    try:
        tables = _parsed(f"value = {text}", where)
    except tomllib.TOMLDecodeError:
        return section, key, text
    if len(tables) > 1:
        raise ConfigError(f"{where} has more than one value: pass --set for each key")
    return section, key, tables["value"]


def _parsed(text: str, where: str) -> dict[str, Any]:
    """Return the tables of a text.

    Raises:
        TOMLDecodeError: it is no TOML.
        ConfigError: it is, but numbers or nesting are too large.
    """

    def number(digits: str) -> float:
        value = float(digits)
        if math.isinf(value) and "inf" not in digits:
            raise ConfigError(f"{where} has the number {shown(digits)}, but 1.7e308 is the largest")
        return value

    try:
        return tomllib.loads(text, parse_float=number)
    except tomllib.TOMLDecodeError:
        raise
    except RecursionError as error:
        raise ConfigError(
            f"{where} has values within values, too deep to be read: {_DEEPEST} levels are allowed"
        ) from error
    except ValueError as error:  # int() refuses thousands of digits
        raise ConfigError(
            f"{where} has a whole number of thousands of digits, but 64 bits are the most"
        ) from error


@cache
def _hints(kind: type[Any]) -> Mapping[str, Any]:
    """Return the types of a section's keys."""
    return get_type_hints(kind)


def read_section(section: str, kind: type[Any], table: Mapping[str, Any]) -> Any:
    """Return the dataclass of a section, with the values of a table.

    Args:
        section: its name, for errors.
        kind: the dataclass; its field `arguments`, if it has one, takes the keys that are not fields.
        table: values by key.

    Raises:
        ConfigError: a key is unknown, or a value of another type.
    """
    hints = _hints(kind)  # type: ignore[arg-type]  # a class can be hashed
    keys = [name for name in hints if name != "arguments"]
    values: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    for key, value in table.items():
        require_text(key, f"a key of [{section}]")
        if key in keys:
            values[key] = _checked(f"{section}.{key}", value, hints[key])
        elif "arguments" not in hints:
            raise ConfigError(f"unknown key {section}.{_bare(key)}{did_you_mean(key, keys)}")
        elif value is not None:  # `none` unsets
            arguments[key] = value
    if "arguments" in hints:
        values["arguments"] = _checked_arguments(section, keys, arguments)
    return kind(**values)


def checked_section(section: str, kind: type[Any], given: Any) -> Any:
    """Return a section that Python code made, with its values as `read_section` would return them.

    Raises:
        ConfigError: it is of another class, or a value of another type.
    """
    if not isinstance(given, kind):
        raise ConfigError(f"{section} is {shown(given)}, but must be a {kind.__name__}")
    hints = _hints(kind)  # type: ignore[arg-type]  # a class can be hashed
    keys = [name for name in hints if name != "arguments"]
    values = {key: _checked(f"{section}.{key}", getattr(given, key), hints[key]) for key in keys}
    if "arguments" in hints:
        values["arguments"] = _checked_arguments(section, keys, given.arguments)
    return dataclasses.replace(given, **values)


def require_text(value: Any, what: str) -> None:
    """Refuse what is no text, or a text that no file can hold.

    Raises:
        ConfigError: with the value.
    """
    if not isinstance(value, str):
        raise ConfigError(f"{what} is {shown(value)}, but must be a text")
    if (flaw := _flaw(value)) is not None:
        raise ConfigError(f"{what} is {shown(value)}, {flaw}")


def require_storable(key: str, value: Any, otherwise: str) -> None:
    """Refuse a value that a run's folder cannot hold.

    Args:
        key: its name, for the error.
        value: of that key, checked already.
        otherwise: what else one may do.

    Raises:
        ConfigError: with the key and the value.
    """
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{key} is {shown(value)}, which cannot be written to the run's folder: use numbers, texts and "
            f"lists, {otherwise}"
        ) from error


def as_toml(value: Any) -> Any:
    """Return a value as TOML would give it back: tuples are lists there."""
    if isinstance(value, Mapping):
        return {key: as_toml(inner) for key, inner in value.items()}
    return [as_toml(inner) for inner in value] if isinstance(value, list | tuple) else value


def _bare(key: str) -> str:
    """Return a key as errors show it, without quotes."""
    return shown(key)[1:-1]


def _checked_arguments(section: str, keys: Iterable[str], arguments: Any) -> dict[str, Any]:
    """Return arguments of the section's class, or refuse those that could not be passed or written down."""
    if not isinstance(arguments, Mapping):
        raise ConfigError(f"the arguments of {section} are {shown(arguments)}, but must be a dict")
    for key, value in arguments.items():
        require_text(key, f"a key of [{section}]")
        if key == "arguments" or key in keys:
            raise ConfigError(
                f"{section}.{key} is {shown(value)}, but no argument can have this name: write each argument "
                f"as {section}.name = value"
            )
        if not key.isidentifier() or len(key) > _LONGEST_NAME:
            raise ConfigError(
                f"{section} has a key {shown(key)}, but its keys are names of arguments: letters, digits "
                f"and _, {_LONGEST_NAME} at most; a table is written {section}.name = {{inner = 1}}"
            )
        name = f"{section}.{key}"
        for part in _parts(name, value):
            if (flaw := _flaw(part)) is not None:
                raise ConfigError(f"{name} is {shown(value)}, {flaw}")
    return dict(arguments)


def _parts(key: str, value: Any) -> Iterator[Any]:
    """Yield a value and all values and keys in it, level by level.

    Raises:
        ConfigError: there are too many levels; a list may even hold itself.
    """
    level = [value]
    for _ in range(_DEEPEST):
        yield from level
        dicts = {id(part): part for part in level if isinstance(part, Mapping)}.values()
        lists = {id(part): part for part in level if isinstance(part, list | tuple)}.values()
        for part in dicts:
            for name in part:
                require_text(name, f"a key in {key}")
        level = [*chain.from_iterable(part.values() for part in dicts), *chain.from_iterable(lists)]
        if not level:
            return
    raise ConfigError(f"{key} is {shown(value)}, values within values of more than {_DEEPEST} levels")


def _flaw(value: Any) -> str | None:
    """Return what is wrong with a single value, whatever its key is; else None."""
    if type(value) is int and value not in _INTEGERS:
        return "but whole numbers must fit into 64 bits"
    if isinstance(value, float) and math.isnan(value):
        return "which is no number, and equals nothing: leave it out, or pass a text"
    if isinstance(value, str):
        if "\0" in value:
            return "but a text must not hold the character NUL"
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            return "but a text must be Unicode, as UTF-8 can hold it"
    return None


def _checked(key: str, value: Any, hint: Any) -> Any:
    """Return the value as the type that the field declares, or refuse it."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if get_origin(option) is Literal:
            if isinstance(value, str) and value in get_args(option):
                return value
        elif get_origin(option) is tuple:
            texts = [value] if isinstance(value, str) else value
            if isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts):
                return tuple(_sound(key, text) for text in texts)
        elif option is float and type(value) in (int, float):
            return _finite(key, value)
        elif type(value) is option:
            return _sound(key, value)
    raise ConfigError(f"{key} is {shown(value)}, but must be {_described(options)}")


def _sound(key: str, value: Any) -> Any:
    if (flaw := _flaw(value)) is not None:
        raise ConfigError(f"{key} is {shown(value)}, {flaw}")
    if isinstance(value, str) and len(value) > _LONGEST_TEXT:
        raise ConfigError(
            f"{key} is {shown(value)}, a text of {len(value):,} characters, but may have "
            f"{_LONGEST_TEXT:,} at most"
        )
    return value


def _finite(key: str, value: float) -> float:
    try:
        number = float(value)
    except OverflowError as error:
        raise ConfigError(f"{key} is {shown(value)}, which is too large for a number") from error
    if not math.isfinite(number):
        raise ConfigError(f"{key} is {number}, but must be finite")
    return number


_WORDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a text", types.NoneType: "none",
}  # fmt: skip


def _described(options: tuple[Any, ...]) -> str:
    words: list[str] = []
    for option in options:
        if get_origin(option) is Literal:
            words += [repr(choice) for choice in get_args(option)]
        elif get_origin(option) is tuple:
            words.append("a name or a list of names")
        else:
            words.append(_WORDS[option])
    return " or ".join(words)
