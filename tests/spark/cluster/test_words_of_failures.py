"""What is said of failures: short, from the side that says it, and no more than is known."""

from __future__ import annotations

from sparksgd.spark.cluster.failures import advice_of_disk, gist


def test_local_directories_are_one_of_the_places() -> None:
    told = advice_of_disk("java.io.IOException: No space left on device")
    assert told.startswith(". A disk is full. If it is one of Spark's local directories: free some space")
    assert advice_of_disk("java.io.IOException: Broken pipe") == ""


def test_the_gist_of_a_failure_of_ours_is_how_it_begins() -> None:
    missing = [f"shard {number}: /tmp/{'folder/' * 30}file on a host: No such file" for number in (0, 2)]
    assert gist("; ".join(missing)).startswith("shard 0: /tmp/folder")


def test_the_gist_of_a_long_line_of_java_is_how_it_ends() -> None:
    assert gist(f"java.lang.RuntimeException: {'in a class ' * 50}: it broke").endswith(": it broke")
