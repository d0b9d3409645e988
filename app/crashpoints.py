"""Places at which a process dies, or finds the disk full, if a test's setting names them."""

import errno
import os
import signal
from collections import Counter

from app import storage
from app.settings import settings

_passed: Counter[str] = Counter()


def crashpoint(name: str) -> None:
    """Nothing, unless the setting `crash` holds `name`, `name:times` or `name:times:full`.

    Then the process dies here as by `kill -9`, or this raises as a write does on a full disk, when
    it comes by for that time; once for a home folder, so that whoever goes on gets past it.
    """
    if name not in settings.crash:
        return
    for one in settings.crash.split(","):
        wanted, times, mode = (*one.split(":"), "", "")[:3]
        if wanted != name:
            continue
        _passed[name] += 1
        if _passed[name] < int(times or 1) or not _is_first(name):
            continue
        if mode == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), signal.SIGKILL)


def _is_first(name: str) -> bool:
    try:
        storage.crash_mark(name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
