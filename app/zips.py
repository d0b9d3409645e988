"""Zip archives written while they are sent: nothing is gathered in memory or on disk."""

import io
import zipfile
from collections.abc import Iterator, Sequence

from app.storage import Path

_CHUNK = 1 << 20
_MOMENT = (2020, 1, 1, 0, 0, 0)  # the same files give the same bytes, whenever they are packed


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


def stream(
    files: Sequence[tuple[str, Path | bytes]], *, compressed: bool = False
) -> Iterator[bytes]:
    """The archive of these files, given as paths or as what is in them."""
    outbox = _Outbox()
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(outbox, "w") as archive:  # type: ignore[call-overload]
        for name, content in files:
            entry = zipfile.ZipInfo(name, _MOMENT)
            entry.external_attr = 0o644 << 16
            entry.compress_type = kind
            opened = io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")
            with opened as source, archive.open(entry, "w", force_zip64=True) as target:
                while chunk := source.read(_CHUNK):
                    target.write(chunk)
                    yield outbox.take()
    yield outbox.take()
