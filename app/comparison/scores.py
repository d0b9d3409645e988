"""How good an answer is: each task's metrics, all from 0 to 1."""

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from statistics import fmean
from typing import Any

# The first metric of a task is the one it is judged by. Name -> label for the screen.
METRICS: dict[str, dict[str, str]] = {
    "classification": {"accuracy": "Accuracy", "macro_f1": "Macro F1"},
    "generation": {"chrf": "chrF", "rougeL": "ROUGE-L"},
    "summarization": {"rougeL": "ROUGE-L", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2"},
    "extraction": {"field_f1": "Field F1", "exact": "Exact match", "valid_json": "Valid JSON"},
    "question_answering": {"token_f1": "Token F1", "exact": "Exact match"},
}
_QUOTES = "\"'`*\u201c\u201d\u2018\u2019\u00ab\u00bb"  # straight, curly and angled
_FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*(?:```|$)", re.DOTALL)

Pair = tuple[str, str]  # expected, answer


def primary(task: str) -> str:
    """The name of the metric that the task is judged by."""
    return next(iter(METRICS[task]))


def normalise(text: str) -> str:
    """What is compared when two texts are matched: without case, runs of spaces, and what
    models like to put around an answer (quotes, asterisks, a full stop or other end mark).
    """
    plain = " ".join(text.split()).casefold()
    return plain.strip(_QUOTES + " ").rstrip(".,;:!?" + _QUOTES + " ") or plain


def score(task: str, labels: Sequence[str], expected: str, answer: str) -> float:
    """One answer by the task's first metric, 0 to 1.

    The mean over a split is that metric, except for chrF, which sacreBLEU pools over all texts.
    """
    return _SCORES[task](labels, expected, answer)


def summary(task: str, labels: Sequence[str], pairs: Sequence[Pair]) -> dict[str, float]:
    """Every metric of the task over (expected, answer) pairs; empty without pairs.

    A metric that does not apply (valid JSON where no output is JSON) is left out.
    """
    return _SUMMARIES[task](labels, pairs) if pairs else {}


def label_of(answer: str, labels: Sequence[str]) -> str:
    """The class an answer names: its first line with text in it; as a label writes it if one fits."""
    line = next((line for line in answer.splitlines() if line.strip()), "")
    named = normalise(line)
    return next((label for label in labels if normalise(label) == named), named)


def _hit(labels: Sequence[str], expected: str, answer: str) -> float:
    return float(label_of(answer, labels) == label_of(expected, labels))


def _classification(labels: Sequence[str], pairs: Sequence[Pair]) -> dict[str, float]:
    """Accuracy, and F1 averaged over the labels that are expected at least once."""
    named = [(label_of(expected, labels), label_of(answer, labels)) for expected, answer in pairs]
    wanted, given = Counter(pair[0] for pair in named), Counter(pair[1] for pair in named)
    right = Counter(one for one, other in named if one == other)
    f1 = [2 * right[label] / (wanted[label] + given[label]) for label in wanted]
    return {"accuracy": right.total() / len(named), "macro_f1": fmean(f1)}


@cache
def _rouge() -> Any:
    # Here and not at the top: it loads nltk and scipy, 1.3 seconds that the web has no use for.
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)


@cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF  # noqa: PLC0415 - only workers score

    return CHRF()


def _rouges(expected: str, answer: str) -> dict[str, float]:
    found = _rouge().score(expected, answer)
    return {name: float(one.fmeasure) for name, one in found.items()}


def _mean_rouges(pairs: Sequence[Pair]) -> dict[str, float]:
    each = [_rouges(*pair) for pair in pairs]
    return {name: fmean(one[name] for one in each) for name in ("rougeL", "rouge1", "rouge2")}


def _sentence_chrf(_labels: Sequence[str], expected: str, answer: str) -> float:
    return float(_chrf().sentence_score(answer, [expected]).score) / 100


def _generation(_labels: Sequence[str], pairs: Sequence[Pair]) -> dict[str, float]:
    """Corpus chrF as sacreBLEU pools it, and the mean ROUGE-L."""
    expected, answers = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    pooled = float(_chrf().corpus_score(answers, [expected]).score) / 100
    return {"chrf": pooled, "rougeL": _mean_rouges(pairs)["rougeL"]}


def _json_in(text: str) -> Any:
    """The JSON that the text is, or else the first object in it; None if there is none."""
    fenced = _FENCED.search(text)
    inner = (fenced[1] if fenced else text).strip()
    starts = [0, *(match.start() for match in list(re.finditer(r"\{", inner))[:20])]
    for start in starts:
        try:
            value, end = json.JSONDecoder().raw_decode(inner, start)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) or (start == 0 and end == len(inner)):
            return value
    return None


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _fields(text: str) -> Counter[Pair]:
    """What a text states, as (name, value) pairs: of its JSON, else of its `name: value` lines.

    Nested names are joined by dots; items of a list share their list's name.
    """
    value = _json_in(text)
    if isinstance(value, dict | list):
        found: Counter[Pair] = Counter()
        waiting = [("", value)]
        while waiting:
            name, part = waiting.pop()
            if isinstance(part, dict):
                waiting += [(f"{name}.{key}", inner) for key, inner in part.items()]
            elif isinstance(part, list):
                waiting += [(name, inner) for inner in part]
            else:
                found[name, normalise(part if isinstance(part, str) else json.dumps(part))] += 1
        return found
    lines = [line.split(":", 1) for line in text.splitlines() if line.strip()]
    if lines and all(len(line) == 2 for line in lines):
        return Counter((normalise(name), normalise(value)) for name, value in lines)
    return Counter({("", normalise(text)): 1})


def _overlap(expected: Counter[Any], given: Counter[Any]) -> float:
    """F1 of two bags; two empty ones are equal."""
    size = expected.total() + given.total()
    return 2 * (expected & given).total() / size if size else 1.0


def _field_f1(_labels: Sequence[str], expected: str, answer: str) -> float:
    return _overlap(_fields(expected), _fields(answer))


def _same(expected: str, answer: str) -> float:
    if normalise(expected) == normalise(answer):
        return 1.0
    # The same JSON in another order or spacing is the same answer, text around it is not.
    both = _is_json(expected) and _is_json(answer)
    return float(both and json.loads(expected) == json.loads(answer))


def _extraction(labels: Sequence[str], pairs: Sequence[Pair]) -> dict[str, float]:
    found = {
        "field_f1": fmean(_field_f1(labels, *pair) for pair in pairs),
        "exact": fmean(_same(*pair) for pair in pairs),
    }
    if any(_is_json(expected) for expected, _ in pairs):
        found["valid_json"] = fmean(_is_json(answer) for _, answer in pairs)
    return found


def _words(text: str) -> Counter[str]:
    """SQuAD's words: lower case, no punctuation, no articles."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return Counter(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def _token_f1(_labels: Sequence[str], expected: str, answer: str) -> float:
    return _overlap(_words(expected), _words(answer))


def _question_answering(labels: Sequence[str], pairs: Sequence[Pair]) -> dict[str, float]:
    exact = fmean(normalise(expected) == normalise(answer) for expected, answer in pairs)
    return {"token_f1": fmean(_token_f1(labels, *pair) for pair in pairs), "exact": exact}


_SCORES: dict[str, Callable[[Sequence[str], str, str], float]] = {
    "classification": _hit,
    "generation": _sentence_chrf,
    "summarization": lambda _labels, expected, answer: _rouges(expected, answer)["rougeL"],
    "extraction": _field_f1,
    "question_answering": _token_f1,
}
_SUMMARIES: dict[str, Callable[[Sequence[str], Sequence[Pair]], dict[str, float]]] = {
    "classification": _classification,
    "generation": _generation,
    "summarization": lambda _labels, pairs: _mean_rouges(pairs),
    "extraction": _extraction,
    "question_answering": _question_answering,
}
