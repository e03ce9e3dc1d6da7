"""Exponential moving average of the weights that train: in validation, in checkpoints, and as what the stage writes.

Lightning's own averaging copies the module, which a sharded one does not allow. Here the averages are tensors like the
parameters, sharded where those are, and travel in checkpoints as `ema.NAME` in the module's state dict.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.hooks import RemovableHandle

from ivl_lightning.models.shard import reshard
from ivl_lightning.stages.base import Stage

PREFIX = "ema."
"""Of the averages' names in a state dict."""


class EMA(Callback):
    """Averages trainable weights: after each optimizer step, average = d x average + (1 - d) x weight.

    d is min(decay, (1 + n) / (10 + n)) behind n earlier updates, so that the first weights are soon forgotten.
    Validation runs with the averages, and behind `fit` they are the network's weights for good.

    Args:
        decay: d after many steps.

    Raises:
        ValueError: `decay` outside [0, 1).
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay={decay} must be at least 0 and below 1")
        self.decay = decay
        self.updates = 0
        self._averages: dict[str, Tensor] = {}
        self._exchanged = self._awaits_step = False
        self._handles: list[RemovableHandle] = []

    # -- averaging ------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """From here on the module's state dict holds the averages too."""
        self._release()
        # torch marks a hook with an attribute, which a method cannot have.
        self._handles = [
            pl_module.register_state_dict_post_hook(partial(self._put_in)),
            pl_module.register_load_state_dict_pre_hook(self._take_out),
        ]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Follow the optimizers: by their own hooks, so that whatever runs behind a step sees its average."""
        self._pairs(pl_module)
        self._use(pl_module, averages=False)
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self._update(pl_module)))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """A step of the trainer's: torch makes one of its own where it saves an optimizer without state."""
        self._awaits_step = True

    def _update(self, module: nn.Module) -> None:
        if not self._awaits_step:
            return
        self._awaits_step = False
        averages, weights = self._pairs(module)
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        get_ema_multi_avg_fn(decay)(averages, weights, self.updates)
        self.updates += 1

    def _pairs(self, module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Averages and weights, each once; of sharded ones this rank's shares. At first averages are the weights."""
        # Validation leaves weights gathered, and what is written to those is lost.
        reshard(module)
        named = [item for item in module.named_parameters(remove_duplicate=False) if item[1].requires_grad]
        if not self._averages:
            made = {weight: weight.detach().clone() for _, weight in named}
            self._averages = {name: made[weight] for name, weight in named}
        pairs = {weight: self._averages[name] for name, weight in named}
        return [_own(average) for average in pairs.values()], [_own(weight.detach()) for weight in pairs]

    # -- using them -----------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Averages in the place of the weights."""
        self._use(pl_module, averages=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The weights back in their place, while training goes on."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._use(pl_module, averages=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Averages in the place of the weights, for good; before others look at what the fit has made."""
        self._use(pl_module, averages=True)
        text = f"exponential moving average of {self.updates} steps, decay {self.decay:g}"
        if isinstance(pl_module, Stage):
            pl_module.averaged = text
        rank_zero_info(f"weights from here on: {text}")

    @contextmanager
    def in_use(self, module: nn.Module) -> Iterator[None]:
        """Averages in the place of the weights for a while, as in validation."""
        exchanged = self._exchanged
        self._use(module, averages=True)
        try:
            yield
        finally:
            self._use(module, averages=exchanged)

    @torch.no_grad()
    def _use(self, module: nn.Module, *, averages: bool) -> None:
        """Exchange weights and averages, one tensor at a time, unless they lie as wanted."""
        if self._exchanged == averages:
            return
        for average, weight in zip(*self._pairs(module), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        self._exchanged = averages

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _put_in(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
        """Weights under their names and averages under `ema.NAME`, also while they are exchanged."""
        self._pairs(module)
        for name, average in self._averages.items():
            weight = state_dict[f"{prefix}{name}"]
            first, second = (average, weight) if self._exchanged else (weight, average)
            state_dict[f"{prefix}{name}"], state_dict[f"{prefix}{PREFIX}{name}"] = first, second

    @torch.no_grad()
    def _take_out(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """The averages of a checkpoint; of one without, the weights it has, from which averaging begins."""
        if self._exchanged:
            # What is to be loaded as a weight lies where the average was.
            self._averages, self._exchanged = {}, False
        self._pairs(module)
        for name, average in self._averages.items():
            loaded = state_dict.pop(f"{prefix}{PREFIX}{name}", state_dict.get(f"{prefix}{name}"))
            assert isinstance(loaded, Tensor), name
            average.copy_(loaded)

    def state_dict(self) -> dict[str, Any]:
        """Kept in checkpoints, beside the averages."""
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue."""
        self.updates = state_dict["updates"]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the module as it was, but for its weights."""
        self._release()

    def _release(self) -> None:
        while self._handles:
            self._handles.pop().remove()


def _own(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
