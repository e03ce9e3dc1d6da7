import json
import shutil
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from transformers import PreTrainedTokenizerBase

from ivl_lightning.constants import SPECIAL_TOKENS
from ivl_lightning.models.tokenizer import (
    add_special_tokens,
    image_token_id,
    load_tokenizer,
    prompt_start_ids,
    tokenizer_fingerprint,
)

FIXTURES = Path(__file__).parents[1] / "fixtures" / "conversation"
NAMES = ("qwen2_vit300m", "qwen2_bytebpe", "internlm2_vit300m", "phi3_sp")
TEXTS = ("Hello, world!", "  two  blanks ", "请描述这张图片。\n\n1 + 1 = 2", "naïve\tcafé")
CONFIG = "tokenizer_config.json"


def copy_fixture(name: str, folder: Path) -> Path:
    # Not a copy of modes: the fixtures may be read-only.
    shutil.copytree(FIXTURES / name, folder, copy_function=shutil.copyfile)
    return folder


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps({**config, **changes}), encoding="utf-8")


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", NAMES)
def test_saved_as_tokenizer_json_ids_stay(name: str, tmp_path: Path) -> None:
    """tokenizer.json alone gives the same ids, the same start and the same fingerprint as the original files."""
    tokenizer = load_tokenizer(FIXTURES / name)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == again(text)["input_ids"]
    assert prompt_start_ids(tokenizer, "<|system|>\n") == prompt_start_ids(again, "<|system|>\n")
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(again)


@pytest.mark.parametrize("name", ["internlm2_vit300m", "phi3_sp"])
@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_sentencepieces(name: str, text: str) -> None:
    """Without special tokens the ids are those of the SentencePiece library, InternLM2's without a dummy prefix."""
    tokenizer = load_tokenizer(FIXTURES / name)
    pieces = SentencePieceProcessor(str(FIXTURES / name / "tokenizer.model"))
    # A text with a blank in front is left out for Phi-3: its slow class departs from SentencePiece there.
    if name == "phi3_sp" and text.startswith(" "):
        text = text.lstrip()
    assert encode(tokenizer, text) == pieces.encode(text)


def test_legacy_llama_puts_a_blank_before_each_stretch(tmp_path: Path) -> None:
    """`legacy` (also where the config does not say): SentencePiece sees each stretch between special tokens alone."""
    folder = copy_fixture("phi3_sp", tmp_path / "legacy")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    del config["legacy"]
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    pieces = SentencePieceProcessor(str(folder / "tokenizer.model"))
    marker = encode(tokenizer, "<img>")
    for left, right in (("Hi there", " yes  sir"), ("x", "\ny"), ("  a ", " ")):
        assert encode(tokenizer, f"{left}<img>{right}") == pieces.encode(left) + marker + pieces.encode(right)


def test_prompt_start_is_bos_and_phi3s_blank() -> None:
    """Phi-3's slow tokenizer writes a blank before an unlisted marker; InternLM2 writes BOS alone, Qwen2 nothing."""
    phi3 = load_tokenizer(FIXTURES / "phi3_sp")
    assert phi3.convert_ids_to_tokens(prompt_start_ids(phi3, "<|system|>\nx")) == ["<s>", "▁"]
    assert phi3.convert_ids_to_tokens(prompt_start_ids(phi3, "x")) == ["<s>"]
    internlm2 = load_tokenizer(FIXTURES / "internlm2_vit300m")
    assert internlm2.convert_ids_to_tokens(prompt_start_ids(internlm2, "<|im_start|>system\n")) == ["<s>"]
    assert prompt_start_ids(load_tokenizer(FIXTURES / "qwen2_bytebpe"), "<|im_start|>system\n") == []


