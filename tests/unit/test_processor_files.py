import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    InternVLConfig,
    InternVLVisionConfig,
    PreTrainedTokenizerBase,
)

from ivl_lightning.constants import SPECIAL_TOKENS
from ivl_lightning.conversion.processor_files import write_processor_files
from ivl_lightning.conversion.tokenizer_files import write_fast_files
from ivl_lightning.data.conversation import encode_prompt, encode_row
from ivl_lightning.data.templates import TEMPLATES, get_template
from ivl_lightning.data.tiling import cut_tiles, normalize_tiles
from ivl_lightning.models.tokenizer import load_tokenizer, prompt_start_ids, tokenizer_fingerprint

FIXTURES = Path(__file__).parents[1] / "fixtures" / "conversation"
FAMILIES = ("qwen2_vit300m", "qwen2_bytebpe", "internlm2_vit300m", "phi3_sp", "llama")
PAIRS = [
    ("internvl2_5", "qwen2_bytebpe"),
    ("internvl2_5", "internlm2_vit300m"),
    ("Hermes-2", "qwen2_vit300m"),
    ("Hermes-2", "llama"),
    ("internlm2-chat", "internlm2_vit300m"),
    ("phi3-chat", "phi3_sp"),
    ("internvl_zh", "llama"),
    ("internvl_zh", "phi3_sp"),
]
LAYOUTS = ("hf", "original")
SLOW_FILES = {"vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"}
FAST_FILES = {"tokenizer.json", "special_tokens_map.json", "tokenizer_config.json"}
SIDE, TILE_TOKENS = 56, 4
TEXTS = ("Hello, world!", "  two  blanks ", "请描述。\n\n1 + 1", "a<img>b</img> c<|im_end|>\n", "<|system|>\nx", "")

Write = Callable[..., Path]


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def family(name: str, folder: Path) -> PreTrainedTokenizerBase:
    """A fixture; `llama` is Phi-3's as an older Llama tokenizer, which writes a blank before each stretch of text."""
    if name != "llama":
        return load_tokenizer(FIXTURES / name)
    shutil.copytree(FIXTURES / "phi3_sp", folder, copy_function=shutil.copyfile)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**read(file), "legacy": True}), encoding="utf-8")
    return load_tokenizer(folder)


