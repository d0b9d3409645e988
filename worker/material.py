"""What a run works on: its examples as token ids, by the split of its experiment."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from app import base_models, database, datasets, files, fingerprints, methods, prompts
from app.examples import Example
from app.tables import Experiment, Run


class Material(NamedTuple):
    """The examples of each part as rows of token ids, and how many had to be cut to fit."""

    train: list[Any]
    validation: list[Any]
    test: list[Any]
    validation_examples: list[Example]
    test_examples: list[tuple[int, Example]]  # index in the dataset, and the example itself
    num_cut: int


def know_base(run: Run) -> None:
    """Have the base model's fingerprint, which one made ready by an older version lacks."""
    base = run.experiment.base_model
    if base.fingerprint is None:
        found = fingerprints.of_base_model(files.base_model(base.id))
        database.lasting(lambda db: base_models.know(db, base.id, found))


def gather(run: Run, examples: Sequence[Example] | None = None) -> Material:
    """Tokenize the run's examples; virtual tokens count towards the maximum length.

    `examples`: those of the dataset, where it is not in this studio.
    """
    experiment = run.experiment
    method = methods.get(run.method)
    params = method.schema.model_validate(run.params)
    formatter = prompts.formatter(files.base_model(experiment.base_model_id))
    if examples is None:
        examples = datasets.rows(experiment.dataset)
    rows = {
        part: [
            formatter.row(
                experiment.template,
                experiment.labels,
                examples[index],
                params.max_length,
                method.virtual_tokens(params),
            )
            for index in experiment.split[part]
        ]
        for part in ("train", "validation", "test")
    }
    cut = sum(row.cut > 0 for part in rows.values() for row in part)
    held = [examples[index] for index in experiment.split["validation"]]
    tests = [(index, examples[index]) for index in experiment.split["test"]]
    return Material(rows["train"], rows["validation"], rows["test"], held, tests, cut)


def longest_answer(experiment: Experiment, material: Material) -> int:
    """Tokens that an answer may take when scored: the longest known one and some to spare."""
    known = max(len(row.answer_ids) for row in [*material.train, *material.validation])
    return known + max(8, known // 4)
