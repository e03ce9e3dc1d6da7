"""Numbers that look random and follow from others alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def splitmix64(numbers: NDArray[np.uint64], salt: int) -> NDArray[np.uint64]:
    """SplitMix64 of each number and a salt: 64 bits that do not depend on what other numbers there are.

    Args:
        numbers: of any shape.
        salt: 0 to 2^64 - 1.
    """
    with np.errstate(over="ignore"):
        bits = (numbers ^ np.uint64(salt)) + np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return bits ^ (bits >> np.uint64(31))
