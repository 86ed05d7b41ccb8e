"""What jobs/predict.py does: add a saved model's predictions to a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from sparksgd.config import EngineConfig, TrainConfig
from sparksgd.runs.model import load_model

if TYPE_CHECKING:
    from sparksgd.spark.predicted_tables import PredictionJob

__all__ = ["run_prediction"]


def run_prediction(
    folder: str, asked: PredictionJob, trust: tuple[str, ...] = (), *, strict: bool = False
) -> None:
    """Write the rows of a table with the predictions of a saved model.

    Args:
        folder: the folder model/ of a run, a path or URI.
        asked: rows and output.
        trust: packages whose code may run, if the model names it.
        strict: refuse a model whose code is not that of the training.

    Raises:
        SparkSGDError: see errors.py.
    """
    from sparksgd.spark.cluster.cluster import job_on
    from sparksgd.spark.predicted_tables import refuse_scattered, write_predictions
    from sparksgd.spark.session import job_session, refuse_lost_output

    if not asked.out_is_table:
        refuse_lost_output(asked.out, "--out")
    model = load_model(folder, trust=trust, strict=strict)
    patience_s = EngineConfig().slots_timeout_s
    with job_session(f"sparksgd predictions of {folder}", TrainConfig(), patience_s) as session:
        refuse_scattered(session, asked)
        with job_on(session):
            rows = write_predictions(session, model, asked)
    Console().print(f"[bold]{rows:,}[/] rows with predictions -> {asked.out}", soft_wrap=True)
