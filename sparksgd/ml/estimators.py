"""Estimators of Spark ML: they train a torch module on a DataFrame."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial, reduce
from operator import and_
from threading import Lock, RLock
from typing import Any, Self
from weakref import finalize

import pyarrow as pa
from pyspark import SparkContext
from pyspark.ml.base import Estimator
from pyspark.ml.classification import ProbabilisticClassifier
from pyspark.ml.param import Param
from pyspark.ml.param.shared import HasFeaturesCol, HasLabelCol, HasPredictionCol
from pyspark.ml.regression import Regressor
from pyspark.ml.util import MLReadable, MLWritable
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from sparksgd.arithmetic.copies import copied
from sparksgd.config import Config
from sparksgd.config.tables import MOST
from sparksgd.data.row_reading import WEIGHTS
from sparksgd.data.schema import require_column
from sparksgd.errors import BadRows, ConfigError, DataError
from sparksgd.imports import shown
from sparksgd.ml.models import TorchClassificationModel, TorchModel, TorchRegressionModel
from sparksgd.ml.module_spec import ModuleSpec
from sparksgd.ml.params import PREDICTION_DEFAULTS, OutputParams, TrainingParams
from sparksgd.ml.records import TrainingRecord, is_shown
from sparksgd.ml.saving import EstimatorReader, EstimatorWriter
from sparksgd.models.losses import LossKind, loss_kind
from sparksgd.runs.folder import summary
from sparksgd.runs.model import SavedModel, checked_model
from sparksgd.solvers.rules import completed
from sparksgd.spark.cluster.cluster import refuse_connect
from sparksgd.spark.cluster.jobs import spark_job
from sparksgd.spark.frame_rows import first_rows, quoted, without_vectors
from sparksgd.spark.given_rows import described_value
from sparksgd.spark.library import train
from sparksgd.spark.shared_rows import SharedRows
from sparksgd.training.callbacks import Callback
from sparksgd.training.first_rows import typical_row
from sparksgd.training.given_loss import with_loss
from sparksgd.training.history import History
from sparksgd.training.names import check_names
from sparksgd.training.preflight import allowed_engines
from sparksgd.training.state import Observer

__all__ = ["TorchClassifier", "TorchEstimator", "TorchRegressor"]

log = logging.getLogger("sparksgd")

_DEFAULTS = {"optimizer": "AdamW", "learningRate": 1e-3, "maxEpochs": 10, "engine": "auto"}
"""What differs from a configuration's defaults: these suit most tables, and the engine changes no bit."""

_FIRST_ROWS = 64


