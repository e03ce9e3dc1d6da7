"""A conversation in a terminal or through a pipe: answers on standard output, all else on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ivl_lightning.inference.chat import Chat

HELP = """\
/image FILE     show a picture with the next question; again for several
/video FILE     show a video, or a folder of frames, with the next question
/system TEXT    put a system turn before the conversation; without a text the model's own
/clear          begin another conversation
/help           this list
/quit           end; so does the end of the input (Ctrl-D)
A line that begins with anything else is a question; Ctrl-C breaks an answer off."""

_PROMPT = "> "
_CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


class Console:
    """Carries out lines of the user's.

    Args:
        chat: answers.
        stream: write an answer as it is made.
        go_on: after a mistake say so and go on, for a person; otherwise raise it, for a script.
    """

    def __init__(self, chat: Chat, *, stream: bool, go_on: bool) -> None:
        self.chat = chat
        self.stream = stream
        self.go_on = go_on
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/video": self._video,
            "/system": self._system,
            "/clear": self._clear,
            "/help": self._help,
        }

    def greet(self) -> None:
        """Say who answers, to a person."""
        if self.go_on:
            chat, dtype = self.chat, str(self.chat.model.dtype).removeprefix("torch.")
            _note(f"{chat.config.model.path}: {chat.template}, {dtype}, {chat.device}; /help lists commands")

    def talk(self, lines: Iterable[str]) -> None:
        """Carry out lines until they end or one of them is /quit.

        Raises:
            ValueError: a line that cannot be carried out, where a script is read.
        """
        for line in lines:
            if line.strip() in ("/quit", "/exit"):
                return
            try:
                self.line(line)
            except (ValueError, RuntimeError) as error:
                if not self.go_on:
                    raise
                _note(f"error: {error}")
            except KeyboardInterrupt:
                if not self.go_on:
                    raise
                print(flush=True)
                _note("broken off")

    def line(self, line: str) -> None:
        """Carry out one line; an empty one is nothing.

        Raises:
            ValueError: an unknown command, a file that cannot be read, a question that cannot be asked.
        """
        if not line.strip():
            return
        if not line.startswith("/"):
            self.answer(line)
            return
        command, _, argument = line.partition(" ")
        if command not in self._commands:
            known = ", ".join([*self._commands, "/quit"])
            raise ValueError(f"{command} is no command: use {known}; put a blank before a question that begins with /")
        self._commands[command](argument.strip())

    def answer(self, question: str) -> None:
        """Write the answer to a question.

        Raises:
            ValueError: the question cannot be asked.
        """
        with closing(self.chat.ask(question)) as pieces:
            if self.stream:
                for piece in pieces:
                    print(_shown(piece), end="", flush=True)
                print(flush=True)
            else:
                print(_shown("".join(pieces)), flush=True)
        if not self.chat.finished:
            _note(f"the answer is cut off at max_new_tokens={self.chat.config.max_new_tokens}")

    def _image(self, path: str) -> None:
        self.chat.attach(images=[_path("/image", path)])

    def _video(self, path: str) -> None:
        self.chat.attach(video=_path("/video", path))

    def _system(self, text: str) -> None:
        self.chat.system = text or None

    def _clear(self, _: str) -> None:
        self.chat.clear()

    def _help(self, _: str) -> None:
        _note(HELP)


def read_lines() -> Iterator[str]:
    """Lines of standard input; a person is asked for each."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    if sys.stdout.isatty():
        # Imported for what it does to `input`: arrows move in the line and through earlier ones.
        import readline  # noqa: F401
    while (line := _asked_for()) is not None:
        yield line


def _asked_for() -> str | None:
    while True:
        try:
            if sys.stdout.isatty():
                return input(_PROMPT)
            print(_PROMPT, end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            return line.rstrip("\n") if line else None
        except EOFError:
            _note("")
            return None
        except KeyboardInterrupt:
            _note("\n/quit or Ctrl-D ends the conversation")


def _path(command: str, text: str) -> str:
    if not text:
        raise ValueError(f"{command} needs a file: {command} FILE")
    # Terminals put names in quotes that are dragged into them.
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _shown(text: str) -> str:
    # A picture may talk a model into writing what a terminal takes for orders.
    return text.translate(_CONTROL) if sys.stdout.isatty() else text


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
