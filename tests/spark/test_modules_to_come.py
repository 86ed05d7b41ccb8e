"""Which Python modules a session that is not started yet puts on the path."""

from __future__ import annotations

import pytest
from pyspark import SparkContext

from sparksgd.spark import session


@pytest.mark.parametrize(
    ("files", "py_files", "is_submitted", "comes"),
    [
        ("", "", True, False),
        ("hdfs:///lib/nets.py", "", True, True),
        ("nets.cpython-311-x86_64-linux-gnu.so", "", True, True),
        ("/tmp/netsize.py,other.json", "", True, False),
        ("/tmp/lib.zip", "/tmp/lib.zip", True, False),  # spark-submit has put it on the path
        ("", "/tmp/lib.zip", False, True),
        ("", "s3a://b/nets.py#nets.py", False, True),
    ],
)
def test_modules_of_files(
    monkeypatch: pytest.MonkeyPatch, files: str, py_files: str, is_submitted: bool, comes: bool
) -> None:
    settings = {"spark.files": files, "spark.submit.pyFiles": py_files}
    monkeypatch.setattr(session, "SparkConf", lambda: settings)
    monkeypatch.setattr(SparkContext, "_active_spark_context", None)
    monkeypatch.setattr(SparkContext, "_ensure_initialized", lambda: None)
    monkeypatch.delenv("PYSPARK_GATEWAY_PORT", raising=False)
    if is_submitted:
        monkeypatch.setenv("PYSPARK_GATEWAY_PORT", "1")
    assert session.may_bring("nets.deep") is comes
    monkeypatch.setattr(SparkContext, "_active_spark_context", object())
    assert not session.may_bring("nets.deep")  # the path has all that comes
