"""The studio's errors: each is a sentence for the person who reads it."""

from typing import Any


class StudioError(Exception):
    """Something the user can understand: what happened, what is safe, what to do."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class NotFound(StudioError):
    """The thing asked for does not exist (HTTP 404)."""


class InTrash(NotFound):
    """The thing was thrown away, and can be put back for a while; kind as in app/trash.py."""

    def __init__(self, kind: str, thing_id: str, name: str, trashed_at: float) -> None:
        super().__init__(f"{name!r} is in the trash. Put it back on the page Trash to use it.")
        self.kind = kind
        self.thing_id = thing_id
        self.name = name
        self.trashed_at = trashed_at


class Invalid(StudioError):
    """What the user gave cannot be used; `field` names the form field, if one is to blame (422)."""


class UnknownColumns(Invalid):
    """Nobody knows which columns of a file are input and output; `columns`: those to choose from."""

    def __init__(self, message: str, columns: list[str]) -> None:
        super().__init__(message, field="columns")
        self.columns = columns


class TooLarge(StudioError):
    """More was sent than the settings allow (413)."""


class Conflict(StudioError):
    """The thing is in a state that does not allow this (409)."""


class Unavailable(StudioError):
    """A part of the studio cannot be reached at present (503)."""


class Damaged(StudioError):
    """A file is not what was written (500)."""


class NoRoom(StudioError):
    """The disk is too full for what is to be written, which takes `needed` bytes."""

    def __init__(self, message: str, needed: int) -> None:
        super().__init__(message)
        self.needed = needed


class LostClaim(StudioError):
    """Another attempt owns this run now; whoever gets this must stop and change nothing."""


def own_words(problem: Any) -> str:
    """What a validator of ours said, of one of pydantic's problems: without what pydantic puts before it."""
    return str(problem["msg"]).removeprefix("Value error, ")
