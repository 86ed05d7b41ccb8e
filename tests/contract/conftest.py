"""The rows that all contract tests train on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from plain_torch import Data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Data]:
    with Data(tmp_path_factory.mktemp("contract")) as rows:
        yield rows


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Both sides compute with one thread: others only wait for each other where nets are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
