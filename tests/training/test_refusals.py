"""What cannot be trained is refused before the first step, by an error that says what and what next."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from sparksgd.config import Config
from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.inline import InlineEngine
from sparksgd.errors import BadRows, ConfigError, DataError, ModelError, SparkSGDError, UserCodeError
from sparksgd.models import LeNet
from sparksgd.models.losses import cross_entropy
from sparksgd.training.loop import train
from sparksgd.training.state import Observer, Training

NAN, INF = math.nan, math.inf

# Twelve good rows: x of two numbers, y a class of three.
X = [[row / 4, -row / 8] for row in range(12)]
Y = [row % 3 for row in range(12)]


def three_classes() -> nn.Module:
    return nn.Linear(2, 3)


def one_number() -> nn.Module:
    return nn.Linear(2, 1)


def small_lenet() -> nn.Module:
    return LeNet(maps=(2, 3), hidden=4)


def batch_normed() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3))


def double() -> nn.Module:
    return nn.Linear(2, 3).double()


def frozen() -> nn.Module:
    return nn.Linear(2, 3).requires_grad_(False)


def grid() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (2, 2)))


class Summing(nn.Module):
    """Adds up what it sees, in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 3)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += x.sum()
        return self.inner(x)


class Faulty(nn.Module):
    """Raises whatever it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise LookupError("the user's own mistake")


def mean_loss(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return cross_entropy(output, label).mean()


class NoStep(Observer):
    """An observer to whom a step is a failure of the test."""

    def started(self, training: Training) -> None:
        raise AssertionError("training began")


def parquet(folder: Path, **columns: Any) -> ParquetRows:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    return ParquetRows(str(folder))


def refusal(
    rows: ParquetRows,
    test: ParquetRows | None = None,
    factory: Any = three_classes,
    **sections: dict[str, Any],
) -> SparkSGDError:
    """Train, and return the error of our own tree that comes before the first step."""
    config = Config.from_dict(
        {
            "data": {"features": "x", "label": "y"} | sections.pop("data", {}),
            "model": {"name": f"{__name__}:{factory.__name__}"},
            "train": {"num_shards": 2, "rows_per_step": 6} | sections.pop("train", {}),
            **sections,
        }
    )
    with pytest.raises(SparkSGDError) as refused:
        train(config, rows=rows, test=test, make_engine=InlineEngine, observers=[NoStep()])
    return refused.value


def assert_says(error: SparkSGDError, kind: type[SparkSGDError], *phrases: str) -> None:
    assert type(error) is kind
    for phrase in phrases:
        assert phrase in str(error)


def with_row(column: list[Any], value: Any) -> list[Any]:
    """Twelve good values, the sixth replaced."""
    return [*column[:5], value, *column[6:]]


# Columns


@pytest.mark.parametrize(
    ("columns", "phrases"),
    [
        ({"xs": X, "y": Y}, ["no column 'x'", "did you mean xs?"]),
        ({"x": X, "target": Y}, ["no column 'y'", "valid: target, x"]),
        ({"x": ["a"] * 12, "y": Y}, ["column 'x' is string", "data.features"]),
        ({"x": X, "y": ["cat"] * 12}, ["column 'y' is string", "data.label"]),
        ({"x": X, "y": X}, ["label column 'y' is list<element: double>", "a number per row"]),
        ({"x": [X] * 12, "y": Y}, ["column 'x' is list<element: list<element: double>>"]),
    ],
    ids=["missing features", "missing label", "texts", "text labels", "lists as labels", "nested lists"],
)
def test_columns(tmp_path: Path, columns: dict[str, Any], phrases: list[str]) -> None:
    assert_says(refusal(parquet(tmp_path, **columns)), DataError, *phrases)


def test_a_missing_identity_column(tmp_path: Path) -> None:
    error = refusal(parquet(tmp_path, x=X, y=Y), data={"id": "key"})
    assert_says(error, DataError, "no column 'key'")


# Rows


@pytest.mark.parametrize(
    ("x", "y", "phrases"),
    [
        (with_row(X, None), Y, ["1 with null in 'x'"]),
        (X, with_row(Y, None), ["1 with null in 'y'"]),
        (with_row(X, [1.0, None]), Y, ["1 with null inside the list in 'x'"]),
        (
            with_row(X, [1.0]),
            Y,
            ["a number of values other than 2 (most rows') in 'x' (such as 1)"],
        ),
        (with_row(X, [1.0, NAN]), Y, ["1 with NaN or infinity (as float32) in 'x' (such as nan)"]),
        (with_row(X, [-INF, 0.0]), Y, ["1 with NaN or infinity (as float32) in 'x' (such as -inf)"]),
        (with_row(X, [1e300, 0.0]), Y, ["1 with NaN or infinity (as float32) in 'x' (such as inf)"]),
        (X, with_row(Y, 3), ["1 with a label outside 0..2 (such as 3)"]),
        (X, with_row(Y, -1), ["1 with a label outside 0..2 (such as -1)"]),
        (
            X,
            with_row([float(y) for y in Y], 0.5),
            ["1 with a label that is no whole number in 'y' (such as 0.5)"],
        ),
        (
            X,
            with_row([float(y) for y in Y], NAN),
            ["1 with a label that is no whole number in 'y' (such as nan)"],
        ),
    ],
    ids=[
        "null features",
        "null label",
        "null in a list",
        "another length",
        "NaN",
        "infinity",
        "beyond float32",
        "label too great",
        "label below 0",
        "label between classes",
        "label NaN",
    ],
)
def test_one_bad_row(tmp_path: Path, x: list[Any], y: list[Any], phrases: list[str]) -> None:
    error = refusal(parquet(tmp_path, x=x, y=y))
    assert_says(error, BadRows, "1 of 12 rows cannot be trained on", 'data.on_bad_row = "skip"', *phrases)


def test_a_bad_row_that_comes_first(tmp_path: Path) -> None:
    error = refusal(parquet(tmp_path, x=[[NAN, 0.0], *X], y=[0, *Y]))
    assert_says(error, BadRows, "1 of 13 rows", "NaN or infinity")


def test_a_row_of_another_length_that_comes_first_shapes_nothing(tmp_path: Path) -> None:
    rows = parquet(tmp_path, x=[[1.0, 2.0, 3.0], *X], y=[0, *Y])
    assert_says(refusal(rows), BadRows, "1 of 13 rows cannot be trained on", "other than 2", "(such as 3)")


def test_images_of_differing_length(tmp_path: Path) -> None:
    images = [bytes(784)] * 10 + [bytes(783), bytes(900)]
    error = refusal(parquet(tmp_path, x=images, y=Y), factory=small_lenet)
    assert_says(
        error,
        BadRows,
        "2 of 12 rows",
        "a number of values other than 784 (most rows') in 'x' (such as 783, 900)",
    )


@pytest.mark.parametrize("label", [NAN, INF, 1e300])
def test_a_regression_s_label_that_is_not_finite(tmp_path: Path, label: float) -> None:
    rows = parquet(tmp_path, x=X, y=with_row([float(y) for y in Y], label))
    error = refusal(rows, factory=one_number, loss={"name": "squared_error"})
    assert_says(error, BadRows, "1 with a label that is NaN or infinite in 'y'")


def test_bad_test_rows(tmp_path: Path) -> None:
    good, bad = parquet(tmp_path / "a", x=X, y=Y), parquet(tmp_path / "b", x=X, y=with_row(Y, 7))
    assert_says(refusal(good, test=bad), BadRows, "1 of 12 rows", "a label outside 0..2 (such as 7)")


def test_more_bad_rows_than_may_be_skipped(tmp_path: Path) -> None:
    rows = parquet(tmp_path, x=X, y=[*Y[:10], 7, 8])
    error = refusal(rows, data={"on_bad_row": "skip", "max_bad_rows": 1})
    assert_says(error, BadRows, "2 of 12 rows", "more than data.max_bad_rows = 1")


def test_bad_rows_that_may_be_skipped_are_counted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = parquet(tmp_path, x=[*X[:9], [NAN, 1.0], None, X[11]], y=[*Y[:11], 7])
    config = Config.from_dict(
        {
            "data": {"features": "x", "label": "y", "on_bad_row": "skip", "max_bad_rows": 3},
            "model": {"name": f"{__name__}:three_classes"},
            "train": {"num_shards": 2, "rows_per_step": 100},
        }
    )
    training = train(config, rows=rows, test=None, make_engine=InlineEngine)
    assert training.rows.rows == training.step_times.rows == 9
    assert sorted(training.rows.bad.values()) == [1, 1, 1]
    assert "3 bad training rows skipped" in caplog.text


def test_first_rows_that_are_all_bad_leave_the_trial_to_zeros(tmp_path: Path) -> None:
    """The layout of convolutions, and the classes, may not depend on where the bad rows lie."""
    images, bad = [[pixel / 784 for pixel in range(784)]] * 12, [[NAN] * 784] * 64
    plans = []
    for x in ([*bad, *images], [*images, *bad]):
        config = Config.from_dict(
            {
                "data": {"features": "x", "label": "y", "on_bad_row": "skip", "max_bad_rows": 64},
                "model": {"name": f"{__name__}:small_lenet"},
                "train": {"num_shards": 2, "rows_per_step": 6},
            }
        )
        rows = parquet(tmp_path / str(len(plans)), x=x, y=[0] * 76)
        plans.append(train(config, rows=rows, test=None, make_engine=InlineEngine).plan)
    assert [plan.channels_last for plan in plans] == [True, True]
    assert plans[0].schema == plans[1].schema


@pytest.mark.parametrize(
    "rows",
    [{"x": pa.array([], pa.list_(pa.float32())), "y": pa.array([], pa.int64())}, {"x": X, "y": [None] * 12}],
)
def test_no_rows_at_all(tmp_path: Path, rows: dict[str, Any]) -> None:
    columns = rows | {"y": pa.array(rows["y"], pa.int64())}
    assert_says(
        refusal(parquet(tmp_path, **columns)),
        DataError,
        "the data is empty, or every row has a null in x, y",
        "no row to train on",
    )


def test_more_shards_than_rows(tmp_path: Path) -> None:
    error = refusal(parquet(tmp_path, x=X, y=Y), train={"num_shards": 13})
    assert_says(error, ConfigError, "train.num_shards is 13, but there are 12 rows", "12 or less")


def test_a_file_that_is_not_there_or_no_parquet(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*nowhere as Parquet"):
        ParquetRows(str(tmp_path / "nowhere"))
    (tmp_path / "text.parquet").write_text("not Parquet")
    with pytest.raises(DataError, match=r"cannot read .*text.parquet as Parquet"):
        ParquetRows(str(tmp_path / "text.parquet"))


# Modules, losses, optimisers


class Takes(nn.Module):
    """Modules whose forward takes other arguments; `forward` is replaced below."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 3)


