"""How Estimators and Models are saved and loaded, by themselves and in Pipelines.

    metadata/   class, uid and Params, as all of Spark ML writes them
    model/      of a Model: the module, as `load_model` reads it

Paths are resolved as Spark's own savers do: one without a scheme is of fs.defaultFS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyspark import SparkContext
from pyspark.ml.util import DefaultParamsReader, DefaultParamsWriter, MLReader, MLWriter

from sparksgd.errors import ConfigError, DataError
from sparksgd.imports import shown
from sparksgd.ml.factories import Asked
from sparksgd.runs.model import load_model, save_model
from sparksgd.runs.names import MANIFEST
from sparksgd.spark.uris import lead_to_hadoop
from sparksgd.storage import Location, location

if TYPE_CHECKING:
    from sparksgd.ml.models import TorchModel

__all__ = ["EstimatorReader", "EstimatorWriter", "ModelReader", "ModelWriter"]

_MODEL = "model"


class EstimatorWriter(MLWriter):
    """Writes the Params of an Estimator."""

    def __init__(self, estimator: Any) -> None:
        super().__init__()
        self._estimator = estimator

    def saveImpl(self, path: str) -> None:  # noqa: N802  # pyspark.ml's name
        """Write to a path.

        Raises:
            ConfigError: the module has no name by which another process could make it.
        """
        params = {param.name: value for param, value in self._estimator._paramMap.items()}
        if "module" in params:
            params["module"] = Asked(params["module"]).name
            if params["module"] is None:
                raise ConfigError(
                    "the Estimator cannot be saved, because its module is an object of this process: pass "
                    "what makes it, by an import path (package.module:name), or save the fitted Model"
                )
        DefaultParamsWriter.saveMetadata(self._estimator, path, self.sc, paramMap=params)


class EstimatorReader(MLReader[Any]):
    """Reads an Estimator."""

    def __init__(self, kind: type[Any]) -> None:
        super().__init__()
        self._kind = kind

    def load(self, path: str) -> Any:
        """Return the Estimator that was saved at a path."""
        return _with_params(self._kind(), path, self.sc)


class ModelWriter(MLWriter):
    """Writes a Model."""

    def __init__(self, model: TorchModel) -> None:
        super().__init__()
        self._model = model

    def saveImpl(self, path: str) -> None:  # noqa: N802  # pyspark.ml's name
        """Write to a path."""
        DefaultParamsWriter.saveMetadata(self._model, path, self.sc)
        save_model(_resolved(path, self.sc) / _MODEL, self._model.saved)


class ModelReader(MLReader[Any]):
    """Reads a Model, or the folder model/ of a run."""

    def __init__(self, kind: type[TorchModel]) -> None:
        super().__init__()
        self._kind = kind
        self._how: dict[str, Any] = {}

    def how(self, **how: Any) -> ModelReader:
        """Set module=, trust= and strict=, as `load_model` takes them; return self."""
        self._how = how
        return self

    def load(self, path: str) -> Any:
        """Return the Model that was saved at a path."""
        folder = _resolved(path, self.sc)
        if MANIFEST in folder.names():
            saved = load_model(folder, **self._how)
            model: Any = self._kind(saved)
            features = [feature.name for feature in saved.schema.features]
            columns: dict[str, Any] = {"labelCol": saved.schema.label}
            columns |= {"featuresCols": features} if len(features) > 1 else {"featuresCol": features[0]}
            return model._set(**columns)
        model = _with_params(self._kind(), path, self.sc)
        model._saved = load_model(folder / _MODEL, **self._how)
        return model


def _with_params(instance: Any, path: str, context: SparkContext) -> Any:
    """Return an instance with the uid and the Params that were saved at a path."""
    metadata = DefaultParamsReader.loadMetadata(path, context)
    name = f"{type(instance).__module__}.{type(instance).__name__}"
    if metadata.get("class") != name:
        raise DataError(f"{path} holds a {shown(metadata.get('class'))}, not a {name}: load it as what it is")
    instance._resetUid(metadata["uid"])
    DefaultParamsReader.getAndSetParams(instance, metadata)
    return instance


def _resolved(path: str, context: SparkContext) -> Location:
    """Return a path as Spark resolves it."""
    lead_to_hadoop()
    jvm: Any = context._jvm
    hadoop_path = jvm.org.apache.hadoop.fs.Path(path)
    file_system = hadoop_path.getFileSystem(context._jsc.hadoopConfiguration())
    return location(str(file_system.makeQualified(hadoop_path).toString()))
