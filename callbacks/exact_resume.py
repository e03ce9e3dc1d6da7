"""Random numbers of every rank, kept in checkpoints: Lightning keeps none.

With it a run that was killed continues as if it had not been. All else that decides the steps to come is kept where it
belongs: the position in the plan and the rows that broke by the data module, the schedule and the optimizer by
Lightning, the reward shift by the stage, and dropout follows from the rows of a micro-batch alone.
"""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from ivl_lightning.data.ranks import gathered


class ExactResume(Callback):
    """Keeps the state of Python's, numpy's and torch's generators of every rank, and puts it back.

    On another number of ranks nobody's state is anybody's: then each begins with its own.
    """

    def __init__(self) -> None:
        self._states: list[dict[str, Any]] = []
        self._world_size = 1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Know how many ranks take part."""
        self._world_size = trainer.world_size

    def state_dict(self) -> dict[str, Any]:
        """States of all ranks; every rank must call it."""
        return {"ranks": gathered(generator_states(), self._world_size)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back with the next micro-batch."""
        self._states = state_dict["ranks"]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Before the first micro-batch of a run that goes on; making its loader has drawn numbers."""
        states, self._states = self._states, []
        if len(states) == trainer.world_size:
            set_generator_states(states[trainer.global_rank])


def generator_states() -> dict[str, Any]:
    """States of this process's generators: numbers, texts, lists and tensors, as a checkpoint may hold them."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    version, internal, next_gauss = random.getstate()
    return {
        "python": [version, list(internal), next_gauss],
        "numpy": [str(name), keys.tolist(), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_generator_states(states: dict[str, Any]) -> None:
    """Put back what `generator_states` gave."""
    version, internal, next_gauss = states["python"]
    random.setstate((version, tuple(internal), next_gauss))
    name, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
