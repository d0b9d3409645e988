"""What a receipt is made of, and reading one that may come from anywhere: checked before it is used."""

import json
import zipfile
from hashlib import sha256
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
from pydantic import Field

from app import fingerprints
from app.errors import Invalid
from app.examples import Example
from app.settings import settings
from app.storage import Path

RECEIPT, POINTS, SPLIT, CARD = "receipt.json", "points.jsonl", "split.json", "README.md"
ENVIRONMENT, DATA = "requirements.txt", "examples.jsonl"
MB = 2**20
# Names of all there may be, and how large it may be: nothing is unpacked to the disk.
MOST = {RECEIPT: 4 * MB, POINTS: 256 * MB, SPLIT: 64 * MB, CARD: MB, ENVIRONMENT: MB}
NEEDED = {RECEIPT, POINTS, SPLIT}

Count = Annotated[int, Field(ge=0)]
Rows = list[Count]


class _Part(pydantic.BaseModel):
    """What a later version adds is passed over."""

    model_config = pydantic.ConfigDict(extra="ignore", allow_inf_nan=False)


class Trained(_Part):
    """The run: its method with all parameters, and how it went."""

    id: str
    method: str
    params: dict[str, Any]
    attempts: int
    steps: int
    best_step: int | None
    best_loss: float | None
    train_seconds: float
    finished_at: float | None


class Setup(_Part):
    """The experiment that the run belongs to."""

    name: str
    task: str
    labels: list[str]
    template: str
    seed: Annotated[int, Field(ge=0, lt=2**31)]


class Data(_Part):
    """The dataset; `fingerprint`: SHA-256 of its examples as JSON lines."""

    name: str
    fingerprint: str
    num_examples: int


class Parts(_Part):
    """How many rows each part of the split has, and the hash of their numbers."""

    fingerprint: str
    train: int
    validation: int
    test: int


class Base(_Part):
    """The base model; `fingerprint`: of weights, tokenizer, chat format and configuration."""

    name: str
    source: str
    address: str
    licence: str | None
    fingerprint: str | None


class Figures(_Part):
    """What a repetition needs of the figures: how the machine computed. All others are kept too."""

    model_config = pydantic.ConfigDict(extra="allow", allow_inf_nan=False)

    device: str
    device_kind: Literal["cpu", "cuda"]
    devices: Annotated[int, Field(ge=1, le=64)] = 1
    precision: Literal["float32", "bfloat16"]
    products: Literal["", "float32", "bfloat16"] = ""
    threads: Annotated[int, Field(ge=1, le=1024)]
    token_budget: Annotated[int, Field(ge=16, le=2**20)]


class Receipt(_Part):
    """All of a run but its curve, its split and its data, which lie beside it."""

    format: Literal[1]
    versions: dict[str, str]
    run: Trained
    experiment: Setup
    dataset: Data
    split: Parts
    base_model: Base
    figures: Figures
    scores: dict[str, Any]
    base_scores: dict[str, Any]
    files: dict[str, str]  # SHA-256 of each of the others


class Split(_Part):
    """Row numbers of each part."""

    train: Rows
    validation: Rows
    test: Rows


class Row(_Part):
    """One example."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    input: str
    output: str


class Point(_Part):
    """A measurement; what a repetition compares."""

    kind: str
    step: Count
    loss: float | None
    learning_rate: float | None
    tokens: Count


class Read(NamedTuple):
    """A receipt that was read, with the data if it carries them."""

    receipt: Receipt
    split: dict[str, list[int]]
    points: list[Point]
    data: list[Example] | None


def read(path: Path) -> Read:
    """The receipt in the file, whole and consistent in itself. Raises Invalid with the reason."""
    if not path.is_file():
        raise Invalid(f"There is no file {path}.")
    try:
        with zipfile.ZipFile(path) as archive:
            found = {name: _content(archive, name) for name in _names(archive)}
        return _checked(found)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise _refused(path, f"{place}: {first['msg']}") from None
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError, RuntimeError) as error:
        # zipfile raises RuntimeError for what is encrypted.
        raise _refused(path, str(error) or type(error).__name__) from None
    except (ValueError, RecursionError, zipfile.zlib.error) as error:  # type: ignore[attr-defined]
        raise _refused(path, str(error)) from None


def _refused(path: Path, reason: str) -> Invalid:
    return Invalid(f"{path} is no whole receipt: {reason[:300].rstrip('.')}. Nothing was trained.")


def _names(archive: zipfile.ZipFile) -> list[str]:
    """Raises ValueError unless all are names of a receipt's files, each there once."""
    names = archive.namelist()
    if strange := [name for name in names if name not in MOST and name != DATA]:
        raise ValueError(f"it holds {strange[0][:100]!r}, which is no part of a receipt")
    if len(set(names)) < len(names):
        raise ValueError("it holds a file twice")
    if missing := sorted(NEEDED - set(names)):
        raise ValueError(f"it holds no {missing[0]}")
    return names


def _content(archive: zipfile.ZipFile, name: str) -> bytes:
    """Never more than it may be, whatever the archive says of its size."""
    most = MOST.get(name, settings.max_upload_mb * 2 * MB)
    with archive.open(name) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"its {name} is larger than {most // MB:,} MB")
    return content


def _checked(found: dict[str, bytes]) -> Read:
    receipt = Receipt.model_validate_json(found[RECEIPT])
    for name, content in found.items():
        if name != RECEIPT and receipt.files.get(name) != sha256(content).hexdigest():
            raise ValueError(f"its {name} is not the one that it was made with")
    split = Split.model_validate_json(found[SPLIT]).model_dump()
    if fingerprints.of_split(split) != receipt.split.fingerprint:
        raise ValueError("its split is not the one of its fingerprint")
    data = _examples(found.get(DATA))
    if DATA in found and sha256(found[DATA]).hexdigest() != receipt.dataset.fingerprint:
        raise ValueError("its examples are not those of the dataset's fingerprint")
    rows = [row for part in split.values() for row in part]
    if (
        not split["train"]
        or len(set(rows)) < len(rows)
        or max(rows) >= receipt.dataset.num_examples
    ):
        raise ValueError("its split does not fit its dataset")
    if data is not None and len(data) != receipt.dataset.num_examples:
        raise ValueError("it holds another number of examples than its dataset has")
    points = [Point.model_validate(json.loads(line)) for line in found[POINTS].splitlines()]
    return Read(receipt, split, points, data)


def _examples(lines: bytes | None) -> list[Example] | None:
    if lines is None:
        return None
    rows = [Row.model_validate_json(line) for line in lines.splitlines()]
    return [Example(row.input, row.output) for row in rows]