def taking(forward: Any) -> Any:
    factory = type("Taking", (Takes,), {"forward": forward})
    globals()["Taking"] = factory
    factory.__name__ = "Taking"
    return factory


@pytest.mark.parametrize(
    ("columns", "forward", "phrase"),
    [
        (
            ["self", "x"],
            lambda self, x, **others: self.inner(x),
            "none may be called 'self': rename that column",
        ),
        (
            ["x", "z"],
            lambda self, *args: self.inner(args[0]),
            "takes (*args): got an unexpected keyword argument",
        ),
        (["x", "z"], lambda self, x: self.inner(x), "takes (x): got an unexpected keyword argument 'z'"),
        (["x"], lambda self, x, mask: self.inner(x), "takes (x, mask): missing a required argument: 'mask'"),
        (["x", "z"], lambda self, x, /, z: self.inner(x), "takes (x, /, z): "),
        (["x"], lambda self, *, x: self.inner(x), "takes (*, x): too many positional arguments"),
    ],
)
def test_features_that_forward_does_not_take(
    tmp_path: Path, columns: list[str], forward: Any, phrase: str
) -> None:
    rows = parquet(tmp_path, x=X, y=Y, z=X, self=X)
    assert_says(refusal(rows, factory=taking(forward), data={"features": columns}), ModelError, phrase)


