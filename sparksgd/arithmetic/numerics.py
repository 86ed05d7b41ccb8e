"""What the bits of a gradient depend on besides the experiment: torch's build, the CPU and threads."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

import torch
from torch.nn import functional as F

from sparksgd.arithmetic import instruction_set

__all__ = ["Numerics", "package_digest", "thread_count"]


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """The arithmetic of a process.  Two processes that differ in a field may give different bits."""

    torch: str
    """Version, with its build."""

    instruction_set: str
    """What torch's own kernels use."""

    held_by: str
    """Environment variables that restrict torch, oneDNN or MKL to less than the CPU offers."""

    threads: int
    """Threads of one operation."""

    arithmetic: str
    """Digest of a small convolution and matrix product, forward and backward: the bits themselves."""

    python: str
    """Python's version."""

    package: str
    """Digest of sparksgd's own source."""

    @classmethod
    def here(cls, threads: int) -> Numerics:
        """Return this process's numerics with a number of threads."""
        names = sorted(instruction_set.variables("default"))
        with thread_count(threads):
            return cls(
                torch=str(torch.__version__),
                instruction_set=torch.backends.cpu.get_cpu_capability(),
                held_by=" ".join(f"{n}={os.environ[n]}" for n in names if n in os.environ),
                threads=threads,
                arithmetic=_arithmetic(threads),
                python=platform.python_version(),
                package=package_digest(),
            )

    def differences(self, other: Numerics) -> list[str]:
        """Return "field: mine, theirs" for each field in which two processes differ."""
        return [
            f"{name} {mine or 'none'} / {theirs or 'none'}"
            for name, mine in vars(self).items()
            if mine != (theirs := getattr(other, name))
        ]


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """In the block, let torch use this many threads; then as many as before."""
    before = torch.get_num_threads()
    if before == threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def _arithmetic(threads: int) -> str:
    def numbers(*shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        values = (torch.arange(count) * 40503 % 65536).float() / 65536 - 0.5  # the same bits on every machine
        return values.view(shape).requires_grad_()

    image, kernel, matrix = numbers(16, 1, 28, 28), numbers(8, 5, 5, 1), numbers(64, 1152)
    hidden = F.max_pool2d(F.conv2d(image, kernel.permute(0, 3, 1, 2)), 2).flatten(1)
    gradients = torch.autograd.grad((hidden @ matrix.T).exp().sum(), [image, kernel, matrix])
    digest = hashlib.sha256()
    for gradient in gradients:
        digest.update(gradient.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


@cache
def package_digest() -> str:
    """Return a digest of sparksgd's source files; they may be in a zip."""
    digest = hashlib.sha256()

    def add(folder: Traversable, prefix: str) -> None:
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
            if entry.is_dir():
                add(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".py"):
                digest.update(f"{prefix}{entry.name}\n".encode() + entry.read_bytes())

    add(files("sparksgd"), "")
    return digest.hexdigest()[:12]
