"""Record -> token ids, labels and tiles: one path for text, one image and several images.

`measure` and `encode` share one layout step that needs image headers only, so the index and a worker cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ivl_lightning.config.schema import DataConfig, ImageLabels, OverLength
from ivl_lightning.constants import DOWNSAMPLE_RATIO, IGNORE_INDEX, PATCH_SIZE, TILE_SIZE
from ivl_lightning.data.annotations import DatasetSpec, media_of
from ivl_lightning.data.augmentation import degrade_jpeg
from ivl_lightning.data.conversation import encode_prompt, encode_row
from ivl_lightning.data.media import MediaReader
from ivl_lightning.data.tiling import count_tiles, cut_tiles, tile_budget
from ivl_lightning.models.tokenizer import image_token_id
from ivl_lightning.structures import Encoded, Record, RowError, SampleCost

VIDEO_NOT_READ = "video_not_supported"


def tokens_per_tile(
    tile_size: int = TILE_SIZE, patch_size: int = PATCH_SIZE, downsample_ratio: float = DOWNSAMPLE_RATIO
) -> int:
    """Context tokens of a tile: 448-pixel tiles of 14-pixel patches, unshuffled by 0.5, give 256."""
    return int(tile_size // patch_size * downsample_ratio) ** 2


@dataclass(frozen=True, slots=True)
class EncodingSettings:
    """Everything that decides how many tokens and tiles a record gets; part of the index's cache key.

    Attributes:
        template: chat template.
        max_tokens, max_pack_tiles: caps of one sample.
        tokens_per_tile: context tokens of a tile.
        tile_size, min_tiles, max_tiles, use_thumbnail: tiling; `max_tiles` holds where the dataset gives none.
        dataset_tiles: let a dataset's `max_dynamic_patch` override `max_tiles` (training), or not (validation).
        over_length: what happens to a sample over a cap.
        image_labels: see `DataConfig.image_labels`.
    """

    template: str
    max_tokens: int
    max_pack_tiles: int
    tokens_per_tile: int
    tile_size: int
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool
    dataset_tiles: bool
    over_length: OverLength
    image_labels: ImageLabels


@dataclass(frozen=True, slots=True)
class _Layout:
    """A record's text with its image slots, before pixels. `max_tiles` is the limit per image that was used."""

    input_ids: list[int]
    labels: list[int]
    tiles: tuple[int, ...]
    max_tiles: int


class Tiling(TypedDict):
    """Arguments of `count_tiles` and `cut_tiles`."""

    min_tiles: int
    max_tiles: int
    tile_size: int
    use_thumbnail: bool


