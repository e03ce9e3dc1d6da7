"""Training on pictures from a web server that stops sending one of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from ivl_lightning.callbacks.watchdog import Watchdog
from ivl_lightning.config.schema import StrategyConfig
from ivl_lightning.data.datamodule import DynamicPackingDataModule
from ivl_lightning.stages.mlp_warmup import MLPWarmup
from ivl_lightning.strategies.build import build_strategy
from tests import tiny

STALLED_PICTURE, STALLED_ROW = "7.png", "pictures.jsonl:8"
SWITCH = "hang"


@contextmanager
def slow_server(folder: Path, *, seconds: float) -> Iterator[str]:
    """Serves a folder; once a file `hang` is in it, one picture gets so many seconds late behind its first bytes.

    Yields:
        Its address.
    """

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def copyfile(self, source: Any, outputfile: Any) -> None:
            if self.path.endswith(STALLED_PICTURE) and (folder / SWITCH).exists():
                outputfile.write(source.read(20))
                outputfile.flush()
                time.sleep(seconds)
            super().copyfile(source, outputfile)

    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *given: Handler(*given, directory=str(folder)))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


class Switch(Callback):
    """All rows have been measured: from here on the picture is late."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.barrier()
        (Path(trainer.default_root_dir) / "data" / SWITCH).touch()


def fit(folder: Path, watchdog: Watchdog, *, ranks: int, workers: int) -> L.Trainer:
    """An epoch over `folder/data`."""
    config = tiny.tiny_data_config(
        folder / "data/meta.json", allowed_schemes=["http"], num_workers=workers, packs_per_step=2
    )
    tokenizer = tiny.load_tiny_tokenizer()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=build_strategy(
            StrategyConfig(name="single" if ranks == 1 else "ddp"), num_ranks=ranks, accelerator="cpu"
        ),
        default_root_dir=folder,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watchdog, Switch()],
    )
    stage = MLPWarmup(lambda: tiny.build_tiny_model(tokenizer))
    trainer.fit(stage, DynamicPackingDataModule(config, tokenizer, patch_size=tiny.PATCH_SIZE))
    return trainer
