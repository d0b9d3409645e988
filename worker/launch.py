"""A run on several devices of this machine: torchrun starts a process for each and minds them."""

import contextlib
import signal
import sys
import tempfile

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.utils.api import macros
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from app import claims, database, processes
from app.errors import LostClaim
from worker.keeper import SAVED

LOST = 76  # exit code of a process that only says that another one has ended
# They meet in a file, and talk over the loopback: nobody else can reach them.
SURROUNDINGS = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


def launch(run_id: str, attempt: int, devices: int) -> int:
    """Do the run in so many processes of worker.rank; the exit code.

    SIGTERM is passed on to them. If one dies, all end, and the run goes back to the queue.
    """
    processes.hand_on(SURROUNDINGS)
    with tempfile.TemporaryDirectory(prefix="studio-") as folder:
        try:
            elastic_launch(_config(run_id, devices, folder), sys.executable)(
                *("-m", "worker.rank", run_id, str(attempt)),
                *(f"{folder}/ranks", macros.local_rank, str(devices)),
            )
        except SignalException:
            return SAVED
        except ChildFailedError as error:
            reason = _reason(list(error.failures.values()))
            with contextlib.suppress(LostClaim):  # it has let go of the run itself
                database.lasting(lambda db: claims.put_back(db, run_id, attempt, reason))
            return 1
    return 0


def _config(run_id: str, devices: int, folder: str) -> LaunchConfig:
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=run_id,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{folder}/torchrun",
        rdzv_configs={"store_type": "file"},
        local_addr="localhost",
        max_restarts=0,  # from a checkpoint the queue starts it again
        logs_specs=DefaultLogsSpecs(log_dir=folder),
        virtual_local_rank=torch.cuda.is_available(),  # each sees its own GPU and no other
    )


def _reason(failures: list[ProcessFailure]) -> str:
    """Which process was the first to die, in words; those that followed it do not count."""
    told = {LOST, -signal.SIGTERM}
    first = next((one for one in failures if one.exitcode not in told), None)
    if first is None:
        return "The processes that share this run lost each other."
    how = processes.ended_by(first.exitcode)
    return f"Of the processes that share this run, number {first.local_rank + 1} {how}."
