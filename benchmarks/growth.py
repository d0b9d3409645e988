"""How the studio's cost grows: with rows, length, prefix, batch and model size. LoRA, random text."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from app import storage
from benchmarks import cases, gemm, report
from benchmarks.cases import Job
from worker.packing import Row

ANSWER = 8  # tokens
# SmolLM2-360M's shape with random weights: speed does not ask what a model knows.
LARGER = {
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
}


class Point(NamedTuple):
    """What is measured: `own` and `prefix` are tokens of a prompt, the prefix is shared."""

    what: str
    value: int
    rows: int = 48
    batch: int = 16
    own: int = 24
    prefix: int = 35
    model: str = ""


POINTS = [
    *(Point("rows", rows, rows=rows) for rows in (32, 64, 128)),
    *(Point("batch", batch, rows=3 * batch, batch=batch) for batch in (2, 4, 8, 16)),
    *(Point("length of an example", own + ANSWER, own=own) for own in (8, 24, 56, 120, 248)),
    *(Point("shared prefix", prefix, prefix=prefix) for prefix in (0, 64, 256, 512)),
    Point("model size, million weights", 135),
    Point("model size, million weights", 362, model="larger"),
]


def larger(model: Path, folder: Path) -> Path:
    """A model of random weights with the default's tokenizer, made once."""
    target = folder / "larger"
    if not target.exists():
        new = folder / ".larger.new"
        storage.remove(new)
        config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
        config.update(LARGER)
        config.head_dim = LARGER["hidden_size"] // LARGER["num_attention_heads"]
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        made.to(torch.bfloat16).save_pretrained(new)
        new.rename(target)
    return target


def job(point: Point, folder: str, vocabulary: int = 40_000) -> Job:
    """Examples of random tokens with just these lengths."""
    draw = random.Random(1)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(100, vocabulary) for _ in range(count)]

    shared = tokens(point.prefix)
    train = [Row([*shared, *tokens(point.own)], tokens(ANSWER)) for _ in range(point.rows)]
    params = cases.params("lora", 8192) | {"batch_size": point.batch}
    return Job("lora", params, 1, folder, train, [])


def measure(
    model: Path,
    folder: Path,
    measured: Callable[[str, Job], dict[str, Any]],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Every point: seconds of a step (of all steps where rows vary), tokens, and the peak."""
    entries = []
    for point in POINTS:
        place = larger(model, folder) if point.model else model
        made = job(point, str(place))
        found = measured("benchmarks.studio", made)
        seconds = found["seconds"][1:]
        whole = point.what == "rows"
        step = gemm.work(made.train[: point.batch], 0).tokens
        entries.append(
            {
                "what": f"{point.what} (whole epoch)" if whole else point.what,
                "value": point.value,
                "tokens": step * (point.rows // point.batch if whole else 1),
                "seconds": sum(found["seconds"]) if whole else sum(seconds) / len(seconds),
                "peak_mb": found["peak_mb"],
                **report.circumstances(),
            }
        )
        say(f"{point.what} {point.value}: {entries[-1]['seconds']:.2f} s")
    return entries
