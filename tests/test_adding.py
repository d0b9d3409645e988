"""`studio add`: what is understood, what is added and said, and when it ends."""

import contextlib
import json
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from app import database, experiments, naming, queue, tuning
from app.cli import cli
from app.tables import Experiment, Run
from tests import factories
from tests.test_explorer import FIGURES, SCORED


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A tuner that ends what waits, in this state, as soon as the bell rings."""
    ends = {"state": "succeeded"}

    def ring(_name: str) -> None:
        with database.session() as db:
            db.execute(update(Run).where(Run.state == "queued").values(finished_at=1.0, **ends))
            db.commit()

    monkeypatch.setattr(tuning, "studio", lambda notes: contextlib.nullcontext())
    monkeypatch.setattr(queue, "ring", ring)
    return ends


@pytest.fixture
def of(db: Session) -> Experiment:
    """An experiment with one LoRA run that has ended, and one that a person has put aside."""
    of = factories.experiment(db, name="Which way", seed=7)
    factories.tuned(db, of, id="a" * 12, scores=SCORED, figures=FIGURES)
    factories.run(db, of, method="full", state="paused")
    return of


def _add(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["add", *arguments])


def _names(db: Session, of: Experiment) -> list[str]:
    db.rollback()
    return sorted(naming.names(experiments.get(db, of.id).runs).values())


def test_a_copy_with_other_settings(db: Session, of: Experiment) -> None:
    done = _add(of.id, "--copy", "a" * 12, "--set", "rank=8", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    [new] = [run for run in experiments.get(db, of.id).runs if run.id in told["started"]]
    assert (new.copied_from, new.params["rank"]) == ("a" * 12, 8)
    assert {row["label"] for row in told["rows"]} >= {"LoRA · rank 8", "LoRA · rank 16"}
    assert told["succeeded"]  # although another run is put aside
    assert f"Added run {new.id}. LoRA · rank 8" in done.stderr
    db.rollback()  # a session that has read holds up who writes
    by_name = _add("Which way", "--copy", "LoRA · rank 8", "--set", "lora.rank=4")
    assert by_name.exit_code == 0, by_name.output
    assert "rank 4" in by_name.stdout
    assert _names(db, of) == ["Full fine tuning", *(f"LoRA · rank {n}" for n in (16, 4, 8))]


def test_a_method_over_several_seeds_and_values(db: Session, of: Experiment) -> None:
    seeds = _add(of.id, "--method", "lora", "--seeds", "3")
    assert seeds.exit_code == 0, seeds.output
    assert "Is there already: LoRA · seed 7" in seeds.stderr
    assert [f"LoRA · seed {n}" in seeds.stderr for n in (8, 9, 10)] == [True, True, False]
    sweep = _add(
        of.id, "--method", "prompt_tuning", "--vary", "prompt_tuning.learning_rate=0.001, 0.01"
    )
    assert sweep.exit_code == 0, sweep.output
    found = [name for name in _names(db, of) if name.startswith("Prompt")]
    assert found == [f"Prompt tuning · learning rate {n}" for n in ("0.001", "0.01")]


def test_a_run_that_did_not_succeed_is_said_by_the_exit_code(
    db: Session, of: Experiment, state: dict[str, str]
) -> None:
    state |= {"state": "failed", "error": "No memory."}
    done = _add(of.id, "--method", "qlora", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["errors"] == {"QLoRA": "No memory."}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "rank=8"], "Say --method, or with --copy which run"),
        (["--method", "lora", "--copy", "a" * 12], "Say --method, or with --copy which run"),
        (["--method", "magic"], "magic"),
        (["--copy", "LoRA · rank 99"], "The run to copy is not in this experiment."),
        (["--method", "lora", "--set", "rank"], "--set rank: write parameter=value"),
        (["--method", "lora", "--set", "rank=0"], "LoRA: Rank"),
        (["--method", "lora", "--set", "qlora.rank=8"], "qlora is not trained here; lora would be"),
        (["--method", "lora", "--set", "color=1"], "there is no parameter color. There are"),
        (["--method", "lora", "--set", "seed=x", "--seeds", "2"], "--set seed=x: give a whole"),
        (["--method", "lora", "--vary", "rank"], "Give 1 to 10 values"),
        (["--method", "lora", "--vary", "color=1"], "color cannot be varied"),
        (["--method", "lora", "--vary", "rank=1", "--seeds", "2"], "Say --vary or --seeds"),
        (["--method", "lora"], "just these settings already"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_starts(
    db: Session, of: Experiment, arguments: list[str], words: str
) -> None:
    done = _add(of.id, *arguments)
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.split())
    assert len(_names(db, of)) == 2


def test_an_experiment_is_found_by_a_name_that_only_it_has(db: Session, of: Experiment) -> None:
    assert "There is no experiment Nothing." in _add("Nothing", "--method", "lora").stderr
    factories.experiment(db, name="Which way")
    told = " ".join(_add("Which way", "--method", "qlora").stderr.split())
    assert "2 experiments are called Which way. Give the id of one." in told
