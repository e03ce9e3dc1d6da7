"""A conversation with a model, its prompts made by the code that makes those of training."""

from __future__ import annotations

import logging
import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Self

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerBase

from ivl_lightning.config.chat import ChatConfig, ChatModel, check_chat
from ivl_lightning.config.check import ConfigError
from ivl_lightning.data.annotations import DatasetSpec
from ivl_lightning.data.collate import pad_prompts
from ivl_lightning.data.encoding import RowEncoder
from ivl_lightning.data.layout import EncodingSettings, tokens_per_tile
from ivl_lightning.data.templates import get_template, stop_ids, template_of
from ivl_lightning.inference.decoding import StreamDecoder
from ivl_lightning.inference.devices import input_device, load_placed, moved
from ivl_lightning.inference.history import History
from ivl_lightning.inference.shown import Picture, ShownMedia
from ivl_lightning.inference.streaming import stream_ids
from ivl_lightning.models.checkpoint import open_checkpoint, read_config
from ivl_lightning.models.parts import patch_size, text_config, tile_size
from ivl_lightning.models.tokenizer import add_special_tokens, filler_id, image_token_id, load_tokenizer
from ivl_lightning.structures import PromptBatch, Turn

_log = logging.getLogger(__name__)


class Chat:
    """Asks a model, turn after turn.

    `Chat.from_folder("FOLDER").ask("What is it?", images=["a.jpg"])` yields the answer piece by piece; the next
    question continues the conversation. Each question is encoded anew as a row of the dataset format that holds the
    whole conversation, so that all its pictures share `max_tiles`.

    Args:
        model: on its device; it is put into evaluation mode, and told the tokenizer's id of image tokens.
        tokenizer: the model's, with the nine special tokens.
        config: tiles, frames, sampling, and the system turn; of `config.model` only the template is read.

    Attributes:
        template: name of the chat template.
        finished: whether the last answer ended by itself, not at `max_new_tokens` and not because nobody read on.

    Raises:
        ConfigError: settings out of their range, a system turn that the template has no place for, or a tokenizer of
            another model.
        ValueError: the template is not known.
    """

    def __init__(
        self,
        model: InternVLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        config: ChatConfig | None = None,
    ) -> None:
        self.config = config or ChatConfig()
        check_chat(self.config)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.template = template_of(self.config.model.template, model.config)
        self.finished = True
        _check_vocabulary(model.config, tokenizer)
        model.config.image_token_id = model.model.config.image_token_id = image_token_id(tokenizer)
        self._stop_ids = stop_ids(tokenizer, self.template)
        self._pad_id = filler_id(tokenizer)
        self._media = ShownMedia(exif_transpose=self.config.exif_transpose)
        self._encoder = _encoder(self.config, model.config, tokenizer, self.template, self._media)
        self._history = History()
        self._attached = History()
        self._system: str | None = None
        self.system = self.config.system

    @classmethod
    def from_folder(
        cls, path: str | Path, *, tokenizer: str | None = None, template: str | None = None, **settings: Any
    ) -> Self:
        """Read a model and talk with it.

        Args:
            path: folder of weights.
            tokenizer: folder of tokenizer files; None takes those beside the weights.
            template: chat template; None takes the checkpoint's.
            **settings: `dtype`, and those of `ChatConfig`: `max_tiles`, `device`, `device_map`, `system`, ...

        Raises:
            ValueError: no such model, or a setting that cannot hold.
        """
        model = {"dtype": settings.pop("dtype")} if "dtype" in settings else {}
        named = ChatModel(path=str(path), tokenizer=tokenizer, template=template, **model)
        return cls.from_config(ChatConfig(model=named, **settings))

    @classmethod
    def from_config(cls, config: ChatConfig) -> Self:
        """Read the model of `config.model.path`, put it on its device and talk with it.

        Raises:
            ValueError: no such model, or a setting that cannot hold.
        """
        check_chat(config)
        if config.model.path is None:
            raise ConfigError("model.path is missing: give the folder of the model that answers")
        # Before minutes of loading.
        template_of(config.model.template, read_config(config.model.path))
        tokenizer = _tokenizer(config)
        model = load_placed(
            config.model.path,
            dtype=getattr(torch, config.model.dtype),
            device=config.device,
            device_map=config.device_map,
        )
        return cls(model, tokenizer, config)

    @property
    def device(self) -> torch.device:
        """Where prompts are put; of a spread model where it begins."""
        return input_device(self.model)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What was said, with the placeholders of what was shown; without the system turn."""
        return self._history.turns

    @property
    def system(self) -> str | None:
        """The system turn; None for the template's own.

        Setting it also changes what questions asked before stand under.

        Raises:
            ConfigError: the template has no place for one.
        """
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if text is not None and not get_template(self.template).per_turn:
            raise ConfigError(
                f"system={text!r}: the model's chat template {self.template!r} has no place for a system turn: leave "
                "it out, and write it into the question"
            )
        self._system = text

    def clear(self) -> None:
        """Begin another conversation, under the same system turn."""
        self._history = self._attached = History()
        self._media.forget()

    def attach(self, images: Sequence[Picture] = (), video: str | Path | None = None) -> None:
        """Show pictures or a video with the next question.

        Raises:
            MediaError: one cannot be read; names the file.
            ValueError: a second video, or a video beside pictures.
        """
        self._attached = self._with_media(self._attached, images, video)

    def ask(
        self,
        text: str,
        images: Sequence[Picture] = (),
        video: str | Path | None = None,
        *,
        seed: int | None = None,
        **options: Any,
    ) -> Generator[str, None, None]:
        """Put a question; the answer comes piece by piece and is read to its end before the next question.

        The pieces together are the answer without blanks at both ends. With its end question and answer join the
        conversation. If it is read no further (the iterator is closed, or an interrupt comes while it is read) the
        network stops, and they join it as far as the answer was read. After an error the conversation is as before.

        Args:
            text: the question; `<image>` in it stands where a picture is, otherwise pictures stand before it.
            images: pictures of this question, behind those that were attached.
            video: a video, or a folder of frames.
            seed: of sampling; None takes that of the settings.
            **options: of the library's `generate`, in place of those of the settings.

        Raises:
            RowError: the question cannot be asked: a picture that cannot be read, placeholders that do not match, ...
            ValueError: a second video, or a video beside pictures.
            Exception: what generation raises, while the answer is read.
        """
        _check_text(text)
        shown = self._with_media(self._attached, images, video)
        asked = self._history.asked(text, shown.images, shown.video)
        prompt = self._prompt(asked)
        chosen = self.config.seed if seed is None else seed
        return self._answer(asked, prompt, {**self._options(), "seed": chosen, **options})

    def _with_media(self, attached: History, images: Sequence[Picture], video: str | Path | None) -> History:
        """What waits for the next question, checked together with what was shown before."""
        names = [self._media.show_picture(picture) for picture in images]
        waiting = attached.showing(names, None if video is None else self._media.show_video(video))
        self._history.showing(waiting.images, waiting.video)
        return waiting

    def _prompt(self, asked: History) -> PromptBatch:
        record = asked.record(self.system)
        encoded = self._encoder.encode_prompt(record)
        self._warn_of_length(len(encoded[0]))
        prompt = pad_prompts(
            [encoded],
            expected=[""],
            records=[record],
            counted=[True],
            pad_id=self._pad_id,
            tile_size=tile_size(self.model.config),
        )
        return moved(prompt, self.device)

    def _answer(self, asked: History, prompt: PromptBatch, options: dict[str, Any]) -> Generator[str, None, None]:
        told: list[str] = []
        complete = False
        try:
            with closing(self._pieces(prompt, options)) as pieces:
                for piece in pieces:
                    told.append(piece)
                    yield piece
            complete = True
        except Exception:
            # What failed half-way was not said; an interrupt is no failure, and keeps what was read.
            told.clear()
            raise
        finally:
            if complete or told:
                self._history = asked.answered("".join(told))
                self._attached = History()

    def _pieces(self, prompt: PromptBatch, options: dict[str, Any]) -> Generator[str, None, None]:
        decoder = StreamDecoder(self.tokenizer)
        self.finished = ended = False
        with closing(stream_ids(self.model, prompt, **options)) as ids:
            for token in ids:
                ended = ended or token in self._stop_ids
                if not ended and (piece := decoder.push(token)):
                    yield piece
        if rest := decoder.close():
            yield rest
        self.finished = ended

    def _options(self) -> dict[str, Any]:
        names = ("temperature", "top_p", "top_k", "repetition_penalty")
        given = {name: value for name in names if (value := getattr(self.config, name)) is not None}
        return {
            "do_sample": self.config.do_sample,
            "max_new_tokens": self.config.max_new_tokens,
            "pad_token_id": self._pad_id,
            "eos_token_id": self._stop_ids,
            **given,
        }

    def _warn_of_length(self, tokens: int) -> None:
        most = getattr(text_config(self.model.config), "max_position_embeddings", None)
        if most is not None and tokens >= most:
            _log.warning(
                "the conversation has %d tokens, and the model was made for %d: begin another one, or lower max_tiles "
                "or frames",
                tokens,
                most,
            )


def _tokenizer(config: ChatConfig) -> PreTrainedTokenizerBase:
    """The one that is asked for, or the checkpoint's."""
    assert config.model.path is not None
    if config.model.tokenizer is not None:
        tokenizer = load_tokenizer(config.model.tokenizer)
    else:
        load = open_checkpoint(config.model.path).tokenizer
        if load is None:
            raise ConfigError(
                f"model.path={config.model.path}: there are no tokenizer files: give model.tokenizer=FOLDER"
            )
        tokenizer = load()
    add_special_tokens(tokenizer)
    return tokenizer


