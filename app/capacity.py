"""What fits into a worker: its memory and devices, and what the runs at work there take."""

from typing import Any, NamedTuple

from sqlalchemy import and_, case, func, true

from app.tables import Run

SHARE = 0.9  # of the memory, for several runs together: forecasts are a little wrong
PLAIN = "adamw"  # the optimizer that runs anywhere
_GPU = "GPU "  # how the name of a worker's device begins if it is one


def is_gpu(device: str) -> bool:
    """Whether a worker's or a run's device, by its name, is a GPU."""
    return device.startswith(_GPU)


def gpu_name(name: str) -> str:
    """The name of a GPU as a worker's device."""
    return _GPU + name


class Taken(NamedTuple):
    """What a run takes, by its forecast: MB (None: not known), seconds from now, devices.

    `gpu`: a processor will not do.
    """

    memory_mb: float | None
    seconds: float
    devices: int = 1
    gpu: bool = False


class Room(NamedTuple):
    """A worker's memory in MB (of each device) and what the runs at work there take of it.

    A run alone may have all of the memory; several together stay below a share of it. A run on
    several devices, or of unknown need, is always alone.
    """

    memory_mb: float
    gpu: bool = False
    devices: int = 1
    taken: tuple[Taken, ...] = ()

    @property
    def free_mb(self) -> float:
        """What one more run may take now."""
        if not self.taken:
            return self.memory_mb
        if any(one.memory_mb is None or one.devices > 1 for one in self.taken):
            return 0.0
        return SHARE * self.memory_mb - sum(one.memory_mb or 0 for one in self.taken)

    @property
    def free_devices(self) -> int:
        """How many devices one more run may have now."""
        return 1 if self.taken else self.devices

    def holds(self, run: Taken) -> bool:
        """Whether such a run fits in now."""
        if run.gpu and not self.gpu:
            return False
        wanted = self.memory_mb if run.memory_mb is None else run.memory_mb
        return wanted <= self.free_mb and run.devices <= self.free_devices

    def wait(self, run: Taken) -> float:
        """Seconds, by forecast, until so many have ended that such a run, which can, fits in."""
        left = sorted(self.taken, key=lambda one: one.seconds)
        seconds = 0.0
        while left and not self._replace(taken=tuple(left)).holds(run):
            seconds = left.pop(0).seconds
        return seconds

    def emptied(self) -> "Room":
        """The same worker with nothing at work."""
        return self._replace(taken=())


def devices(params: dict[str, Any]) -> int:
    """On how many devices a run with these parameters is computed."""
    return int(params.get("devices", 1))


def needs_gpu(params: dict[str, Any]) -> bool:
    """Whether a run with these parameters is computed on a GPU or not at all."""
    return bool(params.get("optimizer", PLAIN) != PLAIN)


def need(forecast: dict[str, Any], gpu: bool) -> float | None:
    """The memory in MB that a run of this forecast needs on such a device; None: not known.

    One that was started although it does not fit takes all there is, like one of unknown need.
    """
    return None if forecast.get("override") else forecast.get(_need_key(gpu))


def _need_key(gpu: bool) -> str:
    return "gpu_memory_mb" if gpu else "memory_mb"


def fits(room: Room) -> Any:
    """The same as `Room.holds`, as a condition for the database."""
    told = func.coalesce(Run.forecast[_need_key(room.gpu)].as_float(), room.memory_mb)
    wanted = case((Run.forecast["override"].as_boolean(), room.memory_mb), else_=told)
    wanted_devices = func.coalesce(Run.params["devices"].as_integer(), 1)
    optimizer = func.coalesce(Run.params["optimizer"].as_string(), PLAIN)
    able = true() if room.gpu else optimizer == PLAIN
    return and_(wanted <= room.free_mb, wanted_devices <= room.free_devices, able)
