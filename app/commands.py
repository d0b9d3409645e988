"""The commands that tune and wait for what comes of it: `studio tune`, `studio add`."""

import json
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console

from app import adding, tuning
from app.errors import StudioError
from app.results import Result

notes = Console(stderr=True)  # what is said; results alone go to standard output

Override = Annotated[
    bool, typer.Option(help="Start what fits no tuning worker that is alive, too.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")]


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
        list[str] | None,
        typer.Option(
            help="A parameter, such as rank=8, or lora.rank=8 for one method; repeatable."
        ),
    ] = None,
    watch: Annotated[
        list[str] | None, typer.Option(help="An input to answer while the runs learn; repeatable.")
    ] = None,
    input_column: Annotated[
        str, typer.Option(help="What DATA calls its inputs, if that is none of the usual names.")
    ] = "",
    output_column: Annotated[str, typer.Option(help="What it calls its outputs.")] = "",
    override: Override = False,
    as_json: AsJson = False,
) -> None:
    """Tune DATA by several methods and print the comparison. Exit code 0: every run succeeded."""
    asked = (data, methods, base, task, template, name, seed, set or [], override)
    question = tuning.Question(*asked, tuple(watch or ()), (input_column, output_column))
    _show(lambda: tuning.tune(question, notes), as_json)


def add(
    experiment: Annotated[str, typer.Argument(help="The experiment's id, or its name.")],
    method: Annotated[str, typer.Option(help="The method of the new runs.")] = "",
    copy: Annotated[
        str, typer.Option(help="Or a run to copy, with all its settings: its id, or its name.")
    ] = "",
    set: Annotated[
        list[str] | None, typer.Option(help="A parameter, such as rank=8; repeatable.")
    ] = None,
    vary: Annotated[
        str, typer.Option(help="A run for each value of a parameter, such as rank=4,8,16.")
    ] = "",
    seeds: Annotated[
        int, typer.Option(min=0, help="A run for each of so many seeds, the first its own.")
    ] = 0,
    override: Override = False,
    as_json: AsJson = False,
) -> None:
    """Add runs to EXPERIMENT and print the comparison. Exit code 0: each run added succeeded."""
    wish = adding.Wish(experiment, method, copy, set or [], vary, seeds, override)
    _show(lambda: adding.add(wish, notes), as_json)


def _show(act: Callable[[], Result], as_json: bool) -> None:
    try:
        result = act()
    except StudioError as error:
        notes.print(error.message, style="red", highlight=False, markup=False)
        raise typer.Exit(2) from None
    if as_json:
        print(json.dumps(result.as_dict(), ensure_ascii=False, indent=2))
    else:
        Console().print(result.table())
    raise typer.Exit(0 if result.succeeded else 1)
