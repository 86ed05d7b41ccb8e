"""A model's folder may come from anybody: whose code it runs, and whether it is that of the training."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from manifests import change_manifest
from saved_models import lenet, trained
from scaled import Scaled

import sparksgd
from sparksgd.errors import ConfigError, DataError
from sparksgd.runs.model import load_model

pytestmark = pytest.mark.usefixtures("nobody_is_trusted")


# What it runs


@pytest.mark.parametrize("module", [None, Scaled()])
@pytest.mark.parametrize("key", ["model", "loss"])
def test_a_model_that_names_the_shell_runs_nothing(
    model: Path, tmp_path: Path, key: str, module: torch.nn.Module | None
) -> None:
    ran = tmp_path / "ran"

    def change(about: dict[str, Any]) -> None:
        if key == "loss":
            about["loss"]["name"] = "os:system"
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
    change_manifest(model, lambda about: about["loss"].update(name="torch.nn.functional:l1_loss"))
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
    change_manifest(model, lambda about: about[key].update(name="lending:system", arguments={}))
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
