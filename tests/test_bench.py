"""The benchmark's parts: the same tokens for both sides, arithmetic by hand, and what it writes."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from app import pace
from app.storage import REPOSITORY
from benchmarks import cases, gemm, growth, measures, peer, report, studio
from benchmarks.bench import Failed, Pair, measured
from benchmarks.cases import Case, Job
from tests.engine import MACHINE, rows
from worker import packing, prepare
from worker.packing import Row


def tiny_job(folder: Path, method: str, **more: Any) -> Job:
    params = cases.params(method, 512) | {"batch_size": 8}
    if method == "prompt_tuning":
        params["num_virtual_tokens"] = 6
    return Job(method, params, 3, str(folder), rows(24), rows(9), **more)


# --- Both sides get the same ------------------------------------------------------------------


def test_a_job_is_read_as_it_was_written(tiny_model: Path, tmp_path: Path) -> None:
    made = tiny_job(tiny_model, "lora", checkpointing=True)
    made.write(tmp_path / "job")
    assert cases.read(tmp_path / "job") == made


def test_the_peer_gets_the_studios_tokens_in_the_studios_order(tiny_model: Path) -> None:
    made = tiny_job(tiny_model, "lora")
    order = packing.order(24, 3, 0)
    assert order != list(range(24))
    given = peer.dataset(made)
    for one, index in zip(given, order, strict=True):
        row = made.train[index]
        assert one["input_ids"] == [*row.prompt_ids, *row.answer_ids]
        learned = [
            id
            for id, counts in zip(one["input_ids"], one["completion_mask"], strict=True)
            if counts
        ]
        assert learned == [*row.answer_ids]


def test_a_shorter_job_has_the_longest_example_of_two_steps(tiny_model: Path) -> None:
    made = tiny_job(tiny_model, "lora")
    short = made.shorter()
    assert len(short.train) == 16
    assert cases.lengths(short.train)["longest"] == cases.lengths(made.train)["longest"]
    assert all(row in made.train for row in short.train)


def test_the_peers_schedule_is_the_studios(tiny_model: Path) -> None:
    made = tiny_job(tiny_model, "lora")
    factor = peer.schedule(made)
    for step in range(3):
        assert factor(step) * made.settings.learning_rate == pytest.approx(
            pace.rate(step + 1, 3, made.settings)
        )


def test_examples_end_their_turn_and_share_the_template(tiny_model: Path, tmp_path: Path) -> None:
    """Tokens come from the studio's own formatter, end of turn included."""
    text = "".join(f"where is card {number},card_arrival\r\n" for number in range(200))
    (tmp_path / "banking77").mkdir()
    (tmp_path / "banking77" / "train.csv").write_text("text,category\r\n" + text, newline="")
    made = cases.job(Case("banking77", "lora"), 1, tiny_model, tmp_path)
    assert (len(made.train), len(made.held_out)) == (cases.TRAINED, cases.TRAINED)
    assert {row.answer_ids[-1] for row in made.train} == {2}  # <|im_end|>
    template = len("Name the intent of the message.\n\nMessage: where is card ")
    assert cases.lengths(made.train)["shared"] > template
    held_out = {tuple(row.prompt_ids) for row in made.held_out}
    assert held_out.isdisjoint(tuple(row.prompt_ids) for row in made.train)


def test_cases_are_chosen_by_name() -> None:
    assert len(cases.chosen("")) == 16
    assert cases.chosen("banking77/lora") == [Case("banking77", "lora")]
    assert {case.method for case in cases.chosen("mts-dialog")} == set(cases.CHANGES)
    with pytest.raises(SystemExit, match="no case 'nothing'"):
        cases.chosen("nothing")


# --- What is measured -------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora", "prompt_tuning"])
def test_the_studios_side_measures_a_training(tiny_model: Path, method: str) -> None:
    shapes = prepare.measure(tiny_model)
    made = tiny_job(tiny_model, method, measure_products=True, shapes=shapes)
    found = studio.measure(made)
    assert len(found["seconds"]) == len(found["losses"]) == 3
    assert found["peak_mb"] >= found["loaded_mb"] > 0
    assert found["examples_per_second"] == pytest.approx(16 / sum(found["seconds"][1:]))
    assert 0 < found["held_out"] < 10
    assert found["gemm"]["share"] > 0
    assert found["obstacle"] == ""


@pytest.mark.faults  # half a minute of starting processes
def test_each_measurement_is_a_process_of_its_own(tiny_model: Path) -> None:
    found = measured("benchmarks.studio", tiny_job(tiny_model, "lora"))
    assert len(found["losses"]) == 3
    with pytest.raises(Failed, match="exit code 1:\n"):
        measured("benchmarks.studio", tiny_job(Path("no-such-folder"), "lora"))


def test_the_peak_begins_anew() -> None:
    block = bytearray(os.urandom(1) * 200_000_000)
    high = measures.status_mb("VmHWM")
    del block
    assert measures.forget_peak() < high - 100
    assert measures.status_mb("VmHWM") < high - 100


needs_peer = pytest.mark.skipif(
    not peer.installed(), reason="not run: make bench's peers are not installed"
)


@needs_peer
@pytest.mark.parametrize("method", ["full", "lora", "prompt_tuning"])
def test_both_sides_start_alike_and_learn_alike(tiny_model: Path, method: str) -> None:
    made = tiny_job(tiny_model, method)
    if "dropout" in made.params:
        made.params["dropout"] = 0.0
    ours, theirs = studio.measure(made), peer.measure(made)
    assert ours["start"] == theirs["start"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=0.02)
    assert ours["held_out"] == pytest.approx(theirs["held_out"], rel=0.01)


