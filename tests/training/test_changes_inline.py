"""What forward makes of a parameter or buffer is part of the step, as where one process computes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from changing_modules import Adapter
from torch import nn

from sparksgd.config import Config
from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.inline import InlineEngine
from sparksgd.errors import ModelError
from sparksgd.training.loop import train
from sparksgd.training.state import Observer, Training

Rows = list[tuple[list[float], float]]
State = dict[str, torch.Tensor]

GENERATOR = torch.Generator().manual_seed(5)
NUMBERS: Rows = [
    (x.tolist(), float(y))
    for x, y in zip(
        torch.randn(24, 6, generator=GENERATOR), torch.randn(24, generator=GENERATOR), strict=True
    )
]
WORDS: Rows = [([float(n % 6)], float(n % 3)) for n in range(24)]
IMAGES: Rows = [
    (x.tolist(), float(y))
    for x, y in zip(
        torch.randn(16, 36, generator=GENERATOR), torch.randn(16, generator=GENERATOR), strict=True
    )
]
LINE: Rows = [([x], 2 * x) for x in (-1.0, 1.0, -2.0, 2.0)]


# Modules whose forward changes something


class Rebound(nn.Module):
    """y = w x, with |w| at most 5."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.w.data = self.w.data.clamp(-5, 5)
        return x[:, 0] * self.w


class Projected(nn.Module):
    """A linear module whose weights forward clamps, in one way or another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.how, self.linear = how, nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.linear.weight
        if self.how == "data":
            weight.data.clamp_(-0.1, 0.1)
        elif self.how == "no_grad":
            with torch.no_grad():
                weight.clamp_(-0.1, 0.1)
        elif self.how == "rebound":
            weight.data = weight.data.clamp(-0.1, 0.1)
        elif self.how == "sliced":
            weight.data[:, :2] *= 0.5
        return self.linear(x)[:, 0]


class Words(nn.Module):
    """Embeddings whose norms forward holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.words = nn.Embedding(6, 4, max_norm=1.0)
        self.out = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.words(x[:, 0].long()))[:, 0]


class HeldConvolution(nn.Conv2d):
    """A convolution whose filters have a norm of at most 0.3, as EEGNet has them."""

    in_place = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.3)
        if self.in_place:
            self.weight.data.copy_(held)
        else:
            self.weight.data = held
        return super().forward(x)


class Images(nn.Module):
    """A convolution with held filters, and a frozen one that is held, too."""

    def __init__(self, in_place: bool, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = HeldConvolution(1, 4, 3)
        self.second = HeldConvolution(4, 3, 2)
        self.first.in_place = self.second.in_place = in_place
        if frozen:
            self.first.requires_grad_(False)
        self.out = nn.Linear(27, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.second(self.first(x.view(-1, 1, 6, 6)).relu()).flatten(1))[:, 0]


class Averaged(nn.Module):
    """Keeps an average of its weights in a buffer, in place or by a new tensor."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.in_place, self.linear = in_place, nn.Linear(6, 1)
        self.register_buffer("average", torch.zeros(1, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.in_place:
            self.average.lerp_(self.linear.weight.detach(), 0.1)
        else:
            self.average = 0.9 * self.average + 0.1 * self.linear.weight.detach()
        return self.linear(x)[:, 0]


class Taught(nn.Module):
    """A frozen teacher follows the student, who also learns from it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.student, self.teacher = nn.Linear(6, 1), nn.Linear(6, 1)
        self.teacher.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mine.lerp_(theirs, 0.01)
        return (0.8 * self.student(x) + 0.2 * self.teacher(x))[:, 0]


class Counting(nn.Module):
    """Counts its steps in buffers of several types, and lowers the output with them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.linear = nn.Linear(6, 1)
        self.register_buffer("t", torch.zeros(()))
        self.register_buffer("whole", torch.zeros((), dtype=torch.int64))
        self.register_buffer("halved", torch.ones(2, dtype=torch.bfloat16))
        self.register_buffer("flag", torch.tensor([True, False]))
        self.register_buffer("wave", torch.zeros(1, dtype=torch.complex128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.t += 1
        self.whole = self.whole + 2
        self.halved.mul_(0.5)
        self.flag.logical_not_()
        self.wave += 1 + 2j
        return self.linear(x)[:, 0] / (1 + 0.1 * self.t)


class Spectral(nn.Module):
    """Power iterations move the vectors of spectral_norm, old and new."""

    def __init__(self, old: bool) -> None:
        super().__init__()
        torch.manual_seed(7)
        norm = nn.utils.spectral_norm if old else nn.utils.parametrizations.spectral_norm
        self.linear, self.out = norm(nn.Linear(6, 5)), nn.Linear(5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.linear(x).relu())[:, 0]


class OwnNorm(nn.BatchNorm1d):
    """A batch-norm that replaces its statistics by new tensors."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.running_mean = 0.9 * self.running_mean + 0.1 * x.mean(0)
        return x - self.running_mean.detach()


class Normed(nn.Module):
    """Has a batch-norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.norm, self.linear = OwnNorm(6), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x))[:, 0]


class Precise(nn.Module):
    """A batch-norm with float64 statistics, of features near a million."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.norm, self.linear = nn.BatchNorm1d(6, affine=False), nn.Linear(6, 1)
        self.norm.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x.double() + 1e6).float())[:, 0]


