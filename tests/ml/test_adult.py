"""The first example of the README of sparksgd.ml, as a person runs it: train, save, load elsewhere, score."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.soak, pytest.mark.jvm]

BY_RANKS = """
rows = scored.select("label", "probability").toPandas()
scores, is_one = np.array([p[1] for p in rows.probability]), rows.label.to_numpy() == 1
order = np.unique(scores, return_inverse=True)[1]
counts = np.bincount(order)
ranks = (np.cumsum(counts) - (counts - 1) / 2)[order]  # of equal scores, the mean
ones, others = is_one.sum(), (~is_one).sum()
print("by ranks", (ranks[is_one].sum() - ones * (ones + 1) / 2) / (ones * others))
"""


def blocks(language: str) -> list[str]:
    """Return the code of the README's first section."""
    first = (ROOT / "sparksgd" / "ml" / "README.md").read_text().partition("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", first, re.DOTALL)


def run(folder: Path, code: str) -> str:
    """Run a program in a folder; return what it said."""
    (folder / "program.py").write_text(code)
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{folder}", "SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def number(said: str, name: str) -> float:
    found = re.search(rf"{name} (\d\.\d+)", said)
    assert found, said
    return float(found[1])


def test_adult_is_trained_saved_loaded_in_another_process_and_scored(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for line in blocks("sh")[0].splitlines():
        subprocess.run(line, shell=True, check=True, cwd=tmp_path, env=os.environ | {"PATH": path})
    module, training, scoring = blocks("python")
    (tmp_path / "mymodels.py").write_text(module)
    scored = "import numpy as np\n" + scoring + BY_RANKS
    said = run(tmp_path, training + scored.replace('PipelineModel.load("models/adult")', "model"))
    assert "test_loss" in said  # the history
    at_once, by_ranks = number(said, "AUC"), number(said, "by ranks")
    assert at_once > 0.9
    assert np.isclose(at_once, by_ranks, rtol=1e-12)
    again = number(run(tmp_path, scored), "AUC")
    assert np.isclose(again, at_once, rtol=1e-12)  # Spark adds its parts in any order
