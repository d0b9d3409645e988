"""What was measured, as JSON that each case is merged into, and as tables."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app import methods
from benchmarks import cases
from benchmarks.cases import Case, Job

if TYPE_CHECKING:
    from benchmarks.bench import Pair

LATEST = Path("benchmarks/latest.json")
# What one entry of each part is known by: measuring it again takes the earlier one's place.
KEYS = {
    "cases": ("data", "method"),
    "forecasts": ("data", "method"),
    "growth": ("what", "value"),
    "start": ("data", "method"),
}
AIMS = {"lora": 6, "qlora": 5, "prompt_tuning": 12, "full": 4}  # on banking77; 2 elsewhere


def aim(data: str, method: str) -> float:
    """How many times the peer's examples per second the project wants to reach."""
    return AIMS[method] if data == "banking77" else 2


def _sides(studio: float, peer: float) -> dict[str, float]:
    return {"studio": studio, "peer": peer, "ratio": studio / peer}


def entry(case: Case, job: Job, pairs: Sequence[Pair], versions: str) -> dict[str, Any]:
    """A case's entry: medians of speed, peaks of memory, means of losses over the seeds.

    Compared with the peer's faster row in speed and with its leaner one in memory.
    """
    rows = {
        "plain": [pair.plain for pair in pairs],
        "checkpointing": [pair.lean for pair in pairs if pair.lean],
    }
    studio = [pair.studio for pair in pairs]
    speeds = {name: _median(found, "examples_per_second") for name, found in rows.items() if found}
    peaks = {name: max(one["peak_mb"] for one in found) for name, found in rows.items() if found}
    fast = rows[max(speeds, key=lambda name: speeds[name])]

    def mean(found: Sequence[Any], pick: Callable[[Any], float]) -> float:
        return statistics.mean(map(pick, found))

    return {
        "data": case.data,
        "method": case.method,
        "peer": versions,
        "examples_per_second": _sides(_median(studio, "examples_per_second"), max(speeds.values())),
        "peak_memory_mb": _sides(max(one["peak_mb"] for one in studio), min(peaks.values())),
        "final_train_loss": _sides(
            *(mean(found, lambda one: one["losses"][-1]) for found in (studio, rows["plain"]))
        ),
        "heldout_loss": _sides(
            *(mean(found, lambda one: one["held_out"]) for found in (studio, rows["plain"]))
        ),
        "gemm_share": statistics.median(one["gemm"]["share"] for one in studio),
        "pairs": [
            pair.studio["examples_per_second"] / pair.plain["examples_per_second"] for pair in pairs
        ],
        "core_seconds_ratio": _median(studio, "examples_per_core_second")
        / _median(fast, "examples_per_core_second"),
        "peer_rows": {
            name: {"examples_per_second": speeds[name], "peak_memory_mb": peaks[name]}
            for name in speeds
        },
        "obstacle": studio[0].get("obstacle", ""),
        "tokens": cases.lengths(job.train),
        **circumstances(),
    }


def _median(found: Sequence[dict[str, Any]], key: str) -> float:
    return float(statistics.median(one[key] for one in found))


def circumstances() -> dict[str, Any]:
    """Where and when something was measured."""
    return {
        "machine": cases.machine(),
        "measured_at": time.strftime("%Y-%m-%d %H:%M"),
        "load": round(os.getloadavg()[0], 1),  # of the measurement itself, too
    }


def read(path: Path) -> dict[str, Any]:
    """What has been measured so far."""
    return dict(json.loads(path.read_text())) if path.exists() else {"cases": []}


def merge(path: Path, part: str, entries: Sequence[dict[str, Any]]) -> None:
    """Put new entries into the file, in place of earlier ones of the same name."""
    found = read(path)
    known = {tuple(one[key] for key in KEYS[part]): one for one in found.get(part, [])}
    known |= {tuple(one[key] for key in KEYS[part]): one for one in entries}
    found[part] = list(known.values())
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(found, indent=1) + "\n")
    new.replace(path)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, which reads well on a terminal too."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| "
        + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


