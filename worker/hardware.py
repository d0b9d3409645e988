"""The machine that a process computes on: its device, memory, threads, and how it multiplies fastest."""

from __future__ import annotations

import functools
import os
import time
from typing import NamedTuple

import torch

from app.capacity import gpu_name
from app.settings import settings

BFLOAT16, FLOAT32 = "bfloat16", "float32"
CLEARLY = 1.2  # times as fast as bf16 float32 must be, before products are made in it


class Hardware(NamedTuple):
    """What this process computes on; `dtype` is a torch name: bfloat16 where natively there.

    Frozen weights are held in `dtype`; in training products are made in `products`.
    """

    device: str
    dtype: str
    name: str
    memory_mb: float
    threads: int
    budget: int = 0  # tokens of a row that a run was begun with; 0: what suits this machine
    products: str = ""  # a torch name; empty: as `dtype`
    prompts: int = 0  # answered at a time, as a run has come to it; 0: what suits this machine

    @property
    def precision(self) -> torch.dtype:
        """The dtype that frozen weights are held in."""
        return torch.bfloat16 if self.dtype == BFLOAT16 else torch.float32

    @property
    def computed(self) -> torch.dtype:
        """The dtype that products are made in while training."""
        return torch.bfloat16 if (self.products or self.dtype) == BFLOAT16 else torch.float32

    @property
    def keeps_shapes(self) -> bool:
        """Whether rows of many lengths cost memory.

        oneDNN, which makes bf16 products on a processor, keeps half a MB of code for each shape.
        """
        return self.device == "cpu" and self.computed is torch.bfloat16

    @property
    def token_budget(self) -> int:
        """Most tokens of a packed row: enough to keep the machine busy, small enough to fit.

        A CPU gains nothing beyond about a thousand; a GPU takes eight for each MB it has, at most 16384.
        """
        if self.budget or self.device == "cpu":
            return self.budget or 1024
        return max(1024, min(16384, int(self.memory_mb / 8)))

    @property
    def prompts_at_once(self) -> int:
        """How many prompts are answered at a time."""
        return self.prompts or (16 if self.device == "cpu" else 64)


def num_devices() -> int:
    """How many processes may share a run: one for each GPU, or, for tests, for each core."""
    return torch.cuda.device_count() or os.cpu_count() or 1


def find(sharing: int = 1) -> Hardware:
    """What there is: the first CUDA device, else the processor with the threads of the settings.

    As many processes are `sharing` the processor, but each of them sees a CUDA device of its own.
    """
    if settings.threads or sharing > 1:
        torch.set_num_threads(max(1, (settings.threads or torch.get_num_threads()) // sharing))
    threads = torch.get_num_threads()
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        memory = about.total_memory / 2**20
        name = gpu_name(about.name)
        return Hardware("cuda", BFLOAT16 if native else FLOAT32, name, memory, threads)
    able = torch.cpu.get_capabilities()
    native = any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
    name = str(able.get("cpu_name") or "CPU")
    if not native:
        return Hardware("cpu", FLOAT32, name, memory, threads)
    products = FLOAT32 if _speed_up_of_float32() > CLEARLY else BFLOAT16
    return Hardware("cpu", BFLOAT16, name, memory, threads, products=products)


@functools.cache
def _speed_up_of_float32() -> float:
    """How many times as fast as bf16 products float32 ones are made on this processor.

    Some know bf16 and make half as many products a second in it: measured, at the best of a few tries.
    """
    best: dict[torch.dtype, float] = {}
    for _ in range(6):
        for dtype in (torch.bfloat16, torch.float32):
            left, right = torch.ones(256, 512, dtype=dtype), torch.ones(512, 1024, dtype=dtype)
            started = time.perf_counter()
            torch.mm(left, right)
            took = time.perf_counter() - started
            best[dtype] = min(took, best.get(dtype, took))
    return best[torch.bfloat16] / best[torch.float32]


def peak_memory_mb(machine: Hardware) -> float:
    """The most memory this process has taken so far: of the GPU where there is one, else RAM."""
    if machine.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024
