"""Zip archives as answers that a browser saves."""

from collections.abc import Sequence

from fastapi.responses import StreamingResponse
from sqlalchemy.orm import Session

from app import model_cards, tuned_models, zips
from app.comparison import baselines
from app.storage import Path
from app.tables import Run
from app.web import snippets


def tuned_model(db: Session, run: Run, which: str) -> StreamingResponse:
    """The answer that saves what the run left, in a folder of its own, with a README.md.

    Stored as they are, since weights do not compress. Raises NotFound, or Conflict while not ready.
    """
    folder, experiment = tuned_models.folder_name(run, which), run.experiment
    base = baselines.known(db, experiment, run.figures.get("precision", "")).scores
    about = model_cards.write(run, base) + snippets.read_me(run, which)
    files = tuned_models.files(run, which)
    found: list[tuple[str, Path | bytes]] = [(f"{folder}/{name}", path) for name, path in files]
    return save(folder, [*found, (f"{folder}/README.md", about.encode())])


def save(
    name: str, files: Sequence[tuple[str, Path | bytes]], *, compressed: bool = False
) -> StreamingResponse:
    """The answer that saves these files as `name`.zip; `name` must be plain ASCII."""
    headers = {"Content-Disposition": f'attachment; filename="{name}.zip"'}
    content = zips.stream(files, compressed=compressed)
    return StreamingResponse(content, media_type="application/zip", headers=headers)