def config_for(tokenizer: PreTrainedTokenizerBase) -> InternVLConfig:
    text = AutoConfig.for_model("qwen2", vocab_size=len(tokenizer), max_position_embeddings=777)
    config = InternVLConfig(text_config=text, vision_config=InternVLVisionConfig(image_size=[SIDE, SIDE]))
    config.image_seq_length = TILE_TOKENS
    return config


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedTokenizerBase]:
    return {name: family(name, tmp_path_factory.mktemp("families") / name) for name in FAMILIES}


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Exports a tokenizer as far as it is tested here: with a config.json, without weights."""

    def export(tokenizer: PreTrainedTokenizerBase, **options: object) -> Path:
        folder = tmp_path_factory.mktemp("exported")
        config = config_for(tokenizer)
        arguments = {"template": "internvl2_5", "layout": "hf", "min_tiles": 1, "max_tiles": 6, "use_thumbnail": True}
        names = write_processor_files(folder, tokenizer, config, **{**arguments, "dynamic": True, **options})
        assert names == sorted(file.name for file in folder.iterdir())
        config.save_pretrained(folder)
        if options.get("layout") == "original":
            (folder / "config.json").write_text('{"model_type": "internvl_chat"}', encoding="utf-8")
        return folder

    return export


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_plain_auto_tokenizer_gives_the_same_ids(name: str, layout: str, tokenizers: dict, write: Write) -> None:
    """Ids with and without BOS, the special tokens and the number of tokens stay, for other programs and for ours."""
    tokenizer = tokenizers[name]
    folder = write(tokenizer, layout=layout)
    for again in (AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)):
        for text in TEXTS:
            for special in (True, False):
                ids = again(text, add_special_tokens=special)["input_ids"]
                assert ids == tokenizer(text, add_special_tokens=special)["input_ids"], (text, special)
        assert len(again) == len(tokenizer)
        assert set(again.all_special_tokens) == set(tokenizer.all_special_tokens)
        assert prompt_start_ids(again, "<|system|>\n") == prompt_start_ids(tokenizer, "<|system|>\n")
        assert again.decode(again(TEXTS[3])["input_ids"]) == tokenizer.decode(tokenizer(TEXTS[3])["input_ids"])
        assert again.pad_token is not None
        assert again.model_max_length == 777
        assert sorted(again("x")) == ["attention_mask", "input_ids"]
    # What version 4 asks for: it would return token types too, which no model here accepts.
    assert read(folder / "tokenizer_config.json")["model_input_names"] == ["input_ids", "attention_mask"]


def test_a_limit_of_the_tokenizer_itself_is_kept(tokenizers: dict, write: Write) -> None:
    """vLLM takes it for the longest prompt."""
    tokenizer = load_tokenizer(FIXTURES / "qwen2_vit300m")
    tokenizer.model_max_length = 123
    assert AutoTokenizer.from_pretrained(write(tokenizer)).model_max_length == 123


def test_a_pad_token_is_found_where_there_is_none(write: Write) -> None:
    tokenizer = load_tokenizer(FIXTURES / "internlm2_vit300m")
    tokenizer.pad_token = None
    again = AutoTokenizer.from_pretrained(write(tokenizer))
    assert tokenizer.pad_token is None
    assert again.pad_token == again.eos_token
    assert len(again) == len(tokenizer)


def test_an_exported_tokenizer_is_exported_alike(tokenizers: dict, write: Write) -> None:
    """Nothing piles up when an exported model is trained on and exported again."""
    first = write(tokenizers["phi3_sp"], template="phi3-chat")
    second = write(load_tokenizer(first), template="phi3-chat")
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name
    assert tokenizer_fingerprint(load_tokenizer(second)) == tokenizer_fingerprint(tokenizers["phi3_sp"])


def test_padding_and_truncation_are_not_written(tmp_path: Path) -> None:
    """They are the state of the tokenizer's last call."""
    tokenizer = load_tokenizer(FIXTURES / "qwen2_bytebpe")
    tokenizer(["a long text", "x"], padding=True, truncation=True, max_length=3)
    write_fast_files(tmp_path, tokenizer, max_length=5, named={})
    assert read(tmp_path / "tokenizer.json")["truncation"] is None
    assert read(tmp_path / "tokenizer.json")["padding"] is None
    assert tokenizer.backend_tokenizer.truncation is not None


@pytest.mark.parametrize(("name", "files"), [("qwen2_bytebpe", SLOW_FILES), ("internlm2_vit300m", FAST_FILES)])
def test_original_layout_has_slow_files_where_they_can_be_made(
    name: str, files: set[str], tokenizers: dict, write: Write
) -> None:
    """Qwen2's files equal the source's; a tokenizer.model cannot be made from a fast tokenizer."""
    folder = write(tokenizers[name], layout="original")
    assert {file.name for file in folder.iterdir()} == {*files, "preprocessor_config.json", "config.json"}
    if files is not SLOW_FILES:
        return
    source = FIXTURES / name
    for file in ("vocab.json", "added_tokens.json"):
        assert read(folder / file) == read(source / file)
    assert (folder / "merges.txt").read_text("utf-8").split() == (source / "merges.txt").read_text("utf-8").split()
    assert (
        read(folder / "tokenizer_config.json")["added_tokens_decoder"]
        == (read(source / "tokenizer_config.json")["added_tokens_decoder"])
    )
    clip = read(folder / "preprocessor_config.json")
    assert (clip["size"], clip["crop_size"], clip["feature_extractor_type"]) == (SIDE, SIDE, "CLIPFeatureExtractor")


def test_original_layout_of_another_bpe_is_tokenizer_json(write: Write) -> None:
    """A BPE that splits text otherwise would be read as Qwen2's from its slow files."""
    tokenizer = load_tokenizer(FIXTURES / "qwen2_bytebpe")
    tokenizer.backend_tokenizer.normalizer = None
    folder = write(tokenizer, layout="original")
    assert not (folder / "vocab.json").exists()
    assert AutoTokenizer.from_pretrained(folder)("e\u0301")["input_ids"] == tokenizer("e\u0301")["input_ids"]


