"""A conversation: its prompts are those of training, its answers those of the library, whatever goes wrong is said."""

import json
import re
from contextlib import closing
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import InternVLForConditionalGeneration

from ivl_lightning.config.chat import ChatConfig, ChatModel, check_chat
from ivl_lightning.config.check import ConfigError
from ivl_lightning.data.annotations import DatasetSpec
from ivl_lightning.data.conversation import encode_row
from ivl_lightning.data.encoding import encoder_factory
from ivl_lightning.data.locations import MediaError
from ivl_lightning.data.tiling import normalize_tiles
from ivl_lightning.inference import chat as chat_module
from ivl_lightning.inference import devices, streaming
from ivl_lightning.inference.chat import Chat
from ivl_lightning.inference.decoding import StreamDecoder, decode_inside
from ivl_lightning.inference.devices import device_name, load_placed, place
from ivl_lightning.models.tokenizer import add_special_tokens, image_token_id, load_tokenizer, text_ids
from ivl_lightning.structures import Record, RowError, Turn
from tests import tiny

ORIGINAL = Path(__file__).parents[1] / "fixtures/checkpoints/internlm2_vit300m"
TOKENIZERS = ("internlm2_vit300m", "phi3_sp", "qwen2_bytebpe", "qwen2_vit300m")
KINDS = [
    ("internvl2_5", "qwen2_vit300m"),
    ("Hermes-2", "qwen2_bytebpe"),
    ("Hermes-2", "internlm2_vit300m"),
    ("phi3-chat", "phi3_sp"),
]
kinds = pytest.mark.parametrize(("template", "tokenizer_name"), KINDS, ids=[f"{one}-{two}" for one, two in KINDS])


@cache
def load(name: str):
    tokenizer = load_tokenizer(tiny.TOKENIZER.with_name(name))
    add_special_tokens(tokenizer)
    return tokenizer


