"""What a tuning process must hear while it works: cancel, pause, lost claim, told to stop."""

import signal
import time
from types import FrameType

from app import database, runs

LOOK_SECONDS = 0.1  # at most this often the database is asked


class Stopped(Exception):
    """Someone asked the run to stop: `why` is cancelling, pausing or ending."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class Watch:
    """Asks, cheaply and often, whether to go on."""

    def __init__(self, run_id: str, attempt: int) -> None:
        self.run_id = run_id
        self.attempt = attempt
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
