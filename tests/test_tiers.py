"""The tests keep their own rules: README.md in this folder has them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = [
    file for file in sorted(HERE.rglob("test_*.py")) if file != Path(__file__) and "bench" not in file.parts
]
MAKEFILE = (HERE.parent / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("pattern", "instead"),
    [
        (r"\bperf_counter\b", "show that nobody waits by an endless wait"),
        (r"\bTimer\b", "strike when the run is held: `striking`, or a Hold"),
        (r"\bfrom conftest\b", "import from a module beside it: spark_helpers"),
    ],
)
def test_no_test_does_what_races_or_hides(pattern, instead):
    found = [
        str(file.relative_to(HERE)) for file in FILES if re.search(pattern, file.read_text(encoding="utf-8"))
    ]
    assert found == [], instead


def test_every_tier_of_the_readme_is_a_target():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"`make ([\w-]+)", readme))
    assert targets >= {"test-quick", "test", "soak", "test-cluster", "test-spark35", "test-all"}
    assert targets <= set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
