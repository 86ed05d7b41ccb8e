"""Models that were trained in a classic session predict in a session of Spark Connect, to the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import on_connect  # tests/modules
import pytest
import torch
from pyspark.ml import Pipeline
from pyspark.ml.feature import VectorAssembler
from torch import nn

import sparksgd
from sparksgd.ml import TorchClassifier

pytest.importorskip("grpc", reason="`make soak` installs it, or pip install sparksgd[connect]")
pytestmark = [pytest.mark.session("local[2]"), pytest.mark.soak]

BRIEF = {"maxEpochs": 1, "batchSize": 100, "numShards": 2, "learningRate": 0.01, "engine": "tree"}


def test_models_of_a_classic_session_predict_on_connect_to_the_same_bits(spark, tmp_path):
    source = np.random.default_rng(0).normal(size=(300, 2))
    people = spark.createDataFrame(
        [(number, float(a), float(b), float(a > b)) for number, (a, b) in enumerate(source)],
        "number long, a double, b double, label double",
    )
    rows = VectorAssembler(inputCols=["a", "b"], outputCol="features").transform(people)
    rows.write.parquet(str(tmp_path / "rows"))
    people.write.parquet(str(tmp_path / "people"))
    rows = spark.read.parquet(str(tmp_path / "rows"))
    torch.manual_seed(1)
    model = TorchClassifier(module=nn.Linear(2, 2), **BRIEF).fit(rows)
    model.save(str(tmp_path / "model"))
    of_others = TorchClassifier(module="predicted_modules:mlp", **BRIEF).fit(rows)
    of_others.save(str(tmp_path / "of others"))
    stages = [
        VectorAssembler(inputCols=["a", "b"], outputCol="features"),
        TorchClassifier(module=nn.Linear(2, 2), **BRIEF),
    ]
    pipeline = Pipeline(stages=stages).fit(people)
    pipeline.write().save(str(tmp_path / "pipeline"))
    expected = on_connect.values(model.transform(rows))
    answers = of_another_process(tmp_path)
    assert answers["transform"] == answers["of a run"] == answers["predict"] == expected
    assert answers["pipeline"] == on_connect.values(pipeline.transform(people))
    for doing in ("fit", "save"):
        assert answers[doing].startswith("ClusterError: this session is Spark Connect, which has no RDDs")
    assert "cannot read" in answers["missing"]
    assert answers["other class"].startswith("DataError: ")
    assert "is not trusted" in answers["not trusted"]


def of_another_process(folder: Path) -> dict:
    """Return what a process says that has a server of Spark Connect."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    environment |= {"SPARK_TESTING": "1"}  # the server takes any port
    path = [str(Path(sparksgd.__file__).parents[1]), environment.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, on_connect.__file__, str(folder)],
        env=environment | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        key: value
        for line in done.stdout.splitlines()
        if line.startswith("{")
        for key, value in json.loads(line).items()
    }
