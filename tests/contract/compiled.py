"""Program: train modules that torch compiles, in a process of its own, and print how each ended.

The back ends need no C++ compiler.  The compiler is large, and stays in a process once it is there.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "modules")]


def main() -> None:
    """Print a line for each kind."""
    import torch
    from contract_kinds import Net
    from plain_torch import Data, Make, Recipe, compared

    class CompiledPart(Net):
        """A net whose activation is a compiled function."""

        def __init__(self) -> None:
            super().__init__()
            self.compiled = torch.compile(torch.tanh, backend="eager")

        def act(self, x: torch.Tensor) -> torch.Tensor:
            return self.compiled(x)

    def in_place() -> torch.nn.Module:
        net = Net()
        net.compile(backend="eager")
        return net

    makes: dict[str, Make] = {
        "torch.compile, eager": lambda: torch.compile(Net(), backend="eager"),
        "torch.compile, aot_eager": lambda: torch.compile(Net(), backend="aot_eager"),
        "module.compile()": in_place,
        "a compiled function": CompiledPart,
    }
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with Data(Path(tempfile.mkdtemp())) as data:
        for kind, make in makes.items():
            verdict = compared(make, Recipe(), data, 4, 1e-10)
            print(f"{kind}: {str(verdict).splitlines()[0]}", flush=True)


if __name__ == "__main__":
    main()
