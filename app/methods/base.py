"""What a tuning method is: texts for the screen, a parameter schema, and how it loads and adapts."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pydantic
from pydantic import ConfigDict, Field

FAR = 3  # times outside the usual range, from which on a learning rate is doubted
Marker = Literal["circle", "square", "triangle", "diamond"]


class Params(pydantic.BaseModel):
    """The parameters all methods share; each method sets its own defaults.

    One declaration gives default, range, label, help, validation and form field. Fields whose
    `json_schema_extra` says `advanced` are folded away in the form.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    learning_rate: float = Field(
        2e-4, ge=1e-5, le=0.5, title="Learning rate", description="How far each update moves."
    )
    num_epochs: int = Field(
        3, ge=1, le=50, title="Epochs", description="How often training goes through all examples."
    )
    batch_size: int = Field(
        8, ge=1, le=16, title="Batch size", description="Examples in one batch."
    )
    accumulate_steps: int = Field(
        1, ge=1, le=128, title="Accumulate steps", description="Batches gathered before one update."
    )
    max_length: int = Field(
        512,
        ge=16,
        le=8192,
        title="Maximum length",
        description="Tokens of one example, virtual ones and the answer included; longer inputs are cut.",
    )
    validation_interval: int = Field(
        0,
        ge=0,
        le=10_000,
        title="Validation interval",
        description="Steps between two looks at the validation loss; 0: ten looks, evenly spread.",
        json_schema_extra={"advanced": True},
    )
    patience: int = Field(
        0,
        ge=0,
        le=100,
        title="Patience",
        description="Looks in a row without a better state after which training ends early; 0: never.",
        json_schema_extra={"advanced": True},
    )
    keep_by: Literal["loss", "score"] = Field(
        "loss",
        title="Best state by",
        description="What tells the best state, which is kept: the validation loss, or the score of answers to up "
        "to 64 validation examples at each look, which takes longer.",
        json_schema_extra={"advanced": True},
    )
    warmup_share: float = Field(
        0.05,
        ge=0,
        le=0.5,
        title="Warm-up share",
        description="Share of all steps in which the learning rate rises; after that it falls.",
        json_schema_extra={"advanced": True},
    )
    weight_decay: float = Field(
        0.0,
        ge=0,
        le=1,
        title="Weight decay",
        description="Pull of trained values towards zero at each update.",
        json_schema_extra={"advanced": True},
    )
    max_grad_norm: float = Field(
        1.0,
        gt=0,
        le=100,
        title="Gradient clipping",
        description="Longer gradients are shortened to this norm.",
        json_schema_extra={"advanced": True},
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw",
        title="Optimizer",
        description="adamw keeps its moments in 32 bits; the others in 8, on a GPU with CUDA only; paged ones "
        "move to RAM when the GPU is full.",
        json_schema_extra={"advanced": True},
    )
    gradient_checkpointing: bool = Field(
        False,
        title="Activation checkpointing",
        description="Takes less memory and about a third more time.",
        json_schema_extra={"advanced": True},
    )
    devices: int = Field(
        1,
        ge=1,
        le=8,
        title="Devices",
        description="GPUs of one machine that share the run; they divide each update's examples among them.",
        json_schema_extra={"advanced": True},
    )
    seed: int | None = Field(
        None,
        ge=0,
        le=2**31 - 1,
        title="Seed",
        description="Of where training starts, the order of examples and dropout; empty: the experiment's. "
        "The split stays the experiment's.",
        json_schema_extra={"advanced": True},
    )


class Method:
    """One way to tune. A subclass sets the texts and overrides `load` and `adapt` where it differs."""

    key: ClassVar[str]
    label: ClassVar[str]
    order: ClassVar[int]  # place in lists
    light: ClassVar[str]  # its colour on a light and on a dark page
    dark: ClassVar[str]
    dash: ClassVar[str]  # SVG dash pattern; empty: solid
    marker: ClassVar[Marker]
    summary: ClassVar[str]  # one sentence
    tunes: ClassVar[str]  # as documented: what is tuned
    outcome: ClassVar[str]  # as documented: what one gets
    compute: ClassVar[str]  # as documented: low, moderate, high
    duration: ClassVar[str]  # as documented
    steps: ClassVar[tuple[str, ...]]  # how it works, step by step
    paper: ClassVar[tuple[str, str]]  # title, address
    schema: ClassVar[type[Params]] = Params
    usual_rates: ClassVar[tuple[float, float]]  # learning rates that work as a rule
    quick: ClassVar[dict[str, Any]] = {}  # parameters of the shipped examples
    quantizes: ClassVar[bool] = False  # whether the base model's weights are loaded quantized
    frozen_base: ClassVar[bool] = True  # whether the base model's own weights stay as they are
    starts_as_base: ClassVar[bool] = False  # whether step 0 answers just like the base model
    merges: ClassVar[bool] = False  # whether what is tuned can be merged into the base's weights

    def load(self, folder: str, params: Any, *, device: str, dtype: str) -> Any:
        """The transformers model in `folder` on `device`, in `dtype` (a torch name): frozen weights.

        Safetensors only, no code from the folder, dropout as the model's configuration says.
        """
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            **self.load_options(params, dtype),
        )
        return model.requires_grad_(False)

    def load_options(self, params: Any, dtype: str) -> dict[str, Any]:
        """More arguments for `from_pretrained`, such as how to quantize."""
        return {}

    def check(self, shapes: dict[str, Any], params: Any) -> None:
        """Raises Invalid, with its field, if a base model of these shapes cannot be tuned like that."""

    def adapt(self, model: Any, params: Any, seed: int) -> Any:
        """The model with just this method's values trainable, in float32; PEFT's where it is one."""
        raise NotImplementedError

    def soft_prefix(self, model: Any) -> Any:
        """The vectors, shape (tokens, width), that stand before every text; None for most methods."""
        return None

    def virtual_tokens(self, params: Any) -> int:
        """How many tokens `soft_prefix` takes of the maximum length."""
        return 0

    def doubt(self, params: Any) -> str:
        """A sentence on a learning rate far outside of what the method bears; empty: none."""
        (low, high), chosen = self.usual_rates, params.learning_rate
        if low / FAR <= chosen <= high * FAR:
            return ""
        usual = " to ".join(f"{rate:.10f}".rstrip("0") for rate in (low, high))
        much = "high: training may diverge" if chosen > high else "low: little may be learned"
        return (
            f"A learning rate of {chosen:g} is far too {much}. For {self.label}, {usual} is usual."
        )

    def num_trained(self, shapes: dict[str, Any], params: Any) -> int:
        """How many values are trained on a base model of these shapes; for the forecast."""
        return 0

    def adapted(self, shapes: dict[str, Any], params: Any) -> list[list[int]]:
        """The linear layers beside which something is trained, as [in, out, how many]."""
        return []
