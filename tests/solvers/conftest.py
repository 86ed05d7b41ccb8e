"""The rows of these tests' trainings."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparksgd.data.local_files import ParquetRows


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> ParquetRows:
    drawn = np.random.default_rng(2)
    x = drawn.standard_normal((61, 3))
    table = pa.table(
        {"x": pa.array(x.tolist(), pa.list_(pa.float32())), "y": (x @ [1.0, -2.0, 0.5]).tolist()}
    )
    file = tmp_path_factory.mktemp("rows") / "rows.parquet"
    pq.write_table(table, file)
    return ParquetRows(str(file))
