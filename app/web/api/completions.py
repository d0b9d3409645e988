"""Completions as JSON: one prompt, several models of one base model."""

from typing import Any

import pydantic
from fastapi import APIRouter

from app import completions, prompts
from app.tables import Completion
from app.web.sessions import Reading, Writing

router = APIRouter(prefix="/completions", tags=["completions"])
FIELDS = (
    "id",
    "run_id",
    "state",
    "text",
    "error",
    "num_tokens",
    "first_token_seconds",
    "tokens_per_second",
)


class NewAsk(pydantic.BaseModel):
    """A prompt. `run_ids` names tuned models; null is the base model itself."""

    base_model_id: str
    run_ids: list[str | None] = [None]
    input: str
    template: str = prompts.TASKS["generation"].template  # the input alone
    labels: list[str] = []
    sampling: completions.Sampling = completions.Sampling()


def _plain(asked: list[Completion]) -> dict[str, Any]:
    first = asked[0]
    shown = [{name: getattr(one, name) for name in FIELDS} for one in asked]
    whole = {"id": first.ask, "base_model_id": first.base_model_id, "input": first.input}
    more = {"template": first.template, "settings": first.settings, "completions": shown}
    return whole | more | {"stream": f"/completions/{first.ask}/stream"}


@router.post("", status_code=202)
def ask(db: Writing, wanted: NewAsk) -> dict[str, Any]:
    """Put the prompt to each model; the answers are then at the ask's address, or in its stream."""
    made = completions.ask(
        db,
        base_model_id=wanted.base_model_id,
        run_ids=wanted.run_ids,
        input=wanted.input,
        template=wanted.template,
        labels=wanted.labels,
        sampling=wanted.sampling,
    )
    return _plain(completions.of(db, made))


@router.get("/{ask_id}")
def show(db: Reading, ask_id: str) -> dict[str, Any]:
    """The answers as far as they are written."""
    return _plain(completions.of(db, ask_id))


@router.post("/{ask_id}/stop")
def stop(db: Writing, ask_id: str) -> dict[str, Any]:
    """Stop all answers; what is written stays."""
    completions.stop(db, ask_id)
    return _plain(completions.of(db, ask_id))
