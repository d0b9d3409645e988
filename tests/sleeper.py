"""A process for tests: says its id and waits, until it is told to end or its parent dies."""

import os
import signal
import sys
import time

from app import processes

if __name__ == "__main__":
    processes.die_with_parent(signal.Signals[sys.argv[1]])
    print(os.getpid(), flush=True)
    time.sleep(120)
