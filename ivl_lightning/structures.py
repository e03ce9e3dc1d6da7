"""Small frozen records that cross rooms, and the one error a bad row raises."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Self, cast

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

Role = Literal["system", "human", "gpt"]
RowKey = tuple[str, int, str]
"""Dataset, offset and digest of a row."""


class RowError(ValueError):
    """A row that cannot be used. It goes to the ledger; it is never swapped for another row.

    Args:
        reason: a short class of fault, stable enough to count (`placeholder_count`, `file_missing`, ...).
        message: one sentence for a person: what is wrong and what to do.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str]]:
        # Worker processes hand errors back by pickle, which by default would drop the reason.
        return type(self), (self.reason, self.message)


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation, as written in the data."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Record:
    """One row of an annotation file with its place, so that every error can name it.

    Attributes:
        dataset, file, line: for people; all rows of a JSON list may stand on one line.
        row: as parsed.
        offset: of its bytes in the file.
        digest: hash of its bytes, as 16 hexadecimal digits.
    """

    dataset: str
    file: str
    line: int
    row: dict[str, object]
    offset: int = 0
    digest: str = ""

    @property
    def id(self) -> str | None:
        """The row's own `id`, if it has one."""
        value = self.row.get("id")
        return None if value is None else str(value)


@dataclass(frozen=True, slots=True)
class Reject:
    """A ledger line: which row was not used, and why.

    Attributes:
        dataset, file, line, id, offset, digest: the row; see `Record`.
        reason, message: see `RowError`.
        counted: false for rows set aside on purpose.
        trained: true for rows that broke when training read them, after they were measured.
    """

    dataset: str
    file: str
    line: int
    id: str | None
    reason: str
    message: str
    counted: bool = True
    trained: bool = False
    offset: int = 0
    digest: str = ""

    @property
    def row(self) -> RowKey:
        """What tells the row from others, and from what may stand in its place later."""
        return self.dataset, self.offset, self.digest


@dataclass(frozen=True, slots=True)
class VideoCost:
    """How many frames of a video a sample may get, and what the video holds.

    Attributes:
        most, fewest: frames of one sample; the plan draws a number in between, both included, for each epoch.
        available: frames of the video, or of the row's clip.
        rate: frames per second.
        duration: seconds.
    """

    most: int
    fewest: int
    available: int
    rate: float
    duration: float


@dataclass(frozen=True, slots=True)
class SampleCost:
    """What a sample costs, known before a pixel is decoded.

    Attributes:
        tokens: length of `input_ids`; for a video with the most frames it may get.
        labels: supervised tokens, the first token of the document left out.
        tiles: tiles per image or frame, in order; empty for text.
        video: frames, for a row with a video.
        chosen_labels: those of the labels that the chosen answer of a preference pair has; 0 for conversations.
    """

    tokens: int
    labels: int
    tiles: tuple[int, ...]
    video: VideoCost | None = None
    chosen_labels: int = 0

    @property
    def num_tiles(self) -> int:
        """All tiles of the sample."""
        return sum(self.tiles)


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample ready for a pack.

    Attributes:
        input_ids, labels: token ids and labels of equal length (`IGNORE_INDEX` = not trained).
        pixel_values: uint8 tiles `[N, 3, S, S]`, or None for text.
    """

    input_ids: list[int]
    labels: list[int]
    pixel_values: Tensor | None


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """One preference pair ready for a pack: what both answers share stands once.

    Attributes:
        prompt_ids: P token ids up to where the answers part.
        chosen_ids, chosen_labels: C ids and labels of the rest of the chosen conversation.
        rejected_ids, rejected_labels: R ids and labels of the rest of the rejected one.
        pixel_values: uint8 tiles `[N, 3, S, S]` of the prompt, or None for text.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    chosen_labels: list[int]
    rejected_ids: list[int]
    rejected_labels: list[int]
    pixel_values: Tensor | None


@dataclass(frozen=True, slots=True)
class Pack:
    """Samples that share one row of tokens.

    Attributes:
        samples: sample numbers, in document order (see `data.mixture.epoch_order`).
        tokens, tiles: their sums.
        frames: frames drawn for each sample, 0 where it is no video; empty where no sample is one.
    """

    samples: tuple[int, ...]
    tokens: int
    tiles: int
    frames: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PlannedPack:
    """A pack with its place in the run: what a worker needs to build one micro-batch.

    Attributes:
        pack: the samples; empty where a rank has nothing left in the epoch's last step.
        epoch, step, micro_step: step counts within the epoch, micro_step within the step.
        num_micro_steps: micro-steps of a step on this rank (A).
        packs_per_step: packs of a step over all ranks (A * R).
        weight_sum: the step's planned sum of loss weights over all its packs (W).
        step_samples: the step's planned number of samples over all its packs.
        progress: share of the run's samples consumed once this step is done, 0 to 1.
        idle: share of the step's modeled work time that ranks spend waiting for the slowest.
    """

    pack: Pack
    epoch: int
    step: int
    micro_step: int
    num_micro_steps: int
    packs_per_step: int
    weight_sum: float
    progress: float
    idle: float = 0.0
    step_samples: int = 0


