"""Estimators and Models of Spark ML that train torch modules: fit, transform, save, load."""

from sparksgd.ml.estimators import TorchClassifier, TorchEstimator, TorchRegressor
from sparksgd.ml.models import TorchClassificationModel, TorchModel, TorchRegressionModel

__all__ = [
    "TorchClassificationModel",
    "TorchClassifier",
    "TorchEstimator",
    "TorchModel",
    "TorchRegressionModel",
    "TorchRegressor",
]