@cache
def model_for(name: str) -> InternVLForConditionalGeneration:
    return tiny.build_tiny_model(load(name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """a.png, b.png and c.png of several sizes, and clip.gif of 12 frames."""
    path = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    for name, (width, height) in {"a": (64, 32), "b": (40, 70), "c": (32, 32)}.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path / f"{name}.png")
    first, *rest = (Image.new("RGB", (32, 32), (10 * number + 5,) * 3) for number in range(12))
    first.save(path / "clip.gif", save_all=True, append_images=rest, duration=500)
    return path


@pytest.fixture(scope="module")
def speaker(tokenizer):
    """A model that nothing here changes."""
    return tiny.build_tiny_model(tokenizer).eval()


@pytest.fixture(scope="module")
def speaker_folder(speaker, tokenizer, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    speaker.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def talk(speaker, tokenizer):
    def make(**settings) -> Chat:
        return Chat(speaker, tokenizer, ChatConfig(**{"max_tiles": 4, "max_new_tokens": 8, **settings}))

    return make


class Script:
    """Stands in for generation: says what it is told to, and keeps the prompts."""

    def __init__(self, tokenizer, answers):
        self.tokenizer = tokenizer
        self.answers = list(answers)
        self.prompts = []

    def __call__(self, internvl, prompts, *, streamer, eos_token_id, **_):
        self.prompts.append(prompts)
        streamer.put(torch.empty(1, 0, dtype=torch.int64))
        for token in [*text_ids(self.tokenizer, self.answers.pop(0))[0], eos_token_id[0]]:
            streamer.put(torch.tensor([token]))
        streamer.end()


@pytest.fixture
def scripted(monkeypatch):
    """A conversation of which the model's part is given; returns it and the script."""

    def make(template, tokenizer_name, answers, **settings):
        tokenizer = load(tokenizer_name)
        script = Script(tokenizer, answers)
        monkeypatch.setattr(streaming, "generate", script)
        config = ChatConfig(model=ChatModel(template=template), **{"max_tiles": 4, "frames": 5, **settings})
        return Chat(model_for(tokenizer_name), tokenizer, config), script

    return make


def trained(row, folder, template, tokenizer):
    """What training makes of a row, frames in the middle of their intervals."""
    data = tiny.tiny_data_config(Path("unused"), max_frames=5, min_frames=2, max_tokens=4096)
    factory = encoder_factory(data, tokenizer, template=template, tile_tokens=tiny.TILE_TOKENS, training=True)
    spec = DatasetSpec("own", str(folder), "own.jsonl", data_augment=False, repeat_time=1)
    return factory(spec).encode(Record("own", "own.jsonl", 1, row), None)


def conversation(*texts: str, system: str | None = None):
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    return ([] if system is None else [{"from": "system", "value": system}]) + turns


def assert_trained_prefix(prompt, answer, row, folder, template, tokenizer):
    """The prompt and its tiles are those of the training row, which goes on with the answer."""
    encoded = trained(row, folder, template, tokenizer)
    ids = prompt.input_ids[0].tolist()
    assert encoded.input_ids[: len(ids)] == ids
    rest = encoded.input_ids[len(ids) :]
    assert decode_inside(tokenizer, rest).strip().startswith(answer)
    assert len(rest) <= len(text_ids(tokenizer, answer)[0]) + 2
    tiles = prompt.pixel_values
    assert torch.equal(tiles, tiny_tiles(encoded))
    counts = [tiny.TILE_TOKENS * count for count in tile_counts(row, tiles)]
    assert encode_row(row, tokenizer, template=template, num_image_tokens=counts)[0] == encoded.input_ids


def tiny_tiles(encoded):
    empty = torch.empty(0, 3, tiny.TILE_SIZE, tiny.TILE_SIZE, dtype=torch.uint8)
    return empty if encoded.pixel_values is None else encoded.pixel_values


def tile_counts(row, tiles) -> list[int]:
    """Tiles of each image or frame: known here where there is one image, or one tile for each."""
    if isinstance(row.get("image"), list) and row["image"] == ["a.png", "b.png"]:
        return [3, len(tiles) - 3]  # 64 x 32 in 2 of 4 tiles and a thumbnail
    if isinstance(row.get("image"), list):
        return [1] * len(row["image"])
    return [len(tiles)] if "image" in row else [1] * len(tiles)


@kinds
@pytest.mark.parametrize(
    ("media", "question", "written"),
    [
        ({}, "Say 3.", "Say 3."),
        ({"image": "a.png"}, "What is it?", "What is it?"),
        ({"image": "b.png"}, "What is <image> it?", "What is <image> it?"),
        ({"image": ["a.png", "b.png"]}, "Compare.", "<image>\n<image>\nCompare."),
        ({"video": "clip.gif"}, "What moves?", "What moves?"),
    ],
    ids=["text", "image", "image inside", "images", "video"],
)
def test_a_question_has_the_ids_and_tiles_of_its_training_row(
    scripted, folder, template, tokenizer_name, media, question, written
):
    chat, script = scripted(template, tokenizer_name, ["It is a cat."])
    image = media.get("image", [])
    images = [folder / name for name in ([image] if isinstance(image, str) else image)]
    video = folder / media["video"] if "video" in media else None
    assert "".join(chat.ask(question, images, video)) == "It is a cat."
    row = {**media, "conversations": conversation(written, "It is a cat.")}
    assert_trained_prefix(script.prompts[0], "It is a cat.", row, folder, template, chat.tokenizer)


@kinds
def test_each_of_three_turns_has_the_ids_and_tiles_of_its_training_row(scripted, folder, template, tokenizer_name):
    """The first picture comes with the second question: from the third turn on the tiles are shared by three."""
    answers = ["Hello.", "It is noise", "是的。 Two  cats"]
    chat, script = scripted(template, tokenizer_name, answers)
    shown = [[], ["a.png"], ["b.png", "c.png"]]
    asked = ["Hi!", "What is it?", "And these?"]
    written = ["Hi!", "<image>\nWhat is it?", "<image>\n<image>\nAnd these?"]
    for question, names in zip(asked, shown, strict=True):
        "".join(chat.ask(question, [folder / name for name in names]))
    rows = [
        {"conversations": conversation(written[0], answers[0])},
        {"conversations": conversation(*written[:1], answers[0], written[1], answers[1]), "image": "a.png"},
        {
            "conversations": conversation(written[0], answers[0], written[1], answers[1], written[2], answers[2]),
            "image": ["a.png", "b.png", "c.png"],
        },
    ]
    for prompt, answer, row in zip(script.prompts, answers, rows, strict=True):
        assert_trained_prefix(prompt, answer, row, folder, template, chat.tokenizer)
    assert [turn.role for turn in chat.turns] == ["human", "gpt"] * 3
    assert chat.turns[-1] == Turn("gpt", answers[-1])


def test_a_video_is_shown_in_the_turn_it_came_with(scripted, folder):
    chat, script = scripted("internvl2_5", "qwen2_vit300m", ["Hello.", "Gray."])
    "".join(chat.ask("Hi!"))
    "".join(chat.ask("What moves?", video=folder / "clip.gif"))
    row = {"video": "clip.gif", "conversations": conversation("Hi!", "Hello.", "<video>\nWhat moves?", "Gray.")}
    assert_trained_prefix(script.prompts[1], "Gray.", row, folder, "internvl2_5", chat.tokenizer)


def test_a_system_turn_stands_where_training_has_it(scripted, folder):
    chat, script = scripted("internvl2_5", "qwen2_vit300m", ["Yes.", "No."], system="Be brief.")
    "".join(chat.ask("Is it?", [folder / "a.png"]))
    row = {"image": "a.png", "conversations": conversation("<image>\nIs it?", "Yes.", system="Be brief.")}
    assert_trained_prefix(script.prompts[0], "Yes.", row, folder, "internvl2_5", chat.tokenizer)
    chat.system = None
    chat.clear()
    "".join(chat.ask("Is it?"))
    row = {"conversations": conversation("Is it?", "No.")}
    assert_trained_prefix(script.prompts[1], "No.", row, folder, "internvl2_5", chat.tokenizer)


@pytest.mark.parametrize(("template", "tokenizer_name"), KINDS[1:])
def test_a_system_turn_is_refused_where_the_template_has_no_place(scripted, template, tokenizer_name):
    with pytest.raises(ConfigError, match=rf"system='Be brief\.': .* {template!r} has no place .* leave it out"):
        scripted(template, tokenizer_name, [], system="Be brief.")


def test_labels_of_images_are_written_on_demand(scripted, folder):
    chat, script = scripted("internvl2_5", "qwen2_vit300m", ["Yes."], image_labels="auto")
    "".join(chat.ask("Alike?", [folder / "a.png", folder / "b.png"]))
    text = chat.tokenizer.decode(script.prompts[0].input_ids[0])
    assert re.search(r"Image-1: <img>(<IMG_CONTEXT>)+</img>\nImage-2: <img>", text)


def test_tiles_are_those_that_are_asked_for(scripted, folder):
    """40 tiles for a large picture, one tile where no more are wanted."""
    picture = Image.new("RGB", (tiny.TILE_SIZE * 8, tiny.TILE_SIZE * 5))
    for settings, tiles in (({"max_tiles": 40}, 41), ({"max_tiles": 40, "use_thumbnail": False}, 40), ({}, 3)):
        chat, script = scripted("internvl2_5", "qwen2_vit300m", ["Yes."], **settings)
        "".join(chat.ask("What?", [picture]))
        assert len(script.prompts[0].pixel_values) == tiles


# -- answers ----------------------------------------------------------------------------------------------------------


def test_greedy_answers_are_those_of_plain_transformers(speaker_folder, folder, monkeypatch):
    """Token for token: text, an image, several images, and the turns after them."""
    chat = Chat.from_folder(speaker_folder, max_tiles=4, max_new_tokens=12, device="cpu")
    prompts, streamed = [], []
    stream_ids = chat_module.stream_ids

    def spy(model, prompt, **options):
        prompts.append(prompt)
        streamed.append([])
        for token in stream_ids(model, prompt, **options):
            streamed[-1].append(token)
            yield token

    monkeypatch.setattr(chat_module, "stream_ids", spy)
    answers = ["".join(chat.ask("Say 3."))]
    chat.clear()
    answers.append("".join(chat.ask("What is it?", [folder / "a.png"])))
    answers.append("".join(chat.ask("And now?")))
    answers.append("".join(chat.ask("And these?", [folder / "b.png", folder / "c.png"])))
    plain = InternVLForConditionalGeneration.from_pretrained(speaker_folder, attn_implementation="sdpa")
    for prompt, ids, answer in zip(prompts, streamed, answers, strict=True):
        pixels = {"pixel_values": normalize_tiles(prompt.pixel_values)} if len(prompt.pixel_values) else {}
        whole = plain.generate(
            input_ids=prompt.input_ids,
            attention_mask=prompt.attention_mask,
            **pixels,
            do_sample=False,
            max_new_tokens=12,
        )
        assert whole[0, prompt.input_ids.shape[1] :].tolist() == ids
        assert answer == chat.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert [len(prompt.pixel_values) for prompt in prompts] == [0, 3, 3, 3]
    assert len(set(answers)) == 4


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", ["the red car", "  是的。 红色的车\n\n是 🚗🚗 é ", "a\n\nb c , d .", "", " \n "])
def test_streamed_text_is_the_whole_text(name, text):
    """Blanks inside are kept, those at both ends are not; a character over several tokens is never shown in parts."""
    tokenizer = load(name)
    ids = text_ids(tokenizer, text)[0]
    pieces = streamed_pieces(tokenizer, ids)
    assert "".join(pieces) == decode_inside(tokenizer, ids).strip() == text.strip()
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_streamed_text_of_any_tokens_is_the_whole_text(name):
    """Bytes that make up no character, special tokens and blanks in any order."""
    tokenizer = load(name)
    rng = np.random.default_rng(0)
    bytes_only = [token for token in range(len(tokenizer)) if len(tokenizer.decode([token])) <= 1]
    for length in range(1, 60):
        pool = bytes_only if length % 2 and bytes_only else range(len(tokenizer))
        ids = rng.choice(pool, length).tolist()
        assert "".join(streamed_pieces(tokenizer, ids)) == decode_inside(tokenizer, ids).strip()


def streamed_pieces(tokenizer, ids) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(token) for token in ids), decoder.close()]


