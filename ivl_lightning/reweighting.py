"""Token, sample and square reweighting: weight of a label in a sample with x labels.

Source: InternVL 2.5 paper, section on loss reweighting, and `len2weight` of the official trainer: a label weighs
x^0 (token), x^-1 (sample) or x^-0.5 (square); a sample without labels weighs nothing.
"""

_EXPONENT = {"token": 0.0, "sample": 1.0, "square": 0.5}
REDUCTIONS = tuple(_EXPONENT)


def label_weight(num_labels: int, reduction: str) -> float:
    """Weight of each of a sample's `num_labels` labels.

    Raises:
        ValueError: the reduction is not one of `REDUCTIONS`.
    """
    if reduction not in _EXPONENT:
        raise ValueError(f"loss.reduction={reduction!r} is not known: use one of {', '.join(REDUCTIONS)}")
    return float(num_labels) ** -_EXPONENT[reduction] if num_labels else 0.0


def sample_weight(num_labels: int, reduction: str) -> float:
    """Sum of the weights of a sample's labels: x, 1 or sqrt(x)."""
    return num_labels * label_weight(num_labels, reduction)
