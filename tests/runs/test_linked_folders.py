"""--out may be a symbolic link: the run's folder is where it leads to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from resumed_jobs import SHORT, Jobs

from sparksgd.errors import ConfigError

OTHER = {"train": {"seed": 6}}


@pytest.mark.parametrize("below", ["", "/nightly"])
def test_a_run_behind_a_link_is_moved_aside_and_the_link_leads_to_the_new_one(
    jobs: Jobs, tmp_path: Path, below: str
) -> None:
    link, folder = tmp_path / "link", tmp_path / "disk"
    folder.mkdir()
    link.symlink_to(folder)
    first = jobs.run(f"{link}{below}", SHORT)
    (tmp_path / f"disk{below}.1").symlink_to("nowhere")  # that name is taken
    for _ in range(2):  # the second time there is nothing to do
        second = jobs.run(f"{link}{below}", SHORT, OTHER, if_exists="archive")
    assert link.is_symlink()
    assert sha256(jobs.run(f"{tmp_path}/disk{below}", SHORT, OTHER)) == sha256(second)
    assert sha256(jobs.run(f"{tmp_path}/disk{below}.2", SHORT)) == sha256(first) != sha256(second)
    assert not (tmp_path / f"disk{below}.3").exists()


def test_a_link_to_a_folder_that_is_not_there_yet_makes_it(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("not/there/yet")
    jobs.run(str(tmp_path / "link"), SHORT)
    assert (tmp_path / "not/there/yet/model/weights.pt").exists()


def test_links_in_a_circle_are_refused(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("back")
    (tmp_path / "back").symlink_to("link")
    with pytest.raises(ConfigError, match=r"link cannot be read: .*; name another folder"):
        jobs.run(str(tmp_path / "link"), SHORT)


def sha256(summary: dict[str, Any]) -> str:
    return str(summary["parameters_sha256"])
