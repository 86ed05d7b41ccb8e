"""Other code of a class or a function that was given in Python has another digest."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sparksgd.imports.given_code import given_code_digest

NOTEBOOK = """
import torch
SCALE = 2.0

def helper(x):
    return x * SCALE

def make(rate):
    def within(x):
        return x * rate if x in {"a", "b"} else x
    return within

class Base(torch.nn.Module):
    rows = (1, 2)
    @property
    def width(self):
        return 3

class Net(Base):
    def forward(self, x):
        return torch.relu(helper(x))
"""


def notebook(text: str) -> Any:
    """Return the names of a place without a source, as a notebook is."""
    place = ModuleType("__main__")
    exec(compile(text, "<a cell>", "exec"), vars(place))
    return place


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("torch.relu", "torch.tanh"), ("SCALE = 2.0", "SCALE = 3.0"), ("x * SCALE", "x + SCALE"),
        ("return 3", "return 4"), ("(1, 2)", "(1, 3)"),
    ],
)  # fmt: skip
def test_what_a_notebook_has_changed_is_noticed_also_in_what_a_class_names(before: str, after: str) -> None:
    first, again = notebook(NOTEBOOK), notebook("\n\n" + NOTEBOOK)
    other = notebook(NOTEBOOK.replace(before, after))
    assert given_code_digest([first.Net]) == given_code_digest([again.Net])
    assert given_code_digest([first.Net]) != given_code_digest([other.Net])


def test_functions_count_with_what_they_enclose() -> None:
    place, other = notebook(NOTEBOOK), notebook(NOTEBOOK.replace('"b"', '"c"'))
    digests = {given_code_digest([each]) for each in (place.make(1), place.make(2), other.make(1))}
    assert len(digests) == 3
    assert given_code_digest([place.make(1)]) == given_code_digest([notebook(NOTEBOOK).make(1)])


def test_of_a_file_its_source_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    digests = set()
    for text in (NOTEBOOK, NOTEBOOK.replace("relu", "tanh")):
        (tmp_path / "given_nets.py").write_text(text)
        sys.modules.pop("given_nets", None)
        digests.add(given_code_digest([__import__("given_nets").Net, torch.nn.Linear]))
    assert len(digests) == 2
    assert None not in digests


def test_what_is_not_the_users_has_none() -> None:
    assert given_code_digest([torch.nn.Linear, torch.nn.functional.mse_loss, dict]) is None
