"""README tells the truth: its table of keys is the configuration's, its example runs, its links exist."""

from __future__ import annotations

import ast
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from sparksgd.config import Config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def documented() -> dict[str, str]:
    """Return {section.key: the docstring under its field}."""
    tree = ast.parse((ROOT / "sparksgd" / "config.py").read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    found = {}
    for section in classes["Config"].body:
        if isinstance(section, ast.AnnAssign):
            body = classes[section.annotation.id].body
            for field, text in pairwise(body):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    found[f"{section.target.id}.{field.target.id}"] = " ".join(text.value.value.split())
    return found


def table_of_keys() -> str:
    """Return the table as README must hold it."""
    texts = documented()
    lines = ["| key | default | of the | what |", "|---|---|---|---|"]
    for key, (scope, default) in Config.keys().items():
        shown = "" if default is None else default
        shown = ", ".join(shown) if isinstance(shown, tuple) else shown
        lines.append(f"| `{key}` | {shown} | {scope} | {texts[key].replace('|', '/')} |")
    return "\n".join(lines)


def test_the_table_of_keys_is_the_configurations():
    assert table_of_keys() in README


def test_every_link_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_every_job_that_readme_submits_is_there_and_takes_these_arguments():
    lines = [line for line in README.splitlines() if re.search(r"jobs/\w+\.py --", line)]
    assert len(lines) >= 4
    for line in lines:
        words = shlex.split(line)
        job = next(word for word in words if word.startswith("jobs/"))
        source = (ROOT / job).read_text(encoding="utf-8")
        for option in (word for word in words[words.index(job) :] if word.startswith("--")):
            assert f'"{option}"' in source, (job, option)


@pytest.mark.usefixtures("readme_session")
def test_the_example_runs(readme_session):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {"spark": readme_session}
    exec(compile(example, "README.md", "exec"), names)
    assert names["training"].evaluations[-1].accuracy > 0.6


@pytest.fixture
def readme_session():
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

    if SparkContext._active_spark_context is not None:
        SparkContext._active_spark_context.stop()
    session = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
    yield session
    session.stop()
