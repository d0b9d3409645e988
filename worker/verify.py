"""Trains the first steps of a receipt's run again, and compares. `python -m worker.verify RECEIPT [DATA]`."""

import logging
import signal
import sys
from collections.abc import Sequence
from typing import NamedTuple

import transformers
from rich.console import Console
from rich.table import Table
from sqlalchemy.exc import SQLAlchemyError

from app import processes, receipt_files, receipts, storage
from app.errors import Invalid, StudioError
from app.points import Measured
from app.receipt_files import Point, Read
from worker import hardware, repetition
from worker.job import like_before

CLOSE = 1e-4  # of the loss, or of 1 where that is more
SAME, DIFFERS, UNKNOWN = 0, 1, 2  # exit codes


class Found(NamedTuple):
    """What the repetition came to: the verdict in words, and whether it is the same."""

    pairs: list[tuple[Point, Measured]]
    verdict: str
    same: bool


def verify(read: Read, data: str, notes: Console) -> Found:
    """Train again and compare. Raises StudioError where that cannot be done."""
    receipt = read.receipt
    rows = repetition.data_of(read, data)
    base = repetition.base_of(read)
    run = repetition.run_of(read, base)
    machine, change = like_before(hardware.find(), receipt.figures.model_dump() | {"devices": 1})
    other = _others(read, machine, change)
    for sentence in other:
        notes.print(plain(sentence), highlight=False, markup=False)
    curve = {point.step: point for point in read.points if point.kind == "train"}
    measured = repetition.steps(run, rows, machine, notes)
    pairs = [(curve[one.step], one) for one in measured if one.step in curve]
    if not pairs:
        raise Invalid(f"The receipt tells of none of the first {repetition.STEPS} steps.")
    return compare(pairs, bool(other))


def compare(pairs: Sequence[tuple[Point, Measured]], elsewhere: bool) -> Found:
    """The verdict. `elsewhere`: hardware or versions are others, so that last digits may differ."""
    found = list(pairs)
    where = f"on the {len(found)} steps up to step {found[-1][1].step}"
    if all(told.loss == again.loss and _alike(told, again) for told, again in found):
        return Found(found, f"The same, bit for bit, {where}.", True)
    for told, again in found:
        if not _alike(told, again):
            reason = "the learning rate or the examples of the step are others"
            return Found(found, f"Differs from step {again.step}: {reason}.", False)
        if not _is_close(told.loss, again.loss):
            return Found(found, f"Differs from step {again.step}.", False)
    if not elsewhere:
        first = next(again.step for told, again in found if told.loss != again.loss)
        return Found(
            found,
            f"Differs from step {first}: by less than {CLOSE:g}, but hardware and versions are those of the "
            "receipt, where nothing should differ.",
            False,
        )
    return Found(found, f"The same within {CLOSE:g} {where} (other hardware or versions).", True)


def _alike(told: Point, again: Measured) -> bool:
    """Whether it is the same step: as many tokens seen, and the same learning rate."""
    rates = told.learning_rate or 0.0, again.learning_rate or 0.0
    return told.tokens == again.tokens and abs(rates[0] - rates[1]) <= 1e-9 * max(rates)


def _is_close(told: float | None, again: float | None) -> bool:
    if told is None or again is None:
        return told is again
    return abs(told - again) <= CLOSE * max(1.0, abs(told))


def _others(read: Read, machine: hardware.Hardware, change: str) -> list[str]:
    """What is different here, in sentences. On a GPU sums are made in no fixed order."""
    figures = read.receipt.figures
    sentences = []
    if change:
        there, here = (figures.device, figures.precision), (machine.name, machine.dtype)
        sentences.append(f"Trained on {' in '.join(there)}; repeated on {' in '.join(here)}.")
    elif machine.device == "cuda":
        sentences.append("A GPU adds up in no fixed order: the last digits may differ.")
    if figures.devices > 1:
        sentences.append(f"Trained on {figures.devices} devices; repeated on one.")
    if not read.receipt.versions:
        sentences.append("The receipt does not say which versions the run was trained with.")
    here_now = receipts.versions()
    for name, version in read.receipt.versions.items():
        if here_now.get(name) != version:
            sentences.append(f"{name}: {version} then, {here_now.get(name, 'none')} here.")
    return sentences


def table(found: Found) -> Table:
    """Step by step, for the terminal."""
    made = Table()
    for column in ("step", "loss then", "loss now", "difference"):
        made.add_column(column, justify="right")
    for told, again in found.pairs:
        both = told.loss is not None and again.loss is not None
        gap = f"{abs((told.loss or 0) - (again.loss or 0)):.1e}" if both else "-"
        made.add_row(str(again.step), str(told.loss), str(again.loss), gap)
    return made


def plain(text: str) -> str:
    """Text of a receipt for the terminal, which takes some characters as orders."""
    return "".join(one if one.isprintable() or one == "\n" else "\ufffd" for one in text)


def main() -> int:
    """Verify the receipt, and say how that went; the exit code."""
    processes.die_with_parent(signal.SIGTERM)
    logging.basicConfig(level=logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    notes, file, data = Console(stderr=True), *[*sys.argv[1:], ""][:2]
    try:
        found = verify(receipt_files.read(storage.users_file(file)), data, notes)
    except StudioError as error:
        notes.print(plain(error.message), style="red", highlight=False, markup=False)
        return UNKNOWN
    except SQLAlchemyError as error:
        reason = f"There is no studio here, or its database does not answer: {error.args[0]}"
        notes.print(reason, style="red", highlight=False, markup=False)
        return UNKNOWN
    Console().print(table(found))
    print(found.verdict)
    return SAME if found.same else DIFFERS


if __name__ == "__main__":
    sys.exit(main())
