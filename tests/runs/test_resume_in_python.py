"""A training in Python goes on where it is told to, and observers remember."""

from __future__ import annotations

import copy
import importlib
import shutil
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from resumed_jobs import EVERY_STEP, KINDS, Jobs, Stops, without_turns_of_shards
from resumed_modules import TwoHeads

import sparksgd
from sparksgd.errors import ConfigError, ModelError
from sparksgd.runs.checkpoints import manifests
from sparksgd.runs.model import load_model
from sparksgd.storage import location
from sparksgd.training import checkpoint, unreplaced
from sparksgd.training.state import Observer, Training

pytestmark = pytest.mark.usefixtures("every_checkpoint", "log")


def test_a_run_in_python_goes_on_where_it_is_told_to(jobs: Jobs, tmp_path: Path) -> None:
    config, rows = jobs.config(KINDS["heads that steps leave out"]), str(jobs.folder / "rows.parquet")

    def module() -> torch.nn.Module:
        torch.manual_seed(1)
        return TwoHeads()

    whole = sparksgd.train(config, rows, rows, module=module())
    with pytest.raises(KeyboardInterrupt):
        sparksgd.train(config, rows, rows, module=module(), out=tmp_path, observers=[Stops(7)])
    again = sparksgd.train(config, rows, rows, module=module(), out=tmp_path, resume_from=tmp_path)
    assert again.resumed[0].step == 5
    assert again.flat.parameters_sha256() == whole.flat.parameters_sha256()
    assert [report.step for report in again.evaluations] == [report.step for report in whole.evaluations]
    with pytest.raises(ModelError, match="is of another module: the module was TwoHeads, but is Linear"):
        sparksgd.train(config, rows, module=torch.nn.Linear(4, 2), out=tmp_path / "b", resume_from=tmp_path)
    with pytest.raises(ConfigError, match=r"resume_from is .*, but out is None"):
        sparksgd.train(config, rows, module=module(), resume_from=tmp_path)


def test_a_run_that_could_go_on_is_replaced_with_a_warning(
    jobs: Jobs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows, config = str(jobs.folder / "rows.parquet"), jobs.config(EVERY_STEP, {"train": {"epochs": 2}})
    with pytest.raises(KeyboardInterrupt):
        sparksgd.train(config, rows, out=tmp_path, observers=[Stops(7)])
    assert "could go on" not in caplog.text
    sparksgd.train(config, rows, out=tmp_path)
    assert "could go on from step 6: it is replaced. To go on instead, pass" in caplog.text
    caplog.clear()
    sparksgd.train(config, rows, out=tmp_path)
    assert "could go on" not in caplog.text


def test_many_runs_have_their_checkpoints_in_one_folder(jobs: Jobs, tmp_path: Path) -> None:
    rows = str(jobs.folder / "rows.parquet")
    made: list[Training] = []
    for lr in (0.01, 0.02, 0.01):
        config = jobs.config({"optimizer": {"name": "Adam", "lr": lr}}, {"train": {"epochs": 1}})
        made.append(sparksgd.train(config, rows, checkpoint_dir=tmp_path))
    assert len(list(tmp_path.iterdir())) == 2
    assert [bool(training.resumed) for training in made] == [False, False, True]
    digests = [training.flat.parameters_sha256() for training in made]
    assert digests[0] == digests[2] != digests[1]


def test_other_modules_have_checkpoints_of_their_own(jobs: Jobs, tmp_path: Path) -> None:
    rows, config = str(jobs.folder / "rows.parquet"), jobs.config({"train": {"epochs": 1}})

    def train(seed: int = 1, dropout: float = 0.1, frozen: float = 1.0, **where: Any) -> Training:
        torch.manual_seed(seed)
        module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(dropout), torch.nn.Linear(4, 2))
        module[0].bias.requires_grad_(False).fill_(frozen)
        return sparksgd.train(config, rows, module=module, **where)

    kinds: list[dict[str, Any]] = [{}, {"seed": 2}, {"dropout": 0.5}, {"frozen": 5.0}]
    for kind in [*kinds, {}]:
        found, alone = train(**kind, checkpoint_dir=tmp_path / "many"), train(**kind)
        assert found.flat.parameters_sha256() == alone.flat.parameters_sha256()
    assert len(list((tmp_path / "many").iterdir())) == len(kinds)
    train(out=tmp_path / "one")
    assert train(
        seed=2, out=tmp_path / "two", resume_from=tmp_path / "one"
    ).resumed  # its weights are replaced
    for kind in kinds[2:]:
        with pytest.raises(ModelError, match="is of another module: a number or a text that it keeps"):
            train(**kind, out=tmp_path / "three", resume_from=tmp_path / "one")


