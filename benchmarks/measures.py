"""What both sides of a comparison measure in the same way: memory, losses, starting values."""

from __future__ import annotations

import gc
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from app import processes
from benchmarks import cases
from benchmarks.cases import UNCOUNTED, Job
from worker import evaluate
from worker.hardware import Hardware
from worker.packing import Example


def status_mb(field: str) -> float:
    """A figure of this process's memory: VmRSS, what it holds now, or VmHWM, the most it held."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


def forget_peak() -> float:
    """Begin the high-water mark anew, after the model is loaded; what is held now, in MB."""
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return status_mb("VmRSS")


def start_of(trained: Iterable[Tensor]) -> float:
    """A figure that tells starting values apart: the sum of all magnitudes."""
    return sum(float(value.detach().double().abs().sum()) for value in trained)


def held_out(
    model: Any, soft_prefix: Tensor | None, examples: Sequence[Example], machine: Hardware
) -> float:
    """The loss per target token on examples that were not trained on, as the studio measures it."""
    found = [
        loss
        for some in evaluate.losses(model, soft_prefix, examples, machine, plain=False)
        for loss in some
    ]
    return evaluate.mean(found)


class Clock:
    """Seconds of each step, by the clock and of all cores' work, and its loss."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.worked: list[float] = []
        self.losses: list[float] = []
        self.begin()

    def begin(self) -> None:
        """From here the next step counts."""
        self.last = time.perf_counter(), time.process_time()

    def step(self, loss: float | None = None) -> None:
        """A step has ended."""
        before = self.last
        self.begin()
        self.seconds.append(self.last[0] - before[0])
        self.worked.append(self.last[1] - before[1])
        if loss is not None:
            self.losses.append(loss)

    def found(self, job: Job) -> dict[str, Any]:
        """What is told of a training that has just ended; rates leave its first steps out."""
        return {
            "seconds": self.seconds,
            "losses": self.losses,
            "examples_per_second": rate(job, self.seconds),
            # Of a busy machine this is the steadier figure: what others take does not count.
            "examples_per_core_second": rate(job, self.worked),
            "peak_mb": status_mb("VmHWM"),
        }


def rate(job: Job, seconds: Sequence[float]) -> float:
    """Examples per second, the first steps left out."""
    size: int = job.params["batch_size"] * job.params["accumulate_steps"]
    counted = len(job.train) - UNCOUNTED * size
    return counted / sum(seconds[UNCOUNTED:])


def main(measure: Callable[[Job], dict[str, Any]]) -> None:
    """A measuring process: reads its job from the first file named, writes what it found into the second."""
    processes.die_with_parent(signal.SIGKILL)
    source, target = map(Path, sys.argv[1:])
    target.write_text(json.dumps(measure(cases.read(source))))