class _OurEstimator(TrainingParams, MLWritable, MLReadable[Any]):
    """What our Estimators share."""

    _loss: str | None
    """The loss by default; None: it must be given."""

    _kinds: tuple[LossKind, ...]
    """The kinds of losses that it trains with; the first is that of a loss whose kind is not known.  If there
    are none, it trains with any."""

    _model: type[Any]
    """The class of the Models that it makes."""

    def __init__(self, **params: Any) -> None:
        super().__init__()
        config = Config()
        self._setDefault(
            **_DEFAULTS | PREDICTION_DEFAULTS,
            **{} if self._loss is None else {"loss": self._loss},
            batchSize=config.train.rows_per_step,
            seed=config.train.seed,
        )
        self.setParams(**params)

    def _kind_of_loss(self, given: Mapping[str, Mapping[str, Any]]) -> tuple[LossKind | None, dict[str, Any]]:
        """Return what the loss is of, and what [loss] must have beside the keys of the user to say so.

        Args:
            given: `config`.

        Raises:
            ConfigError: there is no loss, or it is of another kind.
        """
        if not self.isDefined("loss"):
            raise ConfigError(
                f"{type(self).__name__} has no loss: pass loss=, the import path of your own as "
                f"package.module:name, or the name of one such as SmoothL1Loss"
            )
        loss, table = self.getOrDefault("loss"), given.get("loss", {})
        if callable(loss) and "name" in table:
            raise ConfigError(
                f"loss is {described_value(loss)}, but config sets loss.name to {shown(table['name'])}: give "
                f"one of the two"
            )
        named = table if callable(loss) else {**table, "name": loss}
        config, _ = with_loss(Config.from_dict({"loss": named}), loss if callable(loss) else None)
        kind = loss_kind(config.loss)
        if kind is None and self._kinds:
            return self._kinds[0], {"kind": self._kinds[0]}
        if self._kinds and kind not in self._kinds:
            other = "TorchRegressor" if kind == "numbers" else "TorchClassifier"
            raise ConfigError(
                f'loss is {shown(loss)}, whose kind is "{kind}", but {type(self).__name__} trains '
                f"with losses of {' or '.join(self._kinds)}: use {other}"
            )
        return kind, {}

    def fitMultiple(
        self,
        dataset: DataFrame,
        paramMaps: Sequence[Mapping[Param[Any], Any]],  # noqa: N803  # Spark ML's own name
    ) -> Iterator[tuple[int, Any]]:
        """Return an iterator of (index, Model): a fit for each map, in any order and any thread.

        The rows are checked and dealt once for all fits that ask for the same shards.  These are removed
        after the last fit, or with the iterator.
        """
        return _Fits(self, dataset, paramMaps)

    def _fit(self, dataset: DataFrame, shared: SharedRows | None = None) -> Any:
        """Train; `fit` is Spark ML's own, and calls this.

        Args:
            dataset: the rows.
            shared: the same rows, which other fits train on, too.
        """
        refuse_connect(dataset.sparkSession)
        takes_all = not self.isSet("numWorkers")
        with _turn(dataset.sparkSession.sparkContext) if takes_all else nullcontext():
            return self._trained(dataset, dataset if shared is None else shared)

    def _trained(self, dataset: DataFrame, rows: DataFrame | SharedRows) -> Any:
        if not self.isDefined("module"):
            raise ConfigError(f"{type(self).__name__} has no module: pass module=, what it trains")
        spec = ModuleSpec.of(self.getOrDefault("module"))
        features, label = self._columns()
        data: dict[str, Any] = {"features": features, "label": label}
        given = self._given_config()
        kind, of_loss = self._kind_of_loss(given)
        if self.getOrDefault("handleInvalid") == "skip":
            data["on_bad_row"] = "skip"
            if "max_bad_rows" not in given.get("data", {}):
                data["max_bad_rows"] = MOST
        found = {
            "num_features": partial(_num_features, dataset, features),
            "num_classes": partial(_num_labels, dataset, label)
            if kind == "several labels"
            else partial(_num_classes, self._counted(dataset, features, label), label),
        }
        tables: dict[str, Mapping[str, Any]] = {"data": data, "loss": of_loss}
        callbacks = self._callbacks()
        self._check_names(self._configured(tables), spec)
        sizes = {name: found[name]() for name in spec.sizes()}
        if spec.name is not None:
            tables["model"] = {"name": spec.name, **sizes}
        config = self._configured(tables)
        module = spec.module({**config.model.arguments, **sizes}, config.train.seed)
        checkpoints = self.getOrDefault("checkpointDir") if self.isDefined("checkpointDir") else None
        history, began_s = History(), time.perf_counter()
        loss = self.getOrDefault("loss")
        try:
            training = train(
                config,
                rows,
                module=module,
                loss=loss if callable(loss) else None,
                observers=[history, *callbacks],
                checkpoint_dir=checkpoints,
            )
        except BadRows as error:
            told = str(error).partition(" Next: ")[0]
            raise BadRows(f'{told} Next: mend the data, or set handleInvalid to "skip"') from error
        results = summary(training, time.perf_counter() - began_s)
        about = TrainingRecord(
            history=history.rows, summary={key: value for key, value in results.items() if is_shown(key)}
        )
        model = self._model(_apart(checked_model(training)), about)
        model._resetUid(self.uid)
        model = self._copyValues(model)
        return model._set(featuresCol=features[0]) if len(features) == 1 else model

    def _check_names(self, config: Config, spec: ModuleSpec) -> None:
        """Refuse what `train` would refuse of names and arguments, before sizes are read from the rows."""
        loss = self.getOrDefault("loss")
        config, own_loss = with_loss(completed(config), loss if callable(loss) else None)
        spec.check_call(config.model.arguments)
        allowed_engines(config)
        check_names(config, evaluates=False, has_module=True, has_loss=own_loss is not None)

    def _callbacks(self) -> list[Observer]:
        """Return the observers of `callbacks`; what an import path names is made.

        Raises:
            ConfigError: one is something else.
        """
        found = []
        for given in self.getOrDefault("callbacks") if self.isDefined("callbacks") else ():
            one = Callback("callbacks", given) if isinstance(given, str) else given
            if not isinstance(one, Observer):
                raise ConfigError(
                    f"callbacks has {described_value(one)}, but must be a list of instances of "
                    f"sparksgd.Observer, or of import paths of subclasses"
                )
            found.append(one)
        return found

    def _counted(self, dataset: DataFrame, features: list[str], label: str) -> DataFrame:
        """Return the rows whose labels count: those that are skipped do not."""
        of_config = self._given_config().get("data", {}).get("weight")
        weight_col = self.getOrDefault("weightCol") if self.isSet("weightCol") else of_config
        if self.getOrDefault("handleInvalid") != "skip" or not {*features, label} <= {*dataset.columns}:
            return dataset
        number = F.col(quoted(label))
        is_good = (number >= 0) & (number == F.floor(number)) & ~F.isnan(number.cast("double"))
        if weight_col in dataset.columns:
            weight = F.col(quoted(weight_col)).cast("float")
            is_good &= weight.between(*(F.lit(limit).cast("float") for limit in WEIGHTS))
        return dataset.where(reduce(and_, (F.col(quoted(name)).isNotNull() for name in features), is_good))

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

    @classmethod
    def load(cls, path: str, trust: Iterable[str] = ()) -> Any:
        """Load an Estimator.

        Args:
            path: where it was saved.
            trust: packages whose code may run, as `sparksgd.load_model` takes them.

        Raises:
            DataError: it is another class's, or names code that is not trusted.
        """
        return EstimatorReader(cls, trust).load(path)