NAMED = """
import os
import torch

class Net(torch.nn.Linear):
    def __init__(self):
        super().__init__(4, 2)
        drawn = torch.frombuffer(bytearray(os.urandom(4)), dtype=torch.uint8).float()
        self.{held}

    def forward(self, x):
        {forward}
        return super().forward(x * self.kept)
"""


def named_anew(
    folder: Path, held: str, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, forward: str = "pass"
) -> dict[str, Any]:
    """Return the configuration of a module that draws a tensor, or a number, whenever it is built."""
    monkeypatch.syspath_prepend(str(folder))
    name = f"built_anew_{abs(hash((held, forward)))}"
    (folder / f"{name}.py").write_text(NAMED.format(held=held, forward=forward))
    return jobs.config({"model": {"name": f"{name}:Net"}}, EVERY_STEP)


def interrupted(config: dict[str, Any], rows: str, out: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        sparksgd.train(config, rows, out=out, observers=[Stops(7)])


@pytest.mark.parametrize(
    ("held", "forward"),
    [
        ('register_buffer("kept", drawn)', "pass"),
        ('register_buffer("kept", drawn, persistent=False)', "pass"),
        ("kept = torch.nn.Parameter(drawn, False)", "pass"),
        ("kept = drawn", "pass"),
        ("kept, self.table = drawn, drawn.numpy()", "pass"),
        ("kept = drawn.numpy()", "self.kept = torch.as_tensor(self.kept, dtype=x.dtype)"),
    ],
)
def test_a_module_that_draws_constants_whenever_it_is_built_goes_on_with_those_it_had(
    jobs: Jobs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log: pytest.LogCaptureFixture,
    held: str,
    forward: str,
) -> None:
    config = named_anew(tmp_path, held, jobs, monkeypatch, forward)
    rows, out = str(jobs.folder / "rows.parquet"), tmp_path / "out"
    name = config["model"]["name"].partition(":")[0]

    def draws_first(first: int) -> None:
        numbers = count(first)
        own = SimpleNamespace(urandom=lambda length: bytes(next(numbers) for _ in range(length)))
        monkeypatch.setattr(importlib.import_module(name), "os", own)

    draws_first(1)
    whole = sparksgd.train(config, rows)
    draws_first(1)
    interrupted(config, rows, out)
    for steps in (7, 9):  # the constants go on from run to run
        draws_first(steps)
        config["train"]["steps"] = steps
        sparksgd.train(config, rows, out=out, resume_from=out)
    del config["train"]["steps"]
    again = sparksgd.train(config, rows, out=out, resume_from=out)
    assert again.flat.parameters_sha256() == whole.flat.parameters_sha256()
    assert [resumed.step for resumed in again.resumed] == [6, 7, 9]
    assert "built with other values of kept" in log.text
    loaded: Any = load_model(str(out / "model"), trust=[name]).module
    assert loaded.kept.tolist() == [1, 2, 3, 4]


def test_a_module_that_has_a_tensor_now_which_it_had_not_is_refused(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = 'kept = torch.full((4,), 2.0) if "WITH_MASK" in os.environ else None'
    config = named_anew(tmp_path, held, jobs, monkeypatch, "if self.kept is None: return super().forward(x)")
    rows, out = str(jobs.folder / "rows.parquet"), tmp_path / "out"
    interrupted(config, rows, out)
    monkeypatch.setenv("WITH_MASK", "1")
    with pytest.raises(ModelError, match=r"that is not trained\. Let .* build the same again"):
        sparksgd.train(config, rows, out=out, resume_from=out)


def test_constants_are_written_once_in_a_run(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = named_anew(tmp_path, "kept = drawn", jobs, monkeypatch)
    config["checkpoint"]["keep"] = 2
    rows, out = str(jobs.folder / "rows.parquet"), tmp_path / "out"
    for resume_from in (None, out):
        config["train"]["epochs"] = 2 if resume_from is None else 3
        sparksgd.train(config, rows, out=out, resume_from=resume_from)
        names = [file.name for file in (out / "checkpoints").iterdir()]
        assert len([name for name in names if name.endswith(".json")]) == 2
        assert len([name for name in names if name.endswith(".constants.pt")]) == 1
        for manifest in manifests(location(out / "checkpoints")):
            assert manifest.checkpoint().constants()  # older ones took no file of it away


@pytest.mark.parametrize("most", [3, 64 << 20])
def test_drawn_numbers_and_large_constants_are_refused(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture, most: int
) -> None:
    monkeypatch.setattr(unreplaced, "_MOST_KEPT_BYTES", most)
    held = "kept = float(drawn.sum())" if most > 3 else "kept = drawn"
    config = named_anew(tmp_path, held, jobs, monkeypatch)
    rows, out = str(jobs.folder / "rows.parquet"), tmp_path / "out"
    interrupted(config, rows, out)
    assert "the module draws kept anew whenever it is built, which checkpoints cannot hold" in log.text
    name = config["model"]["name"]
    with pytest.raises(ModelError, match=rf"that is not trained\. Let {name} build the same again"):
        sparksgd.train(config, rows, out=out, resume_from=out)


TABLE = """
import numpy as np
import torch

class Net(torch.nn.Linear):
    def __init__(self):
        super().__init__(4, 2)
        table = torch.from_numpy(np.load({file!r}))
        self.{held}

    def forward(self, x):
        return super().forward(x * self.kept)
"""


@pytest.mark.parametrize("held", ['register_buffer("kept", table)', "kept = table"])
def test_a_table_of_a_file_that_was_changed_is_refused(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: str
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    name, file = f"of_a_file_{abs(hash(held))}", tmp_path / "table.npy"
    (tmp_path / f"{name}.py").write_text(TABLE.format(file=str(file), held=held))
    config = jobs.config({"model": {"name": f"{name}:Net"}}, EVERY_STEP)
    rows, out = str(jobs.folder / "rows.parquet"), tmp_path / "out"
    np.save(file, np.ones(4, "f4"))
    interrupted(config, rows, out)
    np.save(file, np.full(4, 2, "f4"))
    with pytest.raises(ModelError, match=r"that is not trained\. Let .* build the same again"):
        sparksgd.train(config, rows, out=out, resume_from=out)
    np.save(file, np.ones(4, "f4"))
    assert sparksgd.train(config, rows, out=out, resume_from=out).resumed[0].step == 6


def test_other_test_rows_are_evaluated_where_no_step_is_left(jobs: Jobs, tmp_path: Path) -> None:
    rows, config = str(jobs.folder / "rows.parquet"), jobs.config({"train": {"epochs": 1}})
    others = str(tmp_path / "others.parquet")
    pq.write_table(pq.read_table(rows).slice(10, 40), others)
    first = sparksgd.train(config, rows, rows, checkpoint_dir=tmp_path / "c")
    again = sparksgd.train(config, rows, others, checkpoint_dir=tmp_path / "c")
    assert ([e.rows for e in first.evaluations], [e.rows for e in again.evaluations]) == ([100], [40])
    assert len(again.step_times) == 0


def test_an_observer_remembers(jobs: Jobs, tmp_path: Path) -> None:
    rows = str(jobs.folder / "rows.parquet")

    class Counts(Observer):
        def __init__(self) -> None:
            self.steps, self.best = 0, np.float32(9)

        def memory(self) -> dict[str, Any]:
            return {"steps": self.steps, "best": self.best}

        def recall(self, memory: dict[str, Any]) -> None:
            self.steps, self.best = memory["steps"], memory["best"]

        def stepped(self, training: Training, report: Any) -> None:
            self.steps, self.best = self.steps + 1, min(self.best, np.float32(report.loss))

    for epochs, steps in ((1, 5), (2, 10)):
        counts, config = Counts(), jobs.config({"train": {"epochs": epochs}})
        sparksgd.train(config, rows, checkpoint_dir=tmp_path, observers=[counts])
        assert counts.steps == steps
        assert type(counts.best) is np.float32


def net() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


def test_the_module_of_an_interrupted_run_goes_on(jobs: Jobs, tmp_path: Path) -> None:
    """As a notebook's cell that is interrupted, and run again, has it: the module is one that was trained."""
    rows, config = str(jobs.folder / "rows.parquet"), jobs.config(EVERY_STEP)
    whole = sparksgd.train(config, rows, module=net())
    module = net()
    for step in (3, 6):
        with pytest.raises(KeyboardInterrupt):
            sparksgd.train(config, rows, module=module, checkpoint_dir=tmp_path, observers=[Stops(step)])
    again = sparksgd.train(config, rows, module=module, checkpoint_dir=tmp_path)
    assert [one.step for one in again.resumed] == [2, 5]
    assert again.flat.parameters_sha256() == whole.flat.parameters_sha256()
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("what", ["finished", "removed", "another folder", "another configuration"])
def test_a_module_that_was_trained_begins_anew_elsewhere(jobs: Jobs, tmp_path: Path, what: str) -> None:
    rows, config, module = str(jobs.folder / "rows.parquet"), jobs.config(EVERY_STEP), net()
    first = [] if what == "finished" else [Stops(3)]
    with nullcontext() if what == "finished" else pytest.raises(KeyboardInterrupt):
        sparksgd.train(config, rows, module=module, checkpoint_dir=tmp_path / "a", observers=first)
    if what == "removed":
        shutil.rmtree(tmp_path / "a")
    if what == "another configuration":
        config = jobs.config(EVERY_STEP, {"optimizer": {"name": "SGD", "lr": 0.011}})
    alone = copy.deepcopy(module)
    again = sparksgd.train(
        config, rows, module=module, checkpoint_dir=tmp_path / ("b" if what == "another folder" else "a")
    )
    assert not again.resumed
    sparksgd.train(config, rows, module=alone)
    assert torch.equal(alone[0].weight, module[0].weight)


def settings_of(name: str) -> AbstractContextManager[object]:
    """Return a block of other settings than torch begins with."""
    if name == "autocast":
        return torch.autocast("cpu", torch.bfloat16)
    held = ExitStack()
    if name == "denormal":
        held.callback(torch.set_flush_denormal, False)
        torch.set_flush_denormal(True)
    else:
        held.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("medium")
    return held


ANEW = r"\..* set them as they were, or train anew without resume_from, in this out or another$"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("autocast", r"torch.autocast was {}, but is {}"),
        ("denormal", "torch.set_flush_denormal was {}, but is {}"),
        ("matmul", "torch.set_float32_matmul_precision was {}, but is {}"),
    ],
)
def test_a_run_under_other_settings_does_not_go_on(jobs: Jobs, tmp_path: Path, name: str, said: str) -> None:
    """Its steps before and after would be of two experiments."""
    rows, config = str(jobs.folder / "rows.parquet"), jobs.config(EVERY_STEP)
    values = ("highest", "medium") if name == "matmul" else (False, True)
    for then, now, (was, is_now) in (
        (nullcontext, partial(settings_of, name), values),
        (partial(settings_of, name), nullcontext, values[::-1]),
    ):
        out = tmp_path / str(was)
        with pytest.raises(KeyboardInterrupt), then():
            sparksgd.train(config, rows, module=net(), out=out, observers=[Stops(3)])
        with now(), pytest.raises(ModelError, match=said.format(was, is_now) + ANEW):
            sparksgd.train(config, rows, module=net(), out=tmp_path / "other", resume_from=out)
        with then():
            sparksgd.train(config, rows, module=net(), out=out, resume_from=out)


def test_runs_under_other_settings_have_checkpoints_of_their_own(jobs: Jobs, tmp_path: Path) -> None:
    rows, config = str(jobs.folder / "rows.parquet"), jobs.config(EVERY_STEP)
    digests = []
    for block in (nullcontext, partial(settings_of, "autocast"), nullcontext):
        with block():
            run = sparksgd.train(config, rows, module=net(), checkpoint_dir=tmp_path)
        digests.append(run.flat.parameters_sha256())
    assert digests[0] == digests[2] != digests[1]
    assert run.resumed
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("version", "lacks"),
    [
        (1, {"settings", "total_turns", "stopped_by", "is_off_grid", "best_step"}),
        (2, {"total_turns", "stopped_by", "is_off_grid", "best_step"}),
        (4, set()),
        (5, {"attributes"}),
    ],
)
def test_a_checkpoint_of_a_version_before_is_read(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, lacks: set[str]
) -> None:
    rows, config = str(jobs.folder / "rows.parquet"), jobs.config(EVERY_STEP)
    whole = sparksgd.train(config, rows, module=net())

    def of_run(training: Training) -> dict[str, Any]:
        values = now(training) if version > 4 else without_turns_of_shards(now(training))
        return {key: value for key, value in values.items() if key not in lacks}

    now = checkpoint._of_run
    with monkeypatch.context() as before:
        before.setattr(checkpoint, "_of_run", of_run)
        before.setitem(checkpoint._VERSIONS, "run", version)
        with pytest.raises(KeyboardInterrupt):
            sparksgd.train(config, rows, module=net(), out=tmp_path, observers=[Stops(3)])
    again = sparksgd.train(config, rows, module=net(), out=tmp_path, resume_from=tmp_path)
    assert again.resumed[0].step == 2
    assert again.flat.parameters_sha256() == whole.flat.parameters_sha256()
