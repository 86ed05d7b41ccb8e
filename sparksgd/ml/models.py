"""Models of Spark ML: trained torch modules that add their predictions to a DataFrame."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pyspark.ml.classification import ProbabilisticClassificationModel
from pyspark.ml.linalg import DenseVector, Vector, Vectors
from pyspark.ml.regression import RegressionModel
from pyspark.ml.util import MLReadable, MLWritable
from pyspark.sql import DataFrame
from torch import nn

from sparksgd.arithmetic.numerics import thread_count
from sparksgd.data.schema import RowSchema
from sparksgd.engines.forward import EVALUATION_ROWS, output_of
from sparksgd.errors import ConfigError, DataError
from sparksgd.ml.params import PredictionParams
from sparksgd.ml.saving import ModelReader, ModelWriter
from sparksgd.runs.model import SavedModel
from sparksgd.spark.prediction import BAD_ROWS, Outputs, kind_of, with_predictions
from sparksgd.spark.tasks.predict_tasks import OutputKind, outputs

__all__ = ["TorchClassificationModel", "TorchModel", "TorchRegressionModel"]


class TorchModel(PredictionParams, MLWritable, MLReadable[Any]):
    """What our Models share.

    Args:
        saved: the trained module, and what is needed to use it; None: a reader gives it.
    """

    def __init__(self, saved: SavedModel | None = None) -> None:
        super().__init__()
        self._saved = saved
        self._setDefault(handleInvalid="error", outputFormat="vector", predictBatchSize=EVALUATION_ROWS)

    @property
    def saved(self) -> SavedModel:
        """The trained module, the schema of a row, and the loss, as `load_model` returns them."""
        if self._saved is None:
            raise ConfigError(f"{type(self).__name__} has no module: fit or load one")
        return self._saved

    @property
    def module(self) -> nn.Module:
        """The trained module, in evaluation mode."""
        return self.saved.module

    @property
    def numFeatures(self) -> int:  # noqa: N802  # pyspark.ml's name
        """How many numbers the features of a row are."""
        return sum(1 if feature.length is None else feature.length for feature in self._schema().features)

    def write(self) -> ModelWriter:
        """Return what writes the Model: its Params, and the module as `load_model` reads it."""
        return ModelWriter(self)

    @classmethod
    def read(cls) -> ModelReader:
        """Return what reads a Model that was saved, or the folder model/ of a run."""
        return ModelReader(cls)

    @classmethod
    def load(cls, path: str, **how: Any) -> Any:
        """Load a Model.

        Args:
            path: where it was saved, or the folder model/ of a run.
            how: module=, trust= and strict=, as `sparksgd.load_model` takes them.

        Raises:
            DataError: it is damaged, or names code that is not trusted.
        """
        return cls.read().how(**how).load(path)

    def _transform(self, dataset: DataFrame) -> DataFrame:
        """Add the columns; `transform` is Spark ML's own, and calls this."""
        return with_predictions(
            dataset,
            replace(self.saved, schema=self._schema()),
            Outputs(
                kind=self._kind(),
                names={what: name for what, name in self._names().items() if name},
                as_vectors=self._checked_choice("outputFormat", ("vector", "array")) == "vector",
                thresholds=self._thresholds(),
            ),
            on_bad_row=self._checked_choice("handleInvalid", BAD_ROWS),
            rows_per_forward=self.getOrDefault("predictBatchSize"),
            advice='mend the data, or set handleInvalid to "skip" or "keep"',
        )

    def _schema(self) -> RowSchema:
        """Return what a row must be, by the column that is set now."""
        schema = self.saved.schema
        if len(schema.features) == 1 and not self.isSet("featuresCols"):
            return replace(
                schema, features=(replace(schema.features[0], name=self.getOrDefault("featuresCol")),)
            )
        return schema

    def _kind(self) -> OutputKind:
        raise NotImplementedError

    def _names(self) -> dict[str, str]:
        return {"prediction": self.getOrDefault("predictionCol")}

    def _thresholds(self) -> tuple[float, ...] | None:
        return None

    def _outputs(self, value: Any) -> dict[str, npt.NDArray[Any]]:
        """Return what `outputs` gives for one row, its features in a vector."""
        schema = self._schema()
        if len(schema.features) != 1:
            raise DataError("a row of several columns is predicted by transform")
        numbers = value.toArray() if isinstance(value, Vector) else np.asarray(value)
        records = np.zeros(1, schema.record)
        feature = schema.features[0]
        if numbers.shape != feature.shape:
            raise DataError(f"the row has {numbers.shape} numbers, but must have {feature.shape}")
        records[feature.field][0] = numbers
        with torch.no_grad(), thread_count(1):
            return outputs(self._kind(), output_of(self.module, schema, records), 1, self._thresholds())


class TorchClassificationModel(TorchModel, ProbabilisticClassificationModel):
    """A trained module that gives logits of classes.

    `transform` adds rawPredictionCol (logarithms of probabilities; (-z, z) for one logit z), probabilityCol
    and predictionCol (a double); a column that is set to "" is left out.
    """

    @property
    def numClasses(self) -> int:  # noqa: N802  # pyspark.ml's name
        """How many classes there are."""
        return self.saved.schema.classes or 0

    def predict(self, value: Any) -> float:
        """Return the class of one row, its features in a vector."""
        return float(self._outputs(value)["prediction"][0])

    def predictRaw(self, value: Any) -> DenseVector:  # noqa: N802  # pyspark.ml's name
        """Return the logarithms of the probabilities of one row."""
        return Vectors.dense(self._outputs(value)["raw"][0])

    def predictProbability(self, value: Any) -> DenseVector:  # noqa: N802  # pyspark.ml's name
        """Return the probabilities of one row."""
        return Vectors.dense(self._outputs(value)["probability"][0])

    def _kind(self) -> OutputKind:
        kind = kind_of(self.saved)
        if kind not in ("classes", "binary"):
            raise ConfigError(
                f"the module was trained with {self.saved.about.get('loss', 'another loss')}, not as a "
                f"classifier: load it as TorchRegressionModel, or use sparksgd.predict"
            )
        return kind

    def _names(self) -> dict[str, str]:
        raw, probability = self.getOrDefault("rawPredictionCol"), self.getOrDefault("probabilityCol")
        return {"raw": raw, "probability": probability, **super()._names()}

    def _thresholds(self) -> tuple[float, ...] | None:
        return tuple(self.getOrDefault("thresholds")) if self.isDefined("thresholds") else None


class TorchRegressionModel(TorchModel, RegressionModel[Any]):
    """A trained module that gives one number for each row; `transform` adds it as predictionCol, a double."""

    def predict(self, value: Any) -> float:
        """Return the number of one row, its features in a vector."""
        return float(self._outputs(value)["prediction"][0])

    def _kind(self) -> OutputKind:
        return "number"
