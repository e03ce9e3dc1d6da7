"""Mixed preference optimization: a weighted sum of preference, quality and generation losses (arXiv:2411.10442)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ivl_lightning.config.schema import ShiftUpdate
from ivl_lightning.losses.generation import SFT, label_weights
from ivl_lightning.losses.pair_head import PairHead
from ivl_lightning.losses.preference import SigmoidPreference
from ivl_lightning.losses.quality import BCOPair
from ivl_lightning.structures import LossOutput, PairScores

Number = TypeVar("Number", Tensor, float)


class PreferenceMixture(nn.Module):
    """A weighted sum of heads over the same pairs.

    Args:
        parts: name -> `{"weight": a number, "head": a PairHead}`.

    Attributes:
        heads, weights: of each part, by name.

    Raises:
        ValueError: no part, a name that a module cannot have, a part that is not a weight and a head, a weight that is
            not finite, or SFT heads of different reductions.
    """

    def __init__(self, parts: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        if not parts:
            raise ValueError("parts is empty: name at least one part with its weight and head")
        self.heads = nn.ModuleDict()
        self.weights: dict[str, float] = {}
        for name, part in parts.items():
            _check_part(name, part)
            self.heads[name] = part["head"]
            self.weights[name] = _finite(f"parts.{name}.weight", part["weight"])
        self.reduction = _reduction(self.heads.values())

    @property
    def shift(self) -> Tensor | None:
        """The reward shift of the first BCO head, a float64 scalar; None without one."""
        return next((head.shift.mean for head in self.heads.values() if isinstance(head, BCOPair)), None)

    def terms(self, pairs: PairScores) -> dict[str, Tensor]:
        """Loss of each pair under each head, `[B]` by name; advances running shifts in train mode."""
        return {name: head(pairs) for name, head in self.heads.items()}

    def combine(self, terms: Mapping[str, Tensor], *, pairs: float, labels: float) -> LossOutput:
        """Divide the sum of each head's terms and add the parts up.

        Args:
            terms: see `terms`.
            pairs: divisor of heads normalised by pairs.
            labels: divisor of heads normalised by labels: a sum of label weights under `reduction`.

        Returns:
            The loss; a part without anything to divide by is 0.
        """
        sums = {name: term.sum() for name, term in terms.items()}
        return _weigh(self.means(sums, pairs=pairs, labels=labels), self.weights)

    def means(self, sums: Mapping[str, Number], *, pairs: float, labels: float) -> dict[str, Number]:
        """Sum of each head's terms over its divisor; see `combine`."""
        divisors = {"pairs": pairs, "labels": labels}
        heads = self._heads()
        # 0 / 0 is 0: a micro-batch without a pair teaches nothing.
        return {name: value / (divisors[heads[name].normalised_by] or 1.0) for name, value in sums.items()}

    def counts(self, pairs: PairScores) -> dict[str, Tensor]:
        """What each pair's term is divided by where it stands alone, `[B]` by name: 1, or its sum of label weights."""
        tokens = pairs.chosen_tokens
        own = {"pairs": torch.ones_like(tokens), "labels": tokens * label_weights(tokens, self.reduction)}
        return {name: own[head.normalised_by] for name, head in self._heads().items()}

    def own_divisors(self, pairs: PairScores) -> tuple[float, float]:
        """Pairs and label weights of a micro-batch, what the original divides by."""
        tokens = pairs.chosen_tokens
        return float(len(tokens)), float((tokens * label_weights(tokens, self.reduction)).sum())

    def forward(self, pairs: PairScores) -> LossOutput:
        """The micro-batch's own means, as in the original."""
        num_pairs, labels = self.own_divisors(pairs)
        return self.combine(self.terms(pairs), pairs=num_pairs, labels=labels)

    def end_step(self) -> None:
        """Tell every head that the optimizer has stepped; every rank must call it."""
        for head in self._heads().values():
            head.end_step()

    def _heads(self) -> dict[str, PairHead]:
        # ModuleDict does not know the type of what it holds.
        return cast(dict[str, PairHead], dict(self.heads.items()))


class MPOLoss(nn.Module):
    """The published mixture, from log-probabilities: 0.8 sigmoid preference + 0.2 BCO + 1.0 next-token loss.

    Source: arXiv:2411.10442 and the official scripts.

    Args:
        beta: factor on log-ratios, above 0.
        preference_weight, quality_weight, generation_weight: factors on the parts.
        update: when the reward shift advances, see `RunningShift`; with `step`, `end_step` must be called.

    Attributes:
        preference, quality: the heads; `quality.shift` is in the state dict.

    Raises:
        ValueError: beta is out of range, a weight is not finite, or the update is not known.
    """

    def __init__(
        self,
        beta: float = 0.1,
        preference_weight: float = 0.8,
        quality_weight: float = 0.2,
        generation_weight: float = 1.0,
        update: ShiftUpdate = "micro_batch",
    ) -> None:
        super().__init__()
        self.preference = SigmoidPreference(beta)
        self.quality = BCOPair(beta, update)
        self.weights = {
            "preference": _finite("preference_weight", preference_weight),
            "quality": _finite("quality_weight", quality_weight),
            "generation": _finite("generation_weight", generation_weight),
        }

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        chosen_nll: Tensor,
    ) -> LossOutput:
        """Means over the micro-batch; the parts are `preference`, `quality` and `generation`.

        Args:
            policy_chosen_logps, policy_rejected_logps: `[B]`, summed over each response.
            reference_chosen_logps, reference_rejected_logps: the same under the reference model.
            chosen_nll: next-token loss of the chosen responses, `[B]` or a scalar; averaged.
        """
        # Neither head asks for lengths.
        lengths = torch.ones_like(policy_chosen_logps)
        pairs = PairScores(
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
            lengths,
            lengths,
        )
        terms = {"preference": self.preference(pairs), "quality": self.quality(pairs), "generation": chosen_nll}
        return _weigh({name: term.sum() / max(term.numel(), 1) for name, term in terms.items()}, self.weights)

    def end_step(self) -> None:
        """Fold the step's rewards into the shift, for `update=step`; every rank must call it."""
        self.quality.end_step()


def _weigh(parts: dict[str, Tensor], weights: Mapping[str, float]) -> LossOutput:
    return LossOutput(torch.stack([weights[name] * part for name, part in parts.items()]).sum(), parts)


def _finite(name: str, weight: object) -> float:
    if not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ValueError(f"{name}={weight!r} must be a finite number")
    return float(weight)


def _check_part(name: str, part: Mapping[str, Any]) -> None:
    if not name.isidentifier() or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"parts.{name} cannot be a part's name: take another one, of letters, digits and underscores")
    if set(part) != {"weight", "head"}:
        raise ValueError(f"parts.{name} must hold weight and head, and holds {', '.join(part) or 'nothing'}")
    if not isinstance(part["head"], PairHead):
        raise ValueError(f"parts.{name}.head={part['head']!r} is not a PairHead: give a head of ivl_lightning.losses")


def _reduction(heads: Iterable[nn.Module]) -> str:
    """The one rule by which labels are summed; the paper's where no head weighs labels."""
    found = sorted({head.reduction for head in heads if isinstance(head, SFT)})
    if len(found) > 1:
        raise ValueError(f"parts holds SFT heads of different reductions ({', '.join(found)}): use one reduction")
    return found[0] if found else "sample"
