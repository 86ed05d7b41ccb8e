"""One run for each folder: who writes to a run's folder holds its lease.

The lease is a small file in the folder, .lease-000007.json: which run, on which host, in which process.

- Who has the highest number holds the folder.  To take it over is to create the next number, which only one
  can, and to remove the lower ones after that.
- The holder writes its file anew every 5 s, with a counter.
- A released lease stays, and says that it is released, so that numbers only grow.

Who finds a lease of another looks whether that one has ended: it was released; or its process is gone, on the
same machine; or it is of an earlier attempt of the same application.  Then the folder is taken over at once.
Else its file is watched for 30 s.  If it changes, its holder lives, and the folder is not taken.  Else it is
taken, with a warning.  No clocks of two machines are compared.

A holder that was taken for dead may come back: it was stopped, or cut off from the file system.  So every
change of the folder checks before that the highest number is still one's own (see `Location.guarded`).  A
lease that cannot be renewed is a warning: what counts is whether somebody else has taken the folder.

    two create one number      the file system decides; where it cannot, see `Location.create`, the second
                               replaces the first, which finds that out at its next check
    one is slow to create      its number is no longer the highest: it removes its file, and looks again
    one dies on the way        lower numbers are left over, and mean nothing
    a former holder renews     the same: its number is a lower one
    a file is unreadable       it is watched like another; if it stays as it is, it is taken over
    somebody removes the file  the holder writes it again, unless another run has begun in the folder

Between a check and its change some microseconds pass.  Whoever is stopped just there may append to a file
that was replaced since, or find that its prepared file is gone: a taker removes those.  Only a removal is
still done then.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from errno import EIO
from typing import Literal, NoReturn

from sparksgd.errors import ClusterError, ConfigError, SparkSGDError
from sparksgd.runs.holder import Holder
from sparksgd.storage import LocalLocation, Location, Throttle, unanswered

__all__ = ["IfRunning", "Lease", "remove_leases", "unwritable"]

log = logging.getLogger("sparksgd")

IfRunning = Literal["refuse", "wait"]

_FORMAT = 1
_NAME = re.compile(r"\.lease-([0-9]{6,})\.json")
_MOST_BYTES = 1 << 20
_PART = re.compile(r"\.\.lease-.*\.part")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
"""Between two looks at another's lease: at first it may be one that ends at once."""

_SECONDS_BETWEEN_LINES = 60.0
_SECONDS_BETWEEN_CHECKS = 1.0
"""Where a listing takes long."""

_LONGEST_ANSWER_S = 5.0
"""How long an end waits for a renewal that is not answered."""

_MOST_TRIES = 5


def remove_leases(folder: Location) -> None:
    """Remove the leases of a folder that nobody holds any more, because it was moved."""
    for name in folder.names():
        if _NAME.fullmatch(name):
            (folder / name).remove()


