"""The preference step as the official trainer makes it, written anew from its description, for comparison only.

Source of the rules: InternVL `trainer_dpo.py` on TRL 0.10.1. Chosen and rejected conversations are stacked and padded,
pictures are repeated for both, policy and reference model give logits of all positions in float32, and every step asks
the reference model again.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from torch.nn.utils.rnn import pad_sequence
from transformers import InternVLForConditionalGeneration

from ivl_lightning.constants import IGNORE_INDEX
from ivl_lightning.data.tiling import normalize_tiles
from ivl_lightning.structures import EncodedPair

PAD_ID = 0


class OfficialMPO:
    """Policy and reference model, both in memory, and the loss `sigmoid,bco_pair` with the next-token loss added.

    Args:
        policy: with the library's own attention.
        reference: a copy of the policy by default.
        beta: factor on log-ratios.
    """

    def __init__(
        self,
        policy: InternVLForConditionalGeneration,
        reference: InternVLForConditionalGeneration | None = None,
        beta: float = 0.1,
    ) -> None:
        self.policy = policy.train()
        self.reference = (reference or copy.deepcopy(policy)).requires_grad_(False).eval()
        self.beta = beta
        self.mean, self.count = torch.zeros(()), 1e-24

    def loss(self, inputs: dict[str, Tensor]) -> Tensor:
        """0.8 x sigmoid + 0.2 x BCO + next-token loss of the chosen answers."""
        # As there, each call's logits stay referenced until the loss is made; the reference model's as well.
        chosen, rejected, logits, nll = forward(self.policy, inputs)
        with torch.no_grad():
            reference_chosen, reference_rejected, reference_logits, _ = forward(self.reference, inputs)
        good, bad = self.beta * (chosen - reference_chosen), self.beta * (rejected - reference_rejected)
        shift = self._shift(torch.cat((good, bad)).mean().detach())
        losses = -0.8 * logsigmoid(good - bad) - 0.2 * (logsigmoid(good - shift) + logsigmoid(shift - bad))
        del logits, reference_logits
        return (losses + nll).mean()

    def _shift(self, reward: Tensor) -> Tensor:
        """Plain mean over micro-batches, this one included."""
        self.count += 1.0
        self.mean = self.mean + (reward - self.mean) / self.count
        return self.mean


def stacked(pairs: Sequence[EncodedPair]) -> dict[str, Tensor]:
    """All chosen conversations, then all rejected ones, padded to the longest; tiles twice, already normalized."""
    answers = [(pair, pair.chosen_ids, pair.chosen_labels) for pair in pairs]
    answers += [(pair, pair.rejected_ids, pair.rejected_labels) for pair in pairs]
    ids = [torch.tensor([*pair.prompt_ids, *tokens]) for pair, tokens, _ in answers]
    labels = [torch.tensor([IGNORE_INDEX] * len(pair.prompt_ids) + targets) for pair, _, targets in answers]
    input_ids = pad_sequence(ids, batch_first=True, padding_value=PAD_ID)
    tiles = torch.cat([pair.pixel_values for pair in pairs if pair.pixel_values is not None])
    return {
        "input_ids": input_ids,
        "attention_mask": input_ids.ne(PAD_ID),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        "pixel_values": normalize_tiles(tiles).repeat(2, 1, 1, 1),
    }


def forward(
    model: InternVLForConditionalGeneration, inputs: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summed log-probabilities of chosen and rejected answers, all logits, next-token loss of the chosen ones."""
    labels = inputs["labels"]
    logits = model(**{name: inputs[name] for name in inputs if name != "labels"}, use_cache=False).logits.float()
    chosen, rejected = _response_logps(logits, labels).chunk(2)
    half = len(labels) // 2
    kept, targets = logits[:half, :-1].contiguous(), labels[:half, 1:].contiguous()
    nll = cross_entropy(kept.view(-1, kept.shape[-1]), targets.view(-1), ignore_index=IGNORE_INDEX)
    return chosen, rejected, logits, nll


def _response_logps(logits: Tensor, labels: Tensor) -> Tensor:
    targets = labels[:, 1:].clone()
    supervised = targets != IGNORE_INDEX
    targets[~supervised] = 0
    logps = logits[:, :-1].log_softmax(-1).gather(2, targets.unsqueeze(2)).squeeze(2)
    return (logps * supervised).sum(-1)
