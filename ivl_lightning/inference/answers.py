"""Generated token ids -> answers beside the expected ones."""

from collections.abc import Collection

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ivl_lightning.data.truths import truths_of
from ivl_lightning.data.turns import last_question
from ivl_lightning.structures import Answer, PromptBatch


def decode_answers(
    tokens: Tensor, batch: PromptBatch, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]
) -> list[Answer]:
    """Answers of the counted rows of a batch.

    Args:
        tokens: new tokens `[B, n]`, padded after the end marker.
        batch: the prompts they continue.
        tokenizer: decodes; special tokens are left out.
        stop_ids: tokens that end an answer; one without any of them ran to the limit.

    Raises:
        RowError: a row's `answers` are no list of texts.
    """
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    lengths = [_length(ids, stop_ids) for ids in tokens.tolist()]
    prompts = batch.attention_mask.sum(dim=1).tolist()
    return [
        Answer(
            record=record,
            question=last_question(record.row),
            expected=batch.expected[row],
            truths=truths_of(record.row),
            generated=texts[row].strip(),
            tokens=lengths[row],
            cut_off=lengths[row] == tokens.shape[1],
            prompt_tokens=prompts[row],
            tiles=batch.tiles[row],
        )
        for row, record in enumerate(batch.records)
        if batch.counted[row]
    ]


def _length(ids: list[int], stop_ids: Collection[int]) -> int:
    """Tokens before the end marker; all where there is none."""
    return next((place for place, token in enumerate(ids) if token in stop_ids), len(ids))
