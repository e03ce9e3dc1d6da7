"""Responses -> judged -> pairs -> files in the layout of MMPR, the published preference data.

The layout is that of InternVL's `internvl_chat_mpo.py`: a meta.json as for conversations, and rows with `image`,
`question`, `chosen` and `rejected`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote

import numpy as np

from ivl_lightning.config.preferences import PreferencesConfig
from ivl_lightning.curation.answers import RIGHT_ABOVE, final_answer, score
from ivl_lightning.curation.dropout import seen_by_blind
from ivl_lightning.curation.files import write_json, write_line
from ivl_lightning.curation.pairs import Judged, Pair, right_by_wrong
from ivl_lightning.curation.questions import Question, Questions
from ivl_lightning.curation.responses import ResponsesFile
from ivl_lightning.curation.sampling import Response
from ivl_lightning.curation.summary import Counts, Summary
from ivl_lightning.data.annotations import DatasetSpec
from ivl_lightning.data.ledger import Ledger, reject
from ivl_lightning.data.measuring import digest_number
from ivl_lightning.structures import RowError
from ivl_lightning.whole_files import whole_file

ALL_WRONG, REJECTED = "all_wrong", "rejected"

Asked = tuple[Questions, ResponsesFile]
"""A dataset and the responses to its questions."""


def write_pairs(
    folder: Path,
    asked: Sequence[Asked],
    config: PreferencesConfig,
    ledger: Ledger,
    advance: Callable[[str, int], object],
) -> Summary:
    """Judge and pair all responses, and write what comes out; each file is whole or not there.

    Args:
        folder: of the command.
        asked: the datasets with their responses, all sampled.
        config: the settings of the command.
        ledger: takes rows that broke when they were asked.
        advance: called with the dataset and a number of questions when they are done.
    """
    meta = folder / "meta.json"
    # Written last: whoever finds it finds the files it names as they were written with it.
    meta.unlink(missing_ok=True)
    datasets: dict[str, Counts] = {}
    entries: dict[str, dict[str, Any]] = {}
    with whole_file(folder / f"{ALL_WRONG}.jsonl") as all_wrong:
        for questions, file in asked:
            spec = questions.encoder.spec
            name = f"{quote(spec.name, safe='')}.jsonl"
            with whole_file(folder / name) as pairs:
                counts = _Writer(questions, config, ledger, pairs, all_wrong).write(file, advance)
            datasets[spec.name] = counts
            if counts.pairs:
                entries[spec.name] = _entry(spec, name, counts.pairs)
    summary = Summary(str(meta), datasets, asdict(config))
    write_json(folder / "summary.json", summary.to_json())
    write_json(meta, entries)
    return summary


def _entry(spec: DatasetSpec, annotation: str, pairs: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"root": spec.root, "annotation": annotation, "data_augment": False, "repeat_time": 1}
    if spec.max_dynamic_patch is not None:
        entry["max_dynamic_patch"] = spec.max_dynamic_patch
    return {**entry, "length": pairs}


class _Writer:
    """Writes the pairs of one dataset, and counts."""

    def __init__(
        self, questions: Questions, config: PreferencesConfig, ledger: Ledger, pairs: TextIO, all_wrong: TextIO
    ) -> None:
        self.questions = questions
        self.config = config
        self.ledger = ledger
        self.pairs = pairs
        self.all_wrong = all_wrong
        self.counts = Counts(rejected=Counter(line.reason for line in questions.left_out))

    def write(self, file: ResponsesFile, advance: Callable[[str, int], object]) -> Counts:
        """All questions of the dataset, one after the other."""
        for question, outcome in file.read(self.questions):
            advance(self.questions.name, 1)
            if isinstance(outcome, RowError):
                self.ledger.add([reject(question.record, outcome)])
                self.counts.rejected[outcome.reason] += 1
                continue
            self.counts.questions += 1
            self.counts.responses += len(outcome)
            self.counts.unfinished += sum(not response.finished for response in outcome)
            self._write_question(question, outcome)
        return self.counts

    def _write_question(self, question: Question, responses: Sequence[Response]) -> None:
        if self.config.method == "dropout_ntp":
            pairs, skipped = seen_by_blind(question, responses, self.config)
        else:
            pairs, skipped = self._judged_pairs(question, responses)
        self.counts.skipped.update(skipped)
        self.counts.pairs += len(pairs)
        for number, pair in enumerate(pairs):
            write_line(self.pairs, self._row(question, pair, number))

    def _judged_pairs(self, question: Question, responses: Sequence[Response]) -> tuple[list[Pair], Counter[str]]:
        judged = [self._judge(question, response) for response in responses]
        right = [one for one in judged if (one.score or 0.0) > RIGHT_ABOVE]
        wrong = [one for one in judged if (one.score or 0.0) <= RIGHT_ABOVE]
        counts = self.counts
        counts.right += len(right)
        counts.wrong += len(wrong)
        counts.unclear += sum(one.answer is None for one in wrong)
        counts.all_right += not wrong
        counts.all_wrong += not right
        if not right:
            answers = Counter(one.answer for one in wrong if one.answer is not None)
            write_line(self.all_wrong, {**self._asked(question), "answers": dict(answers.most_common())})
        rng = np.random.default_rng((self.config.seed, digest_number(question.record.digest)))
        return right_by_wrong(right, wrong, most=self.config.max_pairs, rng=rng)

    def _judge(self, question: Question, response: Response) -> Judged:
        # What was cut may read like another answer: 12 of 123.
        answer = final_answer(response.text, self.config.prompt_style) if response.finished else None
        judge = self.config.judge_of(self.questions.name)
        return Judged(response.text, answer, score(answer, question.truth, question.text, judge))

    def _row(self, question: Question, pair: Pair, number: int) -> dict[str, Any]:
        asked = self._asked(question)
        return {
            **asked,
            "id": f"{asked['id']}-{number}",
            "chosen": pair.chosen.text,
            "rejected": pair.rejected.text,
            "method": self.config.method,
            "chosen_meta": {"answer": pair.chosen.answer, "score": pair.chosen.score},
            "rejected_meta": {"answer": pair.rejected.answer, "score": pair.rejected.score},
        }

    def _asked(self, question: Question) -> dict[str, Any]:
        record = question.record
        source = {"dataset": record.dataset, "file": record.file, "line": record.line, "digest": record.digest}
        return {
            "id": record.digest if record.id is None else record.id,
            **question.media,
            "question": question.text,
            "answer_gt": question.truth,
            "source": source,
        }
