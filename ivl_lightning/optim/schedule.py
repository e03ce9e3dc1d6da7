"""Learning-rate factor over a run: linear warm-up, then cosine to a floor, or constant."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WarmupSchedule:
    """Factor on the peak learning rate.

    Source: the original trains with transformers' cosine schedule: the factor of step s is s / warm-up before, and
    (1 + cos(pi * share of the rest)) / 2 after it, so the very first step has factor 0.

    Attributes:
        shape: `cosine` or `constant` after the warm-up.
        warmup_steps: optimizer steps of warm-up, or None.
        warmup_ratio: share of the run that warms up, used where `warmup_steps` is None.
        max_steps: steps of the run where they are given; None follows the share of consumed samples.
        min_ratio: the cosine ends here.
    """

    shape: str = "cosine"
    warmup_steps: int | None = None
    warmup_ratio: float = 0.0
    max_steps: int | None = None
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in ("cosine", "constant"):
            raise ValueError(f"optim.schedule={self.shape!r} is not known: use cosine or constant")

    def factor(self, step: int, progress: float) -> float:
        """Args: step, optimizer steps done; progress, share of the run's samples consumed, 0 to 1."""
        if self.max_steps is not None:
            warmup = self.warmup_steps
            if warmup is None:
                warmup = math.ceil(self.warmup_ratio * self.max_steps)
            return self._curve(step, warmup, self.max_steps)
        if self.warmup_steps is None:
            return self._curve(progress, self.warmup_ratio, 1.0)
        if step < self.warmup_steps:
            return step / self.warmup_steps
        return self._curve(progress, 0.0, 1.0)

    def _curve(self, done: float, warmup: float, horizon: float) -> float:
        if done < warmup:
            return done / warmup
        if self.shape == "constant" or warmup >= horizon:
            return 1.0
        share = min(1.0, (done - warmup) / (horizon - warmup))
        return self.min_ratio + (1.0 - self.min_ratio) * 0.5 * (1.0 + math.cos(math.pi * share))