def test_the_processors_tokens_are_attributes(tokenizers: dict, write: Write) -> None:
    tokenizer = tokenizers["internlm2_vit300m"]
    again = AutoTokenizer.from_pretrained(write(tokenizer))
    ids = [again.start_image_token_id, again.end_image_token_id, again.context_image_token_id, again.video_token_id]
    assert ids == tokenizer.convert_tokens_to_ids(["<img>", "</img>", "<IMG_CONTEXT>", "<quad>"])
    assert again.padding_side == "left"


def test_a_video_token_that_the_vocabulary_has_is_used(write: Write) -> None:
    tokenizer = load_tokenizer(FIXTURES / "qwen2_vit300m")
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    folder = write(tokenizer)
    assert AutoTokenizer.from_pretrained(folder).video_token_id == len(tokenizer) - 1
    assert '"<video>\\n"' in (folder / "chat_template.jinja").read_text(encoding="utf-8")


def turn(role: str, text: str, images: int = 0) -> dict:
    """A message; with images, or for every other role, as a list of parts."""
    if not images and role == "user":
        return {"role": role, "content": text}
    return {"role": role, "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}


def as_row(messages: list[dict], images: int) -> dict[str, object]:
    """The same conversation in the trainer's own format."""
    roles = {"system": "system", "user": "human", "assistant": "gpt"}
    parts = {"image": lambda _: "<image>\n", "text": lambda part: part["text"]}
    turns = []
    for message in messages:
        content = message["content"]
        texts = [content] if isinstance(content, str) else [parts[part["type"]](part) for part in content]
        turns.append({"from": roles[message["role"]], "value": "".join(texts)})
    return {"conversations": turns, **({"image": ["x.png"] * images} if images else {})}


def check_ids(tokenizer: PreTrainedTokenizerBase, folder: Path, template: str, messages: list[dict]) -> None:
    """Text of the exported template, placeholders expanded, by the exported tokenizer = ids of training."""
    exported = AutoTokenizer.from_pretrained(folder)
    placeholder = "<IMG_CONTEXT>" if (folder / "chat_template.jinja").exists() else "<image>"
    prompt = messages[-1]["role"] == "user"
    text = exported.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    stretches = text.split(placeholder)
    counts = [3, 8][: len(stretches) - 1]
    expanded = stretches[0]
    for count, stretch in zip(counts, stretches[1:], strict=True):
        expanded += "<img>" + "<IMG_CONTEXT>" * count + "</img>" + stretch
    row, options = as_row(messages, len(counts)), {"template": template, "num_image_tokens": counts}
    expected = encode_prompt(row, tokenizer, **options) if prompt else encode_row(row, tokenizer, **options)[0]
    assert exported(expanded, add_special_tokens=False)["input_ids"] == expected


CONVERSATIONS = {
    "question": [turn("user", "What is 3 + 4?")],
    "image": [turn("user", "  请描述这张图片。 ", 1)],
    "answered": [turn("user", "Compare.", 2), turn("assistant", " Both <ref>dogs</ref>.\n")],
    "two": [turn("user", "a", 1), turn("assistant", "b"), turn("user", "\n c", 1)],
    "three": [turn(role, f"{role} \n") for role in ("user", "assistant") * 3],
    "empty": [turn("user", ""), turn("assistant", ""), turn("user", "  "), turn("assistant", "x")],
    "image only": [{"role": "user", "content": [{"type": "image"}]}],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("template", "name"), PAIRS)
def test_chat_template_gives_the_ids_of_training(
    template: str, name: str, layout: str, tokenizers: dict, write: Write
) -> None:
    """One to three exchanges, with and without images, a system message where training knows one."""
    tokenizer = tokenizers[name]
    folder = write(tokenizer, template=template, layout=layout)
    for messages in CONVERSATIONS.values():
        check_ids(tokenizer, folder, template, messages)
        if get_template(template).per_turn:
            check_ids(tokenizer, folder, template, [turn("system", "Be brief.\n"), *messages])


WORDS = st.text(alphabet="abc .\n猫'é", max_size=10)


@pytest.mark.parametrize(("template", "name"), [PAIRS[0], PAIRS[1], PAIRS[5], PAIRS[6]])
def test_chat_template_gives_the_ids_of_training_for_any_text(
    template: str, name: str, tokenizers: dict, write: Write
) -> None:
    folder = write(tokenizers[name], template=template)

    @settings(max_examples=12, deadline=None)
    @given(texts=st.lists(WORDS, min_size=1, max_size=4), images=st.integers(0, 2))
    def check(texts: list[str], images: int) -> None:
        messages = [turn(("user", "assistant")[index % 2], text) for index, text in enumerate(texts)]
        check_ids(tokenizers[name], folder, template, [turn("user", texts[0], images), *messages[1:]])

    check()


def test_every_template_is_tested() -> None:
    assert {template for template, _ in PAIRS} == set(TEMPLATES)


def test_phi3s_blank_stands_in_the_chat_template(tokenizers: dict, write: Write) -> None:
    """Its slow tokenizer writes one between BOS and the first marker; a blank in the text gives its id."""
    exported = AutoTokenizer.from_pretrained(write(tokenizers["phi3_sp"], template="phi3-chat"))
    ids = exported.apply_chat_template([turn("user", "x")], add_generation_prompt=True, return_dict=False)
    assert exported.convert_ids_to_tokens(ids)[:3] == ["<s>", "▁", "<|system|>"]


def test_a_video_as_labeled_images_gives_the_ids_of_training(tokenizers: dict, write: Write) -> None:
    tokenizer = tokenizers["qwen2_bytebpe"]
    exported = AutoTokenizer.from_pretrained(write(tokenizer))
    parts = [[{"type": "text", "text": f"Frame-{number}: "}, {"type": "image"}] for number in (1, 2)]
    message = {"role": "user", "content": [*parts[0], *parts[1], {"type": "text", "text": "What happens?"}]}
    text = exported.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    ids = exported(text.replace("<IMG_CONTEXT>", "<img><IMG_CONTEXT></img>"))["input_ids"]
    row = {"video": "x.mp4", "conversations": [{"from": "human", "value": "<video>\nWhat happens?"}]}
    assert ids == encode_prompt(row, tokenizer, num_image_tokens=[1, 1])


def test_a_system_message_takes_the_place_of_an_older_templates_text(tokenizers: dict, write: Write) -> None:
    """Training refuses such rows; requests to a server often bring one."""
    exported = AutoTokenizer.from_pretrained(write(tokenizers["qwen2_vit300m"], template="Hermes-2"))
    text = exported.apply_chat_template([turn("system", "Be brief."), turn("user", "x")], tokenize=False)
    assert text == "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nx<|im_end|>"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "tool", "content": "x"}], "from tool: use system"),
        ([turn("user", "x"), turn("system", "y")], "put it first"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "of type audio: use text"),
    ],
)
def test_what_the_model_never_saw_is_refused(
    messages: list[dict], message: str, tokenizers: dict, write: Write
) -> None:
    exported = AutoTokenizer.from_pretrained(write(tokenizers["qwen2_vit300m"]))
    with pytest.raises(TemplateError, match=message):
        exported.apply_chat_template(messages, tokenize=False)


