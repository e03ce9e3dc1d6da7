"""Token ids of an answer -> its text, all at once or as they come."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

from ivl_lightning.models.tokenizer import text_ids

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BROKEN = "\ufffd"
"""What stands in a text for bytes that make up no character."""


def decode_inside(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Text of tokens that stand inside a text: some tokenizers swallow the blank before the first word of a text."""
    colon = text_ids(tokenizer, ":")[0]
    before, whole = (
        tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for part in (colon, [*colon, *ids])
    )
    return whole[len(before) :]


class StreamDecoder:
    """Text of an answer, token by token.

    The pieces together are `decode_inside` of all tokens without blanks at both ends, character by character: a
    character that is spread over tokens comes with its last one, a blank with what follows it.

    Args:
        tokenizer: special tokens are left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._unseen = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._open: list[int] = []
        self._blanks = ""
        self._begun = False

    def push(self, token: int) -> str:
        """What is certain once this token is there; may be empty."""
        if token in self._unseen:
            return ""
        self._open.append(token)
        # Byte tokens side by side are read together, and one that fits nowhere makes all of them unreadable.
        if _BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token))):
            return ""
        text = decode_inside(self._tokenizer, self._open)
        return "" if text.endswith(_BROKEN) else self._told(text)

    def close(self) -> str:
        """What was still held back."""
        return self._told(decode_inside(self._tokenizer, self._open))

    def _told(self, text: str) -> str:
        self._open = []
        text = self._blanks + text if self._begun else text.lstrip()
        told = text.rstrip()
        self._blanks = text[len(told) :]
        self._begun = self._begun or bool(told)
        return told
