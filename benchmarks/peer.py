"""The peer's side of a comparison: TRL's SFTTrainer with PEFT, as their users run them.

Everything is the peer's own default but for what must be equal on both sides: tokens, their order,
batch, starting values, optimizer and schedule.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import transformers

from app import methods, pace
from benchmarks import measures
from benchmarks.cases import Job
from worker import hardware, products

NAMES = ("trl", "peft", "transformers", "torch")


def installed() -> bool:
    """Whether the peer is there; it is an extra of the project."""
    return all(importlib.util.find_spec(name) for name in ("trl", "datasets"))


def versions() -> str:
    """The peer in words, with its versions."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in NAMES)


def dataset(job: Job) -> list[dict[str, list[int]]]:
    """The examples as the peer takes them, in the order in which the studio takes them."""
    return [
        {
            "input_ids": [*row.prompt_ids, *row.answer_ids],
            "completion_mask": [0] * len(row.prompt_ids) + [1] * len(row.answer_ids),
        }
        for row in job.ordered()
    ]


def schedule(job: Job) -> Callable[[int], float]:
    """The studio's learning rate as a factor, for a scheduler that counts steps from 0."""
    params = job.settings
    total = pace.steps_per_epoch(len(job.train), params)
    return lambda step: pace.rate(step + 1, total, params) / params.learning_rate


def _config(job: Job, folder: str) -> Any:
    from trl import SFTConfig

    params = job.settings
    return SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=params.batch_size,
        gradient_accumulation_steps=params.accumulate_steps,
        num_train_epochs=1,
        max_grad_norm=params.max_grad_norm,
        gradient_checkpointing=job.checkpointing,
        completion_only_loss=True,
        train_sampling_strategy="sequential",
        bf16=True,
        use_cpu=True,
        seed=job.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


class _Told(transformers.TrainerCallback):  # type: ignore[misc]
    """Hears of each step's end and of its loss."""

    def __init__(self, clock: measures.Clock) -> None:
        self.clock = clock

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.step()

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: Any, **__: Any) -> None:
        if "loss" in logs:
            self.clock.losses.append(float(logs["loss"]))


def _trainer(job: Job, model: Any, folder: str, clock: measures.Clock) -> Any:
    import datasets
    from trl import SFTTrainer

    params = job.settings
    values = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(
        values, lr=params.learning_rate, weight_decay=params.weight_decay, fused=True
    )
    return SFTTrainer(
        model,
        _config(job, folder),
        train_dataset=datasets.Dataset.from_list(dataset(job)),
        processing_class=transformers.AutoTokenizer.from_pretrained(
            job.model, local_files_only=True, trust_remote_code=False
        ),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(job))),
        callbacks=[_Told(clock)],
    )


def measure(job: Job) -> dict[str, Any]:
    """Train as the peer's users do, and tell what it took."""
    method, params = methods.get(job.method), job.settings
    machine = hardware.find()
    # A model that is trained whole is held in float32, and multiplied in bf16, as the peer does too.
    dtype = machine.dtype if method.frozen_base else "float32"
    model = method.load(job.model, params, device=machine.device, dtype=dtype)
    # The same seed draws the same starting values as in the studio.
    model = method.adapt(model, params, job.seed)
    start = measures.start_of(value for value in model.parameters() if value.requires_grad)
    loaded = measures.forget_peak()
    clock = measures.Clock()
    with tempfile.TemporaryDirectory() as folder:
        _trainer(job, model, folder, clock).train()
    found = clock.found(job) | {"loaded_mb": loaded, "start": start}
    if job.held_out:
        if method.frozen_base:  # evaluated as the studio evaluates its own
            products.install(model, machine)
        vectors = method.soft_prefix(model)
        found["held_out"] = measures.held_out(model, vectors, job.held_out, machine)
    return found


if __name__ == "__main__":
    measures.main(measure)
