"""Whatever stands in the files of a model, it is loaded, or refused in our words."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from manifests import change_manifest, put
from scaled import Scaled

from sparksgd.errors import DataError
from sparksgd.runs.checked_files import write_checked
from sparksgd.runs.model import SavedModel, load_model
from sparksgd.storage import location

HERE = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("nobody_is_trusted")


def same(one: SavedModel, other: SavedModel) -> bool:
    states = [{name: t.tolist() for name, t in m.module.state_dict().items()} for m in (one, other)]
    return (
        states[0] == states[1]
        and (one.schema, one.loss) == (other.schema, other.loss)
        and one.module.scale == other.module.scale
        and torch.equal(one.module.shift, other.module.shift)
    )


def loaded_or_refused(found: Path, given: bool = False) -> SavedModel | None:
    """Load a model; None if it is refused.  Any other exception is a fault."""
    try:
        return load_model(found, Scaled() if given else None, trust=["scaled"])
    except DataError:
        return None


EACH = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@EACH
@given(data=st.data())
def test_a_flipped_bit_is_noticed_or_has_no_effect(original: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["model.json", "weights.pt", "constants.pt"]))
    content = bytearray((original / name).read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    copy = original.parent / "flipped"
    shutil.copytree(original, copy, dirs_exist_ok=True)
    (copy / name).write_bytes(content)
    found = loaded_or_refused(copy)
    assert found is None or same(found, load_model(original, trust=["scaled"]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    | st.sampled_from([10**15, -5, "object", "ten", "weights.pt", "/dev/zero", "os:system", 2**63, 1e308]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(*path, key) for key, _ in inner] + [p for key, v in inner for p in places(v, (*path, key))]


@EACH
@given(data=st.data())
def test_a_manifest_of_a_stranger_loads_or_is_refused_in_our_words(
    original: Path, tmp_path: Path, data: st.DataObject
) -> None:
    source = data.draw(st.sampled_from([original, HERE / "saved_format_4"]))
    copy = tmp_path / "strange"
    shutil.copytree(source, copy, dirs_exist_ok=True)
    about = json.loads((copy / "model.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(about)))
        inner = about
        for step in path[:-1]:
            inner = inner[step]
        action = data.draw(st.sampled_from(["put", "put", "add", "remove"]))
        if action == "remove":
            del inner[path[-1]]
            if not about:
                break
        elif action == "add" and isinstance(inner, dict):
            inner[data.draw(st.text(max_size=5))] = data.draw(JSON)
        else:
            inner[path[-1]] = data.draw(JSON)
    if source == original:
        change_manifest(copy, lambda old: (old.clear(), old.update(about), old.pop("sha256", None)))
    else:
        (copy / "model.json").write_text(json.dumps(about))
    loaded_or_refused(copy, given=data.draw(st.booleans()))


@EACH
@given(
    values=st.dictionaries(st.sampled_from(["linear.weight", "linear.bias", "shift", "scale", "x.y"]), JSON)
)
def test_values_of_a_stranger_load_or_are_refused_in_our_words(
    original: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    copy = tmp_path / "strange"
    shutil.copytree(original, copy, dirs_exist_ok=True)
    for key, name in (("weights", "weights.pt"), ("constants", "constants.pt")):
        read = torch.load(copy / name, weights_only=True)
        entry = write_checked(location(copy), name, read | values)
        change_manifest(copy, put(key, value=vars(entry)))
        loaded_or_refused(copy)


def test_a_file_that_grows_by_decompression_is_refused_where_memory_is_short(tmp_path: Path) -> None:
    found = Path(shutil.copytree(HERE / "saved_format_4", tmp_path / "model"))
    code = f"""
import resource, sys, zipfile, torch, scaled
from sparksgd.errors import DataError
from sparksgd.runs.model import load_model
with zipfile.ZipFile({str(found / "weights.pt")!r}, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb:
    with bomb.open("archive/data.pkl", "w", force_zip64=True) as member:
        for _ in range(256):
            member.write(bytes(1 << 20))
taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_model({str(found)!r}, trust=["scaled"])
except DataError as error:
    print(error, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - taken, sep="|")
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    said, taken_kib = done.stdout.split("|")
    assert "compressed" in said
    assert int(taken_kib) < 64 << 10