def test_code_beside_the_files_is_not_run(tmp_path: Path) -> None:
    """An `auto_map` that names a Python file is ignored."""
    folder = copy_fixture("internlm2_vit300m", tmp_path / "remote")
    change_config(folder, auto_map={"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]})
    (folder / "tokenization_internlm2.py").write_text("raise RuntimeError('this code was run')\n", encoding="utf-8")
    assert encode(load_tokenizer(folder), "Hello") == encode(load_tokenizer(FIXTURES / "internlm2_vit300m"), "Hello")


def test_missing_folder_and_missing_files_are_named(tmp_path: Path) -> None:
    """The error names the folder and every file that was looked for."""
    with pytest.raises(ValueError, match="is not a folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no tokenizer in .*tokenizer\.json.*vocab\.json.*tokenizer\.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("name", "other"), [("qwen2_bytebpe", "GPT2Tokenizer"), ("phi3_sp", "T5Tokenizer")])
def test_unknown_class_is_refused(name: str, other: str, tmp_path: Path) -> None:
    """Files of the same names mean other ids for another class, so none is guessed."""
    folder = copy_fixture(name, tmp_path / "other")
    change_config(folder, tokenizer_class=other)
    with pytest.raises(ValueError, match=f"names the tokenizer class '{other}'"):
        load_tokenizer(folder)


def test_broken_config_is_named(tmp_path: Path) -> None:
    """A broken tokenizer_config.json is named, not ignored."""
    folder = copy_fixture("phi3_sp", tmp_path / "broken")
    (folder / CONFIG).write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer(folder)


def test_model_that_rewrites_text_is_refused(tmp_path: Path) -> None:
    """SentencePiece models that collapse blanks would give other ids in the fast tokenizer."""
    folder = copy_fixture("phi3_sp", tmp_path / "rewrites")
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    model.normalizer_spec.remove_extra_whitespaces = True
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="normalizes text"):
        load_tokenizer(folder)


def plain_tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    """Qwen2's fixture as before InternVL: without the nine tokens."""
    folder = copy_fixture("qwen2_bytebpe", tmp_path / "plain")
    (folder / "added_tokens.json").unlink()
    (folder / "special_tokens_map.json").unlink()
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    added = config["added_tokens_decoder"]
    kept = {number: token for number, token in added.items() if token["content"] not in SPECIAL_TOKENS}
    change_config(folder, added_tokens_decoder=kept, additional_special_tokens=["<|im_start|>"])
    return load_tokenizer(folder)


def test_special_tokens_are_added_once_in_the_official_order(tmp_path: Path) -> None:
    """Nine new ids follow the old ones in the official order; a second call adds none."""
    tokenizer = plain_tokenizer(tmp_path)
    size = len(tokenizer)
    assert add_special_tokens(tokenizer) == 9
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(size, size + 9))
    assert add_special_tokens(tokenizer) == 0
    assert encode(tokenizer, "a<box>b")[1] == tokenizer.convert_tokens_to_ids("<box>")


def test_image_token_id_asks_for_the_special_tokens(tmp_path: Path) -> None:
    """Without the token there is no id, and the error says how to add it."""
    tokenizer = plain_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="call add_special_tokens"):
        image_token_id(tokenizer)
    add_special_tokens(tokenizer)
    assert image_token_id(tokenizer) == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")


def test_fingerprint_follows_content_not_state(tmp_path: Path) -> None:
    """A padded call leaves it as it is; one token more changes it; tokenizers differ from each other."""
    tokenizer = load_tokenizer(FIXTURES / "qwen2_bytebpe")
    before = tokenizer_fingerprint(tokenizer)
    tokenizer("x", padding="max_length", truncation=True, max_length=5)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_fingerprint(tokenizer) != before
    assert len({tokenizer_fingerprint(load_tokenizer(FIXTURES / name)) for name in NAMES}) == len(NAMES)


def test_fingerprint_follows_bos(tmp_path: Path) -> None:
    """Whether BOS is written changes the ids, so it changes the fingerprint."""
    folder = copy_fixture("phi3_sp", tmp_path / "no_bos")
    change_config(folder, add_bos_token=False)
    tokenizer = load_tokenizer(folder)
    assert prompt_start_ids(tokenizer, "x") == []
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(load_tokenizer(FIXTURES / "phi3_sp"))
