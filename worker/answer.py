"""The resident process that answers prompts: it keeps the models it has loaded."""

import logging
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from app import completions, database, files, methods, processes, prompts, tuned_models, workers
from app.errors import StudioError
from app.tables import Completion
from worker import backbones, generate, hardware

WRITE_SECONDS = 0.05  # text is stored, and so shown, this often
MOST_LOADED = 8  # tuned models kept; adapters share the weights of their base

log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A model ready to be prompted, and the prompt vector of those that have one."""

    model: Any
    soft_prefix: torch.Tensor | None


class Models:
    """Base models and tuned models in memory; the longest unused tuned one goes first."""

    def __init__(self, machine: hardware.Hardware) -> None:
        self.machine = machine
        self.bases: dict[tuple[str, str], Any] = {}
        self.tuned: dict[str, Loaded] = {}

    def get(self, completion: Completion) -> Loaded:
        """The completion's model. Raises NotFound if it was deleted meanwhile."""
        if completion.run_id is None:
            plain = methods.Method()
            return Loaded(self._base(completion.base_model_id, plain, None), None)
        found = self.tuned.pop(completion.run_id, None) or self._load(completion.run_id)
        self.tuned[completion.run_id] = found
        while len(self.tuned) > MOST_LOADED:
            del self.tuned[next(iter(self.tuned))]
        return found

    def _load(self, run_id: str) -> Loaded:
        with database.reading() as db:
            run = tuned_models.get(db, run_id)
        method = methods.get(run.method)
        params = method.schema.model_validate(run.params)
        base_id = run.experiment.base_model_id
        base = self._base(base_id, method, params) if method.frozen_base else None
        return Loaded(
            *backbones.load_tuned(
                method,
                params,
                files.base_model(base_id),
                files.tuned_model(run_id, run.attempt),
                self.machine,
                base=base if base is None else backbones.share(base),
            )
        )

    def _base(self, base_id: str, method: methods.Method, params: Any) -> Any:
        """One copy for each way of holding the weights: as they are, or quantized."""
        key = (base_id, repr(method.load_options(params, self.machine.dtype)))
        if key not in self.bases:
            folder = files.base_model(base_id)
            self.bases[key] = backbones.load_base(method, params, folder, self.machine)
        return self.bases[key]


class Answer:
    """One completion being written."""

    def __init__(self, completion: Completion, formatter: prompts.Formatter) -> None:
        self.completion = completion
        self.formatter = formatter
        self.ids: list[int] = []
        self.began = time.monotonic()
        self.first: float | None = None
        self.written = 0.0

    def add(self, token: int) -> bool:
        """Take a token, store the text now and then; whether to go on."""
        self.ids.append(token)
        now = time.monotonic()
        self.first = self.first or now
        if now - self.written < WRITE_SECONDS:
            return True
        self.written = now
        return self.store()

    def store(self) -> bool:
        """Store the text so far with its speed; whether to go on."""
        first = self.first or time.monotonic()
        after = len(self.ids) - 1
        passed = time.monotonic() - first
        with database.session() as db:
            return completions.write(
                db,
                self.completion,
                # A character may take several tokens: what is not whole yet waits.
                text=self.formatter.decode(self.ids).rstrip("\ufffd"),
                num_tokens=len(self.ids),
                first_token_seconds=first - self.began,
                tokens_per_second=after / passed if after > 0 and passed > 0 else None,
            )


def answer(asked: list[Completion], models: Models) -> None:
    """Write all answers of an ask side by side, a token of each in turn."""
    streams = []
    for completion in asked:
        try:
            streams.append(_write(*_begin(completion, models)))
        except Exception as error:
            _fail(completion, error)
    for _ in generate.interleave(streams):
        pass  # each stream stores what it gives


def _write(one: Answer, tokens: Iterator[int]) -> Iterator[int]:
    """Pass the tokens on, storing them; a stream that fails does not stop those beside it."""
    try:
        for token in tokens:
            yield token
            if not one.add(token):
                break
        one.store()
    except Exception as error:
        _fail(one.completion, error)
        return
    with database.session() as db:
        completions.end(db, one.completion)


def _begin(completion: Completion, models: Models) -> tuple[Answer, Iterator[int]]:
    loaded = models.get(completion)
    formatter = prompts.formatter(files.base_model(completion.base_model_id))
    settings = completion.settings
    ids = formatter.prompt_ids(completion.template, completion.input, settings["labels"])
    stream = generate.stream(
        loaded.model,
        loaded.soft_prefix,
        ids,
        formatter.stop_ids,
        temperature=settings["temperature"],
        max_tokens=settings["max_tokens"],
        seed=settings["seed"],
    )
    return Answer(completion, formatter), stream


def _fail(completion: Completion, error: Exception) -> None:
    log.error("Completion %s failed.", completion.id, exc_info=error)
    if isinstance(error, StudioError):
        message = error.message
    elif isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        message = "The machine has no memory left for this model. Prompt fewer models at once."
    else:
        message = f"The model could not answer ({type(error).__name__}: {error})."
    with database.session() as db:
        completions.end(db, completion, message)


def main() -> None:
    """Answer what is asked, whenever the keeper writes a line; end with its pipe."""
    processes.die_with_parent(signal.SIGKILL)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    worker = sys.argv[1]
    machine = hardware.find()
    with database.session() as db:
        workers.describe(db, worker, machine.name, machine.memory_mb, hardware.num_devices())
    models = Models(machine)
    for _line in sys.stdin:
        while True:
            with database.session() as db:
                asked = completions.claim_ask(db, worker)
            if not asked:
                break
            answer(asked, models)


if __name__ == "__main__":
    main()
