"""Mixed preference optimization, the stage of InternVL2.5-MPO: everything trains on pairs of answers.

Source: arXiv:2411.10442 and the original's `trainer_dpo.py`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from math import nan
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import InternVLConfig, InternVLForConditionalGeneration

from ivl_lightning.checkpoints.weights import memory_hash
from ivl_lightning.config.lora import adapter_off_faults
from ivl_lightning.config.schema import PairNormaliser, Reference
from ivl_lightning.data.datamodule import datamodule_of
from ivl_lightning.data.preference_datamodule import PreferenceDataModule
from ivl_lightning.data.ranks import gathered
from ivl_lightning.losses.generation import SFT, label_weights
from ivl_lightning.losses.mpo import PreferenceMixture
from ivl_lightning.losses.preference import SigmoidPreference
from ivl_lightning.losses.quality import BCOPair
from ivl_lightning.losses.rewards import implicit_rewards
from ivl_lightning.models.lora import adapters_off
from ivl_lightning.models.parts import text_config, vision_config
from ivl_lightning.models.streaming import is_empty
from ivl_lightning.stages.base import Stage
from ivl_lightning.stages.logged_numbers import log_numbers
from ivl_lightning.stages.network import ModelSource
from ivl_lightning.stages.reference import eval_mode, score_missing
from ivl_lightning.stages.root import InternVLWithLogps
from ivl_lightning.structures import Answer, PairScores, PlannedPack, PreferenceBatch, PromptBatch

_REWARDS = ("rewards_chosen", "rewards_rejected", "reward_margin", "reward_accuracy")
_LOGPS = ("logps_chosen", "logps_rejected")
_PAIRS, _LABELS, _BAD = "pairs", "labels", "bad"


class RewardError(ValueError):
    """Rewards are not numbers any more, or beyond all measure."""


class MixedPreference(Stage):
    """Trains on `PreferenceBatch`, validates on it (reward accuracy and margin) and on `PromptBatch` (exact match).

    The reference model is the network as it was built: its log-probabilities are computed in one pass before training
    and kept on disk, or it stays in memory and runs beside the policy, or it is the policy without its adapters.

    Args:
        model: see `Stage`.
        mixture: the loss; the published mixture with `update=step` by default.
        beta: of the rewards that are logged; the heads have their own.
        normaliser: `step` takes means over the step's pairs, the same on any layout; `micro_batch` (official) over
            those of each micro-batch.
        reference: see `PreferenceConfig`.
        max_reward: a reward beyond it, either way, stops the run.
        chunk_rows: supervised tokens whose logits exist at one time.
        weights_id: names the weights of the reference model for the cache; a hash of all of them by default.
        **options: see `Stage`.

    Raises:
        ValueError: `adapter_off` where more than adapters trains.
    """

    default_trainable = ("vision", "projector", "llm")

    def __init__(
        self,
        model: ModelSource,
        *,
        mixture: PreferenceMixture | None = None,
        beta: float = 0.1,
        normaliser: PairNormaliser = "step",
        reference: Reference = "cached",
        max_reward: float = 100.0,
        chunk_rows: int = 4096,
        weights_id: Callable[[], str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        if reference == "adapter_off" and (faults := adapter_off_faults(self.trainable, self.lora)):
            raise ValueError("\n".join(faults))
        self.mixture = mixture or published_mixture()
        self.beta = beta
        self.normaliser = normaliser
        self.reference = reference
        self.max_reward = max_reward
        self.chunk_rows = chunk_rows
        self._weights_id = weights_id
        # In a tuple: a registered module would go to checkpoints and to the optimizer.
        self._reference_root: tuple[InternVLWithLogps, ...] = ()
        self._untouched = False
        self._settled: dict[str, Tensor] = {}
        self._step_rewards: list[tuple[tuple[str, ...], Tensor]] = []
        self.val_parts = nn.ModuleDict({name: MeanMetric() for name in self.mixture.heads})
        self.val_rewards = nn.ModuleDict({name: MeanMetric() for name in _REWARDS})

    @property
    def reduction(self) -> str:
        """How labels of the chosen answers are weighed; the data module plans the generation loss's divisor by it."""
        return self.mixture.reduction

    # -- building, reference --------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """See `Stage.configure_model`; then the reference model, or what its log-probabilities are known by."""
        if self.root is not None:
            return
        super().configure_model()
        self._untouched = not self.awaits_checkpoint
        if self.reference == "online" and not self._reference_root:
            self._reference_root = (self._built_again(),)
        elif self.reference == "cached" and self._weights_id is None:
            found = memory_hash(self.internvl)
            self._weights_id = lambda: found

    def _wrap(self, model: InternVLForConditionalGeneration) -> InternVLWithLogps:
        # What lies in memory already need not be the same when it is built again.
        if self.reference == "online" and not is_empty(model):
            self._reference_root = (self._frozen(copy.deepcopy(model)),)
        return InternVLWithLogps(model, chunk_rows=self.chunk_rows, always_run_vision=self._always_run_vision())

    @property
    def _checkpoint_has_all(self) -> bool:
        """A reference model without a name is known by the weights that the stage began with."""
        named = self.reference != "cached" or self._weights_id is not None
        return named and super()._checkpoint_has_all

    @property
    def reads_origins(self) -> bool:
        """A reference model has the weights that the stage began with; a cache may lack some of its scores."""
        return self.reference in ("online", "cached") or super().reads_origins

    def _built_again(self) -> InternVLWithLogps:
        """The network the stage began with, as a reference model; of a sharded one each rank its shares."""
        model = self._build()
        self._quantize(model)
        root = self._frozen(model)
        if is_empty(model):
            self._fill(root)
        return root

    def _frozen(self, model: InternVLForConditionalGeneration) -> InternVLWithLogps:
        """A reference model, sharded like the policy."""
        model.requires_grad_(False)
        sharded = self.device_mesh is not None
        root = InternVLWithLogps(model, chunk_rows=self.chunk_rows, always_run_vision=sharded).eval()
        self._shard(root)
        return root

    def setup(self, stage: str) -> None:
        """See `Stage.setup`.

        Raises:
            ValueError: data that are no preference pairs, or validation without a reference model.
        """
        super().setup(stage)
        pairs = self._pairs_of_trainer()
        if stage == "validate" and self.reference == "cached" and pairs.reference is None:
            raise ValueError(
                "validation alone has no reference model: build the stage with the reference weights and "
                "reference='online', and give the trained ones as ckpt_path"
            )

    def on_fit_start(self) -> None:
        """Show what trains; then make sure that the reference is there.

        Raises:
            ValueError: the reference weights cannot be had any more.
        """
        super().on_fit_start()
        if self.reference != "cached":
            self._move_reference()
            return
        datamodule = self._pairs_of_trainer()
        datamodule.open_reference(self._reference_key())
        if datamodule.unscored():
            score_missing(self._initial_root(), datamodule, self.trainer)

    def _move_reference(self) -> None:
        """A reference model in memory is no part of the stage, which Lightning moves."""
        if self.reference == "online" and self.device_mesh is None:
            self._reference_root[0].to(self.device)

    def _initial_root(self) -> InternVLWithLogps:
        """The reference model: the policy before its first step, else one that is built anew for the pass."""
        if self._untouched:
            return cast(InternVLWithLogps, self.root)
        if not self._builds_anew:
            raise ValueError(
                "reference log-probabilities are missing, but the model has been trained since: give the stage a "
                "function that builds the model, or put the cache back"
            )
        root = self._built_again()
        return root if self.device_mesh is not None else root.to(self.device)

    def _reference_key(self) -> dict[str, Any]:
        """What decides reference log-probabilities besides the data."""
        assert self._weights_id is not None
        config = self.internvl.config
        precision = str(self.trainer.precision)
        stored = str(self.internvl.dtype).removeprefix("torch.") if precision == "32-true" else precision
        own = self._weights_id() if self.trainer.is_global_zero else ""
        # A key of its own only where it says something, so that caches of earlier runs stay good.
        quantized = {} if self.lora.quantize is None else {"quantize": self.lora.quantize}
        return {
            **quantized,
            "weights": self.trainer.strategy.broadcast(own),
            "config": _deciding_config(config),
            "device": self.device.type,
            "dtype": stored if self.device_mesh is None else self.sharding.param_dtype,
            "attention": [text_config(config)._attn_implementation, vision_config(config)._attn_implementation],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """From here on the policy is not the reference model."""
        super().on_load_checkpoint(checkpoint)
        self._untouched = False

    def _pairs_of_trainer(self) -> PreferenceDataModule:
        datamodule = datamodule_of(self.trainer)
        if not isinstance(datamodule, PreferenceDataModule):
            raise ValueError(f"preference training needs a PreferenceDataModule, got {type(datamodule).__name__}")
        return datamodule

    # -- training -------------------------------------------------------------------------------------------------

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch, scaled so that the step's gradient is that of means over the step's pairs.

        Raises:
            RewardError: a reward of the step is not finite or beyond `max_reward`; names the pairs, before the update.
        """
        self._trained = batch
        pairs = self._score(batch)
        self.progress = batch.planned.progress
        terms = self.mixture.terms(pairs)
        weighted = [self.mixture.weights[name] * term.detach() for name, term in terms.items()]
        self.sample_losses = torch.stack(weighted).sum(0)
        self._log_step(terms, pairs, batch)
        num_pairs, labels = self._divisors(pairs, batch.planned)
        return self.mixture.combine(terms, pairs=num_pairs, labels=labels).loss

    def _score(self, batch: PreferenceBatch) -> PairScores:
        # The reference first: between a forward pass and its backward pass FSDP is best left alone.
        reference = self._reference_logps(batch)
        policy = cast(InternVLWithLogps, self.root)(batch)
        return PairScores(*policy.unbind(1), *reference.unbind(1), *batch.response_tokens.unbind(1))

    def _reference_logps(self, batch: PreferenceBatch) -> Tensor:
        """Log-probabilities of the responses under the reference model, `[D, 2]`."""
        if self.reference == "cached":
            return batch.reference_logps
        if self.reference == "online":
            with torch.no_grad():
                return self._reference_root[0](batch)
        root = cast(InternVLWithLogps, self.root)
        with torch.no_grad(), eval_mode(root), adapters_off(root.internvl):
            return root(batch)

    def _divisors(self, pairs: PairScores, planned: PlannedPack) -> tuple[float, float]:
        """What sums over pairs and over their labels are divided by.

        The trainer divides by the accumulation A and the strategy averages over R ranks: with step sums over A * R
        the sum of all micro-batches is divided by the step's own.
        """
        if self.normaliser == "micro_batch":
            return self.mixture.own_divisors(pairs)
        return planned.step_samples / planned.packs_per_step, planned.weight_sum / planned.packs_per_step

    def on_train_start(self) -> None:
        """See `Stage.on_train_start`."""
        super().on_train_start()
        self._settle()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step; then the shift takes the step's rewards in."""
        super().optimizer_step(*args, **kwargs)
        self._untouched = False
        self.mixture.end_step()
        self._settle()

    def _settle(self) -> None:
        """Remember the shift as it is between two steps."""
        self._settled = {f"mixture.{name}": value.clone() for name, value in self.mixture.state_dict().items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A step that is under way is made anew by whoever continues, and so is what it did to the shift."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"].update(self._settled)

    def _log_step(self, terms: dict[str, Tensor], pairs: PairScores, batch: PreferenceBatch) -> None:
        """Add up what is known of the pairs, by dataset; with the step's last micro-batch log their means."""
        names = datamodule_of(self.trainer).mixture_names
        with torch.no_grad():
            columns = self._columns(terms, pairs)
            rows = torch.stack(list(columns.values()), dim=1).float()
            datasets = torch.tensor(batch.sample_datasets, dtype=torch.int64, device=rows.device)
            sums = torch.zeros(len(names), len(columns), device=rows.device).index_add(0, datasets, rows)
        self._remember_rewards(columns, batch)
        total = self._reduced(sums.flatten(), batch)
        if total is None:
            return
        by_dataset = [dict(zip(columns, row, strict=True)) for row in total.view_as(sums).tolist()]
        whole = {name: sum(row[name] for row in by_dataset) for name in columns}
        self._check_rewards(whole, batch.planned)
        self._log_whole(whole, batch.planned)
        if len(names) > 1:
            # Of a dataset that is left out Lightning would log the last loss once more.
            losses = [self._mean_loss(row, row[_PAIRS], row[_LABELS]) if row[_PAIRS] else nan for row in by_dataset]
            log_numbers(self, {f"train/loss/{name}": loss for name, loss in zip(names, losses, strict=True)})

    def _columns(self, terms: dict[str, Tensor], pairs: PairScores) -> dict[str, Tensor]:
        """Numbers of each pair that are summed over the step, `[B]` by name."""
        rewards = implicit_rewards(pairs, self.beta)
        known = _reward_columns(rewards)
        bad = ~(rewards.isfinite() & (rewards.abs() <= self.max_reward)).all(dim=1)
        tokens = pairs.chosen_tokens
        return {
            **{name: term.detach() for name, term in terms.items()},
            **known,
            **dict(zip(_LOGPS, (pairs.policy_chosen.detach(), pairs.policy_rejected.detach()), strict=True)),
            _PAIRS: torch.ones_like(tokens),
            _LABELS: tokens * label_weights(tokens, self.reduction),
            _BAD: bad,
        }

    def _log_whole(self, whole: dict[str, float], planned: PlannedPack) -> None:
        loss = self._mean_loss(whole, planned.step_samples, planned.weight_sum)
        self.log("train/loss", loss, prog_bar=True, batch_size=1)
        self.log("train/progress", self._share_of_run(planned.progress), batch_size=1)
        for name, value in self._parts(whole, planned.step_samples, planned.weight_sum).items():
            self.log(f"train/loss_{name}", value, batch_size=1)
        for name in (*_REWARDS, *_LOGPS):
            self.log(f"train/{name}", whole[name] / max(whole[_PAIRS], 1.0), batch_size=1)
        if self.mixture.shift is not None:
            self.log("train/shift", self.mixture.shift.float(), batch_size=1)

    def _parts(self, sums: dict[str, float], pairs: float, labels: float) -> dict[str, float]:
        return self.mixture.means({name: sums[name] for name in self.mixture.heads}, pairs=pairs, labels=labels)

    def _mean_loss(self, sums: dict[str, float], pairs: float, labels: float) -> float:
        return sum(self.mixture.weights[name] * value for name, value in self._parts(sums, pairs, labels).items())

    def _remember_rewards(self, columns: dict[str, Tensor], batch: PreferenceBatch) -> None:
        if batch.planned.micro_step == 0:
            self._step_rewards = []
        kept = torch.stack([columns[name] for name in (*_REWARDS[:2], _BAD)], dim=1)
        self._step_rewards.append((batch.sample_ids, kept))

    def _check_rewards(self, whole: dict[str, float], planned: PlannedPack) -> None:
        if whole[_BAD] == 0:
            return
        own = [
            f"{name} (chosen {chosen:.4g}, rejected {rejected:.4g})"
            for names, rows in self._step_rewards
            for name, (chosen, rejected, bad) in zip(names, rows.tolist(), strict=True)
            if bad
        ]
        found = [pair for pairs in gathered(own, self.trainer.world_size) for pair in pairs]
        shown = "\n".join(f"  {pair}" for pair in found[:20])
        raise RewardError(
            f"epoch {planned.epoch}, step {planned.step}: rewards of {len(found)} pairs are not finite or beyond "
            f"preference.max_reward={self.max_reward:g}; the step was not taken:\n{shown}\n"
            "Look at these pairs; lower optim.lr, raise preference.beta, or continue from the last checkpoint"
        )

    # -- validation -----------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Without a fit before it, the reference model is still where it was built."""
        self._move_reference()

    def on_validation_epoch_start(self) -> None:
        """Count anew."""
        super().on_validation_epoch_start()
        for metric in (*self._val_parts().values(), *self._val_rewards().values()):
            metric.reset()

    def validation_step(
        self, batch: PreferenceBatch | PromptBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, list[Answer]] | None:
        """Rewards and losses of a pack of pairs, or the answers to a batch of prompts."""
        if isinstance(batch, PromptBatch):
            return self._answer_prompts(batch)
        pairs = self._score(batch)
        # Told to the other ranks with the next step's sums, as those of training.
        self._broken += datamodule_of(self.trainer).note_rejects(batch.rejects)
        if not batch.num_pairs:
            return None
        counts = self.mixture.counts(pairs)
        for name, term in self.mixture.terms(pairs).items():
            self._val_parts()[name].update(term / counts[name], weight=counts[name])
        for name, values in _reward_columns(implicit_rewards(pairs, self.beta)).items():
            self._val_rewards()[name].update(values)
        return None

    def on_validation_epoch_end(self) -> None:
        """Log losses, rewards, and the scores of answers."""
        super().on_validation_epoch_end()
        if not self._pairs_of_trainer().has_val_packs:
            return
        for name, metric in self._val_rewards().items():
            self.log(f"val/{name}", metric.compute(), prog_bar=name == "reward_accuracy", sync_dist=True)
        for name, metric in self._val_parts().items():
            self.log(f"val/loss_{name}", metric.compute(), sync_dist=True)

    def _validation_loss(self) -> Tensor:
        parts = [self.mixture.weights[name] * metric.compute() for name, metric in self._val_parts().items()]
        return torch.stack(parts).sum()

    def _val_parts(self) -> dict[str, MeanMetric]:
        return cast(dict[str, MeanMetric], dict(self.val_parts.items()))

    def _val_rewards(self) -> dict[str, MeanMetric]:
        return cast(dict[str, MeanMetric], dict(self.val_rewards.items()))


def _deciding_config(config: InternVLConfig) -> str:
    """The network's configuration as text, but for what says where and by what it was written."""
    values = {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "dtype")}
    values.pop("transformers_version", None)
    return json.dumps(values, sort_keys=True, default=str)


def published_mixture(beta: float = 0.1) -> PreferenceMixture:
    """0.8 x sigmoid preference + 0.2 x BCO + 1.0 x next-token loss, the shift moving with the steps."""
    return PreferenceMixture(
        {
            "preference": {"weight": 0.8, "head": SigmoidPreference(beta)},
            "quality": {"weight": 0.2, "head": BCOPair(beta, update="step")},
            "generation": {"weight": 1.0, "head": SFT("sample")},
        }
    )


def _reward_columns(rewards: Tensor) -> dict[str, Tensor]:
    """Rewards of each pair `[B]`, by the names under which they are logged."""
    chosen, rejected = rewards.unbind(1)
    return dict(zip(_REWARDS, (chosen, rejected, chosen - rejected, (chosen > rejected).float()), strict=True))
