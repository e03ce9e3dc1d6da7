"""A model that answers questions by sampling, the same way whenever it is asked again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerBase

from ivl_lightning.config.preferences import PreferencesConfig
from ivl_lightning.data.collate import pad_prompts
from ivl_lightning.data.encoding import RowEncoder
from ivl_lightning.data.templates import stop_ids, template_of
from ivl_lightning.inference.decoding import decode_inside
from ivl_lightning.inference.generate import generate
from ivl_lightning.models.parts import tile_size
from ivl_lightning.models.tokenizer import filler_id
from ivl_lightning.structures import PromptBatch, Record, RowError


@dataclass(frozen=True, slots=True)
class Response:
    """What the model said.

    Attributes:
        text: without blanks at both ends; a given beginning is part of it.
        finished: whether it ended by itself, not at `max_new_tokens`.
    """

    text: str
    finished: bool


class Sampler:
    """Answers questions of one dataset.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: its tokenizer.
        encoder: of the dataset.
        config: sampling settings.
    """

    def __init__(
        self,
        model: InternVLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        encoder: RowEncoder,
        config: PreferencesConfig,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.config = config
        self.stop_ids = stop_ids(tokenizer, template_of(config.model.template, model.config))
        self._pad_id = filler_id(tokenizer)

    def answer(
        self, records: Sequence[Record], *, samples: int, starts: Sequence[str] = ()
    ) -> list[tuple[Response, ...] | RowError]:
        """`samples` responses to each question, or why it cannot be asked (a picture that cannot be decoded).

        Args:
            records: the questions.
            samples: responses to each.
            starts: how the response to each question begins; by default nothing is given.
        """
        starts = starts or [""] * len(records)
        prompts: dict[int, tuple[list[int], Tensor | None]] = {}
        results: dict[int, tuple[Response, ...] | RowError] = {}
        for place, (record, start) in enumerate(zip(records, starts, strict=True)):
            try:
                prompts[place] = self.encoder.encode_prompt(record, answer_start=start)
            except RowError as error:
                results[place] = error
        if prompts:
            batch = self._padded(list(prompts.values()), [records[place] for place in prompts])
            sampled = self._sample(batch, [starts[place] for place in prompts], samples)
            results.update(zip(prompts, sampled, strict=True))
        return [results[place] for place in range(len(records))]

    def _padded(self, prompts: Sequence[tuple[list[int], Tensor | None]], records: Sequence[Record]) -> PromptBatch:
        batch = pad_prompts(
            prompts,
            expected=[""] * len(records),
            records=records,
            counted=[True] * len(records),
            pad_id=self._pad_id,
            tile_size=tile_size(self.model.config),
        )
        device = self.model.device
        return replace(
            batch,
            input_ids=batch.input_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            pixel_values=batch.pixel_values.to(device),
        )

    def _sample(self, batch: PromptBatch, starts: Sequence[str], samples: int) -> list[tuple[Response, ...]]:
        """Responses to each prompt, as many at a time as were asked for."""
        responses: list[list[Response]] = [[] for _ in starts]
        at_once = self.config.samples_per_batch or samples
        for first in range(0, samples, at_once):
            count = min(at_once, samples - first)
            tokens = self._generate(batch, count).tolist()
            for row, start in enumerate(starts):
                own = tokens[row * count : (row + 1) * count]
                responses[row] += [self._response(start, ids) for ids in own]
        return [tuple(own) for own in responses]

    def _generate(self, batch: PromptBatch, count: int) -> Tensor:
        config = self.config
        with torch.inference_mode():
            return generate(
                self.model,
                batch,
                do_sample=True,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                max_new_tokens=config.max_new_tokens,
                num_return_sequences=count,
                pad_token_id=self._pad_id,
                eos_token_id=self.stop_ids,
            )

    def _response(self, start: str, ids: list[int]) -> Response:
        end = next((place for place, token in enumerate(ids) if token in self.stop_ids), None)
        return Response((start + decode_inside(self.tokenizer, ids[:end])).strip(), finished=end is not None)


@contextmanager
def seeded(seed: int, dataset: str, batch: int, device: torch.device) -> Iterator[None]:
    """Random numbers of one batch of questions, whatever was sampled before it; the caller's go on afterwards.

    Args:
        seed: of the command.
        dataset: of the questions.
        batch: number of the batch in the dataset.
        device: where is sampled.
    """
    own = hashlib.blake2b(f"{seed}/{batch}/{dataset}".encode(), digest_size=7).digest()
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(int.from_bytes(own, "big"))
        yield
