"""`ivl-chat model.path=FOLDER image=a.jpg prompt="..."`: one answer of a model, or a conversation with it."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import hydra
from omegaconf import DictConfig

from ivl_lightning.config.chat import ChatConfig, check_chat
from ivl_lightning.config.check import ConfigError, load
from ivl_lightning.launch.compose import plain_values
from ivl_lightning.launch.overrides import forced, literal

MISTAKE, INTERRUPTED = 2, 130
_TEXTS = ("prompt", "system", "image", "video", "model.path", "model.tokenizer")
"""Settings whose values are taken as they stand: a question is full of what Hydra's grammar has other uses for."""


def main() -> None:
    """The command: exit code 0, 2 with a message for a mistake of the user's, 130 where it was interrupted."""
    try:
        sys.argv[1:] = forced([as_text(argument) for argument in sys.argv[1:]])
        _main()
    except ConfigError as error:
        _stop(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


@hydra.main(version_base="1.3", config_path="pkg://ivl_lightning.conf", config_name="chat")
def _main(composed: DictConfig) -> None:
    # Imported late: --help needs neither of them, and what is wrong with settings and files no torch.
    from ivl_lightning.data.storage import MachineError

    try:
        config = read_config(composed)
        check_media(config)
    except (ValueError, MachineError) as error:
        _stop(error)

    from torch import OutOfMemoryError

    try:
        run(config)
    except (ValueError, MachineError) as error:
        _stop(error)
    except BrokenPipeError:
        # Whoever read the answer has seen enough; Python would complain once more when it closes the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OutOfMemoryError as error:
        hint = "lower max_tiles or frames, or use model.dtype=bfloat16 or device_map=auto"
        _stop(RuntimeError(f"{hint}: {error}"))


def as_text(argument: str) -> str:
    """An argument `setting=value` with its value in quotes for Hydra, where it is a text; also each of a list.

    What has quotes of its own is left to Hydra.
    """
    key, given, value = argument.partition("=")
    if key.lstrip("+") not in _TEXTS or not given or value == "null" or _is_quoted(value):
        return argument
    if key.endswith("image") and value[:1] + value[-1:] == "[]":
        names = [name.strip() for name in value[1:-1].split(",")]
        hydras = any(name[:1] in ("'", '"') for name in names)
        return argument if hydras else f"{key}=[{','.join(map(_quoted, names))}]"
    return f"{key}={_quoted(value)}"


def _quoted(text: str) -> str:
    # In quotes Hydra leaves all as it is, but references are looked for later on, behind an even number of backslashes.
    return literal(re.sub(r"(\\*)\$\{", r"\1\1\\${", text))


def _is_quoted(value: str) -> bool:
    inside = value[1:-1].replace(f"\\{value[:1]}", "")
    return len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" and value[0] not in inside


def read_config(composed: DictConfig) -> ChatConfig:
    """Check the composed settings, and find the weights.

    Raises:
        ConfigError: names every missing, misspelt or wrong one.
    """
    config = load(ChatConfig, plain_values(composed))
    check_chat(config)
    if config.model.path is None:
        raise ConfigError("model.path is missing: give the folder of the model that answers, or a run")
    return replace(config, model=replace(config.model, path=_weights(config.model.path)))


def run(config: ChatConfig) -> None:
    """Load the model, then answer the one question or talk.

    Raises:
        ValueError: no such model, or what cannot be asked.
    """
    from transformers.utils import logging

    from ivl_lightning.cli.console import Console, read_lines
    from ivl_lightning.inference.chat import Chat

    # Of settings for sampling that the checkpoint brings and greedy answers do not use.
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    chat = Chat.from_config(config)
    chat.attach(config.images, config.video)
    console = Console(chat, stream=config.stream, go_on=sys.stdin.isatty())
    if config.prompt is not None:
        console.answer(config.prompt)
        return
    console.greet()
    console.talk(read_lines())


def check_media(config: ChatConfig) -> None:
    """Read what will be shown, before minutes of loading.

    Raises:
        ValueError: a picture or video that cannot be read; names it.
    """
    from ivl_lightning.inference.shown import ShownMedia

    media = ShownMedia(exif_transpose=config.exif_transpose)
    for picture in config.images:
        media.show_picture(picture)
    if config.video is not None:
        media.show_video(config.video)


def _weights(path: str) -> str:
    from ivl_lightning.checkpoints.run_folders import weights_folder

    folder = Path(path).expanduser()
    # An adapter names the model that it belongs to.
    if (folder / "adapter_config.json").is_file():
        return str(folder)
    try:
        return str(weights_folder(str(folder)))
    except ConfigError:
        raise ConfigError(
            f"model.path={path}: neither a folder of weights (with a config.json) nor a run with a finished stage"
        ) from None


def _stop(error: Exception) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(MISTAKE)


if __name__ == "__main__":
    main()
