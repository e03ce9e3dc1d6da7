"""Preference rows -> token ids, labels and tiles: the encoder of conversations, with two answers behind one prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from ivl_lightning.data.conversation import TokenizedRow, tokenize_row
from ivl_lightning.data.encoding import RowEncoder, Tokenize
from ivl_lightning.data.layout import Layout
from ivl_lightning.data.pairs import MEDIA_KEYS, PairLayout, TokenizedPair, conversations_of, tokenize_pair
from ivl_lightning.data.turns import parse_turns
from ivl_lightning.structures import EncodedPair, Record, SampleCost, Turn, VideoCost


class PairEncoder(RowEncoder):
    """Measures and encodes the preference pairs of one dataset; arguments as for `RowEncoder`.

    A pair costs what its document `[prompt | chosen | rejected]` takes of a pack. Each of its two conversations must
    fit under the cap of one sample, the document under the cap of a pack. It is never cut: an answer without its end
    is another answer than the one that was judged.
    """

    pairs: ClassVar[bool] = True

    def encode_pair(self, record: Record, rng: np.random.Generator | None, *, frames: int | None = None) -> EncodedPair:
        """Ids and labels of prompt and answers, and tiles; arguments as for `encode`.

        Raises:
            RowError: the record cannot be used, a picture that breaks only when decoded included.
        """
        layout, tiles = self._prepare(record, rng, frames)
        assert isinstance(layout, PairLayout)
        ids, labels = layout.ids_and_labels()
        rejected = len(ids) - layout.rejected
        chosen = rejected - layout.chosen
        return EncodedPair(
            ids[:chosen], ids[chosen:rejected], labels[chosen:rejected], ids[rejected:], labels[rejected:], tiles
        )

    def turns(self, row: Mapping[str, object]) -> tuple[Turn, ...]:
        """Question, rejected and chosen answer."""
        learned, other = (parse_turns(conversation) for conversation in conversations_of(row))
        return (*other, learned[-1])

    def learned_turns(self, row: Mapping[str, object]) -> tuple[Turn, ...]:
        """Question and chosen answer; the rejected one may be as bad as it likes."""
        return parse_turns(conversations_of(row)[0])

    def question_key(self, row: Mapping[str, object]) -> bytes:
        """Question and media, which up to 15 pairs of MMPR share."""
        return json.dumps([row.get(key) for key in ("question", *MEDIA_KEYS)], sort_keys=True).encode()

    def _tokenize(self, record: Record, num_images: int, tokenize: Tokenize = tokenize_row) -> TokenizedRow:
        return tokenize_pair(record.row, lambda row: self._tokenize_row(row, num_images, tokenize))

    def _layout(self, row: TokenizedRow, tiles: tuple[int, ...], limit: int) -> Layout:
        assert isinstance(row, TokenizedPair)
        return PairLayout(row, tiles, limit, self.settings.tokens_per_tile, chosen=row.chosen, rejected=row.rejected)

    def _cost(self, layout: Layout, video: VideoCost | None) -> SampleCost:
        assert isinstance(layout, PairLayout)
        return SampleCost(layout.tokens, layout.num_labels, layout.tiles, video, layout.chosen_labels)
