"""What a base model's files must be like before anything is loaded from them."""

import re
import subprocess
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from app import chat, processes
from app.chat import read_json
from app.errors import Invalid
from app.storage import Path

INDEX = "model.safetensors.index.json"
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,200}")
_KEPT = re.compile(
    r"(.+\.(json|jinja)|tokenizer\.model|spiece\.model|vocab\.txt|merges\.txt|.+\.tiktoken)"
)
_REFUSED = re.compile(r".+\.(bin|pt|pth|pkl|pickle|ckpt|h5|msgpack|npz|joblib|gguf|py|so|sh)", re.I)
_CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code")
_LARGEST = {  # beyond every model there is, and small enough to be built without weights
    "num_hidden_layers": 1_000,
    "n_layer": 1_000,
    "num_experts": 10_000,
    "num_local_experts": 10_000,
    "n_routed_experts": 10_000,
    "vocab_size": 10_000_000,
    "hidden_size": 1_000_000,
    "n_embd": 1_000_000,
}
_TYPES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}


def kept(names: list[str]) -> list[str]:
    """Which of a model's files the studio takes beside the weights."""
    return [name for name in names if PLAIN_NAME.fullmatch(name) and _KEPT.fullmatch(name)]


def refused(names: list[str]) -> list[str]:
    """Which files can hold code or other formats of weights; the studio opens none of them."""
    return [name for name in names if _REFUSED.fullmatch(name)]


def weights(names: list[str], folder: Path) -> list[str]:
    """The safetensors files that hold the model's weights, out of those there are.

    An index, if there is one, lies in the folder already. Raises Invalid.
    """
    if INDEX in names:
        shards = read_json(folder / INDEX).get("weight_map")
        files = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
        wrong = [name for name in files if not PLAIN_NAME.fullmatch(name) or name not in names]
        if wrong or not files:
            raise Invalid(f"{INDEX} names files that are not there: {_listed(wrong) or 'none'}.")
        return files
    if "model.safetensors" in names:
        return ["model.safetensors"]
    if "adapter_model.safetensors" in names:
        raise Invalid("This is an adapter, not a model. Add the base model that it was made for.")
    other = refused(names)
    raise Invalid(
        "There is no model.safetensors"
        + (f", only {_listed(other)}. Such files can hold code and are not opened" if other else "")
        + ". Choose a model in safetensors format, or convert it."
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def config(folder: Path) -> tuple[str, str | None]:
    """The architecture, and how the weights are quantized (None, or "bitsandbytes").

    Raises Invalid for what transformers cannot load as a causal language model by itself.
    """
    found = read_json(folder / "config.json")
    if not found:
        raise Invalid("There is no config.json, which says how the model is built.")
    _refuse_code(folder)
    _refuse_giants(found)
    kind, architectures = str(found.get("model_type", "")), found.get("architectures")
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    known = known if isinstance(known, tuple) else (known,)
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if name is None or name not in known:
        raise Invalid(
            f"The architecture {str(name or kind or 'none')[:100]} is no causal language model that "
            "transformers knows by itself. Choose a text-generating model, such as a Llama, Qwen, "
            "Mistral, Gemma, Granite or SmolLM."
        )
    return str(name), _quantization(found)


def _refuse_code(folder: Path) -> None:
    for path in sorted(folder.glob("*config*.json")):
        waiting: list[Any] = [read_json(path)]
        while waiting:
            part = waiting.pop()
            if isinstance(part, dict):
                if any(part.get(key) for key in _CODE_KEYS):
                    raise Invalid(
                        f"{path.name} asks for code of its own to be run (auto_map). The studio "
                        "runs no code from models: choose one that transformers knows by itself."
                    )
                waiting += part.values()
            elif isinstance(part, list):
                waiting += part


def _refuse_giants(found: dict[str, Any]) -> None:
    inner = found.get("text_config")
    for part in (found, inner if isinstance(inner, dict) else {}):
        for key, largest in _LARGEST.items():
            value = part.get(key, 1)
            if value is not None and (type(value) is not int or not 0 <= value <= largest):
                raise Invalid(f"config.json gives {key} as {str(value)[:40]}, which cannot be.")


def _quantization(found: dict[str, Any]) -> str | None:
    given = found.get("quantization_config")
    if not given:
        return None
    how: dict[str, Any] = given if isinstance(given, dict) else {}
    name = str(how.get("quant_method", "in an unknown way"))
    if name == "bitsandbytes" and how.get("load_in_4bit"):
        return "bitsandbytes"
    if name == "bitsandbytes":
        name = "bitsandbytes, 8 bits"
    raise Invalid(
        f"The model is already quantized ({name[:40]}), and the studio cannot tune that. Add the "
        "unquantized model: QLoRA quantizes it while loading."
    )


def bytes_of_weights(folder: Path, files: list[str]) -> int:
    """Bytes of one weight, by the type most of them have. Raises Invalid for broken files."""
    sizes: dict[str, int] = {}
    for name in files:
        try:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - it is no dict
                    part = file.get_slice(key)
                    count = 1
                    for size in part.get_shape():
                        count *= size
                    sizes[part.get_dtype()] = sizes.get(part.get_dtype(), 0) + count
        except (SafetensorError, OSError, ValueError) as error:
            raise Invalid(
                f"{name} is broken or was not copied whole ({str(error)[:150]}). Get it anew."
            ) from None
    if not sizes:
        raise Invalid("The files with the weights are empty.")
    return _TYPES.get(max(sizes, key=lambda name: sizes[name]), 4)


def chat_template(folder: Path) -> None:
    """Try the chat template in a process with little time and memory. Raises Invalid."""
    child = processes.start(
        "app.chat", str(folder), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        said, _ = child.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        said = ""
    if child.returncode:
        reason = said.strip() or (
            f"The chat template takes more than {chat.CPU_SECONDS} seconds or "
            f"{chat.MEMORY_BYTES >> 20} MB."
        )
        raise Invalid(f"{reason} The model was not added: it would do the same to every prompt.")


def loads(folder: Path) -> Any:
    """The model's configuration as transformers reads it. Raises Invalid."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a strange file leads to
        raise Invalid(f"transformers cannot read config.json: {str(error)[:200]}") from None
