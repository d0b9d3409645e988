"""The side-by-side of an experiment: one row for the base model and for each run, measured."""

import math
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from app import calibration, datasets, methods, naming, overlap
from app.comparison import baselines, certainty, pairs, scores
from app.comparison.intervals import Interval
from app.comparison.pairs import Finished, Pair
from app.tables import Baseline, Experiment, Run


class Row(NamedTuple):
    """What was measured of one model. None: not measured, or not yet."""

    key: str  # run id, or "base"
    label: str
    method: str  # a method's key, or "base"
    state: str = ""
    score: float | None = None  # the task's first metric, on the test split
    interval: Interval | None = None  # of the score, 95 %
    metrics: dict[str, float] = {}  # noqa: RUF012 - a row never changes
    intervals: dict[str, Interval] = {}  # noqa: RUF012 - of the metrics and of test_loss
    validation_loss: float | None = None  # best; nats per target token
    test_loss: float | None = None
    perplexity: float | None = None  # on the test split
    train_seconds: float | None = None
    peak_memory_mb: float | None = None
    tokens_per_second: float | None = None  # in training
    energy_wh: float | None = None  # of the GPU in training
    first_token_seconds: float | None = None  # of an answer
    answer_tokens_per_second: float | None = None
    trainable: int | None = None
    total: int | None = None
    share: float | None = None  # trainable / total
    size_bytes: int | None = None  # of what is saved, the tokenizer with it
    device: str | None = None
    forecast: dict[str, float | None] = {}  # noqa: RUF012 - as told before the run began


class Example(NamedTuple):
    """One test example with each model's answer, in the order of the rows: (text, score)."""

    row: int
    input: str
    expected: str
    answers: list[tuple[str, float] | None]


class Comparison(NamedTuple):
    """Base model first, then the runs in the order of their methods."""

    metric: str  # name of the first metric
    rows: list[Row]
    pairs: list[Pair]  # of all that has finished
    num_test: int
    majority: float | None  # classification: the score of always answering the commonest label
    num_trained_on: int | None  # test examples whose input stands in the training part, too

    @property
    def labels(self) -> dict[str, str]:
        """By the rows' keys."""
        return {row.key: row.label for row in self.rows}


baseline = baselines.find  # the pages' way to the base model's figures


def compare(db: Session, experiment: Experiment) -> Comparison:
    """The table of the experiment, as far as it has been measured."""
    metric, test = scores.primary(experiment.task), experiment.split["test"]
    base, runs = baselines.find(db, experiment), ordered(experiment)
    named = naming.names(runs)
    rows = [_base_row(experiment, base), *(_row(run, named[run.id]) for run in runs)]
    finished = [Finished(run.id, run.id, run.finished_at) for run in runs if _has_ended_well(run)]
    if base and base.scores:
        finished.insert(0, Finished("base", base.key, base.created_at))
    judged = pairs.judge(db, finished, test, right_or_wrong=metric in scores.RIGHT_OR_WRONG)
    rows = [_with_score(row, metric, judged.intervals.get(row.key)) for row in rows]
    known = overlap.count(experiment.dataset, experiment.split)
    return Comparison(metric, rows, judged.pairs, len(test), _majority(experiment), known)


def as_dict(found: Comparison) -> dict[str, Any]:
    """For JSON."""
    told = [
        {
            "better": pair.better,
            "other": pair.other,
            "needed_for_3_points": pair.needed,
            **pair.difference._asdict(),
            "words": pairs.words(pair, found.labels, found.num_test),
        }
        for pair in found.pairs
    ]
    rows = [row._asdict() for row in found.rows]
    by = scores.BY_SINGLE.get(found.metric, "")
    return found._asdict() | {"rows": rows, "pairs": told, "pairs_note": by}


def ordered(experiment: Experiment) -> list[Run]:
    """The runs in the order of their methods, a retried one after the one it repeats."""
    return sorted(
        experiment.runs, key=lambda run: (methods.get(run.method).order, run.position, run.id)
    )