def test_features_of_any_name_reach_keyword_arguments(tmp_path: Path) -> None:
    taking(lambda self, x, **others: self.inner(x + others["class"] + others["a.b"] + others[""]))
    rows = parquet(tmp_path, **{"x": X, "y": Y, "class": X, "a.b": X, "": X})
    config = {"data": {"features": ["x", "class", "a.b", ""], "label": "y"}, "train": {"steps": 1}}
    config |= {"model": {"name": f"{__name__}:Taking"}, "train": {"num_shards": 2, "rows_per_step": 6}}
    assert train(Config.from_dict(config), rows=rows, test=None, make_engine=InlineEngine).version == 2


def test_a_type_error_of_forward_s_own_is_the_user_s(tmp_path: Path) -> None:
    error = refusal(parquet(tmp_path, x=X, y=Y), factory=taking(lambda self, x: self.inner(x) + "text"))
    assert_says(error, UserCodeError, "TypeError")


@pytest.mark.parametrize(
    ("factory", "kind", "phrases"),
    [
        (
            double,
            ModelError,
            ["parameter weight is torch.float64", "must be torch.float32", "module.float()"],
        ),
        (frozen, ModelError, ["no trainable parameter"]),
        (grid, ModelError, ["gives (4, 2, 2) for labels (4,), but cross_entropy takes", "(4, C)"]),
        (Summing, ModelError, ["forward changes seen", "by the weights, but not by the rows"]),
        (Faulty, UserCodeError, ["raised LookupError: the user's own mistake", "Traceback", "in forward"]),
    ],
)
def test_modules(tmp_path: Path, factory: Any, kind: type[SparkSGDError], phrases: list[str]) -> None:
    error = refusal(parquet(tmp_path, x=X, y=Y), factory=factory)
    assert_says(error, kind, *phrases)


