"""Tokenizers of every family from their data files alone; code that lies beside them is never run."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from ivl_lightning.constants import IMAGE_CONTEXT_TOKEN, SPECIAL_TOKENS
from ivl_lightning.models.sentencepiece_files import (
    SENTENCEPIECE_FILE,
    claim_pieces,
    copy_with_model,
    read_model,
    user_defined_pieces,
)

_QWEN2_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
_INTERNLM2_CLASSES = ("InternLM2Tokenizer", "InternLM2TokenizerFast")
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
_SHORT_TEXT = 160
"""Characters of the longest text whose ids are remembered."""


class TokenizerError(ValueError):
    """Files that hold no tokenizer that can be used."""


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer whose ids equal those of the original's slow one.

    Files are looked for in this order: `tokenizer.json` (written by transformers); `vocab.json` and `merges.txt`
    (Qwen2); `tokenizer.model` (SentencePiece: InternLM2, Llama, Phi-3). `tokenizer_config.json`, if there, names the
    class and holds the added tokens. InternLM2's own class exists as remote code only; its model file is read as
    Llama's, with the blank before the first word as the model file says. Placeholders of the model file whose ids an
    added token takes over (InternLM2) give way to it.

    Args:
        path: folder with the tokenizer files.

    Raises:
        ValueError: the folder does not exist, holds none of these files, names a class that is not known, or gives
            an added token an id that it does not get.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give the folder that holds the tokenizer files")
    try:
        tokenizer = _load(folder)
        _check_ids(folder, tokenizer)
    except TokenizerError:
        raise
    except Exception as error:  # the libraries below have errors of many kinds for damaged files
        raise TokenizerError(
            f"{folder}: the tokenizer's files are damaged ({type(error).__name__}: {error}): fetch them again"
        ) from error
    return tokenizer


def _load(folder: Path) -> PreTrainedTokenizerBase:
    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    config = _read_object(folder / "tokenizer_config.json")
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        _check_class(folder, config, _QWEN2_CLASSES)
        return Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
    if (folder / SENTENCEPIECE_FILE).is_file():
        _check_class(folder, config, _INTERNLM2_CLASSES + _LLAMA_CLASSES)
        return _load_sentencepiece(folder, config)
    raise TokenizerError(
        f"no tokenizer in {folder}: looked for tokenizer.json, for vocab.json with merges.txt, and for tokenizer.model"
    )


def has_tokenizer(path: str | Path) -> bool:
    """Whether a folder holds files that `load_tokenizer` reads."""
    return any((Path(path) / name).is_file() for name in ("tokenizer.json", "vocab.json", SENTENCEPIECE_FILE))


def add_special_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Add the nine special tokens in the official order; return how many were new.

    Args:
        tokenizer: changed in place. The embeddings must then be grown by the returned number.
    """
    before = len(tokenizer)
    # The library's own count has tokens, too, that were in the vocabulary as plain pieces (Yi's <img>).
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    return len(tokenizer) - before


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the context token, whose embeddings are replaced by image features.

    Raises:
        ValueError: the tokenizer does not have the token, or is a slow one.
    """
    token_id = _backend(tokenizer).token_to_id(IMAGE_CONTEXT_TOKEN)
    if token_id is None:
        raise ValueError(f"the tokenizer has no {IMAGE_CONTEXT_TOKEN}: call add_special_tokens(tokenizer) first")
    return token_id


def filler_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Token that fills what nobody reads: shorter prompts, and an empty micro-batch."""
    pad = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad is None else pad


