"""What decides responses: kept beside them, so that no command goes on with responses of another one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ivl_lightning.checkpoints.weights import memory_hash
from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.preferences import PreferencesConfig
from ivl_lightning.curation.files import write_json
from ivl_lightning.data.corpus import Corpus
from ivl_lightning.models.tokenizer import tokenizer_fingerprint

SETTINGS_NAME = "settings.json"
_BOTH = ("method", "temperature", "top_k", "top_p", "max_new_tokens", "seed", "batch_size")
_OF_METHOD = {"correctness": ("samples", "samples_per_batch"), "dropout_ntp": ("answers", "start_ratio")}


def deciding_settings(
    config: PreferencesConfig,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    device: torch.device,
) -> dict[str, Any]:
    """Everything that decides what the model answers, by key; plain JSON values.

    Random numbers are shared by a batch and differ between kinds of device, so both are part of it. How responses are
    judged and paired is not.
    """
    chosen = {name: getattr(config, name) for name in (*_BOTH, *_OF_METHOD[config.method])}
    encoding = asdict(corpus.encoders[0].settings)
    settings = {
        **chosen,
        "prompt": config.prompt_style,
        "device": device.type,
        "weights": memory_hash(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        **{f"encoding.{name}": value for name, value in encoding.items()},
        "data.exif_transpose": config.data.exif_transpose,
        "data.gray16": config.data.gray16,
        **{f"rows.{index.name}": index.fingerprint for index in corpus.indexes},
    }
    return dict(json.loads(json.dumps(settings)))


def keep_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a new folder, or compare them with those the folder was begun with.

    Raises:
        ConfigError: names the first setting that differs, with both values.
    """
    path = folder / SETTINGS_NAME
    if not path.is_file():
        write_json(path, settings)
        return
    then = json.loads(path.read_text(encoding="utf-8"))
    for key in [*settings, *(key for key in then if key not in settings)]:
        if then.get(key) != settings.get(key):
            raise ConfigError(
                f"output={folder} was begun with {key}={then.get(key)!r}, this command says {settings.get(key)!r}: "
                "the responses there are of the former. Give another output, or delete the folder to sample again"
            )
