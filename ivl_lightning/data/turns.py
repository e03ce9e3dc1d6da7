"""The turns of a row, checked, with one `<image>` for each image or frame."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import get_args

from ivl_lightning.config.schema import ImageLabels
from ivl_lightning.constants import IMAGE_PLACEHOLDER, RESERVED_TOKENS, VIDEO_PLACEHOLDER
from ivl_lightning.structures import Role, RowError, Turn

IMAGE_LABELS: tuple[ImageLabels, ...] = get_args(ImageLabels)

_ROLES: tuple[Role, ...] = get_args(Role)
# A numbered name and a colon right before the placeholder: "Image-1: <image>", "Picture 2:<image>", "Frame3: <image>".
_NUMBERED_LABEL = re.compile(r"\w[-_ ]?\d+[ \t]*[:：][ \t]*" + re.escape(IMAGE_PLACEHOLDER))


def parse_turns(row: Mapping[str, object], *, answered: bool = True) -> tuple[Turn, ...]:
    """The conversation of a row: at most one system turn, then human and gpt in turn.

    Args:
        row: the row as in the JSONL.
        answered: the last turn must be an answer; false for prompts, which may end with the question.

    Raises:
        RowError: with reason `conversations_missing` (no key, or an empty list), `conversations_invalid` (not a list of
            `{"from": str, "value": str}`), `role_unknown`, `role_order`, `no_answer` (the last turn is not gpt) or
            `reserved_token` (a text that would forge an image slot). The original trains on the last four.
    """
    turns = tuple(_parse_turn(entry, number) for number, entry in enumerate(_conversations(row), start=1))
    _check_order(turns)
    if answered and turns[-1].role != "gpt":
        raise RowError("no_answer", f"the last turn is from {turns[-1].role!r}: end the conversation with a gpt turn")
    _check_reserved(turns)
    return turns


def split_last_answer(row: Mapping[str, object]) -> tuple[dict[str, object], str]:
    """The row without its last answer, and that answer.

    Raises:
        RowError: as `parse_turns`.
    """
    turns = parse_turns(row)
    entries = [{"from": turn.role, "value": turn.text} for turn in turns[:-1]]
    return {**row, "conversations": entries}, turns[-1].text


def last_question(row: Mapping[str, object]) -> str:
    """Text of the last human turn, as written in the data.

    Raises:
        RowError: as `parse_turns`.
    """
    return next(turn.text for turn in reversed(parse_turns(row, answered=False)) if turn.role == "human")


def place_images(
    row: Mapping[str, object], turns: Sequence[Turn], num_images: int, image_labels: ImageLabels = "keep"
) -> tuple[Turn, ...]:
    r"""Give each image or frame its `<image>`, by the official rules.

    * One image (a string) and no `<image>`: `<image>` and a newline are put before the first human turn. The original
      looks at the first turn only, and fails where that is a system turn.
    * A list of images: the placeholders must be in the data.
    * A video: `<video>` and a newline become the lines `Frame-1: <image>`, `Frame-2: <image>`, ...; they are put
      before the first human turn where there is no `<video>`.
    * `image_labels="auto"`: where a list of two or more images has no label, `Image-i: ` is written before each
      placeholder. A row lacks labels if no placeholder at all is directly preceded by a numbered name and a colon
      (`Image-1: <image>`); one such label shows that the author numbers the images, so the row is left as it is.
      `keep`, the official behavior, never writes labels for images.

    Args:
        row: the row; only `image` and `video` are read. As in the original, `image` wins over `video`.
        turns: its turns.
        num_images: images, or frames of the video.
        image_labels: see above.

    Raises:
        RowError: `placeholder_count` if the human turns do not hold one `<image>` for each image, or another turn
            holds any; `image_invalid` or `video_invalid` if the field is neither a path nor a list of paths.
        ValueError: `num_images` contradicts the row, or `image_labels` is not known.
    """
    if image_labels not in IMAGE_LABELS:
        raise ValueError(f"image_labels={image_labels!r} is not known: use one of {', '.join(IMAGE_LABELS)}")
    image, video = row.get("image"), row.get("video")
    if image:
        placed, expected = _place_paths(image, tuple(turns), image_labels)
    elif video:
        placed, expected = _place_frames(video, tuple(turns), num_images), num_images
    else:
        placed, expected = tuple(turns), 0
    _check_placeholders(placed, expected)
    if num_images != expected:
        raise ValueError(f"num_image_tokens has {num_images} entries, but the row has {expected} images")
    return placed


def _conversations(row: Mapping[str, object]) -> list[object]:
    entries = row.get("conversations")
    if entries is None or entries == []:
        hint = "add a human turn and a gpt turn"
        if "chosen" in row:
            hint = "it is a preference pair, for the stage mixed_preference"
        raise RowError("conversations_missing", f"the row has no `conversations`: {hint}")
    if not isinstance(entries, list):
        kind = type(entries).__name__
        raise RowError("conversations_invalid", f"`conversations` is a {kind}: write a list of turns")
    return entries


def _parse_turn(entry: object, number: int) -> Turn:
    role, text = (entry.get("from"), entry.get("value")) if isinstance(entry, dict) else (None, None)
    if not isinstance(role, str) or not isinstance(text, str):
        message = f'turn {number} is not readable: write it as {{"from": "human" or "gpt", "value": "text"}}'
        raise RowError("conversations_invalid", message)
    if role not in _ROLES:
        raise RowError("role_unknown", f"turn {number} is from {role!r}: use one of {', '.join(_ROLES)}")
    return Turn(role, text)


def _check_order(turns: tuple[Turn, ...]) -> None:
    first = 1 if turns[0].role == "system" else 0
    if first == len(turns):
        raise RowError("role_order", "the conversation is a system turn alone: add a human turn and a gpt turn")
    for index, turn in enumerate(turns[first:]):
        wanted = "gpt" if index % 2 else "human"
        if turn.role != wanted:
            message = (
                f"turn {first + index + 1} is from {turn.role!r} where {wanted!r} is due: "
                "write an optional system turn, then human and gpt in turn"
            )
            raise RowError("role_order", message)


def _check_reserved(turns: tuple[Turn, ...]) -> None:
    for number, turn in enumerate(turns, start=1):
        for token in RESERVED_TOKENS:
            if token in turn.text:
                message = (
                    f"turn {number} holds {token}, which the trainer writes itself and which would forge an image "
                    f"slot: remove it or write it differently, or use {IMAGE_PLACEHOLDER} to place an image"
                )
                raise RowError("reserved_token", message)


def _place_paths(image: object, turns: tuple[Turn, ...], image_labels: ImageLabels) -> tuple[tuple[Turn, ...], int]:
    if isinstance(image, str):
        if not _count_human(turns, IMAGE_PLACEHOLDER):
            turns = _put_first(turns, IMAGE_PLACEHOLDER + "\n")
        return turns, 1
    if not isinstance(image, list) or not all(isinstance(path, str) for path in image):
        raise RowError("image_invalid", "`image` is neither a path nor a list of paths: write one of these")
    if image_labels == "auto" and len(image) > 1:
        turns = _label_images(turns)
    return turns, len(image)


def _place_frames(video: object, turns: tuple[Turn, ...], num_frames: int) -> tuple[Turn, ...]:
    if not isinstance(video, str):
        raise RowError("video_invalid", "`video` is not a path: write one path")
    if not num_frames:
        raise ValueError("num_image_tokens is empty, but the row has a video: give one number for each frame")
    slot = VIDEO_PLACEHOLDER + "\n"
    if not _count_human(turns, VIDEO_PLACEHOLDER):
        turns = _put_first(turns, slot)
    if (_count_human(turns, VIDEO_PLACEHOLDER), _count_human(turns, slot)) != (1, 1):
        message = f"a row with a video needs {VIDEO_PLACEHOLDER} once, followed by a newline, or not at all"
        raise RowError("placeholder_count", message)
    frames = "".join(f"Frame-{number}: {IMAGE_PLACEHOLDER}\n" for number in range(1, num_frames + 1))
    return _map_human(turns, slot, frames)


def _label_images(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    if any(_NUMBERED_LABEL.search(turn.text) for turn in turns):
        return turns
    labeled: list[Turn] = []
    number = 0
    for turn in turns:
        pieces = turn.text.split(IMAGE_PLACEHOLDER) if turn.role == "human" else [turn.text]
        text = pieces[0]
        for piece in pieces[1:]:
            number += 1
            text += f"Image-{number}: {IMAGE_PLACEHOLDER}{piece}"
        labeled.append(replace(turn, text=text))
    return tuple(labeled)


def _check_placeholders(turns: tuple[Turn, ...], num_images: int) -> None:
    found = _count_human(turns, IMAGE_PLACEHOLDER)
    if found != num_images:
        message = (
            f"the human turns hold {found} {IMAGE_PLACEHOLDER} for {num_images} images: write one {IMAGE_PLACEHOLDER} "
            "where each image stands, and reword it where none is meant"
        )
        raise RowError("placeholder_count", message)
    if any(IMAGE_PLACEHOLDER in turn.text for turn in turns if turn.role != "human"):
        message = f"an {IMAGE_PLACEHOLDER} stands outside the human turns: move it to a human turn or reword it"
        raise RowError("placeholder_count", message)


def _count_human(turns: tuple[Turn, ...], text: str) -> int:
    return sum(turn.text.count(text) for turn in turns if turn.role == "human")


def _map_human(turns: tuple[Turn, ...], old: str, new: str) -> tuple[Turn, ...]:
    return tuple(replace(turn, text=turn.text.replace(old, new)) if turn.role == "human" else turn for turn in turns)


def _put_first(turns: tuple[Turn, ...], text: str) -> tuple[Turn, ...]:
    first = next(index for index, turn in enumerate(turns) if turn.role == "human")
    return (*turns[:first], replace(turns[first], text=text + turns[first].text), *turns[first + 1 :])
