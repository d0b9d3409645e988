"""Fields drawn from the methods' schemas, and read back."""

from typing import Any

import pytest

from app.methods import METHODS
from app.web import forms


def _sent(key: str, **changes: str) -> dict[str, str]:
    drawn = forms.fields(METHODS[key].schema, key)
    sent = {f.name: f.value for f in drawn if f.kind != "checkbox" or f.value}
    return sent | {f"{key}.{name}": value for name, value in changes.items()}


@pytest.mark.parametrize("key", METHODS)
def test_every_parameter_is_drawn_with_label_help_and_default(key: str) -> None:
    schema = METHODS[key].schema
    drawn = forms.fields(schema, key)
    assert [f.name for f in drawn] == [f"{key}.{name}" for name in schema.model_fields]
    for field in drawn:
        assert field.label
        assert field.help.endswith(".")
        assert field.value == field.default
        assert field.kind != "number" or field.range


@pytest.mark.parametrize("key", METHODS)
def test_defaults_read_back_are_the_schemas_defaults(key: str) -> None:
    schema = METHODS[key].schema
    values, errors = forms.read(schema, key, _sent(key))
    assert not errors
    assert schema.model_validate(values) == schema()


def test_small_numbers_are_written_out() -> None:
    by_name = {f.name: f for f in forms.fields(METHODS["full"].schema, "full")}
    assert by_name["full.learning_rate"].value == "0.00005"
    assert by_name["full.learning_rate"].range == "from 0.00001 to 0.5"


def test_kinds_and_folding() -> None:
    by_name = {f.name: f for f in forms.fields(METHODS["qlora"].schema, "qlora")}
    assert by_name["qlora.quantization_type"].kind == "choice"
    assert by_name["qlora.quantization_type"].choices == ("nf4", "fp4")
    assert by_name["qlora.double_quantization"].kind == "checkbox"
    assert by_name["qlora.target_modules"].kind == "text"
    assert by_name["qlora.weight_decay"].advanced
    assert not by_name["qlora.rank"].advanced
    assert by_name["qlora.alpha"].range == "above 0, at most 1024"


@pytest.mark.parametrize(
    ("key", "changes", "field", "says"),
    [
        ("lora", {"rank": "0"}, "lora.rank", "Rank: give a whole number from 1 to 256."),
        ("lora", {"rank": "3.5"}, "lora.rank", "whole number"),
        ("lora", {"learning_rate": "fast"}, "lora.learning_rate", "a number from 0.00001 to 0.5"),
        ("lora", {"learning_rate": "nan"}, "lora.learning_rate", "a number"),
        ("lora", {"target_modules": "../etc"}, "lora.target_modules", "not accepted"),
        ("qlora", {"quantization_type": "int8"}, "qlora.quantization_type", "nf4, fp4"),
        ("prompt_tuning", {"initialization": "text"}, "prompt_tuning", "needs the initialization"),
    ],
)
def test_a_wrong_value_is_named_at_its_field(
    key: str, changes: dict[str, str], field: str, says: str
) -> None:
    _, errors = forms.read(METHODS[key].schema, key, _sent(key, **changes))
    assert list(errors) == [field]
    assert says in errors[field]


def test_all_wrong_values_are_told_at_once_and_kept() -> None:
    sent = _sent("full", batch_size="99", num_epochs="-1")
    schema = METHODS["full"].schema
    _, errors = forms.read(schema, "full", sent)
    assert set(errors) == {"full.batch_size", "full.num_epochs"}
    drawn = {f.name: f for f in forms.fields(schema, "full", sent, errors)}
    assert drawn["full.batch_size"].value == "99"
    assert drawn["full.batch_size"].error == errors["full.batch_size"]


def test_an_empty_field_means_its_default_and_an_empty_box_no() -> None:
    sent: dict[str, Any] = {"qlora.rank": " "}
    values, errors = forms.read(METHODS["qlora"].schema, "qlora", sent)
    assert not errors
    assert "rank" not in values
    assert values["double_quantization"] is False
