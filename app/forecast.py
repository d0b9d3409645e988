"""What a run will take, told before it starts: memory, time and disk by arithmetic, corrected by what was measured."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import arithmetic, calibration, draws, lengths, methods, pace, rehearsals
from app.arithmetic import Machine, Memory
from app.calibration import Calibration, Ratio, Reckoned
from app.capacity import is_gpu
from app.draws import Row, Work
from app.lengths import Lengths
from app.methods import Method
from app.tables import BaseModel, Dataset, Experiment, Rehearsal, Run, Worker

UNSCORED = {"failed", "cancelled"}  # runs that may have left the base model unmeasured


class Given(NamedTuple):
    """What a forecast is about, less the method: an experiment, or one that is still being entered.

    `sizes`: how many examples there are for training, validation and test. `measures_base`: whether the
    run answers with the base model, too, as the first of an experiment does.
    """

    base_model: BaseModel
    dataset: Dataset
    template: str
    labels: tuple[str, ...]
    sizes: tuple[int, int, int]
    measures_base: bool = False

    def key(self, method: str, params: dict[str, Any]) -> str:
        """Under which a rehearsal of it is stored."""
        return rehearsals.key(**self.row(method, params))

    def row(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """A rehearsal's columns."""
        return {
            "base_model_id": self.base_model.id,
            "dataset_id": self.dataset.id,
            "template": self.template,
            "labels": list(self.labels),
            "method": method,
            "params": params,
        }


def given(
    experiment: Experiment, base_model: BaseModel | None = None, dataset: Dataset | None = None
) -> Given:
    """What an experiment's runs share; of one not stored yet the base model and dataset are named."""
    sizes = tuple(len(experiment.split[part]) for part in ("train", "validation", "test"))
    return Given(
        base_model or experiment.base_model,
        dataset or experiment.dataset,
        experiment.template,
        tuple(experiment.labels),
        (sizes[0], sizes[1], sizes[2]),
        measures_base=all(run.state in UNSCORED for run in experiment.runs),
    )


