"""QLoRA: LoRA on a base model whose weights are held in 4 bits."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from app.methods.base import Marker
from app.methods.lora import Lora, LoraParams


class QloraParams(LoraParams):
    """LoRA's, and how the base model is quantized."""

    quantization_type: Literal["nf4", "fp4"] = Field(
        "nf4",
        title="Quantization type",
        description="4-bit code of the frozen weights; nf4 suits weights spread like a bell curve.",
    )
    double_quantization: bool = Field(
        True,
        title="Double quantization",
        description="Quantizes the scales as well: saves about 0.4 bits a weight.",
    )


class Qlora(Lora):
    """LoRA's result at a fraction of the memory for weights."""

    key = "qlora"
    label = "QLoRA"
    order = 3
    light, dark, dash = "#ba4e00", "#ff832b", "2 3"
    marker: ClassVar[Marker] = "triangle"
    summary = "LoRA on a base model whose frozen weights are held in 4 bits."
    tunes = "Low-rank adapters; the model's own weights are frozen and quantized to 4 bits"
    outcome = "A small adapter, as with LoRA; quantizing may cost some quality"
    compute = "Low"
    duration = "One to many hours on large models"
    steps: ClassVar[tuple[str, ...]] = (
        "The base model's weights are quantized to 4 bits and stay frozen.",
        *Lora.steps,
    )
    paper = (
        "QLoRA: Efficient Finetuning of Quantized LLMs (Dettmers et al., 2023)",
        "https://arxiv.org/abs/2305.14314",
    )
    schema = QloraParams
    quantizes = True
    starts_as_base = False  # quantizing has changed it

    def load(self, folder: str, params: Any, *, device: str, dtype: str) -> Any:
        """The model with its weights in 4 bits, and laid out so that it can always be trained."""
        model = super().load(folder, params, device=device, dtype=dtype)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # Else the first forward pass in evaluation mode repacks the weights for a product
                # that has no gradient: training after it would go on without, and without a word.
                module.support_avx512bf16_for_cpu = False
        return model

    def load_options(self, params: Any, dtype: str) -> dict[str, Any]:
        """4 bits by bitsandbytes, computed in `dtype`."""
        import torch
        from transformers import BitsAndBytesConfig

        return {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=params.quantization_type,
                bnb_4bit_use_double_quant=params.double_quantization,
                bnb_4bit_compute_dtype=getattr(torch, dtype),
            )
        }
