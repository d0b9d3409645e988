"""A claimed run with all it needs, and how it tells what it does."""

from typing import Any, NamedTuple

from app import database, runs
from app.methods import Method, Params
from app.tables import Run
from worker.backbones import Hardware
from worker.distributed import ALONE, Group
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
        if not self.group.leads:
            return
        with database.session() as db:
            runs.tell(db, self.run.id, self.run.attempt, message, level)

    def store(self, **values: Any) -> None:
        """Store what is known of the run now."""
        if not self.group.leads:
            return
        with database.session() as db:
            runs.progress(db, self.run.id, self.run.attempt, **values)
