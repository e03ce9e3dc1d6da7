"""The same rows under several tile limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ivl_lightning.data.corpus import Corpus
from ivl_lightning.data.encoding import EncoderFactory
from ivl_lightning.structures import RowError


def encoded_by(corpus: Corpus, factory: EncoderFactory) -> Corpus:
    """The same rows, encoded by other settings and not measured again."""
    return replace(corpus, encoders=tuple(factory(spec) for spec in corpus.specs))


def rows_that_fit(corpora: Sequence[Corpus], rows: Sequence[int]) -> tuple[list[int], dict[str, int]]:
    """Rows that can be used under every limit: scores over different rows could not be compared.

    Args:
        corpora: the same rows under each limit.
        rows: of each of them.

    Returns:
        The rows, in their order, and how many others there are by the first reason against them.
    """
    reasons = {row: next(filter(None, (_reason(corpus, row) for corpus in corpora)), None) for row in rows}
    left_out = Counter(reason for reason in reasons.values() if reason is not None)
    return [row for row in rows if reasons[row] is None], dict(left_out)


def _reason(corpus: Corpus, row: int) -> str | None:
    """Why a row cannot be used; None where it can."""
    try:
        dataset, record = corpus.locate(row)
        corpus.encoders[dataset].measure(record)
    except RowError as error:
        return error.reason
    return None
