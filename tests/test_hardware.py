"""What a machine is found to be: how it multiplies is measured, not assumed."""

import pytest
import torch

from worker import hardware


@pytest.mark.parametrize(
    ("knows_bf16", "speed_up", "held", "computed"),
    [
        (True, 1.0, torch.bfloat16, torch.bfloat16),
        (True, 2.0, torch.bfloat16, torch.float32),  # it knows bf16, and is slow in it
        (False, 0.5, torch.float32, torch.float32),
    ],
)
def test_precision_follows_what_the_processor_does_natively_and_fast(
    monkeypatch: pytest.MonkeyPatch,
    knows_bf16: bool,
    speed_up: float,
    held: torch.dtype,
    computed: torch.dtype,
) -> None:
    able = {"avx512_bf16": knows_bf16, "cpu_name": "A processor"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(hardware, "_speed_up_of_float32", lambda: speed_up)
    found = hardware.find()
    assert (found.name, found.precision, found.computed) == ("A processor", held, computed)


def test_how_fast_float32_is_comes_from_products_that_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *given: (made.append(given[0].dtype), real(*given))[1])
    hardware._speed_up_of_float32.cache_clear()
    assert hardware._speed_up_of_float32() > 0
    assert made.count(torch.bfloat16) == made.count(torch.float32) >= 3