def _has_ended_well(run: Run) -> bool:
    return run.state == "succeeded" and bool(run.scores)


def _base_row(experiment: Experiment, base: Baseline | None) -> Row:
    found = base.scores if base else {}
    return Row(
        key="base",
        label="Base model",
        method="base",
        state="succeeded" if found else "",
        validation_loss=base.validation_loss if base else None,
        trainable=0,
        total=experiment.base_model.shapes.get("parameters"),
        share=0.0,
        **_scored(found),
    )


def _row(run: Run, label: str) -> Row:
    figures = run.figures
    trainable, total = figures.get("trainable_parameters"), figures.get("total_parameters")
    same = ("peak_memory_mb", "tokens_per_second", "energy_wh", "size_bytes", "device")
    measured: dict[str, Any] = {name: figures.get(name) for name in same}
    return Row(
        key=run.id,
        label=label,
        method=run.method,
        state=run.state,
        validation_loss=run.best_loss,
        train_seconds=run.train_seconds or None,
        trainable=trainable,
        total=total,
        share=trainable / total if trainable and total else None,
        forecast={one.what: one.forecast for one in calibration.compared(run) if one.forecast},
        **measured,
        **_scored(run.scores),
    )


def intervals_of(found: dict[str, Any]) -> dict[str, Interval]:
    """By metric, as the worker stored them with a model's scores; those of shares follow from these."""
    total = found.get("num_test", 0)
    shares = {
        name: certainty.of_share(value, total)
        for name, value in found.get("metrics", {}).items()
        if certainty.is_share(name) and total
    }
    return shares | {name: Interval(*ends) for name, ends in found.get("intervals", {}).items()}


def _scored(found: dict[str, Any]) -> dict[str, Any]:
    """What the worker stored of a model's answers to the test split."""
    loss = found.get("test_loss")
    return {
        "metrics": found.get("metrics", {}),
        "intervals": intervals_of(found),
        "test_loss": loss,
        "perplexity": math.exp(loss) if loss is not None and loss < 700 else None,
        "first_token_seconds": found.get("first_token_seconds"),
        "answer_tokens_per_second": found.get("answer_tokens_per_second"),
    }


def _with_score(row: Row, metric: str, interval: Interval | None) -> Row:
    """With the score; its interval is that of the stored answers where the worker gave none."""
    found = row.metrics.get(metric)
    if found is None:
        return row
    usual = None if metric in scores.BY_SINGLE else interval  # which is of another figure
    known = row.intervals.get(metric) or usual
    return row._replace(score=found, interval=known)


_majorities: dict[str, float] = {}  # by experiment: neither its dataset nor its split changes


def _majority(experiment: Experiment) -> float | None:
    if experiment.task != "classification":
        return None
    if experiment.id not in _majorities:
        _majorities[experiment.id] = _share_of_commonest(experiment)
    return _majorities[experiment.id]


def _share_of_commonest(experiment: Experiment) -> float:
    rows = datasets.rows(experiment.dataset)
    outputs = [rows[index].output for index in experiment.split["train"]]
    commonest = max(sorted(set(outputs)), key=outputs.count)
    test = [rows[index].output for index in experiment.split["test"]]
    return test.count(commonest) / len(test)


def answers(
    db: Session, experiment: Experiment, *, start: int = 0, limit: int = 20
) -> list[Example]:
    """Test examples with every model's answer, a page at a time."""
    base = baselines.find(db, experiment)
    owners = [base.key if base else "", *[run.id for run in ordered(experiment)]]
    page = experiment.split["test"][start : start + limit]
    return [
        Example(
            row,
            one.input,
            one.output,
            [(given.text, given.score) if given else None for given in answers],
        )
        for row, one, answers in baselines.answers(db, experiment, owners, page)
    ]
