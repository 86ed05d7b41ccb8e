"""What optimisers of one's own keep comes back from a checkpoint and runs no foreign code, or is named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import carried_kinds
import pytest
import torch
from resumed_jobs import EVERY_STEP, KINDS, SHORT, Jobs, copied_until, forge

from sparksgd.errors import SparkSGDError
from sparksgd.runs.checkpoints import manifests
from sparksgd.storage import location

pytestmark = pytest.mark.usefixtures("every_checkpoint", "log")


# Nobody gets in


class Evil:
    def __reduce__(self) -> Any:
        return print, ("somebody got in",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Evil()),
        b"cos\nsystem\n(S'echo somebody got in'\ntR.",
        b"\x80\x04\x8c\x0fresumed_modules\x8c\x0dtorch.os.exit\x93)R.",
        b"cresumed_modules\ntorch\n.",
        b"csubprocess\nPopen\n(S'true'\ntR.",
        b"ctorch.hub\nload\n(S'a'\ntR.",
        b"cbuiltins\ngetattr\n.",
        b"ctorch\nload\n(S'/dev/zero'\ntR.",
        b"cresumed_modules\nwith_norm\n(tR.",
        b"cnumpy.f2py.__main__\nmain\n.",
        b"ctorch.fx._lazy_graph_module\n_LazyGraphModule\n.",
        b"ctorch.nn\nIdentity\n(tR.",
        b"csparksgd.arithmetic.reductions\n_set_module_state\n.",
        b"csparksgd.arithmetic.reductions\n_set_tensor_state\n(ctorch\nTensor\n((dS'x'\nI1\ns(lttR.",
    ],
    ids=[
        "builtin",
        "os",
        "through a module of the package",
        "a module",
        "Popen",
        "torch.hub",
        "getattr",
        "load",
        "a function of the package",
        "an import that runs",
        "a module that runs its source",
        "a module of torch",
        "what calls __setstate__",
        "attributes of a class",
    ],
)
def test_what_an_own_optimiser_kept_runs_nothing(
    jobs: Jobs, tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    kind = KINDS["optimiser and schedule of one's own"]
    if not (jobs.folder / "attacked").exists():
        jobs.stopped_at("attacked", 3, SHORT, kind)
    out = f"attacked by {len(content)} {hash(content)}"
    names = [each.name for each in manifests(location(jobs.folder / "attacked" / "checkpoints"))]
    copied_until(jobs.folder / "attacked", jobs.folder / out, names)
    replace_attributes(jobs.folder / out / "checkpoints", content)
    with pytest.raises(SparkSGDError, match=r"neither plain nor a class of|does not fit this run"):
        jobs.run(out, SHORT, kind)
    assert "somebody got in" not in "".join(capfd.readouterr())


def replace_attributes(checkpoints: Path, content: bytes) -> None:
    """Let the newest checkpoint have another pickle where the optimiser's is, with digests that fit."""
    import hashlib

    (manifest,) = checkpoints.glob("*.json")
    part = next(checkpoints.glob("*.solver.pt"))
    values = torch.load(part, weights_only=True)
    values["rest"]["optimizer"]["attributes"]["raw"] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    torch.save(values, part)
    parts = json.loads(manifest.read_text())["parts"]
    data = part.read_bytes()
    parts["solver"] |= {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    forge(manifest, parts=parts)


# What cannot be read or carried


def test_a_state_that_cannot_be_read_again_is_said_at_the_first_checkpoint(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sparksgd.solvers.synchronous import SynchronousSolver

    state = SynchronousSolver.state

    def strange(self: SynchronousSolver) -> Any:
        found = state(self)
        found.rest["optimizer"]["path"] = Path("/")  # type: ignore[index]  # as an optimiser of torch's might
        return found

    monkeypatch.setattr(SynchronousSolver, "state", strange)
    assert jobs.run("unreadable", EVERY_STEP)["status"] == "finished"
    assert caplog.text.count("this run has no checkpoints, and cannot go on if it is killed: ") == 1
    assert list((jobs.folder / "unreadable" / "checkpoints").glob("*.json")) == []


def test_a_state_that_cannot_be_carried_any_more_is_said_and_training_goes_on(
    jobs: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    kind = {"optimizer": {"name": "carried_kinds:MadeInStep", "lr": 0.01}}
    whole = jobs.run("carried no more", EVERY_STEP, kind)
    assert (
        "this run has no checkpoint from now on, and goes on from the last one: the optimiser" in caplog.text
    )
    kept = [each.step for each in manifests(location(jobs.folder / "carried no more" / "checkpoints"))]
    assert (whole["steps"], max(kept)) == (10, carried_kinds.LATE - 1)


def test_an_object_of_another_package_is_named_at_the_first_checkpoint(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kind = {"optimizer": {"name": "resumed_modules:Foreign", "lr": 0.01}}
    jobs.run("foreign", SHORT, kind)
    assert "it names string.Template, which is neither plain nor a class of resumed_modules" in caplog.text
    assert "SPARKSGD_TRUST" in caplog.text
    monkeypatch.setenv("SPARKSGD_TRUST", "string")
    jobs.stopped_at("trusted", 2, SHORT, kind)
    assert jobs.run("trusted", SHORT, kind)["resumed"][0]["step"] == 2
