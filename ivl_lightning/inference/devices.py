"""Where a network computes: on one device, or spread over several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from transformers import InternVLForConditionalGeneration

from ivl_lightning.config.check import ConfigError
from ivl_lightning.models.parts import language_layers, vision_layers, vision_tower
from ivl_lightning.structures import PromptBatch

DeviceMap = Mapping[str, str | int]
"""Name of a part -> its device: a GPU's number, `cpu`, or `disk`."""


def place(
    internvl: InternVLForConditionalGeneration,
    device: str = "auto",
    device_map: str | DeviceMap | None = None,
    *,
    offload_folder: str | None = None,
) -> InternVLForConditionalGeneration:
    """Move a network to where it will answer; it must not be moved again if it was spread.

    Args:
        internvl: the network, on the CPU.
        device: of the whole network; `auto` takes CUDA where there is one.
        device_map: `auto` spreads it over all GPUs evenly, and over main memory where they are too small; or the parts
            by name, as accelerate takes them. None leaves it whole.
        offload_folder: where parts on `disk` are written.

    Returns:
        The same network.

    Raises:
        ConfigError: no such device, or no room for the network.
    """
    if device_map is None:
        return internvl.to(device_name(device))
    plan = _even_plan(internvl) if device_map == "auto" else dict(_as_mapping(device_map))
    if "disk" in plan.values() and offload_folder is None:
        raise ConfigError(
            f"device_map={device_map}: GPUs and main memory are too small for the model: use model.dtype=bfloat16, "
            "a smaller model, or a larger machine"
        )
    keys = sorted(internvl._skip_keys_device_placement or ())
    spread: InternVLForConditionalGeneration = dispatch_model(
        internvl, plan, offload_dir=offload_folder, skip_keys=keys
    )
    return spread


def device_name(device: str) -> str:
    """`cpu` or `cuda` for `auto`; another name as it is.

    Raises:
        ConfigError: CUDA is asked for and torch finds none.
    """
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise ConfigError("device=cuda, but torch finds no CUDA device: use device=cpu, or install a CUDA build")
    return device if device != "auto" else "cuda" if found else "cpu"


def input_device(internvl: InternVLForConditionalGeneration) -> torch.device:
    """Where the ids and tiles of a prompt must lie: with the word embeddings, the first that is computed."""
    embeddings = internvl.get_input_embeddings()
    here: torch.device = next(embeddings.parameters()).device
    # Weights that are fetched for each use have no place of their own.
    return torch.device(embeddings._hf_hook.execution_device) if here.type == "meta" else here


def moved(prompts: PromptBatch, device: torch.device) -> PromptBatch:
    """The same prompts on a device."""
    return replace(
        prompts,
        input_ids=prompts.input_ids.to(device),
        attention_mask=prompts.attention_mask.to(device),
        pixel_values=prompts.pixel_values.to(device),
    )


def _as_mapping(device_map: str | DeviceMap) -> DeviceMap:
    if isinstance(device_map, str):
        raise ConfigError(f"device_map={device_map} is not known: use auto, or null for one device")
    return device_map


def _even_plan(internvl: InternVLForConditionalGeneration) -> dict[str, str | int]:
    if not torch.cuda.is_available():
        return {"": "cpu"}
    tower = vision_tower(internvl)
    # Parts that add up what comes in and what they make of it: both must be on one device.
    whole = sorted(
        {
            type(part).__name__
            for part in (
                tower.embeddings,
                *vision_layers(tower),
                internvl.model.multi_modal_projector,
                *language_layers(internvl),
            )
        }
    )
    memory = get_balanced_memory(internvl, no_split_module_classes=whole)
    # What is free now is less by the network itself, which lies there already.
    memory["cpu"] += internvl.get_memory_footprint()
    plan: dict[str, str | int] = infer_auto_device_map(internvl, max_memory=memory, no_split_module_classes=whole)
    return plan
