"""URIs of Hadoop's file systems, without an import of Spark.

pyspark is imported when the first URI is used, so a job without URIs does not pay for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparksgd.storage import register_uris

if TYPE_CHECKING:
    from sparksgd.spark.hadoop_files import HadoopLocation

__all__ = ["lead_to_hadoop"]


def lead_to_hadoop() -> None:
    """Let Hadoop's file systems handle all URIs except `file:`; call it once in a process."""
    register_uris(_hadoop_location)


def _hadoop_location(uri: str) -> HadoopLocation:
    from sparksgd.spark.hadoop_files import HadoopLocation

    return HadoopLocation(uri)
