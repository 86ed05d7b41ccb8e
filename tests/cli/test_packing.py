"""What travels to a cluster: the package as a zip, and an environment that works wherever it is unpacked."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from rich.console import Console

from sparksgd.arithmetic.numerics import package_digest
from sparksgd.cli import packing
from sparksgd.errors import ConfigError

ROOT = Path(__file__).parents[2]

TRAIN_INLINE = """
import sys, sparksgd
assert ".zip" in sparksgd.__file__, sparksgd.__file__
import numpy as np, pyarrow as pa, pyarrow.parquet as pq, torch
from sparksgd.config import Config
from sparksgd.engines.inline import InlineEngine
from sparksgd.data.local_files import ParquetRows
from sparksgd.training.loop import train

x = np.arange(40.0).reshape(20, 2) / 40
table = pa.table({"x": pa.array(x.tolist(), pa.list_(pa.float32())), "y": (x[:, 0] > 0.5).astype("int64")})
pq.write_table(table, sys.argv[1])
config = Config.from_dict({
    "data": {"features": "x", "label": "y"},
    "optimizer": {"name": "Adam", "lr": 0.1},
    "train": {"rows_per_step": 10, "num_shards": 2, "epochs": 2},
})
rows = ParquetRows(sys.argv[1])
module = torch.nn.Linear(2, 2)
training = train(config, rows=rows, test=None, make_engine=InlineEngine, module=module)
print(len(training.step_times), training.numerics[0].package, sys.prefix)
"""


def python(program: str | Path, code: str, *arguments: str | Path, path: Path | None = None) -> str:
    """Run code in a fresh interpreter that sees nothing of ours but a path; return what it prints."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [program, "-c", code, *arguments],
        env=clean | ({} if path is None else {"PYTHONPATH": str(path)}),
        cwd=Path(program).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def installed(venv: Path, name: str, version: str, files: dict[str, int]) -> Path:
    """Pretend that a package is installed: files of so many bytes, and what pip would note of them."""
    site = venv / "lib" / "python3.11" / "site-packages"
    note = site / f"{name.replace('-', '_')}-{version}.dist-info"
    note.mkdir(parents=True)
    (note / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for file, size in files.items():
        path = site / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    (note / "RECORD").write_text("".join(f"{file},,\n" for file in files if ".pyc" not in file))
    return site


def shown(table: object) -> list[list[str]]:
    """Return the cells of a table as it is printed, line by line."""
    out = io.StringIO()
    Console(file=out, width=100).print(table)
    return [
        [cell.strip() for cell in line.strip("│ ").split("│")]
        for line in out.getvalue().splitlines()
        if "│" in line
    ]


# The zip


def test_equal_sources_give_equal_zips(tmp_path):
    copy = tmp_path / "elsewhere" / "sparksgd"
    shutil.copytree(packing.PACKAGE, copy, copy_function=shutil.copyfile)  # other times
    (copy / "__pycache__").mkdir(exist_ok=True)
    (copy / "__pycache__" / "errors.cpython-311.pyc").write_bytes(b"stale")
    (copy / "notes.txt").write_text("not the package's")
    first, second = tmp_path / "a" / "sparksgd.zip", tmp_path / "b" / "sparksgd.zip"
    packing.pack_package(first)
    packing.pack_package(second, copy)
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (first, second)}
    assert len(digests) == 1
    assert [path.name for path in first.parent.iterdir()] == ["sparksgd.zip"]


def test_the_zip_has_the_package_at_its_top_and_nothing_else(tmp_path):
    assert packing.main(["zip", "--out", str(tmp_path / "sparksgd.zip")]) == 0
    with zipfile.ZipFile(tmp_path / "sparksgd.zip") as opened:
        names = opened.namelist()
        times = {info.date_time for info in opened.infolist()}
    assert names == sorted(names)
    assert {"sparksgd/__init__.py", "sparksgd/py.typed", "sparksgd/spark/tasks/step_tasks.py"} <= set(names)
    assert [name for name in names if not name.startswith("sparksgd/") or "__pycache__" in name] == []
    assert times == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.soak
