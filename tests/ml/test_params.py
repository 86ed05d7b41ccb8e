"""Params of Estimators: their names, and which defaults are not a configuration's."""

from __future__ import annotations

import pytest
from torch import nn

from sparksgd.config import Config
from sparksgd.errors import ConfigError
from sparksgd.ml import TorchClassifier
from sparksgd.ml.params import ALIASES, KEYS


def test_defaults_are_those_of_a_configuration_but_for_four():
    classifier, config = TorchClassifier(), Config()
    told = {name: classifier.getOrDefault(name) for name in KEYS if classifier.hasDefault(name)}
    assert told == {
        "loss": config.loss.name,
        "optimizer": "AdamW",
        "learningRate": 1e-3,
        "maxEpochs": 10,
        "batchSize": config.train.rows_per_step,
        "seed": config.train.seed,
        "engine": "auto",
    }
    assert (config.loss.name, config.train.rows_per_step, config.train.seed) == ("cross_entropy", 128, 0)


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_names_of_other_libraries_are_taken(alias):
    assert TorchClassifier(**{alias: 7}).getOrDefault(ALIASES[alias]) == 7
    with pytest.raises(ConfigError, match="are the same Param: give one of them"):
        TorchClassifier(**{alias: 7, ALIASES[alias]: 7})


def test_a_misspelt_param_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"no Param 'batchsize' \(did you mean batchSize\?\)"):
        TorchClassifier(batchsize=3)
    with pytest.raises(TypeError, match="batchSize"):
        TorchClassifier(batchSize="many")
    with pytest.raises(TypeError, match=r"'skpi', but must be error or skip or keep \(did you mean skip\?\)"):
        TorchClassifier(handleInvalid="skpi")
    with pytest.raises(TypeError, match=r"loss.*3, but must be a name, an import path, a function or an nn"):
        TorchClassifier(loss=3)
    with pytest.raises(TypeError, match=r"predictBatchSize.*0, but must be at least 1"):
        TorchClassifier(predictBatchSize=0)


def test_copies_have_params_of_their_own_and_one_module():
    classifier = TorchClassifier(module=nn.Linear(2, 2))
    other = classifier.copy({classifier.maxEpochs: 3})
    assert (classifier.getOrDefault("maxEpochs"), other.getOrDefault("maxEpochs")) == (10, 3)
    assert other.getOrDefault("module") is classifier.getOrDefault("module")
