"""Params of Estimators: their names, and which defaults are not a configuration's."""

from __future__ import annotations

import pytest
from torch import nn

from sparksgd.config import Config
from sparksgd.errors import ConfigError
from sparksgd.ml import TorchClassifier, TorchRegressor
from sparksgd.ml.params import ALIASES, KEYS

OTHER_DEFAULTS = {"optimizer", "learningRate", "maxEpochs", "engine"}
"""They suit most tables and modules; a configuration's are those of the papers and of one pass."""


def test_defaults_are_those_of_a_configuration_but_for_four():
    classifier, config = TorchClassifier(), Config()
    for name, key in KEYS.items():
        section, _, field = key.partition(".")
        default = getattr(getattr(config, section), field, None)
        own = classifier.getOrDefault(name) if classifier.hasDefault(name) else default
        assert (own == default) is (name not in OTHER_DEFAULTS), name


def test_every_param_says_what_it_is():
    for kind in (TorchClassifier, TorchRegressor):
        assert all(len(param.doc) > 10 for param in kind().params)
        assert "maxEpochs" in kind().explainParams()


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


def test_copies_have_params_of_their_own_and_one_module():
    classifier = TorchClassifier(module=nn.Linear(2, 2))
    other = classifier.copy({classifier.maxEpochs: 3})
    assert (classifier.getOrDefault("maxEpochs"), other.getOrDefault("maxEpochs")) == (10, 3)
    assert other.getOrDefault("module") is classifier.getOrDefault("module")