def each(
    db: Session, asked: Given, wanted: Sequence[tuple[str, dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Of runs that start together: one alone measures the base model."""
    later = asked._replace(measures_base=False)
    return [of(db, later if place else asked, *one) for place, one in enumerate(wanted)]


def make(
    db: Session, experiment: Experiment, method: str, params: dict[str, Any]
) -> dict[str, Any]:
    """What `Run.forecast` holds, as the run was created; see `of`."""
    return of(db, given(experiment), method, params)


def of(db: Session, asked: Given, method: str, params: dict[str, Any]) -> dict[str, Any]:
    """memory_mb and gpu_memory_mb with their parts, seconds with its range, bytes, and from what.

    Empty where the base model's shapes are not known. `reckoned` is what arithmetic says before
    any correction: later forecasts are corrected by what was measured over that.
    """
    if "linear" not in asked.base_model.shapes:
        return {}
    kind = methods.get(method)
    checked = kind.schema.model_validate(params)
    long = lengths.of(asked.base_model, asked.dataset, asked.template, asked.labels)
    machines, usual = _machines(db)
    rehearsed = rehearsals.find(db, asked.key(method, checked.model_dump()))
    told = {
        name: _on(db, asked, kind, checked, long, machine, rehearsed)
        for name, machine in machines.items()
    }
    cpu, gpu, here = told[calibration.CPU], told[calibration.GPU], told[usual]
    return {
        "memory_mb": round(cpu.memory.total),
        "gpu_memory_mb": round(gpu.memory.total),
        "parts": {name: round(value, 1) for name, value in cpu.memory._asdict().items()},
        "gpu_parts": {name: round(value, 1) for name, value in gpu.memory._asdict().items()},
        **here.times(),
        "measured": here.known.train.source in {"runs", "run", "rehearsal"},
        "bytes": arithmetic.disk_bytes(asked.base_model, kind, checked),
        "size_bytes": arithmetic.saved_bytes(asked.base_model, kind, checked),
        "device_kind": usual,
        "memory_from": {name: one.known.memory.source for name, one in told.items()},
        "time_from": here.known.train.source,
        "runs": here.known.runs,
        "memory_error": calibration.as_dict(here.known.memory_error),
        "time_error": calibration.as_dict(here.known.time_error),
        "reckoned": {name: one.reckoned._asdict() for name, one in told.items()},
    }


class _Told(NamedTuple):
    """A forecast for one kind of device."""

    memory: Memory
    reckoned: Reckoned
    known: Calibration

    def times(self) -> dict[str, float]:
        """From the claim to the end: the likeliest and a range; and of training alone."""
        train, other, was = self.known.train, self.known.other, self.reckoned
        rest = was.other + was.base
        return {
            "seconds": round(train.middle * was.train + other.middle * rest),
            "seconds_low": round(train.low * was.train + other.low * rest),
            "seconds_high": round(train.high * was.train + other.high * rest),
            "train_seconds": round(train.middle * was.train, 1),
        }


def _on(
    db: Session,
    asked: Given,
    method: Method,
    params: Any,
    long: Lengths,
    machine: Machine,
    rehearsed: Rehearsal | None,
) -> _Told:
    base_model = asked.base_model
    steps, work = draws.drawn(method, params, long, asked.sizes[0], machine.token_budget)
    memory = arithmetic.memory(base_model, method, params, steps, machine)
    held_out, looks = asked.sizes[1:], len(pace.looks(work.updates, params))
    reckoned = Reckoned(
        *_split(memory),
        arithmetic.BEGIN_SECONDS
        + arithmetic.train_seconds(base_model, method, params, work, machine),
        arithmetic.other_seconds(base_model, method, params, long, held_out, looks, machine),
        arithmetic.base_seconds(base_model, long, held_out, machine)
        if asked.measures_base
        else 0.0,
    )
    kind = calibration.GPU if machine.gpu else calibration.CPU
    known = calibration.of(db, base_model.id, method.key, kind)
    if rehearsed and rehearsed.figures.get("device_kind") == kind:
        known = _by_rehearsal(known, base_model, method, params, rehearsed.figures)
    return _Told(corrected(memory, known.memory), reckoned, known)


def _split(memory: Memory) -> tuple[float, float]:
    """What is known of it exactly, and what is guessed."""
    guessed = memory.program + memory.activations
    return memory.total - guessed, guessed


def corrected(memory: Memory, ratio: Ratio) -> Memory:
    """With what is guessed times the ratio; the program's part is kept where that can be."""
    _, guessed = _split(memory)
    total = guessed * ratio.middle
    program = min(memory.program, total)
    return memory._replace(program=program, activations=total - program)


def _by_rehearsal(
    known: Calibration, base_model: BaseModel, method: Method, params: Any, figures: dict[str, Any]
) -> Calibration:
    """With the ratios of two steps on the longest batch: its own rows are reckoned the same way."""
    machine = Machine(
        figures["device_kind"] == calibration.GPU,
        4 if figures["precision"] == "float32" else 2,
        figures["token_budget"],
    )
    alone = params.model_copy(update={"devices": 1})
    virtual = method.virtual_tokens(params)
    pairs = [(prompt, answer) for prompt, answer in figures["examples"]]
    rows = draws.packed(pairs, figures["shared"], virtual, machine.token_budget)
    kept, guessed = _split(arithmetic.memory(base_model, method, alone, [rows], machine))
    seconds = arithmetic.train_seconds(base_model, method, alone, _work(rows), machine)
    memory, train = calibration.rehearsal(
        (figures["peak_memory_mb"] - kept) / guessed, figures["step_seconds"] / seconds
    )
    other = train if known.other.source in ("shapes", "others") else known.other
    return known._replace(memory=memory, train=train, other=other)


def _work(rows: list[Row]) -> Work:
    places, targets = sum(row.places for row in rows), sum(row.targets for row in rows)
    return Work(places, targets, 1)


def _machines(db: Session) -> tuple[dict[str, Machine], str]:
    """A CPU and a GPU as this studio's are, as far as is known, and which is the usual one."""
    about = select(Worker.device, Worker.memory_mb).where(
        Worker.kind == "tuner", Worker.memory_mb.is_not(None)
    )
    found = db.execute(about.order_by(Worker.beat_at.desc())).all()
    cards = [memory_mb or 0.0 for device, memory_mb in found if is_gpu(device)]
    begun = select(Run.figures).where(Run.started_at.is_not(None))
    latest = db.scalar(begun.order_by(Run.started_at.desc()).limit(1)) or {}
    width = 4 if latest.get("precision") == "float32" else 2
    budget = max(1024, min(16384, int(max(cards, default=24_000) / 8)))
    machines = {
        calibration.CPU: Machine(False, width),
        calibration.GPU: Machine(True, 2, budget),
    }
    return machines, calibration.GPU if cards else calibration.CPU
