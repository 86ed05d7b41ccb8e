"""The digest of code changes with any file that the code is made of, and with no other."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

from sparksgd.imports import sources
from sparksgd.imports.sources import code_digest

PACKAGE = {
    "nets/__init__.py": "from nets import config\n",
    "nets/config.py": "import os\nWIDTH = 4\n",
    "nets/layers.py": "from . import parts\nfrom .deep.inner import thing\n",
    "nets/parts.py": "from nets import layers  # a circle\n",
    "nets/deep/__init__.py": "",
    "nets/deep/inner.py": "from ..late import other\nimport helper.inside\nthing = 1\n",
    "nets/late.py": "def other():\n    import lonely\n",
    "nets/unused.py": "NOTHING = 0\n",
    "nets/model.py": "import torch\nfrom .layers import thing\nclass Net: pass\n",
    "helper/__init__.py": "",
    "helper/inside.py": "HELP = 1\n",
    "lonely.py": "import sys\n",
    "stranger.py": "ELSE = 1\n",
}
OF_IT = {name for name in PACKAGE if name not in ("nets/unused.py", "stranger.py")}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder on the path, with a package and files beside it."""
    return laid(tmp_path / "here", monkeypatch)


def laid(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in PACKAGE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.mark.parametrize("name", sorted(PACKAGE))
def test_the_digest_changes_with_what_the_module_imports_of_its_package_and_folder(
    folder: Path, name: str
) -> None:
    before = code_digest("nets.model:Net")
    assert before is not None
    assert code_digest("nets.model:Net") == before
    (folder / name).write_text(PACKAGE[name] + "CHANGED = 1\n")
    assert (code_digest("nets.model:Net") != before) == (name in OF_IT)


def test_nothing_is_imported(folder: Path) -> None:
    (folder / "nets/__init__.py").write_text("raise SystemExit\n")
    assert code_digest("nets.model:Net") is not None
    assert not {"nets", "helper", "lonely"} & set(sys.modules)


def test_the_same_files_have_the_same_digest_elsewhere_and_in_a_zip_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = code_digest("nets.model:Net")
    laid(tmp_path / "elsewhere", monkeypatch)
    assert code_digest("nets.model:Net") == first
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as packed:
        for name, text in PACKAGE.items():
            packed.writestr(name, text.replace("\n", "\r\n"))
    monkeypatch.syspath_prepend(tmp_path / "packed.zip")
    assert code_digest("nets.model:Net") == first
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as packed:
        for name, text in PACKAGE.items():
            packed.writestr(name, text + "X = 1\n" if name == "nets/late.py" else text)
    monkeypatch.syspath_prepend(tmp_path / "other.zip")
    assert code_digest("nets.model:Net") not in (first, None)


def test_another_package_of_the_same_name_has_another_digest(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = code_digest("nets.model:Net")
    other = laid(tmp_path / "other", monkeypatch)
    (other / "nets/model.py").write_text("class Net: pass\n")
    assert code_digest("nets.model:Net") != first


def test_a_single_file_has_what_lies_beside_it(folder: Path) -> None:
    before = code_digest("lonely:sys")
    (folder / "lonely.py").write_text("import stranger\n")
    beside = code_digest("lonely:sys")
    (folder / "stranger.py").write_text("ELSE = 2\n")
    assert len({before, beside, code_digest("lonely:sys")}) == 3


def test_folders_without_an_init_are_followed(folder: Path) -> None:
    (folder / "space/inner").mkdir(parents=True)
    (folder / "space/inner/net.py").write_text("from space.inner import near\nfrom ..far import x\n")
    (folder / "space/inner/near.py").write_text("A = 1\n")
    (folder / "space/far.py").write_text("x = 1\n")
    digests = [code_digest("space.inner.net:Net")]
    (folder / "space/inner/near.py").write_text("A = 2\n")
    digests.append(code_digest("space.inner.net:Net"))
    (folder / "space/far.py").write_text("x = 2\n")
    digests.append(code_digest("space.inner.net:Net"))
    assert len(set(digests)) == 3
    assert None not in digests


def test_what_is_installed_beside_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = laid(tmp_path / "site-packages", monkeypatch)
    before = code_digest("nets.model:Net")
    (installed / "helper/inside.py").write_text("HELP = 2\n")
    assert code_digest("nets.model:Net") == before
    (installed / "nets/late.py").write_text("")
    assert code_digest("nets.model:Net") != before


def test_sparksgd_beside_is_not_followed(folder: Path) -> None:
    (folder / "sparksgd").mkdir()
    (folder / "sparksgd/__init__.py").write_text("")
    (folder / "lonely.py").write_text("import sparksgd\n")
    before = code_digest("lonely:sparksgd")
    (folder / "sparksgd/__init__.py").write_text("CHANGED = 1\n")
    assert code_digest("lonely:sparksgd") == before is not None


def test_a_file_that_is_no_python_counts_but_leads_nowhere(folder: Path) -> None:
    before = code_digest("nets.model:Net")
    (folder / "nets/late.py").write_text("import lonely; this is no Python\n")
    broken = code_digest("nets.model:Net")
    (folder / "lonely.py").write_text("X = 2\n")
    assert code_digest("nets.model:Net") == broken != before


@pytest.mark.parametrize(
    ("text", "is_run"),
    [
        ("if TYPE_CHECKING:\n    import stranger\n", False),
        ("if typing.TYPE_CHECKING:\n    import stranger\n", False),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import stranger\n", True),
        ("if not TYPE_CHECKING:\n    import stranger\n", True),
        ("if os.environ or TYPE_CHECKING:\n    import stranger\n", True),
        ("if NOT_TYPE_CHECKING:\n    import stranger\n", True),
    ],
)
def test_imports_for_types_alone_lead_nowhere(folder: Path, text: str, is_run: bool) -> None:
    (folder / "lonely.py").write_text(f"import os, typing\nfrom typing import TYPE_CHECKING\n{text}")
    before = code_digest("lonely:x")
    (folder / "stranger.py").write_text("ELSE = 2\n")
    assert (code_digest("lonely:x") != before) == is_run


def test_a_package_with_very_much_source_is_followed_no_further(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_MOST_CHARACTERS", 1)
    before = code_digest("nets.model:Net")
    (folder / "nets/late.py").write_text("")
    assert code_digest("nets.model:Net") == before
    (folder / "nets/model.py").write_text("")
    assert code_digest("nets.model:Net") != before


@pytest.mark.parametrize(
    "name", [None, "lenet", "nowhere.at_all:x", "nets.nowhere:x", "__main__:Net", "os..path:x", ":x", "sys:x"]
)
def test_where_there_is_no_source_there_is_no_digest(folder: Path, name: str | None) -> None:
    assert code_digest(name) is None
