"""How Estimators and Models are saved and loaded, by themselves and in Pipelines.

    metadata/   class, uid and Params, as all of Spark ML writes them
    model/      of a Model: the module, as `load_model` reads it
    training.json   of a Model: the history and the summary of its training

Paths are resolved as Spark's own savers do: one without a scheme is of fs.defaultFS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from pyspark import SparkContext
from pyspark.ml.util import BaseReadWrite, DefaultParamsReader, DefaultParamsWriter, MLReader, MLWriter

from sparksgd.errors import ConfigError, DataError, SparkSGDError
from sparksgd.imports import import_path, resolve, shown
from sparksgd.imports.trust import trusted
from sparksgd.ml.module_spec import ModuleSpec
from sparksgd.ml.records import TrainingRecord
from sparksgd.runs.model import load_model, save_model
from sparksgd.runs.names import MANIFEST
from sparksgd.spark.cluster.cluster import is_connect, refuse_connect
from sparksgd.spark.connect_files import copied
from sparksgd.spark.uris import lead_to_hadoop
from sparksgd.storage import Location, location

__all__ = ["EstimatorReader", "EstimatorWriter", "ModelReader", "ModelWriter"]

_MODEL = "model"


class EstimatorWriter(MLWriter):
    """Writes the Params of an Estimator."""

    def __init__(self, estimator: Any) -> None:
        super().__init__()
        self._estimator = estimator

    def saveImpl(self, path: str) -> None:
        """Write to a path.

        Raises:
            ConfigError: the module, the loss or a callback has no name by which another process makes it.
        """
        params = {param.name: value for param, value in self._estimator._paramMap.items()}
        if "module" in params:
            params["module"] = ModuleSpec.of(params["module"]).name
            if params["module"] is None:
                raise ConfigError(
                    "the Estimator cannot be saved, because its module is an object of this process: pass "
                    "what makes it, by an import path (package.module:name), or save the fitted Model alone "
                    "(the bestModel of a CrossValidatorModel)"
                )
        if callable(params.get("loss")):
            params["loss"] = import_path(params["loss"])
            if params["loss"] is None:
                raise ConfigError(
                    "the Estimator cannot be saved, because its loss is an object of this process: pass an "
                    "import path (package.module:name), or save the fitted Model alone"
                )
        if not all(isinstance(one, str) for one in params.get("callbacks", ())):
            raise ConfigError(
                "the Estimator cannot be saved, because its callbacks are objects of this process: pass "
                "import paths (package.module:Class), or save the fitted Model alone"
            )
        DefaultParamsWriter.saveMetadata(self._estimator, path, _context(self), paramMap=params)


class EstimatorReader(MLReader[Any]):
    """Reads an Estimator."""

    def __init__(self, kind: type[Any], trust: Iterable[str] = ()) -> None:
        super().__init__()
        self._kind, self._trust = kind, trust

    def load(self, path: str) -> Any:
        """Return the Estimator that was saved at a path.

        Raises:
            DataError: it is another class's, or a Param names code that is not trusted: `fit` would run it.
        """
        estimator = _with_params(self._kind(), path, _metadata_at(path, _context(self)))
        trusting = trusted(self._trust, where=path)
        for key, name in _names_of_code(estimator):
            resolve(key, name, {}, trusting)
        return estimator


def _names_of_code(estimator: Any) -> Iterator[tuple[str, str]]:
    """Yield the import paths that an Estimator's Params have."""
    given = {param.name: value for param, value in estimator._paramMap.items()}
    named = {name: given.get(name) for name in ("module", "loss", "optimizer", "schedule")}
    for number, callback in enumerate(given.get("callbacks") or ()):
        named[f"callbacks[{number}]"] = callback
    tables = given.get("config") or {}
    metrics = [*(given.get("metrics") or ()), *(tables.get("train", {}).get("metrics") or ())]
    named |= {f"metrics[{number}]": name for number, name in enumerate(metrics)}
    named["early_stopping.metric"] = tables.get("early_stopping", {}).get("metric")
    for section, table in tables.items():
        named[f"config: {section}.name"] = table.get("name")
    for key, name in named.items():
        if isinstance(name, str) and ":" in name:
            yield key, name


class ModelWriter(MLWriter):
    """Writes a Model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model

    def saveImpl(self, path: str) -> None:
        """Write to a path."""
        context = _context(self)
        DefaultParamsWriter.saveMetadata(self._model, path, context)
        folder = _resolved(path, context)
        save_model(folder / _MODEL, self._model.saved)
        self._model._record.write(folder)


class ModelReader(MLReader[Any]):
    """Reads a Model, or the folder model/ of a run.

    Args:
        kind: the class of the Model.
        how: what `load_model` takes: module, trust and strict.
    """

    def __init__(self, kind: type[Any], **how: Any) -> None:
        super().__init__()
        self._kind, self._how = kind, how

    def load(self, path: str) -> Any:
        """Return the Model that was saved at a path."""
        session: Any = self.sparkSession
        if is_connect(session):
            with copied(session, path) as folder:
                try:
                    return self._loaded(path, folder, partial(_metadata_of, path, session))
                except SparkSGDError as error:  # the copy is gone when this is read
                    raise type(error)(str(error).replace(str(folder), path.rstrip("/"))) from error
        return self._loaded(path, _resolved(path, self.sc), partial(_metadata_at, path, self.sc))

    def _loaded(self, path: str, folder: Location, metadata: Callable[[], dict[str, Any]]) -> Any:
        """Return the Model of a folder.

        Args:
            path: what it was called.
            folder: where it can be read.
            metadata: reads its class and Params.

        Raises:
            DataError: it is damaged, names code that is not trusted, or is no Model.
        """
        if not {MANIFEST, "metadata"} & set(folder.names()):
            raise DataError(f"{path} holds no Model: name the folder that write().save(path) wrote")
        if MANIFEST in folder.names():
            saved = load_model(folder, **self._how)
            model: Any = self._kind(saved)
            features = [feature.name for feature in saved.schema.features]
            columns = {"featuresCol": features[0]} if len(features) == 1 else {}
            return model._set(labelCol=saved.schema.label, **columns)
        model = _with_params(self._kind(), path, metadata())
        model._saved = load_model(folder / _MODEL, **self._how)
        model._record = TrainingRecord.read(folder)
        return model


def _context(of: BaseReadWrite) -> SparkContext:
    """Return the context by which a writer or a reader reaches files.

    Raises:
        ClusterError: the session is Spark Connect, which has none.
    """
    refuse_connect(of.sparkSession)
    return of.sc


def _metadata_at(path: str, context: SparkContext) -> dict[str, Any]:
    """Return the class, the uid and the Params that were saved at a path."""
    return DefaultParamsReader.loadMetadata(path, context)


def _metadata_of(path: str, session: Any) -> dict[str, Any]:
    """Return them as the server of a session of Spark Connect reads them."""
    lines = session.read.text(f"{path.rstrip('/')}/metadata").collect()
    return DefaultParamsReader._parseMetaData("\n".join(line.value for line in lines))


def _with_params(instance: Any, path: str, metadata: dict[str, Any]) -> Any:
    """Return an instance with the uid and the Params that were saved at a path."""
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
