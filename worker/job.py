"""A claimed run with all it needs, and how it tells what it does."""

from typing import Any, NamedTuple

import torch

from app import database, runs
from app.methods import Method, Params
from app.tables import Run
from worker.distributed import ALONE, Group
from worker.hardware import Hardware
from worker.material import Material
from worker.watch import Watch


class Job(NamedTuple):
    """A claimed run with all it needs."""

    run: Run
    method: Method
    params: Params
    material: Material
    machine: Hardware
    watch: Watch
    group: Group = ALONE  # of processes that share the run the first alone tells and stores

    def tell(self, message: str, level: str = "info") -> None:
        """Write a line into the run's history."""
        run = self.run
        if self.group.leads:
            database.lasting(lambda db: runs.tell(db, run.id, run.attempt, message, level))

    def store(self, **values: Any) -> None:
        """Store what is known of the run now."""
        run = self.run
        if self.group.leads:
            database.lasting(lambda db: runs.progress(db, run.id, run.attempt, **values))


def like_before(
    machine: Hardware, figures: dict[str, Any], devices: int = 1
) -> tuple[Hardware, str]:
    """This machine set to compute as a run was begun, by its figures; and what is different, if any.

    The number of threads, the length of rows, how many prompts are answered at a time and the
    precision are part of the result.
    """
    if "threads" not in figures:
        return machine, ""
    if (before := figures.get("devices", 1)) != devices:
        return machine, (
            f"The run goes on with {devices} processes instead of {before}: from here on figures "
            "may differ in their last digits."
        )
    torch.set_num_threads(figures["threads"])
    kind = figures.get("device_kind", machine.device)
    dtype = figures["precision"] if kind == machine.device else machine.dtype
    same = machine._replace(
        threads=figures["threads"],
        budget=figures["token_budget"],
        prompts=figures.get("prompts_at_once", 0),  # an earlier version did not store it
        dtype=dtype,
    )
    if kind == machine.device:
        same = same._replace(products=figures.get("products", ""))
    if figures["device"] == machine.name and figures["precision"] == machine.dtype:
        return same, ""
    return same, (
        f"The run was begun on {figures['device']} in {figures['precision']} and goes on on "
        f"{machine.name} in {dtype}: from here on figures may differ in their last digits."
    )
