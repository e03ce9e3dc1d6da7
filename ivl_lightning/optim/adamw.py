"""AdamW in one kernel where the weights lie on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class AdamW(torch.optim.AdamW):
    """torch's AdamW; on a GPU its fused form, which needs no second copy of the weights for intermediate results.

    Gradients are not scaled here (bfloat16 needs none), so it does not take scaled ones either: Lightning would refuse
    to clip gradients for an optimizer that does.

    Args:
        groups: parameter groups with their own `lr` and `weight_decay`.
        betas: decay of the running means.
        eps: added to the root of the second one.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> None:
        groups = list(groups)
        on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
        super().__init__(groups, betas=betas, eps=eps, fused=True if on_gpu else None)
        self._step_supports_amp_scaling = False
