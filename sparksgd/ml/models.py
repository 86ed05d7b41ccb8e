"""Models of Spark ML: trained torch modules that add their predictions to a DataFrame."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.ml.base import Model
from pyspark.ml.classification import ProbabilisticClassificationModel
from pyspark.ml.linalg import DenseVector, Vector, Vectors
from pyspark.ml.param.shared import HasFeaturesCol, HasLabelCol, HasPredictionCol
from pyspark.ml.regression import RegressionModel
from pyspark.ml.util import MLReadable, MLWritable
from pyspark.sql import DataFrame
from torch import nn

from sparksgd.data.row_reading import read_features
from sparksgd.data.schema import RowSchema
from sparksgd.errors import ConfigError, DataError
from sparksgd.imports import shown
from sparksgd.ml.params import PREDICTION_DEFAULTS, OutputParams, PredictionParams
from sparksgd.ml.records import TrainingRecord
from sparksgd.ml.saving import ModelReader, ModelWriter
from sparksgd.models.losses import LossKind, has_accuracy
from sparksgd.models.outputs import Output
from sparksgd.runs.model import SavedModel
from sparksgd.runs.onnx_files import to_onnx
from sparksgd.spark.prediction import NewColumns, with_predictions
from sparksgd.spark.tasks.predict_tasks import PredictionPlan, columns_of, computed

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TorchClassificationModel", "TorchModel", "TorchRegressionModel"]


class _OurModel(PredictionParams, MLWritable, MLReadable[Any]):
    """What our Models share.

    Args:
        saved: the trained module, and what is needed to use it; None: a reader gives it.
        record: what is known of the training.
    """

    def __init__(self, saved: SavedModel | None = None, record: TrainingRecord | None = None) -> None:
        super().__init__()
        self._saved = saved
        self._record = record or TrainingRecord()
        self._setDefault(**PREDICTION_DEFAULTS)

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
    def history(self) -> pd.DataFrame:
        """The training, a row for each evaluation and each epoch: epoch, step, loss, lr and test results."""
        return self._record.history_table()

    @property
    def summary(self) -> pd.DataFrame:
        """The training's results, speed and digests, a row for each; empty for the model of a job."""
        return self._record.summary_table()

    @property
    def numFeatures(self) -> int:
        """How many numbers the features of a row are."""
        return sum(1 if feature.length is None else feature.length for feature in self._schema().features)

    def to_onnx(self, path: str) -> None:
        """Write the module as an ONNX file on this machine, see `sparksgd.runs.onnx_files`.

        Raises:
            ConfigError: the package onnx is not installed, or there is no such folder.
            ModelError: torch cannot express the module in ONNX.
        """
        to_onnx(self.saved, path)

    def write(self) -> ModelWriter:
        """Return what writes the Model: its Params, and the module as `load_model` reads it."""
        return ModelWriter(self)

    @classmethod
    def read(cls) -> ModelReader:
        """Return what reads a Model that was saved, or the folder model/ of a run."""
        return ModelReader(cls)

    @classmethod
    def load(
        cls, path: str, module: nn.Module | None = None, trust: Iterable[str] = (), strict: bool = False
    ) -> Any:
        """Load a Model.

        Args:
            path: where it was saved, or the folder model/ of a run.
            module: as `sparksgd.load_model` takes it, and so trust and strict.
            trust: packages whose code may run.
            strict: refuse a model whose code is not that of the training.

        Raises:
            DataError: it is damaged, or names code that is not trusted.
        """
        return ModelReader(cls, module=module, trust=trust, strict=strict).load(path)

    def _transform(self, dataset: DataFrame) -> DataFrame:
        """Add the columns; `transform` is Spark ML's own, and calls this."""
        return with_predictions(
            dataset,
            replace(self.saved, schema=self._schema()),
            self._new_columns(),
            on_bad_row=self.getOrDefault("handleInvalid"),
            rows_per_forward=self.getOrDefault("predictBatchSize"),
            advice='mend the data, or set handleInvalid to "skip" or "keep"',
        )

    def _schema(self) -> RowSchema:
        """Return what a row must be, by the column that is set now."""
        schema = self.saved.schema
        if len(schema.features) > 1:
            return schema
        return replace(schema, features=(replace(schema.features[0], name=self.getOrDefault("featuresCol")),))

    def _new_columns(self) -> NewColumns:
        """Return which columns are added."""
        names = self._names()
        return NewColumns(
            kind=self._kind(),
            outputs=self._outputs(),
            names={what: name for what, name in names.items() if name},
            as_vectors=self.getOrDefault("outputFormat") == "vector",
            thresholds=self._thresholds(),
        )

    def _kind(self) -> LossKind | None:
        raise NotImplementedError

    def _outputs(self) -> tuple[Output, ...]:
        return ()

    def _names(self) -> dict[str, str]:
        return {"prediction": self.getOrDefault("predictionCol")}

    def _thresholds(self) -> tuple[float, ...] | None:
        return None

    def _columns(self, value: Any) -> dict[str, npt.NDArray[Any]]:
        """Return what is predicted of one row, its features in a vector."""
        schema = self._schema()
        (feature, *others) = schema.features
        if others:
            names = ", ".join(each.name for each in schema.features)
            raise DataError(
                f"predict takes one vector, but the model reads the columns {names}: use transform"
            )
        numbers = value.toArray() if isinstance(value, Vector) else np.asarray(value)
        rows = [numbers.tolist()] if feature.length is not None else [numbers.item()]
        kind = pa.from_numpy_dtype(feature.dtype)
        column = pa.array(rows, kind if feature.length is None else pa.list_(kind))
        plan = PredictionPlan(
            module=self.module,
            schema=schema,
            columns=pa.schema([(feature.name, column.type)]),
            kind=self._kind(),
            outputs=self._outputs(),
            thresholds=self._thresholds(),
            rows_per_forward=1,
            bad_row_advice="pass a vector of finite numbers, as many as the model takes",
        )
        read = read_features(pa.RecordBatch.from_arrays([column], schema=plan.columns), schema)
        read.report.check(None, done="predicted", move=plan.bad_row_advice or "")
        return computed(plan, read)


