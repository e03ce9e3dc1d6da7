"""Token ids of an answer while it is made: generation in a thread, read by the caller."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from ivl_lightning.inference.generate import generate
from ivl_lightning.models.parts import language_layers, vision_layers, vision_tower
from ivl_lightning.structures import PromptBatch


class _StoppedError(Exception):
    """Nobody reads the answer any more."""


class _Tokens(BaseStreamer):
    """Takes the new tokens of one answer from the library."""

    def __init__(self, queue: SimpleQueue[int | BaseException | None]) -> None:
        self._queue = queue
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """Called with the prompt first, which is empty where embeddings are given, then with each token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.flatten().tolist():
            self._queue.put(token)

    def end(self) -> None:
        """Nothing: the thread says when it ends, also by an error."""


def stream_ids(
    internvl: InternVLForConditionalGeneration, prompt: PromptBatch, *, seed: int | None = None, **options: Any
) -> Generator[int, None, None]:
    """New token ids of one prompt, each as soon as it is known.

    The end marker is among them. Closing the iterator, or an interrupt while it waits, stops the network before its
    next layer; the iterator ends when it has stopped.

    Args:
        internvl: the network; nobody else may use it meanwhile.
        prompt: one question, on the network's input device.
        seed: of the random numbers of this answer, whatever was drawn before it; None takes torch's own.
        **options: as `generate`.

    Raises:
        Exception: what generation raises, as it is.
    """
    queue: SimpleQueue[int | BaseException | None] = SimpleQueue()
    stop, stopped = threading.Event(), threading.Event()

    def run() -> None:
        try:
            with torch.inference_mode(), _seeded(seed), _stopped_by(stop, internvl):
                generate(internvl, prompt, streamer=_Tokens(queue), **options)
        # Broad on purpose: whatever it is, it is raised again where the answer is read.
        except BaseException as error:
            queue.put(error)
        finally:
            queue.put(None)
            stopped.set()

    threading.Thread(target=run, name="answer").start()
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        # Not `join`: interrupted once more, Python 3.11 would take the thread for ended, and pull down what it runs on.
        stopped.wait()


@contextmanager
def _stopped_by(stop: threading.Event, internvl: InternVLForConditionalGeneration) -> Iterator[None]:
    """Between layers, not only between tokens: a long prompt takes minutes on a CPU."""

    def check(*_: object) -> None:
        if stop.is_set():
            raise _StoppedError

    layers: list[nn.Module] = [*vision_layers(vision_tower(internvl)), *language_layers(internvl)]
    handles = [layer.register_forward_pre_hook(check) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Random numbers of one answer; the caller's go on afterwards."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
