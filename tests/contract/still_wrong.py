"""Kinds that the product does not get right yet, and why; a kind leaves this table when it does."""

from __future__ import annotations

from typing import Any

import pytest

NOT_YET = "one of the kinds that are being mended"

STILL_WRONG: dict[str, str] = dict.fromkeys(
    (
        "ASGD",
        "Adadelta",
        "Adagrad",
        "Adam, amsgrad",
        "AdamW",
        "Adamax",
        "LazyBatchNorm1d",
        "LazyConv1d",
        "LazyConv2d",
        "LazyConvTranspose1d",
        "LazyInstanceNorm1d",
        "LazyLinear",
        "Lion",
        "Muon",
        "NAdam",
        "RAdam",
        "RMSprop, centered",
        "SGD, momentum and decay",
        "a Python counter",
        "a Python generator",
        "a branch by memory layout",
        "a buffer averages weights",
        "a buffer copies weights",
        "a buffer that is a weight",
        "a cache of evaluation",
        "a convolution of bounded norm",
        "a frozen bfloat16 backbone",
        "a frozen teacher follows",
        "a generator of the module's own",
        "a hook after accumulation",
        "a hook on a parameter masks",
        "a hook that clips",
        "a lambda of a parameter",
        "a lock",
        "a parameter that is another's transpose",
        "a recurrent layer over rows",
        "a scripted module",
        "a tensor attribute that changes",
        "a view of a weight",
        "a weak reference",
        "an activation kept",
        "an adapter that evaluation merges",
        "an attribute of a parameter",
        "an embedding of bounded norm",
        "an open file",
        "attention over rows",
        "clears gradients",
        "complex views",
        "contrasted",
        "counting",
        "counts in Python",
        "divided_by_rows",
        "a norm over rows in evaluation",
        "modules that draw",
        "experts, some left out by a piece",
        "forward clamps data in place",
        "forward makes a submodule",
        "forward projects in training",
        "forward rebinds data",
        "forward takes gradients",
        "gradients scaled by frequency",
        "groups of its own",
        "hooks on parameters scale",
        "margins",
        "memory read with strides",
        "nothing has an influence",
        "outer",
        "parameters that overlap",
        "parameters() gives some",
        "pruned",
        "rebinds data",
        "rebinds gradients",
        "rows minus their mean",
        "rows that are sorted",
        "spectral_norm",
        "spectral_norm, the old one",
        "state that changes every fifth call",
        "weight_norm, the old one",
    ),
    NOT_YET,
)
"""By kind."""


def kinds(names: Any) -> list[Any]:
    """Return parameters of a test, those that are still wrong marked."""
    return [
        pytest.param(name, marks=pytest.mark.xfail(reason=STILL_WRONG[name], raises=BaseException))
        if name in STILL_WRONG
        else name
        for name in names
    ]
