"""Before anything is trained: a row exactly as the model would see it, and what the split holds twice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pydantic

from app import datasets, files, lengths, overlap, prompts
from app.errors import Invalid
from app.tables import Dataset
from app.web import drafts


@dataclass(frozen=True)
class Preview:
    """`prompt` and `answer` in pieces: text, and whether it is the chat format's own."""

    problem: str = ""
    row: int = 1
    num_rows: int = 0
    prompt: Sequence[tuple[str, bool]] = ()
    answer: Sequence[tuple[str, bool]] = ()
    prompt_tokens: int = 0
    answer_tokens: int = 0
    has_chat: bool = True
    fits: Sequence[str] = ()  # for each method how many rows will be cut, in words


def of(sent: Mapping[str, str], page: Mapping[str, Any]) -> Preview:
    """The preview for a form as sent, with the page that was made of it."""
    dataset, base_model = page["dataset"], page["base_model"]
    if dataset is None or base_model is None:
        return Preview("The preview needs a base model and a dataset.")
    is_classification = sent.get("task") == "classification"
    labels = drafts.lines(sent.get("labels", "")) if is_classification else []
    try:
        template = prompts.check_template(sent.get("template", ""))
        return _preview(base_model.id, dataset, template, tuple(labels), sent, page["cards"])
    except Invalid as problem:
        return Preview(problem.message)


def overlapping(sent: Mapping[str, str], dataset: Dataset | None) -> str:
    """How many test examples of the split that would be made are trained on, too, in words."""
    seed = sent.get("seed", "").strip()
    if dataset is None or not (seed.isascii() and seed.isdecimal() and len(seed) < 11):
        return ""
    split = datasets.split(dataset.num_examples, int(seed))
    return overlap.words(overlap.count(dataset, split), len(split["test"]))


def _preview(
    base_model_id: str,
    dataset: Dataset,
    template: str,
    labels: tuple[str, ...],
    sent: Mapping[str, str],
    cards: Sequence[drafts.Card],
) -> Preview:
    formatter = prompts.formatter(files.tokenizer(base_model_id))
    asked = sent.get("row", "").strip()
    row = int(asked) if asked.isascii() and asked.isdecimal() and len(asked) < 9 else 1
    row = min(max(1, row), dataset.num_examples)
    example = datasets.preview(dataset, row)[-1]
    prompt = formatter.prompt_ids(template, example.input, labels)
    answer = formatter.answer_ids(example.output)
    totals = lengths.counted(base_model_id, dataset, template, labels).totals()
    return Preview(
        row=row,
        num_rows=dataset.num_examples,
        prompt=formatter.pieces(prompt),
        answer=formatter.pieces(answer),
        prompt_tokens=len(prompt),
        answer_tokens=len(answer),
        has_chat=formatter.has_chat,
        fits=[said for card in cards if card.checked and (said := _fit(card, sent, totals))],
    )


def _fit(card: drafts.Card, sent: Mapping[str, str], totals: Sequence[int]) -> str:
    """How many rows are longer than this method takes; empty while its parameters are wrong."""
    try:
        params = card.method.schema.model_validate(drafts.params_of(card.method.key, sent))
    except pydantic.ValidationError:
        return ""
    virtual = card.method.virtual_tokens(params)
    cut = sum(length + virtual > params.max_length for length in totals)
    beside = f" beside {virtual} virtual ones" if virtual else ""
    room = f"{params.max_length - virtual:,} tokens{beside}"
    if not cut:
        return f"{card.method.label}: every row fits into {room}."
    return f"{card.method.label}: {cut:,} of {len(totals):,} rows are cut to {room}."
