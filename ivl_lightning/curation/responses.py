"""Responses on disk: one line for each question of a dataset, in file order, appended as they come."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ivl_lightning.curation.questions import Question
from ivl_lightning.curation.sampling import Response
from ivl_lightning.structures import RowError

_log = logging.getLogger(__name__)

Outcome = tuple[Response, ...] | RowError
"""The responses to a question, or why it could not be asked."""


@dataclass(frozen=True, slots=True)
class ResponsesFile:
    """The responses to one dataset's questions.

    Attributes:
        path: the JSON-lines file.
    """

    path: Path

    def resume(self, batch_size: int, questions: int) -> int:
        """Make the file, or drop what a killed process left unfinished: half a line, and the batch it belongs to.

        A batch shares its random numbers, so it is sampled again as a whole.

        Args:
            batch_size: questions of a batch.
            questions: of the whole dataset.

        Returns:
            Questions that are answered.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.open("ab").close()
        ends = [0, *self._line_ends()]
        lines = len(ends) - 1
        done = lines if lines == questions else lines // batch_size * batch_size
        if self.path.stat().st_size > ends[done]:
            _log.warning("%s: %d questions are kept, what follows was not finished", self.path, done)
            os.truncate(self.path, ends[done])
        return done

    def _line_ends(self) -> Iterator[int]:
        end = 0
        with self.path.open("rb") as file:
            for raw in file:
                if not _is_whole(raw):
                    return
                end += len(raw)
                yield end

    def append(self, questions: Sequence[Question], outcomes: Sequence[Outcome]) -> None:
        """Add the outcomes of a batch; each line is one write."""
        with self.path.open("ab", buffering=0) as file:
            for question, outcome in zip(questions, outcomes, strict=True):
                record = question.record
                line = {"line": record.line, "id": record.id, "digest": record.digest, **_content(outcome)}
                file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())

    def read(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Outcome]]:
        """Each question with its outcome.

        Raises:
            ValueError: the file does not hold these questions in this order; somebody changed it.
        """
        with self.path.open("rb") as file:
            for number, (question, raw) in enumerate(zip(questions, file, strict=True), start=1):
                line = json.loads(raw)
                if line["digest"] != question.record.digest:
                    raise ValueError(
                        f"{self.path}:{number} answers the row {line['digest']}, but row {question.record.digest} of "
                        f"{question.record.file}:{question.record.line} is due: delete the file to sample again"
                    )
                yield question, _outcome(line)


def _is_whole(raw: bytes) -> bool:
    try:
        return raw.endswith(b"\n") and isinstance(json.loads(raw), dict)
    except ValueError:
        return False


def _content(outcome: Outcome) -> dict[str, object]:
    if isinstance(outcome, RowError):
        return {"error": {"reason": outcome.reason, "message": outcome.message}}
    return {"responses": [{"text": response.text, "finished": response.finished} for response in outcome]}


def _outcome(line: dict[str, object]) -> Outcome:
    error, responses = line.get("error"), line.get("responses")
    if isinstance(error, dict):
        return RowError(error["reason"], error["message"])
    assert isinstance(responses, list), line
    return tuple(Response(**response) for response in responses)
