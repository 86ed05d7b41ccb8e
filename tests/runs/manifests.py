"""Other model.json files, with the digest of their fields."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparksgd.runs.manifest import write_manifest
from sparksgd.storage import location

Change = Callable[[dict[str, Any]], Any]


def change_manifest(folder: Path, change: Change) -> None:
    """Change the fields of a model.json, as somebody does who knows how its digest is made."""
    about = json.loads((folder / "model.json").read_text())
    about.pop("sha256", None)
    change(about)
    write_manifest(location(folder), about)


def put(*path: Any, value: Any) -> Change:
    def change(about: Any) -> None:
        for step in path[:-1]:
            about = about[step]
        about[path[-1]] = value

    return change
