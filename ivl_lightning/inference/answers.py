"""Generated token ids -> answers beside the expected ones."""

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ivl_lightning.data.turns import last_question
from ivl_lightning.structures import Answer, PromptBatch


def decode_answers(tokens: Tensor, batch: PromptBatch, tokenizer: PreTrainedTokenizerBase) -> list[Answer]:
    """Answers of the counted rows of a batch.

    Args:
        tokens: new tokens `[B, n]`, padded after the end marker.
        batch: the prompts they continue.
        tokenizer: decodes; special tokens are left out.
    """
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [
        Answer(record, last_question(record.row), expected, text.strip())
        for record, expected, text, counted in zip(batch.records, batch.expected, texts, batch.counted, strict=True)
        if counted
    ]
