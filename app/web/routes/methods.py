"""Serves the stylesheet of the methods."""

from fastapi import APIRouter
from fastapi.responses import Response

from app.web import colours

router = APIRouter()


@router.get("/methods.css")
def stylesheet() -> Response:
    """Colour and dash of each method, and of the base model."""
    return Response(colours.SHEET, media_type="text/css")