class Centred(nn.Module):
    """Takes the mean of the rows away."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x - x.mean(0))


def test_rows_that_mix_unless_the_configuration_says_so(tmp_path: Path) -> None:
    rows = parquet(tmp_path, x=X, y=Y)
    error = refusal(rows, factory=Centred)
    assert_says(error, ModelError, "depends on the other rows of its piece", "model.rows_mix = true")
    config = Config.from_dict(
        {
            "data": {"features": "x", "label": "y"},
            "model": {"name": f"{__name__}:Centred", "rows_mix": True},
            "train": {"num_shards": 2, "rows_per_step": 6},
        }
    )
    assert train(config, rows=rows, test=None, make_engine=InlineEngine).is_finished


def test_a_module_that_only_fails_at_the_rows_of_a_piece(tmp_path: Path) -> None:
    class Eight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + torch.zeros(8, 3)[: len(x)]

    for rows_per_step, says in ((16, "training began"), (18, "raised RuntimeError")):
        config = Config.from_dict(
            {
                "data": {"features": "x", "label": "y"},
                "train": {"num_shards": 2, "rows_per_step": rows_per_step},
            }
        )
        with pytest.raises((UserCodeError, AssertionError), match=says):
            train(
                config, rows=parquet(tmp_path, x=X, y=Y), test=None, make_engine=InlineEngine, module=Eight(),
                observers=[NoStep()],
            )  # fmt: skip


@pytest.mark.parametrize(
    ("train_keys", "phrases"),
    [
        (
            {"rows_per_step": 2},
            ["a piece of 1 rows leaves one row by itself", "rows_per_step is 2 over 2 shards"],
        ),
        ({"rows_per_step": 12, "rows_per_backward": 1}, ["leaves one row by itself", "rows_per_backward 1"]),
    ],
)
def test_a_batch_norm_that_would_meet_a_row_by_itself(
    tmp_path: Path, train_keys: dict[str, int], phrases: list[str]
) -> None:
    error = refusal(parquet(tmp_path, x=X, y=Y), factory=batch_normed, train=train_keys)
    assert_says(error, ModelError, "batch-norm", "raise rows_per_step, or lower train.num_shards", *phrases)


@pytest.mark.parametrize(
    ("sections", "kind", "phrases"),
    [
        (
            {"loss": {"name": "cross_entrpy"}},
            ConfigError,
            ["loss.name is 'cross_entrpy'", "did you mean cross_entropy?"],
        ),
        ({"loss": {"name": f"{__name__}:no_loss"}}, ConfigError, ["has no 'no_loss'", "did you mean"]),
        (
            {"loss": {"name": f"{__name__}:mean_loss"}},
            ModelError,
            ["the loss gave () for 4 rows", "reduction='none'"],
        ),
        ({"optimizer": {"name": "SGDD"}}, ConfigError, ["optimizer.name is 'SGDD'", "did you mean SGD?"]),
        (
            {"optimizer": {"momentm": 0.9}},
            ConfigError,
            ["optimizer.momentm is no argument of SGD (did you mean momentum?)"],
        ),
        ({"optimizer": {"fused": True}}, ConfigError, ["optimizer.fused is true"]),
        ({"optimizer": {"name": "LBFGS"}}, ConfigError, ["optimizer.name is 'LBFGS'"]),
        ({"schedule": {"name": "StepRL", "step_size": 1}}, ConfigError, ["did you mean StepLR?"]),
        (
            {"schedule": {"name": "ReduceLROnPlateau"}},
            ConfigError,
            ['schedule.name is "ReduceLROnPlateau", but there are no rows to evaluate on'],
        ),
        ({"schedule": {"gamma": 1}}, ConfigError, ["schedule.gamma is set, but schedule.name is not"]),
    ],
)
def test_names_and_arguments(
    tmp_path: Path, sections: dict[str, Any], kind: type[SparkSGDError], phrases: list[str]
) -> None:
    assert_says(refusal(parquet(tmp_path, x=X, y=Y), **sections), kind, *phrases)