# Plain torch, and the product


def squared(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return (output - label).square()


def plain(
    module: nn.Module,
    rows: Rows,
    steps: int,
    lr: float = 0.1,
    between: Callable[[nn.Module], None] | None = None,
) -> list[State]:
    """Return the state after each step of torch's own loop, where each step has all rows."""
    x, y = torch.tensor([x for x, _ in rows]), torch.tensor([y for _, y in rows])
    optimizer, states = torch.optim.SGD((p for p in module.parameters() if p.requires_grad), lr), []
    for _ in range(steps):
        optimizer.zero_grad()
        (squared(module(x), y).sum() / len(rows)).backward()
        optimizer.step()
        states.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
        if between is not None:
            between(module)
    return states


class States(Observer):
    """Keeps the state_dict after each step."""

    def __init__(self) -> None:
        self.states: list[State] = []
        self.training: Training | None = None

    def started(self, training: Training) -> None:
        self.training = training

    def stepped(self, training: Training, report: Any) -> None:
        self.states.append({name: tensor.clone() for name, tensor in training.module.state_dict().items()})


def product(
    folder: Path, module: nn.Module, rows: Rows, steps: int, shards: int, lr: float = 0.1, test: bool = False,
    states: States | None = None, **sections: Any,
) -> list[State]:  # fmt: skip
    """Return the state after each step of the inline engine."""
    table = pa.table({"x": pa.array([x for x, _ in rows], pa.list_(pa.float32())), "y": [y for _, y in rows]})
    table = table.append_column("n", pa.array(range(len(rows))))
    pq.write_table(table, folder / "rows.parquet")
    states = states or States()
    config = Config.from_dict(
        {
            "data": {"features": "x", "label": "y", "id": "n"},
            "loss": {"name": "test_changes_inline:squared"},
            "optimizer": {"name": "SGD", "lr": lr},
            **sections,
            "train": {
                "num_shards": shards, "rows_per_step": len(rows), "epochs": steps,
                **sections.get("train", {}),
            },
        }
    )  # fmt: skip
    source = ParquetRows(str(folder))
    train(
        config, rows=source, test=source if test else None, make_engine=InlineEngine, module=module,
        observers=[states],
    )  # fmt: skip
    return states.states


def assert_equal(made: list[State], expected: list[State], **tolerance: float) -> None:
    assert len(made) == len(expected)
    for step, (mine, theirs) in enumerate(zip(made, expected, strict=True)):
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(
                mine[name], tensor, msg=lambda said, at=(step, name): f"{at}: {said}",
                **{"rtol": 1e-5, "atol": 1e-6, **tolerance},
            )  # fmt: skip


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_a_weight_that_forward_rebinds_ends_where_a_person_works_out(tmp_path: Path, shards: int) -> None:
    states = product(tmp_path, Rebound(), LINE, 20, shards)
    assert [states[step - 1]["w"].item() for step in (1, 5, 20)] == pytest.approx([1, 1.9375, 2.0], abs=1e-5)


class Shifting(nn.Module):
    """Keeps the average of its weights, and that of the step before, whose tensor it hands on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(10)
        self.linear = nn.Linear(6, 1)
        self.register_buffer("now", torch.zeros(1, 6))
        self.register_buffer("before", torch.zeros(1, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.before = self.now
        self.now = 0.5 * self.now + 0.5 * self.linear.weight.detach()
        return self.linear(x)[:, 0] + (x @ self.before.T)[:, 0]


KINDS: dict[str, tuple[Callable[[], nn.Module], Rows]] = {
    "rebound": (lambda: Projected("rebound"), NUMBERS),
    "data.clamp_": (lambda: Projected("data"), NUMBERS),
    "under no_grad": (lambda: Projected("no_grad"), NUMBERS),
    "a slice": (lambda: Projected("sliced"), NUMBERS),
    "embedding with max_norm": (Words, WORDS),
    "convolution, rebound": (lambda: Images(in_place=False), IMAGES),
    "convolution, in place": (lambda: Images(in_place=True), IMAGES),
    "frozen convolution, rebound": (lambda: Images(in_place=False, frozen=True), IMAGES),
    "frozen convolution, in place": (lambda: Images(in_place=True, frozen=True), IMAGES),
    "average in place": (lambda: Averaged(in_place=True), NUMBERS),
    "average, a new tensor": (lambda: Averaged(in_place=False), NUMBERS),
    "teacher": (Taught, NUMBERS),
    "a buffer handed on": (Shifting, NUMBERS),
    "counters": (Counting, NUMBERS),
    "spectral_norm": (lambda: Spectral(old=False), NUMBERS),
    "old spectral_norm": (lambda: Spectral(old=True), NUMBERS),
}


@pytest.mark.parametrize("chunk", [None, 3], ids=["whole", "chunks"])
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_each_step_is_plain_torch_s(tmp_path: Path, kind: str, shards: int, chunk: int | None) -> None:
    make, rows = KINDS[kind]
    expected = plain(make(), rows, 6, lr=0.3)
    keys = {} if chunk is None else {"train": {"rows_per_backward": chunk}}
    made = product(tmp_path, make(), rows, 6, shards, lr=0.3, **keys)
    assert_equal(made, expected)
    assert any(not torch.equal(made[0][name], made[5][name]) for name in made[0])


# Statistics of batch-norm


def test_float64_statistics_stay_float64(tmp_path: Path) -> None:
    made, expected = product(tmp_path, Precise(), NUMBERS, 5, 1), plain(Precise(), NUMBERS, 5)
    assert_equal(made, expected)
    for name in ("norm.running_mean", "norm.running_var"):
        assert made[4][name].dtype == torch.float64
        torch.testing.assert_close(made[4][name], expected[4][name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("shards", [1, 4])
def test_statistics_that_a_batch_norm_replaces_are_averaged_over_the_rows(
    tmp_path: Path, shards: int
) -> None:
    made = product(tmp_path, Normed(), NUMBERS, 3, shards)
    mean = torch.tensor([x for x, _ in NUMBERS]).mean(0)
    for step, state in enumerate(made, start=1):
        torch.testing.assert_close(state["norm.running_mean"], mean * (1 - 0.9**step), rtol=1e-5, atol=1e-6)


# What is refused


class Peak(nn.Module):
    """Keeps the largest feature that it saw, always or at every so many steps."""

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.linear, self.every = nn.Linear(6, 1), every
        self.register_buffer("peak", torch.zeros(1))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls % self.every == 0:
            self.peak = torch.maximum(self.peak, x.abs().max())
        return self.linear(x)[:, 0]


class Rowwise(nn.Module):
    """Moves a weight by its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.linear = nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.linear.weight.data[0, 3] += x.mean()
        return self.linear(self.first(x))[:, 0]


class Growing(nn.Module):
    """Makes, removes or replaces a part of itself in forward, or gives it another form."""

    def __init__(self, how: str, after: int = 0) -> None:
        super().__init__()
        self.linear, self.how, self.head, self.after = nn.Linear(6, 1), how, None, after
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.ones(6))
        self.spare, self.kept = nn.Parameter(torch.ones(1)), torch.zeros(1)
        self.register_buffer("cache", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.after < self.calls <= 100:  # the trial sets counters to 100 and more
            self._change()
        return self.linear(x)[:, 0]

    def _change(self) -> None:
        if self.how == "submodule":
            self.head = self.head or nn.Linear(8, 2)
        elif self.how == "parameter":
            self.extra = nn.Parameter(torch.ones(1))
        elif self.how == "replaced":
            self.linear.weight = nn.Parameter(self.linear.weight.detach().clone())
        elif self.how == "removed":
            self.linear.bias = None
        elif self.how == "buffer":
            self.cache = torch.ones(1)
        elif self.how == "shape":
            self.mask = torch.ones(7)
        elif self.how == "type":
            self.mask = self.mask.double()
        elif self.how == "weight":
            self.spare.data = torch.ones(2)
        elif self.how == "weight's memory":
            self.mask = self.linear.weight.detach()[0]
        elif self.how == "attribute's memory":
            self.spare.data = self.kept
        elif self.how == "frozen":
            self.linear.bias.requires_grad_(False)


def test_a_buffer_with_a_value_for_each_piece_is_refused_by_the_trial(tmp_path: Path) -> None:
    states = States()
    with pytest.raises(ModelError, match=r"forward changes peak, .* element 0 becomes [\d.]+ and [\d.]+\. "):
        product(tmp_path, Peak(), NUMBERS, 5, 4, states=states)
    assert states.training is None


def test_a_buffer_that_changes_at_every_fifth_step_is_refused_at_the_fifth(tmp_path: Path) -> None:
    states = States()
    with pytest.raises(ModelError, match="forward changes peak"):
        product(tmp_path, Peak(every=5), NUMBERS, 9, 4, states=states)
    assert [state["calls"].item() for state in states.states] == [1, 2, 3, 4]
    assert states.training is not None
    after = states.training.module.state_dict()
    assert (after["calls"].item(), after["peak"].item()) == (4, 0)
    assert torch.equal(after["linear.weight"], states.states[3]["linear.weight"])


@pytest.mark.parametrize("every", [1, 5])
def test_of_one_piece_in_a_step_a_value_of_the_rows_is_plain_torch_s(tmp_path: Path, every: int) -> None:
    torch.manual_seed(0)
    one = Peak(every)
    torch.manual_seed(0)
    assert_equal(product(tmp_path, one, NUMBERS, 9, 1), plain(Peak(every), NUMBERS, 9))


def test_a_weight_that_each_piece_moves_elsewhere_is_named_with_its_element(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"forward changes linear\.weight, .* its element 3 becomes"):
        product(tmp_path, Rowwise(), NUMBERS, 5, 4)


@pytest.mark.parametrize(
    ("after", "steps"),
    [(0, 0), (3, 0), (8, 8)],
    ids=["at once", "in the trial", "after the trial, for a time"],
)
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("submodule", "forward made submodule head, so other workers would not have it: make all of them in"),
        ("parameter", "forward made parameter extra"),
        ("replaced", "forward replaced parameter linear.weight"),
        ("removed", "forward removed parameter linear.bias"),
        ("buffer", "forward made buffer cache"),
        ("shape", r"forward makes mask \(7,\) of float32, but it was \(6,\) of float32"),
        ("type", r"forward makes mask \(6,\) of float64, but it was"),
        ("weight", r"forward makes parameter spare \(2,\)"),
        ("weight's memory", "forward gives mask the memory of linear.weight, .* by .clone"),
        ("attribute's memory", "forward gives spare the memory of kept"),
        ("frozen", "forward changed which parameters of linear require a gradient"),
    ],
)
def test_another_structure_is_refused_by_name(
    tmp_path: Path, how: str, said: str, after: int, steps: int
) -> None:
    states = States()
    with pytest.raises(ModelError, match=said):
        product(tmp_path, Growing(how, after), NUMBERS, 10, 4, states=states)
    assert len(states.states) == steps


