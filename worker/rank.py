"""One of the processes that share a run; worker.launch has torchrun start them."""

import logging
import signal
import sys

from app import database, methods, processes, runs
from worker import distributed, hardware
from worker.run import work


def main() -> None:
    """Join the others, then do the run with them."""
    processes.die_with_parent(signal.SIGKILL)
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s %(levelname)s [{sys.argv[4]}] %(message)s",
    )
    run_id, attempt, store = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    rank, size = int(sys.argv[4]), int(sys.argv[5])
    with database.reading() as db:
        method = methods.get(runs.get(db, run_id).method)
    machine = hardware.find(size)
    group = distributed.join(store, rank, size, machine, spreads=not method.frozen_base)
    sys.exit(work(run_id, attempt, group))


if __name__ == "__main__":
    main()