def test_a_template_that_no_text_can_repeat_is_warned_of(
    tokenizers: dict, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    """Turns tokenized one by one, by a tokenizer to which `<|im_start|>` is plain text."""
    write(tokenizers["phi3_sp"], template="internvl2_5")
    assert "No chat template can repeat how internvl2_5 prompts were tokenized" in caplog.text


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("options", "tiles"),
    [({}, 7), ({"max_tiles": 3}, 3), ({"min_tiles": 4, "max_tiles": 4}, 5), ({"dynamic": False}, 1)],
)
def test_image_settings_give_the_pixels_of_training(options: dict, tiles: int, tokenizers: dict, write: Write) -> None:
    """transformers' image processor with Pillow: bitwise ours but for rounding; a switched-off tiling is one tile."""
    folder = write(tokenizers["qwen2_vit300m"], **options)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    image = picture(190, 120)
    # As InternVLProcessor calls it.
    pixels = processor(image, crop_to_patches=True, return_tensors="pt")["pixel_values"]
    limits = {"min_tiles": options.get("min_tiles", 1), "max_tiles": options.get("max_tiles", 6)}
    limits = limits if options.get("dynamic", True) else {"max_tiles": 1}
    expected = normalize_tiles(cut_tiles(image, tile_size=SIDE, **limits))
    assert pixels.shape == expected.shape == (tiles, 3, SIDE, SIDE)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


