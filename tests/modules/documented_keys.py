"""The docstrings under the fields of dataclasses."""

from __future__ import annotations

import ast
import inspect
import textwrap
from itertools import pairwise

__all__ = ["documented"]


def documented(kind: type) -> dict[str, str]:
    """Return {field: the docstring under it} of a dataclass and of those that it is derived from."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        found |= {
            field.target.id: " ".join(text.value.value.split())
            for field, text in pairwise(node.body)
            if isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        }
    return found
