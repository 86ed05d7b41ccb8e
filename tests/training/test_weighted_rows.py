"""A row of weight w counts as w such rows: in gradients, losses and evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparksgd
from sparksgd.errors import BadRows, ConfigError
from sparksgd.training.state import Observer, Training

ROWS, STEPS = 60, 4


@pytest.fixture(scope="module")
def drawn() -> dict[str, np.ndarray[Any, Any]]:
    source = np.random.default_rng(5)
    x = source.normal(size=(ROWS, 3))
    whole = source.integers(1, 4, ROWS)
    return {
        "x": x.astype(np.float32),
        "label": (x.sum(axis=1) + source.normal(size=ROWS) > 0).astype(np.int64),
        "whole": whole,
        "w": (source.random(ROWS) * 3 + 0.01).astype(np.float32),
    }


def write(path: Path, columns: dict[str, np.ndarray[Any, Any]], take: np.ndarray[Any, Any]) -> str:
    table = {name: pa.array(values[take].tolist()) for name, values in columns.items()}
    pq.write_table(pa.table(table), path)
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, drawn: dict[str, np.ndarray[Any, Any]]) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("weights")
    every = np.arange(ROWS)
    return {
        "once": write(folder / "once.parquet", drawn, every),
        "repeated": write(folder / "repeated.parquet", drawn, np.repeat(every, drawn["whole"])),
    }


def net() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


class Losses(Observer):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def stepped(self, training: Training, report: Any) -> None:
        """Keep the loss of the step."""
        self.losses.append(report.loss)


def trained(
    rows: str,
    *,
    rows_per_step: int = 1000,
    shards: int = 1,
    weight: str | None = None,
    module: nn.Module | None = None,
    **tables: Any,
) -> tuple[Training, list[float]]:
    watch = Losses()
    config = {
        "data": {"features": ["x"], **({"weight": weight} if weight else {})},
        "train": {"rows_per_step": rows_per_step, "num_shards": shards, "steps": STEPS, "epochs": STEPS},
        "optimizer": {"name": "SGD", "lr": 0.5, "momentum": 0.9},
        "engine": {"name": "inline"},
        **tables,
    }
    return sparksgd.train(config, rows, rows, module=module or net(), observers=[watch]), watch.losses


def parameters(training: Training) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = training.flat.parameters.numpy()
    return found


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize(
    "solver", [{}, {"name": "local_sgd", "turns_per_round": 2, "inner_state": "average"}], ids=str
)
def test_a_whole_weight_is_a_row_that_is_there_so_often(
    files: dict[str, str], solver: dict[str, Any], shards: int
) -> None:
    weighted, losses = trained(files["once"], weight="whole", shards=shards, solver=solver)
    repeated, expected = trained(files["repeated"], shards=shards, solver=solver)
    plain, _ = trained(files["once"], shards=shards, solver=solver)
    assert np.abs(parameters(weighted) - parameters(repeated)).max() < 2e-6
    assert np.abs(parameters(plain) - parameters(repeated)).max() > 1e-3
    assert losses == pytest.approx(expected, rel=1e-5)
    for one, other in zip(weighted.evaluations, repeated.evaluations, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.accuracy == pytest.approx(other.accuracy, rel=1e-12)
        assert (one.rows, other.rows) == (ROWS, weighted_rows(files["repeated"]))


def weighted_rows(path: str) -> int:
    return pq.read_metadata(path).num_rows


def test_any_weights_are_those_of_plain_torch(
    files: dict[str, str], drawn: dict[str, np.ndarray[Any, Any]]
) -> None:
    training, losses = trained(files["once"], weight="w", shards=3)
    module = net()
    x, label, weight = (torch.from_numpy(drawn[name]) for name in ("x", "label", "w"))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = (F.cross_entropy(module(x), label, reduction="none") * weight).sum() / weight.sum()
        loss.backward()
        optimizer.step()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-5)
    expected = nn.utils.parameters_to_vector(module.parameters()).detach().numpy()
    assert np.abs(parameters(training) - expected).max() < 2e-6
    with torch.no_grad():
        hits = module(x).argmax(1) == label
    report = training.evaluations[-1]
    assert report.accuracy == pytest.approx(float(weight[hits].sum() / weight.sum()), rel=1e-6)


def test_the_sum_of_the_weights_of_each_step_is_its_divisor(files: dict[str, str]) -> None:
    """A step of few rows divides by the weight of these, not by a mean weight."""
    training, losses = trained(files["once"], weight="w", rows_per_step=7, shards=3)
    doubled = np.random.default_rng(0)  # a factor of all weights changes nothing but rounding
    table = pq.read_table(files["once"])
    factor = float(2 ** doubled.integers(1, 5))
    path = Path(files["once"]).with_name("scaled.parquet")
    scaled = pa.array((table["w"].to_numpy() * factor).tolist())
    pq.write_table(table.set_column(table.schema.get_field_index("w"), "w", scaled), path)
    again, same = trained(str(path), weight="w", rows_per_step=7, shards=3)
    assert losses == pytest.approx(same, rel=1e-6)
    assert np.abs(parameters(training) - parameters(again)).max() < 1e-6


@pytest.mark.parametrize("rows_per_backward", [1, 4, 64])
def test_a_piece_may_be_cut_into_several_backward_passes(
    files: dict[str, str], rows_per_backward: int
) -> None:
    whole, _ = trained(files["once"], weight="w")
    train = {"rows_per_step": 1000, "num_shards": 1, "steps": STEPS, "epochs": STEPS}
    cut, _ = trained(files["once"], weight="w", train={**train, "rows_per_backward": rows_per_backward})
    assert np.abs(parameters(whole) - parameters(cut)).max() < 2e-6


class HalfPrecision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.float16):
            return self.last(self.first(x).tanh())


@pytest.mark.parametrize("exponent", [-24, 24])
def test_powers_of_two_change_no_bit_of_a_module_in_float16(files: dict[str, str], exponent: int) -> None:
    table = pq.read_table(files["once"])
    path = Path(files["once"]).with_name(f"scaled{exponent}.parquet")
    scaled = pa.array((table["w"].to_numpy() * np.float32(2.0**exponent)).tolist(), pa.float32())
    pq.write_table(table.set_column(table.schema.get_field_index("w"), "w", scaled), path)
    plain, same = (
        trained(file, weight="w", shards=2, module=HalfPrecision())[0] for file in (files["once"], str(path))
    )
    assert same.plan.float16
    assert same.flat.parameters_sha256() == plain.flat.parameters_sha256()


def test_a_weight_of_0_ends_the_run_before_its_first_step(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"x": [[0.0] * 3, [1.0] * 3], "label": [0, 1], "w": [1.0, 0.0]}), path)
    with pytest.raises(BadRows, match="a weight that is not from"):
        trained(str(path), weight="w")


@pytest.mark.usefixtures("every_checkpoint")
def test_weights_are_of_the_experiment(files: dict[str, str], tmp_path: Path) -> None:
    """A run that was stopped goes on with the weights that it began with."""

    class Stops(Observer):
        def stepped(self, training: Training, report: Any) -> None:
            """End the run at its second step."""
            if report.step == 2:
                raise KeyboardInterrupt

    def run(weight: str, *observers: Observer, **where: Path) -> Training:
        config = {
            "data": {"features": ["x"], "weight": weight},
            "train": {"rows_per_step": 1000, "num_shards": 1, "steps": STEPS, "epochs": STEPS},
            "engine": {"name": "inline"},
            "optimizer": {"lr": 0.1},
            "checkpoint": {"every_steps": 1},
        }
        return sparksgd.train(config, files["once"], module=net(), observers=observers, out=tmp_path, **where)

    with pytest.raises(KeyboardInterrupt):
        run("w", Stops())
    with pytest.raises(ConfigError, match=r"data\.weight is 'whole', but was 'w'"):
        run("whole", resume_from=tmp_path)
    again = run("w", resume_from=tmp_path)
    assert again.resumed[0].step == 1
    steady, _ = trained(files["once"], weight="w", optimizer={"lr": 0.1})
    assert again.flat.parameters_sha256() == steady.flat.parameters_sha256()
