"""Chat templates: the fixed text around each turn.

Source: InternVL `conversation.py`; the texts are part of what the released models were trained on, character by
character. InternVL 2.5 ends a turn with a newline after the end marker, the older ChatML templates do not.
"""

import pkgutil
import sys
from dataclasses import dataclass

from transformers import InternVLConfig, PreTrainedTokenizerBase

from ivl_lightning.models.original_config import DEFAULT_TEMPLATE, record
from ivl_lightning.structures import Role

_IDENTITY_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
_IDENTITY_2_0 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)


@dataclass(frozen=True, slots=True)
class Template:
    """The text that turns a conversation into one prompt: header + lead + text + end + tail for each turn.

    Attributes:
        name: the name in configs and checkpoints.
        system_header, user_header, answer_header: what announces a turn; never trained.
        system_text: the system turn of a row that brings none; with an empty header there is no system block.
        lead: blank between header and text. A tokenizer may melt it with the first word, so the answer's is trained.
        system_end, user_end, answer_end: end markers; the answer's is trained.
        tail: what follows an end marker; never trained.
        per_turn: the InternVL 2.5 way: each turn is tokenized by itself, an empty turn is closed by its end marker,
            and a row may bring its own system turn. Otherwise the prompt is tokenized as a whole, an empty turn is
            its bare header, and a system turn is refused.
        strip: blanks at both ends of each turn are removed.
    """

    name: str
    system_header: str
    user_header: str
    answer_header: str
    system_text: str
    system_end: str
    user_end: str
    answer_end: str
    lead: str = ""
    tail: str = ""
    per_turn: bool = False
    strip: bool = False

    def header(self, role: Role) -> str:
        """The header of a turn of this role."""
        return {"system": self.system_header, "human": self.user_header, "gpt": self.answer_header}[role]

    def end(self, role: Role) -> str:
        """The end marker of a turn of this role."""
        return {"system": self.system_end, "human": self.user_end, "gpt": self.answer_end}[role]


def _chat_ml(name: str, system_text: str, *, tail: str = "", per_turn: bool = False, strip: bool = False) -> Template:
    return Template(
        name=name,
        system_header="<|im_start|>system\n",
        user_header="<|im_start|>user\n",
        answer_header="<|im_start|>assistant\n",
        system_text=system_text,
        system_end="<|im_end|>",
        user_end="<|im_end|>",
        answer_end="<|im_end|>",
        tail=tail,
        per_turn=per_turn,
        strip=strip,
    )


_PHI3 = Template(
    name="phi3-chat",
    system_header="<|system|>\n",
    user_header="<|user|>\n",
    answer_header="<|assistant|>\n",
    system_text=_IDENTITY_2_0,
    system_end="<|end|>",
    user_end="<|end|>",
    answer_end="<|end|>",
)

_INTERNVL_ZH = Template(
    name="internvl_zh",
    system_header="",
    user_header="<human>:",
    answer_header="<bot>:",
    system_text="",
    system_end="",
    user_end=" ",
    answer_end="</s>",
    lead=" ",
)

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        _chat_ml("internvl2_5", _IDENTITY_2_5, tail="\n", per_turn=True),
        _chat_ml("internlm2-chat", _IDENTITY_2_0, strip=True),
        _chat_ml("Hermes-2", _IDENTITY_2_0),
        _PHI3,
        _INTERNVL_ZH,
    )
}


def stop_ids(tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """Tokens that end a generated answer: the template's end marker and the tokenizer's end of text.

    Raises:
        ValueError: the template is not known.
    """
    marker = tokenizer.convert_tokens_to_ids(get_template(template).answer_end)
    return sorted({token for token in (marker, tokenizer.eos_token_id) if token is not None})


def template_of(given: str | None, config: InternVLConfig | None) -> str:
    """Name of the chat template to use: the one that is asked for, else the checkpoint's own, else `internvl2_5`.

    Args:
        given: `model.template`.
        config: of the checkpoint, which knows what the original's config.json says; None where there is none.

    Raises:
        ValueError: the template is not known; says who names it. Nothing is imported on a checkpoint's word.
    """
    if given is not None:
        _template(given, "model.template")
        return given
    own = None if config is None else record(config).get("template")
    if own is None:
        return DEFAULT_TEMPLATE
    where = "the checkpoint's config.json"
    if not isinstance(own, str) or not (own in TEMPLATES or _is_path(own)):
        raise ValueError(_unknown(where, own))
    if _is_path(own) and own.partition(":")[0] not in sys.modules:
        raise ValueError(
            f"{where} names the chat template {own!r}, which is code of somebody's own and was not imported: give "
            f"template={own} (of train.py and ivl-chat: model.template={own}) if you trust it"
        )
    return own


def get_template(name: str) -> Template:
    """The template of this name; `MODULE:NAME` is one of the user's own, whose module is imported.

    Raises:
        ValueError: the name is not known, or the module has no such template.
    """
    return _template(name, None)


def _template(name: str, where: str | None) -> Template:
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not _is_path(name):
        raise ValueError(_unknown(where, name))
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"the chat template {name} cannot be imported: {error}") from error
    if not isinstance(found, Template):
        kind = type(found).__name__
        raise ValueError(f"the chat template {name} is of type {kind}: it must be a Template (docs/extending.md)")
    return found


def _is_path(name: str) -> bool:
    """Whether a name says where a template of the user's own lies, as entry points do: `package.module:NAME`."""
    return ":" in name


def _unknown(where: str | None, name: object) -> str:
    who = f"chat template {name!r}" if where is None else f"{where} names the chat template {name!r}, which"
    return f"{who} is not known: use one of {', '.join(TEMPLATES)}, or MODULE:NAME of a template of your own"
