"""How much of each dataset an epoch holds, and the epoch's order of samples, from (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ivl_lightning.config.schema import RepeatRule, Resampling


@dataclass(frozen=True, slots=True)
class Share:
    """A dataset's part of every epoch.

    Attributes:
        name: of the dataset.
        rows: usable rows.
        samples: samples of an epoch.
        fingerprint: hash of the rows; a checkpoint tells by it whether it can go on in mid-epoch.
    """

    name: str
    rows: int
    samples: int
    fingerprint: str = ""


def shares(
    names: Sequence[str],
    sizes: Sequence[int],
    repeats: Sequence[float],
    *,
    weights: Mapping[str, float] | None = None,
    resampling: Resampling = "size",
    fingerprints: Sequence[str] | None = None,
) -> tuple[Share, ...]:
    """Samples of each dataset in an epoch.

    A dataset of n rows with `repeat_time` r has int(n * r) samples. `sqrt` and `weights` keep the sum of these over
    all datasets and part it anew: in proportion to the square roots of int(n * r), or to the weights.

    Args:
        names: datasets.
        sizes: usable rows of each.
        repeats: `repeat_time` of each.
        weights: dataset -> share in any unit, for all datasets; None for `resampling`.
        resampling: see `DataConfig.resampling`.
        fingerprints: of each dataset's rows.

    Raises:
        ValueError: weights that do not name the datasets, or are negative.
    """
    samples = [int(size * repeat) for size, repeat in zip(sizes, repeats, strict=True)]
    if weights is not None:
        _check_weights(names, weights)
        samples = _parted(
            sum(samples), [weights[name] if size else 0.0 for name, size in zip(names, sizes, strict=True)]
        )
    elif resampling == "sqrt":
        samples = _parted(sum(samples), [float(count) ** 0.5 for count in samples])
    known = fingerprints or [""] * len(names)
    return tuple(Share(*values) for values in zip(names, sizes, samples, known, strict=True))


def _check_weights(names: Sequence[str], weights: Mapping[str, float]) -> None:
    missing, unknown = sorted(set(names) - set(weights)), sorted(set(weights) - set(names))
    if missing or unknown:
        raise ValueError(
            f"data.weights must name each dataset once: without a weight are {missing or 'none'}, unknown are "
            f"{unknown or 'none'} (datasets: {', '.join(names)}; a weight of 0 leaves one out)"
        )
    if min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise ValueError(f"data.weights={dict(weights)}: none may be negative, and one must be above 0")


def _parted(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in proportion to the weights, in whole numbers: the largest remainders are rounded up."""
    if not sum(weights):
        return [0] * len(weights)
    exact = [total * weight / sum(weights) for weight in weights]
    parts = [int(part) for part in exact]
    by_remainder = sorted(range(len(parts)), key=lambda number: parts[number] - exact[number])
    for number in by_remainder[: total - sum(parts)]:
        parts[number] += 1
    return parts


def epoch_order(mixture: Sequence[Share], *, seed: int, epoch: int, rule: RepeatRule = "random") -> NDArray[np.int64]:
    """Sample numbers of an epoch, shuffled.

    Rows are numbered over all N rows of the mixture laid end to end; the k-th use of a row within the epoch is sample
    row + k * N, so that each use has its own number (and its own augmentation) and `sample % N` is the row.

    A dataset of n rows and s samples uses every row floor(s / n) times, and for the rest a random subset that is new
    in each epoch (`random`), or the first rows of the file (`prefix`, official for r < 1).

    Args:
        mixture: samples of each dataset.
        seed, epoch: the only source of randomness.
        rule: which rows a fraction takes.
    """
    rng = np.random.default_rng([seed, epoch])
    chosen = [np.empty(0, dtype=np.int64)]
    num_rows = sum(share.rows for share in mixture)
    start = 0
    for share in mixture:
        whole, rest = divmod(share.samples, share.rows) if share.rows else (0, 0)
        fraction = rng.permutation(share.rows)[:rest] if rule == "random" else np.arange(rest)
        uses = [start + use * num_rows + np.arange(share.rows) for use in range(whole)]
        chosen.extend([*uses, start + whole * num_rows + fraction])
        start += share.rows
    order = np.concatenate(chosen)
    rng.shuffle(order)
    return order


def epoch_size(mixture: Sequence[Share]) -> int:
    """Samples of every epoch."""
    return sum(share.samples for share in mixture)
