"""LoRA: low-rank adapters beside frozen weights."""

from typing import Any, ClassVar

from pydantic import Field, field_validator

from app.errors import Invalid
from app.methods.base import Marker, Method, Params


class LoraParams(Params):
    """Defaults as most tools have them: rank 16 on all linear layers, alpha twice the rank.

    The rate is above what they take for models of billions of weights: small ones need more.
    """

    learning_rate: float = Field(
        5e-4, ge=1e-5, le=0.5, title="Learning rate", description="How far each update moves."
    )
    rank: int = Field(
        16,
        ge=1,
        le=256,
        title="Rank",
        description="Inner size of each adapter: more can learn more.",
    )
    alpha: float = Field(
        32,
        gt=0,
        le=1024,
        title="Alpha",
        description="Strength of the adapters: their output is scaled by alpha over rank.",
    )
    dropout: float = Field(
        0.05,
        ge=0,
        le=0.9,
        title="Dropout",
        description="Share of adapter inputs blanked out in training, against learning by heart.",
    )
    target_modules: str = Field(
        "all-linear",
        min_length=1,
        max_length=500,
        pattern=r"^[\w\-., ]+$",
        title="Target modules",
        description='Layers that get an adapter: "all-linear", or names such as "q_proj, v_proj".',
    )

    @field_validator("target_modules")
    @classmethod
    def _tidy(cls, value: str) -> str:
        return ", ".join(name for part in value.split(",") if (name := part.strip()))


def _check(params: LoraParams, layers: set[str]) -> None:
    """Raise Invalid for a name that PEFT would pass over in silence, as long as another fits."""
    names = params.target_modules
    if names == "all-linear":
        return
    if unknown := [name for name in names.split(", ") if name.rpartition(".")[2] not in layers]:
        raise Invalid(
            f"This base model has no layers named {', '.join(unknown)}. "
            f"Choose from: {', '.join(sorted(layers))}; or all-linear for all of them.",
            field="target_modules",
        )


def _layers(model: Any) -> set[str]:
    """Names of the layers that can have an adapter; the head and the embeddings are none of them."""
    others = (model.get_output_embeddings(), model.get_input_embeddings())
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None
        and module.weight.ndim == 2
        and module not in others
    }


class Lora(Method):
    """Small adapters; many can share one base model."""

    key = "lora"
    label = "LoRA"
    order = 2
    light, dark, dash = "#6929c4", "#a56eff", "6 4"
    marker: ClassVar[Marker] = "square"
    summary = "Trains small low-rank adapters beside the weights, which stay frozen."
    tunes = "Low-rank adapters; the model's own weights stay frozen"
    outcome = "A small adapter; quality near full tuning, with less risk of learning by heart"
    compute = "Moderate"
    duration = "One to many hours on large models"
    steps: ClassVar[tuple[str, ...]] = (
        "Next to each target module two thin matrices of the given rank are placed.",
        "Examples are gathered into batches of the batch size.",
        "The model predicts each output through its frozen weights plus the adapters, scaled by "
        "alpha over rank; dropout blanks some inputs.",
        "After the accumulated batches only the adapters move; the learning rate says how far.",
        "This repeats for every batch, and for every epoch.",
    )
    paper = (
        "LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021)",
        "https://arxiv.org/abs/2106.09685",
    )
    schema = LoraParams
    usual_rates = (5e-5, 2e-3)
    quick: ClassVar[dict[str, Any]] = {"num_epochs": 2, "learning_rate": 1e-3}
    starts_as_base = True
    merges = True

    def check(self, shapes: dict[str, Any], params: Any) -> None:
        """Raises Invalid for target modules that the model does not have."""
        _check(params, {name.partition(":")[0] for name in shapes["linear"]})

    def adapt(self, model: Any, params: Any, seed: int) -> Any:
        """A PEFT model with adapters on the target modules; they start as no change at all.

        Raises Invalid if the model has no layers of such a name.
        """
        import torch
        from peft import LoraConfig, get_peft_model

        _check(params, _layers(model))
        names = params.target_modules
        torch.manual_seed(seed)
        return get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=params.rank,
                lora_alpha=params.alpha,
                lora_dropout=params.dropout,
                target_modules=names if names == "all-linear" else names.split(", "),
            ),
        )

    def num_trained(self, shapes: dict[str, Any], params: Any) -> int:
        """Two thin matrices beside each adapted layer."""
        layers = self.adapted(shapes, params)
        return sum(params.rank * (into + out) * count for into, out, count in layers)

    def adapted(self, shapes: dict[str, Any], params: Any) -> list[list[int]]:
        """The layers that the target modules name."""
        names = {name.rpartition(".")[2] for name in params.target_modules.split(", ")}
        return [
            shape
            for name, shape in shapes["linear"].items()
            if params.target_modules == "all-linear" or name.partition(":")[0] in names
        ]
