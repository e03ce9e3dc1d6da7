"""Checkpoints without the weights that do not train: left out when saved, taken from the network when loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from functools import partial
from typing import Any

from torch import Tensor, nn

from ivl_lightning.checkpoints.fingerprint import check_fingerprint, fingerprint
from ivl_lightning.models.streaming import parameter_of

_KEY = "frozen_base"


class FrozenBase:
    """Frozen weights of an adapted network inside a stage; a checkpoint holds their fingerprint in their place.

    Loading stays strict: what trains must be in the checkpoint to the last name, and the fingerprint must be that of
    the network at hand.

    Args:
        names: of the frozen weights in the plain network.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(names)
        self._prints: dict[str, str] = {}

    def take(self, network: nn.Module) -> None:
        """Note the fingerprint; every rank must call it.

        Args:
            network: with its weights, before they are exchanged for 4 bits; may be sharded, or have adapters.
        """
        self._prints = fingerprint((name, parameter_of(network, name)) for name in self._names)

    def attach(self, stage: nn.Module, network: str) -> None:
        """From here on the stage's state dict leaves out what is frozen now, and loading one fills it in.

        Args:
            stage: the module whose state dict goes to checkpoints.
            network: name of the adapted network in it.
        """
        frozen = (name for name, value in stage.get_submodule(network).named_parameters() if not value.requires_grad)
        names = frozenset(f"{network}.{name}" for name in frozen)
        stage.register_state_dict_post_hook(partial(_leave_out, names))
        stage.register_load_state_dict_pre_hook(partial(_fill_in, names))

    def note(self, checkpoint: dict[str, Any]) -> None:
        """Put the fingerprint into a checkpoint."""
        checkpoint[_KEY] = dict(self._prints)

    def check_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Weights that were read once more must be those the network was built of.

        Raises:
            ValueError: they are not; names the first that differs.
        """
        now = fingerprint(tensors.items())
        check_fingerprint({name: self._prints[name] for name in now}, now, "the network was built of")

    @staticmethod
    def check(checkpoint: Mapping[str, Any], base: FrozenBase | None) -> None:
        """A checkpoint must have been saved beside this base, or beside none.

        Raises:
            ValueError: other frozen weights, or LoRA in only one of the two.
        """
        then = checkpoint.get(_KEY)
        if base is None and then is None:
            return
        if base is None or then is None:
            raise ValueError(
                f"the checkpoint was saved {'without' if then is None else 'with'} LoRA adapters, this stage has "
                f"{'none' if base is None else 'some'}: give it the same lora"
            )
        check_fingerprint(then, base._prints, "the checkpoint was saved beside")


def _leave_out(names: Set[str], stage: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for name in list(state_dict):
        if _owner(name.removeprefix(prefix)) in names:
            del state_dict[name]


def _fill_in(names: Set[str], stage: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in names:
        state_dict.setdefault(f"{prefix}{name}", stage.get_parameter(name))


def _owner(name: str) -> str:
    """The parameter a tensor of a state dict belongs to: a 4-bit weight has its scales below its own name."""
    owner, below, _ = name.partition(".weight.")
    return f"{owner}.weight" if below else name