def test_the_inline_engine_trains_from_the_zip(tmp_path):
    packing.pack_package(tmp_path / "sparksgd.zip")
    out = python(sys.executable, TRAIN_INLINE, tmp_path / "rows.parquet", path=tmp_path / "sparksgd.zip")
    assert out == f"4 {package_digest()} {sys.prefix}"


# What the archive holds


def test_what_to_install_is_what_the_project_depends_on_but_spark():
    wanted = packing.requirements(ROOT / "pyproject.toml")
    assert {"numpy>=1.26", "torch>=2.4", "cryptography"} <= set(wanted)
    assert [line for line in wanted if "spark" in line or "py4j" in line or "pytest" in line] == []


@pytest.mark.parametrize("spelt", ["pyspark", "PySpark>=3.5,<5", "py4j==0.10", "pyspark[sql]>=4", "Py_Spark"])
def test_spark_is_left_out_however_it_is_spelt(tmp_path, spelt):
    path = tmp_path / "pyproject.toml"
    path.write_text(f'[project]\ndependencies = ["a>=1", "{spelt}", "pyspark-helper"]\n')
    expected = ["a>=1", spelt, "pyspark-helper"] if spelt == "Py_Spark" else ["a>=1", "pyspark-helper"]
    assert packing.requirements(path, extras=()) == expected


def test_sizes_are_of_what_each_package_installed_and_of_its_bytecode(tmp_path):
    installed(tmp_path, "large", "1.0", {"large/core.py": 600_000, "large/lib.so": 300_000})
    installed(tmp_path, "middle", "2.0", {"middle.py": 90_000, "__pycache__/middle.cpython-311.pyc": 10_000})
    installed(tmp_path, "tiny-one", "3.0", {"tiny_one.py": 400})
    installed(tmp_path, "tiny-two", "3.0", {"tiny_two.py": 500})
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").write_bytes(b"x" * 100)
    (tmp_path / "lib64").symlink_to("lib")
    sizes = packing.installed_bytes(tmp_path)
    notes = sum(path.stat().st_size for path in tmp_path.rglob("lib/**/*.dist-info/*"))
    assert sizes == {"large": 900_000, "middle": 100_000, "tiny-one": 400, "tiny-two": 500, "": 100 + notes}

    table = packing.sizes_table(sizes | {"": 100}, packed=250_000, stripped=0)
    assert shown(table)[:3] == [["large", "900.0 kB"], ["middle", "100.0 kB"], ["2 others", "1.0 kB"]]
    assert shown(table)[3:] == [["unpacked", "1.0 MB"], ["packed", "250.0 kB"]]


def test_tests_headers_and_setuptools_are_stripped_but_what_torch_looks_for_stays(tmp_path):
    files = {
        "torch/__init__.py": 1,
        "torch/bin/torch_shm_manager": 2,
        "torch/testing/__init__.py": 4,
        "torch/bin/test_api": 100,
        "torch/test/test_api": 200,
        "torch/include/ATen/ATen.h": 400,
        "pandas/tests/deep/tests/test_frame.py": 800,
        "setuptools/__init__.py": 1600,
        "distutils-precedence.pth": 3200,
    }
    site = installed(tmp_path, "torch", "2.13.0+cpu", files)
    assert packing.strip(site) == 6300
    left = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert left == {
        "torch/__init__.py",
        "torch/bin/torch_shm_manager",
        "torch/testing/__init__.py",
        "torch-2.13.0+cpu.dist-info/METADATA",
        "torch-2.13.0+cpu.dist-info/RECORD",
    }


# CUDA


def test_a_torch_for_cpus_is_not_cuda(tmp_path):
    assert packing.cuda_parts(installed(tmp_path, "torch", "2.13.0+cpu", {"torch/lib/libtorch.so": 9})) == []


