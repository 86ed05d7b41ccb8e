"""Every error that sparksgd raises on purpose.

    SparkSGDError
    ├── ConfigError          a key, a value or an argument                          exit 2
    ├── DataError            rows, columns or files that cannot be trained on       exit 2
    │   ├── BadRows          null, non-finite, misshapen or out-of-range rows
    │   └── ShardChanged     rows read again differ from the rows read before
    ├── ModelError           a module, loss or optimiser that cannot be trained     exit 2
    │   └── GradientChanged  a part of a gradient changed after it was sent; then gradients go whole
    ├── TrainingError        the training itself went wrong                         exit 3
    │   ├── NotFinite        a loss or gradient became NaN or infinite
    │   │   └── UpdateNotFinite  an update made a parameter NaN or infinite; the weights before it are good
    │   ├── ReplayDiffers    a replay ended at other parameters than its run
    │   └── UserCodeError    the user's own module, loss or optimiser raised
    ├── ClusterError         Spark could not do what was asked                      exit 4
    │   ├── NotEnoughSlots   fewer free task slots than workers
    │   ├── PeerLost         a worker's connection to another broke; the segment is run again
    │   │   └── PeerSilent   the connection is open, but nothing came in time
    │   └── ShardMissing     files of shards are gone or damaged; they are written again
    ├── OutOfMemory          a process has, or will have, too little memory; never retried  exit 4
    └── Cancelled            somebody cancelled the job                             exit 130

A message names the value, the rule and the next move.  All errors can be pickled: a worker may return one.
"""

from __future__ import annotations

import re

__all__ = [
    "BadRows",
    "Cancelled",
    "ClusterError",
    "ConfigError",
    "DataError",
    "GradientChanged",
    "ModelError",
    "NotEnoughSlots",
    "NotFinite",
    "OutOfMemory",
    "PeerLost",
    "PeerSilent",
    "ReplayDiffers",
    "ShardChanged",
    "ShardMissing",
    "SparkSGDError",
    "TrainingError",
    "UpdateNotFinite",
    "UserCodeError",
]


class SparkSGDError(Exception):
    """Base of the tree; `exit_code` is what a job returns to the shell."""

    exit_code = 3


class ConfigError(SparkSGDError):
    """A configuration key, its value or a command-line argument is refused."""

    exit_code = 2


class DataError(SparkSGDError):
    """The input cannot be trained on."""

    exit_code = 2


class BadRows(DataError):
    """Some rows are null, not finite, misshapen or labelled out of range."""


class ShardChanged(DataError):
    """A shard was rebuilt from other rows than it held before."""


class ModelError(SparkSGDError):
    """The module, loss or optimiser is refused."""

    exit_code = 2


class GradientChanged(ModelError):
    """A part of a gradient changed after it was sent to the other workers: gradients must be sent whole."""


class TrainingError(SparkSGDError):
    """Training began, but could not continue."""


class NotFinite(TrainingError):
    """A loss or a gradient is NaN or infinite: the weights that it was computed from are unusable."""


class UpdateNotFinite(NotFinite):
    """An update made a parameter NaN or infinite, and was undone: the weights before it are good."""


class ReplayDiffers(TrainingError):
    """A replay ended at other parameters than the run that it repeats."""


class UserCodeError(TrainingError):
    """The user's module, loss or optimiser raised; the message has the traceback of the host that ran it."""


class ClusterError(SparkSGDError):
    """Spark could not do what was asked of it."""

    exit_code = 4


class NotEnoughSlots(ClusterError):
    """The cluster offers fewer task slots than there are workers."""


class PeerLost(ClusterError):
    """Another worker, or the driver, has ended, cannot be reached, or sent something unexpected."""


class PeerSilent(PeerLost):
    """Another worker, or the driver, hangs: the connection is open, but nothing came in time."""


class ShardMissing(ClusterError):
    """Files of shards are missing on their worker's host, or damaged: they must be written again."""

    def __init__(self, why: str, shards: tuple[int, ...] = ()) -> None:
        super().__init__(why, shards)
        self.shards = shards

    def __add__(self, other: ShardMissing) -> ShardMissing:
        return ShardMissing(f"{self}; {other}", self.shards + other.shards)

    def __str__(self) -> str:
        return str(self.args[0])


class OutOfMemory(SparkSGDError):
    """A process has too little memory for the run.  A second attempt would have no more: there is none."""

    exit_code = 4

    @classmethod
    def in_python(cls, what: str, error: BaseException) -> OutOfMemory:
        """Return the error of a Python process, driver or worker, in which something found no memory."""
        return cls(
            f"{what} found no memory: {type(error).__name__}: {error}. Lower train.rows_per_backward or "
            f"train.rows_per_step, or give this process more. Python lives beside the heap: an executor's in "
            f"spark.executor.memoryOverhead (and below spark.executor.pyspark.memory, if that is set), the "
            f"driver's in spark.driver.memoryOverhead on YARN and Kubernetes, else in the machine's memory"
        )

    @staticmethod
    def is_behind(error: BaseException) -> bool:
        """Return whether Python, torch or the system raised an exception for want of memory."""
        return isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError | OSError) and _NO_MEMORY.search(str(error)) is not None
        )


_NO_MEMORY = re.compile(r"can't allocate memory|Cannot allocate memory|std::bad_alloc")


class Cancelled(SparkSGDError):
    """The Spark job was cancelled.  That is no fault, so it is never retried."""

    exit_code = 130
