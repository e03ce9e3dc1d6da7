"""The moving average of weights: its values, what validation and checkpoints hold, and what is written in the end."""

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ivl_lightning.callbacks.ema import EMA
from ivl_lightning.config.schema import StrategyConfig
from ivl_lightning.strategies.build import build_strategy


class Falling(L.LightningModule):
    """Two names of one weight that falls by 1 in each step, from 10, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
        nn.init.constant_(self.first.weight, 10.0)
        self.seen: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.first.weight.sum()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.seen.append(self.second.weight.item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.first.weight], lr=1.0)


class SaveInValidation(Callback):
    """As a signal in the middle of a validation may have it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")


def trainer_of(folder: Path, ema: EMA, steps: int, *others: Callback) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        strategy=build_strategy(StrategyConfig(), num_ranks=1, accelerator="cpu"),
        max_steps=steps,
        val_check_interval=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[*others, ema],
    )


def batches() -> DataLoader:
    return DataLoader(TensorDataset(torch.zeros(8, 1)), batch_size=1)


def one() -> DataLoader:
    return DataLoader(TensorDataset(torch.zeros(1, 1)), batch_size=1)


def test_validation_sees_averages_and_training_the_weights(tmp_path):
    """Weights 10, 9, 8, 7. d = 1/10, 2/11, 1/5: a1 = 1 + 8.1 = 9.1; a2 = 2/11 x 9.1 + 9/11 x 8 = 8.2;
    a3 = 0.2 x 8.2 + 0.8 x 7 = 7.24. Behind the fit the weight is a3.
    """
    module = Falling()
    trainer = trainer_of(tmp_path, EMA(0.2), 3)
    trainer.fit(module, batches(), one())
    assert module.seen == pytest.approx([9.1, 8.2, 7.24])
    assert module.first.weight.item() == pytest.approx(7.24)
    trainer.validate(module, one(), verbose=False)
    assert module.seen[-1] == pytest.approx(7.24)
    assert sorted(module.state_dict()) == ["first.weight", "frozen", "second.weight"], "the callback has left it"


@pytest.mark.parametrize("again", [False, True])
def test_a_checkpoint_from_within_validation_goes_on(tmp_path, again):
    """It holds the weight 9 and the average 9.1, whichever lay in the network: steps 2 and 3 are the same as without
    it, bit for bit; also where the callback has come to the end of a fit before.
    """
    whole = Falling()
    trainer_of(tmp_path, EMA(0.2), 3, SaveInValidation(tmp_path)).fit(whole, batches(), one())
    resumed, ema = Falling(), EMA(0.2)
    if again:
        trainer_of(tmp_path, ema, 2).fit(resumed, batches(), one())
        resumed.seen.clear()
    trainer_of(tmp_path, ema, 3).fit(resumed, batches(), one(), ckpt_path=tmp_path / "step=1.ckpt", weights_only=True)
    assert resumed.seen == whole.seen[1:]
    assert torch.equal(resumed.first.weight, whole.first.weight)


def test_a_checkpoint_without_averages_is_refused(tmp_path):
    """The run that saved it did not average: another run."""
    trainer = trainer_of(tmp_path, EMA(), 1)
    trainer.callbacks.clear()
    trainer.fit(Falling(), batches(), one())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match=r"it lacks state_dict\.ema\.first\.weight"):
        trainer_of(tmp_path, EMA(), 2).fit(Falling(), batches(), one(), ckpt_path=tmp_path / "plain.ckpt")


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match=r"decay=.* must be at least 0 and below 1"):
        EMA(decay)
