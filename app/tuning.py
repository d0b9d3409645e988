"""`studio tune`: the whole job without a browser, through the same tables and workers."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from sqlalchemy.orm import Session

from app import (
    admission,
    assignments,
    base_models,
    calibration,
    database,
    datasets,
    experiments,
    methods,
    naming,
    prompts,
    runs,
    storage,
    supervisor,
)
from app.comparison import figures
from app.errors import Invalid, Unavailable
from app.results import Result
from app.tables import BaseModel, Dataset, Experiment, Run


class Question(NamedTuple):
    """What the command line asks for."""

    data: str
    methods: str
    base: str
    task: str
    template: str
    name: str
    seed: int
    parameters: list[str]
    override: bool = False
    watch: tuple[str, ...] = ()
    columns: tuple[str, str] = ("", "")  # of the data, with inputs and outputs


def tune(question: Question, notes: Console) -> Result:
    """Create the experiment, follow its runs to their end, and compare them."""
    chosen = _chosen(question)
    _check(question)
    with studio(notes):
        with database.session() as db:
            experiment = _create(db, question, chosen)
            names = naming.stored(db, [experiment.id])
        notes.print(f"Experiment {experiment.id}: {experiment.name}", highlight=False, markup=False)
        for run in experiment.runs:
            notes.print(told(run, names[run.id]), highlight=False, markup=False)
        return finish(experiment.id, names, notes)


def finish(experiment_id: str, names: dict[str, str], notes: Console) -> Result:
    """Follow the runs of these names to their end, and compare all that the experiment has."""
    _follow(experiment_id, names, notes)
    with database.reading() as db:
        experiment = experiments.get(db, experiment_id)
        return Result(experiment, figures.compare(db, experiment), list(names))


@contextlib.contextmanager
def studio(notes: Console) -> Iterator[None]:
    """The studio that runs on this home folder, or else workers of our own meanwhile."""
    if supervisor.is_running():
        notes.print(f"Using the studio that runs on {storage.home()}.", highlight=False)
        yield
        return
    with supervisor.only_one():
        supervisor.prepare(lambda text: notes.print(text, highlight=False))
        group = supervisor.Group(("tuner", "generator"), lambda text: notes.print(text))
        group.start()
        try:
            yield
        except KeyboardInterrupt:
            notes.print("Stopping; the runs are kept and go on when a studio runs here again.")
            raise
        finally:
            group.stop(lambda: False)


def _create(db: Session, question: Question, chosen: dict[str, dict[str, Any]]) -> Experiment:
    """Everything is checked before anything is stored. Raises Invalid."""
    base_model = _base_model(db, question.base)
    chosen = admission.checked_params(base_model, chosen)
    dataset = _dataset(db, question)
    task = question.task or datasets.task(dataset)
    return experiments.create(
        db,
        name=question.name or dataset.name,
        base_model_id=base_model.id,
        dataset_id=dataset.id,
        task=task,
        template=question.template or datasets.template(dataset, task),
        labels=datasets.labels(dataset),
        seed=question.seed,
        methods=chosen,
        override=question.override,
        watch=question.watch,
    )


def told(run: Run, label: str) -> str:
    """What a run will take, in a line."""
    known = run.forecast
    if not known:
        return f"{label}: no forecast, as the base model's shapes are not known."
    gpu = known["device_kind"] == calibration.GPU
    need = known["gpu_memory_mb" if gpu else "memory_mb"] / 1000
    low, high = (known[name] / 60 for name in ("seconds_low", "seconds_high"))
    return f"{label}: about {need:.1f} GB of memory, {low:.1f} to {high:.1f} min."


def _chosen(question: Question) -> dict[str, dict[str, Any]]:
    """The methods with the parameters that were set."""
    keys = [key.strip() for key in question.methods.split(",") if key.strip()]
    return assignments.assigned(question.parameters, {methods.get(key).key: {} for key in keys})


def _check(question: Question) -> None:
    """What can be told without the studio. Raises Invalid."""
    if not storage.users_file(question.data).is_file():
        raise Invalid(f"There is no file {question.data}.")
    if question.task and question.task not in prompts.TASKS:
        raise Invalid(f"There is no task {question.task}. Choose from: {', '.join(prompts.TASKS)}.")
    if question.template:
        prompts.check_template(question.template)


def _dataset(db: Session, question: Question) -> Dataset:
    source = storage.users_file(question.data)
    upload = storage.upload_file()
    storage.copy(source, upload)
    return datasets.add(db, source.stem, source.name, upload, question.columns)


def _base_model(db: Session, name: str) -> BaseModel:
    if not name:
        return base_models.add_default(db)
    for model in base_models.all(db):
        if name in {model.id, model.name, model.address}:
            return model
    added = base_models.add(db, "hub" if "/" in name else "folder", name)
    while added.state in {"waiting", "preparing"}:
        time.sleep(0.5)
        db.refresh(added)
        db.commit()  # no transaction stays open while waiting
    if added.state != "ready":
        raise Unavailable(added.error or f"{name} could not be made ready.")
    return added


def _follow(experiment_id: str, names: dict[str, str], notes: Console) -> None:
    columns = (
        TextColumn("{task.description:<17}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[doing]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=notes) as progress:
        bars = {
            run_id: progress.add_task(name, total=None, doing="queued")
            for run_id, name in names.items()
        }
        while True:
            with database.reading() as db:
                every = experiments.get(db, experiment_id).runs
            latest = [run for run in every if run.id in bars]
            for run in latest:
                doing = run.phase or run.state
                progress.update(bars[run.id], total=run.num_steps, completed=run.step, doing=doing)
            if all(run.state in runs.FINAL for run in latest):
                return
            time.sleep(0.3)
