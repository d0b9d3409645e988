"""Full fine tuning: every weight is trained."""

from typing import Any, ClassVar

from pydantic import Field

from app.methods.base import Marker, Method, Params


class FullParams(Params):
    """Rates a tenth of LoRA's: every weight moves."""

    learning_rate: float = Field(
        5e-5, ge=1e-5, le=0.5, title="Learning rate", description="How far each update moves."
    )


class Full(Method):
    """A whole new model."""

    key = "full"
    label = "Full fine tuning"
    order = 4
    light, dark, dash = "#005d5d", "#009d9a", "8 3 2 3"
    marker: ClassVar[Marker] = "diamond"
    summary = "Trains every weight of the base model; the result is a whole new model."
    tunes = "All weights of the model"
    outcome = "A whole new model, suited to a new task or domain when there is enough data"
    compute = "High"
    duration = "Grows with the model's size"
    steps: ClassVar[tuple[str, ...]] = (
        "Examples are gathered into batches of the batch size.",
        "The model predicts each output, and the loss says how far off it was.",
        "After the accumulated batches, every weight moves a little against its gradient; the "
        "learning rate says how far.",
        "This repeats for every batch, and for every epoch.",
    )
    paper = (
        "Universal Language Model Fine-tuning for Text Classification (Howard and Ruder, 2018)",
        "https://arxiv.org/abs/1801.06146",
    )
    schema = FullParams
    usual_rates = (1e-5, 2e-4)
    quick: ClassVar[dict[str, Any]] = {"num_epochs": 1}
    frozen_base = False
    starts_as_base = True

    def adapt(self, model: Any, params: Any, seed: int) -> Any:
        """Every weight trainable."""
        return model.requires_grad_(True)

    def num_trained(self, shapes: dict[str, Any], params: Any) -> int:
        """All there are."""
        return int(shapes["parameters"])