class TorchClassificationModel(_OurModel, ProbabilisticClassificationModel):
    """A trained module that gives logits of classes.

    `transform` adds rawPredictionCol (logarithms of probabilities; (-z, z) for one logit z; the logits of
    several labels), probabilityCol and predictionCol (a double; an array of doubles, 0 or 1, of several
    labels); a column that is set to "" is left out.
    """

    @property
    def numClasses(self) -> int:
        """How many classes there are, or labels of a row."""
        return self.saved.schema.classes or self.saved.schema.num_labels or 0

    def predict(self, value: Any) -> float:
        """Return the class of one row, its features in a vector.

        Raises:
            ConfigError: the model gives several labels.
        """
        if self._kind() == "several labels":
            raise ConfigError(
                "predict gives one class, but the model gives several labels: use predictProbability, or "
                "transform"
            )
        return float(self._columns(value)["prediction"][0])

    def predictRaw(self, value: Any) -> DenseVector:
        """Return the logarithms of the probabilities of one row; the logits of several labels."""
        return Vectors.dense(self._columns(value)["raw"][0])

    def predictProbability(self, value: Any) -> DenseVector:
        """Return the probabilities of one row."""
        return Vectors.dense(self._columns(value)["probability"][0])

    def _kind(self) -> LossKind:
        kind = self.saved.kind
        if kind is None or not has_accuracy(kind):
            raise ConfigError(
                f"the module was trained with {_loss_of(self.saved)}, not as a classifier: load it as "
                f"TorchRegressionModel, or use sparksgd.predict"
            )
        return kind

    def _names(self) -> dict[str, str]:
        raw, probability = self.getOrDefault("rawPredictionCol"), self.getOrDefault("probabilityCol")
        return {"raw": raw, "probability": probability, **super()._names()}

    def _thresholds(self) -> tuple[float, ...] | None:
        if not self.isDefined("thresholds"):
            return None
        if self._kind() == "several labels":
            raise ConfigError(
                "thresholds choose one of the classes, but the model gives several labels: leave them "
                "out, and compare the probabilities of labels with limits of your own"
            )
        limits = tuple(self.getOrDefault("thresholds"))
        if len(limits) != self.numClasses:
            raise ConfigError(
                f"thresholds has {len(limits)} values, but the model has {self.numClasses} classes: give one "
                f"for each class"
            )
        if min(limits) < 0 or limits.count(0) > 1:
            raise ConfigError(f"thresholds is {list(limits)}, but may have no value below 0, and 0 once")
        return limits


class TorchRegressionModel(_OurModel, RegressionModel[Any]):
    """A trained module that gives one number for each row; `transform` adds it as predictionCol, a double."""

    def predict(self, value: Any) -> float:
        """Return the number of one row, its features in a vector."""
        return float(self._columns(value)["prediction"][0])

    def _kind(self) -> LossKind:
        if has_accuracy(self.saved.kind):
            raise ConfigError(
                f"the module was trained with {_loss_of(self.saved)}, as a classifier: load it as "
                f"TorchClassificationModel"
            )
        return "numbers"


class TorchModel(OutputParams, _OurModel, Model, HasFeaturesCol, HasLabelCol, HasPredictionCol):
    """A trained module of any loss; `transform` adds each of its outputs as a column, see `outputCols`.

    An output of one number for each row is a double; any other one, its numbers in the order of memory, is a
    vector, or an array with outputFormat="array".
    """

    def predict(self, value: Any) -> dict[str, Any]:
        """Return the outputs of one row, its features in a vector, by their columns: a number or float[N]."""
        found, names = self._columns(value), self._names()
        return {name: found[what][0] for what, name in names.items() if name}

    def _kind(self) -> LossKind | None:
        return None

    def _outputs(self) -> tuple[Output, ...]:
        return self.saved.outputs

    def _names(self) -> dict[str, str]:
        outputs, one = self.saved.outputs, self.getOrDefault("predictionCol")
        told = [output.name or one for output in outputs] or [one]
        if one not in told and self.isSet("predictionCol"):
            raise ConfigError(
                f"predictionCol is {shown(one)}, but the module gives outputs by names "
                f"({', '.join(told)}): set outputCols instead, a name for each"
            )
        names = self.getOrDefault("outputCols") if self.isDefined("outputCols") else told
        if len(names) != len(told):
            raise ConfigError(
                f"outputCols is {shown(names)}, but the module gives {', '.join(told)}: give as many names, "
                f'and "" for an output that is left out'
            )
        return dict(zip(columns_of(None, outputs), names, strict=True))


def _loss_of(saved: SavedModel) -> str:
    return str(saved.about.get("loss", {}).get("name", "another loss"))
