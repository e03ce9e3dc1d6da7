"""Checkpoints as folders, the same under every strategy: each rank writes its part, any number of ranks reads them.

Lightning's own strategies number optimizer state by place, which changes with what is frozen and with the strategy, and
write a checkpoint that is no checkpoint until its last byte. Here optimizer state goes by parameter name, so that a run
may go on under another strategy or on another number of ranks, and a folder counts once `complete.json` lies in it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.optim import Optimizer

from ivl_lightning.checkpoints.complete import faults, remove, replace_file, write_complete
from ivl_lightning.checkpoints.files import load_tensors
from ivl_lightning.checkpoints.parts import META_NAME, PartsReader, alone
from ivl_lightning.checkpoints.source import listed

_STATE, _OPTIMIZERS = "state_dict", "optimizer_states"
_TENSORS, _GROUPS, _VALUES = "state", "param_groups", "optimizer_values"


class FolderCheckpoints(Strategy):
    """Saves and loads checkpoints as folders; stands before one of Lightning's strategies.

    Attributes:
        save_behind: write while training goes on. Weights and optimizer state are copied to the CPU first.
    """

    save_behind: bool = False
    _pending: Future[Any] | None = None
    _group: dist.ProcessGroup | None = None

    # -- when Lightning loads -------------------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Parts are read into the places where parameters and optimizer state lie, so those must be there."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """`load_checkpoint` does it."""
        return False

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """`load_checkpoint` has done it."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """`load_checkpoint` has done it."""

    # -- saving ---------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's tensors by name; of sharded ones this rank's shares."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State and settings of an optimizer, by parameter name; of sharded ones this rank's shares."""
        assert self.lightning_module is not None
        return get_optimizer_state_dict(self.lightning_module, _plain(optimizer))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a folder; every rank must call it. What stands there is replaced.

        Raises:
            ValueError: storage options.
            CheckpointException, OSError: it cannot be written; with `save_behind`, or the one before could not.
        """
        if storage_options is not None:
            raise ValueError("storage_options belong to single files; checkpoints are folders here")
        self.finish_saving()
        path = Path(self.broadcast(str(filepath)))
        tensors, rest = _divided(checkpoint)
        # Now, because training changes what these values refer to.
        meta = _serialized(rest) if self.is_global_zero else b""
        if self.is_global_zero:
            remove(path)
            path.mkdir(parents=True)
        self.barrier()
        if not self.save_behind:
            with alone(self._distributed):
                self._complete(path, save(tensors, checkpoint_id=path, no_dist=not self._distributed), meta)
            return
        with alone(self._distributed):
            pending = async_save(
                tensors, checkpoint_id=path, process_group=self._saving_group(), no_dist=not self._distributed
            )
        assert isinstance(pending, Future)
        self._pending = _then(pending, lambda metadata: self._complete(path, metadata, meta))

    def finish_saving(self) -> None:
        """Wait for this rank's part in a save that goes on behind training; the first rank marks the whole.

        Raises:
            CheckpointException, OSError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _complete(self, path: Path, metadata: Metadata, meta: bytes) -> None:
        """Write what is no tensor; then the folder counts. All ranks have written their parts by now."""
        if not self.is_global_zero:
            return
        replace_file(path / META_NAME, meta)
        sizes: dict[str, int] = {META_NAME: len(meta)}
        for part in (metadata.storage_data or {}).values():
            sizes[part.relative_path] = max(sizes.get(part.relative_path, 0), part.offset + part.length)
        write_complete(path, sizes, ranks=dist.get_world_size() if self._distributed else 1)

    def _saving_group(self) -> dist.ProcessGroup | None:
        """A group of its own: messages of a save must not get among those of training."""
        if self._group is None and self._distributed:
            self._group = dist.new_group(backend="gloo")
        return self._group

    @property
    def _distributed(self) -> bool:
        return dist.is_available() and dist.is_initialized()

    def teardown(self) -> None:
        """Nothing is left half saved."""
        self.finish_saving()
        super().teardown()

    # -- loading --------------------------------------------------------------------------------------------------

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a folder into module and optimizers, whatever strategy and however many ranks have saved it.

        Returns:
            what it says besides tensors.

        Raises:
            ValueError: it is incomplete, a single file, or of other parameters; names them.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        _check(path)
        rest: dict[str, Any] = load_tensors(path / META_NAME)
        module = self.lightning_module
        assert module is not None
        state, states = module.state_dict(), [get_optimizer_state_dict(module, _plain(one)) for one in self.optimizers]
        template, _ = _divided({_STATE: state, _OPTIMIZERS: states})
        reader = PartsReader(path)
        _check_names(path, set(template), reader.names(), with_optimizers=bool(states))
        with alone(self._distributed):
            load(template, storage_reader=reader, no_dist=not self._distributed)
        module.load_state_dict({**state, **rest.pop(_STATE)}, strict=module.strict_loading)
        for number, (optimizer, values) in enumerate(zip(self.optimizers, rest.pop(_VALUES, ()), strict=False)):
            set_optimizer_state_dict(module, _plain(optimizer), _joined(template, number, values))
        return rest


