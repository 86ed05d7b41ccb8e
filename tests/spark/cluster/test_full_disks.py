"""What is said of a full disk does not claim whose disk it is."""

from __future__ import annotations

from sparksgd.spark.cluster.failures import advice_of_disk


def test_local_directories_are_one_of_the_places() -> None:
    told = advice_of_disk("java.io.IOException: No space left on device")
    assert told.startswith(". A disk is full. If it is one of Spark's local directories: free some space")
    assert advice_of_disk("java.io.IOException: Broken pipe") == ""