class RowEncoder:
    """Measures and encodes the records of one dataset.

    Args:
        spec: the dataset.
        reader: opens its media.
        tokenizer: with the nine special tokens.
        settings: caps, tiling, template.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        reader: MediaReader,
        tokenizer: PreTrainedTokenizerBase,
        settings: EncodingSettings,
    ) -> None:
        self.spec = spec
        self.reader = reader
        self.tokenizer = tokenizer
        self.settings = settings
        self._context_id = image_token_id(tokenizer)

    def measure(self, record: Record) -> SampleCost:
        """Tokens, label tokens and tiles from the text and the image headers.

        Raises:
            RowError: the record cannot be used; the reason says why.
        """
        layout = self._layout(record)
        labels = sum(label != IGNORE_INDEX for label in layout.labels[1:])
        return SampleCost(len(layout.input_ids), labels, layout.tiles)

    def encode(self, record: Record, rng: np.random.Generator | None) -> Encoded:
        """Ids, labels and tiles. `rng` degrades the tiles of a dataset with `data_augment`; None leaves them.

        Raises:
            RowError: the record cannot be used, a picture that breaks only when decoded included.
        """
        layout = self._layout(record)
        tiles = self._tiles(record, layout.max_tiles)
        found = 0 if tiles is None else len(tiles)
        assert found == sum(layout.tiles), (record, found, layout.tiles)
        if tiles is not None and rng is not None and self.spec.data_augment:
            tiles = degrade_jpeg(tiles, rng)
        return Encoded(layout.input_ids, layout.labels, tiles)

    def encode_prompt(self, record: Record) -> tuple[list[int], Tensor | None]:
        """Ids up to the last answer, and tiles, for generation."""
        images = self._images(record)
        max_tiles = self._max_tiles(len(images))
        counts = self._count_tiles(images, max_tiles)
        ids = encode_prompt(
            record.row,
            self.tokenizer,
            template=self.settings.template,
            num_image_tokens=self._num_image_tokens(counts),
            image_labels=self.settings.image_labels,
        )
        return ids, self._tiles(record, max_tiles)

    def _layout(self, record: Record) -> _Layout:
        images = self._images(record)
        max_tiles = self._max_tiles(len(images))
        layout = self._lay_out(record, images, max_tiles)
        if self.settings.over_length == "shrink":
            while images and max_tiles > 1 and not self._fits(layout):
                max_tiles -= 1
                layout = self._lay_out(record, images, max_tiles)
        if self._fits(layout):
            return layout
        if self.settings.over_length == "truncate":
            return self._truncate(layout)
        raise self._over_length(layout)

    def _lay_out(self, record: Record, images: tuple[str, ...], max_tiles: int) -> _Layout:
        counts = self._count_tiles(images, max_tiles)
        ids, labels = encode_row(
            record.row,
            self.tokenizer,
            template=self.settings.template,
            num_image_tokens=self._num_image_tokens(counts),
            image_labels=self.settings.image_labels,
        )
        return _Layout(ids, labels, counts, max_tiles)

    def _num_image_tokens(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(count * self.settings.tokens_per_tile for count in counts)

    def _fits(self, layout: _Layout) -> bool:
        return len(layout.input_ids) <= self.settings.max_tokens and sum(layout.tiles) <= self.settings.max_pack_tiles

    def _truncate(self, layout: _Layout) -> _Layout:
        """The official cut at the token cap; a cut that would lose part of an image rejects instead."""
        kept = layout.input_ids[: self.settings.max_tokens]
        slots = sum(layout.tiles) * self.settings.tokens_per_tile
        if kept.count(self._context_id) != slots or sum(layout.tiles) > self.settings.max_pack_tiles:
            raise self._over_length(layout)
        return _Layout(kept, layout.labels[: len(kept)], layout.tiles, layout.max_tiles)

    def _over_length(self, layout: _Layout) -> RowError:
        return RowError(
            "over_length",
            f"{len(layout.input_ids)} tokens and {sum(layout.tiles)} tiles, but a pack holds "
            f"{self.settings.max_tokens} and {self.settings.max_pack_tiles}: raise data.max_tokens or "
            "data.max_pack_tiles, lower max_dynamic_patch, or set data.over_length=shrink or truncate",
        )

    def _images(self, record: Record) -> tuple[str, ...]:
        kind, images, _ = media_of(record.row)
        if kind == "video":
            raise RowError(VIDEO_NOT_READ, "video rows are set aside: this version trains on images and text")
        return images

    def _max_tiles(self, num_images: int) -> int:
        own = self.spec.max_dynamic_patch if self.settings.dataset_tiles else None
        limit = self.settings.max_tiles if own is None else own
        return tile_budget(limit, num_images) if num_images else limit

    def _count_tiles(self, images: tuple[str, ...], max_tiles: int) -> tuple[int, ...]:
        tiling = self._tiling(max_tiles)
        return tuple(count_tiles(*self.reader.image_size(path), **tiling) for path in images)

    def _tiles(self, record: Record, max_tiles: int) -> Tensor | None:
        images = self._images(record)
        if not images:
            return None
        tiling = self._tiling(max_tiles)
        return torch.cat([cut_tiles(self.reader.load_image(path), **tiling) for path in images])

    def _tiling(self, max_tiles: int) -> Tiling:
        return {
            "min_tiles": min(self.settings.min_tiles, max_tiles),
            "max_tiles": max_tiles,
            "tile_size": self.settings.tile_size,
            "use_thumbnail": self.settings.use_thumbnail,
        }


EncoderFactory = Callable[[DatasetSpec], RowEncoder]


def encoder_factory(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, template: str, tile_tokens: int, training: bool
) -> EncoderFactory:
    """Makes the encoder of each dataset under the training or the validation settings.

    Args:
        config: caps, tiling, paths.
        tokenizer: with the nine special tokens.
        template: chat template.
        tile_tokens: context tokens of a tile.
        training: false takes `val_max_tiles` for every dataset.
    """
    settings = EncodingSettings(
        template=template,
        max_tokens=min(config.max_tokens, config.max_sample_tokens or config.max_tokens),
        max_pack_tiles=config.max_pack_tiles,
        tokens_per_tile=tile_tokens,
        tile_size=config.tile_size,
        min_tiles=config.min_tiles,
        max_tiles=config.max_tiles if training else config.val_max_tiles,
        use_thumbnail=config.use_thumbnail,
        dataset_tiles=training,
        over_length=config.over_length,
        image_labels=config.image_labels,
    )

    def factory(spec: DatasetSpec) -> RowEncoder:
        reader = MediaReader(
            root=spec.root,
            allowed_schemes=tuple(config.allowed_schemes),
            follow_symlinks=config.follow_symlinks,
            max_pixels=config.max_pixels,
            exif_transpose=config.exif_transpose,
            gray16=config.gray16,
        )
        return RowEncoder(spec, reader, tokenizer, settings)

    return factory
