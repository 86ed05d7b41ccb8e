"""Why executors were lost.  Spark knows it, but writes it only to its own log."""

from __future__ import annotations

import logging
import re
from typing import Any

from pyspark import SparkConf, SparkContext

__all__ = ["LostExecutors", "advice_of", "memory_advice"]

log = logging.getLogger("sparksgd")

_KILLED_FOR_MEMORY = re.compile(
    r"exceeding (?:physical |virtual )?memory limits\.\s+([\d.]+ [KMGT]B) of ([\d.]+ [KMGT]B)"
)
_LEAST_OVERHEAD_MIB = 1024  # of a Python worker with torch and its batches
_ON_PURPOSE = re.compile(r"decommission|exited with code 0|killed by driver", re.IGNORECASE)


_advice: dict[str, str] = {}
"""For each application; kept after its session ends, because YARN ends it after a few such losses."""


def advice_of(context: SparkContext) -> str | None:
    """Return what to set, if containers of a session were killed for memory."""
    if context._jsc is None:  # somebody stopped it in this process; it no longer knows its settings
        return None
    return _advice.get(str(context.applicationId))


class LostExecutors:
    """Logs lost executors, with the reason, and what to do if it was memory.

    Args:
        context: whose executors.
    """

    def __init__(self, context: SparkContext) -> None:
        self._context = context
        self._known: set[str] = set()
        self.killed_for_memory = 0
        """How many executors of this run were killed for their memory."""

    def forget_earlier(self) -> None:
        """Ignore executors that are lost already: they were lost in earlier runs."""
        self._known = {str(executor.id()) for executor in self._gone()}
        _advice.pop(str(self._context.applicationId), None)

    def look(self) -> None:
        """Warn of executors that were lost since the last look."""
        for executor in self._gone():
            name = str(executor.id())
            if name in self._known:
                continue
            self._known.add(name)
            reason = str(executor.removeReason().get()) if executor.removeReason().isDefined() else "unknown"
            if not _ON_PURPOSE.search(reason):
                advice = memory_advice(self._context.getConf(), reason)
                if advice is not None:
                    self.killed_for_memory += 1
                    _advice[str(self._context.applicationId)] = advice
                log.warning("executor %s on %s is lost: %s", name, executor.hostPort(), advice or reason)

    def _gone(self) -> list[Any]:
        executors = self._context._jsc.sc().statusStore().executorList(False)
        every = (executors.apply(number) for number in range(executors.size()))
        return [executor for executor in every if not executor.isActive()]


def memory_advice(conf: SparkConf, reason: str) -> str | None:
    """Return what to set if a container was killed for its memory, else None."""
    killed = _KILLED_FOR_MEMORY.search(reason)
    if killed is None:
        return None
    mebibytes: Any = SparkContext._jvm.org.apache.spark.network.util.JavaUtils.byteStringAsMb  # type: ignore[union-attr]  # there is a session
    heap = int(mebibytes(conf.get("spark.executor.memory", "1g")))
    given = conf.get("spark.executor.memoryOverhead", None)
    factor = float(str(conf.get("spark.executor.memoryOverheadFactor", "0.1")))
    overhead = int(mebibytes(given)) if given else max(384, int(heap * factor))
    wanted = max(_LEAST_OVERHEAD_MIB, 2 * overhead)
    return (
        f"its container used {killed[1]} of the {killed[2]} that it may: {heap}m of "
        f"spark.executor.memory and {overhead}m of spark.executor.memoryOverhead, in which Python and torch "
        f"live. Set spark.executor.memoryOverhead={wanted}m"
    )
