"""What `studio tune --json` printed, as a table in Markdown: `python -m benchmarks.results FILE`."""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import table

SHOWN = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "choice_accuracy": "accuracy by choice",
    "valid_json": "valid JSON",
    "exact": "exact",
    "field_f1": "field F1",
    "chrf": "chrF",
    "rouge1": "ROUGE-1",
    "rougeL": "ROUGE-L",
}


def _share(value: float) -> str:
    return f"{100 * value:.1f}"


def _row(one: dict[str, Any], metrics: list[str]) -> list[str]:
    low, high = one["interval"] or (0.0, 0.0)
    trained = one["train_seconds"] is not None
    return [
        one["label"],
        f"{_share(one['score'])} ({_share(low)} to {_share(high)})",
        *(_share(one["metrics"][name]) for name in metrics),
        f"{one['test_loss']:.4f}",
        f"{one['train_seconds']:,.0f} s" if trained else "-",
        f"{one['peak_memory_mb']:,.0f} MB" if trained else "-",
        f"{one['trainable']:,}",
        f"{one['size_bytes'] / 1e6:,.1f} MB" if trained else "-",
    ]


def told(found: dict[str, Any]) -> str:
    """The table of all models, and a line for each pair of methods that can be told apart."""
    score = found["metric"]
    metrics = [name for name in SHOWN if name in found["rows"][0]["metrics"] and name != score]
    head = [
        "model",
        f"{SHOWN.get(score, score)}, % (95 %)",
        *(f"{SHOWN[name]}, %" for name in metrics),
        "test loss",
        "training",
        "peak memory",
        "trained",
        "saved",
    ]
    lines = [table(head, [_row(one, metrics) for one in found["rows"]])]
    if found["majority"] is not None:
        lines.append(f"Always the commonest label: {_share(found['majority'])} %.")
    seen = [one["words"] for one in found["pairs"] if "base" not in (one["better"], one["other"])]
    return "\n\n".join([*lines, " ".join(seen)])


if __name__ == "__main__":
    print(told(json.loads(Path(sys.argv[1]).read_text("utf-8"))))