@pytest.mark.parametrize(
    ("name", "version", "file", "found"),
    [
        ("nvidia-cublas-cu12", "12.6", "nvidia/cublas.so", ["nvidia-cublas-cu12"]),
        ("torch", "2.13.0+cu126", "torch/__init__.py", ["torch 2.13.0+cu126"]),
        ("torch", "2.13.0", "torch/lib/libtorch_cuda.so", ["torch 2.13.0"]),
    ],
)
def test_cuda_is_found_and_named_with_the_way_out(tmp_path, name, version, file, found):
    parts = packing.cuda_parts(installed(tmp_path, name, version, {file: 1}))
    assert parts == found
    warning = packing.cuda_warning(parts, Path("dist/environment.tar.gz"))
    for said in (found[0], "PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS", "remove dist/environment.tar.gz"):
        assert said in warning


# Python on the nodes


def test_the_python_that_nodes_must_have_is_told_and_can_be_another(tmp_path):
    venv = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    version, link = packing.base_python(venv)
    assert version == minor
    assert Path(link).exists()
    assert not Path(link).is_relative_to(venv)
    packing.relink_python(venv, "/opt/python/")
    assert packing.base_python(venv) == (minor, f"/opt/python/bin/python{minor}")
    settings = (venv / "pyvenv.cfg").read_text().splitlines()
    assert settings[0] == "home = /opt/python/bin"
    assert str(venv) not in "".join(settings)


# Refusals


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--project", "/nowhere"], "/nowhere/pyproject.toml cannot be read (No such file or directory)"),
        (["--python", "/nowhere/python3"], "--python is /nowhere/python3, but no such program is there"),
        (["--python-prefix", "usr"], "--python-prefix is 'usr', but it must be absolute"),
        (["--python", "/bin/false"], "cannot make an environment: exit status 1"),
    ],
)
def test_what_is_missing_is_named_in_a_line(tmp_path, capsys, arguments, says):
    out = tmp_path / "dist" / "environment.tar.gz"
    project = tmp_path / "project"
    (project / "conf").mkdir(parents=True)
    for name in ("pyproject.toml", "conf/constraints.txt"):
        shutil.copy(ROOT / name, project / name)
    argv = ["environment", "--out", str(out), "--project", str(project), *arguments]
    assert packing.main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {says}")
    assert said.count("\n") == 1
    assert not out.exists()
    assert not list((project / "build").glob("*"))


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "dist").write_text("a file")
    with pytest.raises(ConfigError, match=r"/dist: .*: the environment and its archive need about 2 GB"):
        packing.pack_package(tmp_path / "dist" / "sparksgd.zip")


def test_its_help_is_how_to_call_it():
    command = [sys.executable, "-m", "sparksgd.cli.packing", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "python -m sparksgd.cli.packing environment --out dist/environment.tar.gz" in done.stdout


# The whole


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_an_archive_trains_wherever_it_is_unpacked(tmp_path, capsys):
    archive = tmp_path / "environment.tar.gz"
    packing.pack_package(tmp_path / "sparksgd.zip")
    arguments = ["environment", "--out", str(archive), "--project", str(ROOT)]
    assert packing.main(arguments) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "│ torch " in said
    assert f"every node needs Python {sys.version_info.major}.{sys.version_info.minor} as /" in said
    assert archive.stat().st_mode & 0o777 == 0o644

    with tarfile.open(archive) as opened:
        names = opened.getnames()
        opened.extractall(tmp_path / "unpacked", filter="tar")
    assert len(names) == len(set(names))
    moved = (tmp_path / "unpacked").rename(tmp_path / "environment")

    program = moved / "bin" / "python"
    assert python(program, "import torch, numpy, pyarrow, pandas, rich, cryptography; print(1)") == "1"
    asked = "from importlib.util import find_spec as f; print([n for n in {} if f(n)])"
    assert python(program, asked.format(["pyspark", "py4j", "sparksgd", "pip", "setuptools"])) == "[]"
    out = python(program, TRAIN_INLINE, tmp_path / "rows.parquet", path=tmp_path / "sparksgd.zip")
    assert out == f"4 {package_digest()} {moved}"
