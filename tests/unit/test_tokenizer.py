import json
import random
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from transformers import PreTrainedTokenizerBase

from ivl_lightning.constants import SPECIAL_TOKENS
from ivl_lightning.models.tokenizer import (
    TokenizerError,
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


CHAT = ("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>")
PLAIN, USER_DEFINED = 1, 4
USER_PIECES = ("<|Human|>", "<|im_sep|>", "<img>", "</img>", "<fim>", "▁▁▁▁", "\n\n", "12", "x<")
"""As in Yi; of the last, two meet blanks and other pieces, and one overlaps markers."""
FRAGMENTS = (
    *CHAT, *SPECIAL_TOKENS, "<IMG_CONTEXT>" * 3, "<s>", "</s>", "<|Human|>", "<|im_sep|>", "<fim>", "x<", "<f", "fim>",
    "[UNUSED_TOKEN_1]", "[UNUSED_TOKEN_", "user\n", "assistant\n", " ", "  ", "     ", "\n", "\n\n", "\n\n\n", "\t",
    "\r\n", "Hello", "world", ", ", ".", "图", "请描述这张图片", "。", "1", "12", "2024", "1212", "naïve", "🙂", "▁",
)  # fmt: skip


def change_model(folder: Path, pieces: Sequence[tuple[str, int]], *, at: int, blank: bool = False) -> int:
    """Put pieces into the model file; return how many it has then."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    rest = list(model.pieces)[at:]
    del model.pieces[at:]
    for piece, kind in pieces:
        model.pieces.add(piece=piece, score=0.0 if kind == USER_DEFINED else -1e4, type=kind)
    model.pieces.extend(rest)
    model.normalizer_spec.add_dummy_prefix = blank
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    return len(model.pieces)


def write_added(folder: Path, ids: dict[str, int], size: int, **changes: object) -> dict[str, int]:
    """Make these the added tokens, followed by those of the nine that they lack; return all of them."""
    lacking = [token for token in SPECIAL_TOKENS if token not in ids]
    ids = {**ids, **{token: size + number for number, token in enumerate(lacking)}}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    decoder = {str(number): {"content": token, **flags} for token, number in ids.items()}
    listed = {"additional_special_tokens": [token for token in ids if token not in ("<unk>", "<s>", "</s>")]}
    change_config(folder, added_tokens_decoder=decoder, **listed, **changes)
    (folder / "added_tokens.json").write_text(json.dumps({token: ids[token] for token in ids if ids[token] > 2}))
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps({**named, **listed}))
    return ids


def internlm2_release(folder: Path, kind: int) -> dict[str, int]:
    """As released: the chat markers have the ids of the model file's last six placeholders."""
    copy_fixture("internlm2_vit300m", folder)
    size = change_model(folder, [(f"[UNUSED_TOKEN_{number}]", kind) for number in range(1, 11)], at=400)
    markers = {token: size - len(CHAT) + number for number, token in enumerate(CHAT)}
    return write_added(folder, {"<unk>": 0, "<s>": 1, "</s>": 2, **markers}, size)


def yi_release(folder: Path, *, claimed: bool = True, blank: bool = False) -> dict[str, int]:
    """As released: <img> and other markers are user-defined pieces, of which only some are added tokens as well."""
    copy_fixture("internlm2_vit300m", folder)
    size = change_model(folder, [(piece, USER_DEFINED) for piece in USER_PIECES], at=3, blank=blank)
    if claimed:
        pieces = {token: 3 + USER_PIECES.index(token) for token in ("<img>", "</img>")}
        return write_added(folder, {"<unk>": 0, "<s>": 1, "</s>": 2, **pieces}, size, tokenizer_class="LlamaTokenizer")
    change_config(folder, tokenizer_class="LlamaTokenizer", added_tokens_decoder={}, additional_special_tokens=[])
    (folder / "added_tokens.json").unlink()
    (folder / "special_tokens_map.json").unlink()
    return {}


def slow_ids(folder: Path, ids: dict[str, int], text: str) -> list[int]:
    """What slow tokenizers do: SentencePiece reads each stretch between added tokens."""
    pieces = SentencePieceProcessor(str(folder / "tokenizer.model"))
    tokens = "|".join(re.escape(token) for token in sorted(ids, key=len, reverse=True))
    found = []
    for stretch in re.split(f"({tokens})", text):
        found += [ids[stretch]] if stretch in ids else pieces.encode(stretch)
    return found


def random_texts(count: int) -> list[str]:
    chance = random.Random(0)
    return ["".join(chance.choices(FRAGMENTS, k=chance.randint(1, 12))) for _ in range(count)]


def assert_ids_are_slow_ones(folder: Path, ids: dict[str, int]) -> None:
    tokenizer = load_tokenizer(folder)
    for text in (*TEXTS, *FRAGMENTS, *random_texts(400)):
        assert encode(tokenizer, text) == slow_ids(folder, ids, text), repr(text)


@pytest.mark.parametrize("kind", [PLAIN, USER_DEFINED])
def test_added_tokens_take_over_placeholders(kind: int, tmp_path: Path) -> None:
    """InternLM2: markers get the ids of the placeholders, the nine tokens those of added_tokens.json; none is new."""
    ids = internlm2_release(tmp_path / "internlm2", kind)
    tokenizer = load_tokenizer(tmp_path / "internlm2")
    assert ids["<|im_start|>"] == 409
    assert ids["<IMG_CONTEXT>"] == image_token_id(tokenizer) == 412
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in ids} == ids
    assert len(tokenizer) == 400 + 10 + 9
    assert add_special_tokens(tokenizer) == 0
    assert_ids_are_slow_ones(tmp_path / "internlm2", ids)


