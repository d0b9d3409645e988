"""Base models in memory: loading, sharing, saving what was tuned."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
from typing import Any

import peft
import torch
from torch import Tensor

from app import storage
from app.methods import Method
from app.storage import Path
from worker import checkpoints, products, thrift, trained
from worker.distributed import ALONE, Group, whole_values
from worker.hardware import Hardware


def inner(model: Any) -> Any:
    """The transformers model itself, adapters in it included; a prompt vector is left to us."""
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def compute(machine: Hardware) -> Any:
    """Context in which trained float32 values are multiplied in bf16, where the machine can."""
    if machine.computed is torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(machine.device, dtype=machine.computed)


def load_base(method: Method, params: Any, folder: Path, machine: Hardware) -> Any:
    """The base model as the method has it for prompting: nothing trainable, evaluation mode."""
    model = _loaded(method, params, folder, machine.device, machine.dtype)
    return model.eval()


def _loaded(method: Method, params: Any, folder: Path, device: str, dtype: str) -> Any:
    model = method.load(str(folder), params, device=device, dtype=dtype)
    if getattr(model, "is_quantized", False):
        # What was not quantized lies in the file as it is mapped, and would keep all of it in memory.
        for value in model.parameters():
            if value.is_floating_point():
                value.data = value.data.clone()
    return model


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
    model = _loaded(method, params, folder, device, dtype)
    model = method.adapt(model, params, seed)
    if machine.device == "cpu" and not group.spreads:
        (products if method.frozen_base else trained).install(model, machine)
    for module in model.modules():
        if machine.computed is not torch.float32 and hasattr(module, "cast_input_dtype_enabled"):
            # PEFT would widen every input to float32 just before autocast narrows it again.
            module.cast_input_dtype_enabled = False
    if machine.device == "cpu" and not (params.gradient_checkpointing or group.spreads):
        thrift.install(model, machine)
    if params.gradient_checkpointing:
        inner(model).activation_checkpointing_enable({"use_reentrant": False})
    group.spread(model, machine)
    return model, method.soft_prefix(model)


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


def num_virtual(soft_prefix: Tensor | None) -> int:
    """How many virtual tokens stand before a text."""
    return 0 if soft_prefix is None else len(soft_prefix)


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
