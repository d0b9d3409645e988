"""Zip archives as answers that a browser saves."""

from collections.abc import Sequence

from fastapi.responses import StreamingResponse

from app import zips
from app.storage import Path


def download(folder: str, files: Sequence[tuple[str, Path]]) -> StreamingResponse:
    """The answer that saves them as `folder`.zip, in a folder of that name.

    Stored as they are, since weights do not compress.
    """
    return save(folder, [(f"{folder}/{name}", path) for name, path in files])


def save(
    name: str, files: Sequence[tuple[str, Path | bytes]], *, compressed: bool = False
) -> StreamingResponse:
    """The answer that saves these files as `name`.zip; `name` must be plain ASCII."""
    headers = {"Content-Disposition": f'attachment; filename="{name}.zip"'}
    content = zips.stream(files, compressed=compressed)
    return StreamingResponse(content, media_type="application/zip", headers=headers)
