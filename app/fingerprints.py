"""Fingerprints: hashes by which the same data, split or base model is known again elsewhere."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from app.storage import Path

# Parts of a base model that training depends on. Left out is what only says how they came here.
_FILES = ("*.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template*")
_PASSING = {
    "transformers_version",
    "_name_or_path",
}  # of config.json: they differ from copy to copy


def of_file(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_split(split: Mapping[str, Sequence[int]]) -> str:
    """The hash of the three lists of row numbers."""
    return _of({part: list(split[part]) for part in ("train", "validation", "test")})


def of_base_model(folder: Path) -> str:
    """The hash of weights, tokenizer, chat format and configuration. Reads every byte of them."""
    parts = {path.name: of_file(path) for pattern in _FILES for path in folder.glob(pattern)}
    config = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in config.items() if name not in _PASSING}
    return _of(parts | {"config": _of(kept)})


def _of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
