"""Signs in a loss curve that something is wrong."""

from collections.abc import Iterable

SMOOTHING = 0.1  # weight of the newest loss in the running mean
TIMES = 2.0  # the smoothed loss's least value that it must stay above
LONG = 10  # steps


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
