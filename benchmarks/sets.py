"""Turn published data sets into the studio's format: `python benchmarks/sets.py SET FOLDER OUT`.

FOLDER holds the set as its authors published it; 400 rows are drawn with a fixed seed.
"""

import csv
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROWS = 400


def snips_intents(folder: Path) -> Iterator[dict[str, str]]:
    """A spoken request -> its intent, four of them equally often."""
    for file in sorted(folder.glob("*/train_*.json")):
        if file.stem.endswith("_full"):
            continue
        (intent, requests), *_ = json.loads(file.read_text("utf-8")).items()
        for request in requests:
            text = "".join(part["text"] for part in request["data"]).strip()
            yield {"input": text, "output": intent}


def disfl_qa(folder: Path) -> Iterator[dict[str, str]]:
    """A question as it was blurted out -> the question meant."""
    for pair in json.loads((folder / "train.json").read_text("utf-8")).values():
        if "#VALUE!" not in pair.values():  # cells that a spreadsheet broke
            yield {"input": pair["disfluent"], "output": pair["original"]}


def banking77(folder: Path) -> Iterator[dict[str, str]]:
    """A message of a bank's customer -> what it is about, one of 77 classes."""
    with (folder / "train.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield {"input": row["text"].strip(), "output": row["category"]}


def snips_slots(folder: Path) -> Iterator[dict[str, str]]:
    """A spoken request -> its intent and the slots marked in it, as a line of JSON."""
    for file in sorted(folder.glob("*/train_*.json")):
        if file.stem.endswith("_full"):
            continue
        (intent, requests), *_ = json.loads(file.read_text("utf-8")).items()
        for request in requests:
            found = {"intent": intent}
            for part in request["data"]:
                if name := part.get("entity"):
                    before = found.get(name)
                    found[name] = f"{before}, {part['text']}" if before else part["text"]
            text = "".join(part["text"] for part in request["data"]).strip()
            yield {"input": text, "output": json.dumps(found, ensure_ascii=False)}


def mts_dialog(folder: Path) -> Iterator[dict[str, str]]:
    """A dialogue of doctor and patient -> the section of the clinical note that it led to."""
    with (folder / "MTS-Dialog-TrainingSet.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield {"input": row["dialogue"].strip(), "output": row["section_text"].strip()}


def car_rental(folder: Path) -> Iterator[dict[str, str]]:
    """A customer's comment -> satisfied (1) or not (0), each comment once: 104 of 333 are repeats."""
    file = folder / "car_rental_prompt_tuning_training_data.json"
    pairs = json.loads(file.read_text("utf-8"))
    yield from {pair["input"]: pair for pair in pairs}.values()


SETS: dict[str, Callable[[Path], Iterator[dict[str, str]]]] = {
    "snips-intents": snips_intents,
    "disfl-qa": disfl_qa,
    "banking77": banking77,
    "snips-slots": snips_slots,
    "mts-dialog": mts_dialog,
    "car-rental": car_rental,
}


def drawn(name: str, folder: Path, count: int = ROWS) -> list[dict[str, str]]:
    """That many of the set's rows, always the same ones; all of a smaller set."""
    rows = list(SETS[name](folder))
    return random.Random(1).sample(rows, min(count, len(rows)))


def main() -> None:
    """Write the set's rows as JSONL."""
    name, folder, out = sys.argv[1:]
    chosen = drawn(name, Path(folder))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
    Path(out).write_text(text, "utf-8")
    print(f"{len(chosen)} rows written to {out}")


if __name__ == "__main__":
    main()
