"""Progressive scaling: the vision tower of another network, carried to this one and proven to have arrived.

Source: InternVL 2.5. A tower trained beside a small language model by the next-token loss gives features that other
language models take at once, so a larger one needs no stage 1.5 of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from transformers import InternVLConfig

from ivl_lightning.callbacks.lineage import LineageRecorder, origin_of
from ivl_lightning.checkpoints.lineage import Origin
from ivl_lightning.checkpoints.source import TensorSource, listed
from ivl_lightning.config.schema import CarriedProjector, Part
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.models.donor import Donor, DonorError, brought_parts, check_special_tokens, open_donor
from ivl_lightning.models.loader import NetworkLoader
from ivl_lightning.stages.base import Stage, stage_of


class ProgressiveScaling(LineageRecorder):
    """Brings a donor's vision tower, and its projector where widths match; writes lineage.json with or without a donor.

    It never touches weights: in `setup` it registers with the stage's loader, which reads the donor's tensors in the
    place of the network's own, each rank its shares, once the network is sharded. A stage that goes on from a
    checkpoint has its weights there, and only the donor's name is compared; with `stage.resumed` the donor need not be
    there any more, unless the checkpoint leaves out what is frozen (adapters), or there is a reference model.

    Args:
        donor: run folder (of which stage 1.5's tower is taken, if that is finished), stage folder, exported folder,
            checkpoint of either layout, or bare vision tower; None brings nothing.
        projector: `match` brings the donor's projector too where it fits, `new` never.
        stage, folder: see `LineageRecorder`.
    """

    def __init__(
        self,
        donor: str | None = None,
        *,
        projector: CarriedProjector = "match",
        stage: str | None = None,
        folder: str | None = None,
    ) -> None:
        super().__init__(stage, folder)
        self._path, self._projector = donor, projector
        self._donor: Donor | None = None
        self._brought: list[Part] = []
        self._loader: NetworkLoader | None = None
        self._proven = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Open the donor and register what it brings; nothing has been built yet.

        Raises:
            ValueError: the donor cannot be opened, special tokens are missing, or the network stands already.
        """
        super().setup(trainer, pl_module, stage)
        module = stage_of(pl_module)
        if self._path is None or module.loader is self._loader:
            return
        self._donor = self._loader = None
        self._check_own_tokens(trainer)
        if not module.reads_origins or (module.root is not None and stage != "fit"):
            return
        if module.root is not None:
            raise DonorError(
                f"scaling.donor={self._path}: the network stands already, so nothing can be brought into it: give a "
                "stage whose network no one has built yet, and leave configure_model to the trainer"
            )
        self._donor, self._proven = open_donor(self._path), False
        self._loader = module.loader
        self._loader.register(self._bring)

    def _bring(self, config: InternVLConfig) -> TensorSource:
        assert self._donor is not None
        tensors = self._donor.brought_to(config, self._projector)
        self._brought = brought_parts(tensors)
        return tensors

    def _check_own_tokens(self, trainer: L.Trainer) -> None:
        datamodule = getattr(trainer, "datamodule", None)
        if isinstance(datamodule, DynamicPackingDataModule):
            check_special_tokens(datamodule.tokenizer, "the tokenizer of this run")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Verify that what was brought has arrived, bit for bit.

        Raises:
            RuntimeError: it has not, on this rank or another.
        """
        stage = stage_of(pl_module)
        if self._donor is not None and not self._proven and not stage.awaits_checkpoint:
            self._verify(trainer, stage, self._donor)
            self._proven = True
        super().on_fit_start(trainer, pl_module)

    def _verify(self, trainer: L.Trainer, stage: Stage, donor: Donor) -> None:
        wrong = stage.loader.not_as_brought(stage.internvl)
        worst = trainer.strategy.reduce_boolean_decision(bool(wrong), all=False)
        if worst:
            raise RuntimeError(
                f"scaling.donor={donor.path}: {listed(wrong) or 'tensors on another rank'} of the network are not what "
                f"{donor.folder} holds, although they were just read from there. The folder may have been written to "
                "meanwhile: start again"
            )

    def _origins(self, stage: Stage) -> list[Origin]:
        """Those of the network, without the parts that the donor has brought."""
        if self._donor is None:
            return super()._origins(stage)
        own = [
            Origin(origin.path, kept, False, origin.lineage)
            for origin in super()._origins(stage)
            if (kept := [part for part in origin.brings if part not in self._brought])
        ]
        return [*own, origin_of(self._donor.folder, self._brought, donor=True)]

    def state_dict(self) -> dict[str, Any]:
        """The donor's name goes with the hashes."""
        return {**super().state_dict(), "donor": self._path}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Only compare: the checkpoint holds the weights.

        Raises:
            DonorError: the stage was begun with another donor.
        """
        super().load_state_dict(state_dict)
        then = state_dict["donor"]
        if _place(then) != _place(self._path):
            raise DonorError(
                f"the stage was begun with scaling.donor={then}, this command says {self._path}: a checkpoint goes on "
                "with the tower it has. Give the same donor, or another run_dir"
            )
        # Its tower may have trained since.
        self._proven = True


def _place(donor: str | None) -> Path | None:
    return None if donor is None else Path(donor).resolve()
