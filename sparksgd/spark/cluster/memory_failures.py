"""What a failure of Spark says of memory: whose was too small, and what gives it more."""

from __future__ import annotations

import re

__all__ = ["out_of_memory"]

_JAVA = re.compile(r"java\.lang\.OutOfMemoryError(?:: ([^\n]*\S))?")
_EXITED = re.compile(
    r"(?:[Ee]xited with|exit) (?:a non-zero exit )?code 52\b|exit status: 52\b"
)  # Spark's executor, after an OutOfMemoryError
_KILLED = re.compile(r"OOMKilled|exceeding (?:physical |virtual )?memory limits[^\n]*")
_PYTHON = re.compile(
    r"^(?:numpy\.[\w.]*)?(?:_Array)?MemoryError\b[^\n]*"
    r"|[^\n]*(?:can't allocate memory|Cannot allocate memory|std::bad_alloc)[^\n]*",
    re.MULTILINE,
)
_OURS = re.compile(r"sparksgd\.errors\.OutOfMemory: (.+?)\s*(?:\n\s*at org\.apache\.|\Z)", re.DOTALL)
_LOST_TASK = re.compile(r"Lost task [\d.]+ in stage [\d.]+ \(TID \d+\) \((\S+) executor (\w+)\)")
_BARRIER_TASK = re.compile(r"barrier task \w+\([\d, ]+\) finished unsuccessfully")
_HEAP = re.compile(r"heap space|GC overhead|array size|^$")

_BESIDE_THE_HEAP = (
    "Python and torch live beside the heap: raise spark.executor.memoryOverhead (and "
    "spark.executor.pyspark.memory, if it is set), give each executor fewer cores, or lower "
    "train.rows_per_backward"
)


def out_of_memory(text: str, *, is_local: bool = False) -> str | None:
    """Return whose memory was too small, and the next move, if that is what a failure says; else None.

    Args:
        text: of the exception, with the stack traces in it.
        is_local: whether tasks run in the driver's JVM.
    """
    if ours := _OURS.search(text):
        return ours[1]
    task = _LOST_TASK.search(text)
    at_executor = not is_local and (task is not None or _BARRIER_TASK.search(text) is not None)
    whose = "an executor" if at_executor else "the driver"
    if task is not None and at_executor:
        whose = f"executor {task[2]} on {task[1]}"
    if killed := _KILLED.search(text):
        return f"{whose if at_executor else 'an executor'} was killed for its memory ({killed[0]}). " + (
            _BESIDE_THE_HEAP
        )
    if java := _JAVA.search(text):
        reason = java[1] or ""
        if not _HEAP.search(reason):
            return (
                f"the JVM of {whose} found no memory outside its heap: {reason}. Leave the machine or the "
                f"container more beside the heap: a smaller --driver-memory or --executor-memory, or "
                f"spark.driver.memoryOverhead and spark.executor.memoryOverhead"
            )
        option = "--executor-memory" if at_executor else "--driver-memory"
        return (
            f"the heap of {whose} is too small ({reason or 'out of memory'}): submit with a larger {option}"
        )
    if _EXITED.search(text):
        return (
            f"the heap of {whose if at_executor else 'an executor'} is too small (it ended with status 52): "
            f"submit with a larger --executor-memory"
        )
    if python := _PYTHON.search(text):
        return f"a Python worker of {whose} found no memory: {python[0].strip()}. {_BESIDE_THE_HEAP}"
    return None
