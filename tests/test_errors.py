"""The exception tree is the one that errors.py draws, and every error survives a pickle."""

from __future__ import annotations

import pickle
import re

import pytest

from sparksgd import errors
from sparksgd.errors import SparkSGDError


def drawn_tree() -> dict[str, tuple[str | None, int]]:
    """Return {class: (parent, exit code)} as the docstring of errors.py draws it."""
    tree: dict[str, tuple[str | None, int]] = {}
    path: list[tuple[int, str]] = []  # (indentation, class) from the root to the line above
    for line in (errors.__doc__ or "").splitlines():
        match = re.fullmatch(r"( {4}[│├└─ ]*)([A-Z]\w+)( .*)?", line)
        if match is None:
            continue
        indentation, name, rest = len(match[1]), match[2], match[3] or ""
        path = [(i, parent) for i, parent in path if i < indentation]
        parent = path[-1][1] if path else None
        code = re.search(r"exit (\d+)", rest)
        inherited = tree[parent][1] if parent else SparkSGDError.exit_code
        tree[name] = parent, int(code[1]) if code else inherited
        path.append((indentation, name))
    return tree


def test_the_tree_that_is_drawn_is_the_real_one() -> None:
    real = {
        name: (None if kind is SparkSGDError else kind.__base__.__name__, kind.exit_code)
        for name in errors.__all__
        for kind in [getattr(errors, name)]
    }
    assert drawn_tree() == real


def test_no_error_is_missing_from_the_module_s_list() -> None:
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert set(errors.__all__) == defined


@pytest.mark.parametrize("name", errors.__all__)
def test_an_error_keeps_its_message_and_exit_code_through_a_pickle(name: str) -> None:
    error = getattr(errors, name)("rows is 0, but must be at least 1")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == "rows is 0, but must be at least 1"
    assert back.exit_code == error.exit_code


def test_users_mistakes_and_the_cluster_s_faults_leave_by_different_exits() -> None:
    codes = {name: getattr(errors, name).exit_code for name in errors.__all__}
    assert codes == {
        "SparkSGDError": 3,
        "ConfigError": 2,
        "DataError": 2,
        "BadRows": 2,
        "ShardChanged": 2,
        "ModelError": 2,
        "GradientChanged": 2,
        "TrainingError": 3,
        "NotFinite": 3,
        "UpdateNotFinite": 3,
        "UserCodeError": 3,
        "ClusterError": 4,
        "NotEnoughSlots": 4,
        "OutOfMemory": 4,
        "PeerLost": 4,
        "PeerSilent": 4,
        "ReplayDiffers": 3,
        "ShardMissing": 4,
        "Cancelled": 130,
    }
