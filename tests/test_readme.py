"""The READMEs tell the truth: tables are the code's, links and commands lead somewhere, the example runs."""

from __future__ import annotations

import ast
import dataclasses
import re
import runpy
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from documented_keys import documented

from sparksgd import config
from sparksgd.config import Config
from sparksgd.engines.kinds import KINDS
from sparksgd.runs import names
from sparksgd.solvers.protocol import Need
from sparksgd.solvers.rules import RULES, settings_of, settings_type

ROOT = Path(__file__).parent.parent
FOLDERS = ("jobs", "conf", "sparksgd", "tests")
READMES = [
    ROOT / "README.md",
    *sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("README.md")),
]
IDS = [file.relative_to(ROOT).as_posix() for file in READMES]
MOST_LINES = 160


def text_of(name: str) -> str:
    """Return a README's text."""
    return (ROOT / name).read_text(encoding="utf-8")


def shown(default: Any) -> str:
    """Return a default as a table shows it."""
    if default is None:
        return ""
    text = ", ".join(default) if isinstance(default, tuple) else str(default)
    return f"`{text.lower() if isinstance(default, bool) else text}`"


def choices(kind: type, name: str) -> str:
    """Return the values that a key may have, if they are some words; none where the text has them all."""
    hint = get_type_hints(kind)[name]
    words = [
        word
        for option in (hint, *get_args(hint))
        if get_origin(option) is Literal
        for word in get_args(option)
    ]
    told = documented(kind)[name]
    return f" One of: {', '.join(words)}." if any(word not in told for word in words) else ""


def table_of_keys() -> str:
    """Return the table of the keys that every configuration has."""
    lines = ["| key | default | experiment | what |", "|---|---|---|---|"]
    for key, (scope, default) in Config.keys().items():
        section, name = key.split(".")
        kind = getattr(config, f"{section.title().replace('_', '')}Config")
        text = documented(kind)[name].replace("|", "/") + choices(kind, name)
        lines.append(f"| `{key}` | {shown(default)} | {'yes' if scope == 'experiment' else 'no'} | {text} |")
    return "\n".join(lines)


def table_of_rule(name: str) -> str:
    """Return the table of the keys of one rule."""
    kind = settings_type(name)
    texts = documented(kind)
    lines = [f'### solver.name = "{name}"', "", "| key | default | what |", "|---|---|---|"]
    for field in dataclasses.fields(kind):
        text = texts[field.name].replace("|", "/") + choices(kind, field.name)
        lines.append(f"| `solver.{field.name}` | {shown(field.default)} | {text} |")
    return "\n".join(lines)


def table_of_engines() -> str:
    """Return the table of what each engine carries."""
    heads = [f"`{kind.name}`, {kind.mode}" for kind in KINDS]
    lines = [f"| a solver may need | {' | '.join(heads)} |", "|---" * (len(KINDS) + 1) + "|"]
    for need in Need:
        carried = ["yes" if need in kind.carries else "" for kind in KINDS]
        lines.append(f"| `{need.name}`: {need.value} | {' | '.join(carried)} |")
    return "\n".join(lines)


def anchors(text: str) -> set[str]:
    """Return the anchors of a README's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def submissions() -> Iterator[str]:
    """Yield every command line of a README that runs a job."""
    for file in READMES:
        for line in file.read_text(encoding="utf-8").splitlines():
            if re.match(r"(spark-submit|python) .*jobs/\w+\.py", line):
                yield line


def test_the_front_page_is_short():
    assert len(text_of("README.md").splitlines()) <= MOST_LINES


def test_the_table_of_keys_is_the_configurations():
    assert table_of_keys() in text_of("conf/README.md"), f"it must be\n\n{table_of_keys()}"


@pytest.mark.parametrize("name", RULES)
def test_the_table_of_a_rules_keys_is_the_rules(name):
    assert table_of_rule(name) in text_of("conf/README.md"), f"it must be\n\n{table_of_rule(name)}"


def test_the_table_of_engines_is_what_they_carry():
    text = text_of("sparksgd/solvers/README.md")
    assert table_of_engines() in text, f"it must be\n\n{table_of_engines()}"


def test_the_rooms_are_drawn_in_the_order_of_imports():
    tree = ast.parse((ROOT / "tests" / "test_rooms.py").read_text(encoding="utf-8"))
    (rooms,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ROOMS"
    )
    table = re.findall(r"^\| `([\w.]+)` \|", text_of("sparksgd/README.md"), re.MULTILINE)
    assert table == [room for room in rooms if room]


def test_every_file_of_a_runs_folder_is_named():
    text = text_of("README.md")
    files = {value for name, value in vars(names).items() if name in names.__all__ and name != "RUN_BEFORE"}
    missing = {file for file in files if f"`{file}`" not in text and f"`model/{file}`" not in text}
    assert not missing


@pytest.mark.parametrize("file", READMES, ids=IDS)
def test_every_link_leads_somewhere(file):
    for link in re.findall(r"\]\(([^)]+)\)", file.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_job_that_a_readme_runs_is_there_and_takes_these_arguments():
    lines = list(submissions())
    assert len(lines) >= 10
    keys = set(Config.keys()) | {
        f"solver.{field.name}" for name in RULES for field in dataclasses.fields(settings_type(name))
    }
    for line in lines:
        words = shlex.split(line)
        job = next(word for word in words if word.startswith("jobs/"))
        options = runpy.run_path(str(ROOT / job))["parser"]().format_help()
        for option, value in pairwise([*words[words.index(job) :], ""]):
            if option.startswith("--"):
                assert f"{option} " in options, (job, option)
            key = value.partition("=")[0]
            if option == "--set" and not key.startswith(("model.", "optimizer.", "schedule.")):
                assert key in keys, key


def test_every_configuration_that_a_readme_shows_is_valid():
    for file in READMES:
        for text in re.findall(r"```toml\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL):
            read = Config.load(_Text(text))
            settings_of(read.solver).check(read)


class _Text:
    """A configuration's text, as a file."""

    def __init__(self, text: str) -> None:
        self._text = text

    def read_bytes(self, most_bytes: int | None = None, /) -> bytes:
        return self._text.encode()


@pytest.mark.session("local[2]")
def test_the_example_runs(spark):
    (example,) = re.findall(r"```python\n(.*?)```", text_of("README.md"), re.DOTALL)
    found = {"spark": spark}
    exec(compile(example, "README.md", "exec"), found)
    assert found["training"].evaluations[-1].accuracy > 0.6
