"""model.json: what it says of a saved model, written and read.

Every field is checked as it is read, like a configuration, and so is a digest of them all.

    format                  8; 2 to 7 are still read
    weights, constants      name, size and SHA-256 of each file; constants may be null
    finished, version       whether the run finished, and its step
    model, seed, structure  how to build the module again, and what it must consist of
    parts                   the module itself, if it has only parts of torch.nn; see training/torch_parts.py
    features, label, loss   what a row must be, and the loss
    outputs                 what the module gives of a row; none if that is not known
    code                    digests of the code that model.name and loss.name lead to
    differs                 why the module is not built again from its name, if it cannot be
    sha256                  of all other fields
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, get_args

from sparksgd.config import LossConfig, ModelConfig
from sparksgd.config.tables import as_toml
from sparksgd.data.schema import FEATURE_DTYPES, LABEL_DTYPES, MOST_RECORD_BYTES, Feature, RowSchema
from sparksgd.errors import DataError
from sparksgd.imports import out_of_memory_told
from sparksgd.models.losses import LossKind
from sparksgd.models.outputs import OUTPUT_DTYPES, Output
from sparksgd.runs.checked_files import FileEntry, check_name, is_sha256, shown
from sparksgd.runs.json_files import digest_of, read_json, write_json
from sparksgd.runs.names import MANIFEST
from sparksgd.storage import Location, unanswered
from sparksgd.training.composition import structure
from sparksgd.training.torch_parts import described_parts

if TYPE_CHECKING:  # to load a model needs nothing of the training
    from torch import nn

    from sparksgd.training.state import Training

__all__ = ["FORMAT", "Manifest", "describe", "read_manifest", "write_manifest"]

FORMAT = 8
_STILL_READ = (2, 3, 4, 5, 6, 7, FORMAT)
# 2 had no constants, and built the module from seed 0; 3 had neither plain values nor a structure; 4 had
# neither sizes nor digests of files and code; 5 had no parts; 6 had only the name of the loss; 7 had no
# outputs, and one label for each row.
_CHECKED_SINCE = 5
_MOST = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a model.json says, checked."""

    weights: FileEntry | str
    """The file of the state_dict; before format 5 only its name was written."""

    constants: FileEntry | str | None
    """The file of what is in no state_dict, if there is any."""

    finished: bool
    """Whether the run finished."""

    version: int
    """The step."""

    model: ModelConfig | None
    """What builds the module; None: it was given in Python."""

    seed: int
    """train.seed."""

    structure: Mapping[str, str] | None
    """Names of classes and functions by their paths; None before format 4."""

    parts: Mapping[str, Any] | None
    """The module's description, if it was given in Python and has one; not checked yet."""

    differs: str | None
    """How the module was another one when it was built again."""

    schema: RowSchema
    """What a row must be."""

    loss: LossConfig
    """The section [loss]."""

    outputs: tuple[Output, ...]
    """What the module gives of a row; none if that is not known, as before format 8."""

    code: Mapping[str, str] | None
    """Digests of code by the keys that name it; None before format 5."""

    digests: Mapping[str, str]
    """Digests of the values of weights and constants, before format 5."""

    fields: Mapping[str, Any]
    """All that `write_manifest` was given."""

    def about(self, module: nn.Module) -> dict[str, Any]:
        """Return what `describe` returned, with what earlier formats lack; `module` is the one described."""
        gone = ("format", "weights", "constants", "state_sha256", "constants_sha256")
        described = {key: value for key, value in self.fields.items() if key not in gone}
        lacking = {
            "seed": self.seed,
            "structure": structure(module),
            "parts": None,
            "code": {},
            "outputs": [],
        }
        label = {"num_labels": None, **self.fields["label"]}
        return lacking | described | {"label": label, "loss": _loss_table(self.loss)}


def describe(training: Training) -> dict[str, Any]:
    """Return what model.json must say of a run, but for its files."""
    schema, config = training.plan.schema, training.config
    return {
        "finished": training.is_finished,
        "model": {"name": training.model_name, "arguments": dict(config.model.arguments)},
        "seed": config.train.seed,
        "structure": structure(training.module),
        "parts": None if training.model_name else described_parts(training.module),
        "features": [asdict(feature) for feature in schema.features],
        "label": {
            "name": schema.label,
            "dtype": schema.label_dtype,
            "classes": schema.classes,
            "num_labels": schema.num_labels,
        },
        "loss": _loss_table(config.loss),
        "outputs": [asdict(output) for output in training.outputs],
        "code": dict(training.code),
        "version": training.module_step,
        "parameters_sha256": training.flat.parameters_sha256(),
        "buffers_sha256": training.flat.buffers_sha256(),
    }


