"""Datasets: the list with the upload, and one dataset's rows and what a look at them found."""

from typing import Annotated

from fastapi import APIRouter, File, Form, Request, UploadFile
from fastapi.responses import Response
from sqlalchemy.orm import Session

from app import datasets, experiments, trash
from app.errors import Invalid, UnknownColumns
from app.settings import settings
from app.web import pages, uploads
from app.web.sessions import Reading, Writing

router = APIRouter(prefix="/datasets")


def _page(
    request: Request,
    db: Session,
    name: str = "",
    columns: tuple[str, str] = ("", ""),
    refused: Invalid | None = None,
) -> Response:
    return pages.render(
        request,
        "datasets.html",
        status=422 if refused else 200,
        datasets=datasets.all(db),
        examples=datasets.EXAMPLES,
        settings=settings,
        name=name,
        columns=columns,
        choices=refused.columns if isinstance(refused, UnknownColumns) else [],
        refused=refused,
    )


@router.get("")
def list_all(request: Request, db: Reading) -> Response:
    """Every dataset, and the form that adds one."""
    return _page(request, db)


@router.post("")
def upload(
    request: Request,
    db: Writing,
    file: Annotated[UploadFile, File()],
    name: Annotated[str, Form()] = "",
    input_column: Annotated[str, Form()] = "",
    output_column: Annotated[str, Form()] = "",
) -> Response:
    """Add the file, or show the form again with every reason why not."""
    columns = (input_column, output_column)
    try:
        added = datasets.add(db, name, file.filename or "", uploads.stored(file), columns)
    except Invalid as refused:
        return _page(request, db, name, columns, refused)
    return pages.redirect(f"/datasets/{added.id}", f"{added.num_examples:,} examples were added.")


@router.post("/examples/{key}")
def add_example(db: Writing, key: str) -> Response:
    """Add one of the sets that come with the studio."""
    return pages.redirect(f"/datasets/{datasets.add_example(db, key).id}")


@router.get("/{dataset_id}")
def show(request: Request, db: Reading, dataset_id: str) -> Response:
    """Its first rows and what a look at all of them found."""
    dataset = datasets.get(db, dataset_id)
    return pages.render(
        request,
        "dataset.html",
        dataset=dataset,
        report=dataset.report,
        rows=datasets.preview(dataset),
        users=experiments.on_dataset(db, dataset_id),
    )


@router.post("/{dataset_id}/delete")
def delete(db: Writing, dataset_id: str) -> Response:
    """Throw it away; for a day it can be put back."""
    trash.throw_away(db, "dataset", dataset_id)
    return pages.redirect("/datasets", "The dataset is in the trash.", undo=f"dataset/{dataset_id}")
