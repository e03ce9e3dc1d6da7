"""The donor of progressive scaling: a vision tower that was trained beside another language model, and what it fits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import InternVLConfig, InternVLVisionConfig, PreTrainedTokenizerBase
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

from ivl_lightning.checkpoints.run_folders import tower_folder
from ivl_lightning.checkpoints.source import CheckpointError, Combined, MemorySource, TensorSource
from ivl_lightning.config.schema import CarriedProjector, Part
from ivl_lightning.constants import SPECIAL_TOKENS
from ivl_lightning.models.assembly import JOINT, Tower, open_projector, open_tower
from ivl_lightning.models.checkpoint import tokenizer_in
from ivl_lightning.models.original_config import is_transposed
from ivl_lightning.models.parts import vision_config

_SHAPES: Final = {
    "image_size": "tile size in pixels",
    "patch_size": "patch size in pixels",
    "hidden_size": "width",
    "num_hidden_layers": "number of layers",
    "num_attention_heads": "number of heads",
    "intermediate_size": "width of the MLP",
    "norm_type": "kind of norm",
    "layer_norm_eps": "epsilon of its norms",
    "use_qk_norm": "norm of queries and keys",
    "attention_bias": "bias of queries, keys and values",
    "hidden_act": "activation",
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
            DonorError: the tower cannot take the place of the network's; names each difference with both values.
        """
        self._check(config)
        if projector == "new" or not self._projector_fits(config):
            return self.tower.tensors
        return Combined([self.tower.tensors, self.projector])

    def _check(self, config: InternVLConfig) -> None:
        faults = _differences(self.tower.config, vision_config(config))
        if self.tower.whole is not None and self.tower.whole.vision_feature_layer != config.vision_feature_layer:
            faults.append(
                f"the layer whose features are used is {self.tower.whole.vision_feature_layer} there and "
                f"{config.vision_feature_layer} here"
            )
        if faults:
            raise DonorError(
                f"scaling.donor={self.path}: its vision tower does not fit this network: {'; '.join(faults)}. Give a "
                "donor of this kind of tower, or choose the model and data.tile_size that belong to it"
            )

    def _projector_fits(self, config: InternVLConfig) -> bool:
        with torch.device("meta"):
            module = InternVLMultiModalProjector(config)
        wanted = {JOINT + name: value.shape for name, value in module.named_parameters()}
        found = {name: self.projector.meta(name).shape for name in self.projector.names()}
        ordered = self.tower.whole is None or is_transposed(self.tower.whole) == is_transposed(config)
        return found == wanted and ordered


def open_donor(path: str) -> Donor:
    """Open a run folder, an exported folder, a checkpoint of either layout, or a bare vision tower.

    Raises:
        ValueError: there is no such folder, it holds none of these, or its files are damaged.
    """
    if not Path(path).is_dir():
        raise DonorError(f"scaling.donor={path}: there is no such folder")
    folder = tower_folder(path)
    tower = open_tower(folder)
    projector = MemorySource({}) if tower.whole is None else open_projector(folder)
    _check_tokens(path, tokenizer_in(folder))
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
            f"{whose} lacks the special tokens {', '.join(missing)} of InternVL, which mark pictures and boxes: take the "
            "tokenizer files that belong to the weights"
        )


def _check_tokens(path: str, load: Any) -> None:
    if load is not None:
        check_special_tokens(load(), f"scaling.donor={path}: the tokenizer beside its weights")


def _differences(there: InternVLVisionConfig, here: InternVLVisionConfig) -> list[str]:
    faults = []
    for field, meaning in _SHAPES.items():
        donor, own = (_plain(getattr(config, field, None)) for config in (there, here))
        if donor != own:
            faults.append(f"its {meaning} is {donor}, here it is {own} ({field})")
    return faults


def _plain(value: object) -> object:
    """Sizes are numbers, or pairs of two equal ones."""
    if isinstance(value, (list, tuple)):
        return value[0] if len(set(value)) == 1 else list(value)
    return value
