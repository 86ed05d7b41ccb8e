"""Distributed synchronous SGD for PyTorch models on Apache Spark."""

__version__ = "0.1.0"
