"""Signs that something is wrong with a training, and what to say of them."""

from collections.abc import Iterable

SMOOTHING = 0.1  # weight of the newest loss in the running mean
TIMES = 2.0  # the smoothed loss's least value that it must stay above
LONG = 10  # steps
PATIENCE = 3  # steps in a row that may come out as no number before training gives up


class Divergence:
    """Watches whether the smoothed loss stays above twice its least value.

    Before as many steps as it must stay there, the running mean is of the first losses alone and says little.
    """

    def __init__(self, losses: Iterable[float | None] = ()) -> None:
        self.seen = 0
        self.smooth = 0.0
        self.least = float("inf")
        self.above = 0
        self.told = False
        for loss in losses:
            self.shows(loss)

    def shows(self, loss: float | None) -> bool:
        """Whether, with this step's loss, the curve diverges; true once only."""
        if loss is None:
            return False
        self.seen += 1
        share = max(SMOOTHING, 1 / self.seen)
        self.smooth += share * (loss - self.smooth)
        if self.seen >= LONG:
            self.least = min(self.least, self.smooth)
        self.above = self.above + 1 if self.smooth > TIMES * self.least else 0
        if self.above < LONG or self.told:
            return False
        self.told = True
        return True


def no_number(step: int, total: int, rate: float, usual: tuple[float, float]) -> str:
    """Why training gave up at a step, and what to do; the learning rate, and what is usual of it."""
    likely = (
        f"a learning rate of {rate:g}, above what usually works ({usual[0]:g} to {usual[1]:g})"
        if rate > usual[1]
        else f"unusual examples, or a learning rate too high for this model ({rate:g})"
    )
    return (
        f"Training stopped at step {step} of {total}: the loss or its gradient was not a "
        f"number {PATIENCE} times in a row, and none of these steps was applied. Likely causes: {likely}. "
        "Try again with a lower learning rate."
    )
