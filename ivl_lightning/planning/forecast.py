"""The forecast of a stage: sizes, memory, work, time and files; numbers only, told in `launch/forecast_lines.py`."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

from ivl_lightning.config.plan import PlanConfig
from ivl_lightning.config.schema import RunConfig
from ivl_lightning.planning.hardware import GB, GPUS, Gpu
from ivl_lightning.planning.layout import Layout, layout_of
from ivl_lightning.planning.load import Load, load_at_caps, tiles_of_pack
from ivl_lightning.planning.memory import Device, Memory, MicroBatch, forecast_memory
from ivl_lightning.planning.network import Network
from ivl_lightning.planning.work import Pace, Work, pace_of, work_of

_STEP_BYTES = 4
"""AdamW's step count of a tensor."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of a stage.

    Attributes:
        gpu: what it runs on.
        network: sizes.
        layout: ranks and types.
        load: of a step.
        memory: of a rank.
        work: of a step.
        pace: of a step.
        checkpoint: bytes of a checkpoint.
        weights: bytes of the final weights.
    """

    gpu: Gpu
    network: Network
    layout: Layout
    load: Load
    memory: Memory
    work: Work
    pace: Pace
    checkpoint: float
    weights: float

    @property
    def fits(self) -> bool:
        """Whether a rank's peak is within its memory."""
        return self.memory.peak <= self.gpu.memory

    @property
    def mfu(self) -> float:
        """Share of the peak that useful work reaches, all waiting included."""
        return self.work.useful / (self.pace.step * self.layout.ranks * self.gpu.bfloat16)


def forecast_stage(config: RunConfig, network: Network, plan: PlanConfig, load: Load | None = None) -> Forecast:
    """Forecast a stage.

    Args:
        config: of the stage, checked.
        network: its sizes.
        plan: what is taken for granted.
        load: of a step; None takes packs at their caps.
    """
    data, pairs = config.data, config.stage.rows == "pairs"
    tile_tokens = network.shapes.image_seq_length
    if load is None:
        load = load_at_caps(data, config.stage.rows, tile_tokens=tile_tokens, label_share=plan.label_share)
    layout, gpu = layout_of(config), GPUS[plan.gpu]
    online = pairs and config.preference.reference == "online"
    runs_reference = pairs and config.preference.reference in ("online", "adapter_off")
    tiles = tiles_of_pack(data, tile_tokens)
    # A pack full of tiles, whose other tokens are supervised; and one of text, supervised to the last token.
    full_packs = [
        MicroBatch(
            tokens=data.max_tokens,
            tiles=number,
            rows=data.max_tokens - number * tile_tokens,
            chunk_rows=config.preference.chunk_rows if pairs else config.loss.chunk_rows,
            pairs=pairs,
            reference=online,
        )
        for number in (tiles, 0)
    ]
    device = Device(reserve=plan.reserve_gb * GB, fragmentation=plan.fragmentation)
    work = work_of(network, load, checkpointing=layout.checkpointing, pairs=pairs, reference=runs_reference)
    pace = pace_of(
        network,
        work,
        load,
        layout,
        gpu,
        mfu=plan.mfu,
        network_speed=plan.network_gb * GB,
        host_speed=plan.host_link_gb * GB,
        reference=runs_reference,
    )
    memory = max((forecast_memory(network, layout, batch, device) for batch in full_packs), key=attrgetter("peak"))
    return Forecast(gpu, network, layout, load, memory, work, pace, checkpoint_bytes(network), network.plain)


def checkpoint_bytes(network: Network) -> float:
    """Weights and AdamW's two moments of what trains; beside adapters what is frozen is left out."""
    whole = network.whole
    weights = whole.trained if network.adapted else whole.stored
    return weights + 2 * whole.trained + _STEP_BYTES