def test_an_answer_comes_piece_by_piece(talk):
    pieces = list(talk().ask("Say 3."))
    assert len(pieces) > 3
    assert all(pieces)


def test_a_cut_answer_is_told_from_a_finished_one(scripted, talk):
    chat = talk(max_new_tokens=2)
    "".join(chat.ask("Say 3."))
    assert not chat.finished
    chat, _ = scripted("internvl2_5", "qwen2_vit300m", ["Yes."])
    "".join(chat.ask("Say 3."))
    assert chat.finished


def test_sampled_answers_follow_their_seed_alone(talk):
    """The same question gets the same answer; other random numbers are left as they are."""
    chat = talk(do_sample=True, temperature=2.0, max_new_tokens=12)

    def answer(**options) -> str:
        chat.clear()
        return "".join(chat.ask("Say 3.", **options))

    torch.manual_seed(5)
    undisturbed = torch.rand(1)
    torch.manual_seed(5)
    first = answer()
    assert torch.equal(torch.rand(1), undisturbed)
    assert answer() == first
    assert len({answer(seed=seed) for seed in range(4)}) > 1
    assert answer(do_sample=False) == "".join(talk(max_new_tokens=12).ask("Say 3."))


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_an_error_of_generation_reaches_the_caller_and_changes_nothing(talk, monkeypatch, folder):
    chat = talk()
    chat.attach([folder / "a.png"])

    def fail(*_, **__):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "generate", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            "".join(chat.ask("What is it?"))
    assert chat.turns == ()
    "".join(chat.ask("What is it?"))
    assert chat.turns[0].text == "<image>\nWhat is it?"


