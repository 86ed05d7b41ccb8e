"""The files of a run's folder."""

from __future__ import annotations

from sparksgd.storage.metrics_lines import METRICS

__all__ = ["CHECKPOINTS", "MANIFEST", "METRICS", "MODEL", "RUN", "RUN_BEFORE", "SUMMARY", "TRACE", "WEIGHTS"]


CHECKPOINTS = "checkpoints"
"""The folder of the checkpoints; checkpoints.py says what is in it."""

MANIFEST = "model.json"
"""How to rebuild the module, and its files, in the folder of a model."""

MODEL = f"model/{MANIFEST}"
"""MANIFEST, in the folder of a run."""

RUN = "run.json"
"""The configuration of the run, and fingerprints of its data and code."""

RUN_BEFORE = "record.json"
"""The name of RUN in version 0.1; it is still read."""

SUMMARY = "summary.json"
"""The results of the run."""

TRACE = "trace.jsonl"
"""What chance decided, if anything was chance; engines/trace.py defines its lines."""

WEIGHTS = "weights.pt"
"""The weights at the end of the run, in the folder of MODEL."""
