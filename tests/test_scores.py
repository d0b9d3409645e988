"""Scores: the libraries' own numbers, and matching that forgives what does not matter."""

import json
import subprocess
import sys

import pytest

from app import prompts
from app.comparison import scores

PAIRS = [
    ("The cat sat on the mat.", "A cat sat on a mat"),
    ("It rains in Spain, mainly in the plain.", "mainly in the plain it rains"),
    ("Short", ""),
    ("", "Something"),
    ("Löwen und Bären", "Loewen und Bären"),
    ("walking dogs barked", "walks dog barking"),
    ("exactly the same words here", "exactly the same words here"),
]


@pytest.mark.parametrize("task", scores.METRICS)
def test_every_task_has_scores_from_0_to_1(task: str) -> None:
    assert task in prompts.TASKS
    pairs = [('{"a": 1}', '{"a": 1}'), ('{"a": 2}', "no")]
    found = scores.summary(task, [], pairs)
    assert list(found) == list(scores.METRICS[task])
    assert scores.primary(task) == next(iter(found))
    assert all(0 <= value <= 1 for value in found.values())
    assert scores.score(task, [], *pairs[0]) == pytest.approx(1)
    assert scores.score(task, [], *pairs[1]) < 0.5
    assert scores.summary(task, [], []) == {}
    assert scores.score(task, [], "x", "") == 0
    json.dumps(found, allow_nan=False)


def test_every_task_of_the_templates_can_be_scored() -> None:
    assert set(prompts.TASKS) == set(scores.METRICS)


@pytest.mark.parametrize(
    "task", ["classification", "summarization", "extraction", "question_answering"]
)
def test_the_mean_of_the_scores_is_the_first_metric(task: str) -> None:
    labels = ["Short", "Something"]
    each = [scores.score(task, labels, *pair) for pair in PAIRS]
    whole = scores.summary(task, labels, PAIRS)[scores.primary(task)]
    assert sum(each) / len(each) == pytest.approx(whole)


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("  Billing. ", "billing"),
        ('"Billing"', "billing"),
        ("**Billing**:", "billing"),
        ("\u201cTwo   words\u201d.", "two words"),
        ("Straße", "strasse"),
        ("3.5", "3.5"),
        ("U.S.", "u.s"),
        ("?!", "?!"),
        ("", ""),
    ],
)
def test_what_matching_forgives(given: str, plain: str) -> None:
    assert scores.normalise(given) == plain


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("billing", True),
        (" Billing.\n\nBecause the customer asks", True),
        ("\n\n'billing'", True),
        ("The label is billing", False),
        ("sales\nbilling", False),
        ("billings", False),
        ("", False),
    ],
)
def test_a_class_is_what_the_first_line_says(answer: str, right: bool) -> None:
    assert scores.score("classification", ["Billing", "sales"], "Billing", answer) == right


def test_labels_may_differ_in_more_than_case() -> None:
    assert scores.label_of("not spam", ["spam", "Not Spam"]) == "Not Spam"
    assert scores.score("classification", ["yes", "no"], "No", "no.") == 1


def test_macro_f1_by_hand() -> None:
    expected = ["a", "a", "a", "b", "b", "c"]
    answers = ["a", "a", "b", "b", "nonsense", "d"]
    found = scores.summary("classification", list("abcd"), [*zip(expected, answers, strict=True)])
    # a: precision 1, recall 2/3; b: 1/2, 1/2; c: 0; d and nonsense are never expected.
    assert found["macro_f1"] == pytest.approx((4 / 5 + 1 / 2 + 0) / 3)
    assert found["accuracy"] == pytest.approx(3 / 6)


def test_rouge_is_that_of_its_library() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"])
    each = [theirs.score(*pair) for pair in PAIRS]
    found = scores.summary("summarization", [], PAIRS)
    for name in ("rouge1", "rouge2", "rougeL"):
        mean = sum(one[name].fmeasure for one in each) / len(each)
        assert found[name] == pytest.approx(mean, abs=1e-12)
    assert scores.summary("generation", [], PAIRS)["rougeL"] == found["rougeL"]


def test_chrf_is_that_of_its_library() -> None:
    import sacrebleu

    theirs = sacrebleu.corpus_chrf([pair[1] for pair in PAIRS], [[pair[0] for pair in PAIRS]])
    found = scores.summary("generation", [], PAIRS)
    assert found["chrf"] == pytest.approx(theirs.score / 100, abs=1e-12)
    for expected, answer in PAIRS:
        one = sacrebleu.sentence_chrf(answer, [expected]).score / 100
        assert scores.score("generation", [], expected, answer) == pytest.approx(one, abs=1e-12)


FACTS = '{"site": "Redfern", "fault": "drips", "count": 2}'


@pytest.mark.parametrize(
    ("answer", "field_f1", "exact", "valid"),
    [
        (FACTS, 1, 1, 1),
        ('{"count":2,"fault":"drips","site":"Redfern"}', 1, 1, 1),
        ('{"site": "redfern.", "fault": "drips", "count": 2}', 1, 0, 1),
        ('{"site": "Redfern", "fault": "leaks", "count": 2}', 2 / 3, 0, 1),
        ('{"site": "Redfern"}', 2 / 4, 0, 1),
        (f"```json\n{FACTS}\n```", 1, 0, 0),
        (f"Here it is: {FACTS} Anything else?", 1, 0, 0),
        ('{"site": "Redfern", "fault": "dr', 0, 0, 0),
        ("Redfern drips", 0, 0, 0),
        ("[" * 5000, 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_extraction_counts_fields(answer: str, field_f1: float, exact: float, valid: float) -> None:
    found = scores.summary("extraction", [], [(FACTS, answer)])
    assert found == pytest.approx({"field_f1": field_f1, "exact": exact, "valid_json": valid})
    assert scores.score("extraction", [], FACTS, answer) == pytest.approx(field_f1)


def test_fields_may_be_nested_or_lines() -> None:
    nested = '{"a": {"b": ["x", "y"]}, "c": null}'
    assert scores.score("extraction", [], nested, '{"a": {"b": ["y", "x"]}, "c": null}') == 1
    assert scores.score("extraction", [], nested, '{"a": {"b": ["y"]}}') == pytest.approx(2 / 4)
    lines = "Site: Redfern\nFault: drips: a lot"
    assert scores.score("extraction", [], lines, "fault: drips: a lot\nsite: redfern") == 1
    assert "valid_json" not in scores.summary("extraction", [], [(lines, lines)])


def test_token_f1_is_squads() -> None:
    def score(expected: str, answer: str) -> float:
        return scores.score("question_answering", [], expected, answer)

    assert score("The Normans", "normans") == 1
    assert score("in the 10th century", "10th century.") == pytest.approx(2 * 2 / (3 + 2))
    assert score("France", "Paris") == 0
    found = scores.summary("question_answering", [], [("Paris", " paris. "), ("Rome", "In Rome")])
    assert found == {"token_f1": pytest.approx((1 + 2 / 3) / 2), "exact": 0.5}


def test_showing_metrics_loads_no_library() -> None:
    code = (
        "import sys; from app.comparison import scores; scores.primary('generation');"
        "print([n for n in ('nltk', 'scipy', 'sacrebleu', 'torch', 'numpy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
