"""Prompt tuning: vectors before the text are trained, the model is not touched."""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from app.methods.base import Marker, Method, Params


class PromptTuningParams(Params):
    """A learning rate of its own: about a hundred times LoRA's."""

    learning_rate: float = Field(
        2e-2, ge=1e-5, le=0.5, title="Learning rate", description="How far each update moves."
    )
    num_epochs: int = Field(
        8, ge=1, le=50, title="Epochs", description="How often training goes through all examples."
    )
    num_virtual_tokens: int = Field(
        20,
        ge=1,
        le=500,
        title="Virtual tokens",
        description="Length of the prompt vector; gains are small beyond 20 on most tasks.",
    )
    initialization: Literal["random", "text", "vocabulary"] = Field(
        "vocabulary",
        title="Initialization",
        description="Where the vectors start: random values, a text's tokens, or random tokens.",
    )
    initialization_text: str = Field(
        "",
        max_length=2000,
        title="Initialization text",
        description="With text: what the vectors say at the start, such as the task and its labels.",
    )

    @model_validator(mode="after")
    def _text_given(self) -> "PromptTuningParams":
        if self.initialization == "text" and not self.initialization_text.strip():
            raise ValueError("Initialization from text needs the initialization text.")
        return self


class PromptTuning(Method):
    """A few kilobytes that steer a frozen model."""

    key = "prompt_tuning"
    label = "Prompt tuning"
    order = 1
    light, dark, dash = "#1192e8", "#bae6ff", ""
    marker: ClassVar[Marker] = "circle"
    summary = "Trains a prompt vector that stands before every input; no weight is touched."
    tunes = "A prompt vector before the input; all weights stay frozen"
    outcome = "A layer of vectors before the model; suits tasks near what the model knows"
    compute = "Low"
    duration = "Ten minutes to a few hours on large models"
    steps: ClassVar[tuple[str, ...]] = (
        "The prompt vector starts from random values, from a text, or from the vocabulary.",
        "It is put before the embedded input of each example of a batch.",
        "The model predicts each output, and the loss says how far off it was.",
        "After the accumulated batches only the prompt vector moves; the learning rate says how far.",
        "This repeats for every batch, and for every epoch.",
    )
    paper = (
        "The Power of Scale for Parameter-Efficient Prompt Tuning (Lester et al., 2021)",
        "https://arxiv.org/abs/2104.08691",
    )
    schema = PromptTuningParams
    usual_rates = (1e-3, 0.3)
    quick: ClassVar[dict[str, Any]] = {"num_epochs": 2}

    def adapt(self, model: Any, params: Any, seed: int) -> Any:
        """A PEFT model with a trainable prompt vector in float32."""
        import torch
        from peft import PromptTuningConfig, get_peft_model

        start = {"random": "RANDOM", "text": "TEXT", "vocabulary": "SAMPLE_VOCAB"}
        text = params.initialization == "text"
        torch.manual_seed(seed)
        tuned = get_peft_model(
            model,
            PromptTuningConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=params.num_virtual_tokens,
                prompt_tuning_init=start[params.initialization],
                prompt_tuning_init_text=params.initialization_text if text else None,
                tokenizer_name_or_path=model.config._name_or_path if text else None,
            ),
        )
        vectors = self.soft_prefix(tuned)
        vectors.data = vectors.data.float()
        if params.initialization == "random":
            # PEFT draws with deviation 1, far from where the model's own tokens lie.
            words = model.get_input_embeddings()
            some = torch.linspace(0, words.num_embeddings - 1, 1000, device=vectors.device).long()
            vectors.data.mul_(words(some).detach().float().std())
        return tuned

    def soft_prefix(self, model: Any) -> Any:
        """The prompt vector, (tokens, width), with its gradient."""
        return model.prompt_encoder["default"].embedding.weight

    def virtual_tokens(self, params: Any) -> int:
        """As many as the parameter says."""
        return int(params.num_virtual_tokens)

    def num_trained(self, shapes: dict[str, Any], params: Any) -> int:
        """A vector of the model's width for each virtual token."""
        return int(params.num_virtual_tokens * shapes["hidden"])
