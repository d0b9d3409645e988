"""The command line: `studio up | web | worker | tune | migrate | publish | alive`."""

import json
import os
import socket
import sys
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from app import base_models, database, holdings, supervisor, tuning, workers
from app import migrate as migrations
from app.errors import StudioError
from app.settings import settings

cli = typer.Typer(add_completion=False, no_args_is_help=True, help="Tuning Studio.")
notes = Console(stderr=True)  # what is said; results alone go to standard output


class Kind(StrEnum):
    """The kinds of workers."""

    tuner = "tuner"
    generator = "generator"


@cli.command()
def up() -> None:
    """Start the whole studio here: broker, web, one tuning and one generating worker."""
    raise typer.Exit(supervisor.up(lambda text: notes.print(text, highlight=False, soft_wrap=True)))


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


@cli.command()
def tune(
    data: Annotated[str, typer.Argument(help="JSON, JSONL or CSV file with input and output.")],
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = (
        "prompt_tuning,lora,qlora,full"
    ),
    base: Annotated[
        str, typer.Option(help="Base model: name or id; the default one if empty.")
    ] = "",
    task: Annotated[str, typer.Option(help="Task; found from the data if empty.")] = "",
    template: Annotated[str, typer.Option(help="Template with {{input}}.")] = "",
    name: Annotated[str, typer.Option(help="Name of the experiment.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of split and training.")] = 1,
    set: Annotated[
        list[str] | None, typer.Option(help="A parameter, such as lora.rank=8; repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Tune DATA by several methods and print the comparison. Exit code 0: every run succeeded."""
    try:
        question = tuning.Question(data, methods, base, task, template, name, seed, set or [])
        result = tuning.tune(question, notes)
    except StudioError as error:
        notes.print(error.message, style="red", highlight=False, markup=False)
        raise typer.Exit(2) from None
    if as_json:
        print(json.dumps(result.as_dict(), ensure_ascii=False, indent=2))
    else:
        Console().print(result.table())
    raise typer.Exit(0 if result.succeeded else 1)


def main() -> None:
    """The `studio` command."""
    cli()
