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
    shown = rest = rest_trained = 0
    for (kind, is_trained), tokens in groups:
        ids = [token for token, _ in tokens]
        fits = 0 if rest else _fitting(kind, len(ids), MOST_TOKENS - shown)
        if fits:
            spans += _spans(kind, is_trained, ids[:fits], tokenizer, tokens_per_tile)
        shown += 0 if kind == SLOT else fits
        rest += len(ids) - fits
        rest_trained += is_trained * (len(ids) - fits)
    if rest:
        trained_part = f", {rest_trained:,} of them trained" if rest_trained else ""
        spans.append(Span(CUT, bool(rest_trained), f"{rest:,} more tokens{trained_part}"))
    return spans


def _fitting(kind: str, count: int, room: int) -> int:
    """How many of a span's tokens are shown: the slots of an image take one line whatever their number."""
    return count if kind == SLOT else min(count, max(room, 0))


def _kinds(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], str]:
    slot = tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT_TOKEN)
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return lambda token: SLOT if token == slot else SPECIAL if token in special else TEXT


def _slot(count: int, tokens_per_tile: int) -> str:
    """The context tokens of one image in short."""
    tiles = count // tokens_per_tile
    text = f"{IMAGE_CONTEXT_TOKEN} × {count}"
    return f"{text} ({tiles} tiles)" if tiles > 1 else text


def _spans(
    kind: str, trained: bool, ids: list[int], tokenizer: PreTrainedTokenizerBase, tokens_per_tile: int
) -> list[Span]:
    if kind == SLOT:
        return [Span(SLOT, trained, _slot(len(ids), tokens_per_tile))]
    if kind == SPECIAL:
        return [Span(SPECIAL, trained, str(token)) for token in tokenizer.convert_ids_to_tokens(ids)]
    # Not `convert_tokens_to_string`: only `decode` knows every family's blanks and bytes.
    return [Span(TEXT, trained, tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))]
