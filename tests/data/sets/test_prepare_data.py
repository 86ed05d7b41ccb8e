"""`jobs/prepare_data.py` from the command line and a folder to the Parquet files, once and again."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_dataset import CONTENTS, assert_complete, flip_last_byte, idx_labels, job, run, sha256

from sparksgd.data.sets import DATASETS

pytestmark = pytest.mark.usefixtures("tiny_world")


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