# Modes


class Adapted(nn.Module):
    """Two adapters, one of which is trained with its base."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.one, self.two = Adapter(6, 1), Adapter(6, 1)
        self.two.base.weight.requires_grad_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.one(x) + self.two(x))[:, 0]


class Freezing(nn.Module):
    """Training mode freezes the backbone, and its batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(12)
        self.backbone = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
        self.head = nn.Linear(6, 1)

    def train(self, mode: bool = True) -> Freezing:
        super().train(mode)
        self.backbone.eval()
        self.backbone.requires_grad_(False)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x).relu())[:, 0]


class Restless(nn.Module):
    """Changes its parameters and statistics when it is evaluated; a constant may not change there."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(13)
        self.words = nn.Embedding(6, 4, max_norm=1.0)
        self.norm, self.out = nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.register_buffer("cache", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            self.norm.running_mean += 1
            self.out.weight.data = self.out.weight.data * 2
            self.out.bias.data.add_(1)
            self.cache = self.out.weight.detach() * 2 if self.cache is None else self.cache
        return self.out(self.norm(self.words(x[:, 0].long())))[:, 0]


def evaluated(module: nn.Module) -> None:
    """Evaluate as torch's own loops do."""
    module.eval()
    with torch.no_grad():
        module(torch.tensor([x for x, _ in NUMBERS]))
    module.train()


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("make", [Adapted, Freezing])
def test_with_modes_of_its_own_a_module_trains_as_in_torch_s_loops(
    tmp_path: Path, make: Callable[[], nn.Module], shards: int
) -> None:
    expected = plain(make().train(), NUMBERS, 9, between=evaluated)
    states = States()
    made = product(tmp_path, make(), NUMBERS, 9, shards, test=True, states=states, train={"eval_every": 1})
    assert_equal(made, expected, rtol=1e-4, atol=1e-5)
    assert states.training is not None
    module, losses = make(), [report.loss for report in states.training.evaluations]
    for state, loss in zip(made, losses, strict=True):
        module.load_state_dict(state)
        output = module.train()(torch.tensor([x for x, _ in NUMBERS]))  # not merged
        assert squared(output, torch.tensor([y for _, y in NUMBERS])).mean().item() == pytest.approx(
            loss, rel=1e-4
        )


