"""A model's folder may come from anybody: it runs nothing that is not trusted, and is not believed."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from manifests import change_manifest
from scaled import Scaled

import sparksgd
from sparksgd.errors import ConfigError, DataError
from sparksgd.imports import trust
from sparksgd.runs.checked_files import write_checked
from sparksgd.runs.model import SavedModel, load_model
from sparksgd.storage import location

HERE = Path(__file__).parent
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(autouse=True)
def nobody_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_of_process", set())
    monkeypatch.delenv("SPARKSGD_TRUST", raising=False)


def trained(folder: Path, observers: Sequence[sparksgd.Observer] = (), **tables: Any) -> Path:
    """Train a small module of two features, and return the folder of its model."""
    folder.mkdir(parents=True, exist_ok=True)
    x = np.linspace(-1, 1, 16).reshape(8, 2)
    pq.write_table(
        pa.table({"x": pa.array(x.tolist(), pa.list_(pa.float32())), "y": x.sum(1)}), folder / "rows.parquet"
    )
    config = {
        "data": {"features": "x", "label": "y"},
        "model": {"name": "scaled:Scaled", "scale": 0.5},
        "loss": {"name": "squared_error"},
        "train": {"rows_per_step": 4, "num_shards": 1, "seed": 7},
        "engine": {"name": "inline"},
    }
    sparksgd.train(config | tables, str(folder / "rows.parquet"), out=folder / "run", observers=observers)
    return folder / "run" / "model"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """Return a copy of a model."""
    return Path(shutil.copytree(original, tmp_path / "model"))


# What it runs


@pytest.mark.parametrize("module", [None, Scaled()])
@pytest.mark.parametrize("key", ["model", "loss"])
def test_a_model_that_names_the_shell_runs_nothing(
    model: Path, tmp_path: Path, key: str, module: torch.nn.Module | None
) -> None:
    ran = tmp_path / "ran"

    def change(about: dict[str, Any]) -> None:
        if key == "loss":
            about["loss"] = "os:system"
        else:
            about["model"] = {"name": "os:system", "arguments": {"command": f"touch {ran}"}}

    change_manifest(model, change)
    if key == "model" and module is not None:
        load_model(model, module)  # its name is not used
    else:
        with pytest.raises(DataError, match=rf"{key}\.name is 'os:system', but os is not trusted"):
            load_model(model, module, trust=["scaled"])
    assert not ran.exists()


def test_a_model_of_a_trusted_package_is_loaded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"model.name is 'scaled:Scaled', but scaled is not trusted"):
        load_model(model)
    loaded = load_model(model, trust=["scaled"]).module
    assert (type(loaded), loaded.scale) == (Scaled, 0.5)
    assert isinstance(load_model(model, Scaled()).module, Scaled)
    monkeypatch.setenv("SPARKSGD_TRUST", "scaled")
    assert isinstance(load_model(model).module, Scaled)
    monkeypatch.delenv("SPARKSGD_TRUST")
    sparksgd.trust("scaled")
    assert isinstance(load_model(model).module, Scaled)


def test_a_loss_of_one_s_own_needs_trust_also_beside_a_module_given(model: Path) -> None:
    change_manifest(model, lambda about: about.update(loss="torch.nn.functional:l1_loss"))
    with pytest.raises(DataError, match=r"loss.name is 'torch.nn.functional:l1_loss', but torch.nn"):
        load_model(model, Scaled(), trust=["scaled"])
    loaded = load_model(model, Scaled(), trust=["torch.nn.functional"])
    assert loaded.loss is torch.nn.functional.l1_loss


@pytest.mark.parametrize("key", ["model", "loss"])
def test_a_trusted_package_lends_nobody_else_s_code(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    (tmp_path / "lending.py").write_text("from os import system\n")
    monkeypatch.syspath_prepend(tmp_path)
    lent = {"model": {"name": "lending:system", "arguments": {}}, "loss": "lending:system"}
    change_manifest(model, lambda about: about.update({key: lent[key]}))
    with pytest.raises(DataError, match=rf"{key}\.name is 'lending:system', but that is code of posix"):
        load_model(model, trust=["lending", "scaled"])


def test_nothing_is_read_before_it_is_known_whom_the_caller_trusts(model: Path) -> None:
    (model / "weights.pt").unlink()
    with pytest.raises(DataError, match="scaled is not trusted"):
        load_model(model)


def test_trust_is_a_list(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"trust is 'scaled', but must be a list .*trust=\['mymodels'\]"):
        load_model(model, trust="scaled")


# Whether its code is that of the training


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Return the folder of a package with a model and a loss, and a model that was trained with it."""
    package = tmp_path / "code" / "measured"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text(
        "import torch\nfrom .parts import width\ndef net():\n    return torch.nn.Linear(2, width)\n"
    )
    (package / "parts.py").write_text("width = 1\n")
    (package / "losses.py").write_text("def l2(output, label):\n    return (output[:, 0] - label).square()\n")
    monkeypatch.syspath_prepend(tmp_path / "code")
    for name in ("measured", "measured.nets", "measured.parts", "measured.losses"):
        monkeypatch.delitem(sys.modules, name, raising=False)  # of the test before
    found = trained(tmp_path, model={"name": "measured.nets:net"}, loss={"name": "measured.losses:l2"})
    return package, found


