"""The model card of a tuned model, in the form that model hubs read: what it is, and how it was measured."""

import json
import re
from typing import Any

from app import methods, naming
from app.comparison import scores
from app.prompts import TASKS
from app.tables import Run


def write(run: Run, base: dict[str, Any]) -> str:
    """The card as Markdown; `base`: the base model's scores on the same test examples."""
    parts = [_front(run), _what(run), _how(run), _measured(run, base), _limits(run)]
    return "\n".join(parts)


def plain(text: str) -> str:
    """Text of a person as Markdown shows it: nothing in it is markup."""
    line = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>#|~!])", r"\\\1", line)


def _front(run: Run) -> str:
    """YAML; JSON's texts are YAML's."""
    experiment, model = run.experiment, run.experiment.base_model
    method = methods.get(run.method)
    lines = {
        "base_model": model.address if model.source == "hub" else model.name,
        "library_name": "peft" if method.frozen_base else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tuning-studio", run.method.replace("_", "-"), experiment.task.replace("_", "-")],
    }
    if model.licence:
        lines["license"] = model.licence.lower()
    named = [
        f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in sorted(lines.items())
    ]
    return "\n".join(["---", *named, "---", ""])


def _what(run: Run) -> str:
    experiment, method = run.experiment, methods.get(run.method)
    model = experiment.base_model
    licence = model.licence or "unknown: see where the base model comes from"
    return f"""# {plain(experiment.name)}: {plain(naming.name(run))}

{plain(model.name)}, tuned by {method.label} on {len(experiment.split["train"]):,} examples of the dataset
"{plain(experiment.dataset.name)}". {method.summary}

- Base model: {plain(model.address)} ({plain(model.source)}), licence {plain(licence)}
- Task: {TASKS[experiment.task].label}
- What is kept: the state of step {run.best_step or run.step:,} of {run.step:,}, which had the best validation loss

## What the model reads

{_fenced(experiment.template)}

`{{{{input}}}}` stands for the input{", `{{labels}}` for the labels" if experiment.labels else ""}.
{_labels(experiment.labels)}"""


def _fenced(text: str) -> str:
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _labels(labels: list[str]) -> str:
    return f"\nLabels: {', '.join(plain(label) for label in labels)}\n" if labels else ""


def _how(run: Run) -> str:
    experiment, figures = run.experiment, run.figures
    schema = methods.get(run.method).schema
    told = [
        (field.title or name, run.params[name])
        for name, field in schema.model_fields.items()
        if run.params.get(name) not in (None, "") and name != "seed"
    ]
    sizes = ", ".join(
        f"{len(experiment.split[part]):,} {part}" for part in ("train", "validation", "test")
    )
    told += [("Seed", naming.settings(run)["seed"]), ("Split", f"{sizes} examples")]
    told += [
        (label, figures[key])
        for key, label in (
            ("trainable_parameters", "Trained parameters"),
            ("device", "Device"),
            ("precision", "Precision"),
        )
        if figures.get(key)
    ]
    told += [("Training time", f"{run.train_seconds:.0f} s")]
    rows = [f"| {label} | {plain(str(value))} |" for label, value in told]
    return "\n".join(["## How it was trained", "", "| | |", "|---|---|", *rows, ""])


def _measured(run: Run, base: dict[str, Any]) -> str:
    """The table: base model and tuned model side by side, on the same test examples."""
    found, task = run.scores.get("metrics", {}), run.experiment.task
    known = base.get("metrics", {})
    rows = [
        (label, _share(known.get(key)), _share(found.get(key)))
        for key, label in scores.METRICS[task].items()
        if key in found
    ]
    rows.append(("Loss (nats per token)", _loss(base), _loss(run.scores)))
    lines = [f"| {label} | {before} | {after} |" for label, before, after in rows]
    count = run.scores.get("num_test", len(run.experiment.split["test"]))
    return "\n".join(
        [
            "## Measured",
            "",
            f"On {count:,} test examples that were not trained on; the base model with the same template.",
            "",
            "| | Base model | Tuned |",
            "|---|---|---|",
            *lines,
            "",
        ]
    )


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{value * 100:.1f} %"


def _loss(found: dict[str, Any]) -> str:
    loss = found.get("test_loss")
    return "not measured" if loss is None else f"{loss:.4f}"


def _limits(run: Run) -> str:
    count = len(run.experiment.split["test"])
    return f"""## Limits

- Measured on {count:,} test examples of one dataset: figures for other texts may differ much, and small
  differences between models on so few examples may be chance.
- One training with one seed; another seed gives somewhat other figures.
- Prompts must have the form above. What the base model gets wrong or says unfairly, this model may too.
"""
