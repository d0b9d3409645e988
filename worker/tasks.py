"""What Celery calls when the bell rings, and the worker's process around it."""

import argparse
import logging
import signal
import sys
from typing import Any

from app import processes, queue
from worker.generator import Generator
from worker.keeper import Keeper
from worker.tuner import Tuner

KEEPERS: dict[str, type[Keeper]] = {"tuner": Tuner, "generator": Generator}
_keeper: Keeper | None = None


def _look() -> None:
    if _keeper:
        _keeper.wake()


celery = queue.celery()
tune = celery.task(name="tune")(_look)
complete = celery.task(name="complete")(_look)


def main() -> None:
    """Run one worker of the kind given until it is told to stop."""
    global _keeper
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("kind", choices=KEEPERS)
    kind = parser.parse_args().kind
    processes.die_with_parent(signal.SIGTERM)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    _keeper = KEEPERS[kind]()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # until Celery puts its own there
    try:
        _keeper.start()
        _consume(queue.TASKS[kind])
    finally:
        _keeper.stop()


def _consume(name: str) -> None:
    # The solo pool: a task only rings the keeper's bell, so the consumer is never busy.
    options: dict[str, Any] = {"pool": "solo", "concurrency": 1, "queues": [name]}
    consumer = celery.Worker(
        hostname=f"{name}@%h-{_keeper.worker.pid if _keeper else 0}",
        loglevel="WARNING",
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
        **options,
    )
    consumer.start()
    sys.exit(consumer.exitcode or 0)


if __name__ == "__main__":
    main()
