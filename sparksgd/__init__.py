"""Distributed SGD for PyTorch models on Apache Spark: what a user of the library needs.

    import sparksgd

    training = sparksgd.train({"train": {"epochs": 5}}, rows, test, module=module, out="runs/mine")
    model = sparksgd.load_model("runs/mine/model", module)
    scores = sparksgd.evaluate(test, model)
    predicted = sparksgd.predict(rows, model)

Each name is imported when it is first used: importing sparksgd imports neither torch nor pyspark.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparksgd import errors
    from sparksgd.config import Config
    from sparksgd.errors import SparkSGDError
    from sparksgd.imports.trust import trust
    from sparksgd.runs.folder import RunFolder
    from sparksgd.runs.model import SavedModel, load_model
    from sparksgd.runs.replay import read_replay
    from sparksgd.spark.evaluation import Scores, evaluate
    from sparksgd.spark.library import train
    from sparksgd.spark.prediction import predict
    from sparksgd.spark.session import start_session
    from sparksgd.spark.shared_rows import deal
    from sparksgd.training.state import Observer, Training

__all__ = [
    "Config",
    "Observer",
    "RunFolder",
    "SavedModel",
    "Scores",
    "SparkSGDError",
    "Training",
    "__version__",
    "deal",
    "errors",
    "evaluate",
    "load_model",
    "predict",
    "read_replay",
    "start_session",
    "train",
    "trust",
]

__version__ = "0.1.0"

_HOMES = {
    "Config": "sparksgd.config",
    "Observer": "sparksgd.training.state",
    "RunFolder": "sparksgd.runs.folder",
    "SavedModel": "sparksgd.runs.model",
    "Scores": "sparksgd.spark.evaluation",
    "SparkSGDError": "sparksgd.errors",
    "Training": "sparksgd.training.state",
    "deal": "sparksgd.spark.shared_rows",
    "evaluate": "sparksgd.spark.evaluation",
    "load_model": "sparksgd.runs.model",
    "predict": "sparksgd.spark.prediction",
    "read_replay": "sparksgd.runs.replay",
    "start_session": "sparksgd.spark.session",
    "train": "sparksgd.spark.library",
    "trust": "sparksgd.imports.trust",
}
"""The module of each name."""

if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> object:
        if name == "errors":
            return importlib.import_module("sparksgd.errors")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
