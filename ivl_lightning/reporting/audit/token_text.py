"""A row's token ids as readable text: what is trained, what is special, image slots in short."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from ivl_lightning.constants import IGNORE_INDEX, IMAGE_CONTEXT_TOKEN

MOST_TOKENS = 3000
"""Text tokens of a row that are shown; a page of whole books helps nobody."""

TEXT, SPECIAL, SLOT, CUT = "text", "special", "slot", "cut"


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of tokens of one kind.

    Attributes:
        kind: `text`, `special`, `slot` (context tokens of an image) or `cut` (what is not shown).
        trained: whether it is supervised.
        text: as shown.
    """

    kind: str
    trained: bool
    text: str


def token_spans(
    input_ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase, tokens_per_tile: int
) -> list[Span]:
    """The tokens in order; neighbors of one kind are decoded together, since a character may take several tokens.

    Args:
        input_ids: of the row.
        labels: of the row; the first token's label is never trained.
        tokenizer: that made the ids.
        tokens_per_tile: context tokens of a tile.
    """
    trained = [False, *(label != IGNORE_INDEX for label in labels[1:])]
    kind_of = _kinds(tokenizer)
    groups = groupby(zip(input_ids, trained, strict=True), key=lambda token: (kind_of(token[0]), token[1]))
    spans: list[Span] = []
    shown = 0
    for (kind, is_trained), tokens in groups:
        ids = [token for token, _ in tokens]
        if kind == SLOT:
            spans.append(Span(SLOT, is_trained, _slot(len(ids), tokens_per_tile)))
            continue
        if shown > MOST_TOKENS:
            spans.append(Span(CUT, is_trained, f"{len(ids):,} more tokens"))
            continue
        spans += _spans(kind, is_trained, ids[:MOST_TOKENS] if kind == TEXT else ids, tokenizer)
        if kind == TEXT and len(ids) > MOST_TOKENS:
            spans.append(Span(CUT, is_trained, f"{len(ids) - MOST_TOKENS:,} more tokens"))
        shown += len(ids)
    return spans


def _kinds(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], str]:
    slot = tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT_TOKEN)
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return lambda token: SLOT if token == slot else SPECIAL if token in special else TEXT


def _slot(count: int, tokens_per_tile: int) -> str:
    """The context tokens of one image in short."""
    tiles = count // tokens_per_tile
    text = f"{IMAGE_CONTEXT_TOKEN} × {count}"
    return f"{text} ({tiles} tiles)" if tiles > 1 else text


def _spans(kind: str, trained: bool, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    if kind == SPECIAL:
        return [Span(SPECIAL, trained, str(token)) for token in tokenizer.convert_ids_to_tokens(ids)]
    # Not `convert_tokens_to_string`: only `decode` knows every family's blanks and bytes.
    return [Span(TEXT, trained, tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))]