def test_an_answer_that_is_not_read_on_stops_the_network_and_is_kept_as_far_as_it_was_read(talk, speaker):
    chat = talk(max_new_tokens=100_000)
    calls = []
    handle = speaker.model.language_model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with closing(chat.ask("Say 3.")) as pieces:
        told = next(pieces) + next(pieces)
    stopped = len(calls)
    handle.remove()
    assert stopped < 1000
    assert chat.turns == (Turn("human", "Say 3."), Turn("gpt", told))
    assert not chat.finished
    assert not speaker.model.language_model.layers[0]._forward_pre_hooks
    chat.clear()
    chat.ask("Say 3.").close()
    assert chat.turns == ()


def test_media_that_cannot_be_read_are_named(talk, tmp_path, folder, monkeypatch):
    chat = talk()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MediaError, match=rf"'none\.png': there is no such file; relative paths start in {tmp_path}"):
        chat.ask("What?", ["none.png"])
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(MediaError, match=r"text\.png': not an image"):
        chat.attach(["text.png"])
    with pytest.raises(MediaError, match=r"text\.png' is none of the videos"):
        chat.attach(video="text.png")
    with pytest.raises(MediaError, match=r"URL of scheme 'ftp'"):
        chat.attach(["ftp://example.org/a.png"])
    with pytest.raises(RowError, match="hold 2 <image> for 1 images"):
        chat.ask("<image> and <image>", [folder / "a.png"])
    with pytest.raises(RowError, match="would forge an image slot"):
        chat.ask("<IMG_CONTEXT>")
    with pytest.raises(ValueError, match="not valid Unicode"):
        chat.ask("\udcff")
    assert chat.turns == ()


