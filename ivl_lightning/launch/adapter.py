"""The folder of an adapter alone, as peft and transformers read it beside the weights it was trained on."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ivl_lightning.checkpoints.lora import adapter_tensors
from ivl_lightning.config.lora import fully_trained
from ivl_lightning.constants import WEIGHTS_FOLDER
from ivl_lightning.models.checkpoint import layout_of, read_config_values
from ivl_lightning.models.lora import adapter_config
from ivl_lightning.stages.base import Stage

ADAPTER_FOLDER = "adapter"
_TENSORS_NAME = "adapter_model.safetensors"
_NOTE_NAME = "README.md"


def save_adapter(
    stage: Stage, state_dict: Mapping[str, Tensor], base: str | None, folder: Path, *, donor: str | None = None
) -> None:
    """Write adapter_config.json and adapter_model.safetensors; written aside, then renamed.

    A note says where base and adapter are not the trained network, because other parts trained in full, and where the
    base is in the original's layout, which peft cannot read.

    Args:
        stage: that trained with adapters.
        state_dict: whole, of its network.
        base: folder of the weights the stage started from.
        folder: `RUN/NAME/adapter`.
        donor: whose vision tower took the place of the base's.
    """
    aside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    config = copy.copy(adapter_config(stage.internvl))
    config.base_model_name_or_path = None if base is None else str(Path(base).absolute())
    config.save_pretrained(str(aside))
    tensors = {name: value.contiguous() for name, value in adapter_tensors(state_dict).items()}
    save_file(tensors, aside / _TENSORS_NAME, metadata={"format": "pt"})
    others = fully_trained(stage.trainable, stage.lora)
    notes = [*_incomplete(others), *_another_tower(donor), *_unreadable(base)]
    if notes:
        (aside / _NOTE_NAME).write_text("\n".join(notes), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    aside.replace(folder)


def _incomplete(others: Sequence[str]) -> list[str]:
    if not others:
        return []
    return [
        "# Not the whole of what was trained\n\n"
        f"Beside this adapter, {', '.join(others)} trained in full. These weights are not in this folder, so base and "
        f"adapter together are not the trained network. Only `../{WEIGHTS_FOLDER}` is complete: the adapter is merged "
        "into it.\n"
    ]


def _another_tower(donor: str | None) -> list[str]:
    if donor is None:
        return []
    return [
        f"# The vision tower is not the base's\n\nIt came from {donor}, so base and adapter together are not the "
        f"trained network. Only `../{WEIGHTS_FOLDER}` is complete.\n"
    ]


def _unreadable(base: str | None) -> list[str]:
    folder = None if base is None else Path(base)
    if folder is None or layout_of(read_config_values(folder), folder) == "hf":
        return []
    return [
        "# The base is in the original's layout\n\n"
        f"The adapter was trained on {folder}, whose layout transformers and peft do not read. Write the base with "
        "`ivl-convert` in transformers' layout and give that folder to peft.\n"
    ]
