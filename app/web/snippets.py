"""Code that a person can paste to load a tuned model without the studio, and a text around it."""

from app import files, methods, model_cards, prompts, storage, tuned_models
from app.errors import StudioError
from app.tables import Experiment, Run

_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = {base!r}
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
model = PeftModel.from_pretrained(model, {folder!r})
"""
_QUANTIZED = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

base = {base!r}
tokenizer = AutoTokenizer.from_pretrained(base)
# In 4 bits, as it was tuned: beside whole weights the adapter answers a little differently.
quantized = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type={quant_type!r},
    bnb_4bit_use_double_quant={double_quant!r},
    bnb_4bit_compute_dtype="bfloat16",
)
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", quantization_config=quantized)
model = PeftModel.from_pretrained(model, {folder!r})
"""
_WHOLE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({folder!r})
model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype="auto")
"""
_ANSWER = """
prompt = {prompt!r}
tokens = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
answer = model.generate(**tokens, max_new_tokens=128, do_sample=False)
print(tokenizer.decode(answer[0, tokens.input_ids.shape[1]:], skip_special_tokens=True))
"""


_READ_ME = """
## How to load it

{last}Unzip the archive beside this script; it needs {packages}.{base}

```python
{code}```

## How a prompt is put together

An input takes the place of `{{{{input}}}}` in the template above, and the labels that of `{{{{labels}}}}`.
What comes of it is put into the base model's chat format, if it has one. In the code `prompt` is the
exact text for the input "Your text".
"""
_LAST = "These files are the state after the last step, not the one that was measured.\n\n"
_OWN_BASE = """
The base model is the one that the studio made ready from {address}: write the folder with its files,
`{folder}` in the studio's home folder, where the code says `{path}`."""


def loading(run: Run, which: str, base: str = "") -> str:
    """Python that loads what the run left, `tuned`, `last` or `whole`, and answers one prompt.

    The prompt is the exact text, chat format included, that the model was trained with. `base`: where
    a base model is that the hub does not have; if empty, the studio's own copy.
    """
    experiment, method = run.experiment, methods.get(run.method)
    model = experiment.base_model
    # Only a model of the hub can be named; of another the studio's own copy is what was tuned on.
    own = base or str(storage.base_model_folder(model.id))
    adapter = _QUANTIZED if method.quantizes else _ADAPTER
    load = adapter if method.frozen_base and which != "whole" else _WHOLE
    loaded = load.format(
        base=model.address if model.source == "hub" else own,
        folder=f"./{tuned_models.folder_name(run, which)}",
        quant_type=run.params.get("quantization_type"),
        double_quant=run.params.get("double_quantization"),
    )
    return loaded + _ANSWER.format(prompt=_prompt(experiment))


def read_me(run: Run, which: str) -> str:
    """What a download says beside its model card: how to load it, and what a prompt must be like."""
    model, path = run.experiment.base_model, "path/to/the/base/model"
    with_base = methods.get(run.method).frozen_base and which != "whole"
    folder = "/".join(storage.base_model_folder(model.id).parts[-2:])
    own = _OWN_BASE.format(address=model_cards.plain(model.address), folder=folder, path=path)
    quantizes = with_base and methods.get(run.method).quantizes
    return _READ_ME.format(
        last=_LAST if which == "last" else "",
        packages=f"{'`bitsandbytes`, ' * quantizes}{'`peft` and ' * with_base}`transformers`",
        base=own if with_base and model.source != "hub" else "",
        code=loading(run, which, path),
    )


def _prompt(experiment: Experiment) -> str:
    try:
        formatter = prompts.formatter(files.tokenizer(experiment.base_model_id))
    except StudioError:  # its files are gone, or away; the template is still worth showing
        return prompts.fill(experiment.template, "Your text", experiment.labels)
    return formatter.prompt(experiment.template, "Your text", experiment.labels)
