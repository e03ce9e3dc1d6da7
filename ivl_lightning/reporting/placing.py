"""Places of labels and boxes, moved apart where two would overlap."""

from __future__ import annotations

from collections.abc import Sequence


def apart(places: Sequence[float], gaps: Sequence[float]) -> list[float]:
    """Places in their order, each moved about as little as it takes.

    Args:
        places: as wished for.
        gaps: least distance between each place and the next, one fewer than there are places.
    """
    if not places:
        return []
    up, down = [places[0]], [places[-1]]
    for place, gap in zip(places[1:], gaps, strict=True):
        up.append(max(place, up[-1] + gap))
    for place, gap in zip(reversed(places[:-1]), reversed(gaps), strict=True):
        down.append(min(place, down[-1] - gap))
    # One keeps the distances by moving up only, the other by moving down only: so does their mean.
    return [(high + low) / 2 for high, low in zip(up, reversed(down), strict=True)]
