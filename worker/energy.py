"""The energy that the GPU has taken, where its driver tells it. A processor tells nothing."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from worker.hardware import Hardware

Meter = Callable[[], float | None]  # watt-hours since it was begun; None: not known
_LIBRARY = "libnvidia-ml.so.1"


def meter(machine: Hardware) -> Meter:
    """Begin to count. What other programs do on the same GPU is counted too."""
    begun = _joules(machine)

    def passed() -> float | None:
        now = _joules(machine)
        return None if begun is None or now is None else (now - begun) / 3600

    return passed


def _joules(machine: Hardware) -> float | None:
    """Since the driver was loaded, of the first device that this process sees."""
    if machine.device != "cuda":
        return None
    try:
        nvml = ctypes.CDLL(_LIBRARY)
        name = f"GPU-{torch.cuda.get_device_properties(0).uuid}".encode()
        device, total = ctypes.c_void_p(), ctypes.c_ulonglong()
        wrong = nvml.nvmlInit_v2()
        wrong = wrong or nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(device))
        wrong = wrong or nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(total))
    except (OSError, AttributeError):
        return None
    return None if wrong else total.value / 1000
