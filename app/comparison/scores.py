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
    "generation": {"chrf": "chrF", "rougeL": "ROUGE-L", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2"},
    "summarization": {
        "rougeL": "ROUGE-L",
        "rouge1": "ROUGE-1",
        "rouge2": "ROUGE-2",
        "chrf": "chrF",
    },
    "extraction": {"field_f1": "Field F1", "exact": "Exact match", "valid_json": "Valid JSON"},
    "question_answering": {"token_f1": "Token F1", "exact": "Exact match"},
}
# Of the same examples where the model may answer with a label only: its likeliest one.
CHOICE = {"choice_accuracy": "Accuracy, by choice", "choice_macro_f1": "Macro F1, by choice"}
RIGHT_OR_WRONG = {"accuracy", "choice_accuracy", "exact", "valid_json"}  # per example 1 or 0
# What is not looked at when answers are matched; ROUGE and chrF are as their libraries have them.
NORMALISED = {
    "classification": "The first line counts, without case, quotes and end marks",
    "extraction": "Fields count without case, quotes and end marks; their order does not matter",
    "question_answering": "Case, punctuation and a, an, the do not count, as SQuAD has it",
}
# Tests of two models need a score of each example; where the table's is pooled they are of another.
BY_SINGLE = {
    "chrf": "The table's chrF is pooled over all texts; two models are compared by the mean chrF of "
    "their single answers, so that a difference here need not be that of the table"
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


def each(task: str, labels: Sequence[str], expected: str, answer: str) -> dict[str, float]:
    """One answer by those of the task's metrics that are means over the examples."""
    return _EACH[task](labels, expected, answer)


def summary(task: str, labels: Sequence[str], pairs: Sequence[Pair]) -> dict[str, float]:
    """Every metric of the task over (expected, answer) pairs; empty without pairs.

    A metric that does not apply (valid JSON where no output is JSON) is left out.
    """
    if not pairs:
        return {}
    found = [each(task, labels, *pair) for pair in pairs]
    means = {name: fmean(one[name] for one in found) for name in found[0]}
    whole = {
        name: metric(labels, pairs) for name, metric in _POOLED.items() if name in METRICS[task]
    }
    if task == "extraction" and not any(_is_json(expected) for expected, _ in pairs):
        del means["valid_json"]
    return {name: (means | whole)[name] for name in METRICS[task] if name in means or name in whole}


def named(labels: Sequence[str], pairs: Sequence[Pair]) -> list[Pair]:
    """The classes that outputs and answers name."""
    return [(label_of(expected, labels), label_of(answer, labels)) for expected, answer in pairs]


def label_of(answer: str, labels: Sequence[str]) -> str:
    """The class an answer names: its first line with text in it; as a label writes it if one fits."""
    line = next((line for line in answer.splitlines() if line.strip()), "")
    named = normalise(line)
    return next((label for label in labels if normalise(label) == named), named)


def _hit(labels: Sequence[str], expected: str, answer: str) -> float:
    return float(label_of(answer, labels) == label_of(expected, labels))


def _macro_f1(labels: Sequence[str], pairs: Sequence[Pair]) -> float:
    """F1 averaged over the labels that are expected at least once."""
    found = named(labels, pairs)
    wanted, given = Counter(pair[0] for pair in found), Counter(pair[1] for pair in found)
    right = Counter(one for one, other in found if one == other)
    return fmean(2 * right[label] / (wanted[label] + given[label]) for label in wanted)


@cache
def _rouge() -> Any:
    # Here and not at the top: it loads nltk and scipy, 1.3 seconds that the web has no use for.
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)


@cache
def chrf_metric() -> Any:
    """sacreBLEU's chrF as it is by default."""
    from sacrebleu.metrics.chrf import CHRF  # noqa: PLC0415 - only workers score

    return CHRF()


def _rouges(_labels: Sequence[str], expected: str, answer: str) -> dict[str, float]:
    found = _rouge().score(expected, answer)
    return {name: float(one.fmeasure) for name, one in found.items()}


def _sentence_chrf(_labels: Sequence[str], expected: str, answer: str) -> float:
    return float(chrf_metric().sentence_score(answer, [expected]).score) / 100


def _pooled_chrf(_labels: Sequence[str], pairs: Sequence[Pair]) -> float:
    """chrF over all texts, as sacreBLEU pools it."""
    expected, answers = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return float(chrf_metric().corpus_score(answers, [expected]).score) / 100


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


def _extraction(labels: Sequence[str], expected: str, answer: str) -> dict[str, float]:
    return {
        "field_f1": _field_f1(labels, expected, answer),
        "exact": _same(expected, answer),
        "valid_json": float(_is_json(answer)),
    }


def _words(text: str) -> list[str]:
    """SQuAD's words: lower case, no punctuation, no articles."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _token_f1(_labels: Sequence[str], expected: str, answer: str) -> float:
    return _overlap(Counter(_words(expected)), Counter(_words(answer)))


def _question_answering(labels: Sequence[str], expected: str, answer: str) -> dict[str, float]:
    exact = float(_words(expected) == _words(answer))
    return {"token_f1": _token_f1(labels, expected, answer), "exact": exact}


_SCORES: dict[str, Callable[[Sequence[str], str, str], float]] = {
    "classification": _hit,
    "generation": _sentence_chrf,
    "summarization": lambda labels, expected, answer: _rouges(labels, expected, answer)["rougeL"],
    "extraction": _field_f1,
    "question_answering": _token_f1,
}
_EACH: dict[str, Callable[[Sequence[str], str, str], dict[str, float]]] = {
    "classification": lambda labels, expected, answer: {"accuracy": _hit(labels, expected, answer)},
    "generation": _rouges,
    "summarization": _rouges,
    "extraction": _extraction,
    "question_answering": _question_answering,
}
# Metrics of all examples together: no mean of anything.
_POOLED: dict[str, Callable[[Sequence[str], Sequence[Pair]], float]] = {
    "macro_f1": _macro_f1,
    "chrf": _pooled_chrf,
}
