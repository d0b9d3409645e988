"""Datasets as JSON."""

from typing import Annotated, Any

from fastapi import APIRouter, File, Form, UploadFile
from fastapi.responses import Response

from app import datasets, trash
from app.tables import Dataset
from app.web import uploads
from app.web.sessions import Reading, Writing

router = APIRouter(prefix="/datasets", tags=["datasets"])


def _plain(dataset: Dataset) -> dict[str, Any]:
    names = ("id", "name", "fingerprint", "num_examples", "num_bytes", "report", "created_at")
    return {name: getattr(dataset, name) for name in names}


@router.get("")
def list_all(db: Reading) -> list[dict[str, Any]]:
    """Every dataset, newest first."""
    return [_plain(dataset) for dataset in datasets.all(db)]


@router.post("", status_code=201)
def upload(
    db: Writing,
    file: Annotated[UploadFile, File()],
    name: Annotated[str, Form()] = "",
    input_column: Annotated[str, Form()] = "",
    output_column: Annotated[str, Form()] = "",
) -> dict[str, Any]:
    """Add a JSON, JSONL or CSV file; its name is used where none is given, and its columns are known
    by the usual names where none are. If they are not, the error's `columns` are those there are."""
    columns = (input_column, output_column)
    return _plain(datasets.add(db, name, file.filename or "", uploads.stored(file), columns))


@router.post("/examples/{key}", status_code=201)
def add_example(db: Writing, key: str) -> dict[str, Any]:
    """Add one of the sets that come with the studio; the one already there if it is."""
    return _plain(datasets.add_example(db, key))


@router.get("/{dataset_id}")
def show(db: Reading, dataset_id: str) -> dict[str, Any]:
    """One dataset with its first examples."""
    dataset = datasets.get(db, dataset_id)
    rows = [example._asdict() for example in datasets.preview(dataset)]
    return _plain(dataset) | {"examples": rows}


@router.delete("/{dataset_id}", status_code=204)
def delete(db: Writing, dataset_id: str) -> Response:
    """Throw it away; `/api/trash` gives it back for a day. Refused while it is needed."""
    trash.throw_away(db, "dataset", dataset_id)
    return Response(status_code=204)
