"""A row's conversation as token ids and labels: turns -> text of a chat template -> `input_ids`, `labels`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ivl_lightning.config.schema import ImageLabels
from ivl_lightning.constants import (
    IGNORE_INDEX,
    IMAGE_CONTEXT_TOKEN,
    IMAGE_END_TOKEN,
    IMAGE_PLACEHOLDER,
    IMAGE_START_TOKEN,
)
from ivl_lightning.data.templates import Template, get_template
from ivl_lightning.data.turns import parse_turns, place_images
from ivl_lightning.models.tokenizer import image_token_id, prompt_start_ids, text_ids
from ivl_lightning.structures import RowError, Turn

_IMAGE_SLOT = IMAGE_START_TOKEN + IMAGE_CONTEXT_TOKEN + IMAGE_END_TOKEN


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stretch of the prompt that is trained as a whole or not at all."""

    text: str
    trained: bool = False


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """A conversation with one context token for each image or frame, whatever its size.

    Attributes:
        input_ids, labels: of equal length; `IGNORE_INDEX` where nothing is trained.
        slots: positions of the context tokens, one per image or frame.
    """

    input_ids: list[int]
    labels: list[int]
    slots: tuple[int, ...]

    def expanded(self, counts: Sequence[int]) -> tuple[list[int], list[int]]:
        """Ids and labels with `counts[i]` context tokens for image i.

        The context token is a special token, so repeating its id gives the ids of the long text.
        """
        assert len(counts) == len(self.slots), (counts, self.slots)
        input_ids, labels = list(self.input_ids), list(self.labels)
        for position, count in reversed(list(zip(self.slots, counts, strict=True))):
            input_ids[position : position + 1] = [input_ids[position]] * count
            labels[position : position + 1] = [IGNORE_INDEX] * count
        return input_ids, labels


