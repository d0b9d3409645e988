"""Real runs of a studio of its own: forecast against measured, and how soon the first point comes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import select

from app import (
    base_models,
    database,
    datasets,
    experiments,
    migrate,
    runs,
    storage,
    supervisor,
    valkey,
)
from app.tables import Point, Run, Worker
from benchmarks import cases, report, sets
from worker import prepare

ROWS = 112  # of which 64 are trained on, 20 held out for the curve and 28 for the scores
STARTS = 3
SPARE_SECONDS = 30.0  # for the tuner's spare process to have imported everything
PATIENCE = 1800.0


PARTS = ("start", "forecasts")


def measure(
    parts: Sequence[str], model: Path, data: Path, say: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """Entries of these parts, from a studio on a home folder that is then removed."""
    with tempfile.TemporaryDirectory() as home:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("STUDIO_")
        }
        say(f"a studio of its own, for {' and '.join(parts)}")
        target = Path(home) / "found.json"
        # A process of its own: the settings, the home folder among them, are read once.
        subprocess.run(
            [sys.executable, "-m", "benchmarks.runs", str(model), str(data), str(target), *parts],
            env=environment | {"STUDIO_HOME": str(Path(home) / "home")},
            check=True,
        )
        return dict(json.loads(target.read_text()))


@contextmanager
def studio(model: Path) -> Iterator[str]:
    """Broker, tables, the base model and both workers; the base model's id."""
    with supervisor.only_one():
        valkey.start()
        migrate.up()
        with database.session() as db:
            base = base_models.add_default(db).id
            base_models.begin(db, base)
            folder = storage.base_model_folder(base)
            shutil.copytree(model, folder)
            base_models.finish(db, base, **prepare.check(folder))
        group = supervisor.Group(("tuner", "generator"), print)
        group.start()
        try:
            yield base
        finally:
            group.stop(lambda: False)


def _until(look: Callable[[], Any], every: float) -> Any:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(every)
    raise SystemExit("The studio did not get so far in time; its runs are not measured.")


def _is_warm() -> bool:
    """Whether the tuner's spare process has said what the machine has: all is imported then."""
    with database.reading() as db:
        described = select(Worker.id).where(Worker.kind == "tuner", Worker.memory_mb.is_not(None))
        busy = select(Run.id).where(Run.state.in_(["queued", "running", "cancelling"]))
        return db.scalar(described) is not None and db.scalar(busy) is None


def _create(name: str, base: str, data: Path, methods: dict[str, dict[str, Any]]) -> str:
    about = cases.SETS[name]
    rows = sets.drawn(about.reader, data / about.folder, ROWS)
    upload = storage.upload_file()
    upload.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with database.session() as db:
        dataset = datasets.add(db, name, f"{name}.jsonl", upload)
        return str(
            experiments.create(
                db,
                name=name,
                base_model_id=base,
                dataset_id=dataset.id,
                task="generation",
                template=about.template,
                labels=[],
                seed=1,
                methods=methods,
            ).id
        )


def _changes(method: str) -> dict[str, Any]:
    return {"num_epochs": 1, "batch_size": cases.BATCH, **cases.CHANGES[method]}


def first_point(base: str, data: Path) -> float:
    """Seconds from pressing start to the first point, on a worker that waits; then it is cancelled."""
    _until(_is_warm, 0.5)
    time.sleep(SPARE_SECONDS)
    began = time.monotonic()
    made = _create("banking77", base, data, {"lora": _changes("lora")})
    mine = select(Point.run_id).join(Run).where(Run.experiment_id == made)

    def seen() -> bool:
        with database.reading() as db:
            return db.scalar(mine.limit(1)) is not None

    _until(seen, 0.02)
    took = time.monotonic() - began
    with database.session() as db:
        for run in experiments.get(db, made).runs:
            runs.cancel(db, run.id)
    return took


def forecasts(name: str, base: str, data: Path) -> list[dict[str, Any]]:
    """Each method's forecast, made when its run was created, beside what the run took."""
    made = _create(name, base, data, {method: _changes(method) for method in cases.CHANGES})
    mine = select(Run).where(Run.experiment_id == made)

    def ended() -> list[Run]:
        with database.reading() as db:
            found = list(db.scalars(mine))
            return found if all(run.finished_at for run in found) else []

    return [_told(name, run) for run in _until(ended, 1.0) if run.state == "succeeded"]


def _told(name: str, run: Run) -> dict[str, Any]:
    """The one place that knows where a forecast and what it is about are kept."""
    assert run.finished_at is not None
    assert run.started_at is not None
    return {
        "data": name,
        "method": run.method,
        "memory_mb": run.figures["peak_memory_mb"],
        "forecast_memory_mb": run.forecast["memory_mb"],
        "seconds": run.finished_at - run.started_at,
        "forecast_seconds": run.forecast["seconds"],
        "from_runs": run.forecast.get("measured", False),
        **report.circumstances(),
    }


def main() -> None:
    """Measure in this process's own home folder: MODEL DATA RESULT PART..."""
    model, data, target = map(Path, sys.argv[1:4])
    found: dict[str, list[dict[str, Any]]] = {part: [] for part in sys.argv[4:]}
    with studio(model) as base:
        if "start" in found:
            took = [first_point(base, data) for _ in range(STARTS)]
            print(f"first points after {', '.join(f'{one:.1f}' for one in took)} s", flush=True)
            start = {"data": "banking77", "method": "lora", "seconds": took}
            found["start"] = [start | report.circumstances()]
        for name in cases.SETS if "forecasts" in found else ():
            found["forecasts"] += forecasts(name, base, data)
            print(f"runs on {name} have ended", flush=True)
    target.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
