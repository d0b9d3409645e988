"""Code that a person can paste to load a tuned model without the studio."""

from app import files, methods, prompts, storage
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


def loading(run: Run, folder: str) -> str:
    """Python that loads what the run left from `folder` and answers one prompt.

    The prompt is the exact text, chat format included, that the model was trained with.
    """
    experiment = run.experiment
    base_folder = storage.base_model_folder(experiment.base_model_id)
    base = experiment.base_model
    # Only a model of the hub can be named; of another the studio's own copy is what was tuned on.
    address = base.address if base.source == "hub" else str(base_folder)
    method = methods.get(run.method)
    load = _QUANTIZED if method.quantizes else _ADAPTER if method.frozen_base else _WHOLE
    loaded = load.format(
        base=address,
        folder=f"./{folder}",
        quant_type=run.params.get("quantization_type"),
        double_quant=run.params.get("double_quantization"),
    )
    return loaded + _ANSWER.format(prompt=_prompt(experiment))


def _prompt(experiment: Experiment) -> str:
    try:
        formatter = prompts.formatter(files.tokenizer(experiment.base_model_id))
    except StudioError:  # its files are gone, or away; the template is still worth showing
        return prompts.fill(experiment.template, "Your text", experiment.labels)
    return formatter.prompt(experiment.template, "Your text", experiment.labels)