@pytest.mark.parametrize(("make", "rows"), [(Adapted, NUMBERS), (Freezing, NUMBERS), (Restless, WORDS)])
def test_when_it_is_evaluated_shapes_nothing(
    tmp_path: Path, make: Callable[[], nn.Module], rows: Rows
) -> None:
    never = product(tmp_path, make(), rows, 7, 4)
    for every in (1, 3):
        often = product(tmp_path, make(), rows, 7, 4, test=True, train={"eval_every": every})
        assert_equal(often, never, rtol=0, atol=0)


class Forces(nn.Module):
    """Its output is a gradient by its features, as force fields have it."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            at = x.clone().requires_grad_()
            (force,) = torch.autograd.grad(self.energy(at).square().sum(), at, create_graph=True)
        return force.sum(1)


def test_a_forward_that_takes_gradients_is_evaluated(tmp_path: Path) -> None:
    assert len(product(tmp_path, Forces(), NUMBERS, 2, 4, test=True)) == 2


def test_modes_that_the_caller_set_stay(tmp_path: Path) -> None:
    module = Adapted()
    module.two.base.eval()
    product(tmp_path, module, NUMBERS, 2, 2, test=True)
    assert [part.training for part in module.modules()] == [True, True, True, True, False]


# Local turns


LOCAL = {"solver": {"name": "local_sgd", "turns_per_round": 3}}


def test_in_local_turns_what_forward_makes_of_a_weight_belongs_to_the_local_model(tmp_path: Path) -> None:
    rows: Rows = [([1.0], 9.0)] * 12  # every piece of 4 is the same
    made = product(tmp_path, Rebound(), rows, 2, 1, train={"rows_per_step": 4}, **LOCAL)
    expected = plain(Rebound(), rows[:4], 6)
    assert_equal(made, [expected[2], expected[5]])
    assert expected[5]["w"].item() > 5  # it was clamped on the way


@pytest.mark.parametrize("shards", [1, 4])
def test_in_local_turns_constants_go_on_from_turn_to_turn(tmp_path: Path, shards: int) -> None:
    made = product(tmp_path, Counting(), NUMBERS, 2, shards, train={"rows_per_step": 8}, **LOCAL)
    assert [state["t"].item() for state in made] == [3, 6]
    assert made[1]["halved"].tolist() == [1 / 64] * 2


def test_averages_of_local_weights_differ_and_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="forward changes average"):
        product(tmp_path, Averaged(True), NUMBERS, 2, 4, train={"rows_per_step": 8}, **LOCAL)
