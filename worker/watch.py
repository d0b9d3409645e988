"""What a tuning process must hear while it works: cancel, pause, lost claim, told to stop."""

import signal
import time
from types import FrameType

from app import database, runs
from app.errors import LostClaim
from worker.distributed import ALONE, Group

LOOK_SECONDS = 0.1  # at most this often the database is asked


class Stopped(Exception):
    """Someone asked the run to stop: `why` is cancelling, pausing or ending."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class Watch:
    """Asks, cheaply and often, whether to go on; of processes that share a run the first one asks."""

    HEARD = ("", "ending", "cancelling", "pausing", "lost")

    def __init__(self, run_id: str, attempt: int, group: Group = ALONE) -> None:
        self.run_id = run_id
        self.attempt = attempt
        self.group = group
        self._looked = 0.0
        self._ending = False
        signal.signal(signal.SIGTERM, self._end)

    def _end(self, _number: int, _frame: FrameType | None) -> None:
        self._ending = True

    def check(self) -> None:
        """Raises Stopped if the run is to stop, LostClaim if another attempt has it."""
        if self._ending:
            raise Stopped("ending")
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        state = database.lasting(
            lambda db: runs.state(db, self.run_id, self.attempt), opened=database.reading
        )
        if state != "running":
            raise Stopped(state)

    def check_together(self) -> None:
        """What `check` raises in the first process, in all; each must call it at the same point."""
        heard = self._hear() if self.group.leads else ""
        heard = self.HEARD[self.group.told(self.HEARD.index(heard))]
        if heard == "lost":
            raise LostClaim("Another attempt holds this run.")
        if heard:
            raise Stopped(heard)

    def _hear(self) -> str:
        try:
            self.check()
        except Stopped as stop:
            return stop.why
        except LostClaim:
            return "lost"
        return ""
