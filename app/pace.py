"""When what happens in a training: how many steps there are, how far each goes, when to look."""

import math

from app.methods import Params

LOOKS = 10  # at the validation loss, unless an interval is set
ANSWERED = 64  # validation examples at most, where a look scores answers, too
NO_LOOK = 10_000  # an interval that none of a few steps reaches


def steps_per_epoch(num_rows: int, params: Params) -> int:
    """How many updates an epoch has; its last may be made of fewer examples."""
    return math.ceil(num_rows / (params.batch_size * params.accumulate_steps))


def rate(step: int, total: int, params: Params) -> float:
    """The learning rate of a step, counted from 1: up in a line, then down by a cosine to zero."""
    warmup = math.ceil(params.warmup_share * total)
    if step <= warmup:
        return params.learning_rate * step / warmup
    done = (step - 1 - warmup) / max(1, total - warmup)
    return params.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def looks(total: int, params: Params) -> set[int]:
    """The steps after which the validation loss is measured; the last is always one."""
    if params.validation_interval:
        return {*range(params.validation_interval, total, params.validation_interval), total}
    return {max(1, round(total * look / LOOKS)) for look in range(1, LOOKS + 1)}
