"""How much a request may carry: a file for the upload, little for everything else."""

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.settings import settings

FORM_BYTES = 2_000_000
UPLOADS = ("/datasets", "/api/datasets")


class BodyLimit:
    """Stops reading at the limit. The app answers with the exception's sentence."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        limit, sentence = _limit(scope)
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        announced = int(length) if length.isdecimal() else 0
        read = 0

        async def counted() -> Message:
            nonlocal read
            if announced <= limit:
                message = await receive()
                read += len(message.get("body", b""))
                if read <= limit:
                    return message
            if "expect" not in headers:
                await _drain(receive, limit)
            # Closing, else the server would take in the rest after the answer.
            raise HTTPException(413, sentence, headers={"Connection": "close"})

        await self.app(scope, counted, send)


def _limit(scope: Scope) -> tuple[int, str]:
    if scope["method"] == "POST" and scope["path"] in UPLOADS:
        sentence = (
            f"The file is larger than {settings.max_upload_mb} MB. Nothing was stored. Upload a "
            "smaller file, or start the studio with a larger STUDIO_MAX_UPLOAD_MB."
        )
        return settings.max_upload_mb * 1_000_000 + 65_536, sentence
    return FORM_BYTES, "More was sent than a form of the studio takes (2 MB). Nothing was stored."


async def _drain(receive: Receive, most: int) -> None:
    """Read on for a while: a browser shows no answer that comes while it is still sending."""
    while most > 0:
        message = await receive()
        most -= len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            return
