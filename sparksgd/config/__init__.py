"""The configuration: defaults, then a TOML file, then `--set section.key=value`."""

from sparksgd.config.cluster_keys import ClusterConfig
from sparksgd.config.data_keys import DataConfig
from sparksgd.config.sections import (
    CheckpointConfig,
    Config,
    EarlyStoppingConfig,
    EngineConfig,
    LossConfig,
    LossKind,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    SolverConfig,
    TrainConfig,
)
from sparksgd.config.tables import MOST, Readable, read_section

__all__ = [
    "MOST",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "EarlyStoppingConfig",
    "EngineConfig",
    "LossConfig",
    "LossKind",
    "ModelConfig",
    "OptimizerConfig",
    "Readable",
    "ScheduleConfig",
    "SolverConfig",
    "TrainConfig",
    "read_section",
]