def encode_row(
    row: Mapping[str, object],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "internvl2_5",
    num_image_tokens: Sequence[int] | int = (),
    image_labels: ImageLabels = "keep",
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a whole conversation, uncut and unpadded.

    Args:
        row: the row as in the JSONL.
        tokenizer: a fast tokenizer with the special tokens, as `load_tokenizer` returns it.
        template: name of a chat template.
        num_image_tokens: number of context tokens of each image, or of each frame of the video; one int for one image.
        image_labels: `auto` numbers the images of a multi-image row that has no labels; see `place_images`.

    Returns:
        `input_ids` and `labels` of equal length, `IGNORE_INDEX` where nothing is trained.

    Raises:
        RowError: as `tokenize_row`.
        ValueError: as `tokenize_row`, or `num_image_tokens` contradicts the row.
    """
    counts = _image_counts(num_image_tokens)
    return tokenize_row(row, tokenizer, template=template, num_images=len(counts), image_labels=image_labels).expanded(
        counts
    )


def tokenize_row(
    row: Mapping[str, object],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "internvl2_5",
    num_images: int = 0,
    image_labels: ImageLabels = "keep",
) -> TokenizedRow:
    """A whole conversation before the sizes of its images are known.

    The ids are those of the original's `preprocess_*` functions (InternVL `dataset.py`). Each image is one `<img>`, its
    context tokens and one `</img>`. Trained are the text and the end marker of each answer, and nothing else: not the
    header, not the newline after the end marker. A token that reaches from the header into the answer counts as header.

    Labels differ from the original on purpose where it finds the answers of the older templates by tokenizing pieces
    again and counting: when the count fails (a chat marker inside a text is enough) it drops all labels of the sample
    and only prints a warning. Here the answers are found by character position, which cannot fail. An empty answer
    trains its end marker with `internvl2_5`; the older templates write no end marker for it, so nothing is trained.

    Args:
        row: as for `encode_row`.
        tokenizer: as for `encode_row`.
        template: as for `encode_row`.
        num_images: images of the row, or frames of its video.
        image_labels: as for `encode_row`.

    Raises:
        RowError: the row cannot be used; reasons as in `parse_turns` and `place_images`, and `system_turn` if the
            template has no place for a system turn.
        ValueError: the template or tokenizer does not fit, or `num_images` contradicts the row.
    """
    chat = get_template(template)
    turns = place_images(row, parse_turns(row), num_images, image_labels)
    blocks = [_turn_pieces(turn, chat) for turn in _with_system(turns, chat)]
    return _tokenize(_join_blocks(blocks, chat), tokenizer)


def encode_prompt(
    row: Mapping[str, object],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "internvl2_5",
    num_image_tokens: Sequence[int] | int = (),
    image_labels: ImageLabels = "keep",
) -> list[int]:
    """Token ids of `tokenize_prompt` with the context tokens of each image; arguments as for `encode_row`.

    Raises:
        RowError: as `tokenize_row`.
        ValueError: as `encode_row`.
    """
    counts = _image_counts(num_image_tokens)
    return tokenize_prompt(
        row, tokenizer, template=template, num_images=len(counts), image_labels=image_labels
    ).expanded(counts)[0]


def tokenize_prompt(
    row: Mapping[str, object],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "internvl2_5",
    num_images: int = 0,
    image_labels: ImageLabels = "keep",
    answer_start: str = "",
) -> TokenizedRow:
    """The conversation up to and including the header of the last answer: what generation starts from.

    The answer itself, if the row ends with one, is not looked at. The ids are a prefix of `tokenize_row`'s, except
    where the tokenizer melts blanks at the start of the answer with the header's newline (an answer that begins with a
    newline), which cannot be known before the answer is.

    Args:
        row: as for `encode_row`; it may end with the question.
        tokenizer: as for `encode_row`.
        template: as for `encode_row`.
        num_images: as for `tokenize_row`.
        image_labels: as for `encode_row`.
        answer_start: beginning of the answer, for generation to continue.

    Raises:
        RowError: as `tokenize_row`.
        ValueError: as `tokenize_row`.
    """
    chat = get_template(template)
    turns = parse_turns(row, answered=False)
    asked = turns[:-1] if turns[-1].role == "gpt" else turns
    placed = place_images(row, asked, num_images, image_labels)
    blocks = [_turn_pieces(turn, chat) for turn in _with_system(placed, chat)]
    blocks.append([_Piece(chat.answer_header + (chat.lead + answer_start if answer_start else ""))])
    return _tokenize(_join_blocks(blocks, chat), tokenizer)


def _image_counts(num_image_tokens: Sequence[int] | int) -> tuple[int, ...]:
    counts = (num_image_tokens,) if isinstance(num_image_tokens, int) else tuple(num_image_tokens)
    if any(count < 1 for count in counts):
        raise ValueError(f"num_image_tokens={counts}: each image needs at least one token")
    return counts


def _with_system(turns: Sequence[Turn], chat: Template) -> list[Turn]:
    if turns[0].role != "system":
        return [Turn("system", chat.system_text), *turns]
    if not chat.per_turn:
        message = f"chat template {chat.name!r} has no place for a system turn: remove it or use 'internvl2_5'"
        raise RowError("system_turn", message)
    return list(turns)


def _turn_pieces(turn: Turn, chat: Template) -> list[_Piece]:
    text = turn.text.strip() if chat.strip else turn.text
    if not text and not chat.per_turn:
        return [_Piece(chat.header(turn.role))]
    if turn.role == "human":
        text = text.replace(IMAGE_PLACEHOLDER, _IMAGE_SLOT)
    return [
        _Piece(chat.header(turn.role)),
        _Piece(chat.lead + text + chat.end(turn.role), trained=turn.role == "gpt"),
        _Piece(chat.tail),
    ]


def _join_blocks(blocks: list[list[_Piece]], chat: Template) -> list[list[_Piece]]:
    """What is tokenized together: single turns, or the whole prompt."""
    return blocks if chat.per_turn else [[piece for block in blocks for piece in block]]


def _tokenize(blocks: list[list[_Piece]], tokenizer: PreTrainedTokenizerBase) -> TokenizedRow:
    texts = ["".join(piece.text for piece in block) for block in blocks]
    input_ids = list(prompt_start_ids(tokenizer, texts[0]))
    labels = [IGNORE_INDEX] * len(input_ids)
    for block, text in zip(blocks, texts, strict=True):
        ids, starts = text_ids(tokenizer, text)
        input_ids += ids
        if not any(piece.trained for piece in block):
            labels += [IGNORE_INDEX] * len(ids)
            continue
        trained = _trained_characters(block)
        labels += [token if trained[start] else IGNORE_INDEX for token, start in zip(ids, starts, strict=True)]
    slot = image_token_id(tokenizer)
    slots = tuple(position for position, token in enumerate(input_ids) if token == slot)
    return TokenizedRow(input_ids, labels, slots)


def _trained_characters(block: Iterable[_Piece]) -> bytearray:
    """One flag for each character, and one behind the end for tokens that cover none."""
    flags = bytearray()
    for piece in block:
        flags.extend([piece.trained] * len(piece.text))
    return flags + b"\0"