class TorchClassifier(_OurEstimator, ProbabilisticClassifier):
    """Trains a torch module that gives logits of classes.

    Args:
        params: Params by their names; see `explainParams()`. `module` must be given. The most used:
            featuresCol: one column of features, a vector or an array of numbers; its default is "features".
            featuresCols: several columns instead, arguments of forward by their names.
            labelCol: whole numbers from 0, also as doubles, as StringIndexer gives them; vectors or arrays of
                0 and 1 where a row has several labels.
            weightCol: numbers above 0: how much each row counts, in evaluations, too.
            loss: cross_entropy for C logits (the default), binary_cross_entropy for one, or your own by its
                import path; of one logit with config={"loss": {"kind": "binary"}}. A row has several labels
                with loss="binary_cross_entropy", config={"loss": {"kind": "several labels"}}.
            optimizer, learningRate, maxEpochs, batchSize: by default AdamW, 0.001, 10 and 128.

    Raises:
        ConfigError: there is no Param of such a name.

    Example:

        classifier = TorchClassifier(module=nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2)))
        scored = classifier.fit(train).transform(test)
    """

    _loss = "cross_entropy"
    _kinds = ("classes", "binary", "several labels")
    _model = TorchClassificationModel


class TorchRegressor(_OurEstimator, Regressor[Any]):
    """Trains a torch module that gives one number for each row.

    Args:
        params: Params by their names, as those of `TorchClassifier`; the default of loss is squared_error.

    Raises:
        ConfigError: there is no Param of such a name.
    """

    _loss = "squared_error"
    _kinds = ("numbers",)
    _model = TorchRegressionModel


class TorchEstimator(
    OutputParams, _OurEstimator, Estimator[Any], HasFeaturesCol, HasLabelCol, HasPredictionCol
):
    """Trains a torch module of any outputs with any loss; its Model gives each output as a column.

    Args:
        params: Params by their names, as those of `TorchClassifier`, and outputCols. `loss` must be given:
            the import path of a function (output, label), which gets what the module gives: a tensor, a
            tuple of tensors, or a dictionary of tensors by their names, and gives one value for each row; or
            a loss of ours, which takes one tensor. Labels are whole numbers or floats, as their column is;
            config={"loss": {"kind": "classes"}} has them checked, and the accuracy told.

    Raises:
        ConfigError: there is no Param of such a name.

    Example:

        estimator = TorchEstimator(module="mymodels:Autoencoder", loss="mylosses:reconstruction")
        scored = estimator.fit(train).transform(test)
    """

    _loss = None
    _kinds = ()
    _model = TorchModel