def unwritable(folder: Location, error: OSError, called: str) -> SparkSGDError:
    """Return the error of a folder that results could not go to.

    Args:
        folder: which.
        error: what its file system said.
        called: how errors call the folder.
    """
    refusal = ConfigError(
        f"{called} is {folder}, which cannot be written: {error.strerror}; name another folder"
    )
    return unanswered(error, refusal)


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What the file of a lease says."""

    lease: str
    """Names this lease, and no other one of the same run."""

    holder: Holder
    renewals: int = 0
    released: bool = False

    def to_bytes(self) -> bytes:
        values = {"format": _FORMAT} | asdict(self)
        return (json.dumps(values, indent=2) + "\n").encode()


def _parsed(data: bytes) -> _Record | None:
    """Return what a file says; None if it is no whole lease of this version."""
    try:
        values = json.loads(data)
        if values.pop("format") != _FORMAT:
            return None
        record = _Record(holder=Holder(**values.pop("holder")), **values)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    holder = record.holder
    texts = (record.lease, holder.run_id, holder.host)
    perhaps = (holder.started, holder.boot_id, holder.pid_namespace, holder.application)
    is_whole = (
        all(isinstance(value, str) for value in texts)
        and all(value is None or isinstance(value, str) for value in perhaps)
        and type(holder.pid) is int
        and holder.pid > 0
        and type(record.released) is bool
        and (type(holder.attempt) is int) == (holder.application is not None)
    )
    return record if is_whole else None


@dataclass(frozen=True)
class _Found:
    """The newest lease of a folder; number 0 if there is none."""

    number: int
    data: bytes = b""

    @property
    def record(self) -> _Record | None:
        return _parsed(self.data)

    def __str__(self) -> str:
        record = self.record
        return f"somebody ({_name(self.number)})" if record is None else str(record.holder)

    def end_seen_from(self, here: Holder) -> str | None:
        """Return why nobody holds the folder any more; None if that is not certain."""
        record = self.record
        if self.number == 0 or (record is not None and record.released):
            return "it is released"
        return None if record is None else record.holder.end_seen_from(here)


class _Watch:
    """Says whether a holder lives, from several looks at its file.

    Time counts only as far as it was watched: who was stopped for a minute saw nothing of it.

    Args:
        longest_s: how much the time between two looks may count.
        clock: returns seconds.
    """

    def __init__(self, longest_s: float, clock: Callable[[], float]) -> None:
        self._longest_s, self._clock = longest_s, clock
        self._before: _Found | None = None
        self._looked_s = 0.0
        self.unchanged_s = 0.0

    def saw_renewal(self, found: _Found) -> bool:
        """Take note of a look; return whether the lease was renewed since the look before."""
        before, self._before = self._before, found
        earlier_s, self._looked_s = self._looked_s, self._clock()
        if before == found:
            self.unchanged_s += min(self._looked_s - earlier_s, self._longest_s)
            return False
        self.unchanged_s = 0.0
        return before is not None and before.number == found.number


def _uptime_s() -> float:
    """Return the seconds of a clock that goes on while the machine is suspended, where there is one."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


