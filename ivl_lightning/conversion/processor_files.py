"""What transformers, LMDeploy and vLLM look for beside the weights: tokenizer, image settings, chat template."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from transformers import InternVLConfig, PreTrainedTokenizerBase

from ivl_lightning.constants import (
    IMAGE_CONTEXT_TOKEN,
    IMAGE_END_TOKEN,
    IMAGE_PLACEHOLDER,
    IMAGE_START_TOKEN,
    IMAGENET_MEAN,
    IMAGENET_STD,
    VIDEO_PLACEHOLDER,
)
from ivl_lightning.conversion.chat_template import fit_chat_template
from ivl_lightning.conversion.json_files import write_json
from ivl_lightning.conversion.tokenizer_files import write_fast_files, write_slow_files
from ivl_lightning.models.parts import text_config, tile_size

Layout = Literal["hf", "original"]

_log = logging.getLogger(__name__)

_PROCESSOR = "InternVLProcessor"
_BICUBIC = 3
_SPARE_TOKEN = "<quad>"
"""Stands for a video where the vocabulary has no `<video>`: of the nine special tokens the one that no data uses."""


def write_processor_files(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: InternVLConfig,
    *,
    template: str,
    layout: Layout,
    min_tiles: int,
    max_tiles: int,
    use_thumbnail: bool,
    dynamic: bool,
) -> list[str]:
    """Write everything but weights, `config.json` and `generation_config.json` into an exported folder.

    Layout `hf`: tokenizer, `preprocessor_config.json`, `video_preprocessor_config.json`, `processor_config.json` and
    `chat_template.jinja`, for transformers' `InternVLProcessor`. Layout `original`: Qwen2's slow tokenizer files, or
    `tokenizer.json` for the other families, whose `tokenizer.model` cannot be made anew; the chat template stands in
    `tokenizer_config.json`; `preprocessor_config.json` is CLIP's.

    No id changes and no token is added. A warning names what the layout cannot say: a chat template that no text can
    repeat, and several tiles without thumbnail in layout `hf`, whose image processor always adds one.

    Args:
        folder: the exported folder; files of the same names are replaced.
        tokenizer: as `load_tokenizer` returns it; not changed.
        config: configuration of the exported model.
        template: name of the chat template the model was trained with.
        layout: `hf` or `original`.
        min_tiles, max_tiles: tiles of a grid, without the thumbnail.
        use_thumbnail: whether a grid of several tiles is followed by the whole image.
        dynamic: false if an image is one tile, whatever its shape.

    Returns:
        Names of the files written, sorted.

    Raises:
        ValueError: the template is not known; the tokenizer lacks a special token, or has more tokens than the model
            has rows.
    """
    check_vocabulary(tokenizer, config)
    if layout == "original":
        return sorted([*_write_original_tokenizer(folder, tokenizer, config, template), _write_clip(folder, config)])
    limits = (min_tiles, max_tiles) if dynamic else (1, 1)
    if not use_thumbnail and limits[1] > 1:
        _log.warning(
            "The image processor of layout hf always adds a thumbnail to several tiles, which this model was trained "
            "without: export with layout original, or prompt it with ivl-chat"
        )
    names = _write_hf_tokenizer(folder, tokenizer, config, template)
    names += _write_hf_images(folder, config, *limits)
    return sorted(names)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: InternVLConfig) -> None:
    """Every special token is there, and every token has a row in the model.

    Raises:
        ValueError: one is missing, or there are more tokens than rows.
    """
    added = tokenizer.get_added_vocab()
    needed = (IMAGE_START_TOKEN, IMAGE_END_TOKEN, IMAGE_CONTEXT_TOKEN, _SPARE_TOKEN)
    missing = [token for token in needed if token not in added]
    if missing:
        raise ValueError(
            f"the tokenizer has no {', '.join(missing)}: call add_special_tokens(tokenizer) before training"
        )
    highest, rows = max(tokenizer.get_vocab().values()), text_config(config).vocab_size
    if highest >= rows:
        raise ValueError(
            f"the tokenizer's highest id is {highest}, but the model has {rows} rows: "
            "export the tokenizer that the model was trained with"
        )


def _write_hf_tokenizer(
    folder: Path, tokenizer: PreTrainedTokenizerBase, config: InternVLConfig, template: str
) -> list[str]:
    # A new `<video>` would get an id behind the model's last row. vLLM needs one token, without characters that mean
    # something in a regular expression.
    video = VIDEO_PLACEHOLDER if VIDEO_PLACEHOLDER in tokenizer.get_added_vocab() else _SPARE_TOKEN
    jinja = fit_chat_template(tokenizer, template, image=IMAGE_CONTEXT_TOKEN, video=video)
    (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    named = {
        "start_image_token": IMAGE_START_TOKEN,
        "end_image_token": IMAGE_END_TOKEN,
        "context_image_token": IMAGE_CONTEXT_TOKEN,
        "video_token": video,
    }
    names = write_fast_files(
        folder,
        tokenizer,
        max_length=text_config(config).max_position_embeddings,
        named=named,
        processor_class=_PROCESSOR,
        padding_side="left",
    )
    return [*names, "chat_template.jinja"]


def _write_hf_images(folder: Path, config: InternVLConfig, min_tiles: int, max_tiles: int) -> list[str]:
    pixels = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "resample": _BICUBIC,
        "rescale_factor": 1 / 255,
        "size": {"height": tile_size(config), "width": tile_size(config)},
        "processor_class": _PROCESSOR,
    }
    # The processor asks for tiles in every call, so one tile is said by the limits. `Fast` is for version 4, of which
    # vLLM accepts that class only; version 5 knows both names for one class.
    images = {
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "crop_to_patches": True,
        "min_patches": min_tiles,
        "max_patches": max_tiles,
    }
    videos = {"video_processor_type": "InternVLVideoProcessor", "do_sample_frames": False, "initial_shift": True}
    write_json(folder / "preprocessor_config.json", {**images, **pixels})
    write_json(folder / "video_preprocessor_config.json", {**videos, **pixels})
    write_json(
        folder / "processor_config.json",
        {"processor_class": _PROCESSOR, "image_seq_length": config.image_seq_length},
    )
    return ["preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"]


def _write_original_tokenizer(
    folder: Path, tokenizer: PreTrainedTokenizerBase, config: InternVLConfig, template: str
) -> list[str]:
    # vLLM replaces the placeholders of this layout in the text.
    jinja = fit_chat_template(tokenizer, template, image=IMAGE_PLACEHOLDER, video=VIDEO_PLACEHOLDER)
    max_length = text_config(config).max_position_embeddings
    names = write_slow_files(folder, tokenizer, max_length=max_length, chat_template=jinja)
    return names or write_fast_files(folder, tokenizer, max_length=max_length, named={}, chat_template=jinja)


def _write_clip(folder: Path, config: InternVLConfig) -> str:
    size = tile_size(config)
    content = {
        "crop_size": size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "resample": _BICUBIC,
        "size": size,
    }
    write_json(folder / "preprocessor_config.json", content)
    return "preprocessor_config.json"