@pytest.mark.parametrize(
    ("file", "key"), [("nets.py", "model.name"), ("parts.py", "model.name"), ("losses.py", "loss.name")]
)
def test_code_that_was_changed_since_is_told_and_refused_if_one_asks(
    own: tuple[Path, Path], file: str, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    package, found = own
    load_model(found, trust=["measured"], strict=True)
    assert not caplog.records
    with (package / file).open("a") as changed:
        changed.write("# changed\n")
    with caplog.at_level(logging.WARNING):
        load_model(found, trust=["measured"])
    (said,) = [record.getMessage() for record in caplog.records]
    assert f"the code of {key} = 'measured." in said
    assert "is not that of the training: it was changed, or is another package of the same name" in said
    with pytest.raises(DataError, match=rf"the code of {key} = .*, and strict was asked for"):
        load_model(found, trust=["measured"], strict=True)


class Editing(sparksgd.Observer):
    """Changes a file while the run goes on."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def started(self, training: Any) -> None:
        self.file.write_text(self.file.read_text() + "# changed\n")


def test_code_that_was_changed_while_it_ran_is_another_one(own: tuple[Path, Path], tmp_path: Path) -> None:
    package, _ = own
    model = {"name": "measured.nets:net"}
    found = trained(tmp_path / "again", [Editing(package / "parts.py")], model=model)
    with pytest.raises(DataError, match="is not that of the training"):
        load_model(found, trust=["measured"], strict=True)


def test_the_code_of_a_module_that_is_given_is_not_compared(own: tuple[Path, Path]) -> None:
    package, found = own
    (package / "parts.py").unlink()
    load_model(found, torch.nn.Linear(2, 1), trust=["measured"], strict=True)


def test_strict_wants_a_digest_of_code(model: Path) -> None:
    change_manifest(model, lambda about: about.update(code={}))
    load_model(model, trust=["scaled"])
    with pytest.raises(DataError, match=r"has no digest of the code of model.name = 'scaled:Scaled'"):
        load_model(model, trust=["scaled"], strict=True)


def test_our_own_models_need_neither_trust_nor_a_digest(tmp_path: Path) -> None:
    load_model(lenet(tmp_path), strict=True)


# What it says


def lenet(folder: Path) -> Path:
    table = pa.table({"image": pa.array([[0.5] * 16] * 4, pa.list_(pa.float32())), "label": [0, 1, 0, 1]})
    pq.write_table(table, folder / "images.parquet")
    config = {
        "data": {"features": "image"},
        "model": {"maps": [2, 3], "hidden": 4, "classes": 2, "side": 4},
        "train": {"num_shards": 1},
        "engine": {"name": "inline"},
    }
    sparksgd.train(config, str(folder / "images.parquet"), out=folder / "run")
    return folder / "run" / "model"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"hidden": 10**9}, r"hidden.weight is of shape \(4, 3\), but lenet with the arguments"),
        ({"maps": [2, 1_000_000]}, r"conv2.weight is of shape"),
        ({"side": 10**6}, r"hidden.weight is of shape"),
        ({"side": 2**40}, r"side is 1099511627776, but must be a whole number from 1 to"),
        ({"maps": [2]}, r"maps is \[2\], but must be two whole numbers"),
        ({"maps": "23"}, r"maps\[0\] is '2', but must be a whole number"),
        ({"maps": 5}, "maps is 5, but must be two"),
        ({"hidden": True}, "hidden is True, but must be a whole number from 1"),
        ({"classes": -1}, "classes is -1, but"),
        ({"padding": 0.5}, "padding is 0.5, but"),
        ({"dropout": 2}, "dropout is 2, but must be a number from 0 to 1"),
        ({"dropout": float("nan")}, "dropout is nan, but"),
        ({"weights": 5}, "does not take"),
        ({"self": 5}, "does not take"),
    ],
)
def test_arguments_of_our_own_models_are_checked_before_memory_is_taken(
    tmp_path: Path, arguments: dict[str, Any], says: str
) -> None:
    found = lenet(tmp_path)
    change_manifest(found, lambda about: about["model"]["arguments"].update(arguments))
    with pytest.raises(DataError, match=says):
        load_model(found)


def put(*path: Any, value: Any) -> Change:
    def change(about: Any) -> None:
        for step in path[:-1]:
            about = about[step]
        about[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (put("features", 0, "length", value=10**15), r"features\[0\]\.length is 1000000000000000, but must"),
        (put("features", 0, "length", value=-5), r"features\[0\]\.length is -5, but must be a whole"),
        (put("features", 0, "length", value=True), r"features\[0\]\.length is True"),
        (put("features", 0, "length", value=2**30), "a row would have 4,294,967,296 bytes, but may have"),
        (put("features", 0, "dtype", value="object"), "dtype is 'object', but must be one of uint8, int64"),
        (put("features", 0, "dtype", value=["uint8"]), "dtype is a list, but must be one of"),
        (put("features", 0, "name", value=5), r"features\[0\]\.name is 5, but must be a text"),
        (put("features", 0, "name", value="\ud800"), r"features\[0\]\.name is '\\ud800', but must be a text"),
        (put("features", 0, "name", value="y"), "features and label name 'y' twice"),
        (put("features", 0, "more", value=1), r"features\[0\] has the unknown field 'more'"),
        (put("features", 0, value=None), r"features\[0\] is None, but must be a table"),
        (put("features", value=[]), "features is a list, but must be a list"),
        (put("features", value={}), "features is a dict, but must be a list"),
        (put("label", "classes", value="ten"), r"label\.classes is 'ten', but must be a whole number from 1"),
        (put("label", "classes", value=0), r"label\.classes is 0, but"),
        (put("label", "classes", value=10**15), r"label\.classes is 1000000000000000, but"),
        (put("label", "dtype", value="uint8"), r"label\.dtype is 'uint8', but must be one of int64, float32"),
        (put("label", "name", value=None), r"label\.name is None, but must be a text"),
        (put("label", value="y"), "label is 'y', but must be a table"),
        (put("model", "name", value=["x"]), r"model\.name is a list, but must be a name, or null"),
        (put("model", "arguments", value=None), r"model\.arguments is None, but must be a table"),
        (put("seed", value=2**64), "seed is 18446744073709551616, but must be a number of 64 bits"),
        (put("seed", value=7.0), r"seed is 7\.0, but"),
        (put("version", value=-1), "version is -1, but must be a whole number from 0"),
        (put("finished", value="yes"), "finished is 'yes', but must be true or false"),
        (put("structure", value={"": 5}), "structure is a dict, but must be a table of names"),
        (put("loss", value=5), "loss is 5, but must be a name"),
        (put("code", value={"x": "y"}), "code is a dict, but must be a table of digests"),
        (put("differs", value=5), "differs is 5, but must be a text"),
        (put("parameters_sha256", value="0"), "parameters_sha256 is '0', but must be 64 hexadecimal digits"),
        (put("weights", value="weights.pt"), "weights is 'weights.pt', but must have name, size_bytes"),
        (put("weights", value=None), "weights is None, but must be a file"),
        (put("weights", "name", value="/dev/zero"), r"weights\.name is '/dev/zero', but must be the name"),
        (put("constants", "name", value="../x.pt"), r"constants\.name is '\.\./x\.pt', but must be"),
        (put("format", value=6), "it is of format 6, but this version reads 2, 3, 4 and 5"),
        (put("format", value="5"), "format is '5', but must be a whole number"),
        (put("format", value=True), "format is True, but must be a whole number"),
        (put("more", value=1), "the file has the unknown field 'more'"),
        (lambda about: about.pop("seed"), "seed is missing, but must be a number of 64 bits"),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_is_refused_by_file_field_value_and_rule(
    model: Path, change: Change, says: str
) -> None:
    change_manifest(model, change)
    with pytest.raises(DataError, match=rf"model\.json.*: .*{says}"):
        load_model(model, trust=["scaled"])


def test_a_field_that_is_changed_by_hand_is_noticed(model: Path) -> None:
    about = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps(about | {"version": about["version"] + 1}))
    with pytest.raises(DataError, match=r"model\.json is damaged, or was changed by hand"):
        load_model(model, trust=["scaled"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 200_000, "it has values within values, too deep to be read"),
        ('{"format": 5, "format": 5}', "it has a key twice"),
        ("[]", "the file is a list, but must be a table"),
        ("", "is not what a run writes"),
        ('{"format": ' + "9" * 5000 + "}", "is not what a run writes"),
        ("\xff", "is not what a run writes"),
    ],
)
def test_what_is_no_manifest_is_refused(model: Path, text: str, says: str) -> None:
    (model / "model.json").write_bytes(text.encode("latin1"))
    with pytest.raises(DataError, match=says):
        load_model(model)


def test_a_manifest_that_is_no_regular_file_or_is_too_long_is_not_read(model: Path) -> None:
    (model / "model.json").unlink()
    os.mkfifo(model / "model.json")
    with pytest.raises(DataError, match="cannot be read: it is not a regular file"):
        load_model(model)
    (model / "model.json").unlink()
    with (model / "model.json").open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(DataError, match=r"it has 1,099,511,627,776 bytes, but may have 67,108,864"):
        load_model(model)


@pytest.mark.parametrize(
    "path",
    ["forward", "__class__", "_parameters", "training", "linear._buffers", "linear.forward", "no.such"],
)
def test_a_saved_value_takes_the_place_of_no_code(model: Path, path: str) -> None:
    for value in (
        torch.ones(1),
        5,
        {"numpy": "<f4", "shape": [1], "bytes": torch.zeros(4, dtype=torch.uint8)},
    ):
        values = torch.load(model / "constants.pt", weights_only=True) | {path: value}
        entry = write_checked(location(model), "constants.pt", values)
        change_manifest(model, put("constants", value=vars(entry)))
        with pytest.raises(DataError, match=r"is no value of the module|the module has no"):
            load_model(model, trust=["scaled"])


def test_a_saved_list_is_plain(model: Path) -> None:
    for value, says in (
        ({1, 2}, "KeyError"),
        ([b"x", partial(print)], "is no plain value"),
        (print, "no plain"),
    ):
        pickled = torch.frombuffer(bytearray(pickle.dumps(value, 4)), dtype=torch.uint8)
        values = torch.load(model / "constants.pt", weights_only=True)
        entry = write_checked(
            location(model), "constants.pt", values | {"scale": {"plain": True, "bytes": pickled}}
        )
        change_manifest(model, put("constants", value=vars(entry)))
        with pytest.raises(DataError, match=says):
            load_model(model, trust=["scaled"])


# Earlier formats


@pytest.mark.parametrize("number", [2, 3, 4])
def test_earlier_formats_are_still_read(tmp_path: Path, number: int) -> None:
    found = Path(shutil.copytree(HERE / "saved_format_4", tmp_path / "model"))
    about = json.loads((found / "model.json").read_text())
    gone = {4: (), 3: ("structure",), 2: ("structure", "seed", "constants", "constants_sha256")}[number]
    about = {key: value for key, value in about.items() if key not in gone} | {"format": number}
    (found / "model.json").write_text(json.dumps(about))
    loaded = load_model(found, trust=["scaled"]).module
    assert loaded.linear.weight.tolist() == [
        [pytest.approx(0.2703, abs=5e-5), pytest.approx(-0.4317, abs=5e-5)]
    ]
    assert loaded.scale == 0.5
    with pytest.raises(DataError, match="has no digest of the code"):
        load_model(found, trust=["scaled"], strict=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (put("weights", value="/dev/zero"), "weights is '/dev/zero', but must be the name of a file"),
        (put("weights", value=".."), r"weights is '\.\.', but must be the name"),
        (put("constants", value={}), "constants is a dict, but must be the name"),
        (put("state_sha256", value="0" * 64), "weights.pt and model.json are of different runs"),
        (put("state_sha256", value=None), "state_sha256 is None, but must be 64"),
        (lambda about: about.pop("weights"), "weights is missing|weights is None"),
        (put("model", "name", value="os:system"), "os is not trusted"),
    ],
)
def test_earlier_formats_are_not_believed_either(tmp_path: Path, change: Change, says: str) -> None:
    found = Path(shutil.copytree(HERE / "saved_format_4", tmp_path / "model"))
    about = json.loads((found / "model.json").read_text())
    change(about)
    (found / "model.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match=says):
        load_model(found, trust=["scaled"])


# Anything else


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
