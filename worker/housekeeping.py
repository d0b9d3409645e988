"""What a generating worker's keeper does beside its work: empties the trash, sends notices."""

import threading
import time

from sqlalchemy.orm import Session

from app import notices, trash

SWEEP_SECONDS = 60.0


class Housekeeping:
    """Small things that any number of workers may do at the same time."""

    def __init__(self) -> None:
        self.swept = -SWEEP_SECONDS
        self.sending: threading.Thread | None = None

    def look(self, db: Session) -> None:
        """Do what is due; a thread of its own sends, since a webhook may be slow."""
        if time.monotonic() - self.swept > SWEEP_SECONDS:
            self.swept = time.monotonic()
            trash.sweep(db)
        if notices.due(db) and not (self.sending and self.sending.is_alive()):
            self.sending = threading.Thread(target=notices.send_due, daemon=True)
            self.sending.start()
