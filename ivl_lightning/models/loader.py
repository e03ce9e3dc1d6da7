"""Where a stage's network comes from: built when its devices are known, filled when it is sharded.

Others may bring tensors for some of its parts before it is built (progressive scaling does).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerBase

from ivl_lightning.checkpoints.source import Combined, TensorSource, listed
from ivl_lightning.config.schema import ModelConfig, Part
from ivl_lightning.models.build import (
    check_shapes,
    described_by,
    empty_network,
    has_weights,
    open_configured,
    random_model,
)
from ivl_lightning.models.checkpoint import Checkpoint
from ivl_lightning.models.original_config import keep_record
from ivl_lightning.models.parts import text_config
from ivl_lightning.models.streaming import check_fits, different, write
from ivl_lightning.models.tokenizer import image_token_id
from ivl_lightning.models.vocabulary import GrownVocabulary

Bringer: TypeAlias = Callable[[InternVLConfig], TensorSource]
"""Given a network's configuration, the tensors for some of its parts, under native names; raises ValueError where they
do not fit."""


class NetworkLoader:
    """Builds a network, and fills it.

    Both on the CPU, where a seed gives the same numbers under any strategy: Lightning lets some begin on the GPU.
    """

    def __init__(self) -> None:
        self._bringers: list[Bringer] = []
        self._brought: list[TensorSource] = []

    @property
    def origins(self) -> dict[str, list[Part]]:
        """Folders the network is read from, and the parts that come from each; nothing for one made in memory."""
        return {}

    @property
    def builds_anew(self) -> bool:
        """Whether each `build` gives a network of its own, with the weights that the first one began with."""
        return True

    def register(self, bringer: Bringer) -> None:
        """Let others bring tensors in place of the network's own; before `build`."""
        self._bringers.append(bringer)

    def build(self) -> InternVLForConditionalGeneration:
        """The network. Its weights may be on the meta device until `fill`.

        Raises:
            ValueError: it cannot be built, or what is read or brought does not fit it.
        """
        with torch.device("cpu"):
            model = self._build()
            self._brought = [bring(model.config) for bring in self._bringers]
            self._check(model)
        return model

    def fill(self, model: InternVLForConditionalGeneration) -> None:
        """Read the weights, brought ones too, into a network that was built here.

        Args:
            model: may have been sharded since, or have got adapters.

        Raises:
            ValueError: weights that are damaged.
        """
        with torch.device("cpu"):
            write(model, self._sources())

    def not_as_brought(self, model: InternVLForConditionalGeneration) -> list[str]:
        """Names of brought tensors that are not, bit for bit, those of the filled network."""
        return different(model, Combined(self._brought))

    def _build(self) -> InternVLForConditionalGeneration:
        raise NotImplementedError

    def _check(self, model: InternVLForConditionalGeneration) -> None:
        """What is going to be read must fit; as long as all names are those of the plain network."""

    def _sources(self) -> TensorSource:
        """What `fill` reads."""
        return Combined(self._brought)


class ReadyNetwork(NetworkLoader):
    """A network that stands, or a function that makes one with its weights.

    Args:
        source: the network, or the function; no weight of it may be on the meta device.
    """

    def __init__(
        self, source: InternVLForConditionalGeneration | Callable[[], InternVLForConditionalGeneration]
    ) -> None:
        super().__init__()
        self._source = source

    @property
    def builds_anew(self) -> bool:
        """See `NetworkLoader`."""
        return not isinstance(self._source, nn.Module)

    def _build(self) -> InternVLForConditionalGeneration:
        source = self._source
        model = source if isinstance(source, InternVLForConditionalGeneration) else source()
        _check_memory(model)
        return model


class ConfiguredNetwork(NetworkLoader):
    """The network that `ModelConfig` describes, with a vocabulary that holds the tokenizer's.

    With weights from somewhere it is built without memory, and filled tensor by tensor when it is sharded: then a rank
    never holds more than its shares and one tensor. A network of random weights has them at once.

    Args:
        config: shapes, or where weights are read from.
        tokenizer: with the nine special tokens.
        seed: of whatever is random in it.
    """

    def __init__(self, config: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> None:
        super().__init__()
        self._config, self._tokenizer, self._seed = config, tokenizer, seed
        self._own: TensorSource | None = None

    @property
    def origins(self) -> dict[str, list[Part]]:
        """See `NetworkLoader`."""
        config, found = self._config, dict[str, list[Part]]()
        named: dict[Part, str | None] = {
            "vision": config.vision_path,
            "projector": config.projector_path,
            "llm": config.language_model_path,
        }
        for part, path in named.items():
            if (path or config.path) is not None:
                found.setdefault(str(path or config.path), []).append(part)
        return found

    def _build(self) -> InternVLForConditionalGeneration:
        # What is random follows from the seed alone: measuring data anew, and not finding them measured, draws numbers.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            model = self._empty() if has_weights(self._config) else self._random()
        keep_record(model.config, self._config.template)
        model.config.image_token_id = model.model.config.image_token_id = image_token_id(self._tokenizer)
        return model

    def _random(self) -> InternVLForConditionalGeneration:
        self._own = None
        return random_model(self._config, len(self._tokenizer))

    def _empty(self) -> InternVLForConditionalGeneration:
        checkpoint, config = self.opened(), self._config
        self._own, self._described_by = checkpoint.tensors, described_by(checkpoint)
        model = empty_network(checkpoint, dtype=getattr(torch, config.dtype), attention=config.attention)
        check_shapes(model, config)
        return model

    def opened(self) -> Checkpoint:
        """The weights it is read from, opened, with a row for each token; what is new in them follows from the seed.

        Raises:
            ValueError: they cannot be read.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            checkpoint = open_configured(self._config)
        text, rows = text_config(checkpoint.config), len(self._tokenizer)
        if rows <= text.vocab_size:
            return checkpoint
        std = float(getattr(text, "initializer_range", 0.02))
        text.vocab_size = rows
        return replace(checkpoint, tensors=GrownVocabulary(checkpoint.tensors, rows, std=std, seed=self._seed))

    def _check(self, model: InternVLForConditionalGeneration) -> None:
        if self._own is not None:
            check_fits(model, self._sources(), self._described_by)

    def _sources(self) -> TensorSource:
        return Combined([*([] if self._own is None else [self._own]), *self._brought])


def _check_memory(model: nn.Module) -> None:
    """What is on the meta device would be filled by nobody: the trainer takes whatever lies in memory for weights."""
    empty = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    if empty:
        raise ValueError(
            f"the network has no memory for {listed(empty)}: give one that has its weights, or a loader that reads "
            "them (ConfiguredNetwork)"
        )


def build_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0
) -> InternVLForConditionalGeneration:
    """The network that `config` describes, filled; see `ConfiguredNetwork`.

    Raises:
        ValueError: unknown fields, a tokenizer without `<IMG_CONTEXT>`, or weights that cannot be read.
    """
    loader = ConfiguredNetwork(config, tokenizer, seed=seed)
    model = loader.build()
    loader.fill(model)
    return model
