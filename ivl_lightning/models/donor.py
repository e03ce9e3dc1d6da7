"""The donor of progressive scaling: a vision tower that was trained beside another language model, and what it fits."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import nn
from transformers import InternVLConfig, InternVLVisionConfig, PreTrainedTokenizerBase
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector, InternVLVisionModel

from ivl_lightning.checkpoints.lineage import has_trained_tower, read_lineage
from ivl_lightning.checkpoints.run_folders import tower_folder
from ivl_lightning.checkpoints.source import CheckpointError, Combined, MemorySource, TensorSource
from ivl_lightning.checkpoints.views import check_complete
from ivl_lightning.config.schema import CarriedProjector, Part
from ivl_lightning.constants import SPECIAL_TOKENS
from ivl_lightning.models.assembly import JOINT, TOWER, Tower, open_projector, open_tower
from ivl_lightning.models.checkpoint import CONFIG_NAME, tokenizer_folder, tokenizer_in
from ivl_lightning.models.original_config import is_transposed
from ivl_lightning.models.parts import vision_config

_SHAPES: Final = {
    "image_size": "tile size in pixels",
    "patch_size": "patch size in pixels",
    "num_channels": "number of color channels",
    "hidden_size": "width",
    "num_hidden_layers": "number of layers",
    "num_attention_heads": "number of heads",
    "intermediate_size": "width of the MLP",
    "norm_type": "kind of norm",
    "layer_norm_eps": "epsilon of norms",
    "use_qk_norm": "norm of queries and keys",
    "attention_bias": "bias of queries, keys and values",
    "hidden_act": "activation",
    "use_absolute_position_embeddings": "position embeddings",
    "use_mask_token": "mask token",
    "use_mean_pooling": "mean pooling",
}
"""Fields in which two towers must be alike for one to take the other's place."""


class DonorError(CheckpointError):
    """A donor that does not fit the network; names both values."""


@dataclass(frozen=True, slots=True)
class Donor:
    """A donor that was opened; no weights have been read yet.

    Attributes:
        path: as it was given.
        folder: of the weights it stands for.
        tower: its vision tower.
        projector: its projector; empty for a bare tower.
    """

    path: str
    folder: Path
    tower: Tower
    projector: TensorSource

    def brought_to(self, config: InternVLConfig, projector: CarriedProjector) -> TensorSource:
        """The tensors that it gives a network: its tower, and its projector where that fits and is wanted.

        Args:
            config: of the network.
            projector: `match` or `new`.

        Raises:
            DonorError: the tower cannot take the place of the network's (names each difference with both values), or
                the donor lacks tensors.
        """
        self._check(config)
        parts = {TOWER: (self.tower.tensors, _tower_shapes(config))}
        if projector == "match" and self._projector_fits(config):
            parts[JOINT] = (self.projector, _projector_shapes(config))
        for tensors, shapes in parts.values():
            # What a donor lacks would stay the network's own: a mixture of two towers.
            try:
                check_complete(tensors, shapes, str(self.folder / CONFIG_NAME))
            except CheckpointError as error:
                raise DonorError(f"scaling.donor={self.path}: {error}") from error
        return Combined(tensors for tensors, _ in parts.values())

    def _check(self, config: InternVLConfig) -> None:
        faults = _differences(self.tower.config, vision_config(config))
        whole = self.tower.whole
        if whole is not None and _feature_layer(whole) != _feature_layer(config):
            faults.append(
                f"the layer whose features are used is {whole.vision_feature_layer} there and "
                f"{config.vision_feature_layer} here"
            )
        if faults:
            raise DonorError(
                f"scaling.donor={self.path}: its vision tower does not fit this network: {'; '.join(faults)}. Give a "
                "donor of this kind of tower, or choose the model and data.tile_size that belong to it"
            )

    def _projector_fits(self, config: InternVLConfig) -> bool:
        """Whether its projector reads and writes the same widths, in the same order of a tile's tokens."""
        whole = self.tower.whole
        return (
            whole is not None
            and _projector_shapes(whole) == _projector_shapes(config)
            and whole.projector_hidden_act == config.projector_hidden_act
            and is_transposed(whole) == is_transposed(config)
        )


def _tower_shapes(config: InternVLConfig) -> dict[str, tuple[int, ...]]:
    # A model writes into the configuration it is made from.
    own = copy.deepcopy(vision_config(config))
    with torch.device("meta"):
        return _shapes(InternVLVisionModel(own), TOWER)


def _projector_shapes(config: InternVLConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return _shapes(InternVLMultiModalProjector(config), JOINT)


def _shapes(module: nn.Module, prefix: str) -> dict[str, tuple[int, ...]]:
    return {prefix + name: tuple(value.shape) for name, value in module.named_parameters()}


def open_donor(path: str) -> Donor:
    """Open a run folder, an exported folder, a checkpoint of either layout, or a bare vision tower.

    Raises:
        ConfigError: there is no such folder, or it holds none of these.
        DonorError: its files are damaged, or its tower was never trained.
    """
    folder = tower_folder(path)
    try:
        tower = open_tower(folder)
        projector = MemorySource({}) if tower.whole is None else open_projector(folder)
        load = tokenizer_in(tokenizer_folder(folder))
        tokenizer = None if load is None else load()
        lineage = read_lineage(folder)
    except ValueError as error:
        raise DonorError(f"scaling.donor={path}: {error}") from error
    if lineage is not None and not has_trained_tower(lineage):
        raise DonorError(
            f"scaling.donor={path}: no stage of its lineage has trained its vision tower, whose numbers are random: "
            "give a run with a finished stage 1.5 or 2"
        )
    if tokenizer is not None:
        check_special_tokens(tokenizer, f"scaling.donor={path}: the tokenizer beside its weights")
    return Donor(path, folder, tower, projector)


def brought_parts(tensors: TensorSource) -> list[Part]:
    """Which parts of a network some tensors belong to."""
    parts: list[Part] = ["vision"]
    return [*parts, "projector"] if any(name.startswith(JOINT) for name in tensors.names()) else parts


def check_special_tokens(tokenizer: PreTrainedTokenizerBase, whose: str) -> None:
    """A tokenizer must have each of the nine special tokens as one token.

    Raises:
        DonorError: lists those it lacks.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing:
        raise DonorError(
            f"{whose} lacks the special tokens {', '.join(missing)} of InternVL, which mark pictures and boxes: take "
            "the tokenizer files that belong to the weights"
        )


def _differences(there: InternVLVisionConfig, here: InternVLVisionConfig) -> list[str]:
    faults = []
    for field, meaning in _SHAPES.items():
        donor, own = (_plain(getattr(config, field, None)) for config in (there, here))
        if donor != own:
            faults.append(f"its {meaning} is {donor}, here it is {own} ({field})")
    return faults


def _feature_layer(config: InternVLConfig) -> object:
    """Counted from the first: -1 is the last one."""
    layer, layers = config.vision_feature_layer, vision_config(config).num_hidden_layers
    return layer % (layers + 1) if isinstance(layer, int) else layer


def _plain(value: object) -> object:
    """Sizes are numbers, or pairs of two equal ones."""
    if isinstance(value, (list, tuple)):
        return value[0] if len(set(value)) == 1 else list(value)
    return value
