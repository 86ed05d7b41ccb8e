"""Every data set of the registry can be prepared; a new one joins by its row in `DATASETS`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import sparksgd.data.sets
from sparksgd.data.sets import DATASETS, find_dataset
from sparksgd.errors import ConfigError


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_pairs_images_with_labels_and_can_be_had(name: str) -> None:
    dataset = find_dataset(name)
    assert dataset.name == name
    for split in (dataset.train, dataset.test):
        assert split.labels.shape == split.images.shape[:1]
        assert all(re.fullmatch("[0-9a-f]{64}", file.sha256) for file in split.files)
    assert all(mirror.endswith("/") for mirror in dataset.mirrors)
    assert dataset.by_hand


def test_no_two_files_are_the_same() -> None:
    files = [f for d in DATASETS.values() for s in (d.train, d.test) for f in s.files]
    assert len({file.sha256 for file in files}) == len(files) == 8


def test_a_file_goes_by_a_dash_or_a_dot() -> None:
    assert DATASETS["mnist"].test.labels.names == (
        "t10k-labels-idx1-ubyte",
        "t10k-labels-idx1-ubyte.gz",
        "t10k-labels.idx1-ubyte",
        "t10k-labels.idx1-ubyte.gz",
    )


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("minst", "which is not one of ours (did you mean mnist?)"),
        ("Fashion_MNIST", "did you mean fashion-mnist?"),
        ("cifar10", "dataset is 'cifar10', which is not one of ours (valid: fashion-mnist, mnist)"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_dataset(name)
    assert hint in str(caught.value)


def test_the_package_needs_neither_torch_nor_pyspark() -> None:
    folder = Path(sparksgd.data.sets.__file__).parent
    program = f"""
import sys, types
sys.modules |= dict(torch=None, pyspark=None)
# This package alone is tried, not what sparksgd/__init__.py may import.
parent = sys.modules["sparksgd"] = types.ModuleType("sparksgd")
parent.__path__ = [{str(folder.parent)!r}]
import sparksgd.data.sets
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
