"""Whether a session that is not started yet brings files."""

from __future__ import annotations

import pytest
from pyspark import SparkContext

from sparksgd.spark import session


@pytest.mark.parametrize(
    ("files", "py_files", "archives", "is_submitted", "are_brought"),
    [
        ("", "", "", True, False),
        ("", "", "file:///tmp/code.tar.gz#mylib", True, True),
        ("", "", "file:///tmp/environment.tar.gz#environment", True, False),
        ("", "", "file:///tmp/environment.tar.gz#environment,hdfs:///code.zip#mylib", True, True),
        ("hdfs:///lib/nets.py", "", "", True, True),
        ("/tmp/classes.json", "", "", True, True),  # code may read it when it is imported
        ("file:///tmp/lib.zip", "/tmp/lib.zip", "", True, False),  # spark-submit has put it on the path
        ("file:///tmp/nets.py,file:///tmp/lib.zip", "/tmp/lib.zip", "", True, True),
        ("", "/tmp/lib.zip", "", False, True),
        ("", "s3a://b/nets.py#nets.py", "", False, True),
        ("", "", "", False, False),
    ],
)
def test_files_of_a_session(
    monkeypatch: pytest.MonkeyPatch,
    files: str,
    py_files: str,
    archives: str,
    is_submitted: bool,
    are_brought: bool,
) -> None:
    settings = {"spark.files": files, "spark.submit.pyFiles": py_files, "spark.archives": archives}
    monkeypatch.setattr(session, "SparkConf", lambda: settings)
    monkeypatch.setattr(SparkContext, "_active_spark_context", None)
    monkeypatch.setattr(SparkContext, "_ensure_initialized", lambda: None)
    monkeypatch.delenv("PYSPARK_GATEWAY_PORT", raising=False)
    if is_submitted:
        monkeypatch.setenv("PYSPARK_GATEWAY_PORT", "1")
    assert session.brings_files() is are_brought
    monkeypatch.setattr(SparkContext, "_active_spark_context", object())
    assert not session.brings_files()  # they are there
