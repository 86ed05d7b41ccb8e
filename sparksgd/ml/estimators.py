"""Estimators of Spark ML: they train a torch module on a DataFrame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pyspark.ml.classification import ProbabilisticClassifier
from pyspark.ml.regression import Regressor
from pyspark.ml.util import MLReadable, MLWritable
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from sparksgd.arithmetic.copies import copied
from sparksgd.config.tables import MOST
from sparksgd.errors import ConfigError, DataError
from sparksgd.imports import did_you_mean, shown
from sparksgd.ml.factories import Asked
from sparksgd.ml.models import TorchClassificationModel, TorchModel, TorchRegressionModel
from sparksgd.ml.params import TrainingParams
from sparksgd.ml.saving import EstimatorReader, EstimatorWriter
from sparksgd.runs.model import SavedModel, model_of
from sparksgd.spark.cluster.cluster import refuse_connect
from sparksgd.spark.frame_rows import quoted
from sparksgd.spark.library import train

__all__ = ["TorchClassifier", "TorchRegressor"]

_DEFAULTS = {
    "optimizer": "AdamW",
    "learningRate": 1e-3,
    "maxEpochs": 10,
    "engine": "auto",
    "batchSize": 128,
    "seed": 0,
    "handleInvalid": "error",
    "outputFormat": "vector",
    "predictBatchSize": 512,
}
"""Four differ from a configuration's (SGD, no rate, 1 epoch, tree): they suit most tables and modules, and
the engine changes no bit."""


class _TorchEstimator(TrainingParams, MLWritable, MLReadable[Any]):
    """What our Estimators share."""

    _losses: tuple[str, ...] = ()
    """The losses that it takes; empty: any."""

    def __init__(self, **params: Any) -> None:
        super().__init__()
        self._setDefault(**_DEFAULTS, loss=self._loss_by_default())
        self.setParams(**params)

    def _loss_by_default(self) -> str:
        raise NotImplementedError

    def _model(self, saved: SavedModel) -> TorchModel:
        raise NotImplementedError

    def _fit(self, dataset: DataFrame) -> Any:
        """Train; `fit` is Spark ML's own, and calls this."""
        refuse_connect(dataset.sparkSession)
        loss = self.getOrDefault("loss")
        if self._losses and loss not in self._losses:
            raise ConfigError(
                f"loss is {shown(loss)}, but {type(self).__name__} trains with {' or '.join(self._losses)}"
                f"{did_you_mean(loss, self._losses)}; any other loss can be trained by sparksgd.train"
            )
        if not self.isDefined("module"):
            raise ConfigError(f"{type(self).__name__} has no module: pass module=, what it trains")
        asked = Asked(self.getOrDefault("module"))
        features, label = self._columns()
        skips = self._checked_choice("handleInvalid", ("error", "skip", "keep")) == "skip"
        self._checked_choice("outputFormat", ("vector", "array"))
        tables: dict[str, Mapping[str, Any]] = {"data": {"features": features, "label": label}}
        if skips:
            tables["data"] = {**tables["data"], "on_bad_row": "skip", "max_bad_rows": MOST}
        sizes = {name: _SIZES[name](dataset, features, label) for name in asked.sizes()}
        if asked.name is not None:
            tables["model"] = {"name": asked.name, **sizes}
        config = self._configured(tables)
        given = asked.module({**config.model.arguments, **sizes}, config.train.seed)
        checkpoints = self.getOrDefault("checkpointDir") if self.isDefined("checkpointDir") else None
        training = train(config, dataset, module=given, checkpoint_dir=checkpoints)
        trained = model_of(training)
        model = self._model(_apart(trained))
        model._resetUid(self.uid)
        return self._copyValues(model)

    def _columns(self) -> tuple[list[str], str]:
        """Return the columns of features, and that of labels."""
        features = [self.getOrDefault("featuresCol")]
        if self.isSet("featuresCols"):
            if self.isSet("featuresCol"):
                raise ConfigError("featuresCol and featuresCols are set: set one of them")
            features = self.getOrDefault("featuresCols")
        return features, self.getOrDefault("labelCol")

    def write(self) -> EstimatorWriter:
        """Return what writes the Params; a module must be given by what other processes can import."""
        return EstimatorWriter(self)

    @classmethod
    def read(cls) -> EstimatorReader:
        """Return what reads an Estimator that was saved."""
        return EstimatorReader(cls)


class TorchClassifier(_TorchEstimator, ProbabilisticClassifier):
    """Trains a torch module that gives logits of classes.

    Args:
        params: Params by their names; see `explainParams()`. `module` must be given. The most used:
            featuresCol: one column of features, a vector or an array of numbers; its default is "features".
            featuresCols: several columns instead, arguments of forward by their names.
            labelCol: whole numbers from 0, also as doubles, as StringIndexer gives them.
            loss: cross_entropy for C logits (the default), binary_cross_entropy for one.
            optimizer, learningRate, maxEpochs, batchSize: by default AdamW, 0.001, 10 and 128.

    Raises:
        ConfigError: there is no Param of such a name.

    Example:

        classifier = TorchClassifier(module=nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2)))
        scored = classifier.fit(train).transform(test)
    """

    _losses = ("cross_entropy", "binary_cross_entropy")

    def _loss_by_default(self) -> str:
        return "cross_entropy"

    def _model(self, saved: SavedModel) -> TorchModel:
        return TorchClassificationModel(saved)


class TorchRegressor(_TorchEstimator, Regressor[Any]):
    """Trains a torch module that gives one number for each row.

    Args:
        params: Params by their names, as those of `TorchClassifier`; the default of loss is squared_error.

    Raises:
        ConfigError: there is no Param of such a name.
    """

    def _loss_by_default(self) -> str:
        return "squared_error"

    def _model(self, saved: SavedModel) -> TorchModel:
        return TorchRegressionModel(saved)


def _apart(trained: SavedModel) -> SavedModel:
    """Return a trained model whose module is in evaluation mode, and has memory of its own.

    Its parameters are views of one vector, which each of them would be pickled with.
    """
    module = copied(trained.module)
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return replace(trained, module=module.eval())


def _num_features(dataset: DataFrame, features: list[str], label: str) -> int:
    """Return how many numbers the features of a row are."""
    row = dataset.select(*map(quoted, features)).dropna().first()
    if row is None:
        raise DataError(f"there is no row without a null in {', '.join(features)}: num_features is not known")
    return sum(len(value) if hasattr(value, "__len__") else 1 for value in row)


def _num_classes(dataset: DataFrame, features: list[str], label: str) -> int:
    """Return how many classes there are: as the column's metadata say, or by its greatest label."""
    told = dataset.schema[label].metadata.get("ml_attr", {})
    if "vals" in told or "num_vals" in told:
        return len(told["vals"]) if "vals" in told else int(told["num_vals"])
    row = dataset.agg(F.max(quoted(label))).first()
    if row is None or row[0] is None:
        raise DataError(f"there is no label in {label!r}: num_classes is not known")
    return int(row[0]) + 1


_SIZES = {"num_features": _num_features, "num_classes": _num_classes}
