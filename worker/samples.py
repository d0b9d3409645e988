"""Answers the inputs that an experiment watches while its run learns, without touching what it learns."""

import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from app import database, files, prompts, samples
from app.examples import Example
from app.points import Measured
from worker import answering, backbones
from worker.checkpoints import State
from worker.job import Job
from worker.material import longest_answer

MOST_TOKENS = 64
SHARE = 0.03  # of the training time that answering may take, beside the first and the last time
FREE_SECONDS = 2.0  # that it may take in any case


class Samples:
    """Answers at step 0 and after each look at the validation loss, as long as it costs little."""

    def __init__(self, job: Job, model: Any, soft_prefix: Tensor | None, state: State) -> None:
        self.job, self.model, self.soft_prefix, self.state = job, model, soft_prefix, state
        self.begun = state.seconds
        self.spent = self.took = 0.0  # seconds: beside the first time; the last time
        self.told = False

    def beside(self, going: Any) -> Iterator[Any]:
        """The training as it is; after what it gives is recorded, the answers of that moment."""
        if not self.job.run.experiment.watch:
            yield from going
            return
        if self.job.group.size > 1:  # the others would wait
            self.job.tell("The inputs to watch are not answered: several devices share the run.")
            yield from going
            return
        try:
            if self._is_missing():
                self._answer()
            for item in going:
                yield item
                if isinstance(item, Measured) and item.kind == "validation":
                    self._answer_if_cheap()
        finally:
            going.close()

    def _is_missing(self) -> bool:
        """Whether there is no answer of where the training begins, and it is a place for one."""
        run, step = self.job.run, self.state.step
        if step != max(0, self.state.looked):
            return False
        return not database.lasting(
            lambda db: samples.has(db, run.id, step), opened=database.reading
        )

    def _answer_if_cheap(self) -> None:
        allowed = FREE_SECONDS + SHARE * (self.state.seconds - self.begun)
        is_last = self.state.step >= (self.job.run.num_steps or 0)
        if is_last or self.spent + self.took <= allowed:
            self._answer()
            self.spent += self.took
        elif not self.told:
            self.told = True
            self.job.tell(
                f"The inputs to watch were not answered at step {self.state.step}: that takes "
                f"{self.took:.1f} s, more than {SHARE:.0%} of the training so far. They are answered less often, "
                "and after the last step."
            )

    def _answer(self) -> None:
        """Answer all of them, and store that."""
        run, step, started = self.job.run, self.state.step, time.monotonic()
        texts = self._texts()
        database.lasting(lambda db: samples.record(db, run.id, run.attempt, step, texts))
        self.took = time.monotonic() - started

    def _texts(self) -> list[str]:
        job = self.job
        experiment = job.run.experiment
        formatter = prompts.formatter(files.base_model(experiment.base_model_id))
        virtual = backbones.num_virtual(self.soft_prefix)
        ids = [
            formatter.row(
                experiment.template,
                experiment.labels,
                Example(input, ""),
                job.params.max_length,
                virtual,
            ).prompt_ids
            for input in experiment.watch
        ]
        most = min(MOST_TOKENS, longest_answer(experiment, job.material))
        with backbones.compute(job.machine):
            return answering.texts(
                job, self.model, self.soft_prefix, ids, most, lambda _: job.watch.check()
            )
