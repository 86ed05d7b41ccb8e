"""The Params of our Estimators and Models, and the keys of a configuration that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from pyspark.ml.param import Param, Params, TypeConverters

from sparksgd.config import Config
from sparksgd.engines.forward import EVALUATION_ROWS
from sparksgd.errors import ConfigError
from sparksgd.imports import did_you_mean, import_path, shown
from sparksgd.spark.prediction import OnBadRow

__all__ = ["ALIASES", "KEYS", "PREDICTION_DEFAULTS", "OutputParams", "PredictionParams", "TrainingParams"]

ALIASES = {"rowsPerStep": "batchSize", "num_workers": "numWorkers", "numTrainWorkers": "numWorkers"}
"""Other names by which a Param can be given, such as those of other libraries."""

KEYS = {
    "loss": "loss.name",
    "optimizer": "optimizer.name",
    "learningRate": "optimizer.lr",
    "schedule": "schedule.name",
    "maxEpochs": "train.epochs",
    "batchSize": "train.rows_per_step",
    "seed": "train.seed",
    "numShards": "train.num_shards",
    "weightCol": "data.weight",
    "validationFraction": "data.validation_fraction",
    "validationIndicatorCol": "data.validation_column",
    "earlyStopping": "early_stopping.patience",
    "metrics": "train.metrics",
    "numWorkers": "engine.num_workers",
    "engine": "engine.name",
}
"""The key of a configuration that each Param sets."""


PREDICTION_DEFAULTS = {
    "handleInvalid": "error",
    "outputFormat": "vector",
    "predictBatchSize": EVALUATION_ROWS,
}


def _one_of(*choices: str) -> Callable[[Any], str]:
    """Return what converts a Param's value: one of these texts, and nothing else."""

    def convert(value: Any) -> str:
        if value not in choices:
            near = did_you_mean(value, choices) if isinstance(value, str) else ""
            raise TypeError(f"{shown(value)}, but must be {' or '.join(choices)}{near}")
        return str(value)

    return convert


def _named_or_callable(value: Any) -> Any:
    if not (isinstance(value, str) or callable(value)):
        raise TypeError(f"{shown(value)}, but must be a name, an import path, a function or an nn.Module")
    return value


def _positive(value: Any) -> int:
    number = TypeConverters.toInt(value)
    if number < 1:
        raise TypeError(f"{number}, but must be at least 1")
    return number


def _names_of_metrics(values: Any) -> list[str]:
    """Return metrics by their names, functions by their import paths.

    Raises:
        TypeError: they are neither, or a function has no name by which executors import it.
    """
    named = []
    for value in values:
        path = import_path(value) if callable(value) else value
        if path is None:
            raise TypeError(
                f"{value!r} cannot be imported by executors: put it in a module, or use a callback"
            )
        named.append(path)
    found: list[str] = TypeConverters.toListString(named)
    return found


def _param(name: str, doc: str, convert: Any = None) -> Any:
    return Param(Params._dummy(), name, doc, convert)


class _NamedParams(Params):
    """Params that can be given by name, and are refused with the nearest one."""

    def setParams(self, **params: Any) -> Any:
        """Set Params by their names; return self.

        Raises:
            ConfigError: there is no Param of such a name, or it is given twice.
            TypeError: a value is of another type.
        """
        for name in params:
            known = ALIASES.get(name, name)
            if known != name and known in params:
                raise ConfigError(f"{name} and {known} are the same Param: give one of them")
            names = [param.name for param in self.params]
            if known not in names:
                raise ConfigError(
                    f"{type(self).__name__} has no Param {shown(name)}{did_you_mean(name, names)}"
                )
        return self._set(**{ALIASES.get(name, name): value for name, value in params.items()})


class PredictionParams(_NamedParams):
    """What Estimators and Models share: how rows are predicted."""

    handleInvalid: Any = _param(
        "handleInvalid",
        "what is done with rows that are null, misshapen or not finite: error, skip (they are left out), or "
        "keep (their predictions are null; fit ends with an error)",
        _one_of(*get_args(OnBadRow)),
    )
    predictBatchSize: Any = _param("predictBatchSize", "the most rows of one forward of transform", _positive)
    outputFormat: Any = _param(
        "outputFormat",
        "vector or array: the type of rawPredictionCol, probabilityCol and outputCols",
        _one_of("vector", "array"),
    )


class OutputParams(_NamedParams):
    """What the Estimator and the Model of any outputs share."""

    outputCols: Any = _param(
        "outputCols",
        'the columns of the module\'s outputs, in their order, "" for one that is left out; if not set: '
        "predictionCol for a single tensor, the names of a dictionary, output_0, output_1, ... of a tuple",
        TypeConverters.toListString,
    )