def test_tiles_without_thumbnail_are_warned_of(
    tokenizers: dict, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    """The library's image processor has no switch for it; the original's settings stand in config.json."""
    write(tokenizers["qwen2_vit300m"], use_thumbnail=False, max_tiles=1)
    write(tokenizers["qwen2_vit300m"], use_thumbnail=False, layout="original")
    assert not caplog.text
    write(tokenizers["qwen2_vit300m"], use_thumbnail=False)
    assert "always adds a thumbnail" in caplog.text


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(FIXTURES / "qwen2_vit300m")
    arguments = {"layout": "hf", "min_tiles": 1, "max_tiles": 6, "use_thumbnail": True, "dynamic": True}
    config = config_for(tokenizer)
    with pytest.raises(ValueError, match="chat template 'nope' is not known"):
        write_processor_files(tmp_path, tokenizer, config, template="nope", **arguments)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ValueError, match=r"highest id is 445, but the model has 445 rows"):
        write_processor_files(tmp_path, tokenizer, config, template="internvl2_5", **arguments)
    bare = load_bare(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"no <img>, </img>, <IMG_CONTEXT>, <quad>: call add_special_tokens"):
        write_processor_files(tmp_path, bare, config_for(bare), template="internvl2_5", **arguments)


def load_bare(folder: Path) -> PreTrainedTokenizerBase:
    """Qwen2's fixture before the nine tokens."""
    shutil.copytree(FIXTURES / "qwen2_bytebpe", folder, copy_function=shutil.copyfile)
    (folder / "added_tokens.json").unlink()
    config = read(folder / "tokenizer_config.json")
    tokens = config["added_tokens_decoder"]
    kept = {number: token for number, token in tokens.items() if token["content"] not in SPECIAL_TOKENS}
    changed = {**config, "added_tokens_decoder": kept, "additional_special_tokens": []}
    (folder / "tokenizer_config.json").write_text(json.dumps(changed), encoding="utf-8")
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("template", "name"), [PAIRS[0], PAIRS[1], PAIRS[5], ("internvl_zh", "llama"), ("internlm2-chat", PAIRS[4][1])]
)
def test_the_librarys_processor_gives_ids_and_pixels_of_training(
    template: str, name: str, tokenizers: dict, write: Write
) -> None:
    """InternVLProcessor, with Pillow's resizing to the bit and with torchvision's, its default, nearly."""
    pytest.importorskip("torchvision", reason="InternVLProcessor cannot be built without torchvision")
    tokenizer = tokenizers[name]
    folder = write(tokenizer, template=template)
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "InternVLProcessor"
    images = [picture(190, 120), picture(60, 50)]
    messages = [turn("user", "Compare.", 2), turn("assistant", "Both."), turn("user", "Why?")]
    for part, image in zip(messages[0]["content"], images, strict=False):
        part["image"] = image
    tiles = [normalize_tiles(cut_tiles(image, tile_size=SIDE, max_tiles=6)) for image in images]
    row = as_row(messages, 2)
    expected = encode_prompt(row, tokenizer, template=template, num_image_tokens=[len(t) * TILE_TOKENS for t in tiles])
    arguments = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    for backend, tolerance in (("torchvision", 0.04), ("pil", 1e-6)):
        processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend=backend)
        inputs = processor.apply_chat_template(messages, **arguments)
        assert sorted(inputs) == ["attention_mask", "input_ids", "pixel_values"]
        assert inputs["input_ids"][0].tolist() == expected
        torch.testing.assert_close(inputs["pixel_values"], torch.cat(tiles), rtol=0, atol=tolerance)
