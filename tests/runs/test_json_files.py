"""The JSON of a run's folder is read in memory that its length bounds, and is never written too long."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import nn

from sparksgd.errors import DataError
from sparksgd.runs import json_files
from sparksgd.runs.json_files import read_json, write_json
from sparksgd.storage import location
from sparksgd.storage.json_text import parsed
from sparksgd.training.composition import structure
from sparksgd.training.torch_parts import described_parts

MIB = 1 << 20


@dataclass(frozen=True)
class Peak:
    """Bytes that Python took at most."""

    bytes: int
    refused: bool


def peak_of(text: bytes) -> Peak:
    tracemalloc.start()
    try:
        parsed(text)
        return Peak(tracemalloc.get_traced_memory()[1], refused=False)
    except ValueError:
        return Peak(tracemalloc.get_traced_memory()[1], refused=True)
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def valid() -> bytes:
    """Return what a model.json says of a module of 1,400 tensors."""

    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.ReLU())

    module = nn.Sequential(*[block() for _ in range(200)])
    about = {"structure": structure(module), "parts": described_parts(module)}
    return json.dumps(about, indent=2).encode()


def test_what_a_run_writes_is_far_from_the_bounds(valid: bytes) -> None:
    assert not peak_of(valid).refused
    assert len(valid) < 470_000  # so 16 MiB are enough for 50,000 tensors
    assert valid.count(b"[") + valid.count(b"{") < len(valid) / 50
    assert valid.count(b":") < len(valid) / 25


@pytest.mark.parametrize("each", [b"[],", b"{},", b'{"":0},', b'{"":[]},', b'[{"a":""}],'])
def test_more_lists_and_tables_than_a_text_may_have_are_refused(each: bytes) -> None:
    text = b"[" + each * (MIB // len(each)) + b"0]"
    with pytest.raises(ValueError, match=r"it has [\d,]+ lists and tables, but a text of .* may have 131,07"):
        parsed(text)
    assert peak_of(text).bytes < MIB


def test_more_keys_than_a_text_may_have_are_refused() -> None:
    text = b"{" + b",".join(b'"%x":1' % number for number in range(200_000)) + b"}"
    with pytest.raises(ValueError, match=r"it has 200,000 keys, but .* may have"):
        parsed(text)


@pytest.mark.parametrize("text", [":" * 300_000, '"[' * 200_000 + "\\", "{}" * 200_000])
def test_texts_may_hold_what_lists_and_keys_are_written_with(text: str, tmp_path: Path) -> None:
    file = location(tmp_path / "file.json")
    write_json(file, {"vocabulary": text, "[": {":": text}})
    assert read_json(file) == {"vocabulary": text, "[": {":": text}}


@pytest.mark.parametrize("each", [b'[        "abcd"],', b'{"":0,"a":1        },', b'{"":""         },'])
def test_as_many_as_it_may_have_take_three_times_what_a_run_writes_takes(valid: bytes, each: bytes) -> None:
    ordinary = peak_of(valid).bytes / len(valid)
    text = b"[" + each * (MIB // 2 // len(each)) + b"0]"
    found = peak_of(text)
    assert not found.refused
    assert found.bytes < 3 * ordinary * len(text) + 2 * MIB


def test_what_could_not_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "_MOST_BYTES", 100)
    file = location(tmp_path) / "run.json"
    write_json(file, {"a": "x" * 80})
    assert read_json(file) == {"a": "x" * 80}
    with pytest.raises(DataError, match=r"run\.json would have 104 bytes, but may have 100 at most"):
        write_json(file, {"a": "x" * 90})
    assert read_json(file) == {"a": "x" * 80}
