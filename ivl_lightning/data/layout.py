"""What a sample would take of a pack: its text with image slots, and the tiles that fill them, before pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

from ivl_lightning.config.schema import ImageLabels, OverLength, Resize
from ivl_lightning.constants import DOWNSAMPLE_RATIO, IGNORE_INDEX, PATCH_SIZE, TILE_SIZE
from ivl_lightning.data.conversation import TokenizedRow
from ivl_lightning.structures import RowError


def tokens_per_tile(
    tile_size: int = TILE_SIZE, patch_size: int = PATCH_SIZE, downsample_ratio: float = DOWNSAMPLE_RATIO
) -> int:
    """Context tokens of a tile: 448-pixel tiles of 14-pixel patches, unshuffled by 0.5, give 256."""
    return int(tile_size // patch_size * downsample_ratio) ** 2


class Tiling(TypedDict):
    """Arguments of `count_tiles` and, with `resize`, of `cut_tiles`."""

    min_tiles: int
    max_tiles: int
    tile_size: int
    use_thumbnail: bool


@dataclass(frozen=True, slots=True)
class EncodingSettings:
    """Everything that decides how many tokens and tiles a record gets; part of the index's cache key.

    Attributes:
        template: chat template.
        max_tokens: cap of one conversation.
        max_pack_tokens, max_pack_tiles: caps of a pack.
        tokens_per_tile: context tokens of a tile.
        tile_size, min_tiles, max_tiles, use_thumbnail: tiling; `max_tiles` holds where the dataset gives none.
        resize: how pixels are made; see `cut_tiles`.
        dataset_tiles: let a dataset's `max_dynamic_patch` override `max_tiles` (training), or not (validation).
        min_frames, max_frames, frame_sampling: of videos; see `data.video`.
        over_length: what happens to a sample over a cap.
        image_labels: see `DataConfig.image_labels`.
    """

    template: str
    max_tokens: int
    max_pack_tokens: int
    max_pack_tiles: int
    tokens_per_tile: int
    tile_size: int
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool
    resize: Resize
    dataset_tiles: bool
    min_frames: int
    max_frames: int
    frame_sampling: str
    over_length: OverLength
    image_labels: ImageLabels

    def tiling(self, max_tiles: int) -> Tiling:
        """Arguments for an image that may take `max_tiles`."""
        return {
            "min_tiles": min(self.min_tiles, max_tiles),
            "max_tiles": max_tiles,
            "tile_size": self.tile_size,
            "use_thumbnail": self.use_thumbnail,
        }


@dataclass(frozen=True, slots=True)
class Layout:
    """A sample before pixels.

    Attributes:
        input_ids, labels: expanded to one context token per position of a tile, as a worker hands them over.
        tiles: of each image or frame.
        limit: tiles per image, or frames of the video, that led to this layout.
    """

    row: TokenizedRow
    tiles: tuple[int, ...]
    limit: int
    tokens_per_tile: int
    cut_at: int | None = None

    @property
    def tokens(self) -> int:
        """Length of `input_ids`."""
        length = len(self.row.input_ids) - len(self.tiles) + sum(self.tiles) * self.tokens_per_tile
        return length if self.cut_at is None else min(length, self.cut_at)

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation in it."""
        return self.tokens

    @property
    def num_labels(self) -> int:
        """Supervised tokens; one on the document's first position is never trained."""
        labels = self.row.labels if self.cut_at is None else self.ids_and_labels()[1]
        return len(labels) - labels.count(IGNORE_INDEX) - (labels[:1] != [IGNORE_INDEX])

    def ids_and_labels(self) -> tuple[list[int], list[int]]:
        """Token ids and labels, `[tokens]` each."""
        input_ids, labels = self.row.expanded([count * self.tokens_per_tile for count in self.tiles])
        return input_ids[: self.cut_at], labels[: self.cut_at]


def fit(lay_out: Callable[[int], Layout], limit: int, settings: EncodingSettings) -> Layout:
    """The layout under the caps, by the rule `over_length`.

    Args:
        lay_out: the layout with at most so many tiles per image, or frames.
        limit: what the sample may take.
        settings: caps and rule.

    Raises:
        RowError: `over_length` if the sample does not fit under a cap.
    """
    layout = lay_out(limit)
    if settings.over_length == "shrink":
        while layout.tiles and layout.limit > 1 and not _fits(layout, settings):
            layout = lay_out(layout.limit - 1)
    if _fits(layout, settings):
        return layout
    if settings.over_length == "truncate":
        return _truncated(layout, settings)
    raise _over_length(layout, settings)


def _fits(layout: Layout, settings: EncodingSettings) -> bool:
    return (
        layout.longest <= settings.max_tokens
        and layout.tokens <= settings.max_pack_tokens
        and sum(layout.tiles) <= settings.max_pack_tiles
    )


def _truncated(layout: Layout, settings: EncodingSettings) -> Layout:
    """The official cut at the token cap; a cut that would lose part of an image rejects instead."""
    slot = layout.row.input_ids[layout.row.slots[0]] if layout.row.slots else None
    cut = Layout(layout.row, layout.tiles, layout.limit, layout.tokens_per_tile, settings.max_tokens)
    whole = slot is None or cut.ids_and_labels()[0].count(slot) == sum(layout.tiles) * layout.tokens_per_tile
    if not whole or sum(layout.tiles) > settings.max_pack_tiles:
        raise _over_length(layout, settings)
    return cut


def _over_length(layout: Layout, settings: EncodingSettings) -> RowError:
    sample = "" if settings.max_tokens == settings.max_pack_tokens else f", a conversation {settings.max_tokens}"
    return RowError(
        "over_length",
        f"{layout.tokens} tokens and {sum(layout.tiles)} tiles, but a pack holds {settings.max_pack_tokens} and "
        f"{settings.max_pack_tiles}{sample}: raise data.max_tokens or data.max_pack_tiles, lower "
        "max_dynamic_patch (or data.max_frames for videos), or set data.over_length=shrink (or truncate, for "
        "conversations)",
    )