def test_the_peer_is_an_extra_alone() -> None:
    lock = (REPOSITORY / "requirements.lock").read_text()
    assert "trl==" not in lock
    assert "datasets==" not in lock


# --- The share of matrix products, counted by hand ---------------------------------------------

# Three shared tokens, then two and one of each example's own; the last of an answer is not read.
PAIR = [Row([1, 2, 3, 4], [5, 6]), Row([1, 2, 3, 7], [8])]
SHAPES = {
    "linear": {"q_proj": [4, 6, 2]},
    "hidden": 4,
    "vocabulary": 10,
    "layers": 2,
    "heads": 3,
    "head_dim": 2,
}


def test_each_distinct_token_counts_once() -> None:
    # Within the prefix 1 + 2 + 3 pairs; the first example's two tokens see 4 and 5, the other's 4.
    assert gemm.work(PAIR, 0) == gemm.Work(tokens=6, targets=3, pairs=6 + 9 + 4)
    # With two virtual tokens: 5 * 6 / 2 within the prefix, then 6 + 7 and 6.
    assert gemm.work(PAIR, 2) == gemm.Work(tokens=8, targets=3, pairs=15 + 13 + 6)


def test_products_of_a_step() -> None:
    step = gemm.work(PAIR, 0)
    frozen = sum(one.operations for one in gemm.products(SHAPES, [], 0, False, step))
    # A layer of 4 x 6, twice in the model, forward and back; and the output layer on the targets.
    assert frozen == 2 * (2 * 6 * 4 * 6) * 2 + 2 * (2 * 3 * 4 * 10)
    whole = sum(one.operations for one in gemm.products(SHAPES, [], 0, True, step))
    assert whole == frozen * 3 / 2
    adapted = sum(one.operations for one in gemm.products(SHAPES, [[4, 6, 2]], 5, False, step))
    assert adapted == frozen + 3 * 2 * (2 * 6 * 4 * 5 + 2 * 6 * 5 * 6)
    # Scores and values, 6 wide over all heads, in two layers; the way back is twice the way there.
    assert gemm.attention(SHAPES, step) == 3 * 2 * (2 * 2 * 6) * 19


def test_the_rate_is_of_the_products_alone() -> None:
    rate = gemm.measured_rate([gemm.Product(64, 64, 64, 3)], MACHINE)
    assert 1e6 < rate < 1e14


# --- What is written --------------------------------------------------------------------------


def side(speed: float, peak: float, held_out: float) -> dict[str, Any]:
    return {
        "examples_per_second": speed,
        "examples_per_core_second": speed / 2,
        "peak_mb": peak,
        "losses": [3.0, 2.0],
        "held_out": held_out,
        "gemm": {"share": 0.5},
    }


PAIRS = [
    Pair(side(6, 900, 1.0), side(1, 4000, 1.1), side(0.8, 2500, 1.1)),
    Pair(side(8, 1000, 1.2), side(2, 4100, 1.1), None),
    Pair(side(7, 950, 1.1), side(1.5, 4050, 1.1), None),
]


def test_an_entry_compares_with_the_faster_and_with_the_leaner_row(tiny_model: Path) -> None:
    made = report.entry(Case("banking77", "lora"), tiny_job(tiny_model, "lora"), PAIRS, "trl 1")
    assert made["examples_per_second"] == {
        "studio": 7,
        "peer": 1.5,
        "ratio": pytest.approx(7 / 1.5),
    }
    assert made["peak_memory_mb"] == {"studio": 1000, "peer": 2500, "ratio": 0.4}
    assert made["heldout_loss"]["ratio"] == pytest.approx(1.0)
    assert made["final_train_loss"]["peer"] == 2.0
    assert made["gemm_share"] == 0.5
    assert made["pairs"] == [6, 4, pytest.approx(7 / 1.5)]
    assert {"data", "method", "peer", "machine", "measured_at"} <= set(made)


def test_results_are_merged_and_shown(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "latest.json"
    job = tiny_job(tiny_model, "lora")
    one = report.entry(Case("banking77", "lora"), job, PAIRS, "trl 1")
    two = report.entry(Case("mts-dialog", "lora"), job, PAIRS[:1], "trl 1")
    for made in (one, two, one | {"gemm_share": 0.25}):
        report.merge(out, "cases", [made])
    told = {"data": "banking77", "method": "lora", "memory_mb": 100, "forecast_memory_mb": 110}
    report.merge(out, "forecasts", [told | {"seconds": 10.0, "forecast_seconds": 8.0}])
    report.merge(out, "start", [{"data": "banking77", "method": "lora", "seconds": [3.14]}])
    grown = {"what": "batch", "value": 8, "tokens": 500, "seconds": 1.0, "peak_mb": 900.0}
    report.merge(out, "growth", [grown])
    found = json.loads(out.read_text())
    assert [entry["gemm_share"] for entry in found["cases"]] == [0.25, 0.5]
    shown = report.tables(found)
    assert "### LoRA" in shown
    assert "4.7 (6)" in shown  # the ratio, and what the project wants
    assert "6.0 (2)" in shown
    assert "+10 %" in shown
    assert "-20 %" in shown
    assert "3.1 s on a warm worker" in shown
    assert "2.00" in shown  # milliseconds for each token


def test_growth_changes_one_thing_at_a_time() -> None:
    for point in growth.POINTS:
        made = growth.job(point, "nowhere")
        assert len(made.train) == point.rows
        assert packing.shared_prefix(made.train) == point.prefix
        assert {len(row.prompt_ids) for row in made.train} == {point.prefix + point.own}
        assert len(made.train) >= 2 * point.batch  # one step is not counted