HEAD = (
    "data",
    "studio, examples/s",
    "peer",
    "peer, checkpointing",
    "times (aim)",
    "pairs",
    "by core seconds",
    "studio, MB",
    "peer",
    "peer, checkpointing",
    "share (aim 0.50)",
    "held-out loss, studio",
    "peer",
    "difference",
    "gemm share",
)


def _row(one: dict[str, Any]) -> list[str]:
    speed, memory, loss = (
        one[key] for key in ("examples_per_second", "peak_memory_mb", "heldout_loss")
    )
    rows = one["peer_rows"]

    def told(name: str, key: str, form: str) -> str:
        return format(rows[name][key], form) if name in rows else "-"

    return [
        one["data"],
        f"{speed['studio']:.2f}",
        told("plain", "examples_per_second", ".2f"),
        told("checkpointing", "examples_per_second", ".2f"),
        f"{speed['ratio']:.1f} ({aim(one['data'], one['method'])})",
        ", ".join(f"{ratio:.1f}" for ratio in one["pairs"]),
        f"{one['core_seconds_ratio']:.1f}",
        f"{memory['studio']:,.0f}",
        told("plain", "peak_memory_mb", ",.0f"),
        told("checkpointing", "peak_memory_mb", ",.0f"),
        f"{memory['ratio']:.2f}",
        f"{loss['studio']:.4f}",
        f"{loss['peer']:.4f}",
        f"{100 * (loss['ratio'] - 1):+.2f} %",
        f"{one['gemm_share']:.2f}",
    ]


def tables(found: dict[str, Any]) -> str:
    """Everything that was measured: one table per method, then forecasts, start and growth."""
    parts = []
    for key in cases.CHANGES:
        entries = [one for one in found["cases"] if one["method"] == key]
        if entries:
            newest = max(entries, key=lambda one: str(one["measured_at"]))
            parts.append(
                f"### {methods.get(key).label}\n\n{table(HEAD, [_row(one) for one in entries])}\n\n"
                f"{newest['machine']}; {newest['measured_at']}; peer: {newest['peer']}."
            )
    return "\n\n".join([*parts, *_others(found)])


def _others(found: dict[str, Any]) -> list[str]:
    parts = []
    if forecasts := found.get("forecasts"):
        head = ("data", "method", "memory, MB", "forecast", "off", "time, s", "forecast", "off")
        rows = [
            [
                one["data"],
                methods.get(one["method"]).label,
                *_off(one["memory_mb"], one["forecast_memory_mb"]),
                *_off(one["seconds"], one["forecast_seconds"]),
            ]
            for one in forecasts
        ]
        parts.append(f"### Forecast against measured\n\n{table(head, rows)}")
    for one in found.get("start", []):
        told = ", ".join(f"{seconds:.1f}" for seconds in one["seconds"])
        parts.append(
            f"### From start to the first point\n\n{told} s on a warm worker ({one['data']}, "
            f"{methods.get(one['method']).label}; aim: under 5 s)."
        )
    if grown := found.get("growth"):
        columns = ("what", "value", "tokens a step", "s a step", "ms a token", "peak MB")
        rows = [
            [
                one["what"],
                str(one["value"]),
                f"{one['tokens']:,}",
                f"{one['seconds']:.2f}",
                f"{1000 * one['seconds'] / one['tokens']:.2f}",
                f"{one['peak_mb']:,.0f}",
            ]
            for one in grown
        ]
        parts.append(f"### How cost grows\n\n{table(columns, rows)}")
    return parts


def _off(measured: float, forecast: float) -> list[str]:
    return [f"{measured:,.0f}", f"{forecast:,.0f}", f"{100 * (forecast / measured - 1):+.0f} %"]


if __name__ == "__main__":
    print(tables(read(LATEST)))
