r"""Pack what a cluster lacks: sparksgd as a zip, and its dependencies as an archive.

    python -m sparksgd.cli.packing zip --out dist/sparksgd.zip
    python -m sparksgd.cli.packing environment --out dist/environment.tar.gz
    spark-submit --py-files dist/sparksgd.zip --archives dist/environment.tar.gz#environment \
        --conf spark.pyspark.python=./environment/bin/python --conf spark.pyspark.driver.python=python3 ...

pyspark is in neither, because the cluster brings its own.  sparksgd is not in the archive, so that the
archive changes only with the dependencies.  The archive's Python is a link to the Python of each node.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from sparksgd.cli.command_line import exit_status, parser_of
from sparksgd.errors import ConfigError
from sparksgd.storage import replacing

__all__ = [
    "base_python",
    "compile_what_training_imports",
    "cuda_parts",
    "cuda_warning",
    "installed_bytes",
    "main",
    "pack_environment",
    "pack_package",
    "parser",
    "relink_python",
    "requirements",
    "sizes_table",
    "strip",
]

PACKAGE = Path(__file__).parents[1]

EXTRAS = ("tls",)

CLUSTER_BRINGS = {"pyspark", "py4j"}

NEVER_RUN = (
    "torch/test",  # torch's own tests in C++, compiled: 86 MB
    "torch/bin/*",  # more of them, and protoc: 52 MB
    "torch/include",  # headers are half of all files; they and setuptools build extensions in C++
    "pyarrow/include",
    "numpy/_core/include",
    "setuptools",
    "setuptools-*.dist-info",
    "_distutils_hack",
    "distutils-precedence.pth",
    "**/tests",  # 35 MB
)
"""What no executor runs, in site-packages."""

NEEDED = ("torch/bin/torch_shm_manager",)
"""Kept in spite of that: torch looks for it when it is imported."""

COMPRESS_LEVEL = 4
"""The level of gzip.  1 saves some seconds, once.  4 saves a tenth of what every node fetches.  6 takes twice
as long as 4."""

TRIAL = Path(__file__).with_name("packing_trial.py")
"""The program that trains in the environment; it is run as a file, because sparksgd is not in there."""


def pack_package(out: Path, package: Path = PACKAGE) -> None:
    """Write a package as a zip that Python can import; equal sources give equal bytes.

    Args:
        out: the zip; its folder is created if it does not exist.
        package: the package's folder, which is at the top of the zip.
    """
    files = sorted(
        (path for path in package.rglob("*") if path.suffix == ".py" or path.name == "py.typed"),
        key=lambda path: path.relative_to(package).as_posix(),
    )
    with (
        _refusing_what_the_disk_refuses(out),
        _put_in_place(out) as part,
        # Not compressed: builds of zlib compress differently, and half a megabyte travels only once.
        zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as opened,
    ):
        for path in files:
            info = zipfile.ZipInfo(path.relative_to(package.parent).as_posix(), (1980, 1, 1, 0, 0, 0))
            info.create_system = 3  # else the zip would name the system that packed it
            info.external_attr = 0o100644 << 16
            opened.writestr(info, path.read_bytes())


def requirements(pyproject: Path, extras: Sequence[str] = EXTRAS) -> list[str]:
    """Return the dependencies of a project that executors need: all except Spark, and some extras.

    Args:
        pyproject: the project's pyproject.toml.
        extras: names of optional dependencies to take as well.
    """
    try:
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        wanted = [*project["dependencies"]]
        for extra in extras:
            wanted += project["optional-dependencies"][extra]
    except OSError as error:
        raise ConfigError(
            f"{pyproject} cannot be read ({error.strerror}), and it says what to pack: run this in a "
            "checkout of sparksgd, or name one with --project"
        ) from error
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise ConfigError(
            f"{pyproject} is not sparksgd's ({type(error).__name__}: {error}): run this in a checkout of "
            "sparksgd, or name one with --project"
        ) from error
    return [line for line in wanted if _normal(re.split(r"[^\w.-]", line)[0]) not in CLUSTER_BRINGS]


def pack_environment(
    out: Path,
    *,
    project: Path,
    python: Path,
    python_prefix: str | None = None,
    whole: bool = False,
    say: Callable[[object], None],
) -> None:
    """Install what executors need into a fresh environment, try it, and pack it by venv-pack.

    Args:
        out: the archive, a .tar.gz; its folder is created if it does not exist.
        project: a checkout, with pyproject.toml and conf/constraints.txt.
        python: makes the environment; every node needs this Python, or an equal one.
        python_prefix: where nodes have Python, such as /usr for /usr/bin/python3.11; None: as here.
        whole: pack NEVER_RUN as well.
        say: shows a line or a table.

    Raises:
        ConfigError: something is missing, or cannot be packed.
    """
    wanted = requirements(project / "pyproject.toml")
    constraints = project / "conf" / "constraints.txt"
    if not constraints.is_file():
        raise ConfigError(f"{constraints} is not there, and it pins what to pack: name a checkout, --project")
    if shutil.which(python) is None:
        raise ConfigError(f"--python is {python}, but no such program is there: name the nodes' Python")
    if python_prefix is not None and not python_prefix.startswith("/"):
        raise ConfigError(f"--python-prefix is {python_prefix!r}, but it must be absolute, as /usr is")
    if find_spec("venv_pack") is None:
        raise ConfigError("venv-pack is not installed, and it packs: pip install 'sparksgd[pack]'")
    if not out.name.endswith(".tar.gz"):
        raise ConfigError(f"--out is {out}, but Spark knows the archive by its name: end it in .tar.gz")

    with (
        _refusing_what_the_disk_refuses(out),
        _put_in_place(out) as part,
        tempfile.TemporaryDirectory(prefix="environment-", dir=_made(project / "build")) as made,
    ):
        folder = Path(made)
        venv = folder / "environment"
        _run("make an environment", [str(python), "-m", "venv", "--without-pip", str(venv)], folder)
        say(f"installing {escape(', '.join(wanted))}")
        pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python"), "install"]
        pip += ["--quiet", "--quiet", "--disable-pip-version-check", "--no-compile"]
        _run("install what sparksgd needs", [*pip, "--constraint", str(constraints), *wanted], folder)
        brought = CLUSTER_BRINGS & {_normal(found.name) for found in distributions(path=[_site(venv)])}
        if brought:
            raise ConfigError(
                f"{', '.join(sorted(brought))} came in with what pyproject.toml names, but the cluster has "
                "its own: take out what asks for it"
            )
        stripped = 0 if whole else strip(Path(_site(venv)))
        say("training with it")
        compile_what_training_imports(venv)
        if python_prefix is not None:
            relink_python(venv, python_prefix)
        say("packing it")
        sizes = installed_bytes(venv)
        pack = [sys.executable, "-m", "venv_pack", "--quiet", "--prefix", str(venv)]
        pack += ["--exclude", "pyvenv.cfg"]  # else it is in twice: venv-pack adds it at the end
        pack += ["--compress-level", str(COMPRESS_LEVEL), "--format", "tar.gz", "--force"]
        _run("pack it", [*pack, "--output", str(part)], folder)
        cuda = cuda_parts(Path(_site(venv)))
        version, link = base_python(venv)
    say(sizes_table(sizes, packed=out.stat().st_size, stripped=stripped))
    say(f"its Python is a link: every node needs Python {version} as {escape(link)}")
    if cuda:
        say(cuda_warning(cuda, out))


def cuda_warning(parts: Sequence[str], out: Path) -> str:
    """Return a warning, in rich's markup, about an archive with CUDA, and what to do."""
    return (
        f"[bold yellow]WARNING[/] this torch brings CUDA ({escape(', '.join(parts))}): gigabytes that every "
        "node fetches and unpacks.  If executors have no GPU, name an index or a folder that has torch's CPU "
        "build in pip's own settings (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS; the CPU index is on the install "
        f"page of pytorch.org), remove {escape(str(out))}, and run make dist again"
    )