class Lease:
    """The lease of a run's folder.

    Args:
        folder: the folder; it need not exist.
        holder: who wants it.
        called: how errors call the folder: as the caller's argument or option.
        renew_s: how often it is renewed.
        wait_s: how long a lease that is not renewed is waited for.
        clock: returns seconds.
        sleep: waits for some seconds.
    """

    def __init__(
        self,
        folder: Location,
        holder: Holder,
        *,
        called: str = "out",
        renew_s: float = 5.0,
        wait_s: float = 30.0,
        clock: Callable[[], float] = _uptime_s,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._folder, self._holder, self._called = folder, holder, called
        self._renew_s, self._wait_s = renew_s, wait_s
        self._clock, self._sleep = clock, sleep
        self._pause_s = 0.0 if isinstance(folder, LocalLocation) else _SECONDS_BETWEEN_CHECKS
        self._due_s = 0.0
        self._writing = threading.RLock()
        self._number = 0
        self._record = _Record(lease="", holder=holder)
        self._data = b""
        self._lost: str | None = None

    @contextmanager
    def held(self, if_running: IfRunning = "refuse") -> Iterator[None]:
        """Take the lease, renew it during the block, and release it.

        Raises:
            ConfigError: another run holds it.
            OSError: the folder cannot be read or written.
        """
        self.take(if_running)
        ended = threading.Event()
        try:
            threading.Thread(
                target=self._renew_until, args=[ended], name="sparksgd-lease", daemon=True
            ).start()
            yield
        finally:
            ended.set()
            self.release()

    def take(self, if_running: IfRunning = "refuse") -> None:
        """Take the lease, as soon as it is certain, or 30 s later, that nobody holds it.

        Args:
            if_running: what to do if another run holds it: "wait" for its end, or "refuse".

        Raises:
            ConfigError: another run holds it.
            OSError: the folder cannot be read or written.
        """
        watch = _Watch(self._renew_s, self._clock)
        lines = Throttle(_SECONDS_BETWEEN_LINES, 1.0, self._clock)
        pause_s, tried = _FIRST_PAUSE_S, 0
        while True:
            found = self._newest(tried)
            end = found.end_seen_from(self._holder)
            lives = watch.saw_renewal(found)
            if end is not None or watch.unchanged_s >= self._wait_s:
                if self._succeeds(found):
                    self._folder = self._folder.patient()  # an outage ends no run that has begun
                    self._tell_of(found, end)
                    return
                if tried == found.number + 1:
                    raise OSError(EIO, "a file was not created there, and is not there", _name(tried))
                tried = found.number + 1
            elif lives and if_running == "refuse":
                raise ConfigError(self._refusal(found))
            elif lines.is_due():
                with lines.done():
                    self._tell_of_waiting(found, if_running)
            self._sleep(min(pause_s, self._renew_s))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def check(self) -> None:
        """Check that the folder is still held.

        Raises:
            ClusterError: another run has taken it.
            OSError: it cannot be read.
        """
        if self._lost is not None:
            raise ClusterError(self._lost)
        now_s = self._clock()
        if self._pause_s and now_s < self._due_s:
            return
        self._look()
        self._due_s = now_s + self._pause_s

    def renew(self) -> None:
        """Show that the holder lives; once it was released, do nothing.

        Raises:
            ClusterError: another run has taken it.
            OSError: it cannot be read or written.
        """
        with self._writing:
            if self._number and self._lost is None:
                self._write(replace(self._record, renewals=self._record.renewals + 1))

    def take_along(self) -> None:
        """Write the lease into the empty place of a folder that its holder has just moved away.

        Raises:
            ClusterError: another run was faster.
            OSError: it cannot be written.
        """
        with self._writing:
            file = self._folder / _name(self._number)
            if others := self._others():
                self._lose(max(others))
            if not file.create(self._data):
                self._look()  # it is ours if it was renewed in between
            elif others := self._others():
                file.remove()  # a higher number would end the other run
                self._lose(max(others))

    def release(self) -> None:
        """Let others take the folder; if it was lost, do nothing."""
        if not self._writing.acquire(timeout=_LONGEST_ANSWER_S):
            log.warning("%s does not answer: its lease ends by itself", self._folder)
            return
        try:
            if self._number and self._lost is None:
                self._write(replace(self._record, released=True))
        except ClusterError:
            pass  # it was lost
        except OSError as error:
            log.warning(
                "the lease of %s cannot be released, but ends by itself: %s", self._folder, error.strerror
            )
        finally:
            self._number = 0
            self._lost = self._lost or f"{self._called} is {self._folder}, whose lease was released"
            self._writing.release()

    def _newest(self, tried: int = 0) -> _Found:
        """Return the newest lease of the folder.

        Args:
            tried: a number that is there, even if it is not listed yet, as on NFS.
        """
        for _ in range(_MOST_TRIES):
            numbers = self._numbers()
            highest = max(numbers, default=0)
            if tried > highest:
                data = self._read(tried)
                if data is not None:
                    return _Found(tried, data)
            if highest == 0:
                return _Found(0)
            data = self._read(highest)
            if data is not None:
                return _Found(highest, data)
        return _Found(highest)  # a link to nowhere

    def _numbers(self) -> list[int]:
        found = map(_NAME.fullmatch, self._folder.names())
        return [int(match[1]) for match in found if match and _name(int(match[1])) == match[0]]

    def _read(self, number: int) -> bytes | None:
        try:
            return (self._folder / _name(number)).read_bytes(_MOST_BYTES)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise
            return b""  # no run's: it is watched as one that cannot be read

    def _succeeds(self, found: _Found) -> bool:
        """Create the next lease after one that has ended; return whether nobody else was faster."""
        try:
            return self._create(found.number + 1)
        except OSError:
            if self._newest().number > found.number:  # who was faster removed what we had prepared
                return False
            raise

    def _create(self, number: int) -> bool:
        """Create a lease; return whether it is the newest."""
        record = _Record(lease=uuid.uuid4().hex, holder=self._holder)
        data, file = record.to_bytes(), self._folder / _name(number)
        if not file.create(data):
            return False
        with ExitStack() as unless_newest:
            unless_newest.callback(file.remove)
            if max(self._numbers(), default=0) > number:  # we were slow
                return False
            unless_newest.pop_all()
        self._number, self._record, self._data = number, record, data
        self._lost, self._due_s = None, 0.0
        with suppress(OSError):
            for name in self._folder.names():
                match = _NAME.fullmatch(name)
                if _PART.fullmatch(name) or (match and int(match[1]) < number):
                    (self._folder / name).remove()
        return True

    def _look(self) -> None:
        """Check that the newest lease is ours."""
        newest = max(self._numbers(), default=0)
        if newest <= self._number:
            data = self._read(self._number)
            if data is None:
                self._restore()
                return
            record = None if data == self._data else _parsed(data)
            if data == self._data or (record is not None and record.lease == self._record.lease):
                return
        self._lose(max(newest, self._number))

    def _restore(self) -> None:
        """Write our file again if somebody removed it, unless another run has begun since."""
        with self._writing:
            if self._read(self._number) is not None:  # it was just being renewed
                return
            file, created = self._folder / _name(self._number), False
            if not self._others():
                log.warning("the lease of %s was removed, and is written again", self._folder)
                created = file.create(self._data)
            others = self._others()
            if created and not others:
                return
            if created:
                file.remove()
            self._lose(max(others, default=self._number))

    def _others(self) -> list[int]:
        return [number for number in self._numbers() if number != self._number]

    def _lose(self, newest: int) -> NoReturn:
        found = _Found(newest, self._read(newest) or b"")
        self._lost = (
            f"{self._called} is {self._folder}, but {found} holds it now. This run, {self._holder.run_id}, "
            f"was stopped or cut off for so long that it was taken for dead, and writes nothing more there: "
            f"let the other one end, or start this one again with another folder"
        )
        raise ClusterError(self._lost)

    def _write(self, record: _Record) -> None:
        """Write our file anew, if it still is the newest."""
        self._record, self._data = record, record.to_bytes()
        (self._folder.guarded(self._look) / _name(self._number)).write_bytes(self._data)

    def _renew_until(self, ended: threading.Event) -> None:
        lines = Throttle(_SECONDS_BETWEEN_LINES, 1.0, self._clock)
        while not ended.wait(self._renew_s):
            try:
                self.renew()
            except ClusterError:
                return  # the next check says so
            except OSError as error:
                if lines.is_due():
                    with lines.done():
                        log.warning(
                            "the lease of %s cannot be renewed now, but training goes on: %s",
                            self._folder,
                            error.strerror,
                        )

    def _refusal(self, found: _Found) -> str:
        moves = ["wait for its end", "name another folder"]
        if self._called.startswith("--"):
            moves.append("pass --if-running wait")
        return (
            f"{self._called} is {self._folder}, but {found} writes to it, and renewed its lease just now: "
            f"{', '.join(moves[:-1])}, or {moves[-1]}"
        )

    def _tell_of(self, found: _Found, end: str | None) -> None:
        """Log whose folder was taken over."""
        record = found.record
        if end is None:
            log.warning(
                "%s was held by %s, which did not renew its lease for %.0f s: it is taken for dead, and its "
                "folder is taken over", self._folder, found, self._wait_s,
            )  # fmt: skip
        elif found.number and record is not None and not record.released:
            log.info("%s was held by %s, but %s: its folder is taken over", self._folder, found, end)

    def _tell_of_waiting(self, found: _Found, if_running: IfRunning) -> None:
        if if_running == "wait":
            log.info("waiting for the end of %s, which holds %s", found, self._folder)
        else:
            log.info(
                "%s is held by %s: waiting up to %.0f s for a sign of life", self._folder, found, self._wait_s
            )


def _name(number: int) -> str:
    return f".lease-{number:06d}.json"
