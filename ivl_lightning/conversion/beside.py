"""An adapter beside the model it belongs to: for servers that load one base and many adapters."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from ivl_lightning.checkpoints.adapters import ADAPTER_CONFIG, adapter_base, is_adapter
from ivl_lightning.checkpoints.files import read_json
from ivl_lightning.checkpoints.source import CheckpointError
from ivl_lightning.config.convert import WriteConfig
from ivl_lightning.conversion.json_files import write_json
from ivl_lightning.conversion.parity import ParityReport
from ivl_lightning.conversion.write import write_checkpoint
from ivl_lightning.models.checkpoint import open_checkpoint

BESIDE: Final = "adapter"


def write_beside(adapter: Path, config: WriteConfig) -> ParityReport:
    """Write the base model as `write_checkpoint` does, and in its subfolder `adapter` the adapter, as it is.

    Args:
        adapter: folder in peft's format.
        config: where to and how; layout `hf`, whose names the adapter has.

    Returns:
        The comparison of the base model; an adapter's files are copied byte for byte.

    Raises:
        CheckpointError: there is no adapter, or its base cannot be had.
        ValueError: as `write_checkpoint`.
    """
    if not is_adapter(adapter):
        raise CheckpointError(
            f"adapter=beside: {adapter} holds no adapter; the stage trained without LoRA, or is not done"
        )
    if config.layout != "hf":
        raise ValueError(f"adapter=beside with layout={config.layout}: an adapter has the names of layout=hf")
    target = Path(config.target)

    def add_adapter(folder: Path) -> None:
        shutil.copytree(adapter, folder / BESIDE)
        values = read_json(adapter / ADAPTER_CONFIG)
        write_json(folder / BESIDE / ADAPTER_CONFIG, {**values, "base_model_name_or_path": str(target.absolute())})

    return write_checkpoint(open_checkpoint(adapter_base(adapter)), config, also=add_adapter)