def test_pictures_and_videos_do_not_mix(talk, folder):
    chat = talk()
    chat.attach([folder / "a.png"])
    with pytest.raises(ValueError, match=r"clip\.gif: a conversation has pictures or a video, not both"):
        chat.attach(video=folder / "clip.gif")
    chat.clear()
    "".join(chat.ask("What?", video=folder / "clip.gif", max_new_tokens=1))
    with pytest.raises(ValueError, match="has a video already"):
        chat.ask("What?", video=folder / "clip.gif")
    with pytest.raises(ValueError, match="pictures or a video, not both"):
        chat.ask("What?", [folder / "a.png"])


def test_files_may_lie_anywhere_and_be_links(scripted, folder, tmp_path, monkeypatch):
    (tmp_path / "link.png").symlink_to(folder / "a.png")
    monkeypatch.chdir(tmp_path)
    chat, script = scripted("internvl2_5", "qwen2_vit300m", ["Yes."])
    "".join(chat.ask("Alike?", ["link.png", folder / "a.png"]))
    first, second = script.prompts[0].pixel_values.chunk(2)
    assert torch.equal(first, second)


def test_a_picture_stays_what_it_was_when_it_was_shown(scripted, tmp_path):
    """A file that is written anew and shown again does not change what was said before about the first."""
    chat, script = scripted("internvl2_5", "qwen2_vit300m", ["Black.", "White."])
    for color in ("black", "white"):
        Image.new("RGB", (32, 32), color).save(tmp_path / "shot.png")
        "".join(chat.ask("Which color?", [tmp_path / "shot.png"]))
        (tmp_path / "shot.png").unlink()
    assert script.prompts[1].pixel_values.flatten(1).float().mean(dim=1).tolist() == [0.0, 255.0]


def test_a_conversation_too_long_for_the_model_is_warned_of(talk, caplog):
    "".join(talk(max_new_tokens=1).ask("word " * 600))
    assert re.search(r"the conversation has \d+ tokens, and the model was made for 512", caplog.text)


def test_wrong_settings_are_named():
    with pytest.raises(ConfigError) as caught:
        check_chat(
            ChatConfig(
                image=["a.png", ""],
                video="b.mp4",
                prompt=" ",
                max_tiles=41,
                frames=65,
                top_p=0.5,
                device="cpu",
                device_map="auto",
            )
        )
    for part in (
        "min_tiles=1, max_tiles=41: at least 1, at most 40",
        "frames=65 must be at least 1 and at most 64",
        "image=['a.png', ''] and video=b.mp4",
        "prompt is empty",
        "image and video need the name of a file",
        "top_p=0.5 does nothing where nothing is sampled: add do_sample=true",
        "device=cpu and device_map=auto: give one of them",
    ):
        assert part in str(caught.value)


# -- templates and devices --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["transformers", "original"])
def test_the_template_is_the_settings_or_the_checkpoints(speaker_folder, tmp_path, layout):
    """As config.json names it, whichever layout it is of."""
    source = speaker_folder if layout == "transformers" else ORIGINAL
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (config["internvl_chat"] if layout == "transformers" else config)["template"] = "Hermes-2"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Chat.from_folder(source, device="cpu").template == "internvl2_5"
    assert Chat.from_folder(tmp_path, device="cpu").template == "Hermes-2"
    assert Chat.from_folder(tmp_path, device="cpu", template="phi3-chat").template == "phi3-chat"
    with pytest.raises(ValueError, match=r"model\.template names the chat template 'zh', .* use one of internvl2_5"):
        Chat.from_folder(tmp_path, device="cpu", template="zh")


