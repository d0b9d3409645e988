"""A small random model and tokenizer, made in a second, for tests that need no real one."""

import json
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WIDTH = 64
# Small and fast, and rates that teach so small a model something in a few steps.
QUICK: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"learning_rate": 0.3, "num_virtual_tokens": 6},
    "lora": {"learning_rate": 0.02, "rank": 4},
    "qlora": {"learning_rate": 0.02, "rank": 4},
    "full": {"learning_rate": 0.005},
}


def tokenizer(folder: Path, *, chat: bool = True) -> int:
    """Write a byte-level tokenizer into the folder; its number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",  # as SmolLM2 has it: one token for end and padding
        "unk_token": "<|endoftext|>",
    }
    if chat:
        config["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocabulary)


def model(folder: Path, *, architecture: str = "llama", chat: bool = True, **changes: Any) -> Path:
    """Write a two-layer model of that architecture with its tokenizer into the folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    size = tokenizer(folder, chat=chat)
    shape: dict[str, Any] = {
        "vocab_size": size,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    config = AutoConfig.for_model(architecture, **shape | changes)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config)
    made.save_pretrained(folder)
    return folder
