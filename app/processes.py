"""Starting processes of our own that never outlive the one that started them."""

import ctypes
import ctypes.util
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from typing import IO, Any

_PR_SET_PDEATHSIG = 1
_PARENT = "STUDIO_PARENT_PID"
_MALLOC = "oversize_threshold:0,muzzy_decay_ms:0,narenas:1"  # of jemalloc
_COUNTS = "/proc/vmstat"  # what the kernel counts
_TRAINING = {
    # Threads that wait for each other must sleep, not spin: beside other programs on the same cores
    # spinning makes training several times slower.
    "OMP_WAIT_POLICY": "passive",
    # Half a MB for each shape of a bf16 product that oneDNN keeps, where by default it keeps 1024.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
}


def start(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None, **options: Any
) -> "subprocess.Popen[str]":
    """A fresh interpreter that runs the module, in a process group of its own, with the variables
    of this one and those of `environment`.

    Start it from a thread that lives on: the kernel's parent-death signal fires when the thread
    that started the child ends.
    """
    values = {**_TRAINING, **_preloaded(), **os.environ, **(environment or {})}
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=values | {_PARENT: str(os.getpid())},
        start_new_session=True,
        text=True,
        **options,
    )


@cache
def _preloaded() -> dict[str, str]:
    """jemalloc for what is started, where the machine has it.

    Between a model's tensors, which come and go in all lengths, the C library's own allocator leaves
    holes: training takes a third more memory with it, and is slower. One arena: with more of them, what
    one thread has freed is of no use to another.
    """
    found = ctypes.util.find_library("jemalloc")
    if not found or not sys.platform.startswith("linux"):
        return {}
    return {"LD_PRELOAD": found, "MALLOC_CONF": f"{_MALLOC},dirty_decay_ms:30000"}


def brief() -> dict[str, str]:
    """The environment of a process that ends with its work: it gives no memory back before.

    What a step has freed the next one needs again; in between it would be cleared by the kernel, page by
    page.
    """
    return {"MALLOC_CONF": f"{_MALLOC},dirty_decay_ms:-1"} if _preloaded() else {}


def hand_on(values: Mapping[str, str]) -> None:
    """Have what others start in this process, such as torchrun, know it as parent, and these values."""
    os.environ.update({**values, _PARENT: str(os.getpid())})


def die_with_parent(number: signal.Signals) -> None:
    """In a process made by `start` or after `hand_on`: have the kernel send this signal when the parent dies."""
    parent = os.environ.pop(_PARENT, None)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != int(parent):  # it died before the line above
        os.kill(os.getpid(), number)


def log_to(file: IO[Any]) -> None:
    """Send this process's own output, native libraries' too, to the file."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)


def ended(process: "subprocess.Popen[str]") -> str:
    """How a process that has ended did so, in words."""
    code = process.poll()
    return "is running" if code is None else ended_by(code)


def ended_by(code: int) -> str:
    """What an exit code, or a signal as a negative number, says of a process, in words."""
    if code < 0:
        name = signal.Signals(-code).name
        killed = " (often: the machine ran out of memory)" if name == "SIGKILL" else ""
        return f"was ended by signal {name}{killed}"
    return f"ended with exit code {code}"


def memory_kills() -> int:
    """How many processes the kernel has killed since the machine started, for want of memory."""
    with open(_COUNTS) as lines:
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
