"""Stands in for the workers' children, without torch: `python -m tests.pretender MODULE ARGS`.

What it does with a run, the run's parameter `pretend` says; a run's real child is worker.run.
"""

import json
import os
import signal
import sys
import time

from app import base_models, completions, database, processes, runs, storage, workers
from worker.keeper import SAVED


def tune(worker: str) -> int:
    """A run, told on standard input, ends as it was told to."""
    device = os.environ.get("PRETENDED_DEVICE", "CPU")
    with database.session() as db:
        workers.describe(db, worker, device, 8000.0)
    told = sys.stdin.readline()
    if not told:
        return 0
    wanted = json.loads(told)
    run_id, attempt = wanted["run"], wanted["attempt"]
    with database.session() as db:
        run = runs.get(db, run_id)
        pretend = run.params.get("pretend", "finish")
        figures = {**run.figures, "pid": os.getpid()}
        runs.progress(db, run_id, attempt, phase="training", figures=figures)
        if pretend == "finish" or (pretend == "die at first" and attempt > 1):
            _leave(run_id)
            runs.progress(db, run_id, attempt, num_steps=0)
            runs.finish(db, run_id, attempt)
            return 0
    if pretend == "die" or (pretend == "die at first" and attempt == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if pretend == "say nothing until asked":
        while _state(run_id, attempt) == "running":
            time.sleep(0.02)
        return 0
    if pretend == "save when told":
        told_to_end = [False]
        signal.signal(signal.SIGTERM, lambda *_: told_to_end.__setitem__(0, True))
        while not told_to_end[0]:
            time.sleep(0.02)
        with database.session() as db:
            runs.settle(db, run_id, attempt, "Saved.")
        return SAVED
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # "hang"
    time.sleep(120)
    return 0


def _leave(run_id: str) -> None:
    """What a run leaves, as little of it as can be: safetensors files without a tensor."""
    for folder in (storage.tuned_model_folder(run_id), storage.last_model_folder(run_id)):
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")


def _state(run_id: str, attempt: int) -> str:
    with database.reading() as db:
        return runs.state(db, run_id, attempt)


def answer(worker: str) -> int:
    """Answers each prompt with its input; dies of the input "die"."""
    for _line in sys.stdin:
        with database.session() as db:
            for one in completions.claim_ask(db, worker):
                if one.input == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                completions.write(db, one, text=one.input)
                completions.end(db, one)
    return 0


def prepare(base_model_id: str) -> int:
    """Makes a model ready, or dies of the address "die"."""
    with database.session() as db:
        if base_models.get(db, base_model_id).address == "die":
            return 4
        base_models.finish(db, base_model_id)
    return 0


if __name__ == "__main__":
    processes.die_with_parent(signal.SIGKILL)
    match sys.argv[1]:
        case "worker.run":
            sys.exit(tune(sys.argv[2]))
        case "worker.answer":
            sys.exit(answer(sys.argv[2]))
        case "worker.prepare":
            sys.exit(prepare(sys.argv[2]))
        case _:
            sys.exit(4)
