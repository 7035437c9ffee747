"""Steps whose loss or gradient stands out of the steps before it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

WINDOW = 100  # steps that a step is compared with
LEAST = 16  # of them; before that nothing stands out
WATCHED = ("loss", "grad_norm")
DEVIATION = 1.4826  # the standard deviation of a normal distribution in median absolute deviations
FLOOR = 1e-3  # of the median: a loss that hardly moves has no spikes of rounding


class Spikes:
    """Running medians of loss and gradient norm.

    A value stands out when it is over `threshold` deviations above the median of the last WINDOW steps. The deviation
    is the median absolute deviation, scaled to a normal distribution's: unlike mean and standard deviation, it does not
    move with the spikes themselves.
    """

    def __init__(self, threshold: float | None) -> None:
        self.threshold = threshold
        self.values = {name: deque[float](maxlen=WINDOW) for name in WATCHED}

    def add(self, record: Mapping[str, Any]) -> dict[str, float]:
        """The deviations above the median of what stands out in this step's record; afterwards it is compared with."""
        scores = {}
        for name, values in self.values.items():
            value = record.get(name)
            if value is None or not math.isfinite(value):
                continue
            if self.threshold is not None and len(values) >= LEAST:
                middle = median(values)
                spread = DEVIATION * median(abs(v - middle) for v in values)
                score = (value - middle) / max(spread, FLOOR * abs(middle), 1e-12)
                if score > self.threshold:
                    scores[name] = round(score, 2)
            values.append(value)
        return scores