def _loss_table(loss: LossConfig) -> dict[str, Any]:
    return {"name": loss.name, "kind": loss.kind, "arguments": as_toml(loss.arguments)}


def write_manifest(folder: Location, about: Mapping[str, Any]) -> None:
    """Write the fields of a model.json, with their digest."""
    write_json(folder / MANIFEST, {**about, "sha256": digest_of(about, in_order=True)})


def read_manifest(folder: Location) -> Manifest:
    """Read a model.json, and check every field.

    Raises:
        DataError: which field, its value and the rule; or there is no such file.
        ClusterError: its file system does not answer.
    """
    where = f"{folder}/{MANIFEST}"
    try:
        with out_of_memory_told(f"reading {where}"):
            about = read_json(folder / MANIFEST)
    except OSError as error:
        refusal = DataError(f"{where} cannot be read: {error.strerror}. Name the folder model/ of a run")
        raise unanswered(error, refusal) from error
    except ValueError as error:
        raise DataError(f"{where} is not what a run writes: {error}") from error
    fields = _Fields(about, where, "the file")
    described = {key: value for key, value in about.items() if key != "sha256"}
    number = fields.take("format", lambda v: type(v) is int, "a whole number")
    if number not in _STILL_READ:
        raise DataError(
            f"{where}: it is of format {shown(number)}, but this version reads "
            f"{', '.join(map(str, _STILL_READ[:-1]))} and {FORMAT}"
        )
    if number >= _CHECKED_SINCE:
        digest = fields.take("sha256", is_sha256, "64 hexadecimal digits")
        if digest != digest_of(described, in_order=True):
            raise DataError(
                f"{where} is damaged, or was changed by hand: its sha256 is not that of its fields"
            )
    return _read(fields, number, described)


def _read(fields: _Fields, number: int, described: dict[str, Any]) -> Manifest:
    is_old = number < _CHECKED_SINCE
    manifest = Manifest(
        weights=_file(fields, "weights", is_old),
        constants=_file(fields, "constants", is_old),
        finished=fields.take("finished", lambda v: type(v) is bool, "true or false"),
        version=fields.take("version", _is_whole(0, _MOST), "a whole number from 0"),
        model=_model(fields.table("model")),
        seed=0 if number == 2 else fields.take("seed", _is_whole(-(2**63), 2**64 - 1), "a number of 64 bits"),
        structure=None
        if number < 4
        else fields.take("structure", _is_of_texts, "a table of names by the paths that they stand at"),
        parts=fields.take("parts", lambda v: v is None or isinstance(v, dict), "a table", None),
        differs=fields.take("differs", lambda v: v is None or isinstance(v, str), "a text", None),
        schema=_schema(fields, has_several=number > 7),
        loss=_loss(fields) if number > 6 else LossConfig(name=fields.take("loss", _is_text, "a name")),
        outputs=_outputs(fields) if number > 7 else (),
        code=None
        if is_old
        else fields.take("code", _is_code, "a table of digests by keys of a configuration"),
        digests={} if not is_old else _digests(fields, number),
        fields=described,
    )
    for name in ("parameters_sha256", "buffers_sha256"):
        fields.take(name, is_sha256, "64 hexadecimal digits")
    if not is_old:
        fields.end()
    return manifest


def _file(fields: _Fields, key: str, is_old: bool) -> Any:
    """Return the entry of a file, or its name before format 5; None if there is none."""
    may_miss = key == "constants"
    default = None if may_miss and is_old else ...  # 2 had no such key
    value = fields.take(key, lambda v: may_miss or v is not None, "a file", default)
    if value is None:
        return None
    if not is_old:
        return FileEntry.of(value, f"{fields.where}: {key}")
    check_name(value, f"{fields.where}: {key}")
    return value


def _model(fields: _Fields) -> ModelConfig | None:
    name = fields.take("name", lambda v: v is None or isinstance(v, str), "a name, or null")
    arguments = fields.take("arguments", lambda v: isinstance(v, dict), "a table")
    fields.end()
    return None if name is None else ModelConfig(name=name, arguments=arguments)


def _loss(fields: _Fields) -> LossConfig:
    loss = fields.table("loss")
    config = LossConfig(
        name=loss.take("name", _is_text, "a text"),
        kind=loss.take(
            "kind",
            lambda v: v in (None, *get_args(LossKind)),
            f"one of {', '.join(get_args(LossKind))}, or null",
        ),
        arguments=loss.take("arguments", lambda v: isinstance(v, dict), "a table"),
    )
    loss.end()
    return config


