"""How a stage gets its network: built, frozen, adapted, wrapped, sharded and filled, in this order."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self, TypeAlias

import lightning as L
import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import InternVLForConditionalGeneration

from ivl_lightning.checkpoints.lora import merged_state_dict
from ivl_lightning.config.lora import trained_parts
from ivl_lightning.config.schema import LoraSettings, Part, StrategyConfig
from ivl_lightning.models.build import enable_activation_checkpointing
from ivl_lightning.models.drop_path import apply_drop_path
from ivl_lightning.models.freeze import frozen_modules, set_trainable
from ivl_lightning.models.last_layer import select_in_last_layer
from ivl_lightning.models.loader import NetworkLoader, ReadyNetwork
from ivl_lightning.models.lora import add_lora, freeze_adapted, lora_scale
from ivl_lightning.models.parts import vision_tower
from ivl_lightning.models.quantize import four_bit_names, quantize_language_model, unquantized
from ivl_lightning.models.shard import compile_blocks, shard_model
from ivl_lightning.models.streaming import is_empty, materialise
from ivl_lightning.stages.frozen_base import FrozenBase
from ivl_lightning.stages.root import InternVLRoot

ModelSource: TypeAlias = (
    InternVLForConditionalGeneration | Callable[[], InternVLForConditionalGeneration] | NetworkLoader
)


class NetworkStage(L.LightningModule):
    """A LightningModule around the network; a subclass wraps it and says what is done with it.

    Args:
        model: the network, or a function or loader that builds it, once the strategy is set up.
        trainable: parts that train; by default those with adapters, or the stage's own choice.
        trainable_vision_layers: of a trainable tower only the last n layers.
        drop_path_rate: stochastic depth of the vision tower.
        activation_checkpointing: recompute each block in backward.
        sharding: how ranks share the weights, and in which type they compute.
        lora: adapters that train in place of a part's weights.
        seed: of the adapters' first values, and of dropout and drop path.

    Attributes:
        resumed: for whoever will give the trainer a checkpoint of this stage: weights that it holds are not read
            before. False by default.
        awaits_checkpoint: the network's weights are still those that lay in memory by chance.

    Raises:
        ValueError: `trainable` leaves out a part with adapters; or a ready network that is to be quantized.
    """

    default_trainable: ClassVar[tuple[Part, ...]]

    def __init__(
        self,
        model: ModelSource,
        *,
        trainable: list[Part] | None = None,
        trainable_vision_layers: int | None = None,
        drop_path_rate: float = 0.0,
        activation_checkpointing: bool = False,
        sharding: StrategyConfig | None = None,
        lora: LoraSettings | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.loader = model if isinstance(model, NetworkLoader) else ReadyNetwork(model)
        self._builds_anew = self.loader.builds_anew
        self.lora = lora or LoraSettings()
        if self.lora.quantize is not None and not self._builds_anew:
            raise ValueError(
                f"lora.quantize={self.lora.quantize} with a ready network: give a function that builds it, because the "
                "merged weights are made of those it had before"
            )
        self.seed = seed
        self.trainable = trained_parts(trainable, self.lora, self.default_trainable)
        self.trainable_vision_layers = trainable_vision_layers
        self.drop_path_rate = drop_path_rate
        self.activation_checkpointing = activation_checkpointing
        self.sharding = sharding or StrategyConfig()
        self.resumed = self.awaits_checkpoint = False
        self.root: InternVLRoot | None = None
        self._frozen_base: FrozenBase | None = None

    @property
    def internvl(self) -> InternVLForConditionalGeneration:
        """The network. Only its root may run it; others may read its configuration or save it."""
        assert self.root is not None, "configure_model has not run yet"
        return self.root.internvl

    @property
    def trained_names(self) -> list[str]:
        """Parts that train, for people: `llm`, or `llm (LoRA)` where adapters do."""
        return [f"{part} (LoRA)" if part in self.lora.parts else part for part in self.trainable]

    def configure_model(self) -> None:
        """Build, freeze, wrap and shard; called by Lightning once devices are known, or by hand without a trainer."""
        if self.root is not None:
            return
        model = self._build()
        apply_drop_path(vision_tower(model), self.drop_path_rate)
        self.choose_trained(model)
        self._adapt(model)
        if self.activation_checkpointing:
            enable_activation_checkpointing(model)
        self.root = self._wrap(model)
        if self._frozen_base is not None:
            self._frozen_base.attach(self, "root.internvl")
        self._shard(self.root)
        if is_empty(model):
            self._fill(self.root, read=not self._checkpoint_has_all)
        if self._frozen_base is not None and self.lora.quantize is None:
            self._frozen_base.take(model)
        self.train()

    def choose_trained(self, model: InternVLForConditionalGeneration) -> None:
        """Give gradients to what trains and to nothing else; a stage of one's own may choose within the parts.

        Args:
            model: not yet wrapped, adapted or sharded; changed in place.
        """
        set_trainable(model, self.trainable, last_vision_layers=self.trainable_vision_layers)

    def _build(self) -> InternVLForConditionalGeneration:
        """The network; on the meta device if it is read from somewhere, and not quantized before it is sharded."""
        model = self.loader.build()
        select_in_last_layer(model)
        if not is_empty(model) or self.lora.quantize is not None:
            self.loader.fill(model)
        return model

    @property
    def _checkpoint_has_all(self) -> bool:
        """Whether the weights of this stage's network will come from a checkpoint, to the last one."""
        return self.resumed and not self.lora.parts

    @property
    def reads_origins(self) -> bool:
        """Whether where the network is from is read; a stage that goes on from a checkpoint may have all it needs."""
        return not self._checkpoint_has_all

    def _fill(self, root: InternVLRoot, *, read: bool = True) -> None:
        """Give a network on the meta device memory, and its weights; of a sharded one each rank its own shares."""
        attached = self._trainer is not None
        if self.device_mesh is not None:
            offloaded = self.sharding.cpu_offload or not attached
            materialise(root, self.device if offloaded else self.trainer.strategy.root_device)
        if read:
            self.loader.fill(root.internvl)
        else:
            self.awaits_checkpoint = True
            materialise(root, torch.device("cpu"))

    def _whole_network(self) -> InternVLForConditionalGeneration:
        """The network the stage began with, once more, not sharded."""
        model = self.loader.build()
        self.loader.fill(model)
        return model

    def _adapt(self, model: InternVLForConditionalGeneration) -> None:
        """Freeze what gets adapters, quantize it if wanted, and add them; nothing without LoRA."""
        if not self.lora.parts:
            return
        freeze_adapted(model, self.lora)
        self._frozen_base = FrozenBase(name for name, value in model.named_parameters() if not value.requires_grad)
        if self.lora.quantize is not None:
            self._frozen_base.take(model)
            self._quantize(model)
        add_lora(model, self.lora, seed=self.seed)

    def _quantize(self, model: InternVLForConditionalGeneration) -> None:
        """Put the language model's blocks into 4 bits, if wanted."""
        if self.lora.quantize is not None:
            attached = self._trainer is not None
            quantize_language_model(model, self.trainer.strategy.root_device if attached else self.device)

    def merged(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the plain network that the adapted one stands for; of 4-bit weights those they were made of.

        Args:
            state_dict: whole, of `internvl`; used up.

        Raises:
            ValueError: weights that were in 4 bits cannot be read again.
        """
        if self.lora.quantize is not None:
            plain = self._whole_network().state_dict()
            assert self._frozen_base is not None
            self._frozen_base.check_tensors({name: plain[name] for name in four_bit_names(state_dict).values()})
            state_dict = unquantized(state_dict, plain)
        return merged_state_dict(state_dict, lora_scale(self.lora)) if self.lora.parts else state_dict

    def _wrap(self, model: InternVLForConditionalGeneration) -> InternVLRoot:
        """The root module whose forward gives what this stage's loss needs."""
        raise NotImplementedError

    def _shard(self, root: InternVLRoot) -> None:
        """Compile a root's blocks, if wanted, and shard it under FSDP."""
        settings, mesh = self.sharding, self.device_mesh
        if settings.compile_blocks:
            compile_blocks(root.internvl)
        if mesh is None:
            return
        shard_model(
            root,
            root.internvl,
            mesh,
            param_dtype=getattr(torch, settings.param_dtype),
            reshard_after_forward=settings.reshard_after_forward,
            cpu_offload=settings.cpu_offload,
            prefetch=settings.prefetch,
        )
        register_fsdp_forward_method(root, "generate")

    def _always_run_vision(self) -> bool:
        """Whether a micro-batch without a tile runs the tower all the same.

        Sharded ranks must gather the same weights. And what trains must get a gradient of zero rather than none,
        on one process as on many: the optimizer skips a parameter without a gradient, so layouts would differ.
        """
        return self.device_mesh is not None or "vision" in self.trainable or "projector" in self.trainable

    def train(self, mode: bool = True) -> Self:
        """Frozen parts stay in eval mode: no drop path where nothing learns."""
        super().train(mode)
        if mode and self.root is not None:
            for module in frozen_modules(self.root.internvl):
                module.eval()
        return self
