"""A session of Spark Connect is refused wherever it cannot do what is needed, with what to do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from pyspark.sql import SparkSession
from torch import nn

from sparksgd.data.schema import Feature, RowSchema
from sparksgd.errors import ClusterError
from sparksgd.ml import TorchClassifier, TorchEstimator, TorchModel
from sparksgd.runs.model import SavedModel

SAYS = "this session is Spark Connect, which has no RDDs.*use dedicated compute.*without --remote"


class ConnectSession:
    """Stands for a session of Spark Connect, whose own class wants grpc."""


ConnectSession.__module__ = "pyspark.sql.connect.session"


@pytest.fixture
def frame(monkeypatch):
    session = ConnectSession()
    monkeypatch.setattr(SparkSession, "active", classmethod(lambda cls: session))
    return SimpleNamespace(sparkSession=session, columns=["features", "label"])


def test_fits_are_refused(frame):
    classifier = TorchClassifier(module=nn.Linear(2, 2))
    for fit in (
        lambda: classifier.fit(frame),
        lambda: classifier.fit(frame, {classifier.maxEpochs: 1}),
        lambda: classifier.fit(frame, [{classifier.maxEpochs: 1}]),
        lambda: TorchEstimator(module=nn.Linear(2, 2), loss="squared_error").fit(frame),
    ):
        with pytest.raises(ClusterError, match=SAYS):
            fit()


def test_what_is_saved_there_is_refused(frame, tmp_path):
    schema = RowSchema(
        features=(Feature(name="features", dtype="float32", length=2),), label="label", label_dtype="int64"
    )
    model = TorchModel(SavedModel(module=nn.Linear(2, 2), schema=schema, loss=None, kind=None))
    for use in (
        lambda: model.save(str(tmp_path / "model")),
        lambda: TorchClassifier(module="lenet").save(str(tmp_path / "estimator")),
        lambda: TorchClassifier.load(str(tmp_path / "estimator")),
    ):
        with pytest.raises(ClusterError, match=SAYS):
            use()
