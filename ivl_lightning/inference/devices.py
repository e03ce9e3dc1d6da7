"""Where a network computes: on one device, or spread over several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from transformers import InternVLForConditionalGeneration

from ivl_lightning.config.check import ConfigError
from ivl_lightning.inference.generate import GENERATION_ATTENTION
from ivl_lightning.models.build import VISION_ATTENTION, load_model
from ivl_lightning.models.checkpoint import read_config
from ivl_lightning.models.parts import language_layers, vision_layers, vision_tower
from ivl_lightning.models.streaming import empty_model
from ivl_lightning.structures import PromptBatch

DeviceMap = Mapping[str, str | int]
"""Name of a part -> its device: a GPU's number, `cpu`, or `disk`."""

_ATTENTION = {"text_config": GENERATION_ATTENTION, "vision_config": VISION_ATTENTION}


def load_placed(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "auto",
    device_map: str | DeviceMap | None = None,
    offload_folder: str | None = None,
) -> InternVLForConditionalGeneration:
    """A model for generation, each weight read to where it will be used: main memory need not hold the model.

    Args:
        path: folder of a checkpoint of either layout.
        dtype: of the weights.
        device: as `place`.
        device_map: as `place`.
        offload_folder: as `place`.

    Raises:
        CheckpointError: as `load_model`.
        ConfigError: as `place`.
    """
    if device_map is None:
        target = torch.device(device_name(device))
        return load_model(path, dtype=dtype, attention=GENERATION_ATTENTION, device_of=lambda _: target)
    empty = empty_model(read_config(path), dtype=dtype, attention=_ATTENTION)
    plan = _plan(empty, device_map, offload_folder, held=0)
    internvl = load_model(
        path, dtype=dtype, attention=GENERATION_ATTENTION, device_of=lambda name: _device_of(name, plan)
    )
    return _spread(internvl, plan, offload_folder)


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
    plan = _plan(internvl, device_map, offload_folder, held=internvl.get_memory_footprint())
    return _spread(internvl, plan, offload_folder)


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


def _plan(
    internvl: InternVLForConditionalGeneration, device_map: str | DeviceMap, offload_folder: str | None, *, held: int
) -> DeviceMap:
    if isinstance(device_map, str) and device_map != "auto":
        raise ConfigError(f"device_map={device_map} is not known: use auto, or null for one device")
    plan = _even_plan(internvl, held) if isinstance(device_map, str) else device_map
    if "disk" in plan.values() and offload_folder is None:
        raise ConfigError(
            f"device_map={device_map}: GPUs and main memory are too small for the model: use model.dtype=bfloat16, "
            "a smaller model, or a larger machine"
        )
    return plan


def _even_plan(internvl: InternVLForConditionalGeneration, held: int) -> DeviceMap:
    if not torch.cuda.is_available():
        return {"": "cpu"}
    tower = vision_tower(internvl)
    # Parts that add up what comes in and what they make of it: both must be on one device.
    parts = (
        tower.embeddings,
        *vision_layers(tower),
        internvl.model.multi_modal_projector,
        *language_layers(internvl),
    )
    whole = sorted({type(part).__name__ for part in parts})
    memory = get_balanced_memory(internvl, no_split_module_classes=whole)
    # What is free now is less by the network itself where it lies there already.
    memory["cpu"] += held
    plan: dict[str, str | int] = infer_auto_device_map(internvl, max_memory=memory, no_split_module_classes=whole)
    return plan


def _device_of(name: str, plan: DeviceMap) -> torch.device:
    parts = [part for part in plan if not part or name == part or name.startswith(f"{part}.")]
    place = plan[max(parts, key=len)]
    if isinstance(place, int):
        return torch.device("cuda", place)
    return torch.device("cpu" if place == "disk" else place)


def _spread(
    internvl: InternVLForConditionalGeneration, plan: DeviceMap, offload_folder: str | None
) -> InternVLForConditionalGeneration:
    keys = sorted(internvl._skip_keys_device_placement or ())
    spread: InternVLForConditionalGeneration = dispatch_model(
        internvl, dict(plan), offload_dir=offload_folder, skip_keys=keys
    )
    return spread
