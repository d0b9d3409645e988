"""How figures and times are written on the screen: Jinja's filters."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from app import units

NOTHING = "–"  # noqa: RUF001 - an en dash, as tables have it where there is no figure

STATES = {
    "queued": "Queued",
    "running": "Running",
    "cancelling": "Cancelling",
    "pausing": "Pausing",
    "waiting": "Waiting for disk space",
    "succeeded": "Done",
    "failed": "Failed",
    "cancelled": "Cancelled",
    "paused": "Paused",
    "preparing": "Preparing",
    "ready": "Ready",
    "stopping": "Stopping",
    "stopped": "Stopped",
    "done": "Done",
}


def number(value: float | None, digits: int = 0) -> str:
    """1234567 -> 1,234,567."""
    return NOTHING if value is None else f"{value:,.{digits}f}"


def figure(value: float | None) -> str:
    """A loss or a rate with four significant digits, never as 1e-05 where 0.00001 is as short."""
    if value is None:
        return NOTHING
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.6f}".rstrip("0") or "0"


def percent(share: float | None, digits: int = 1) -> str:
    """0.1234 -> 12.3 %."""
    return NOTHING if share is None else f"{share * 100:.{digits}f} %"


def size(num_bytes: float | None) -> str:
    """Bytes in the largest unit that keeps a digit before the point; steps of 1000."""
    return NOTHING if num_bytes is None else units.size(num_bytes)


def memory(megabytes: float | None) -> str:
    """Megabytes as the workers measure them."""
    return NOTHING if megabytes is None else units.memory(megabytes)


def duration(seconds: float | None) -> str:
    """3 min 20 s; the two largest units that matter."""
    return NOTHING if seconds is None else units.duration(seconds)


def between(found: tuple[float, float] | None, words: Callable[[float], str]) -> str:
    """The least and the most, in the words of a filter; once where they read the same."""
    if found is None:
        return NOTHING
    low, high = words(found[0]), words(found[1])
    return low if low == high else f"{low} to {high}"


def span(low: float, high: float) -> str:
    """Two times in one unit: 2 to 3 min."""
    for unit, seconds in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if high >= 2 * seconds or unit == "s":
            first, last = int(low / seconds), int(high / seconds + 0.999)
            if not first and last > 1:
                return f"up to {last} {unit}"
            return f"{last} {unit}" if first >= last else f"{first} to {last} {unit}"
    raise AssertionError("seconds fit always")


def errors(low: float, high: float) -> str:
    """Shares with their signs: -3 to +9 %; once where they read the same."""
    first, last = (
        f"{round(share * 100):+d}" if round(share * 100) else "0" for share in (low, high)
    )
    return f"{first} %" if first == last else f"{first} to {last} %"


def ago(at: float | None) -> str:
    """How long ago, in one unit."""
    if at is None:
        return NOTHING
    seconds = max(0.0, time.time() - at)
    for limit, length, unit in ((90, 60, "min"), (36, 3600, "h"), (14, 86400, "days")):
        if seconds < 45:
            return "just now"
        if seconds < limit * length:
            return f"{max(1, round(seconds / length))} {unit} ago"
    return datetime.fromtimestamp(at, UTC).strftime("%-d %b %Y")


def clock(at: float) -> str:
    """14:05, or Tue 14:05 on another day: by the clock of this machine."""
    day = time.localtime(at)
    same = day[:3] == time.localtime()[:3]
    return time.strftime("%H:%M" if same else "%a %H:%M", day)


def zone() -> str:
    """The zone of this machine's clock, such as UTC."""
    return time.strftime("%Z")


def ahead(at: float) -> str:
    """How long until then, in one unit."""
    seconds = at - time.time()
    for length, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"in {round(seconds / length)} {unit}"
    return "in a minute" if seconds > 0 else "now"


def iso(at: float) -> str:
    """For the `datetime` of a <time>."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def short(text: str, length: int = 80) -> str:
    """The first characters of a long text, on one line."""
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length and len(text) <= 4 * length else line[:length] + "…"


def cut(text: str, length: int) -> str:
    """The beginning of a long text as it stands, line breaks and all."""
    return text if len(text) <= length else text[:length] + "…"


def state(key: str) -> str:
    """A state in the words of the screen."""
    return STATES.get(key, key)


FILTERS: dict[str, Callable[..., Any]] = {
    "number": number,
    "figure": figure,
    "percent": percent,
    "size": size,
    "memory": memory,
    "duration": duration,
    "durations": lambda found: between(found, duration),
    "memories": lambda found: between(found, memory),
    "sizes": lambda found: between(found, size),
    "ago": ago,
    "ahead": ahead,
    "iso": iso,
    "clock": clock,
    "short": short,
    "cut": cut,
    "state": state,
}
