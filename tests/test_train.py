"""The training loop: what it measures, that it learns, stops, goes on exactly and gives up."""

import itertools
from pathlib import Path

import pytest
import torch

from app import methods, pace
from app.errors import StudioError
from app.points import Measured
from tests import engine, tiny
from tests.engine import MACHINE, NARROW, Setup, Tight, same
from worker import checkpoints, hardware, train
from worker.packing import Row


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers are far from even, so that a prompt vector can steer it."""
    return tiny.model(tmp_path_factory.mktemp("train"), initializer_range=0.15)


def only(kind: str, points: list[Measured]) -> list[Measured]:
    return [point for point in points if point.kind == kind]


@pytest.mark.parametrize("key", methods.METHODS)
def test_the_loss_falls(folder: Path, key: str) -> None:
    setup = Setup(folder, key, num_epochs=8)
    points = setup.points(look_first=True)
    losses = [point.loss or 0.0 for point in only("train", points)]
    looks = [point.loss or 0.0 for point in only("validation", points)]
    assert losses[-1] < 0.75 * losses[0]
    assert looks[-1] < 0.75 * looks[0]
    assert setup.state.best_loss == min(looks[1:])
    assert looks.index(min(looks[1:])) == only("validation", points).index(
        next(
            point
            for point in points
            if point.step == setup.state.best_step and point.kind == "validation"
        )
    )


def test_a_point_for_every_step_says_what_was_measured(folder: Path) -> None:
    setup = Setup(folder, "lora", batch_size=5, accumulate_steps=2, num_epochs=2)
    points = only("train", setup.points())
    assert [point.step for point in points] == [1, 2, 3, 4, 5, 6]  # 24 examples by 10
    assert [point.epoch for point in points] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    every = sum(len(row.prompt_ids) + len(row.answer_ids) for row in engine.rows())
    assert points[2].tokens == every
    assert points[5].tokens == 2 * every
    for before, point in itertools.pairwise(points):
        assert point.seconds > before.seconds
    for point in points:
        assert point.grad_norm is not None
        assert point.grad_norm > 0
        assert point.tokens_per_second is not None
        assert point.tokens_per_second > 0
        assert point.memory_mb is not None
        assert point.memory_mb > 50


def test_the_first_loss_is_that_of_the_untrained_model(folder: Path) -> None:
    setup = Setup(folder, "full", batch_size=16, accumulate_steps=2)
    row_losses = []
    for row in engine.rows():
        ids = torch.tensor([[*row.prompt_ids, *row.answer_ids]])
        labels = ids.clone()
        labels[0, : len(row.prompt_ids)] = -100
        with torch.no_grad():
            row_losses.append(float(setup.model(input_ids=ids, labels=labels).loss))
    first = setup.points()[0]
    assert first.loss == pytest.approx(sum(row_losses) / len(row_losses), rel=1e-5)


def test_batches_gathered_are_one_larger_batch(folder: Path) -> None:
    whole = Setup(folder, "full", batch_size=12, num_epochs=2)
    parts = Setup(folder, "full", batch_size=3, accumulate_steps=4, num_epochs=2)
    assert [p.loss for p in whole.points()] == [p.loss for p in parts.points()]
    assert same(whole.values(), parts.values())


def test_small_rows_train_like_one_large_row(folder: Path) -> None:
    large = Setup(folder, "full", num_epochs=2)
    small = Setup(folder, "full", num_epochs=2, machine=Tight(*MACHINE))
    ticks = [item for item in small.going() if isinstance(item, train.Tick)]
    assert max(tick.total for tick in ticks if tick.doing == "training") > 1
    large.points()
    assert small.state.best_loss == pytest.approx(large.state.best_loss, rel=1e-4)


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    params = methods.get("lora").schema(learning_rate=1e-3, warmup_share=0.1)
    rates = [pace.rate(step, 100, params) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([1e-4 * step for step in range(1, 11)])
    assert rates[10] == 1e-3
    assert all(after < before for before, after in itertools.pairwise(rates[10:]))
    assert 0 < rates[-1] < 1e-6
    none = params.model_copy(update={"warmup_share": 0.0})
    assert pace.rate(1, 100, none) == 1e-3


def test_looks_at_the_validation_loss(folder: Path) -> None:
    params = methods.get("lora").schema()
    assert pace.looks(100, params) == {10, 20, 30, 40, 50, 60, 70, 80, 90, 100}
    assert pace.looks(4, params) == {1, 2, 3, 4}
    assert len(pace.looks(37, params)) == 10
    assert 37 in pace.looks(37, params)
    each_third = params.model_copy(update={"validation_interval": 3})
    assert pace.looks(7, each_third) == {3, 6, 7}
    setup = Setup(folder, "lora", validation_interval=4, num_epochs=2)
    points = setup.points(look_first=True)
    assert [point.step for point in only("validation", points)] == [0, 4, 6]


def test_a_score_tells_the_best_state_and_the_loss_where_scores_are_equal(folder: Path) -> None:
    setup = Setup(folder, "lora", validation_interval=1, num_epochs=3, patience=2)
    scores = iter([0.5, 0.9, 0.9, 0.7, 0.8])
    points = only("validation", setup.points(score=lambda: next(scores)))
    losses = [point.loss or 0.0 for point in points]
    assert losses == sorted(losses, reverse=True)  # by the loss the last one would be the best
    assert len(losses) == 5  # two looks without a better score end it
    state = setup.state
    assert (state.best_step, state.best_score, state.best_loss) == (3, 0.9, losses[2])


@pytest.mark.parametrize("machine", [MACHINE, NARROW], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("key", methods.METHODS)
def test_a_resumed_run_is_the_same_bit_for_bit(
    folder: Path, tmp_path: Path, key: str, machine: hardware.Hardware
) -> None:
    changes = {"num_epochs": 3, "batch_size": 5, "weight_decay": 0.1}
    through = Setup(folder, key, machine, **changes)
    expected = through.points()

    broken = Setup(folder, key, machine, **changes)
    seen: list[Measured] = []
    for item in broken.going():
        if isinstance(item, Measured):
            seen.append(item)
        elif broken.state.step == 7 and item.doing == "training":
            made = checkpoints.write(tmp_path / "c", broken.state)  # in the middle of step 8
            break
    torch.manual_seed(99)
    resumed = Setup(folder, key, machine, seed=3, **changes)
    found = checkpoints.Found(7, 1, tmp_path / "c", made.digest)
    assert checkpoints.load([found], resumed.state) == checkpoints.Loaded(found, [])
    seen += resumed.points()

    def told(points: list[Measured]) -> list[tuple[object, ...]]:
        return [(p.kind, p.step, p.loss, p.grad_norm, p.learning_rate, p.tokens) for p in points]

    assert told(seen) == told(expected)
    assert same(resumed.values(), through.values())
    assert resumed.state.numbers()["best_loss"] == through.state.best_loss


def test_dropout_differs_from_step_to_step_and_by_seed(folder: Path) -> None:
    def losses(seed: int) -> list[float | None]:
        setup = Setup(folder, "lora", seed=seed, dropout=0.5, num_epochs=1, batch_size=4)
        torch.manual_seed(11)
        for name, value in setup.state.trained.items():
            if "lora_B" in name:
                value.data.normal_()
        examples = [engine.rows()[0]] * 8  # the same text in both steps
        setup.params = setup.params.model_copy(update={"learning_rate": 1e-5})
        return [point.loss for point in only("train", setup.points(examples=examples))]

    first, second = losses(1)
    assert first != pytest.approx(second, rel=1e-4)
    assert losses(1) == [first, second]
    assert losses(2)[0] != pytest.approx(first, rel=1e-4)


def test_stopping_in_the_middle_of_a_step_leaves_the_last_complete_one(folder: Path) -> None:
    setup = Setup(folder, "full", machine=Tight(*MACHINE), num_epochs=2)
    going = setup.going()
    for item in going:
        if isinstance(item, Measured) and item.step == 2:
            break
    before, moments = setup.values(), setup.state.tensors()
    moments = {name: value.clone() for name, value in moments.items()}
    tick = next(item for item in going if isinstance(item, train.Tick) and item.doing == "training")
    assert tick == train.Tick("training", 3, 1, tick.total)
    assert tick.total > 1
    assert same(setup.values(), before)
    assert same(setup.state.tensors(), moments)
    assert setup.state.step == 2
    # Going on from there is as if it had never stopped.
    through = Setup(folder, "full", machine=Tight(*MACHINE), num_epochs=2)
    through.points()
    setup.points()
    assert same(setup.values(), through.values())


@pytest.mark.parametrize("kind", ["train", "validation"])
def test_a_look_is_neither_lost_nor_repeated_by_a_resume(folder: Path, kind: str) -> None:
    setup = Setup(folder, "full", validation_interval=2, num_epochs=2)
    seen: list[tuple[str, int]] = []
    for item in setup.going():
        if isinstance(item, Measured):
            seen.append((item.kind, item.step))
            if seen[-1] == (kind, 2):
                break
    seen += [(point.kind, point.step) for point in setup.points()]
    trained = [("train", step) for step in range(1, 7)]
    assert sorted(seen) == [*trained, *(("validation", step) for step in (2, 4, 6))]


def test_a_step_that_is_no_number_is_left_out(folder: Path) -> None:
    setup = Setup(folder, "full", num_epochs=2, validation_interval=100)
    weight = next(iter(setup.state.trained.values()))
    whole = weight.detach().clone()
    points: list[Measured] = []
    for item in setup.going():
        if isinstance(item, Measured):
            points.append(item)
            if len(points) in (1, 4):  # two steps are broken, then it goes well again
                weight.data[1, 0] = float("nan") if len(points) == 1 else whole[1, 0]
            if len(points) == 2:
                kept = setup.values()
            if len(points) == 3:
                assert same_but_nan(setup.values(), kept)
                weight.data[1, 0] = whole[1, 0]
    losses = [point.loss for point in only("train", points)]
    assert [loss is None for loss in losses] == [False, True, True, False, False, False]
    assert [p.grad_norm is None for p in only("train", points)] == [loss is None for loss in losses]
    assert setup.state.step == 6


def same_but_nan(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(
        torch.equal(value.nan_to_num(7.0), second[name].nan_to_num(7.0))
        for name, value in first.items()
    )


def test_training_gives_up_when_the_loss_stays_no_number(folder: Path) -> None:
    setup = Setup(folder, "full", num_epochs=3, learning_rate=0.4)
    next(iter(setup.state.trained.values())).data[:] = float("inf")
    points: list[Measured] = []
    with pytest.raises(StudioError) as told:
        points.extend(item for item in setup.going() if isinstance(item, Measured))
    assert "step 3 of 9" in told.value.message
    assert (
        "a learning rate of 0.4, above what usually works (1e-05 to 0.0002)" in told.value.message
    )


@pytest.mark.parametrize("wrong", [float("inf"), float("nan")], ids=["infinite", "no number"])
def test_a_gradient_that_is_no_number_is_not_applied_though_the_loss_is_one(
    folder: Path, wrong: float
) -> None:
    setup = Setup(folder, "full", num_epochs=4, validation_interval=100)
    added, broken = [0.0], (2, 3, 5, 6, 7)  # two in a row are got over, three are not
    weight = setup.state.trained["lm_head.weight"]
    weight.register_hook(lambda gradient: gradient + added[0])  # type: ignore[no-untyped-call]
    points: list[Measured] = []
    kept = [copies(setup.state.tensors())]

    def follow() -> None:
        for item in setup.going():
            if isinstance(item, Measured):
                points.append(item)
                kept.append(copies(setup.state.tensors()))
                added[0] = wrong if item.step + 1 in broken else 0.0

    with pytest.raises(StudioError) as told:
        follow()
    assert "step 7 of 12" in told.value.message
    assert [(point.kind, point.step) for point in points] == [("train", n) for n in range(1, 8)]
    for point, before, after in zip(points, kept[:-1], kept[1:], strict=True):
        fails = point.step in broken
        assert (point.loss is None, point.grad_norm is None) == (fails, fails)
        assert same(before, after) is fails  # weights and what the optimizer keeps


def copies(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in values.items()}


@pytest.mark.parametrize("key", ["full", "prompt_tuning"])
def test_models_that_cannot_take_packed_rows_are_trained_too(tmp_path: Path, key: str) -> None:
    folder = tiny.model(tmp_path, architecture="bloom", n_head=4, initializer_range=0.15)
    setup = Setup(folder, key, num_epochs=6)
    assert "BloomForCausalLM has an attention of its own" in setup.state.obstacle
    losses = [point.loss or 0.0 for point in only("train", setup.points())]
    assert losses[-1] < 0.8 * losses[0]


def test_one_example_alone_can_be_trained_on(folder: Path) -> None:
    setup = Setup(folder, "lora", num_epochs=1)
    (point,) = only("train", setup.points(examples=[Row([5], [7])]))
    assert point.loss is not None