def _plain(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _divided(checkpoint: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's tensors under flat names, and all else, of plain types."""
    rest = dict(checkpoint)
    state = rest.pop(_STATE)
    tensors = {f"{_STATE}.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
    rest[_STATE] = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    if _OPTIMIZERS not in rest:
        return tensors, rest
    rest[_VALUES] = []
    for number, optimizer in enumerate(rest.pop(_OPTIMIZERS)):
        others: dict[str, Any] = {_TENSORS: {}, _GROUPS: optimizer[_GROUPS]}
        for name, entries in optimizer[_TENSORS].items():
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[_entry(number, name, key)] = value
                else:
                    others[_TENSORS].setdefault(name, {})[key] = value
        rest[_VALUES].append(others)
    return tensors, rest


def _joined(tensors: Mapping[str, Tensor], number: int, values: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's state dict, by parameter name, of what `_divided` has made of it."""
    state: dict[str, dict[str, Any]] = {name: dict(entries) for name, entries in values[_TENSORS].items()}
    prefix = _entry(number, "", "")[:-1]
    for entry, tensor in tensors.items():
        if entry.startswith(prefix):
            name, _, key = entry.removeprefix(prefix).rpartition(".")
            state.setdefault(name, {})[key] = tensor
    return {_TENSORS: state, _GROUPS: values[_GROUPS]}


def _entry(number: int, name: str, key: str) -> str:
    return f"optimizer_{number}.{name}.{key}"


def _serialized(values: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    torch.save(values, stream)
    return stream.getvalue()


def _check(path: Path) -> None:
    if path.is_file():
        raise ValueError(
            f"{path} is a single file, as Lightning's own strategies write it, and this strategy reads folders: go on "
            "with the strategy that wrote it"
        )
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such checkpoint")
    if found := faults(path):
        raise ValueError(f"{path} is incomplete: {', '.join(found)}. Take an earlier one")


def _check_names(path: Path, wanted: set[str], found: set[str], *, with_optimizers: bool) -> None:
    if not with_optimizers:
        found = {name for name in found if name.startswith(f"{_STATE}.")}
    if wanted == found:
        return
    missing, surplus = listed(sorted(wanted - found)), listed(sorted(found - wanted))
    raise ValueError(
        f"{path} is of another network, or of one of which other parts train: it lacks {missing or 'nothing'} and has "
        f"besides {surplus or 'nothing'}. A checkpoint continues its own stage; to begin another one from its weights, "
        "export it (ivl-export) and give init_from"
    )


def _then(future: Future[Any], action: Any) -> Future[Any]:
    """A future of what follows another one, in the thread that ends that one."""
    following: Future[Any] = Future()

    def follow(done: Future[Any]) -> None:
        try:
            following.set_result(action(done.result()))
        except BaseException as error:  # whoever asks for the result gets it
            following.set_exception(error)

    future.add_done_callback(follow)
    return following
