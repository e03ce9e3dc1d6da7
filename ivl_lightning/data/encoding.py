"""Record -> token ids, labels and tiles: one path for text, one image, several images and video.

`measure` and `encode` share one layout that needs image headers only, so the index and a worker cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from itertools import pairwise
from typing import ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ivl_lightning.config.schema import DataConfig
from ivl_lightning.data.annotations import DatasetSpec, RowMedia, media_of
from ivl_lightning.data.augmentation import degrade_jpeg
from ivl_lightning.data.conversation import TokenizedRow, tokenize_prompt, tokenize_row
from ivl_lightning.data.layout import EncodingSettings, Layout, fit
from ivl_lightning.data.locations import url_scheme
from ivl_lightning.data.media import MediaReader
from ivl_lightning.data.retries import with_retries
from ivl_lightning.data.tiling import count_tiles, cut_tiles, tile_budget
from ivl_lightning.data.turns import parse_turns
from ivl_lightning.data.video import VideoHeader, frame_indices, frame_range, parse_sampling
from ivl_lightning.structures import Encoded, Record, RowError, SampleCost, Turn, VideoCost

Tokenize = Callable[..., TokenizedRow]
Result = TypeVar("Result")

_STORE_PAUSE = 1.0
"""Seconds before an object store is asked again."""


class RowEncoder:
    """Measures and encodes the records of one dataset.

    Args:
        spec: the dataset.
        reader: opens its media.
        tokenizer: with the nine special tokens.
        settings: caps, tiling, frames, template.
        retries: further tries to read a row's media.

    Attributes:
        pairs: whether rows are preference pairs.
    """

    pairs: ClassVar[bool] = False

    def __init__(
        self,
        spec: DatasetSpec,
        reader: MediaReader,
        tokenizer: PreTrainedTokenizerBase,
        settings: EncodingSettings,
        retries: int = 0,
    ) -> None:
        self.spec = spec
        self.reader = reader
        self.tokenizer = tokenizer
        self.settings = settings
        self.retries = retries

    def measure(self, record: Record) -> SampleCost:
        """Tokens, label tokens and tiles from the text and the headers of images and videos.

        Raises:
            RowError: the record cannot be used; the reason says why. `no_label` where nothing would be trained.
        """
        return self._retried(partial(self._measure, record))

    def _measure(self, record: Record) -> SampleCost:
        media = media_of(record.row)
        if media.kind == "video":
            header = self._video_header(media)
            layout = self._video_layout(record, header, None)
            video = self._video_cost(header, layout)
        else:
            layout = self._image_layout(record, [self.reader.image_size(path) for path in media.images])
            video = None
        if layout.num_labels == 0:
            raise RowError("no_label", "the row has no token to train on: give it an answer, or remove it")
        return self._cost(layout, video)

    def _cost(self, layout: Layout, video: VideoCost | None) -> SampleCost:
        return SampleCost(layout.tokens, layout.num_labels, layout.tiles, video)

    def encode(self, record: Record, rng: np.random.Generator | None, *, frames: int | None = None) -> Encoded:
        """Ids, labels and tiles.

        Args:
            record: the row.
            rng: chooses frames, and degrades the tiles of a dataset with `data_augment`; None takes the frames in the
                middle of their intervals and leaves the tiles.
            frames: number of frames of a video; None for the most it may get.

        Raises:
            RowError: the record cannot be used, a picture that breaks only when decoded included.
        """
        layout, tiles = self._prepare(record, rng, frames)
        input_ids, labels = layout.ids_and_labels()
        return Encoded(input_ids, labels, tiles)

    def _prepare(
        self, record: Record, rng: np.random.Generator | None, frames: int | None
    ) -> tuple[Layout, Tensor | None]:
        """The layout of a record, and its tiles."""
        # Drawn once, so that another try takes the same frames and qualities.
        seed = None if rng is None else int(rng.integers(2**63))
        return self._retried(partial(self._read, record, seed, frames))

    def _read(self, record: Record, seed: int | None, frames: int | None) -> tuple[Layout, Tensor | None]:
        rng = None if seed is None else np.random.default_rng(seed)
        media = media_of(record.row)
        tiles: Tensor | None
        if media.kind == "video":
            header = self._video_header(media)
            layout = self._video_layout(record, header, frames)
            tiles = self._frame_tiles(media, header, len(layout.tiles), rng)
        else:
            images = [self.reader.load_image(path) for path in media.images]
            layout = self._image_layout(record, [image.size for image in images])
            tiles = self._image_tiles(images, layout.limit)
        assert sum(layout.tiles) == (0 if tiles is None else len(tiles)), (record, layout.tiles)
        if tiles is not None and rng is not None and self.spec.data_augment:
            tiles = degrade_jpeg(tiles, rng)
        return layout, tiles

    def turns(self, row: Mapping[str, object]) -> tuple[Turn, ...]:
        """The texts of a row in order, the one to learn last: what makes it another row than its neighbor.

        Raises:
            RowError: as `measure`.
        """
        return parse_turns(row)

    def learned_turns(self, row: Mapping[str, object]) -> tuple[Turn, ...]:
        """The turns whose answers are to be learned: what quality rules look at.

        Raises:
            RowError: as `measure`.
        """
        return self.turns(row)

    def question_key(self, row: Mapping[str, object]) -> bytes | None:
        """What rows about one question share, so that all of them are held back or none; None where rows do not."""
        return None

    def encode_prompt(self, record: Record, answer_start: str = "") -> tuple[list[int], Tensor | None]:
        """Ids up to the last answer, or up to the end of its given beginning, and tiles, for generation.

        Raises:
            RowError: as `encode`.
        """
        return self._retried(partial(self._encode_prompt, record, answer_start))

    def _encode_prompt(self, record: Record, answer_start: str) -> tuple[list[int], Tensor | None]:
        media = media_of(record.row)
        tokenize = partial(tokenize_prompt, answer_start=answer_start)
        if media.kind == "video":
            header = self._video_header(media)
            layout = self._lay_out_frames(record, self._frame_range(header)[1], tokenize=tokenize)
            return layout.ids_and_labels()[0], self._frame_tiles(media, header, len(layout.tiles), None)
        images = [self.reader.load_image(path) for path in media.images]
        row = self._tokenize(record, len(images), tokenize)
        layout = self._lay_out_images(row, [image.size for image in images], self.tile_limit(len(images)))
        return layout.ids_and_labels()[0], self._image_tiles(images, layout.limit)

    def _retried(self, read: Callable[[], Result]) -> Result:
        # A store may be away for seconds; a local disk answers at once, and thousands of bad files must not wait.
        pause = 0.0 if url_scheme(self.reader.root) is None else _STORE_PAUSE
        return with_retries(read, self.retries, pause=pause)

    @cached_property
    def frame_tokens(self) -> NDArray[np.int64]:
        """Tokens that the first n frames of a video take beyond those of the first one, `[max_frames + 1]`.

        Special tokens part a prompt into stretches that are tokenized each by itself, so the line of frame i costs the
        same in every row. A worker checks the sum against what it gets.
        """
        turns = [{"from": "human", "value": "<video>\n?"}, {"from": "gpt", "value": "."}]
        most = self.settings.max_frames
        row = self._tokenize_row({"video": "?", "conversations": turns}, most)
        lines = [after - before - 1 + self.settings.tokens_per_tile for before, after in pairwise(row.slots)]
        return np.cumsum([0, 0, *lines])

    # -- images ---------------------------------------------------------------------------------------------------

    def _image_layout(self, record: Record, sizes: Sequence[tuple[int, int]]) -> Layout:
        row = self._tokenize(record, len(sizes))
        return fit(partial(self._lay_out_images, row, sizes), self.tile_limit(len(sizes)), self.settings)

    def _lay_out_images(self, row: TokenizedRow, sizes: Sequence[tuple[int, int]], max_tiles: int) -> Layout:
        tiling = self.settings.tiling(max_tiles)
        tiles = tuple(count_tiles(*size, **tiling) for size in sizes)
        return self._layout(row, tiles, max_tiles)

    def _layout(self, row: TokenizedRow, tiles: tuple[int, ...], limit: int) -> Layout:
        return Layout(row, tiles, limit, self.settings.tokens_per_tile)

    def tile_limit(self, num_images: int) -> int:
        """Grid tiles that each of a row's pictures may have, before a row is shrunk to fit a pack."""
        own = self.spec.max_dynamic_patch if self.settings.dataset_tiles else None
        limit = self.settings.max_tiles if own is None else own
        return tile_budget(limit, num_images) if num_images else limit

    def _image_tiles(self, images: Sequence[Image], max_tiles: int) -> Tensor | None:
        if not images:
            return None
        tiling = self.settings.tiling(max_tiles)
        tiles = [cut_tiles(image, **tiling, resize=self.settings.resize) for image in images]
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles)

    # -- video ----------------------------------------------------------------------------------------------------

    def _video_header(self, media: RowMedia) -> VideoHeader:
        assert media.video is not None
        return self.reader.video_header(media.video, media.clip)

    def _frame_range(self, header: VideoHeader) -> tuple[int, int]:
        return frame_range(
            header.frames,
            rate=header.rate,
            duration=header.duration,
            sampling=self.settings.frame_sampling,
            min_frames=self.settings.min_frames,
            max_frames=self.settings.max_frames,
        )

    def _video_layout(self, record: Record, header: VideoHeader, frames: int | None) -> Layout:
        most = self._frame_range(header)[1]
        if frames is not None and frames > most:
            raise RowError(
                "index_stale",
                f"the video has {header.frames} frames now, and {frames} were planned: it changed after it was "
                "measured. Delete data.cache_dir to measure again",
            )
        return fit(partial(self._lay_out_frames, record), most if frames is None else frames, self.settings)

    def _lay_out_frames(self, record: Record, frames: int, tokenize: Tokenize = tokenize_row) -> Layout:
        row = self._tokenize(record, frames, tokenize)
        return self._layout(row, (1,) * frames, frames)

    def _video_cost(self, header: VideoHeader, layout: Layout) -> VideoCost:
        most = len(layout.tiles)
        # With other frames a row that is cut would be cut elsewhere: its number of frames stays.
        fewest = most if layout.cut_at is not None else min(self._frame_range(header)[0], most)
        return VideoCost(most, fewest, header.frames, header.rate, header.duration)

    def _frame_tiles(self, media: RowMedia, header: VideoHeader, count: int, rng: np.random.Generator | None) -> Tensor:
        assert media.video is not None
        sampling = self.settings.frame_sampling
        if rng is None and sampling == "rand":
            sampling = "middle"
        rng = rng or np.random.default_rng(0)
        indices = frame_indices(header.frames, count, rate=header.rate, sampling=sampling, rng=rng)
        tiling = self.settings.tiling(1)
        # Cut while they are decoded: frames of a large video at full size would fill the memory.
        tiles = self.reader.load_frames(
            media.video, indices, media.clip, then=lambda frame: cut_tiles(frame, **tiling, resize=self.settings.resize)
        )
        return torch.cat(tiles)

    def _tokenize(self, record: Record, num_images: int, tokenize: Tokenize = tokenize_row) -> TokenizedRow:
        return self._tokenize_row(record.row, num_images, tokenize)

    def _tokenize_row(
        self, row: Mapping[str, object], num_images: int, tokenize: Tokenize = tokenize_row
    ) -> TokenizedRow:
        return tokenize(
            row,
            self.tokenizer,
            template=self.settings.template,
            num_images=num_images,
            image_labels=self.settings.image_labels,
        )


