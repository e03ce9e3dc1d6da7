"""The parts as a plain Lightning plugin: no Hydra, a Trainer of one's own, real rows, continuing."""

import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from ivl_lightning.callbacks.packing_stats import PackingStats
from ivl_lightning.config.schema import OptimConfig
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.stages.instruction_tuning import InstructionTuning
from tests import tiny

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared/real/meta.json"


class Losses(Callback):
    def __init__(self):
        self.losses, self.samples = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, *_):
        self.samples += batch.sample_ids
        if batch.planned.micro_step + 1 == batch.planned.num_micro_steps:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))


def fit(meta, tokenizer, folder, *, steps, ckpt_path=None, callbacks=(), **changes):
    losses = Losses()
    module = InstructionTuning(
        lambda: tiny.build_tiny_model(tokenizer), optim=OptimConfig(lr=1e-3, warmup_steps=0, schedule="constant")
    )
    config = tiny.tiny_data_config(meta, **{"packs_per_step": 2, "max_tokens": 420, **changes})
    data = DynamicPackingDataModule(config, tokenizer, patch_size=tiny.PATCH_SIZE)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[losses, ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_top_k=-1), *callbacks],
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return losses, trainer, module


def test_nothing_of_hydra_is_imported(meta, tmp_path):
    """Stage, data module and trainer work without Hydra or OmegaConf in memory."""
    code = (
        "import sys, lightning as L; from pathlib import Path; from tests import tiny\n"
        "from ivl_lightning.data.datamodule import DynamicPackingDataModule as Data\n"
        "from ivl_lightning.stages.instruction_tuning import InstructionTuning\n"
        "tokenizer = tiny.load_tiny_tokenizer()\n"
        f"data = Data(tiny.tiny_data_config(Path({str(meta)!r})), tokenizer, patch_size=tiny.PATCH_SIZE)\n"
        "L.Trainer(max_steps=1, accelerator='cpu', logger=False, enable_checkpointing=False).fit(\n"
        "    InstructionTuning(tiny.build_tiny_model(tokenizer)), data)\n"
        "print([name for name in ('hydra', 'omegaconf') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip().endswith("[]")


@pytest.mark.parametrize("stop", [2, 5, 7])
def test_resumed_equals_never_stopped(meta, tokenizer, tmp_path, stop):
    """8 steps in one go, or `stop` steps, a new process's worth of new objects, and the rest: the same rows and losses.

    An epoch has 5 or 6 steps, so the cuts lie in the middle of an epoch, near its end, and in the next one.
    """
    whole, trainer, _ = fit(meta, tokenizer, tmp_path / "whole", steps=8)
    fit(meta, tokenizer, tmp_path / "cut", steps=stop)
    checkpoint = next((tmp_path / "cut").glob(f"*step={stop}.ckpt"))
    rest, _, _ = fit(meta, tokenizer, tmp_path / "cut", steps=8, ckpt_path=checkpoint)
    assert len(whole.losses) == 8
    assert rest.losses == whole.losses[stop:]
    assert rest.samples == whole.samples[-len(rest.samples) :]
    assert (tmp_path / "whole").is_dir()
    assert trainer.global_step == 8


def test_a_batch_of_samples_learns_the_same_in_any_packs(meta, tokenizer, tmp_path):
    """8 rows a step in 2 and in 4 packs: the same rows, and the same losses but for the order of sums. 24 rows make 3
    steps; stopped behind the second and continued, the third is what it was.
    """
    caps = {"batch_samples": 8, "max_tokens": 1200, "max_pack_tiles": 40}
    two, _, _ = fit(meta, tokenizer, tmp_path / "two", steps=3, packs_per_step=2, **caps)
    four, _, _ = fit(meta, tokenizer, tmp_path / "four", steps=3, packs_per_step=4, **caps)
    assert len(two.losses) == len(four.losses) == 3
    assert four.losses == pytest.approx(two.losses, abs=1e-6)
    for start in (0, 8, 16):
        assert sorted(two.samples[start : start + 8]) == sorted(four.samples[start : start + 8])
    checkpoint = next((tmp_path / "four").glob("*step=2.ckpt"))
    rest, _, _ = fit(meta, tokenizer, tmp_path / "rest", steps=3, ckpt_path=checkpoint, packs_per_step=4, **caps)
    assert rest.losses == four.losses[2:]


def test_a_checkpoint_of_an_exception_loses_no_step(meta, tokenizer, tmp_path):
    """The third step fails before its optimizer step: two steps are in the weights, and the position is behind two."""

    class Fail(Callback):
        def on_before_optimizer_step(self, trainer, *_):
            if trainer.global_step == 2:
                raise RuntimeError("out of memory")

    keep = ModelCheckpoint(dirpath=tmp_path / "kept", save_on_exception=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(meta, tokenizer, tmp_path, steps=4, callbacks=[keep, Fail()])
    (path,) = (tmp_path / "kept").glob("*.ckpt")
    state = torch.load(path, weights_only=True)
    assert state["global_step"] == 2
    assert state["DynamicPackingDataModule"]["plan"]["step"] == 2
    rest, _, _ = fit(meta, tokenizer, tmp_path / "rest", steps=4, ckpt_path=path)
    whole, _, _ = fit(meta, tokenizer, tmp_path / "whole", steps=4)
    assert rest.losses == whole.losses[2:]


def test_validating_before_training(tokenizer, tmp_path):
    """The same module and data in another order; a dataset's name may hold a point; a score per dataset."""
    meta = tiny.write_tiny_data(tmp_path / "data")
    meta.write_text(meta.read_text().replace('"text"', '"text.v1"'))
    module = InstructionTuning(lambda: tiny.build_tiny_model(tokenizer), generation_tokens=3)
    config = tiny.tiny_data_config(meta, packs_per_step=2, val_rows=8)
    data = DynamicPackingDataModule(config, tokenizer, patch_size=tiny.PATCH_SIZE)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    before = trainer.validate(module, data, verbose=False)[0]
    assert {"val/loss", "val/exact_match", "val/exact_match/text.v1"} <= set(before)
    trainer.fit(module, data)
    assert trainer.accumulate_grad_batches == 2
    assert trainer.global_step == 1


def test_packing_stats_are_the_plan(meta, tokenizer, tmp_path):
    """Fill of a step = tokens of its packs / (packs x cap), from the plan.

    Each dataset's tokens add up to all tokens so far, and the datasets' losses, weighted, to the loss.
    """
    seen = {}

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, *_):
            seen.setdefault(batch.planned.step, []).append(batch.planned.pack)
            if batch.planned.micro_step + 1 == batch.planned.num_micro_steps:
                packs = seen[batch.planned.step]
                metrics = trainer.callback_metrics
                assert metrics["data/fill_tokens"] == pytest.approx(sum(p.tokens for p in packs) / (len(packs) * 420))
                assert metrics["data/samples"] == sum(len(p.samples) for p in packs)
                assert metrics["data/samples_per_pack"] == metrics["data/samples"] / 2
                assert metrics["data/idle"] == 0.0, "one rank waits for nobody"
                assert 0.0 <= metrics["data/wait"] <= 1.0
                total = sum(pack.tokens for packs in seen.values() for pack in packs)
                assert metrics["data/tokens/pictures"] + metrics["data/tokens/text"] == total
                assert metrics["data/tiles/text"] == 0.0
                assert metrics["data/tiles/pictures"] == sum(p.tiles for packs in seen.values() for p in packs)
                losses = [float(metrics[key]) for key in ("train/loss/pictures", "train/loss/text") if key in metrics]
                assert min(losses) <= float(metrics["train/loss"]) <= max(losses)

    fit(meta, tokenizer, tmp_path, steps=3, callbacks=[PackingStats(), Keep()])
    assert len(seen) == 3


def test_stages_freeze_what_they_say(meta, tokenizer, tmp_path):
    """After two steps of stage 1 the projector has moved, tower and language model are the same bit for bit."""
    from ivl_lightning.stages.mlp_warmup import MLPWarmup

    before = tiny.build_tiny_model(tokenizer).state_dict()
    module = MLPWarmup(lambda: tiny.build_tiny_model(tokenizer), optim=OptimConfig(lr=1e-2, warmup_steps=0))
    data = DynamicPackingDataModule(tiny.tiny_data_config(meta), tokenizer, patch_size=tiny.PATCH_SIZE)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, data)
    moved = {name for name, value in module.internvl.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all("multi_modal_projector" in name for name in moved)
    assert not module.internvl.model.vision_tower.training
    assert module.internvl.model.multi_modal_projector.training


def test_real_rows(tokenizer, tmp_path):
    """Photographs, several images, video, text, English and Chinese, in the official format.

    Drawn rows where the real ones are not at hand.
    """
    meta = REAL if REAL.is_file() else tiny.write_tiny_data(tmp_path / "data")
    changes = {"max_tokens": 2048, "max_pack_tiles": 64, "packs_per_step": 2, "reject_limit": 0.0}
    module = InstructionTuning(lambda: tiny.build_tiny_model(tokenizer), optim=OptimConfig(lr=1e-3))
    data = DynamicPackingDataModule(
        tiny.tiny_data_config(meta, max_tiles=12, **changes), tokenizer, patch_size=tiny.PATCH_SIZE
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, data)
    assert trainer.global_step >= 1
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    if meta == REAL:
        assert not data.ledger.counts
        assert len(data.train_corpus) == 24
