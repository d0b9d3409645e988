"""What the comparison's tables measure: each column's figure, its words, and what stands under it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from app.comparison import scores
from app.comparison.figures import Row
from app.web import formats


@dataclass(frozen=True)
class Column:
    """One figure of each model. `best`: what the best cell is called; `sign` +1: more is better."""

    label: str
    unit: str
    value: Callable[[Row], float | None]
    text: Callable[[Any], str]
    best: str = ""
    sign: int = -1
    base: bool = True  # whether the base model takes part in being best
    under: Callable[[Row], str] = lambda row: ""  # a second line: interval or forecast


def of_answers(task: str, rows: Sequence[Row]) -> list[Column]:
    """What is measured of a model's answers."""
    known = scores.METRICS[task] | {
        name: label
        for name, label in scores.CHOICE.items()
        if any(name in row.metrics for row in rows)
    }
    made = [
        Column(label, "", _metric(name), formats.percent, "highest", +1, under=_within(name))
        for name, label in known.items()
    ]
    nats = "nats/token"
    return [
        *made,
        Column("Validation loss", nats, _get("validation_loss"), formats.figure, "lowest"),
        Column("Test loss", nats, _get("test_loss"), formats.figure, "lowest", under=_loss_within),
        Column("Perplexity", "on test", _get("perplexity"), formats.figure, "lowest"),
    ]


def _metric(name: str) -> Callable[[Row], float | None]:
    return lambda row: row.metrics.get(name)


def _get(name: str) -> Callable[[Row], float | None]:
    return lambda row: getattr(row, name)


def _within(name: str) -> Callable[[Row], str]:
    def words(row: Row) -> str:
        first = row.score is not None and row.metrics.get(name) == row.score
        found = row.intervals.get(name) or (row.interval if first else None)
        return f"{100 * found.low:.1f} to {100 * found.high:.1f}" if found else ""

    return words


def _loss_within(row: Row) -> str:
    found = row.intervals.get("test_loss")
    return f"{formats.figure(found.low)} to {formats.figure(found.high)}" if found else ""


def _forecast(what: str, words: Callable[[float], str]) -> Callable[[Row], str]:
    return lambda row: f"forecast {words(told)}" if (told := row.forecast.get(what)) else ""


def _share(share: float | None) -> str:
    return formats.percent(share, 3 if share and share < 0.01 else 1)


def _moment(seconds: float | None) -> str:
    return formats.NOTHING if seconds is None else f"{seconds * 1000:,.0f} ms"


def _rate(value: float | None) -> str:
    return formats.number(value, 1)


def _energy(hours: float | None) -> str:
    return "not measured" if hours is None else f"{hours:,.1f} Wh"


COSTS = [
    Column(
        "Training time", "", _get("train_seconds"), formats.duration, "quickest",
        under=_forecast("train_seconds", formats.duration),
    ),
    Column(
        "Peak memory", "", _get("peak_memory_mb"), formats.memory, "least",
        under=_forecast("memory_mb", formats.memory),
    ),
    Column("Speed", "tokens/s", _get("tokens_per_second"), formats.number, "fastest", +1),
    Column("Trained", "parameters", _get("trainable"), formats.number, "fewest", base=False),
    Column("Share", "of all", _get("share"), _share, base=False),
    Column(
        "Saved", "with the tokenizer", _get("size_bytes"), formats.size, "smallest",
        under=_forecast("size_bytes", formats.size),
    ),
    Column("First token", "of an answer", _get("first_token_seconds"), _moment),
    Column("Answering", "tokens/s", _get("answer_tokens_per_second"), _rate),
    Column("Energy", "of the GPU", _get("energy_wh"), _energy, "least"),
]  # fmt: skip