def _check_vocabulary(config: InternVLConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    known = text_config(config).vocab_size
    if len(tokenizer) > known:
        raise ConfigError(
            f"the model knows {known} tokens and its tokenizer has {len(tokenizer)}, with those that mark images: they "
            "do not belong together, or the model was never trained with images; give model.tokenizer=FOLDER"
        )


def _encoder(
    config: ChatConfig,
    shapes: InternVLConfig,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    media: ShownMedia,
) -> RowEncoder:
    side = tile_size(shapes)
    settings = EncodingSettings(
        template=template,
        # Caps are of packs; a prompt has none.
        max_tokens=sys.maxsize,
        max_pack_tokens=sys.maxsize,
        max_pack_tiles=sys.maxsize,
        tokens_per_tile=tokens_per_tile(side, patch_size(shapes), shapes.downsample_ratio),
        tile_size=side,
        min_tiles=config.min_tiles,
        max_tiles=config.max_tiles,
        use_thumbnail=config.use_thumbnail,
        resize="exact",
        dataset_tiles=False,
        min_frames=1,
        max_frames=config.frames,
        frame_sampling="middle",
        over_length="reject",
        image_labels=config.image_labels,
    )
    spec = DatasetSpec("chat", media.root, annotation="", data_augment=False, repeat_time=1)
    return RowEncoder(spec, media, tokenizer, settings)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is not valid Unicode ({error}): write it in UTF-8") from error
