"""What a comparison may ask, and what is refused before any run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from comparisons import comparison_file

from sparksgd.errors import ConfigError
from sparksgd.runs.comparing.course import compare, refuse_what_cannot_run
from sparksgd.runs.comparing.grid import Settings
from sparksgd.runs.comparing.kept_runs import KeptRuns
from sparksgd.runs.comparing.reading import read_question
from sparksgd.storage import location

ROOT = Path(__file__).parents[3]


def test_the_example_can_be_run() -> None:
    question = read_question(ROOT / "conf" / "compare-mnist.toml")
    refuse_what_cannot_run(question)
    assert [one.label for one in question.competitors] == ["synchronous", "softsync", "local_sgd"]
    assert [question.budget.trials, question.budget.seeds] == [12, 10]


def test_the_reference_and_local_sgd_compete_even_if_nobody_names_them(tmp_path: Path) -> None:
    file = tmp_path / "compared.toml"
    file.write_text('base = { data = { train = "rows" } }\n[clusters.any]\n')
    question = read_question(file)
    assert [one.label for one in question.competitors] == ["synchronous", "local_sgd"]
    assert question.competitors[1].knob_values == (4, 16)


def test_a_file_is_the_base_and_is_changed_by_keys(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(
        '[data]\ntrain = "a"\ntest = "b"\n[schedule]\nname = "OneCycleLR"\nmax_lr = 0.1\n'
        "[optimizer]\nlr = 1.0\nweight_decay = 1e-4\nnesterov = true\n[train]\nseed = 5\n"
    )
    file = tmp_path / "compared.toml"
    file.write_text(
        'base = "base.toml"\n[set]\nschedule = { name = "none" }\noptimizer = { weight_decay = "none" }\n'
        "train = { steps = 7 }\n[clusters.one]\nnum_workers = 3\nturn_s = 0.5\n"
    )
    question = read_question(file, data="c")
    config = question.config(question.competitors[0], "one", Settings(rate=0.2, momentum=0.9), seed=8)
    assert (config.data.train, config.data.test, config.data.validation_fraction) == ("c", None, 0.1)
    assert config.schedule.name is None
    assert config.schedule.arguments == {}
    assert config.optimizer.arguments == {"lr": 0.2, "momentum": 0.9, "nesterov": True}
    assert (config.train.steps, config.train.seed, config.cluster.seed) == (7, 8, 8)
    assert (config.engine.name, config.engine.num_workers, config.cluster.turn_s) == ("simulated", 3, 0.5)
    without = question.config(question.competitors[0], "one", Settings(rate=0.2, momentum=0.0), seed=8)
    assert "nesterov" not in without.optimizer.arguments
    alone = question.config(question.one_process, None, Settings(rate=0.2, momentum=0.9), seed=8)
    assert (alone.train.num_shards, alone.engine.num_workers, alone.cluster.turn_s) == (1, 1, 0.02)
    assert question.seeds == range(6, 16)


def test_other_optimisers_have_no_momentum(tmp_path: Path) -> None:
    file = comparison_file(tmp_path, '[base.optimizer]\nname = "Adam"')
    assert read_question(file).momenta == (None,)


REFUSED = {
    "solver": ("[sovlers]", "unknown section 'sovlers' (did you mean solvers?)"),
    "budget": ("[set]\ntrain = 3", "set.train is 3, but is a section: write [set.train]"),
    "schedule": (
        '[set]\nschedule = { name = "OneCycleLR", max_lr = 0.1 }',
        "schedule.name is 'OneCycleLR', which sets rates of its own",
    ),
    "patience": ("[set]\nearly_stopping = { patience = 1 }", "early_stopping.patience is 1, but runs are"),
    "evaluations": (
        "[set]\ntrain = { steps = 3, eval_every = 2 }",
        "held at two evaluations: lower eval_every to 1 or less",
    ),
    "knobs": (
        "[solvers.softsync]\nknob = { release = ['push'], staleness = ['ignore'] }",
        "solvers.softsync.knob has the keys release, staleness, but a solver has one knob",
    ),
    "values": ("[solvers.softsync]\nknob = { release = 'push' }", "but must be a list of values"),
    "twice": ("[solvers.softsync]\nknob = { release = ['push', 'push'] }", "must have different numbers"),
    "reference": ("[solvers.synchronous]\nname = 'softsync'", "but that label is the reference"),
    "seed": (
        "[clusters.far]\nseed = 3",
        "clusters.far.seed is 3, but the comparison sets the seeds, so that all solvers meet the same noise",
    ),
    "seed of the base": ("[set.cluster]\nseed = 0", "cluster.seed is 0, but the comparison sets the seeds"),
    "trials": (
        "[solvers.softsync]\nknob = { gradients_per_step = [1, 2, 3, 4] }",
        "compare.trials is 4, but 2 momenta and 4 values of solvers.softsync.knob need 16 for two rates: "
        "raise trials, or shorten the knob",
    ),
    "trials without momenta": (
        "[set]\noptimizer = { name = 'Adam' }\n[solvers.softsync]\nknob = { gradients_per_step = [1, 2, 3] }",
        "compare.trials is 4, but 3 values of solvers.softsync.knob need 6 for two rates: raise trials, or",
    ),
    "name": ('[clusters."../far"]', "clusters has the name '../far', but files are named so"),
}


@pytest.mark.parametrize(("more", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_asked_is_refused(tmp_path: Path, more: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_question(comparison_file(tmp_path, more))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("trials = 1", "compare.trials is 1, but must be at least 2"),
        ("trials = 3", "compare.trials is 3, but 2 momenta need 4 for two rates: raise trials"),
        ("seeds = 0", "compare.seeds is 0, but must be at least 1"),
        ("margin = -1", "compare.margin is -1.0, but must be at least 0"),
        ("rates = [0.3, 0.1]", "compare.rates is [0.3, 0.1], but must be the ends of a grid"),
        ("rate = 1", "unknown key compare.rate (did you mean rates?)"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(tmp_path: Path, budget: str, message: str) -> None:
    file = tmp_path / "compared.toml"
    file.write_text(f'base = {{ data = {{ train = "rows" }} }}\n[clusters.any]\n[compare]\n{budget}\n')
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_question(file)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("[clusters.far]\nlatency = 1", "unknown key cluster.latency (did you mean latency_s?)"),
        ("[solvers.softsync]\nstalenes = 1", "softsync on fast: unknown key solver.stalenes (did you mean"),
        ("[solvers.sofstync]", "sofstync on fast: solver.name is 'sofstync', which is no rule (did you mean"),
        ("[solvers.softsync]\nknob = { bound = [1] }", "softsync on fast: unknown key solver.bound"),
        (
            "[solvers.backups]\nname = 'synchronous'\nbackup_workers = 1",
            "backups on slow: solver.backup_workers is 1, which takes one shard per worker",
        ),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_the_first_one(
    tmp_path: Path, more: str, message: str
) -> None:
    question = read_question(comparison_file(tmp_path, more))
    with pytest.raises(ConfigError, match=re.escape(message)):
        compare(question, KeptRuns(location(tmp_path / "runs")), _nobody_hears)
    assert not (tmp_path / "runs").exists()


def _nobody_hears(done: int, total: int, what: str) -> None:
    raise AssertionError(what)
