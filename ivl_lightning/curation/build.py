"""From questions to preference data: sample what is not sampled yet, then judge, pair and write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import torch
from filelock import FileLock, Timeout
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerBase

from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.preferences import PreferencesConfig, check_preferences
from ivl_lightning.curation.dropout import answer_twice
from ivl_lightning.curation.questions import Question, Questions, find_questions
from ivl_lightning.curation.responses import Outcome, ResponsesFile
from ivl_lightning.curation.sampling import Sampler, seeded
from ivl_lightning.curation.settings import deciding_settings, keep_settings
from ivl_lightning.curation.summary import Summary
from ivl_lightning.curation.write import ALL_WRONG, REJECTED, Asked, write_pairs
from ivl_lightning.data.corpus import Corpus, read_corpus
from ivl_lightning.data.encoding import encoder_factory
from ivl_lightning.data.exclusion import check_exclusions
from ivl_lightning.data.layout import tokens_per_tile
from ivl_lightning.data.ledger import Ledger
from ivl_lightning.data.templates import template_of
from ivl_lightning.inference.progress import PassProgress
from ivl_lightning.models.parts import patch_size, tile_size


def build_pairs(
    config: PreferencesConfig, model: InternVLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase
) -> Summary:
    """Make preference pairs of the questions in `config.data.meta`, into the folder `config.output`.

    Called again after it was interrupted it goes on where it stopped; with other settings of judging or pairing it
    judges the same responses anew.

    Args:
        config: all settings; of `config.model` only the template is read.
        model: answers; it is put into evaluation mode and moved to `config.device`.
        tokenizer: the model's, with the nine special tokens.

    Returns:
        Counts, and where the meta.json of the pairs lies.

    Raises:
        ConfigError: a wrong setting, or responses in the folder that were sampled under other settings.
        ValueError: a wrong meta file, or a changed annotation file.
        TooManyRejectsError: more than `data.reject_limit` of the rows cannot be used.
    """
    check_preferences(config)
    corpus = _read(config, model, tokenizer)
    _check_names(config, corpus)
    folder = Path(config.output).expanduser()
    device = torch.device(_device_name(config))
    model.to(device)
    model.eval()
    with _claimed(folder):
        keep_settings(folder, deciding_settings(config, model, tokenizer, corpus, device))
        ledger = Ledger(folder / f"{REJECTED}.jsonl")
        asked = [
            (questions, ResponsesFile(folder / "responses" / f"{quote(questions.name, safe='')}.jsonl"))
            for questions in _all_questions(corpus, config)
        ]
        left_out = [line for questions, _ in asked for line in questions.left_out]
        ledger.add(left_out)
        ledger.check(len(corpus) + len(corpus.rejects), config.data.reject_limit, left_out)
        _sample(asked, model, tokenizer, config)
        with PassProgress("pairing", "questions", _total(asked), show=config.progress_bar) as progress:
            return write_pairs(folder, asked, config, ledger, progress.advance)


def _read(
    config: PreferencesConfig, model: InternVLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase
) -> Corpus:
    data, shapes = config.data, model.config
    side = tile_size(shapes)
    if side != data.tile_size:
        raise ConfigError(f"data.tile_size={data.tile_size}, but the vision tower takes {side}: make them equal")
    # As in training: the answers are to be those of what training will see.
    factory = encoder_factory(
        data,
        tokenizer,
        template=template_of(config.model.template, model.config),
        tile_tokens=tokens_per_tile(side, patch_size(shapes), shapes.downsample_ratio),
        training=True,
    )
    corpus = read_corpus(
        data.meta,
        factory,
        cache_dir=None if data.cache_dir is None else Path(data.cache_dir).expanduser(),
        progress=config.progress_bar,
        workers=data.index_workers,
        exclude=data.exclude,
    )
    check_exclusions(data.exclude, corpus.indexes)
    return corpus


def _check_names(config: PreferencesConfig, corpus: Corpus) -> None:
    names = [spec.name for spec in corpus.specs]
    if unknown := sorted(set(config.judges) - set(names)):
        raise ConfigError(f"judges names the datasets {unknown}, but {config.data.meta} has {names}")
    if taken := sorted({ALL_WRONG, REJECTED} & set(names)):
        raise ConfigError(f"{config.data.meta}: the dataset {taken[0]!r} has the name of a file of output: rename it")


def _device_name(config: PreferencesConfig) -> str:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch finds no CUDA device: use device=cpu, or install a CUDA build")
    return config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """The folder for this process alone; a second one would write between its lines."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(f"output={folder} is being written by another process: wait for it, or stop it") from error
    with lock:
        yield


def _all_questions(corpus: Corpus, config: PreferencesConfig) -> Iterator[Questions]:
    for spec in corpus.specs:
        yield find_questions(corpus.view([spec.name]), config.prompt_style, with_media=config.method == "dropout_ntp")


def _sample(
    asked: Sequence[Asked],
    model: InternVLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    config: PreferencesConfig,
) -> None:
    """Answer what is not answered yet, a batch after the other."""
    size = config.batch_size
    answered = [file.resume(size, len(questions)) for questions, file in asked]
    with PassProgress("sampling", "questions", _total(asked), sum(answered), show=config.progress_bar) as progress:
        for (questions, file), first in zip(asked, answered, strict=True):
            sampler = Sampler(model, tokenizer, questions.encoder, config)
            for start in range(first, len(questions), size):
                batch = questions.read(start, start + size)
                with seeded(config.seed, questions.name, start // size, model.device):
                    file.append(batch, _answer(sampler, batch, config))
                progress.advance(questions.name, len(batch))


def _total(asked: Sequence[Asked]) -> int:
    return sum(len(questions) for questions, _ in asked)


def _answer(sampler: Sampler, questions: Sequence[Question], config: PreferencesConfig) -> list[Outcome]:
    if config.method == "dropout_ntp":
        return answer_twice(sampler, questions, config)
    return sampler.answer([question.prompt for question in questions], samples=config.samples)