def prompt_start_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Ids that the original's slow tokenizer writes before those of the prompt's own text.

    These are BOS, where the tokenizer writes one, and a blank that the fast tokenizers leave out: with `legacy` false
    the slow Llama tokenizer puts a blank before the whole prompt, and takes it back only where the prompt begins with
    a token that is listed as special. Phi-3's chat markers are added tokens that are not listed.

    Args:
        tokenizer: as `load_tokenizer` returns it.
        prompt: the text that is tokenized next, without BOS.

    Raises:
        ValueError: the tokenizer is a slow one.
    """
    backend = _backend(tokenizer)
    start_ids = list(_bos_ids(tokenizer))
    splitter = backend.pre_tokenizer
    if isinstance(splitter, pre_tokenizers.Metaspace) and splitter.prepend_scheme == "first":
        unlisted = set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens)
        if prompt.startswith(tuple(unlisted)):
            start_ids += backend.encode(splitter.replacement, add_special_tokens=False).ids
    return start_ids


@lru_cache(maxsize=8)
def _bos_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    # Asking the tokenizer is safer than its `add_bos_token` flag, which files written by a fast tokenizer do not hold.
    bos = tokenizer("")["input_ids"][:1]
    return tuple(bos) if bos == [tokenizer.bos_token_id] else ()


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Ids of a stretch of text, uncut and without BOS, and the character at which each begins.

    Short texts come back often (the default system turn stands in every row) and are remembered.

    Raises:
        ValueError: the tokenizer is a slow one.
    """
    if len(text) > _SHORT_TEXT:
        return _encode_text(tokenizer, text)
    # Adding tokens changes what a text becomes; the vocabulary's size tells.
    return _remembered(tokenizer, _backend(tokenizer).get_vocab_size(), text)


@lru_cache(maxsize=256)
def _remembered(tokenizer: PreTrainedTokenizerBase, vocabulary: int, text: str) -> tuple[list[int], list[int]]:
    return _encode_text(tokenizer, text)


def _encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    backend = _backend(tokenizer)
    # Files may bring a limit or padding along. The library's own call resets both, but takes longer than short texts.
    if backend.truncation is not None or backend.padding is not None:
        backend.no_truncation()
        backend.no_padding()
    encoding = backend.encode(text, add_special_tokens=False)
    return encoding.ids, [start for start, _ in encoding.offsets]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that decides which ids a text gets: vocabulary, merges, added tokens, normalization, BOS.

    Equal fingerprints mean equal ids; caches of token counts are keyed with it. Padding and truncation are left out:
    they are the state of the last call, not of the tokenizer.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: the tokenizer is a slow one.
    """
    state = json.loads(_backend(tokenizer).to_str())
    state.update(padding=None, truncation=None)
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer's own engine, which knows offsets and added tokens.

    Raises:
        ValueError: the tokenizer is a slow one.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer: load it with load_tokenizer(folder)")
    return tokenizer.backend_tokenizer


def _read_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise TokenizerError(f"{file} is not valid JSON ({error}): restore the file") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{file} does not hold a JSON object: restore the file")
    return config


def _check_class(folder: Path, config: Mapping[str, object], known: tuple[str, ...]) -> None:
    name = config.get("tokenizer_class")
    if name is not None and name not in known:
        raise TokenizerError(
            f"{folder} names the tokenizer class {name!r}, known for these files are {', '.join(known)}: "
            "save it once as tokenizer.json with transformers, which any class can be read from"
        )


def _load_sentencepiece(folder: Path, config: Mapping[str, object]) -> PreTrainedTokenizerBase:
    model = read_model(folder / SENTENCEPIECE_FILE)
    prefix_space = _has_dummy_prefix(folder, model)
    # Slow tokenizers put the blank before each stretch between special tokens, unless `legacy` is given as false.
    legacy = bool(config.get("legacy", True)) or config.get("tokenizer_class") in _INTERNLM2_CLASSES
    options = {
        "local_files_only": True,
        "add_prefix_space": prefix_space,
        "add_bos_token": bool(config.get("add_bos_token", True)),
        "add_eos_token": False,
        "legacy": legacy,
    }
    if claim_pieces(model, dict(_claimed_ids(folder))):
        tokenizer = _load_changed(folder, model, options)
    else:
        tokenizer = LlamaTokenizer.from_pretrained(folder, **options)
    if prefix_space and legacy:
        _prepend_blank(tokenizer)
    _add_user_defined(folder, tokenizer, user_defined_pieces(model), prefix_space)
    return tokenizer


def _prepend_blank(tokenizer: PreTrainedTokenizerBase) -> None:
    """Put a blank before each stretch between added tokens."""
    # The library's own rule leaves the blank out before a text that begins with one; SentencePiece does not.
    tokenizer.backend_tokenizer.pre_tokenizer = None
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    # A token marked as normalized would get the blank, too, and be found at the start of a stretch only.
    marked = [token for token in tokenizer.added_tokens_decoder.values() if token.normalized]
    tokenizer.add_tokens([_not_normalized(token) for token in marked])


def _not_normalized(token: AddedToken) -> AddedToken:
    flags = {flag: getattr(token, flag) for flag in ("lstrip", "rstrip", "single_word", "special")}
    return AddedToken(token.content, normalized=False, **flags)


def _load_changed(folder: Path, model: Any, options: Mapping[str, object]) -> PreTrainedTokenizerBase:
    """Load a folder's tokenizer as if its SentencePiece model were this one; the folder is not changed."""
    with tempfile.TemporaryDirectory() as changed:
        copy_with_model(folder, Path(changed), model)
        tokenizer = LlamaTokenizer.from_pretrained(changed, **options)
    # Saving copies files from where these point.
    places = {"name_or_path": str(folder), "vocab_file": str(folder / SENTENCEPIECE_FILE)}
    tokenizer.init_kwargs.update({name: place for name, place in places.items() if name in tokenizer.init_kwargs})
    tokenizer.name_or_path, tokenizer.vocab_file = places["name_or_path"], places["vocab_file"]
    return tokenizer