def test_a_checkpoint_of_the_original_layout_answers(folder):
    """Its own tiles (56 pixels) and its own tokenizer."""
    chat = Chat.from_folder(ORIGINAL, device="cpu", max_new_tokens=4, max_tiles=2)
    assert "".join(chat.ask("What is it?", [folder / "a.png"])) == chat.turns[-1].text
    assert chat.model.config.image_token_id == image_token_id(chat.tokenizer)


@pytest.mark.parametrize(
    "plan",
    [
        {"model": "disk", "lm_head": "disk"},
        {
            "model.vision_tower": "disk",
            "model.multi_modal_projector": "cpu",
            "model.language_model": "disk",
            "lm_head": "cpu",
        },
        {
            "model.vision_tower": "cpu",
            "model.multi_modal_projector": "disk",
            "model.language_model": "cpu",
            "lm_head": "disk",
        },
    ],
    ids=["whole", "parts", "other parts"],
)
def test_a_spread_model_answers_as_a_whole_one(speaker_folder, tokenizer, talk, folder, tmp_path, plan):
    """Weights that are fetched for each use, and modules that are called one by one; placed here and while reading."""
    question = ("Compare.", [folder / "a.png", folder / "b.png"])
    expected = "".join(talk().ask(*question))
    placed = place(tiny.build_tiny_model(tokenizer), device_map=plan, offload_folder=str(tmp_path / "one"))
    read = load_placed(speaker_folder, device_map=plan, offload_folder=str(tmp_path / "two"))
    for spread in (placed, read):
        assert any(parameter.is_meta for parameter in spread.parameters())
        chat = Chat(spread, tokenizer, ChatConfig(max_tiles=4, max_new_tokens=8))
        assert chat.device.type == "cpu"
        assert "".join(chat.ask(*question)) == expected


def test_a_plan_for_several_devices_leaves_layers_whole(tokenizer, talk, folder, tmp_path, monkeypatch):
    """Two devices of which neither holds the whole model; main memory and the disk stand in for them."""
    question = ("Compare.", [folder / "a.png", folder / "b.png"])
    expected = "".join(talk().ask(*question))
    model = tiny.build_tiny_model(tokenizer)
    size = model.get_memory_footprint()
    memory = {0: int(size * 0.8), 1: int(size * 0.8), "cpu": 0}
    monkeypatch.setattr(devices, "get_balanced_memory", lambda *_, **__: dict(memory))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plan = devices._even_plan(model, 0)
    assert set(plan.values()) == {0, 1}
    assert [name for name in plan if re.search(r"layers?\.\d+\.|embeddings\.", name)] == []
    stand_in = {name: ("disk", "cpu")[number] for name, number in plan.items()}
    place(model, device_map=stand_in, offload_folder=str(tmp_path))
    chat = Chat(model, tokenizer, ChatConfig(max_tiles=4, max_new_tokens=8))
    assert "".join(chat.ask(*question)) == expected


def test_places_that_are_not_there_are_named(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_name("auto") == "cpu"
    assert place(model, device_map="auto") is model
    with pytest.raises(ConfigError, match="device=cuda, but torch finds no CUDA device"):
        place(model, "cuda")
    assert devices._device_of("model.vision_tower.a", {"": 1, "model.vision_tower": 0}) == torch.device("cuda:0")
    assert devices._device_of("model.vision_towers", {"": 1, "model.vision_tower": "disk"}) == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="device_map=all is not known"):
        place(model, device_map="all")
    with pytest.raises(ConfigError, match="too small for the model"):
        place(model, device_map={"": "disk"})


def test_bfloat16_and_its_own_tokenizer(speaker_folder, folder):
    chat = Chat.from_folder(
        str(speaker_folder),
        tokenizer=str(tiny.TOKENIZER),
        dtype="bfloat16",
        device="cpu",
        max_new_tokens=3,
        max_tiles=2,
    )
    assert chat.model.dtype == torch.bfloat16
    assert chat.model.config.image_token_id == image_token_id(chat.tokenizer)
    assert "".join(chat.ask("What is it?", [folder / "a.png"])) == chat.turns[-1].text


def test_what_cannot_be_loaded_is_named(tmp_path, speaker):
    with pytest.raises(ValueError, match=str(tmp_path)):
        Chat.from_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.path is missing"):
        Chat.from_config(ChatConfig())
    with pytest.raises(ConfigError, match=r"the model knows \d+ tokens and its tokenizer has \d+"):
        Chat(speaker, load("phi3_sp"))
