"""What a Model tells of its training: a history and a summary, as tables that print, also in notebooks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sparksgd.errors import DataError
from sparksgd.runs.json_files import finite, read_json, write_json
from sparksgd.storage import Location
from sparksgd.training.history import COLUMNS, check_history

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TrainingRecord", "is_shown"]

SHOWN = (
    "status",
    "stopped_by",
    "epochs",
    "steps",
    "best_step",
    "train_rows",
    "bad_rows_skipped",
    "rows_per_second",
    "wall_s",
    "engine",
    "num_workers",
    "num_shards",
    "rows_per_step",
    "parameters",
    "parameters_sha256",
    "data_digest",
)
"""What the summary of a Model has of a run's summary."""

_FILE = "training.json"


def is_shown(name: str) -> bool:
    """Return whether the summary of a Model has this of a run's summary."""
    return name in SHOWN or name.startswith("test_")


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """What a Model knows of its training; nothing where it was loaded from the folder of a run."""

    history: Sequence[Mapping[str, Any]] = ()
    """Rows by the names in `sparksgd.training.history.COLUMNS`."""

    summary: Mapping[str, Any] = field(default_factory=dict)
    """Values by the names in SHOWN, and metrics."""

    def history_table(self) -> pd.DataFrame:
        """Return the history, a row for each evaluation and each epoch; NaN where there was no evaluation."""
        import pandas as pd

        def value(row: Mapping[str, Any], name: str) -> Any:
            return math.nan if row.get(name) is None else row[name]

        names = dict.fromkeys([*COLUMNS, *(name for row in self.history for name in row)])
        return pd.DataFrame({name: [value(row, name) for row in self.history] for name in names})

    def summary_table(self) -> pd.DataFrame:
        """Return the summary, a row for each name."""
        import pandas as pd

        return pd.DataFrame({"value": pd.Series(dict(self.summary), dtype=object)})

    def write(self, folder: Location) -> None:
        """Write it to a folder."""
        history = [
            {name: finite(value) if isinstance(value, float) else value for name, value in row.items()}
            for row in self.history
        ]
        write_json(folder / _FILE, {"history": history, "summary": dict(self.summary)})

    @classmethod
    def read(cls, folder: Location) -> TrainingRecord:
        """Read what `write` wrote; a Model of before has none.

        Raises:
            DataError: it is something else.
        """
        where = f"{folder}/{_FILE}"
        if _FILE not in folder.names():
            return cls()
        try:
            values = read_json(folder / _FILE)
            history, told = values["history"], values["summary"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(f"{where} cannot be read: {error}. It may be removed") from error
        check_history(history, f"{where}: history")
        if not isinstance(told, dict) or not all(map(is_shown, told)):
            raise DataError(f"{where}: summary is no summary of a training. The file may be removed")
        return cls(history=history, summary=told)