def _outputs(fields: _Fields) -> tuple[Output, ...]:
    found = []
    for number, values in enumerate(fields.take("outputs", lambda v: isinstance(v, list), "a list")):
        each = _Fields(values, fields.where, f"outputs[{number}]")
        found.append(
            Output(
                name=each.take("name", _is_text, "a text"),
                length=each.take("length", *_LENGTH),
                dtype=each.take("dtype", lambda v: v in OUTPUT_DTYPES, f"one of {', '.join(OUTPUT_DTYPES)}"),
            )
        )
        each.end()
    names = [output.name for output in found]
    if len(set(names)) < len(names) or ("" in names and len(names) > 1):
        raise DataError(f"{fields.where}: outputs has the names {shown(names)}, but each must be another")
    return tuple(found)


def _schema(fields: _Fields, has_several: bool) -> RowSchema:
    features = []
    for number, values in enumerate(fields.take("features", lambda v: isinstance(v, list) and v, "a list")):
        each = _Fields(values, fields.where, f"features[{number}]")
        feature = Feature(
            name=each.take("name", _is_text, "a text"),
            dtype=each.take("dtype", lambda v: v in FEATURE_DTYPES, f"one of {', '.join(FEATURE_DTYPES)}"),
            length=each.take("length", *_LENGTH),
        )
        each.end()
        features.append(feature)
    label = fields.table("label")
    schema = RowSchema(
        features=tuple(features),
        label=label.take("name", _is_text, "a text"),
        label_dtype=label.take("dtype", lambda v: v in LABEL_DTYPES, f"one of {', '.join(LABEL_DTYPES)}"),
        classes=label.take("classes", *_COUNT),
        num_labels=label.take("num_labels", *_COUNT) if has_several else None,
    )
    label.end()
    names = Counter([*(feature.name for feature in features), schema.label])
    if twice := [name for name, count in names.items() if count > 1]:
        raise DataError(f"{fields.where}: features and label name {shown(twice[0])} twice")
    size_bytes = sum(_ITEM_BYTES[f.dtype] * (1 if f.length is None else f.length) for f in features)
    size_bytes += 4 * (schema.num_labels or 0)
    if size_bytes > MOST_RECORD_BYTES:
        raise DataError(
            f"{fields.where}: a row would have {size_bytes:,} bytes, but may have {MOST_RECORD_BYTES:,}"
        )
    return schema


_LENGTH = (
    lambda v: v is None or _is_whole(0, MOST_RECORD_BYTES)(v),
    f"a whole number from 0 to {MOST_RECORD_BYTES}, or null",
)
_COUNT = (
    lambda v: v is None or _is_whole(1, MOST_RECORD_BYTES)(v),
    f"a whole number from 1 to {MOST_RECORD_BYTES}, or null",
)
_ITEM_BYTES = {"uint8": 1, "int64": 8, "float32": 4}


def _digests(fields: _Fields, number: int) -> dict[str, str]:
    keys = {"weights": "state_sha256"} | ({"constants": "constants_sha256"} if number > 2 else {})
    return {name: fields.take(key, is_sha256, "64 hexadecimal digits") for name, key in keys.items()}


class _Fields:
    """A table of model.json, of which each field is taken once."""

    def __init__(self, values: object, where: str, what: str) -> None:
        self.where, self._what = where, what
        if not isinstance(values, dict):
            raise DataError(f"{where}: {what} is {shown(values)}, but must be a table")
        self._left = dict(values)

    def take(self, key: str, is_right: Callable[[Any], object], rule: str, default: Any = ...) -> Any:
        """Return the value of a key.

        Args:
            key: of this table.
            is_right: says whether a value is allowed.
            rule: what it must be, for the error.
            default: what a missing key means; if not given, it must be there.
        """
        name = key if self._what == "the file" else f"{self._what}.{key}"
        if key not in self._left and default is ...:
            raise DataError(f"{self.where}: {name} is missing, but must be {rule}")
        value = self._left.pop(key, default)
        if not is_right(value):
            raise DataError(f"{self.where}: {name} is {shown(value)}, but must be {rule}")
        return value

    def table(self, key: str) -> _Fields:
        """Return the table of a key."""
        return _Fields(self.take(key, lambda v: isinstance(v, dict), "a table"), self.where, key)

    def end(self) -> None:
        """Refuse the fields that were not taken."""
        if self._left:
            raise DataError(f"{self.where}: {self._what} has the unknown field {shown(min(self._left))}")


def _is_whole(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _is_text(value: Any) -> bool:
    """Return whether a value is a text that can be written anywhere: JSON may hold halves of characters."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_of_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_code(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() <= {"model.name", "loss.name"}
        and all(is_sha256(digest) for digest in value.values())
    )
