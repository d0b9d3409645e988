"""Base models in memory: the machine they run on, loading, sharing, saving what was tuned."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import os
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor

from app import storage
from app.capacity import gpu_name
from app.methods import Method
from app.settings import settings
from app.storage import Path
from worker import checkpoints
from worker.distributed import ALONE, Group, whole_values


class Hardware(NamedTuple):
    """What this process computes on; `dtype` is a torch name: bfloat16 where natively fast."""

    device: str
    dtype: str
    name: str
    memory_mb: float
    threads: int
    budget: int = 0  # tokens of a row that a run was begun with; 0: what suits this machine

    @property
    def precision(self) -> torch.dtype:
        """The dtype that frozen weights are held and products computed in."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    @property
    def token_budget(self) -> int:
        """Most tokens of a packed row: enough to keep the machine busy, small enough to fit.

        A CPU gains nothing beyond about a thousand; a GPU takes eight for each MB it has, at most 16384.
        """
        if self.budget or self.device == "cpu":
            return self.budget or 1024
        return max(1024, min(16384, int(self.memory_mb / 8)))


def num_devices() -> int:
    """How many processes may share a run: one for each GPU, or, for tests, for each core."""
    return torch.cuda.device_count() or os.cpu_count() or 1


def hardware(sharing: int = 1) -> Hardware:
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
        return Hardware("cuda", "bfloat16" if native else "float32", name, memory, threads)
    able = torch.cpu.get_capabilities()
    native = any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
    name = str(able.get("cpu_name") or "CPU")
    return Hardware("cpu", "bfloat16" if native else "float32", name, memory, threads)


def peak_memory_mb(machine: Hardware) -> float:
    """The most memory this process has taken so far: of the GPU where there is one, else RAM."""
    if machine.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def inner(model: Any) -> Any:
    """The transformers model itself, adapters in it included; a prompt vector is left to us."""
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def compute(machine: Hardware) -> Any:
    """Context in which trained float32 values are multiplied in bf16, where the machine can."""
    if machine.precision is torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(machine.device, dtype=machine.precision)


def load_base(method: Method, params: Any, folder: Path, machine: Hardware) -> Any:
    """The base model as the method has it for prompting: nothing trainable, evaluation mode."""
    model = method.load(str(folder), params, device=machine.device, dtype=machine.dtype)
    return model.eval()


def load_trainable(
    method: Method,
    params: Any,
    folder: Path,
    seed: int,
    machine: Hardware,
    group: Group = ALONE,
) -> tuple[Any, Tensor | None]:
    """The model ready to be trained, and its prompt vector where the method has one.

    Weights that are trained themselves are in float32: bf16 has too few digits to keep the small
    updates. Frozen ones are in the machine's dtype, or quantized.
    """
    dtype = machine.dtype if method.frozen_base else "float32"
    device = "cpu" if group.spreads else machine.device  # a GPU may have room for a part only
    model = method.load(str(folder), params, device=device, dtype=dtype)
    model = method.adapt(model, params, seed)
    for module in model.modules():
        if machine.precision is not torch.float32 and hasattr(module, "cast_input_dtype_enabled"):
            # PEFT would widen every input to float32 just before autocast narrows it again.
            module.cast_input_dtype_enabled = False
        for name, dropout in getattr(module, "lora_dropout", {}).items():
            if machine.device == "cpu" and isinstance(dropout, torch.nn.Dropout):
                module.lora_dropout[name] = _Dropout(dropout.p)
    if params.gradient_checkpointing:
        inner(model).activation_checkpointing_enable({"use_reentrant": False})
    group.spread(model, machine)
    return model, method.soft_prefix(model)


class _Dropout(torch.nn.Module):
    """Dropout for a CPU, where drawing a number for each value took a third of LoRA's forward pass.

    One draw of 64 bits decides on four values; the share is rounded to a 65536th.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.dropped = round(share * 2**16)

    def forward(self, values: Tensor) -> Tensor:
        """Some values zero, the others larger by as much; all as they are outside of training."""
        if not self.training:
            return values
        draws = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = draws.view(torch.int16)[: values.numel()].view(values.shape)
        kept = (bits >= self.dropped - 2**15).to(values.dtype)
        return values * kept.mul_(2**16 / (2**16 - self.dropped))


def share(model: Any) -> Any:
    """Another module tree over the very same weights, so that it can take other adapters."""
    kept: dict[int, Any] = {id(part): part for part in model.parameters()}
    kept |= {id(part): part for part in model.buffers()}
    for module in model.modules():
        state = getattr(module, "quant_state", None)  # the scales of weights held in 4 bits
        if state is not None:
            kept[id(state)] = state
    return copy.deepcopy(model, kept)


def accepts(model: Any, name: str) -> bool:
    """Whether the model's forward has that argument."""
    return name in inspect.signature(type(model).forward).parameters


def embed(backbone: Any, soft_prefix: Tensor, ids: Tensor) -> Tensor:
    """The prompt vector and then the embedded tokens, (rows, virtual + tokens, width)."""
    words: Tensor = backbone.get_input_embeddings()(ids)
    return torch.cat((soft_prefix.to(words.dtype).expand(len(words), -1, -1), words), dim=1)


TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
    "added_tokens.json",
)


def save_tuned(
    model: Any, folder: Path, *, base_name: str, base_folder: Path, machine: Hardware
) -> None:
    """Write what was tuned into `folder`, whole or not at all; what stood there is replaced.

    Adapters and prompt vectors in PEFT's format and float32, naming the base by its public name.
    A whole model as safetensors in the machine's dtype, the one it is then loaded and scored in,
    with the base's tokenizer.
    """
    new = folder.with_name(f".{folder.name}.new")
    storage.remove(new)
    new.mkdir(parents=True)
    if isinstance(model, peft.PeftModel):
        _save_adapter(model, new, base_name)
    else:
        _save_whole(model, new, machine)
    for pattern in TOKENIZER:
        for path in base_folder.glob(pattern):
            (new / path.name).write_bytes(path.read_bytes())
    checkpoints.settle(new, folder)


def _save_adapter(model: peft.PeftModel, folder: Path, base_name: str) -> None:
    config = model.peft_config["default"]
    config.base_model_name_or_path = base_name
    if getattr(config, "tokenizer_name_or_path", None):
        config.tokenizer_name_or_path = base_name
    if isinstance(getattr(config, "target_modules", None), set):
        config.target_modules = sorted(config.target_modules)  # a set has another order each time
    # "auto" would ask the model hub whether the vocabulary has changed; it has not.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def _save_whole(model: Any, folder: Path, machine: Hardware) -> None:
    model.save_pretrained(folder, state_dict=whole_values(model, machine.precision))
    config = folder / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"dtype": machine.dtype}, indent=2)
    )


def load_tuned(
    method: Method,
    params: Any,
    base_folder: Path,
    tuned_folder: Path,
    machine: Hardware,
    *,
    base: Any = None,
) -> tuple[Any, Tensor | None]:
    """The tuned model ready to be prompted, and its prompt vector where the method has one.

    `base`: a model from `load_base`, or `share` of one, that the adapter is put on; without it the
    base is loaded. Of no use to methods that leave a whole model.
    """
    if not method.frozen_base:
        return load_base(method, params, tuned_folder, machine), None
    model = base if base is not None else load_base(method, params, base_folder, machine)
    tuned = peft.PeftModel.from_pretrained(model, str(tuned_folder), local_files_only=True)
    return tuned.eval(), method.soft_prefix(tuned)
