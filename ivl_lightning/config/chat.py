"""Settings of talking with a model, `ivl-chat`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.schema import ImageLabels, Strict

MOST_TILES = 40
MOST_FRAMES = 64
_SAMPLED_ONLY = ("temperature", "top_p", "top_k")


@dataclass(kw_only=True)
class ChatModel(Strict):
    """Which network answers.

    Attributes:
        path: folder of weights, or a run folder, of which the stage that finished last answers.
        tokenizer: folder of tokenizer files; null takes those beside the weights.
        template: chat template (`ivl_lightning.data.templates`); null takes the one that the checkpoint names, or
            `internvl2_5` where it names none.
        dtype: of the weights in memory.
    """

    path: str | None = None
    tokenizer: str | None = None
    template: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(kw_only=True)
class ChatConfig(Strict):
    """What is shown and asked, how pictures are cut, and how the answer is made.

    Attributes:
        model: the network that answers.
        image: file or https address of a picture, or a list of these; shown with the first question.
        video: file, https address or folder of frames of a video; shown with the first question.
        prompt: the question; null begins a conversation that is read from the terminal or a pipe.
        system: system turn in place of the template's own; only some templates have a place for it.
        min_tiles: tiles of an image at least.
        max_tiles: tiles at most, thumbnails not counted; several images of a conversation share them.
        use_thumbnail: add the whole picture as a last tile when there are several.
        frames: frames of a video at most, from the middles of as many equal intervals.
        image_labels: `auto` writes `Image-i: ` before the pictures of a conversation with several; `keep` does not.
        exif_transpose: turn pictures upright by their EXIF orientation; training does not unless it is told to.
        max_new_tokens: tokens of an answer at most.
        do_sample: false takes the likeliest token each time.
        temperature: of sampling; null takes the checkpoint's own.
        top_p: only the likeliest tokens that make up this share are sampled; null takes the checkpoint's own.
        top_k: only the k likeliest tokens are sampled, 0 allows all; null takes the checkpoint's own.
        repetition_penalty: above 1 makes tokens that the answer already has less likely; null takes the checkpoint's
            own.
        seed: of sampling; the same question in the same conversation gets the same answer.
        stream: show the answer as it is made; false shows it when it is complete.
        device: `auto` takes CUDA where there is one.
        device_map: `auto` spreads the model over all GPUs, and over main memory where they are too small; null keeps
            it on one device.
    """

    model: ChatModel = field(default_factory=ChatModel)
    image: str | list[str] | None = None
    video: str | None = None
    prompt: str | None = None
    system: str | None = None
    min_tiles: int = 1
    max_tiles: int = 12
    use_thumbnail: bool = True
    frames: int = 32
    image_labels: ImageLabels = "keep"
    exif_transpose: bool = False
    max_new_tokens: int = 1024
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int = 0
    stream: bool = True
    device: Literal["auto", "cpu", "cuda"] = "auto"
    device_map: Literal["auto"] | None = None

    @property
    def images(self) -> list[str]:
        """The pictures of `image`, in order."""
        return [self.image] if isinstance(self.image, str) else list(self.image or ())


def check_chat(config: ChatConfig) -> None:
    """Check the settings before anything is loaded.

    Raises:
        ConfigError: lists every one that is out of its range or contradicts another.
    """
    faults = [*_media_faults(config), *_answer_faults(config)]
    if config.device == "cpu" and config.device_map is not None:
        faults.append(f"device=cpu and device_map={config.device_map}: give one of them")
    if faults:
        raise ConfigError("\n".join(faults))


def _media_faults(config: ChatConfig) -> Iterator[str]:
    if not 1 <= config.min_tiles <= config.max_tiles <= MOST_TILES:
        yield (
            f"min_tiles={config.min_tiles}, max_tiles={config.max_tiles}: at least 1, at most {MOST_TILES}, and "
            "max_tiles not below min_tiles"
        )
    if not 1 <= config.frames <= MOST_FRAMES:
        yield f"frames={config.frames} must be at least 1 and at most {MOST_FRAMES}"
    if "" in (*config.images, config.video):
        yield "image and video need the name of a file: give one, or leave them out"
    if config.images and config.video is not None:
        yield f"image={config.image} and video={config.video}: a conversation has pictures or a video, give one of them"


def _answer_faults(config: ChatConfig) -> Iterator[str]:
    if config.prompt is not None and not config.prompt.strip():
        yield "prompt is empty: write a question, or leave it out for a conversation"
    if config.max_new_tokens < 1:
        yield f"max_new_tokens={config.max_new_tokens} must be at least 1"
    if config.seed < 0:
        yield f"seed={config.seed} must be at least 0"
    if config.repetition_penalty is not None and not config.repetition_penalty > 0.0:
        yield f"repetition_penalty={config.repetition_penalty} must be above 0; 1 is off"
    yield from _sampling_faults(config)


def _sampling_faults(config: ChatConfig) -> Iterator[str]:
    if config.temperature is not None and not config.temperature > 0.0:
        yield f"temperature={config.temperature} must be above 0: for the likeliest answer take do_sample=false"
    if config.top_p is not None and not 0.0 < config.top_p <= 1.0:
        yield f"top_p={config.top_p} is a share above 0, 1 at most"
    if config.top_k is not None and config.top_k < 0:
        yield f"top_k={config.top_k} must be at least 0"
    for name in _SAMPLED_ONLY:
        value = getattr(config, name)
        if value is not None and not config.do_sample:
            yield f"{name}={value} does nothing where nothing is sampled: add do_sample=true, or leave it out"
