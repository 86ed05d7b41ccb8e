"""Whatever comes in, a configuration comes out that can be written down, or a ConfigError of some words."""

from __future__ import annotations

import datetime
import json
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparksgd.config import Config
from sparksgd.errors import ConfigError
from sparksgd.solvers.rules import completed

LONGEST_ERROR = 1000
few = settings(
    max_examples=100, derandomize=True, database=None, deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip


def checked(make: Callable[[], Config], *, stored: bool) -> str | None:
    """Return the error of a refused configuration; check that another one survives being written down.

    Args:
        make: makes it.
        stored: whether it must be JSON, too, as what Python code passes need not be.
    """
    try:
        for config in (given := make(), completed(given)):
            tables = config.to_dict()
            assert Config.from_dict(json.loads(json.dumps(tables)) if stored else tables) == config
    except ConfigError as error:
        text = str(error)
        assert len(text) < LONGEST_ERROR
        assert "\0" not in text
        text.encode()  # a terminal can show it
        return text
    return None


class File:
    """A file's content."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __str__(self) -> str:
        return "run.toml"

    def read_bytes(self, most_bytes: int | None = None, /) -> bytes:
        return self._content


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


VALUES = [
    "9" * 5000, "-" + "9" * 5000, "0x" + "f" * 5000, "9223372036854775808", "99999999999999999999",
    "2147483648", "-1", "0", "1", "2", "0.5", "-0.0", "1e400", "-1e400", "1e308", "inf", "-inf", "nan",
    "true", "false", "2020-01-01", "1979-05-27T07:32:00Z", "07:32:00", "''", "'x'", '"\\u0000"',
    f"'{'x' * 5000}'", "'naïve 😀'", "'a'\nepochs = 3", "none", "None", "x", "[]", "[1, 'a', {b = 2}]",
    "['a', 'a']", "['label']", "{}", "{name = 1}", nested(30), nested(40), nested(3000),
    "{a = " * 600 + "1" + "}" * 600,
    "[2020-01-01]", "[nan]", "'lenet'", "'SGD'", "'StepLR'", "'local_sgd'", "'synchronous'", "'auto'",
    "'in_place'", "'1-2'", "'٣-٤'", "'a:b'", "[[1, 2], [3]]", "", "=", "\x7f", "'", '"""', "\\",
]  # fmt: skip
"""TOML, and what nearly is."""

KEYS = [
    *Config.keys(), "optimizer.lr", "solver.clip_norm", "solver.turns_per_round", "model.hidden",
    "optimizer.arguments", "model.arguments", "schedule.arguments", "solver.arguments", "data.arguments",
    "model.a.b.c", 'model."a.b"', 'model."quote\\""', "model.''", "model.self", 'model."\\u0000"',
    "train.epoch",
    f"model.{'k' * 5000}", f"{'s' * 5000}.key", "trian.epochs", "model.näme", "model.inner.deeper",
    "model" + ".a" * 300, "train.epochs.more",
]  # fmt: skip

keys, values = st.sampled_from(KEYS), st.sampled_from(VALUES)
lines = st.builds("{} = {}".format, keys, values)
heads = st.sampled_from(
    ["[train]", "[[train]]", "[[model.layers]]", "[model.inner]", "[", "[data]", "# text", ""]
)


@given(st.lists(lines | heads, max_size=4).map("\n".join).map(str.encode) | st.binary(max_size=40))
@few
def test_any_file_is_a_configuration_or_refused(content: bytes) -> None:
    checked(lambda: Config.load(File(content)), stored=True)


@given(st.lists(st.builds("{}={}".format, keys, values) | st.text(max_size=12), min_size=1, max_size=3))
@few
def test_any_setting_is_one_of_a_configuration_or_refused(given_settings: list[str]) -> None:
    checked(lambda: Config.load(None, given_settings), stored=True)


def itself() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


