"""Where a stage's network came from, and what the stage made of it: lineage.json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import lightning as L
from lightning.pytorch.callbacks import Callback
from pydantic import TypeAdapter
from torch import Tensor

from ivl_lightning.callbacks.packing_stats import PackingStats
from ivl_lightning.checkpoints.lineage import Lineage, Origin, PartRecord, read_lineage, write_lineage
from ivl_lightning.checkpoints.weights import tensors_hash
from ivl_lightning.config.schema import Part
from ivl_lightning.models.freeze import model_parts, part_sizes
from ivl_lightning.stages.base import Stage, stage_of

HASHED: Final[tuple[Part, ...]] = ("vision", "projector")
"""Parts that are carried to other networks. A language model is not, and takes long to hash."""

_ORIGINS: Final = TypeAdapter(list[Origin])


class LineageRecorder(Callback):
    """Writes lineage.json: origins of the network with their own lineage, hashes, steps and tokens.

    A vision tower that the stage froze must end as it began.

    Args:
        stage: name of the stage; by default that of its class.
        folder: where the file is written; by default the trainer's.
    """

    def __init__(self, stage: str | None = None, folder: str | None = None) -> None:
        self._name, self._folder = stage, folder
        self._before: dict[str, str] | None = None
        self._came_from: list[Origin] = []

    # -- begin ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """What an earlier fit began with is not what this one begins with."""
        if stage == "fit":
            self._before = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take origins and hashes of what the stage starts from, unless a checkpoint has brought them or will do so.

        Origins are read now: where they lie may be deleted or written to while the stage trains.
        """
        if not stage_of(pl_module).awaits_checkpoint:
            self._begin(stage_of(pl_module))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A checkpoint that was saved without this callback brings weights, but no hashes of those before."""
        self._begin(stage_of(pl_module))

    def _begin(self, stage: Stage) -> None:
        if self._before is None:
            self._came_from = self._origins(stage)
            self._before = part_hashes(stage)

    def state_dict(self) -> dict[str, Any]:
        """Kept in checkpoints: a stage that goes on began where it began."""
        return {"before": self._before, "origins": _ORIGINS.dump_python(self._came_from)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue."""
        self._before, self._came_from = state_dict["before"], _ORIGINS.validate_python(state_dict["origins"])

    # -- end ------------------------------------------------------------------------------------------------------

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare and write.

        Raises:
            RuntimeError: the vision tower was frozen and has changed all the same.
        """
        stage = stage_of(pl_module)
        after = part_hashes(stage)
        self._check_frozen(stage, after)
        if not trainer.is_global_zero:
            return
        folder = Path(self._folder or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        lineage = Lineage(
            stage=self._name or type(stage).__name__,
            folder=str(folder.absolute()),
            trained=stage.trained_names,
            steps=trainer.global_step,
            tokens=_tokens(trainer),
            parts=self._records(stage, after),
            origins=self._came_from,
        )
        write_lineage(lineage, folder)

    def _check_frozen(self, stage: Stage, after: dict[str, str]) -> None:
        before = (self._before or {}).get("vision")
        if "vision" not in stage.trainable and before != after.get("vision"):
            raise RuntimeError(
                f"this stage froze the vision tower, but its weights have changed (hash {before} when it began, "
                f"{after.get('vision')} now): something has written to frozen weights, and they are not handed on"
            )

    def _records(self, stage: Stage, after: dict[str, str]) -> dict[str, PartRecord]:
        before = self._before or {}
        # Weights beside adapters are frozen: what is handed on has the adapters in it, and another hash.
        known = {part: value for part, value in after.items() if part not in stage.lora.parts}
        return {
            size.name: PartRecord(
                size.total - _adapter_size(stage, size.name), before.get(size.name), known.get(size.name)
            )
            for size in part_sizes(stage.internvl)
        }

    def _origins(self, stage: Stage) -> list[Origin]:
        return [origin_of(Path(path), parts, donor=False) for path, parts in stage.loader.origins.items()]


def origin_of(folder: Path, parts: list[Part], *, donor: bool) -> Origin:
    """Where parts were read from, with the lineage that lies there."""
    return Origin(str(folder.absolute()), list(parts), donor, read_lineage(folder))


def part_hashes(stage: Stage) -> dict[str, str]:
    """Hash of each part that may be carried on; every rank must call it."""
    return {part: tensors_hash(_weights(stage, part)) for part in HASHED}


def _weights(stage: Stage, part: Part) -> Iterator[tuple[str, Tensor]]:
    """A part's own weights, without adapters, under the names that they have without adapters."""
    for module in model_parts(stage.internvl)[part]:
        for name, parameter in module.named_parameters():
            if ".lora_" not in name:
                yield name.replace(".base_layer.", "."), parameter


def _adapter_size(stage: Stage, part: Part) -> int:
    named = (item for module in model_parts(stage.internvl)[part] for item in module.named_parameters())
    return sum(parameter.numel() for name, parameter in named if ".lora_" in name)


def _tokens(trainer: L.Trainer) -> int | None:
    counters = [callback for callback in trainer.callbacks if isinstance(callback, PackingStats)]  # type: ignore[attr-defined]  # the trainer's connector sets it
    return counters[0].tokens if counters else None