def _add_user_defined(
    folder: Path, tokenizer: PreTrainedTokenizerBase, pieces: Sequence[str], prefix_space: bool
) -> None:
    """Keep whole what SentencePiece keeps whole: pieces of the vocabulary that its trainer was told of.

    Raises:
        TokenizerError: there are such pieces, and a blank stands before the first word: the fast tokenizer would
            put one after each of them, too.
    """
    known = tokenizer.get_added_vocab()
    missing = [piece for piece in pieces if piece not in known]
    if missing and prefix_space:
        raise TokenizerError(
            f"{folder / SENTENCEPIECE_FILE} has user-defined pieces ({', '.join(missing[:3])}, ...; {len(missing)} in "
            "all) and a blank before the first word, which would not be repeated exactly: "
            "save the tokenizer once as tokenizer.json with its own library"
        )
    if any("▁" in piece for piece in missing):
        # They are looked for in the text as the normalizer leaves it, with its blanks replaced.
        tokenizer.backend_tokenizer.pre_tokenizer = None
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # Normalized ones are looked for after the special tokens, in the stretches between them, as SentencePiece does.
    tokenizer.add_tokens([AddedToken(piece, normalized=True, special=False) for piece in missing])


def _has_dummy_prefix(folder: Path, model: Any) -> bool:
    """Whether SentencePiece writes a blank before the first word.

    Raises:
        TokenizerError: the model rewrites text in a way that the fast tokenizer does not repeat.
    """
    rule = model.normalizer_spec
    if rule.precompiled_charsmap or rule.remove_extra_whitespaces:
        raise TokenizerError(
            f"{folder / SENTENCEPIECE_FILE} normalizes text ({rule.name or 'custom'}), so its ids would not be "
            "repeated exactly: save the tokenizer as tokenizer.json with its own library"
        )
    return rule.add_dummy_prefix


def _claimed_ids(folder: Path) -> Iterator[tuple[int, str]]:
    """Ids that the files beside the vocabulary give to added tokens."""
    decoder = _read_object(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    yield from ((int(number), token["content"]) for number, token in decoder.items())
    yield from ((number, content) for content, number in _read_object(folder / "added_tokens.json").items())


def _check_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that gives an added token another id than its files do.

    Raises:
        TokenizerError: it does, so texts would be read with the wrong rows of the embeddings.
    """
    backend = _backend(tokenizer)
    for number, content in _claimed_ids(folder):
        found = backend.token_to_id(content)
        if found != number:
            got = "none" if found is None else found
            raise TokenizerError(
                f"{folder}: the token {content!r} should have the id {number} by tokenizer_config.json or "
                f"added_tokens.json, but gets {got}: the files do not belong together, fetch all of them again"
            )