class TrainingParams(PredictionParams):
    """What only Estimators have: the module, and how it is trained."""

    featuresCols: Any = _param(
        "featuresCols",
        "several columns of features, each an argument of forward by its name, instead of featuresCol",
        TypeConverters.toListString,
    )
    module: Any = _param(
        "module",
        "what is trained: an nn.Module, whose weights are the start; or a function or class that makes one, "
        "which gets num_features and num_classes if it has arguments of these names; or the import path of "
        "one, package.module:name",
    )
    loss: Any = _param(
        "loss",
        "the loss: a name or an import path, as loss.name; or a function (output, label), an nn.Module, or a "
        "class of such, as loss of sparksgd.train",
        _named_or_callable,
    )
    optimizer: Any = _param(
        "optimizer", "a class of torch.optim, or an import path, as optimizer.name", TypeConverters.toString
    )
    learningRate: Any = _param("learningRate", "the learning rate, as optimizer.lr", TypeConverters.toFloat)
    schedule: Any = _param(
        "schedule",
        "a class of torch.optim.lr_scheduler, or an import path, as schedule.name",
        TypeConverters.toString,
    )
    maxEpochs: Any = _param("maxEpochs", "passes over the rows, as train.epochs", TypeConverters.toInt)
    batchSize: Any = _param(
        "batchSize", "the mini-batch of the whole cluster, as train.rows_per_step", TypeConverters.toInt
    )
    seed: Any = _param("seed", "of weights, shuffles and dropout, as train.seed", TypeConverters.toInt)
    numShards: Any = _param(
        "numShards", "how many shards the rows are divided into, as train.num_shards", TypeConverters.toInt
    )
    numWorkers: Any = _param(
        "numWorkers", "how many Spark tasks compute gradients, as engine.num_workers", TypeConverters.toInt
    )
    engine: Any = _param("engine", "tree, allreduce or auto, as engine.name", TypeConverters.toString)
    validationFraction: Any = _param(
        "validationFraction",
        "the part of the rows, such as 0.1, that is held out and evaluated on, as data.validation_fraction",
        TypeConverters.toFloat,
    )
    validationIndicatorCol: Any = _param(
        "validationIndicatorCol",
        "a boolean column: rows where it is true are held out and evaluated on, as data.validation_column",
        TypeConverters.toString,
    )
    weightCol: Any = _param(
        "weightCol",
        "a column of numbers above 0: how much each row counts, as data.weight",
        TypeConverters.toString,
    )
    earlyStopping: Any = _param(
        "earlyStopping",
        "end after this many evaluations in a row that are no better, with the best weights, as "
        "early_stopping.patience",
        TypeConverters.toInt,
    )
    metrics: Any = _param(
        "metrics",
        "names of what evaluations tell beside the loss and the accuracy, such as f1_macro, or functions of "
        "your own, as train.metrics",
        _names_of_metrics,
    )
    callbacks: Any = _param(
        "callbacks",
        "a list of sparksgd.Observer, or of import paths of subclasses: they watch the training, and may end "
        "it by training.stop(reason)",
        TypeConverters.toList,
    )
    checkpointDir: Any = _param(
        "checkpointDir",
        "a folder for checkpoints, as checkpoint_dir of sparksgd.train: a fit that was cut off goes on",
        TypeConverters.toString,
    )
    config: Any = _param("config", "a dict of tables of a configuration, for all other keys")

    def _given_config(self) -> Mapping[str, Mapping[str, Any]]:
        """Return `config`, if it is tables of a configuration.

        Raises:
            ConfigError: it is something else.
        """
        given: Mapping[str, Mapping[str, Any]] = (
            self.getOrDefault("config") if self.isDefined("config") else {}
        )
        Config.from_dict(given)
        return given

    def _configured(self, tables: Mapping[str, Mapping[str, Any]]) -> Config:
        """Return the configuration that the Params say.

        Args:
            tables: what else must be in it, by section and key.

        Raises:
            ConfigError: a Param and `config` set one key to two values, or a value is not valid.
        """
        merged = {section: dict(table) for section, table in self._given_config().items()}
        for name, key in KEYS.items():
            section, _, field = key.partition(".")
            table = merged.setdefault(section, {})
            if self.isSet(name) and callable(self.getOrDefault(name)):
                continue  # a loss that no key can hold
            if self.isSet(name):
                value = self.getOrDefault(name)
                if field in table and table[field] != value:
                    raise ConfigError(
                        f"{name} is {shown(value)}, but config sets {key} to {shown(table[field])}: give one "
                        f"of the two"
                    )
                table[field] = value
            elif self.hasDefault(name):
                table.setdefault(field, self.getOrDefault(name))
        for section, more in tables.items():
            table = merged.setdefault(section, {})
            for field, value in more.items():
                if field in table and table[field] != value:
                    raise ConfigError(
                        f"config sets {section}.{field} to {shown(table[field])}, but the Params of "
                        f"{type(self).__name__} say {shown(value)}: leave it out of config"
                    )
                table[field] = value
        return Config.from_dict(merged)