EncoderFactory = Callable[[DatasetSpec], RowEncoder]


def encoder_factory(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    tile_tokens: int,
    training: bool,
    encoder: type[RowEncoder] = RowEncoder,
) -> EncoderFactory:
    """Makes the encoder of each dataset under the training or the validation settings.

    Args:
        config: caps, tiling, paths.
        tokenizer: with the nine special tokens.
        template: chat template.
        tile_tokens: context tokens of a tile.
        training: false takes `val_max_tiles` for every dataset.
        encoder: of conversations, or of preference pairs (`PairEncoder`).

    Raises:
        ValueError: `frame_sampling` is not known, or `over_length` would cut answers of pairs.
    """
    parse_sampling(config.frame_sampling)
    if encoder.pairs and config.over_length == "truncate":
        raise ValueError("data.over_length=truncate would cut answers of preference pairs: use reject or shrink")
    settings = EncodingSettings(
        template=template,
        max_tokens=min(config.max_tokens, config.max_sample_tokens or config.max_tokens),
        max_pack_tokens=config.max_tokens,
        max_pack_tiles=config.max_pack_tiles,
        tokens_per_tile=tile_tokens,
        tile_size=config.tile_size,
        min_tiles=config.min_tiles,
        max_tiles=config.max_tiles if training else config.val_max_tiles,
        use_thumbnail=config.use_thumbnail,
        resize=config.resize,
        dataset_tiles=training,
        min_frames=config.min_frames,
        max_frames=config.max_frames,
        frame_sampling=config.frame_sampling,
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
        return encoder(spec, reader, tokenizer, settings, config.retries)

    return factory
