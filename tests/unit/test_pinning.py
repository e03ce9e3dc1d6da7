"""A loader that feeds a GPU puts a batch into pinned memory: all of it, but for what stays with the CPU."""

import dataclasses

import numpy as np
import torch

from tests import tiny


class Unpinned:
    """Stands for a tensor: pinning needs a device."""

    def __init__(self, name):
        self.name = name

    def pin_memory(self):
        return f"pinned {self.name}"


def test_all_tensors_but_boundaries_are_pinned():
    rng = np.random.default_rng(0)
    packed = tiny.pack([tiny.random_document(rng, 9, tiles=1)])
    pair = tiny.pair_batch([tiny.random_pair(rng, 9, 5, 7)])
    for batch, boundaries in ((packed, {"cu_seqlens"}), (pair, {"cu_seqlens", "cu_queries", "cu_keys"})):
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        tensors = {name for name, value in fields.items() if isinstance(value, torch.Tensor)}
        pinned = dataclasses.replace(batch, **{name: Unpinned(name) for name in tensors}).pin_memory()
        assert type(pinned) is type(batch)
        assert {name for name in tensors if getattr(pinned, name) == f"pinned {name}"} == tensors - boundaries
        assert all(getattr(pinned, name) is fields[name] for name in fields.keys() - tensors)
