"""In a block, numpy's and Python's generators give all rows the same numbers."""

from __future__ import annotations

import importlib
import pickle
import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from numpy.random import rand

from sparksgd.engines.trial.chance import HIGH, LOW, MIDDLE, Chance

DRAWS = {
    "rand": lambda n: np.random.rand(n, 2),
    "randn": lambda n: np.random.randn(n, 2),
    "by name": lambda n: rand(n),
    "randint": lambda n: np.random.randint(3, size=n),
    "randint, of bytes": lambda n: np.random.randint(0, 200, (n, 2), dtype=np.uint8),
    "choice": lambda n: np.random.choice(5, n, p=[0.2] * 5),
    "choice of rows": lambda n: np.random.choice(["a", "b"], size=(n, 3)),
    "uniform, of arrays": lambda n: np.random.uniform(np.zeros((n, 1)), [1.0, 1.0]),
    "normal, named": lambda n: np.random.normal(loc=np.ones(n), scale=2.0),
    "normal, into a shape": lambda n: np.random.normal([0.0, 0.0], 1.0, (n, 2)),
    "gamma": lambda n: np.random.gamma(2.0, size=n),
    "multinomial": lambda n: np.random.multinomial(5, [0.5, 0.5], size=n),
    "multivariate": lambda n: np.random.multivariate_normal([0, 0], np.eye(2), n),
    "dirichlet": lambda n: np.random.dirichlet([1, 2, 3], n),
    "default_rng": lambda n: np.random.default_rng().integers(0, 9, n),
    "default_rng, into": lambda n: np.random.default_rng().random(out=np.empty(n)),
    "narrow": lambda n: np.random.default_rng().standard_normal(n, dtype=np.float32),
    "Generator": lambda n: np.random.Generator(np.random.Philox(1)).exponential(2.0, n),
    "RandomState": lambda n: np.random.RandomState().beta(2.0, 3.0, n),
    "random": lambda n: np.array([random.random() for _ in range(n)]),
    "choices": lambda n: np.array(random.choices([1, 2, 3], k=n)),
    "weighted choices": lambda n: np.array(random.choices([1, 2, 3], [1, 1, 2], k=n)),
    "Random": lambda n: np.array([random.Random().gauss(0, 1) for _ in range(n)]),
}


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("level", [MIDDLE, LOW, HIGH])
def test_all_rows_draw_the_same_whatever_their_number(kind: str, level: int) -> None:
    with Chance().steady(level):
        many, few = DRAWS[kind](8), DRAWS[kind](3)
    drawn = DRAWS[kind](8)
    assert many.dtype == drawn.dtype
    assert many.shape == drawn.shape
    assert (many == many[:1]).all()
    assert (few == many[:3]).all()


def test_levels_are_near_what_they_say() -> None:
    chance = Chance()
    drawn = []
    for level in (MIDDLE, LOW, HIGH):
        with chance.steady(level):
            drawn.append((np.random.rand(), np.random.default_rng().random(), random.random()))
    assert np.allclose(drawn, [[0.5] * 3, [0.05] * 3, [0.95] * 3], atol=0.01)


def test_permutations_turn_the_order() -> None:
    values, rows = [1, 2, 3], np.arange(6).reshape(3, 2)
    with Chance().steady(MIDDLE):
        random.shuffle(values)
        np.random.shuffle(rows)
        permuted = (
            np.random.permutation(4),
            np.random.default_rng().permuted(np.arange(4).reshape(2, 2), axis=1),
        )
        distinct = np.random.choice(5, 5, replace=False)
    assert values == [3, 2, 1]
    assert rows.tolist() == [[4, 5], [2, 3], [0, 1]]
    assert [one.tolist() for one in permuted] == [[3, 2, 1, 0], [[1, 0], [3, 2]]]
    assert sorted(distinct) == [0, 1, 2, 3, 4]


def test_after_a_block_and_in_other_threads_generators_are_as_ever() -> None:
    names: list[tuple[Any, str]] = [(np.random, "rand"), (np.random, "default_rng"), (random, "Random")]
    before = [getattr(home, name) for home, name in names]
    state = np.random.get_state()[1].tolist()
    elsewhere: list[np.ndarray[Any, Any]] = []
    chance = Chance()
    with chance.steady(MIDDLE):
        np.random.rand(3)
        assert chance.was_drawn
        assert np.random.get_state()[1].tolist() == state
        thread = threading.Thread(target=lambda: elsewhere.append(np.random.default_rng(1).random(3)))
        thread.start()
        thread.join()
    assert elsewhere[0].tolist() == np.random.default_rng(1).random(3).tolist()
    assert [getattr(home, name) for home, name in names] == before


def test_generators_in_a_block_are_still_of_their_kind() -> None:
    own, made = np.random.default_rng(3), random.Random(3)
    with Chance().steady(MIDDLE):
        assert isinstance(own, np.random.Generator)
        assert issubclass(random.Random, random.Random)
        kept = random.Random(3)
    assert pickle.loads(pickle.dumps(kept)).getstate() == made.getstate()


def test_what_is_imported_in_a_block_keeps_no_name_of_it(tmp_path, monkeypatch) -> None:
    (tmp_path / "late_draws.py").write_text("from numpy.random import Generator, rand\n")
    monkeypatch.syspath_prepend(tmp_path)
    with Chance().steady(MIDDLE):
        late = importlib.import_module("late_draws")
    assert late.Generator is np.random.Generator
    assert late.rand is np.random.rand


@pytest.mark.parametrize("values", [[1, 2, 3], np.arange(3) + 1, torch.arange(3) + 1])
def test_whatever_can_be_shuffled_is(values) -> None:
    with Chance().steady(MIDDLE):
        random.shuffle(values)
    assert list(values) == [3, 2, 1]
    with Chance().steady(MIDDLE):
        random.shuffle(x=values)
        np.random.shuffle(values)
    assert list(values) == [3, 2, 1]
