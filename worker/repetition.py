"""A receipt's run again: its data and base model found, its first steps trained as they were."""

from collections.abc import Sequence
from hashlib import sha256

from rich.console import Console
from sqlalchemy import select

from app import (
    admission,
    base_models,
    database,
    datasets,
    examples,
    files,
    fingerprints,
    methods,
    naming,
    pace,
    prompts,
    storage,
)
from app.errors import Invalid
from app.examples import Example
from app.points import Measured
from app.receipt_files import Read
from app.tables import BaseModel, Dataset, Experiment, Run
from worker import backbones, hardware, relief, train
from worker.material import gather

STEPS = 20


def data_of(read: Read, data: str) -> list[Example]:
    """From the receipt, the file named, or the studio: those of the receipt's fingerprint."""
    wanted = read.receipt.dataset
    if read.data is not None:
        return read.data
    if data:
        rows = list(examples.read(storage.users_file(data), data))
        if _fingerprint(rows) != wanted.fingerprint:
            raise Invalid(
                f"The examples in {data} are not those that the run was trained on. Nothing was trained."
            )
        return rows
    with database.reading() as db:
        same = select(Dataset).where(Dataset.fingerprint == wanted.fingerprint)
        found = db.scalar(same.limit(1))
    if found is None:
        raise Invalid(
            f"The dataset {wanted.name!r} is neither in this studio nor in the receipt. Name its file: "
            "studio verify RECEIPT --data FILE. Nothing was trained."
        )
    return datasets.rows(found)


def _fingerprint(rows: Sequence[Example]) -> str:
    digest = sha256()
    for line in datasets.lines(rows):
        digest.update(line)
    return digest.hexdigest()


def base_of(read: Read) -> BaseModel:
    """By its fingerprint, or, where the receipt has none, by its address."""
    wanted = read.receipt.base_model
    with database.reading() as db:
        ready = base_models.ready(db)
    for one in ready:
        if one.fingerprint is None:
            one.fingerprint = fingerprints.of_base_model(files.base_model(one.id))
    known = [one for one in ready if one.fingerprint == wanted.fingerprint]
    if not wanted.fingerprint:
        known = [
            one for one in ready if (one.source, one.address) == (wanted.source, wanted.address)
        ]
    if known:
        return known[0]
    if any(one.address == wanted.address for one in ready):
        raise Invalid(
            f"The base model {wanted.name} of this studio has other files than the one that was trained: "
            "other losses would say nothing. Nothing was trained."
        )
    raise Invalid(
        f"The base model {wanted.name} is not in this studio. Add it ({wanted.source}: {wanted.address}) on "
        "the page Base models, and verify again. Nothing was trained."
    )


def run_of(read: Read, base: BaseModel) -> Run:
    """The run as the tables would have it; it is never stored."""
    receipt = read.receipt
    if receipt.experiment.task not in prompts.TASKS:
        raise Invalid(f"There is no task {receipt.experiment.task[:50]!r}.")
    setup = receipt.experiment.model_dump() | {
        "template": prompts.check_template(receipt.experiment.template)
    }
    experiment = Experiment(
        id="receipt",
        base_model=base,
        base_model_id=base.id,
        dataset_id="",
        split=read.split,
        **setup,
    )
    method = methods.get(receipt.run.method).key
    params = admission.checked_params(base, {method: receipt.run.params})[method]
    return Run(
        id="receipt",
        experiment=experiment,
        method=method,
        params=params,
        figures=receipt.figures.model_dump(),
    )


def steps(
    run: Run, rows: Sequence[Example], machine: hardware.Hardware, notes: Console
) -> list[Measured]:
    """The first steps again, by the loop that every run goes through."""
    experiment, method = run.experiment, methods.get(run.method)
    if max(map(max, filter(None, experiment.split.values()))) >= len(rows):
        raise Invalid("The split names rows that the dataset does not have. Nothing was trained.")
    # Looks at the validation loss change nothing, and take time.
    params = relief.params(run).model_copy(
        update={"validation_interval": pace.NO_LOOK, "devices": 1}
    )
    material = gather(run, rows)
    folder = files.base_model(experiment.base_model_id)
    notes.print("Loading the base model ...", highlight=False)
    seed = naming.settings(run)["seed"]
    model, soft_prefix = backbones.load_trainable(method, params, folder, seed, machine)
    state = train.begin(model, soft_prefix, material.train, params, machine)
    going = train.train(
        model,
        soft_prefix,
        material.train,
        material.validation,
        params,
        seed,
        machine,
        state,
        usual_rates=method.usual_rates,
    )
    measured: list[Measured] = []
    for item in going:
        if isinstance(item, Measured) and item.kind == "train":
            measured.append(item)
            notes.print(f"Step {item.step}: {item.loss}", highlight=False)
            if item.step == STEPS:
                break
    return measured
