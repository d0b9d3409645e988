"""Classification's figures are scikit-learn's, with labels that are rare, missing and made up."""

import numpy as np
import pytest
from sklearn import metrics

from app.comparison import classes, scores

LABELS = ["Delivery", "Refund", "Account", "Never asked for"]


def _pairs(seed: int, total: int = 200) -> list[tuple[str, str]]:
    chance = np.random.default_rng(seed)
    expected = chance.choice(LABELS[:3], total, p=[0.6, 0.3, 0.1])
    other = chance.choice([*LABELS, "nonsense"], total)
    given = np.where(chance.random(total) < 0.7, expected, other)
    return [(str(one), str(two)) for one, two in zip(expected, given, strict=True)]


@pytest.mark.parametrize("seed", range(5))
def test_accuracy_and_macro_f1(seed: int) -> None:
    pairs = _pairs(seed)
    expected, given = zip(*pairs, strict=True)
    found = scores.summary("classification", LABELS, pairs)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(expected, given), abs=1e-12)
    asked = sorted(set(expected))
    macro = metrics.f1_score(
        expected, [scores.label_of(one, LABELS) for one in given], labels=asked, average="macro"
    )
    assert found["macro_f1"] == pytest.approx(macro, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_each_class_and_the_confusions(seed: int) -> None:
    pairs = _pairs(seed)
    expected, given = zip(*pairs, strict=True)
    found = classes.of(LABELS, pairs)
    names = [one.label for one in found.classes]
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        expected, given, labels=names, zero_division=0
    )
    for place, one in enumerate(found.classes):
        assert one.precision == pytest.approx(precision[place], abs=1e-12)
        assert one.f1 == pytest.approx(f1[place], abs=1e-12)
        assert one.expected == support[place]
        if one.expected:
            assert one.recall == pytest.approx(recall[place], abs=1e-12)
    theirs = metrics.confusion_matrix(expected, given, labels=[*names, "nonsense"])
    ours = np.array(found.matrix)
    assert (ours[:, : len(names)] == theirs[: len(names), : len(names)]).all()
    assert (ours[:, -1] == theirs[: len(names), -1]).all()
