"""Turns SmolLM2's GGUF file into what transformers trains and loads fast."""

import json

import torch
from tokenizers import decoders, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from app import storage
from app.storage import Path


def smollm2(folder: Path, name: str) -> None:
    """Replace the GGUF file in the folder by safetensors (bf16) and a tokenizer."""
    # Without `dequantize` the weights can stay packed, and then neither train nor save.
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        trust_remote_code=False,
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
    backend = tokenizer.backend_tokenizer
    # GGUF only names how text is cut before merging ("smollm"), and transformers then takes GPT-2's
    # way: runs of spaces before digits would come out otherwise than the model learned them.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    named = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    described = named | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "chat_template": tokenizer.chat_template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2))
    storage.remove(folder / name)
