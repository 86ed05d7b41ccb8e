"""A saved model is read back whole, or refused with the reason."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from manifests import change_manifest

from sparksgd.config import Config
from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.inline import InlineEngine
from sparksgd.engines.protocol import StepReport
from sparksgd.errors import ClusterError, ConfigError, DataError, NotFinite
from sparksgd.runs.folder import RunFolder
from sparksgd.runs.holder import Holder
from sparksgd.runs.lease import Lease
from sparksgd.runs.model import load_model
from sparksgd.storage import location
from sparksgd.training.loop import train
from sparksgd.training.state import Observer, Training


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return model/ of a run of a linear regression, y = 2 x."""
    folder = tmp_path_factory.mktemp("run")
    rows = [{"features": [float(x)], "label": 2.0 * x} for x in range(8)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    config = Config.from_dict(
        {
            "model": {"name": "torch.nn:Linear", "in_features": 1, "out_features": 1},
            "loss": {"name": "squared_error"},
            "train": {"num_shards": 2, "rows_per_step": 4},
        }
    )
    train(
        config,
        rows=ParquetRows(str(folder / "rows.parquet")),
        test=None,
        make_engine=InlineEngine,
        observers=[RunFolder(folder)],
    )
    return folder / "model"


def copied(trained: Path, to: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Copy a model, with another model.json."""
    (to / "model.json").write_bytes((trained / "model.json").read_bytes())
    change_manifest(to, change)
    (to / "weights.pt").write_bytes((trained / "weights.pt").read_bytes())
    return to


def test_a_model_is_read_back_as_it_was_saved(trained: Path) -> None:
    model = load_model(trained, trust=["torch.nn"])
    saved = torch.load(trained / "weights.pt", weights_only=True)
    assert {name: t.tolist() for name, t in model.module.state_dict().items()} == {
        name: t.tolist() for name, t in saved.items()
    }
    assert not model.module.training
    assert [(f.name, f.dtype, f.length) for f in model.schema.features] == [("features", "float32", 1)]


def test_a_model_is_loaded_without_what_trains_one() -> None:
    code = "import sys, sparksgd.runs.model; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rooms = ("sparksgd.engines", "sparksgd.solvers", "sparksgd.training.loop", "sparksgd.training.state")
    assert [name for name in done.stdout.split() if name.startswith(rooms)] == []
    assert "sparksgd.training.modules" in done.stdout


def test_a_new_run_removes_the_file_of_the_version_before(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text("{}")
    config = Config.from_dict({"loss": {"name": "squared_error"}, "train": {"num_shards": 1}})
    rows, module = ParquetRows(str(trained.parent / "rows.parquet")), torch.nn.Linear(1, 1)
    observers = [RunFolder(tmp_path, {"data.train": "1"})]
    train(config, rows=rows, test=None, make_engine=InlineEngine, module=module, observers=observers)
    assert not (tmp_path / "record.json").exists()
    assert json.loads((tmp_path / "run.json").read_text())["fingerprints"] == {"data.train": "1"}


@pytest.mark.parametrize("missing", ["model.json", "weights.pt"])
def test_half_a_model_is_refused(trained: Path, tmp_path: Path, missing: str) -> None:
    copied(trained, tmp_path, lambda about: None)
    (tmp_path / missing).unlink()
    with pytest.raises(DataError, match=rf"{missing} cannot be read: No such file"):
        load_model(tmp_path, trust=["torch.nn"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda about: about.update(format=1),
            "is of format 1, but this version reads 2, 3, 4, 5, 6, 7 and 8",
        ),
        (lambda about: about.pop("features"), "features is missing, but must be a list"),
        (lambda about: about["model"]["arguments"].update(out_features=3), "size mismatch"),
        (lambda about: about["model"].update(name="nowhere:Net"), "no module 'nowhere'"),
        (lambda about: about["model"].update(name=None), "pass it as module="),
        (lambda about: about["weights"].update(sha256=64 * "0"), "is not the file that its manifest names"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    trained: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        load_model(copied(trained, tmp_path, change), trust=["torch.nn", "nowhere"])


class Frozen(torch.nn.Module):
    """y = first(x) + second(x), of which only the second is trained."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        self.first.requires_grad_(not frozen)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x)


def test_a_module_that_was_trained_with_a_part_frozen_is_read_into_one_that_is_not(
    trained: Path, tmp_path: Path
) -> None:
    config = Config.from_dict({"loss": {"name": "squared_error"}, "train": {"num_shards": 1}})
    rows, module = ParquetRows(str(trained.parent / "rows.parquet")), Frozen(frozen=True)
    train(
        config, rows=rows, test=None, make_engine=InlineEngine, module=module, observers=[RunFolder(tmp_path)]
    )
    read = load_model(tmp_path / "model", Frozen(frozen=False)).module.state_dict()
    assert {name: t.tolist() for name, t in read.items()} == {
        name: t.tolist() for name, t in module.state_dict().items()
    }


def test_a_run_that_diverges_at_once_leaves_the_weights_that_it_began_with(
    trained: Path, tmp_path: Path
) -> None:
    module = torch.nn.Linear(1, 1)
    before = module.weight.item()
    config = Config.from_dict(
        {"loss": {"name": "squared_error"}, "optimizer": {"lr": 1e38}, "train": {"num_shards": 1}}
    )
    rows = ParquetRows(str(trained.parent / "rows.parquet"))
    with pytest.raises(NotFinite):
        train(
            config,
            rows=rows,
            test=None,
            make_engine=InlineEngine,
            module=module,
            observers=[RunFolder(tmp_path)],
        )
    assert load_model(tmp_path / "model", torch.nn.Linear(1, 1)).module.weight.item() == before


def test_a_run_whose_last_model_cannot_be_written_is_not_finished(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr("sparksgd.runs.folder.save_model", fails)
    config = Config.from_dict({"loss": {"name": "squared_error"}, "train": {"num_shards": 1}})
    rows = ParquetRows(str(trained.parent / "rows.parquet"))
    with pytest.raises(ClusterError, match="cannot be written: the disk is gone"):
        train(
            config,
            rows=rows,
            test=None,
            make_engine=InlineEngine,
            module=torch.nn.Linear(1, 1),
            observers=[RunFolder(tmp_path)],
        )
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "OSError"


def test_the_summary_counts_epochs_by_turns(trained: Path, tmp_path: Path) -> None:
    config = Config.from_dict(
        {
            "loss": {"name": "squared_error"},
            "solver": {"name": "local_sgd", "turns_per_round": 2},
            "train": {"num_shards": 1, "rows_per_step": 2, "epochs": 3},
        }
    )
    rows = ParquetRows(str(trained.parent / "rows.parquet"))
    train(
        config,
        rows=rows,
        test=None,
        make_engine=InlineEngine,
        module=torch.nn.Linear(1, 1),
        observers=[RunFolder(tmp_path)],
    )
    found = json.loads((tmp_path / "summary.json").read_text())
    assert (found["epochs"], found["turns"], found["steps"]) == (3.0, 12, 6)


# One run at a time


def run(trained: Path, *observers: Observer, **settings: Any) -> None:
    """Train a linear regression of 8 rows, 2 in a step."""
    one_shard = {"num_shards": 1, "rows_per_step": 2}
    train(
        Config.from_dict({"loss": {"name": "squared_error"}, "train": one_shard | settings}),
        rows=ParquetRows(str(trained.parent / "rows.parquet")),
        test=None,
        make_engine=InlineEngine,
        module=torch.nn.Linear(1, 1),
        observers=observers,
    )


class AtStep(Observer):
    """Does something after a step."""

    def __init__(self, step: int, deed: Callable[[], object]) -> None:
        self._step, self._deed = step, deed

    def stepped(self, training: Training, report: StepReport) -> None:
        if report.step == self._step:
            self._deed()


def lease_of(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob(".lease-*.json")
    return dict(json.loads(file.read_text()))


def content(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_run_holds_its_folder_while_it_runs_and_releases_it_then(trained: Path, tmp_path: Path) -> None:
    during: list[dict[str, Any]] = []
    folder = RunFolder(tmp_path, run_id="mine")
    run(trained, folder, AtStep(2, lambda: during.append(lease_of(tmp_path))))
    assert [(one["holder"]["run_id"], one["released"]) for one in during] == [("mine", False)]
    assert lease_of(tmp_path)["released"]
    run(trained, RunFolder(tmp_path))
    assert lease_of(tmp_path)["released"]


def test_a_folder_that_another_run_writes_to_is_refused(trained: Path, tmp_path: Path) -> None:
    says = r"^out is .*, but run first \(process \d+ on .*\) writes to it"
    first = Lease(location(tmp_path), Holder.here("first"), renew_s=0.01)
    with first.held(), pytest.raises(ConfigError, match=says):
        run(trained, RunFolder(tmp_path))
    assert location(tmp_path).files() == []
    assert lease_of(tmp_path)["holder"]["run_id"] == "first"


def test_a_run_that_ends_by_an_error_releases_its_folder(trained: Path, tmp_path: Path) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(trained, RunFolder(tmp_path), AtStep(2, fail))
    assert lease_of(tmp_path)["released"]
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "KeyboardInterrupt"


def test_a_run_that_cannot_begin_its_files_releases_its_folder(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "summary.json").mkdir()
    with pytest.raises(ClusterError, match="cannot be written"):
        run(trained, RunFolder(tmp_path))
    assert lease_of(tmp_path)["released"]


def test_a_run_whose_folder_another_one_took_ends_with_an_error_and_changes_nothing_more(
    trained: Path, tmp_path: Path
) -> None:
    after: list[dict[str, bytes]] = []

    def take() -> None:
        Lease(location(tmp_path), Holder.here("other"), wait_s=0.0).take()
        after.append(content(tmp_path))

    says = r"but run other \(process \d+ on .*\) holds it now\. This run, mine, was stopped"
    with pytest.raises(ClusterError, match=says):
        run(trained, AtStep(2, take), RunFolder(tmp_path, run_id="mine"), epochs=3)
    assert [content(tmp_path)] == after
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    assert not (tmp_path / "summary.json").exists()


def test_what_a_killed_writer_left_is_removed(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in (".run.json.0123abcd.part", "model/.weights-7.pt.0123abcd.part"):
        (tmp_path / name).touch()
    run(trained, RunFolder(tmp_path))
    assert list(tmp_path.rglob("*.part")) == []


def test_a_folder_that_cannot_be_written_is_refused_when_it_is_to_be_written(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(*_: Any) -> bool:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("sparksgd.storage.LocalLocation.create", create)
    folder = RunFolder(tmp_path, called="--out")
    says = r"^--out is .*, which cannot be written: Read-only file system"
    with folder.held(), pytest.raises(ConfigError, match=says):  # a finished run could be read in it
        folder.require_writable()
    with pytest.raises(ConfigError, match="Read-only file system"):
        run(trained, RunFolder(tmp_path))
    monkeypatch.undo()
    run(trained, folder)
    assert lease_of(tmp_path)["released"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_or_quota_says_to_free_some_space(tmp_path: Path, number: int) -> None:
    told = "free some space, and run the same command again"
    with pytest.raises(ClusterError, match=told), RunFolder(tmp_path)._told():
        raise OSError(number, "full")