odd = st.sampled_from(
    [None, True, 0, 1, -1, 2**63, 2**64, 10**5000, -(10**5000), 0.0, -0.0, 1e308, float("inf"), float("nan"),
     "", "x", "a\0b", "\udcff", "x" * 5000, b"x", 1j, [], (), {}, {1: 2}, {"a": {"\udcff": 1}}, itself(),
     [[1], (2,)], datetime.date(2020, 1, 1), object, threading.Lock(), [float("nan")], [10**5000],
     {"name": 1}, "local_sgd", "lenet"]
)  # fmt: skip
names = st.sampled_from(
    ["name", "arguments", "epochs", "features", "lr", "a b", "a.b", "", "\udcff", "k" * 5000, "barrier",
     "placement", "ports", "seed", "num_shards", "step_timeout_s", "clip_norm", 3, None]
)  # fmt: skip
sections = st.sampled_from(
    ["data", "model", "loss", "optimizer", "schedule", "solver", "engine", "train", "x", 3]
)


@given(odd | st.dictionaries(sections, odd | st.dictionaries(names, odd, max_size=3), max_size=3))
@few
def test_any_dict_is_a_configuration_or_refused(tables: Any) -> None:
    checked(lambda: Config.from_dict(tables), stored=False)


@pytest.mark.parametrize("key", KEYS)
def test_any_value_of_a_key_is_taken_or_refused(key: str) -> None:
    for value in VALUES:
        checked(partial(Config.load, None, [f"{key}={value}"]), stored=True)


@pytest.mark.parametrize(
    ("setting", "phrases"),
    [
        (
            f"train.seed={'9' * 5000}",
            ["--set 'train.seed=999", "whole number of thousands of digits", "64 bits"],
        ),
        (f"train.seed=0x{'f' * 5000}", ["train.seed is a whole number of about 6,021 digits", "64 bits"]),
        ("train.epochs=3000000000", ["train.epochs is 3000000000, but may be 2147483647 at most"]),
        (f"model.maps={nested(3000)}", ["--set 'model.maps=[[[", "too deep", "32 levels"]),
        (f"model.maps={nested(33)}", ["model.maps is [[[[", "of more than 32 levels"]),
        ("optimizer.lr=2020-01-01", ["optimizer.lr is datetime.date(2020, 1, 1)", "write a date in quotes"]),
        (
            "optimizer.arguments=3",
            ["optimizer.arguments is 3", "write each argument as optimizer.name = value"],
        ),
        ("model.arguments={a = 1}", ["model.arguments is {'a': 1}", "as model.name = value"]),
        ("schedule.arguments=x", ["schedule.arguments is 'x'"]),
        ("solver.arguments=x", ["solver.arguments is 'x'"]),
        ("data.arguments=3", ["unknown key data.arguments"]),
        ("model.a.b=1", ["model has a key 'a.b'", "model.name = {inner = 1}"]),
        ("model.lr=1e400", ["--set 'model.lr=1e400' has the number '1e400', but 1.7e308 is the largest"]),
        ("model.lr=nan", ["model.lr is nan", "equals nothing"]),
        ("engine.peer_timeout_s=inf", ["engine.peer_timeout_s is inf, but must be finite"]),
        ("engine.peer_timeout_s=nan", ["engine.peer_timeout_s is nan, but must be finite"]),
        (
            "engine.peer_timeout_s=1e12",
            ["engine.peer_timeout_s is 1000000000000.0, but may be 1000000 at most"],
        ),
        ("engine.peer_timeout_s=true", ["engine.peer_timeout_s is True, but must be a number"]),
        ("engine.barrier=1", ["engine.barrier is 1, but must be true or false"]),
        ('data.label="a\\u0000"', ["data.label is 'a\\x00'", "NUL"]),
        ("data.label=\udcff", ["data.label is '\\udcff'", "Unicode"]),
        (f"data.label={'x' * 5000}", ["a text of 5,000 characters, but may have 4,096 at most"]),
        ("train.epochs=1\nseed = 5", ["has more than one value: pass --set for each key"]),
    ],
    ids=lambda value: (
        value[:24].encode("ascii", "backslashreplace").decode() if isinstance(value, str) else None
    ),
)
def test_what_no_run_could_use_or_write_down_is_refused(setting: str, phrases: list[str]) -> None:
    refused = checked(lambda: Config.load(None, [setting]), stored=True)
    assert refused is not None
    for phrase in phrases:
        assert phrase in refused
