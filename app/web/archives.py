"""Zip archives written while they are sent: nothing is gathered in memory or on disk."""

import zipfile
from collections.abc import Iterator, Sequence

from fastapi.responses import StreamingResponse

from app.storage import Path

_CHUNK = 1 << 20


class _Outbox:
    """What the zip writer takes for a file that cannot seek; holds only what is not yet sent."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """Nothing waits anywhere else."""

    def take(self) -> bytes:
        taken = b"".join(self._parts)
        self._parts.clear()
        return taken


def stream(folder: str, files: Sequence[tuple[str, Path]]) -> Iterator[bytes]:
    """The files in one folder, stored as they are: weights do not compress."""
    outbox = _Outbox()
    with zipfile.ZipFile(outbox, "w") as archive:  # type: ignore[call-overload]
        for name, path in files:
            entry = zipfile.ZipInfo(f"{folder}/{name}", (2020, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            with path.open("rb") as source, archive.open(entry, "w", force_zip64=True) as target:
                while chunk := source.read(_CHUNK):
                    target.write(chunk)
                    yield outbox.take()
    yield outbox.take()


def download(folder: str, files: Sequence[tuple[str, Path]]) -> StreamingResponse:
    """The answer that saves them as `folder`.zip; `folder` must be plain ASCII."""
    headers = {"Content-Disposition": f'attachment; filename="{folder}.zip"'}
    return StreamingResponse(stream(folder, files), media_type="application/zip", headers=headers)
