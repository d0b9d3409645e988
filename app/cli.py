"""The command line: `studio up | web | worker | tune | add | doctor | backup | receipt | verify` and more."""

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Annotated, TypeVar

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from sqlalchemy.exc import SQLAlchemyError

from app import (
    backups,
    base_models,
    commands,
    database,
    doctor,
    holdings,
    processes,
    receipt_files,
    receipts,
    restores,
    storage,
    supervisor,
    workers,
    zips,
)
from app import migrate as migrations
from app.errors import StudioError
from app.settings import settings

T = TypeVar("T")
cli = typer.Typer(add_completion=False, no_args_is_help=True, help="Tuning Studio.")
notes = commands.notes


class Kind(StrEnum):
    """The kinds of workers."""

    tuner = "tuner"
    generator = "generator"


@cli.command()
def up() -> None:
    """Start the whole studio here: broker, web, one tuning and one generating worker."""
    say = lambda text: notes.print(text, highlight=False, soft_wrap=True, markup=False)  # noqa: E731
    raise typer.Exit(_or_exit(lambda: supervisor.up(say)))


@cli.command()
def migrate(
    back_to: Annotated[
        str, typer.Option(help="Go back to this revision instead, for an older version.")
    ] = "",
) -> None:
    """Bring the database to the tables of this version, with the default base model listed."""
    if back_to:
        migrations.down(back_to)
        return
    migrations.up()
    with database.session() as db:
        base_models.add_default(db)


@cli.command()
def web() -> None:
    """Run one web process."""
    _become("app.web.serve")


@cli.command()
def worker(kind: Kind) -> None:
    """Run one worker: a tuner trains, a generator answers prompts and prepares models."""
    _become("worker.tasks", kind.value)


@cli.command()
def publish() -> None:
    """Put what this home holds into a file store that is new, for the other machines."""
    if not settings.files_url:
        notes.print("Set STUDIO_FILES_URL first.")
        raise typer.Exit(2)
    try:
        with database.reading() as db:
            holdings.publish(db, lambda text: notes.print(text, highlight=False, markup=False))
    except StudioError as error:
        notes.print(error.message, style="red", highlight=False, markup=False)
        raise typer.Exit(1) from None


@cli.command()
def alive(kind: Kind) -> None:
    """Exit with 0 if a worker of that kind on this machine was heard of just now, else with 1."""
    with database.reading() as db:
        here = {one.kind for one in workers.alive(db) if one.host == socket.gethostname()}
    raise typer.Exit(0 if kind.value in here else 1)


def _become(module: str, *arguments: str) -> None:
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


cli.command()(commands.tune)
cli.command()(commands.add)


@cli.command("doctor")
def examine(
    fix: Annotated[bool, typer.Option("--fix", help="Mend what can be mended safely.")] = False,
) -> None:
    """Check everything that must always be true; the studio may run. Exit code 1: findings left."""
    with database.reading() as db:
        found = _or_exit(lambda: doctor.examine(db))
    for finding in found:
        mended = fix and finding.mend is not None
        if fix and finding.mend:
            with database.session() as db:
                finding.mend(db)
        lead = "Mended" if mended else "With --fix" if finding.mend else "To do"
        print(f"{finding.sentence} {lead}: {finding.advice}")
    left = [finding for finding in found if not (fix and finding.mend)]
    notes.print(f"{len(left)} finding(s) left." if left else "All is well.", highlight=False)
    raise typer.Exit(1 if left else 0)


@cli.command()
def backup(file: Annotated[str, typer.Argument(help="The file to write.")]) -> None:
    """Write the whole studio into FILE, while it runs. FILE holds your data and the access token."""
    with _bar() as bar:
        saved = _or_exit(lambda: backups.save(storage.users_file(file), bar))
    for sentence in saved.missing:
        notes.print(sentence, style="yellow", highlight=False, markup=False)
    notes.print(f"{saved.num_files:,} files, {saved.num_bytes / 1e6:,.1f} MB, in {file}.")


@cli.command()
def restore(
    file: Annotated[str, typer.Argument(help="A file that `studio backup` wrote.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Give up the studio that is there.")
    ] = False,
) -> None:
    """Put the studio of FILE into an empty home folder and database."""
    with _bar() as bar:
        made = _or_exit(
            lambda: restores.restore(storage.users_file(file), replace=replace, tell=bar)
        )
    notes.print(
        f"{made.num_files:,} files and {made.num_rows:,} rows are back. Runs that were at work and "
        f"went into the queue: {made.requeued}. Start it with `studio up`."
    )


@cli.command()
def receipt(
    run: Annotated[str, typer.Argument(help="The id of a run that has finished.")],
    file: Annotated[str, typer.Argument(help="The file to write.")] = "receipt.zip",
    data: Annotated[bool, typer.Option("--data", help="Put the examples in, too.")] = False,
) -> None:
    """Write all that repeats RUN into FILE: settings, fingerprints, versions, curve, model card."""
    with database.reading() as db:
        contents = _or_exit(lambda: receipts.contents(db, receipts.get(db, run), data=data))
    try:
        with storage.users_file(file).open("wb") as target:
            target.writelines(zips.stream(contents, compressed=True))
    except OSError as error:
        notes.print(f"{file} cannot be written: {error.strerror}.", style="red", highlight=False)
        raise typer.Exit(2) from None
    notes.print(f"Written: {file}", highlight=False, markup=False)


@cli.command()
def verify(
    file: Annotated[str, typer.Argument(help="A receipt.")],
    data: Annotated[str, typer.Option(help="The dataset's file, if it is nowhere else.")] = "",
) -> None:
    """Train the first steps of a receipt's run again, and compare the losses. Exit code 0: the same."""
    _or_exit(lambda: receipt_files.read(storage.users_file(file)))  # at once, without torch
    raise typer.Exit(processes.start("worker.verify", file, data).wait())


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=notes, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _or_exit(act: Callable[[], T]) -> T:
    try:
        return act()
    except StudioError as error:
        reason = error.message
    except SQLAlchemyError as error:
        reason = f"There is no studio here, or its database does not answer: {error.args[0]}"
    notes.print(reason, style="red", highlight=False, markup=False)
    raise typer.Exit(2)


def main() -> None:
    """The `studio` command."""
    cli()
