"""What a generating worker's keeper does beside its work: empties the trash, sends notices."""

import logging
import threading
import time

from app import database, leftovers, notices, trash

SWEEP_SECONDS = 60.0

log = logging.getLogger(__name__)


class Housekeeping:
    """Any number of workers may do this at the same time.

    In a thread of its own: a webhook may be slow, and so may deleting what is large. One that ends
    in the middle of it leaves nothing undone for good.
    """

    def __init__(self) -> None:
        self.swept = -SWEEP_SECONDS
        self.thread: threading.Thread | None = None

    def look(self) -> None:
        """See to it that what is due is done."""
        if self.thread and self.thread.is_alive():
            return
        if time.monotonic() - self.swept > SWEEP_SECONDS or notices.due():
            self.thread = threading.Thread(target=self._work, daemon=True)
            self.thread.start()

    def _work(self) -> None:
        try:
            if time.monotonic() - self.swept > SWEEP_SECONDS:
                self.swept = time.monotonic()
                with database.session() as db:
                    trash.sweep(db)
                    leftovers.clear_cache(db)
            notices.send_due()
        except Exception:
            log.exception("Keeping house failed; it is tried again.")
