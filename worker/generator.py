"""The keeper of answers: a process that answers prompts, and passing ones that prepare and merge."""

from collections.abc import Callable

from sqlalchemy.orm import Session

from app import base_models, completions, database, processes, tuned_models, workers
from worker.housekeeping import Housekeeping
from worker.keeper import Child, Keeper


class Generator(Keeper):
    """A resident process answers prompts; passing ones prepare base models and merge adapters."""

    kind = "generator"

    def __init__(self) -> None:
        super().__init__()
        self.answering: Child | None = None
        # Each with what to do, given the reason, if it dies before it could say so itself.
        self.passing: list[tuple[Child, Callable[[Session, str], None]]] = []
        self.house = Housekeeping()

    def look(self) -> None:
        """Keep the answering process alive and awake; start what else is wanted."""
        if self.answering is None or self.answering.poll() is not None:
            if self.answering is not None:
                with database.session() as db:
                    completions.fail_lost(db, self.worker.id)
            self.answering = self.child("worker.answer", self.worker.id)
        self.tell(self.answering, "look")
        self._reap()
        with database.session() as db:
            alive = [worker.id for worker in workers.alive(db)]
            completions.fail_orphans(db, alive)
            tuned_models.free_orphans(db, alive)
            base_models.free_orphans(db, alive)
            base_model = base_models.claim_waiting(db, self.worker.id)
            whole = tuned_models.claim_whole(db, self.worker.id)
        if base_model:
            self._pass("worker.prepare", base_model.id, base_models.fail)
        if whole:
            self._pass("worker.export", whole.id, tuned_models.fail_whole)
        self.house.look()

    def _pass(self, module: str, row: str, fail: Callable[[Session, str, str], None]) -> None:
        child = self.child(module, row)
        self.passing.append((child, lambda db, reason: fail(db, row, reason)))

    def _reap(self) -> None:
        for child, fail in [pair for pair in self.passing if pair[0].poll() is not None]:
            if child.returncode:
                with database.session() as db:
                    fail(db, f"The process that did this {processes.ended(child)}. Try again.")
            self.passing.remove((child, fail))

    def let_go(self) -> None:
        """Nothing here is worth saving: end it."""
        for child in [self.answering, *(pair[0] for pair in self.passing)]:
            if child:
                child.kill()
                child.wait()
