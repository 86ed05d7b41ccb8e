"""One folder for the checkpoints of many runs: no two processes write to the subfolder of one run."""

from __future__ import annotations

import errno
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any

import pytest
import torch
from two_workers import rows_of

import sparksgd
from sparksgd.errors import ClusterError, ConfigError, DataError
from sparksgd.runs.lease import Lease
from sparksgd.training.state import Observer, Training

CONFIG = {
    "model": {"name": "torch.nn:Linear", "in_features": 4, "out_features": 1},
    "data": {"features": "x", "label": "y"},
    "loss": {"name": "squared_error"},
    "engine": {"name": "inline"},
    "train": {"rows_per_step": 12, "num_shards": 4, "epochs": 2},
}


def trained(
    folder: Path,
    observers: tuple[Observer, ...] = (),
    *,
    lr: float = 0.05,
    epochs: int = 2,
    module: Any = None,
) -> Training:
    if not (folder / "rows").exists():  # written again, it would be other rows
        rows_of(folder / "rows")
    config = CONFIG | {"optimizer": {"lr": lr}, "train": CONFIG["train"] | {"epochs": epochs}}
    return sparksgd.train(
        config, folder / "rows", checkpoint_dir=folder / "all", observers=observers, module=module
    )


class At(Observer):
    """Does something after the second step."""

    def __init__(self, deed: Any) -> None:
        self._deed = deed

    def stepped(self, training: Training, report: Any) -> None:
        if report.step == 2:
            self._deed()


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = Lease.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "renew_s", 0.1)
    monkeypatch.setitem(defaults, "wait_s", 60.0)


def test_the_same_run_at_the_same_time_is_refused(tmp_path: Path) -> None:
    said = []

    def again() -> None:
        with pytest.raises(ConfigError) as refused:
            trained(tmp_path)
        said.append(str(refused.value))

    whole = trained(tmp_path, (At(again),))
    (message,) = said
    assert message.startswith(f"checkpoint_dir is {tmp_path}/all/")
    assert "writes to it, and renewed its lease just now: wait for its end, or name another folder" in message
    assert trained(tmp_path).flat.parameters_sha256() == whole.flat.parameters_sha256()


def test_another_run_at_the_same_time_has_its_own_place(tmp_path: Path) -> None:
    trained(tmp_path, (At(lambda: trained(tmp_path, lr=0.01)),))
    assert len(list((tmp_path / "all").iterdir())) == 2


def test_runs_that_differ_in_their_ends_alone_do_not_meet_and_the_longer_goes_on(tmp_path: Path) -> None:
    made = {epochs: trained(tmp_path, epochs=epochs) for epochs in (2, 4, 1, 3)}
    began = {epochs: [one.step for one in run.resumed] for epochs, run in made.items()}
    assert began == {2: [], 4: [made[2].version], 1: [], 3: [made[2].version]}
    digests = [run.flat.parameters_sha256() for run in made.values()]
    for epochs, digest in zip(made, digests, strict=True):
        assert trained(tmp_path / f"alone {epochs}", epochs=epochs).flat.parameters_sha256() == digest
    trained(tmp_path, (At(lambda: trained(tmp_path, epochs=5)),), epochs=6)


def test_checkpoints_of_another_run_in_a_place_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trained(tmp_path)
    (own,) = (tmp_path / "all").iterdir()
    trained(tmp_path, lr=0.01)
    (other,) = (place for place in (tmp_path / "all").iterdir() if place != own)
    for file in own.glob("checkpoint-*"):
        file.rename(other / file.name)
    again = trained(tmp_path, lr=0.01)
    assert again.flat.parameters_sha256() != whole.flat.parameters_sha256()
    assert "is left out, because it is of another run: optimizer.lr is 0.01, but was 0.05" in caplog.text


def test_other_code_of_a_module_is_another_run(tmp_path: Path) -> None:
    first, other = classes_of("x"), classes_of("-x")
    torch.manual_seed(1)
    trained(tmp_path, module=first(4, 1))
    torch.manual_seed(1)
    assert trained(tmp_path, module=other(4, 1)).resumed == []
    torch.manual_seed(1)
    assert len(trained(tmp_path, module=first(4, 1)).resumed) == 1


def classes_of(given: str) -> Any:
    """Return a class of a notebook, whose forward computes with what is given."""
    place = ModuleType("__main__")
    text = f"""
        class Net(torch.nn.Linear):
            def forward(self, x):
                return super().forward({given})
        """
    vars(place)["torch"] = torch
    exec(dedent(text), vars(place))
    return vars(place)["Net"]


def test_a_run_whose_place_was_taken_writes_nothing_more(tmp_path: Path) -> None:
    """As one that was stopped for a minute, and woken."""

    def take() -> None:
        (place,) = (tmp_path / "all").iterdir()
        (place / ".lease-000009.json").write_bytes((place / ".lease-000001.json").read_bytes())

    with pytest.raises(ClusterError, match="was stopped or cut off for so long that it was taken for dead"):
        trained(tmp_path, (At(take),))
    (place,) = (tmp_path / "all").iterdir()
    assert [file.name for file in place.iterdir() if file.name.startswith("checkpoint")] == []


def test_a_finished_run_is_read_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Lease, "_create", refuse)
    assert trained(tmp_path).flat.parameters_sha256() == whole.flat.parameters_sha256()
    with pytest.raises(ConfigError, match=r"^checkpoint_dir is .*, which cannot be written: Read-only"):
        trained(tmp_path, lr=0.01)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "all").write_text("no folder")
    with pytest.raises(ConfigError, match=r"^checkpoint_dir is .*, which cannot be written: Not a directory"):
        trained(tmp_path)


@pytest.mark.parametrize("damaged", ["*.json", "*.solver.pt"])
@pytest.mark.parametrize(
    ("how", "anew"),
    [
        ("checkpoint_dir", "or train anew with another checkpoint_dir, or with none"),
        ("resume_from", "or train anew without resume_from"),
    ],
)
def test_where_none_is_whole_the_caller_is_told_its_own_way_out(
    tmp_path: Path, damaged: str, how: str, anew: str
) -> None:
    rows_of(tmp_path / "rows")
    place = tmp_path / "all"
    before: dict[str, Any] = {"checkpoint_dir": place} if how == "checkpoint_dir" else {"out": place}
    again = {how: place} | ({} if how == "checkpoint_dir" else {"out": tmp_path / "new"})
    sparksgd.train(CONFIG, tmp_path / "rows", **before)
    for file in place.rglob(f"checkpoint-{damaged}"):
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match=rf"has no whole checkpoint: .* {anew}") as refused:
        sparksgd.train(CONFIG, tmp_path / "rows", **again)
    assert "--" not in str(refused.value)
