"""Public data sets in the IDX format, fetched, verified and written as Parquet.

    idx        reads the format
    registry   the data sets known by name, with their SHA-256
    sources    a folder, a mirror or npm: where the files come from
    parquet    from the verified files to train.parquet and test.parquet

Nothing here needs torch or pyspark.
"""

from sparksgd.data.sets.idx import read_idx
from sparksgd.data.sets.parquet import prepare
from sparksgd.data.sets.registry import DATASETS, Dataset, IdxFile, Split, find_dataset

__all__ = ["DATASETS", "Dataset", "IdxFile", "Split", "find_dataset", "prepare", "read_idx"]