def strip(site: Path) -> int:
    """Remove from site-packages what no executor runs; return how many bytes it had."""
    needed = {site / name for name in NEEDED}
    removed = 0
    for pattern in NEVER_RUN:
        for path in sorted(site.glob(pattern)):
            if path in needed or not path.exists():  # as tests within tests
                continue
            removed += sum(size for _, size in _files(path))
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    return removed


def compile_what_training_imports(venv: Path, also: Sequence[str] = ("cryptography.x509",)) -> None:
    """Train a small module in an environment, and keep the bytecode of what it imported.

    Without bytecode, the first worker of a node compiles for ten seconds.  The bytecode has 55 MB, packed 21;
    of all modules it would have three times as many.  It is not checked against its source, because unpacking
    may change the modification time of the source.

    Args:
        venv: the environment.
        also: names of modules to import as well.
    """
    _run("train with it", [str(venv / "bin" / "python"), "-I", "-B", str(TRIAL), *also], venv.parent)


def relink_python(venv: Path, prefix: str) -> None:
    """Link an environment's Python to another path, the one that the nodes have.

    This is not venv-pack's own option: given /usr, it links python3 to /usr/bin/python3.113.

    Args:
        venv: the environment; from then on it works only if the prefix has a Python.
        prefix: such as /usr for /usr/bin/python3.11.
    """
    home = f"{prefix.rstrip('/')}/bin"
    minor = Path(_site(venv)).parent.name
    for name in (minor, "python3", "python"):
        link = venv / "bin" / name
        link.unlink(missing_ok=True)
        link.symlink_to(f"{home}/{minor}" if name == minor else minor)
    settings = venv / "pyvenv.cfg"
    kept = [line for line in settings.read_text().splitlines() if line.startswith(("include", "version"))]
    settings.write_text("\n".join([f"home = {home}", *kept]) + "\n")


def base_python(venv: Path) -> tuple[str, str]:
    """Return the version (such as 3.11) and the path of the Python that an environment links to."""
    link = venv / "bin" / "python"
    while link.is_symlink() and link.is_relative_to(venv):
        link = link.parent / link.readlink()
    return Path(_site(venv)).parent.name.removeprefix("python"), str(link)


