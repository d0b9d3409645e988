"""What a prompt vector says: nearest tokens and the way it went, computed once and shown."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sqlalchemy.orm import Session
from torch.nn import functional

from app import files, methods, storage
from app.settings import settings
from app.web import vectors as shown
from tests import factories, tiny, web
from tests.faults import small
from tests.test_resume import attempt, kill
from worker import backbones, hardware, vectors
from worker import run as worker_run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("vectors") / "llama", initializer_range=0.15)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every step, and no answers to score."""
    monkeypatch.setattr(settings, "checkpoint_seconds", 1e-9)
    monkeypatch.setattr(settings, "disk_reserve_mb", 0)
    monkeypatch.setattr(settings, "checkpoint_share", 1.0)
    monkeypatch.setattr(worker_run.scoring, "look_at_base", lambda job, model: None)
    monkeypatch.setattr(worker_run.scoring, "score_run", lambda job: {})
    monkeypatch.setattr(worker_run.scoring, "score_base", lambda job: None)


@pytest.mark.parametrize("piece", [7, 8192])
def test_nearest_is_what_comparing_with_every_token_gives(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "PIECE", piece)
    torch.manual_seed(0)
    words, some = torch.randn(100, 16).bfloat16(), torch.randn(5, 16)
    words[3] = 0.0
    found = vectors.nearest(some, words, 3)
    for vector, tokens in zip(some, found, strict=True):
        every = functional.cosine_similarity(vector[None], words.float())
        best = every.topk(3)
        assert [token for token, _ in tokens] == best.indices.tolist()
        assert [cosine for _, cosine in tokens] == pytest.approx(best.values.tolist(), abs=1e-5)
    token, cosine = vectors.nearest(2.5 * words[42:43].float(), words, 1)[0][0]
    assert (token, round(cosine, 5)) == (42, 1.0)


@pytest.mark.parametrize("start", ["vocabulary", "text", "random"])
def test_a_run_tells_of_its_prompt_vector(db: Session, model: Path, start: str) -> None:
    given: dict[str, Any] = {"initialization": start, "num_virtual_tokens": 6}
    given |= {"initialization_text": "Sort it"} if start == "text" else {}
    run = small.run(db, small.experiment(db, model), "prompt_tuning", **given)
    attempt(run.id)
    now = small.now(run.id)
    told = now.figures["prompt_vector"]
    assert len(told) == 6
    if start == "text":
        assert [one["began"] for one in told] == list("Sort i")
    assert [one["began"] is None for one in told] == [start == "random"] * 6

    # The way it went, reckoned anew from seed and files.
    method = methods.get("prompt_tuning")
    params = method.schema.model_validate(now.params)
    folder = files.base_model(now.experiment.base_model_id)
    _, first = backbones.load_trainable(
        method, params, folder, now.experiment.seed, hardware.find()
    )
    assert first is not None
    saved = storage.tuned_model_folder(run.id) / "adapter_model.safetensors"
    kept = load_file(saved)["prompt_embeddings"]
    way = (kept - first.detach()).norm(dim=1) / first.detach().norm(dim=1)
    assert [one["moved"] for one in told] == pytest.approx(way.tolist(), abs=1e-4)
    assert min(way) > 0.01
    for one in told:
        cosines = [cosine for _, cosine in one["near"]]
        assert cosines == sorted(cosines, reverse=True)
        assert len(cosines) == 3
        assert all(-1 <= cosine <= 1.0001 for cosine in cosines)


def test_after_a_kill_it_is_the_same(db: Session, model: Path) -> None:
    of = small.experiment(db, model)
    through, broken = (small.run(db, of, "prompt_tuning") for _ in range(2))
    attempt(through.id)
    attempt(broken.id, {25: kill})
    attempt(broken.id)
    told = [small.now(one.id).figures["prompt_vector"] for one in (through, broken)]
    assert told[0] == told[1]


def test_other_methods_tell_of_none(db: Session, model: Path) -> None:
    run = small.run(db, small.experiment(db, model), "lora", num_epochs=1)
    attempt(run.id)
    assert small.now(run.id).state == "succeeded"
    assert "prompt_vector" not in small.now(run.id).figures


def test_the_page_shows_twenty_and_folds_the_rest(db: Session) -> None:
    near = [[" <b>way", 0.5], ["\n\x00", 0.25], ["", -0.1]]
    line = {"near": near, "moved": 12.3456, "began": None}
    run = factories.tuned(db, method="prompt_tuning", figures={"prompt_vector": [line] * 23})
    with web.client() as client:
        page = client.get(f"/runs/{run.id}").text
        assert "What the prompt vector says" in page
        assert page.count("“ &lt;b&gt;way”") == 23
        assert "“\\n\\x00”" in page
        assert "(no text)" in page
        assert "1,235 %" in page
        before, _, after = page.partition("3 more virtual tokens")
        assert before.count("“ &lt;b&gt;way”") == 20
        assert after.count("“ &lt;b&gt;way”") == 3
        other = factories.tuned(db)
        assert "What the prompt vector says" not in client.get(f"/runs/{other.id}").text
    assert shown.quoted("a b") == "“a b”"
