"""Jinja chat templates that give other programs the prompts of training."""

from __future__ import annotations

import json
import logging
import string

from transformers import PreTrainedTokenizerBase

from ivl_lightning.data.conversation import tokenize_prompt
from ivl_lightning.data.templates import Template, get_template
from ivl_lightning.models.tokenizer import text_ids
from ivl_lightning.structures import Role

_log = logging.getLogger(__name__)

_STARTS = ("", "{{- bos_token }}\n", '{{- bos_token ~ " " }}\n', '{{- " " }}\n')
"""What may stand before the first turn; the blank is one that slow Llama tokenizers (Phi-3) write and fast ones not."""

_ROLES: dict[str, Role] = {"system": "system", "user": "human", "assistant": "gpt"}
_TRIAL = ("What is 3 + 4?\n你好！", " It is 7. ", "Why?")

_BEGIN = """\
{%- set headers = $headers %}
{%- set ends = $ends %}
$start{%- if messages[0]["role"] != "system" %}
{{- $system }}
{%- endif %}
{%- for message in messages %}
{%- if message["role"] not in headers %}
{{- raise_exception("A message is from " ~ message["role"] ~ ": use system, user or assistant.") }}
{%- elif message["role"] == "system" and not loop.first %}
{{- raise_exception("A system message stands in the middle: put it first.") }}
{%- endif %}
{%- set turn = namespace(text="") %}
{%- if message["content"] is string %}
{%- set turn.text = message["content"] %}
{%- elif message["content"] %}
{%- for part in message["content"] %}
{%- if part["type"] == "text" %}
{%- set turn.text = turn.text ~ part["text"] %}
{%- elif part["type"] in ["image", "image_url"] %}
{%- set turn.text = turn.text ~ $image %}
{%- elif part["type"] in ["video", "video_url"] %}
{%- set turn.text = turn.text ~ $video %}
{%- else %}
{{- raise_exception("A part of a message is of type " ~ part["type"] ~ ": use text, image or video.") }}
{%- endif %}
{%- endfor %}
{%- endif %}
"""
_STRIP = "{%- set turn.text = turn.text | trim %}\n"
_TURN = "{{- headers[message.role] ~ $lead ~ turn.text ~ ends[message.role] }}\n"
_TURN_OR_BARE_HEADER = """\
{{- headers[message.role] }}
{%- if turn.text %}
{{- $lead ~ turn.text ~ ends[message.role] }}
{%- endif %}
"""
_END = """\
{%- endfor %}
{%- if add_generation_prompt %}
{{- headers["assistant"] }}
{%- endif %}
"""


def fit_chat_template(tokenizer: PreTrainedTokenizerBase, template: str, *, image: str, video: str) -> str:
    """The chat template whose text this tokenizer turns into the ids of training.

    A message's content is a text, or a list of parts of type `text`, `image` or `video`. Roles are `system` (first or
    not at all), `user` and `assistant`; without a system message the template's own system text is used. As in
    training, an empty turn of an older template is its bare header. Where training refuses a system turn (the older
    templates), the message takes the place of the template's system text. The text holds BOS where the tokenizer
    writes one, so it must be tokenized without special tokens, as transformers and vLLM do with chat templates.

    Where no text can give the ids of training (turns that are tokenized one by one by a tokenizer that does not know
    the template's markers), a warning says so.

    Args:
        tokenizer: as `load_tokenizer` returns it.
        template: name of a chat template of `data.templates`.
        image, video: placeholders that the reading program expands; each is followed by a newline.

    Raises:
        ValueError: the template is not known, or the tokenizer has no `<IMG_CONTEXT>`.
    """
    chat = get_template(template)
    candidates = [_render(chat, start=start, image=image, video=video) for start in _STARTS]
    for candidate in candidates:
        if _gives_training_ids(tokenizer, template, candidate):
            return candidate
    _log.warning(
        "No chat template can repeat how %s prompts were tokenized in training by this tokenizer, which does not know "
        "the template's markers as tokens: other programs will prompt the model differently, ivl-chat will not",
        template,
    )
    return candidates[0 if tokenizer.bos_token is None else 1]


def _gives_training_ids(tokenizer: PreTrainedTokenizerBase, template: str, jinja: str) -> bool:
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, _TRIAL, strict=True)]
    turns = [{"from": _ROLES[message["role"]], "value": message["content"]} for message in messages]
    text = tokenizer.apply_chat_template(messages, chat_template=jinja, tokenize=False, add_generation_prompt=True)
    expected = tokenize_prompt({"conversations": turns}, tokenizer, template=template).input_ids
    return text_ids(tokenizer, text)[0] == expected


def _render(chat: Template, *, start: str, image: str, video: str) -> str:
    body = _BEGIN + (_STRIP if chat.strip else "") + (_TURN if chat.per_turn else _TURN_OR_BARE_HEADER) + _END
    values = {
        "headers": {role: chat.header(name) for role, name in _ROLES.items()},
        "ends": {role: chat.end(name) + chat.tail for role, name in _ROLES.items()},
        "system": _system_block(chat),
        "image": image + "\n",
        "video": video + "\n",
        "lead": chat.lead,
    }
    # JSON's texts and objects are Jinja's too.
    literals = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
    return string.Template(body).substitute(literals, start=start)


def _system_block(chat: Template) -> str:
    if not chat.system_text and not chat.per_turn:
        return chat.system_header
    return chat.system_header + chat.lead + chat.system_text + chat.system_end + chat.tail