class _Fits:
    """Fits of one Estimator on the same rows; each call of `next` makes one, in whichever thread calls."""

    def __init__(self, estimator: Any, dataset: DataFrame, maps: Sequence[Mapping[Param[Any], Any]]) -> None:
        self._estimator, self._dataset, self._maps = estimator.copy(), dataset, list(maps)
        self._numbers, self._left, self._lock = iter(range(len(self._maps))), len(self._maps), Lock()
        self._shared = SharedRows(dataset)
        self._close = finalize(self, self._shared.close)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[int, Any]:
        with self._lock:
            number = next(self._numbers)
        try:
            estimator = self._estimator.copy(self._maps[number])
            return number, estimator._fit(self._dataset, self._shared)
        finally:
            with self._lock:
                self._left -= 1
                is_last = not self._left
            if is_last:
                self._close()


_turns: dict[str, RLock] = {}
_turns_lock = Lock()


@contextmanager
def _turn(context: SparkContext) -> Iterator[None]:
    """Let one fit of a session train at a time, because each takes all slots."""
    with _turns_lock:
        turn = _turns.setdefault(context.applicationId, RLock())
    if not turn.acquire(blocking=False):
        log.info("another fit trains in this session: this one begins when that one has ended")
        turn.acquire()
    try:
        yield
    finally:
        turn.release()


def _apart(trained: SavedModel) -> SavedModel:
    """Return a trained model whose module is in evaluation mode, and has memory of its own.

    Its parameters are views of one vector, which each of them would be pickled with.
    """
    module = copied(trained.module)
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return replace(trained, module=module.eval())


def _num_features(dataset: DataFrame, features: list[str]) -> int:
    """Return how many numbers the features of a row are: as the column's metadata say, or the first rows."""
    schema, first = first_rows(without_vectors(dataset), features, _FIRST_ROWS)
    for name in features:
        require_column(name, schema)
    told = [dataset.schema[name].metadata.get("ml_attr", {}).get("num_attrs") for name in features]
    if all(isinstance(size, int) for size in told):
        return sum(told)
    rows = first.to_pylist()
    if not rows:
        raise DataError(f"every row has a null in {', '.join(features)}, so num_features is not known")
    row = typical_row(rows, features)
    return sum(len(value) if isinstance(value, Sized) else 1 for value in row.values())


def _num_labels(dataset: DataFrame, label: str) -> int:
    """Return how many labels a row has: as the first rows have."""
    schema, first = first_rows(without_vectors(dataset), [label], _FIRST_ROWS)
    require_column(label, schema)
    rows = first.to_pylist()
    value = typical_row(rows, [label])[label] if rows else None
    if not isinstance(value, Sized):
        raise DataError(
            f"the labels in {label!r} are {shown(value)}, but must be vectors or arrays of 0 and 1, as "
            f"loss.kind says"
        )
    return len(value)


def _num_classes(dataset: DataFrame, label: str) -> int:
    """Return how many classes there are: as the column's metadata say, or by its greatest label."""
    require_column(label, pa.schema([(name, pa.null()) for name in dataset.columns]))
    told = dataset.schema[label].metadata.get("ml_attr", {})
    if "vals" in told or "num_vals" in told:
        return len(told["vals"]) if "vals" in told else int(told["num_vals"])
    with spark_job(dataset.sparkSession.sparkContext, "reading num_classes"):
        row = dataset.agg(F.max(quoted(label))).first()
    greatest = None if row is None else row[0]
    if not isinstance(greatest, int | float) or greatest != int(greatest) or greatest < 0:
        raise DataError(
            f"the greatest label in {label!r} is {shown(greatest)}, but must be a whole number: number the "
            f"classes from 0, for example by StringIndexer"
        )
    return int(greatest) + 1
