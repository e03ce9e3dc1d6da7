"""`ivl-chat`: one answer, a piped conversation, a conversation with a person, and what each mistake says."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from PIL import Image

from ivl_lightning.cli.chat import as_text, check_media, main, read_config
from ivl_lightning.cli.console import HELP, Console, read_lines
from ivl_lightning.config.chat import ChatConfig, ChatModel
from ivl_lightning.inference.chat import Chat
from ivl_lightning.launch.overrides import forced
from tests import tiny
from tests.commands import ROOT, environment


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> Path:
    """A model and two pictures."""
    path = tmp_path_factory.mktemp("chat")
    tiny.build_tiny_model(tokenizer).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    Image.new("RGB", (64, 32), "red").save(path / "a.png")
    Image.linear_gradient("L").save(path / "my picture (1).png")
    return path


def as_read(text: str) -> str:
    """What a pipe in text mode makes of a text: an untrained model also writes carriage returns."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ivl_lightning.cli.chat", *arguments],
        cwd=folder,
        env={**environment(), "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def reference(folder: Path, **settings: object) -> Chat:
    return Chat.from_folder(folder / "model", device="cpu", max_tiles=4, max_new_tokens=6, **settings)


SETTINGS = ("model.path=model", "max_tiles=4", "max_new_tokens=6", "device=cpu")


def test_a_question_and_a_piped_conversation_in_processes_of_their_own(folder):
    """Standard output has the answers and nothing else, no warning either; the text arrives as it was written."""
    question = "What, (is) it? ${x} a=b: {c} [d] 'q' \"d\" \\frac é" + " long" * 200
    one = start(folder, *SETTINGS, "image=[a.png,my picture (1).png]", f"prompt={question}")
    lines = ["Hello", "", "/image my picture (1).png", "/image 'a.png'", "Compare.", "And now?", "/clear", "Hello"]
    many = start(folder, *SETTINGS, "stream=false")
    one_output, one_errors = one.communicate(timeout=120)
    many_output, many_errors = many.communicate("\n".join(lines), timeout=120)
    assert (one.returncode, many.returncode) == (0, 0), one_errors + many_errors
    chat = reference(folder)
    pictures = [folder / "a.png", folder / "my picture (1).png"]
    assert one_output == as_read("".join(chat.ask(question, pictures)) + "\n")
    chat.clear()
    hello = "".join(chat.ask("Hello"))
    compared = "".join(chat.ask("Compare.", pictures[::-1]))
    assert many_output == as_read("\n".join([hello, compared, "".join(chat.ask("And now?")), hello, ""]))
    warning, cut = one_errors.splitlines()
    assert re.match(r"the conversation has \d+ tokens, and the model was made for 512", warning)
    assert cut == "the answer is cut off at max_new_tokens=6"
    assert set(many_errors.splitlines()) == {"the answer is cut off at max_new_tokens=6"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["model.path=model", "image=none.png", "prompt=x"],
            "error: 'none.png': there is no such file; relative paths",
        ),
        (["model.path=model", "max_tiles=41"], "error: min_tiles=1, max_tiles=41: at least 1, at most 40"),
        (
            ["model.path=none", "prompt=x"],
            "error: model.path=none: neither a folder of weights (with a config.json) nor",
        ),
        (["prompt=x"], "error: model.path is missing: give the folder"),
        (["model.path=model", "prompts=x"], "error: prompts is not a setting. Did you mean prompt?"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(folder, arguments, message):
    process = start(folder, *arguments)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output == ""
    assert errors.startswith(message)


def test_a_wrong_template_and_a_system_turn_without_a_place_are_named(folder, monkeypatch, capsys):
    for arguments, message in (
        (
            ["model.template=zh"],
            "error: model.template names the chat template 'zh', which is not known: use one of internvl2_5",
        ),
        (["model.template=Hermes-2", "system=Be brief."], "error: system='Be brief.': the model's chat template"),
    ):
        with pytest.raises(SystemExit) as caught:
            in_this_process(monkeypatch, folder, *SETTINGS, "prompt=x", *arguments)
        assert caught.value.code == 2
        output, errors = capsys.readouterr()
        assert output == ""
        assert message in errors


def in_this_process(monkeypatch, folder: Path, *arguments: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["ivl-chat", *arguments])
    main()


def test_a_run_folder_is_a_model(folder, tmp_path, monkeypatch, capsys):
    """Of a run the weights of the stage that finished last."""
    stage = tmp_path / "run/instruction_tuning"
    stage.mkdir(parents=True)
    (stage / "weights").symlink_to(folder / "model")
    (stage / "done.json").write_text("{}")
    in_this_process(monkeypatch, folder, *SETTINGS, f"model.path={tmp_path}/run", "prompt=Hello")
    assert capsys.readouterr().out == "".join(reference(folder).ask("Hello")) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        "What, (is) it?",
        "a=b: {c} [d]",
        "${x} and ${oc.env:HOME}",
        "\\${x} \\\\${y}",
        '"Hi" and "ho"',
        " blanks ",
        'it\'s "q"',
        "\\frac{1}{2}\\",
        "two\nlines",
        "5",
        "[a]",
        "x]",
    ],
)
def test_questions_reach_the_settings_as_they_stand(text):
    with initialize_config_module("ivl_lightning.conf", version_base="1.3"):
        overrides = forced([as_text(f"prompt={text}"), "model.path=conf", as_text(f"video={text}.mp4")])
        composed = compose("chat", overrides=overrides)
    assert composed.prompt == text
    assert composed.video == f"{text}.mp4"


