"""Defaults, then TOML, then settings; every key has a meaning, an owner and a clear refusal."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
from pathlib import Path

import pytest

from sparksgd.config import Config, DataConfig, ModelConfig, TrainConfig, data_keys, sections
from sparksgd.errors import ConfigError

CONTRACT = {
    "data.train",
    "data.test",
    "data.features",
    "data.label",
    "data.placement",
    "model.name",
    "loss.name",
    "optimizer.name",
    "engine.name",
    "engine.num_workers",
    "train.epochs",
    "train.steps",
    "train.rows_per_step",
    "train.num_shards",
    "train.seed",
    "train.threads",
    "train.rows_per_backward",
    "train.eval_every",
}


def toml(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_the_keys_that_other_tools_rely_on_are_there() -> None:
    assert set(Config.keys()) >= CONTRACT


def test_every_key_belongs_to_the_experiment_or_to_the_cluster() -> None:
    assert {scope for scope, _ in Config.keys().values()} == {"experiment", "cluster"}
    of_the_cluster = {
        key
        for key, (scope, _) in Config.keys().items()
        if scope == "cluster" and not key.startswith("cluster.")  # which the simulated engine alone reads
    }
    # Nothing else may leave the parameters' bits alone, so nothing else may be called the cluster's.
    assert of_the_cluster == {
        "engine.name",
        "engine.num_workers",
        "engine.slots_timeout_s",
        "engine.barrier",
        "engine.max_attempts",
        "engine.segment_steps",
        "engine.peer_timeout_s",
        "engine.step_timeout_s",
        "engine.encrypt",
        "engine.overlap",
        "engine.ports",
        "train.eval_every",
        "train.max_wall_s",
        "train.metrics",
        "checkpoint.every_s",
        "checkpoint.every_steps",
        "checkpoint.every_epochs",
        "checkpoint.keep",
    }


def test_every_field_says_what_it_means() -> None:
    silent = []
    for part in [*ast.parse(inspect.getsource(data_keys)).body, *ast.parse(inspect.getsource(sections)).body]:
        if not (isinstance(part, ast.ClassDef) and part.name.endswith("Config") and part.name != "Config"):
            continue
        for statement, following in zip(part.body, [*part.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign):
                told = (
                    isinstance(following, ast.Expr)
                    and isinstance(following.value, ast.Constant)
                    and isinstance(following.value.value, str)
                )
                silent += [] if told else [f"{part.name}.{ast.unparse(statement.target)}"]
    assert silent == []


def test_settings_lie_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = toml(tmp_path, "[train]\nepochs = 3\nseed = 5\n[data]\nlabel = 'digit'\n")
    config = Config.load(file, ["train.epochs=7", "engine.name=inline"])
    assert config.train.epochs == 7
    assert config.train.seed == 5
    assert config.data.label == "digit"
    assert config.engine.name == "inline"
    assert config.train.rows_per_step == 128


def test_no_file_and_no_setting_are_the_defaults() -> None:
    assert Config.load() == Config()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("train.steps=12", 12),
        ("train.steps = 12", 12),
        ("train.steps=none", None),
        ("engine.step_timeout_s=1", 1.0),
        ("engine.step_timeout_s=2.5", 2.5),
        ("data.label=digit", "digit"),
        ('data.label="a b=c"', "a b=c"),
        ("data.train=hdfs://host:9000/a.parquet", "hdfs://host:9000/a.parquet"),
        ("data.features=image", ("image",)),
        ('data.features=["left", "right"]', ("left", "right")),
    ],
)
def test_a_setting_is_toml_or_a_bare_word(setting: str, value: object) -> None:
    section, _, key = setting.partition("=")[0].strip().partition(".")
    found = getattr(getattr(Config.load(settings=[setting]), section), key)
    assert found == value
    assert type(found) is type(value)


def test_what_a_section_does_not_know_goes_to_the_factory_that_it_names() -> None:
    config = Config.load(
        settings=["model.hidden=64", "model.maps=[2, 3]", "optimizer.nesterov=true", "schedule.T_max=9"]
    )
    assert config.model.arguments == {"hidden": 64, "maps": [2, 3]}
    assert config.optimizer.arguments == {"nesterov": True}
    file = {"model": {"hidden": 64, "maps": [2, 3]}}
    assert Config.load(file, ["model.hidden=none"]).model.arguments == {"maps": [2, 3]}
    assert config.schedule.arguments == {"T_max": 9}


def test_a_configuration_survives_being_written_down() -> None:
    config = Config.load(
        settings=[
            "data.train=a.parquet",
            'data.features=["left","right"]',
            "model.hidden=8",
            "optimizer.lr=0.1",
            "schedule.name=StepLR",
            "schedule.step_size=2",
            "solver.clip_norm=1.5",
            "train.steps=9",
        ]
    )
    assert Config.from_dict(config.to_dict()) == config
    assert Config.from_dict(Config().to_dict()) == Config()


@pytest.mark.parametrize(
    ("settings", "phrases"),
    [
        (["train.epoch=3"], ["unknown key train.epoch", "did you mean epochs?"]),
        (["train.rows_per_stp=3"], ["did you mean rows_per_step?"]),
        (["trian.epochs=3"], ["unknown section [trian]", "did you mean train?"]),
        (["train.epochs=2.5"], ["train.epochs is 2.5", "must be a whole number"]),
        (["train.epochs=true"], ["train.epochs is True", "must be a whole number"]),
        (["train.epochs=many"], ["train.epochs is 'many'", "must be a whole number"]),
        (["train.epochs=none"], ["train.epochs is None", "must be a whole number"]),
        (["train.steps=x"], ["must be a whole number or none"]),
        (["train.epochs=0"], ["train.epochs is 0", "must be at least 1"]),
        (["train.rows_per_step=-1"], ["train.rows_per_step is -1", "must be at least 1"]),
        (["train.num_shards=0"], ["train.num_shards is 0", "must be at least 1"]),
        (["engine.num_workers=0"], ["engine.num_workers is 0", "must be at least 1"]),
        (["data.max_bad_rows=-1"], ["data.max_bad_rows is -1", "must be at least 0"]),
        (["data.train="], ["data.train is '', but must name a file or folder"]),
        (["data.test='  '"], ["data.test is '  ', but must name a file or folder"]),
        (["data.features=[]"], ["data.features names no column"]),
        (["data.features=[1, 2]"], ["data.features is [1, 2]", "a name or a list of names"]),
        (["data.label=3"], ["data.label is 3", "must be a text"]),
        (["data.on_bad_row=ignore"], ["data.on_bad_row is 'ignore'", "'error' or 'skip'"]),
        (["data.placement=random"], ["data.placement is 'random'", "'hashed' or 'in_place'"]),
        (["data.features=label"], ["data.label is 'label', which data.features names, too"]),
        (["data.id=features"], ["data.id is 'features', which is a feature or the label"]),
        (["engine.ports=40000"], ["engine.ports is 40000", "but must be a text or none"]),
        (["engine.ports=a-b"], ["engine.ports is 'a-b', but must be like 40000-40099"]),
        (["engine.ports=50-40"], ["engine.ports is '50-40', but must be like 40000-40099"]),
        (["engine.peer_timeout_s=0"], ["engine.peer_timeout_s is 0.0, but must be at least 1"]),
        (["epochs=3"], ["'epochs=3' is not of the form section.key=value"]),
        (["train.epochs"], ["'train.epochs' is not of the form section.key=value"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_wrong_setting_is_refused_with_the_value_and_the_rule(
    settings: list[str], phrases: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        Config.load(settings=settings)
    for phrase in phrases:
        assert phrase in str(refused.value)


def test_a_file_that_is_no_configuration_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*none\.toml: No such file"):
        Config.load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"run\.toml is not valid TOML"):
        Config.load(toml(tmp_path, "[train\n"))
    with pytest.raises(ConfigError, match=r"train is 3, but is a section"):
        Config.load(toml(tmp_path, "train = 3\n"))
    with pytest.raises(ConfigError, match=r"train is 3, but is a section"):
        Config.load(toml(tmp_path, "train = 3\n"), ["train.epochs=1"])


def test_a_configuration_made_in_python_is_checked_as_well() -> None:
    with pytest.raises(ConfigError, match=r"train.num_shards is 0"):
        Config(train=TrainConfig(num_shards=0))
    with pytest.raises(ConfigError, match="names no column"):
        Config(data=DataConfig(features=()))


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().name = "other"  # type: ignore[misc]  # the point of the test


def test_what_is_no_file_of_text_is_refused_before_it_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for a writer
    (tmp_path / "large.toml").write_bytes(b"#" * (2**20 + 1))
    for path, reason in (
        (tmp_path / "pipe", "it is not a regular file: it is a pipe, a socket or a device"),
        (Path("/dev/zero"), "it is not a regular file: it is a pipe, a socket or a device"),
        (tmp_path, "Is a directory"),
        (tmp_path / "large.toml", "it has 1,048,577 bytes, but may have 1,048,576 at most"),
    ):
        with pytest.raises(ConfigError, match=f"cannot read the configuration {path}: {reason}"):
            Config.load(path)
    with pytest.raises(ConfigError, match="cannot read the configuration a\0b: "):
        Config.load("a\0b")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbf[train]\nseed = 5\n")
    assert Config.load(tmp_path / "run.toml").train.seed == 5
    (tmp_path / "run.toml").write_bytes("[train]\nseed = 5\n".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"run\.toml is not valid TOML: 'utf-8' codec .*; save it as UTF-8"):
        Config.load(tmp_path / "run.toml")


def test_what_python_code_passes_is_checked_and_becomes_what_toml_gives() -> None:
    config = Config(data=DataConfig(features=["left", "right"]))  # type: ignore[arg-type]  # as users write it
    assert config.data.features == ("left", "right")
    with pytest.raises(ConfigError, match=r"train\.epochs is '3', but must be a whole number"):
        Config(train=TrainConfig(epochs="3"))  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(ConfigError, match=r"train is 3, but must be a TrainConfig"):
        Config(train=3)  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(ConfigError, match=r"model\.name is 'x', but no argument can have this name"):
        Config(model=ModelConfig(arguments={"name": "x"}))
    with pytest.raises(ConfigError, match=r"^the configuration is 3, but must be a dict of its sections"):
        Config.from_dict(3)  # type: ignore[arg-type]  # the point of the test
