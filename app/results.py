"""What came of an experiment, as `studio tune` and `studio add` print it: for a terminal and for programs."""

from collections.abc import Callable
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from app import overlap, units
from app.comparison import figures, scores
from app.tables import Experiment


class Result(NamedTuple):
    """The finished experiment and its comparison."""

    experiment: Experiment
    comparison: figures.Comparison
    started: list[str]  # the runs that were asked for

    @property
    def succeeded(self) -> bool:
        """Whether each run that was asked for did."""
        mine = {run.id: run.state for run in self.experiment.runs}
        return all(mine.get(run_id) == "succeeded" for run_id in self.started)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = self.comparison.labels
        return {
            "experiment": self.experiment.id,
            "name": self.experiment.name,
            "succeeded": self.succeeded,
            "started": self.started,
            "errors": {names[run.id]: run.error for run in self.experiment.runs if run.error},
            **figures.as_dict(self.comparison),
        }

    def table(self) -> Table:
        """For a terminal of 80 columns or more: only the names of the runs are ever folded."""
        made = Table(title=f"{self.experiment.name}: {self.comparison.num_test} test examples")
        made.box, made.show_edge, made.padding = SIMPLE_HEAD, False, (0, 1, 0, 0)
        made.add_column("", overflow="fold")
        score = scores.METRICS[self.experiment.task][self.comparison.metric]
        for column in (score, "Valid.\nloss", "Time", "Peak\nmemory", "Trained", "Saved"):
            made.add_column(column, justify="right", no_wrap=True, vertical="top")
        for row in self.comparison.rows:
            made.add_row(*_cells(row))
        said = [overlap.words(self.comparison.num_trained_on, self.comparison.num_test)]
        if self.comparison.majority is not None:
            said.insert(0, f"Always the commonest label: {_percent(self.comparison.majority)}")
        made.caption = "\n".join(filter(None, said))
        return made


def _cells(row: figures.Row) -> list[str]:
    """The score with its 95 % interval below; the state below the name of what did not succeed."""
    state = "" if row.state in {"", "succeeded"} else f"\n{row.state}"
    within = (
        f"\n{100 * row.interval.low:.1f} to {100 * row.interval.high:.1f}" if row.interval else ""
    )
    return [
        row.label + state,
        _shown(row.score, _percent) + within,
        _shown(row.validation_loss, "{:.4f}".format),
        _shown(row.train_seconds, units.duration),
        _shown(row.peak_memory_mb, units.memory),
        _shown(row.trainable, _count),
        _shown(row.size_bytes, units.size),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _count(number: int) -> str:
    """In steps of 1000, as bytes are told: 1.2 M."""
    return units.size(number).removesuffix("B").strip()


def _shown(value: float | None, words: Callable[[Any], str]) -> str:
    return "-" if value is None else words(value)
