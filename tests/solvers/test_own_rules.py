"""A rule of the user's own, by its import path: trained, repeated, compared, and trusted only by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from resumed_jobs import without_digests
from virtual_trainings import trained, written

import sparksgd
from sparksgd.config import Config
from sparksgd.errors import ConfigError, DataError
from sparksgd.solvers.rules import completed

FADING = {"name": "own_rules:Fading", "decay": 0.5}
README = Path(__file__).parents[2] / "sparksgd" / "solvers" / "README.md"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("own"))


def test_it_trains_and_is_repeated_to_the_same_bits(rows: str, tmp_path: Path) -> None:
    run, reports = trained(rows, FADING, {"spread": 0.5}, out=tmp_path / "run")
    assert max(report.staleness[0] for report in reports) >= 3
    without_digests(tmp_path / "run")
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["config"]["solver"] == FADING
    replay = sparksgd.read_replay(tmp_path / "run", trust=["own_rules"])
    again, _ = trained(rows, FADING, engine={"name": "inline"}, replay=replay)
    assert again.flat.parameters_sha256() == run.flat.parameters_sha256()


def test_with_no_fading_it_is_asynchronous_sgd(rows: str) -> None:
    own, _ = trained(rows, FADING | {"decay": 1.0}, {"spread": 0.5})
    plain, _ = trained(rows, {"name": "async_sgd"}, {"spread": 0.5})
    assert own.flat.parameters_sha256() == plain.flat.parameters_sha256()


def test_a_run_that_names_it_is_read_only_where_it_is_trusted(rows: str, tmp_path: Path) -> None:
    trained(rows, FADING, {"spread": 0.5}, out=tmp_path / "run")
    with pytest.raises(DataError, match=r"solver\.name.*own_rules"):
        sparksgd.read_replay(tmp_path / "run")
    without_digests(tmp_path / "run")
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    about["config"]["solver"]["name"] = "antigravity:geohash"  # importing it would open a browser
    (tmp_path / "run" / "run.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match=r"antigravity"):
        sparksgd.read_replay(tmp_path / "run")


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        ({"name": "own_rules:Missing"}, "own_rules has no 'Missing'"),
        ({"name": "own_rules:NoRule"}, "which is no rule: derive a class from GradientCentre"),
        ({"name": "own_rule:Fading"}, "Python finds no module 'own_rule'"),
        ({"name": "own_rules:Fading", "decays": 1.0}, "did you mean decay?"),
        ({"name": "own_rules:Fading", "decay": "slow"}, "solver.decay is 'slow', but must be a number"),
    ],
)
def test_what_is_no_rule_is_refused(solver: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        completed(Config.from_dict({"solver": solver}))
    assert words in str(refused.value)


def test_the_readme_shows_this_rule() -> None:
    source = (Path(__file__).parents[1] / "modules" / "own_rules.py").read_text(encoding="utf-8")
    shown = README.read_text(encoding="utf-8").split("```python\n")[-1].split("```")[0]
    body = [line.strip() for line in shown.splitlines() if line.strip()]
    written_there = {line.split("  #")[0].strip() for line in source.splitlines()}
    assert len(body) >= 10
    assert [line for line in body if line not in written_there] == []
