"""Each field of model.json and each saved value is checked, also in earlier formats, and refused by name."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from manifests import Change, change_manifest, put
from saved_models import lenet

from sparksgd.errors import DataError
from sparksgd.runs.checked_files import write_checked
from sparksgd.runs.model import load_model
from sparksgd.storage import location

HERE = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("nobody_is_trusted")


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
        (put("label", "num_labels", value=0), r"label\.num_labels is 0, but must be a whole number from 1"),
        (put("label", "num_labels", value=2**30), "a row would have 4,294,967,304 bytes, but may have"),
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
        (put("loss", value=5), "loss is 5, but must be a table"),
        (put("loss", "name", value=5), r"loss\.name is 5, but must be a text"),
        (put("loss", "kind", value="class"), r"loss\.kind is 'class', but must be one of classes, binary"),
        (put("loss", "arguments", value=[]), r"loss\.arguments is a list, but must be a table"),
        (put("loss", "more", value=1), r"loss has the unknown field 'more'"),
        (put("outputs", value=None), "outputs is None, but must be a list"),
        (put("outputs", 0, "length", value=-1), r"outputs\[0\]\.length is -1, but must be a whole number"),
        (put("outputs", 0, "dtype", value="int64"), r"outputs\[0\]\.dtype is 'int64', but must be one of f"),
        (put("outputs", 0, "name", value=5), r"outputs\[0\]\.name is 5, but must be a text"),
        (put("outputs", 0, "more", value=5), r"outputs\[0\] has the unknown field 'more'"),
        (lambda about: about["outputs"].append(about["outputs"][0]), "outputs has the names .*be another"),
        (put("code", value={"x": "y"}), "code is a dict, but must be a table of digests"),
        (put("differs", value=5), "differs is 5, but must be a text"),
        (put("parameters_sha256", value="0"), "parameters_sha256 is '0', but must be 64 hexadecimal digits"),
        (put("weights", value="weights.pt"), "weights is 'weights.pt', but must have name, size_bytes"),
        (put("weights", value=None), "weights is None, but must be a file"),
        (put("weights", "name", value="/dev/zero"), r"weights\.name is '/dev/zero', but must be the name"),
        (put("constants", "name", value="../x.pt"), r"constants\.name is '\.\./x\.pt', but must be"),
        (put("format", value=9), "it is of format 9, but this version reads 2, 3, 4, 5, 6, 7 and 8"),
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
        ("[" * 60_000, "it has values within values, too deep to be read"),
        ('{"format": 8, "format": 8}', "it has a key twice"),
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