def test_names_in_a_list_need_no_quotes():
    assert as_text("image=[a.png, my picture (1).png]") == "image=['a.png','my picture (1).png']"
    assert as_text("image=") == "image=''"


def test_what_is_written_in_hydras_grammar_is_read_by_it():
    for argument in (
        "image=[a.png, 'b, c.png']",
        "prompt=null",
        "image='a.png'",
        "image=['it\\'s.png']",
        "prompt='a, b'",
        "max_tiles=6",
        "image=null",
    ):
        assert as_text(argument) == argument


def test_the_defaults_are_those_of_the_dataclass(folder):
    with initialize_config_module("ivl_lightning.conf", version_base="1.3"):
        composed = compose("chat", overrides=[f"model.path={folder}/model"])
    assert read_config(composed) == ChatConfig(model=ChatModel(path=f"{folder}/model"))


def test_media_are_read_before_the_model_is(folder):
    (folder / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png': not an image"):
        check_media(ChatConfig(image=[f"{folder}/a.png", f"{folder}/text.png"]))
    with pytest.raises(ValueError, match=r"a\.png' is none of the videos"):
        check_media(ChatConfig(video=f"{folder}/a.png"))


class Person:
    """A chat that repeats what it is asked, and how it was shown what."""

    def __init__(self) -> None:
        self.finished = True
        self.system = None
        self.log: list[object] = []

    def ask(self, question):
        if question == "fail":
            raise ValueError("cannot be asked")
        if question == "long":
            yield "begun"
            raise KeyboardInterrupt
        yield from question.split(" ")

    def attach(self, images=(), video=None):
        self.log.append((list(images), video))

    def clear(self):
        self.log.append("clear")


def test_a_person_goes_on_after_a_mistake_and_after_breaking_off(capsys):
    chat = Person()
    lines = ["/image", "/image a b.png", "/video 'c.gif'", "fail", "long", "/nothing", " /etc is what?", "/help"]
    Console(chat, stream=True, go_on=True).talk([*lines, "/system Be brief.", "/clear", "/quit", "never read"])
    output, errors = capsys.readouterr()
    assert output == "begun\n/etciswhat?\n"
    assert errors.splitlines()[:4] == [
        "error: /image needs a file: /image FILE",
        "error: cannot be asked",
        "broken off",
        "error: /nothing is no command: use /image, /video, /system, /clear, /help, /quit; put a blank before a "
        "question that begins with /",
    ]
    assert errors.endswith(HELP + "\n")
    assert chat.log == [(["a b.png"], None), ([], "c.gif"), "clear"]
    assert chat.system == "Be brief."


def test_a_script_ends_at_its_first_mistake(capsys):
    """What follows would be about something else."""
    with pytest.raises(ValueError, match="cannot be asked"):
        Console(Person(), stream=True, go_on=False).talk(["one", "fail", "two"])
    assert capsys.readouterr().out == "one\n"


def test_lines_of_a_pipe(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\r\n\ntwo \nthree"))
    assert list(read_lines()) == ["one", "", "two ", "three"]


def test_a_terminal_gets_no_orders_from_the_model(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    Console(Person(), stream=True, go_on=True).answer("\x1b[2Jred")
    assert capsys.readouterr().out == "\ufffd[2Jred\n"


def test_help_needs_no_torch():
    code = "import sys; sys.argv[1:] = ['--help']; from ivl_lightning.cli.chat import main\n"
    code += "try:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert "ivl-chat model.path=FOLDER" in result.stdout
    assert result.stdout.strip().endswith("False")