def installed_bytes(venv: Path) -> dict[str, int]:
    """Return the bytes of each package of an environment, with bytecode; "" is what belongs to no package."""
    owners = {
        os.path.normpath(str(found.locate_file(file))): found.name
        for found in distributions(path=[_site(venv)])
        for file in found.files or ()
    }
    sizes: Counter[str] = Counter()
    for path, size in _files(venv):
        if path.parent.name == "__pycache__":
            path = path.parent.parent / f"{path.name.partition('.')[0]}.py"
        sizes[owners.get(str(path), "")] += size
    return dict(sizes)


def cuda_parts(site: Path) -> list[str]:
    """Return what belongs to CUDA in site-packages: NVIDIA's packages, and a torch built for them."""
    found = {_normal(each.name): each.version for each in distributions(path=[str(site)])}
    parts = sorted(name for name in found if name.startswith(("nvidia-", "cuda-")))
    built = found.get("torch", "").partition("+")[2].startswith("cu")
    if built or (site / "torch" / "lib" / "libtorch_cuda.so").exists():
        parts.insert(0, f"torch {found.get('torch', '')}".strip())
    return parts


def sizes_table(sizes: dict[str, int], *, packed: int, stripped: int) -> Table:
    """Return a table of the content of an archive: the largest packages, and the rest in one line.

    Args:
        sizes: bytes of each package; "" is what belongs to no package.
        packed: bytes of the archive.
        stripped: bytes that were left out.
    """
    total = sum(sizes.values())
    large = {name: size for name, size in sizes.items() if name and size >= total / 100}
    table = Table(title="environment.tar.gz", title_justify="left", show_footer=True)
    table.add_column("package", footer="unpacked\npacked")
    table.add_column("bytes", justify="right", footer=f"{decimal(total)}\n{decimal(packed)}")
    for name in sorted(large, key=lambda name: (-large[name], name)):
        table.add_row(escape(name), decimal(large[name]))
    others = sum(1 for name in sizes if name and name not in large)
    table.add_row(f"{others} others", decimal(total - sum(large.values())))
    if stripped:
        table.add_section()
        table.add_row("[dim]left out: headers, tests, setuptools", f"[dim]{decimal(stripped)}")
    return table


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _site(venv: Path) -> str:
    return str(next(venv.glob("lib/python3*/site-packages")))


def _files(top: Path) -> Iterator[tuple[Path, int]]:
    """Yield each file below a folder, or the file itself, with its bytes; links are not followed."""
    if not top.is_dir():
        yield top, top.lstat().st_size
    for folder, _, names in os.walk(top):
        for name in names:
            path = Path(folder, name)
            yield path, path.lstat().st_size


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _put_in_place(out: Path) -> Iterator[Path]:
    """Yield a file to write, and move it to its place when it is complete."""
    with replacing(_made(out.parent) / out.name) as part:
        yield part
        part.chmod(0o644)  # venv-pack's file can only be read by the builder


@contextmanager
def _refusing_what_the_disk_refuses(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{error.filename or out}: {error.strerror}: the environment and its archive need about 2 GB of "
            "disk (with CUDA ten), and a folder that may be written to"
        ) from error


def _run(what: str, command: list[str], folder: Path) -> None:
    """Run a program with temporary files in a folder; show its output only if it fails."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command,
        env=clean | {"TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    why = (errors or lines or [f"exit status {done.returncode}"])[-1]
    shown = " ".join(command[:4])
    raise ConfigError(f"cannot {what}: {why}: mend that, or see what `{shown} ...` says by itself")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = parser_of(__doc__)
    result.prog = "python -m sparksgd.cli.packing"
    commands = result.add_subparsers(dest="command", required=True, metavar="zip|environment")
    package = commands.add_parser("zip", help="sparksgd, for --py-files")
    package.add_argument("--out", required=True, type=Path, metavar="FILE", help="as sparksgd.zip")
    archive = commands.add_parser("environment", help="what it depends on, for --archives")
    archive.add_argument("--out", required=True, type=Path, metavar="FILE", help="as environment.tar.gz")
    archive.add_argument(
        "--project",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="a checkout of sparksgd; default: the current folder",
    )
    archive.add_argument(
        "--python", type=Path, default=Path(sys.executable), metavar="FILE", help="default: this one"
    )
    archive.add_argument(
        "--python-prefix",
        metavar="DIR",
        help="where nodes have that version of Python, as /usr; default: where it is here",
    )
    archive.add_argument("--whole", action="store_true", help="leave out no headers, tests or setuptools")
    return result


def main(argv: Sequence[str]) -> int:
    """Return 0 if the file was made, 2 if something was refused, 130 if interrupted."""
    args = parser().parse_args(argv)
    console = Console(highlight=False)

    def work() -> None:
        if args.command == "zip":
            pack_package(args.out)
            return
        pack_environment(
            args.out,
            project=args.project,
            python=args.python,
            python_prefix=args.python_prefix,
            whole=args.whole,
            say=partial(console.print, soft_wrap=True),
        )

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