def test_user_defined_pieces_stay_whole(tmp_path: Path) -> None:
    """Yi: with those that are added tokens and without, blanks, and pieces that overlap with markers."""
    ids = yi_release(tmp_path / "yi")
    assert ids["<img>"] == 5
    assert_ids_are_slow_ones(tmp_path / "yi", ids)
    assert len(load_tokenizer(tmp_path / "yi")) == 400 + len(USER_PIECES) + 7


def test_special_tokens_that_are_pieces_do_not_grow_the_vocabulary(tmp_path: Path) -> None:
    """Yi before InternVL: <img> and </img> become special where they are, and seven tokens are new."""
    yi_release(tmp_path / "plain", claimed=False)
    tokenizer = load_tokenizer(tmp_path / "plain")
    size = len(tokenizer)
    assert add_special_tokens(tokenizer) == 7 == len(tokenizer) - size
    assert add_special_tokens(tokenizer) == 0
    ids = yi_release(tmp_path / "release")
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [ids[token] for token in SPECIAL_TOKENS]
    release = load_tokenizer(tmp_path / "release")
    for text in random_texts(100):
        assert encode(tokenizer, text) == encode(release, text)


def test_user_defined_pieces_with_a_blank_before_the_text_are_refused(tmp_path: Path) -> None:
    """The fast tokenizer would put a blank behind each of them."""
    yi_release(tmp_path / "yi", blank=True)
    with pytest.raises(TokenizerError, match=r"user-defined pieces \(<\|Human\|>.*7 in all.*tokenizer\.json"):
        load_tokenizer(tmp_path / "yi")


@pytest.mark.parametrize("release", ["internlm2", "yi"])
def test_changed_model_leaves_no_trace(release: str, tmp_path: Path) -> None:
    """The tokenizer names the folder it is from, and saved it is the same one."""
    folder = tmp_path / release
    if release == "yi":
        yi_release(folder)
    else:
        internlm2_release(folder, USER_DEFINED)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    tokenizer = load_tokenizer(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert tokenizer.name_or_path == str(folder)
    assert tokenizer.vocab_file == str(folder / "tokenizer.model")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    assert again.all_special_tokens == tokenizer.all_special_tokens
    for text in random_texts(50):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    for file in (tmp_path / "saved").glob("*.json"):
        assert str(Path(tempfile.gettempdir()) / "tmp") not in file.read_text(encoding="utf-8")


def test_tokens_marked_as_normalized_are_found_behind_text(tmp_path: Path) -> None:
    """Llama's older files mark </s> so; slow tokenizers split at it all the same."""
    folder = copy_fixture("phi3_sp", tmp_path / "normalized")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    del config["legacy"]
    for token in config["added_tokens_decoder"].values():
        token["normalized"] = True
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    ids = {token["content"]: int(number) for number, token in config["added_tokens_decoder"].items()}
    for text in ("a<img>b", "a<|endoftext|> b", "<img>x<IMG_CONTEXT></img>"):
        assert encode(load_tokenizer(folder), text) == slow_ids(folder, ids, text)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("file", [CONFIG, "added_tokens.json"])
def test_ids_that_the_files_do_not_agree_on_are_refused(name: str, as_json: bool, file: str, tmp_path: Path) -> None:
    """Each family: the error names the folder, the token, the id it should have and the one it gets."""
    folder = copy_fixture(name, tmp_path / name)
    right = load_tokenizer(folder).convert_tokens_to_ids("</box>")
    if as_json:
        load_tokenizer(folder).save_pretrained(folder)
    if file == CONFIG:
        token = {"content": "</box>", "special": True, "normalized": False}
        change_config(folder, added_tokens_decoder={str(right + 7): token})
    else:
        (folder / file).write_text(json.dumps({"</box>": right + 7}), encoding="utf-8")
    with pytest.raises(
        TokenizerError, match=rf"{name}: the token '</box>' should have the id {right + 7} .* gets \d+:"
    ):
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
