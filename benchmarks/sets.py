"""Turn published data sets into the studio's format: `python benchmarks/sets.py SET FOLDER OUT`.

FOLDER holds the set as its authors published it; 400 rows are drawn with a fixed seed.
"""

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


SETS: dict[str, Callable[[Path], Iterator[dict[str, str]]]] = {
    "snips-intents": snips_intents,
    "disfl-qa": disfl_qa,
}


def main() -> None:
    """Write the set's rows as JSONL."""
    name, folder, out = sys.argv[1:]
    rows = list(SETS[name](Path(folder)))
    chosen = random.Random(1).sample(rows, ROWS)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
    Path(out).write_text(text, "utf-8")
    print(f"{len(chosen)} of {len(rows)} rows written to {out}")


if __name__ == "__main__":
    main()
