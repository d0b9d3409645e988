"""What a prompt vector says: the vocabulary's nearest tokens to each virtual one, and how far it moved."""

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from app import files, prompts
from worker.backbones import inner
from worker.job import Job

NEAREST = 3
PIECE = 8192  # tokens of the vocabulary that are compared at a time
WHERE_IT_BEGAN = 0.999  # cosine from which on a start is that token


def begin(soft_prefix: Tensor | None) -> Tensor | None:
    """The prompt vector as it is before the first step: a copy, which training does not move."""
    return None if soft_prefix is None else soft_prefix.detach().clone()


def figures(job: Job, model: Any, start: Tensor | None) -> dict[str, Any]:
    """For the run's figures, of the state that was kept; nothing where there is no prompt vector."""
    if start is None or job.group.spreads or not job.group.leads:
        return {}
    run = job.run
    saved = files.tuned_model(run.id, run.attempt) / "adapter_model.safetensors"
    words = inner(model).get_input_embeddings().weight.detach()
    start = start.to(words.device)
    kept = load_file(saved)["prompt_embeddings"].to(words.device)
    formatter = prompts.formatter(files.base_model(run.experiment.base_model_id))
    near, began = nearest(kept, words, NEAREST), nearest(start, words, 1)
    moved = ((kept - start).norm(dim=1) / start.norm(dim=1).clamp(min=1e-9)).tolist()

    def text(token: int) -> str:
        return "".join(piece for piece, _ in formatter.pieces([token]))

    return {
        "prompt_vector": [
            {
                "near": [[text(token), round(cosine, 4)] for token, cosine in tokens],
                "moved": round(share, 4),
                "began": text(first[0][0]) if first[0][1] >= WHERE_IT_BEGAN else None,
            }
            for tokens, first, share in zip(near, began, moved, strict=True)
        ]
    }


def nearest(vectors: Tensor, words: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """Of each vector the tokens with the largest cosine similarity, and that, the nearest first."""
    own = functional.normalize(vectors.float(), dim=1)
    found = []
    for first in range(0, len(words), PIECE):
        piece = functional.normalize(words[first : first + PIECE].float(), dim=1)
        best = (own @ piece.T).topk(min(count, len(piece)), dim=1)
        found.append((best.values, best.indices + first))
    values, tokens = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    best = values.topk(min(count, values.shape[1]), dim=1)
    return [
        list(zip(row.tolist(), cosines.tolist(), strict=True))
        for row, cosines in zip(tokens.gather(1, best.indices), best.values, strict=True)
    ]
