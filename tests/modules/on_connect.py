"""A process with a server of Spark Connect of its own: what its Models add to rows, as JSON, line by line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import sparksgd
from sparksgd.errors import SparkSGDError
from sparksgd.ml import TorchClassificationModel, TorchClassifier, TorchModel
from sparksgd.spark import connect_files


def main(folder: Path) -> None:
    """Use what lies in a folder, and print one object a line."""
    from pyspark.ml import PipelineModel
    from pyspark.sql import SparkSession

    spark = SparkSession.builder.remote("local[2]").getOrCreate()
    rows = spark.read.parquet(str(folder / "rows"))
    connect_files._SLICE_BYTES = 1000  # several slices a file
    model = TorchClassificationModel.load(str(folder / "model"))
    told("transform", values(model.transform(rows)))
    told("of a run", values(TorchClassificationModel.load(str(folder / "model" / "model")).transform(rows)))
    saved = sparksgd.load_model(folder / "model" / "model")
    told("predict", values(sparksgd.predict(rows, saved, on_bad_row="skip", raw="rawPrediction")))
    people = spark.read.parquet(str(folder / "people"))
    told("pipeline", attempt(lambda: values(PipelineModel.load(str(folder / "pipeline")).transform(people))))
    for what, deed in {
        "fit": lambda: TorchClassifier(module="predicted_modules:mlp").fit(rows),
        "save": lambda: model.save(str(folder / "again")),
        "missing": lambda: TorchClassificationModel.load(str(folder / "nowhere")),
        "other class": lambda: TorchModel.load(str(folder / "model")),
        "not trusted": lambda: TorchClassificationModel.load(str(folder / "of others")),
    }.items():
        told(what, attempt(deed))
    spark.stop()


def values(scored) -> list:
    """Return what was predicted, in the order of the rows' numbers; numbers exactly."""
    found = scored.select("number", "prediction", "probability", "rawPrediction").orderBy("number").collect()
    return [[n, p, *map(list, vectors)] for n, p, *vectors in map(tuple, found)]


def attempt(deed):
    try:
        return deed()
    except SparkSGDError as error:
        return f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"foreign {type(error).__name__}: {error}"


def told(what: str, value) -> None:
    print(json.dumps({what: value}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
