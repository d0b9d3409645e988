"""`--set`: a parameter by its name alone, or of one method."""

import pytest

from app.assignments import assigned
from app.errors import Invalid

TWO: dict[str, dict[str, object]] = {"lora": {"rank": 16, "dropout": 0.1}, "full": {}}


def test_a_bare_name_is_set_for_every_method_that_has_it() -> None:
    made = assigned(["rank=8", "num_epochs=2"], TWO)
    assert made["lora"] == {"rank": "8", "dropout": 0.1, "num_epochs": "2"}
    assert made["full"] == {"num_epochs": "2"}
    assert TWO["lora"]["rank"] == 16  # what was given stays as it was


def test_what_names_its_method_counts_more_wherever_it_stands() -> None:
    made = assigned(["lora.num_epochs=5", "num_epochs=2"], TWO)
    assert (made["lora"]["num_epochs"], made["full"]["num_epochs"]) == ("5", "2")
    assert assigned(["lora.learning_rate=0.001"], TWO)["lora"]["learning_rate"] == "0.001"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rank", "write parameter=value, such as rank=8 or lora.rank=8"),
        ("lora.rank", "write parameter=value"),
        ("=8", "write parameter=value"),
        ("lora.=8", "write parameter=value"),
        ("qlora.rank=8", "qlora is not trained here; lora, full would be"),
        ("full.rank=8", "there is no parameter rank. There are"),
        ("num_virtual_tokens=8", "there is no parameter num_virtual_tokens"),
    ],
)
def test_what_can_be_meant_for_no_method_is_refused_in_a_sentence(text: str, words: str) -> None:
    with pytest.raises(Invalid) as refused:
        assigned([text], TWO)
    assert f"--set {text}: " in refused.value.message
    assert words in refused.value.message
