"""Estimators and Models of Spark ML that train torch modules: fit, transform, save, load."""

from sparksgd.ml.estimators import TorchClassifier, TorchRegressor
from sparksgd.ml.models import TorchClassificationModel, TorchRegressionModel

__all__ = ["TorchClassificationModel", "TorchClassifier", "TorchRegressionModel", "TorchRegressor"]