class Movable:
    """A batch that goes to a device, but for its boundaries: the longest segment is read from them on the CPU."""

    __slots__ = ()

    def pin_memory(self) -> Self:
        """The batch in pinned memory, where a GPU fetches it by itself. `DataLoader` asks for it."""
        return self._with(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Self:
        """The batch on a device. Pinned memory is not waited for."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def _with(self, change: Callable[[Tensor], Tensor]) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(cast(Any, self))}
        moved = {
            name: change(value)
            for name, value in values.items()
            if hasattr(value, "pin_memory") and not name.startswith("cu_")
        }
        return type(self)(**values | moved)


@dataclass(frozen=True, slots=True)
class PackedBatch(Movable):
    """One micro-batch: documents side by side in one row of L tokens.

    Attributes:
        input_ids, position_ids, labels: `[1, L]`; positions restart at 0 in each document.
        cu_seqlens: int32 `[D + 1]`, cumulative document lengths from 0 to L.
        pixel_values: uint8 `[N, 3, S, S]`; N may be 0.
        loss_rows: int64 `[n]`, positions whose hidden state predicts a supervised token.
        loss_targets: int64 `[n]`, the tokens they predict.
        loss_weights: float32 `[n]`, weight of each by the reweighting rule.
        loss_datasets: int64 `[n]`, number of the dataset each belongs to.
        sample_ids: dataset/file:line of each document, for error messages.
        sample_datasets: number of the dataset each document belongs to.
        sample_tiles: tiles of each document.
        planned: where this batch stands in the run.
        rejects: samples of the pack that could not be read.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    pixel_values: Tensor
    loss_rows: Tensor
    loss_targets: Tensor
    loss_weights: Tensor
    loss_datasets: Tensor
    sample_ids: tuple[str, ...]
    sample_datasets: tuple[int, ...]
    sample_tiles: tuple[int, ...]
    planned: PlannedPack
    rejects: tuple[Reject, ...] = ()


@dataclass(frozen=True, slots=True)
class PreferenceBatch(Movable):
    """One micro-batch of D preference pairs side by side in one row of L tokens: `[prompt | chosen | rejected]` each.

    Queries are cut into 3 D segments (prompt, chosen, rejected of each pair); the keys of a segment are its pair's
    prompt and itself, gathered by `key_rows`, so that the two answers see the prompt and not each other. Positions of
    both answers continue behind the prompt.

    Attributes:
        input_ids, position_ids: `[1, L]`.
        cu_seqlens: int32 `[D + 1]`, cumulative lengths of whole pairs from 0 to L.
        cu_queries: int32 `[segments + 1]`, cumulative lengths of the segments from 0 to L.
        cu_keys: int32 `[segments + 1]`, cumulative numbers of the segments' keys from 0 to K.
        key_rows: int64 `[K]`, place in the row of each key.
        pixel_values: uint8 `[N, 3, S, S]`; N may be 0.
        loss_rows: int64 `[n]`, positions whose hidden state predicts a supervised token.
        loss_targets: int64 `[n]`, the tokens they predict.
        loss_responses: int64 `[n]`, the response each belongs to: 2 x pair for the chosen one, 2 x pair + 1 else.
        response_tokens: float32 `[D, 2]`, supervised tokens of each chosen and rejected response.
        reference_logps: float32 `[D, 2]`, log-probabilities under the reference model; NaN where not known.
        sample_ids: dataset, file and line of each pair, for error messages.
        sample_datasets: number of the dataset each pair belongs to.
        sample_tiles: tiles of each pair.
        sample_rows: corpus row of each pair.
        checksums: of ids and pixels of each pair, by which cached log-probabilities are known to be of this input.
        planned: where this batch stands in the run.
        rejects: pairs of the pack that could not be read.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    cu_queries: Tensor
    cu_keys: Tensor
    key_rows: Tensor
    pixel_values: Tensor
    loss_rows: Tensor
    loss_targets: Tensor
    loss_responses: Tensor
    response_tokens: Tensor
    reference_logps: Tensor
    sample_ids: tuple[str, ...]
    sample_datasets: tuple[int, ...]
    sample_tiles: tuple[int, ...]
    sample_rows: tuple[int, ...]
    checksums: tuple[int, ...]
    planned: PlannedPack
    rejects: tuple[Reject, ...] = ()

    @property
    def num_pairs(self) -> int:
        """D; 0 for a rank that has nothing left in the step."""
        return len(self.sample_ids)


@dataclass(frozen=True, slots=True)
class PairScores:
    """What preference losses are made of: B pairs of answers, scored by policy and reference.

    Attributes:
        policy_chosen, policy_rejected: float32 `[B]`, log-probabilities summed over the response.
        reference_chosen, reference_rejected: the same under the reference model, without gradient.
        chosen_tokens, rejected_tokens: float32 `[B]`, supervised tokens of each response.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor


@dataclass(frozen=True, slots=True)
class LossOutput:
    """A loss and what it is made of.

    Attributes:
        loss: scalar to minimize.
        parts: name -> scalar, before its weight is applied.
    """

    loss: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class PromptBatch(Movable):
    """Questions to answer by generation, padded on the left.

    Attributes:
        input_ids, attention_mask: `[B, L]`.
        pixel_values: uint8 `[N, 3, S, S]`, row after row; N may be 0.
        tiles: how many of them each row has.
        expected: the answer in the data, one per row.
        records: where each row stands.
        counted: false for rows that only keep ranks in step.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor
    tiles: tuple[int, ...]
    expected: tuple[str, ...]
    records: tuple[Record, ...]
    counted: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """One generated answer beside the expected one, for scores, sample cards and the report.

    Attributes:
        record: the row that was answered.
        question: its last one, as written in the data.
        expected: the answer in the conversation.
        truths: answers that count as right: the row's `answers`, else the expected one.
        generated: text, without blanks at both ends.
        tokens: generated, without the end marker.
        cut_off: whether it ran to the limit of tokens.
        prompt_tokens: tokens before the answer, those of the pictures included.
        tiles: of the row's pictures.
    """

    record: Record
    question: str
    expected: str
    truths: tuple[str, ...]
    generated: str
    tokens: int
    cut_off: bool
    prompt_tokens: int
    tiles: int
