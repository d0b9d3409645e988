"""Takes the uploaded file out of the request and into the home folder."""

import shutil

from fastapi import UploadFile

from app import storage
from app.crashpoints import crashpoint
from app.errors import Unavailable


def stored(file: UploadFile) -> storage.Path:
    """A new file of the studio's own with what was uploaded; whoever asks for it removes it."""
    path = storage.upload_file()
    try:
        with path.open("xb") as target:
            shutil.copyfileobj(file.file, target, 1 << 20)
            crashpoint("upload.stored")
    except OSError as error:
        storage.remove(path)
        raise Unavailable(
            f"The file could not be stored: {error.strerror or error}. Nothing was kept; make "
            "room on the disk and upload it again."
        ) from error
    return path
