"""Each attention kernel against the path that is known to be right: one float32 product per document.

Half precision rounds, so nothing is equal to the bit. A kernel passes where its largest error against float32 is at
most twice that of the per-document path in bfloat16, plus 1 % of the largest value: as flash-attn's own tests have it.
A causal diagonal that ended at the top left, where the kernels' ends at the bottom right, must fail by ten times that,
or the measure would show nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ivl_lightning.losses.next_token import NextTokenLoss
from ivl_lightning.models.attention import KERNELS, boundaries, packed_attention, shared_prefix_boundaries
from ivl_lightning.models.last_layer import select_in_last_layer
from ivl_lightning.stages.root import InternVLWithLogps, InternVLWithLoss
from tests.gpu.scale import Scale, network, packed, pairs

TIMES, SHARE = 2.0, 0.01


@dataclass(frozen=True, slots=True)
class Layout:
    """Segments of a row of tokens.

    Attributes:
        queries, keys: lengths of each segment.
        key_rows: rows of its keys; None where they are its queries.
        window: of sliding attention.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    key_rows: tuple[int, ...] | None = None
    window: int | None = None

    def arguments(self, device: torch.device) -> dict[str, Any]:
        cu_queries, cu_keys = (torch.tensor([0, *counts]).cumsum(0).int() for counts in (self.queries, self.keys))
        if self.key_rows is None:
            return {**boundaries(cu_queries, device), "sliding_window": self.window}
        return shared_prefix_boundaries(cu_queries, cu_keys, torch.tensor(self.key_rows), device)


def shared_prefixes(lengths: tuple[tuple[int, int, int], ...]) -> Layout:
    """Of pairs of prompt, chosen and rejected answer; both answers see the prompt and not each other."""
    queries: list[int] = []
    keys: list[int] = []
    rows: list[int] = []
    start = 0
    for prompt, chosen, rejected in lengths:
        seen = range(start, start + prompt)
        first = range(start + prompt, start + prompt + chosen)
        second = range(first.stop, first.stop + rejected)
        queries += [prompt, chosen, rejected]
        keys += [prompt, prompt + chosen, prompt + rejected]
        rows += [*seen, *seen, *first, *seen, *second]
        start = second.stop
    return Layout(tuple(queries), tuple(keys), tuple(rows))


LAYOUTS = {
    "documents": Layout((1, 11, 640, 300, 72), (1, 11, 640, 300, 72)),
    "sliding window": Layout((11, 290, 60), (11, 290, 60), window=7),
    "shared prefix": shared_prefixes(((5, 3, 2), (200, 70, 90), (513, 1, 129))),
}


def attention_of(layout: Layout, device: torch.device) -> Callable[..., list[Tensor]]:
    """What computes output and gradients of query, key and value, 14 heads over 2."""
    torch.manual_seed(3)
    length = sum(layout.queries)
    tensors = [torch.randn(1, heads, length, 64) for heads in (14, 2, 2)]
    upstream = torch.randn(1, length, 14, 64)

    def compute(kernel: str, dtype: torch.dtype, *, top_left: bool = False) -> list[Tensor]:
        inputs = [tensor.to(device, dtype, copy=True).requires_grad_() for tensor in tensors]
        shown = layout if not top_left else top_left_aligned(layout)
        output = packed_attention(nn.Identity(), *inputs, None, kernel=kernel, **shown.arguments(device))[0]
        output.backward(upstream.to(device, dtype))
        return [tensor.detach().float() for tensor in (output, *(one.grad for one in inputs))]

    return compute


def top_left_aligned(layout: Layout) -> Layout:
    """What a kernel would compute whose diagonal ends at the top left: query i of a segment sees its keys 0 to i."""
    assert layout.key_rows is not None
    rows, start = [], 0
    for queries, keys in zip(layout.queries, layout.keys, strict=True):
        rows += layout.key_rows[start : start + queries]
        start += keys
    return replace(layout, keys=layout.queries, key_rows=tuple(rows))


def network_of(scale: Scale, device: torch.device, *, preference: bool) -> Callable[..., list[Tensor]]:
    """What computes loss (or log-probabilities) and all gradients of a network of two layers."""
    shallow = {"num_hidden_layers": 2}
    config = replace(scale, vision=scale.vision | shallow, language=scale.language | shallow).config()
    batch = (pairs if preference else packed)(config, (3, 1, 0, 0), scale.text)

    def compute(kernel: str, dtype: torch.dtype) -> list[Tensor]:
        model = network(config, KERNELS[kernel], device).to(dtype)
        select_in_last_layer(model)
        moved = batch.to(device)
        if preference:
            root: nn.Module = InternVLWithLogps(model, always_run_vision=True)
            output = root(moved)
            output.mean().backward()
        else:
            root = InternVLWithLoss(model, NextTokenLoss(), always_run_vision=True)
            output = root(moved)[0]
            output.backward()
        gradients = [parameter.grad.float().flatten() for parameter in model.parameters()]
        return [output.detach().float(), torch.cat(gradients)]

    return compute


def compare(compute: Callable[..., list[Tensor]], kernel: str) -> dict[str, Any]:
    """Largest errors of a kernel and of the per-document path in bfloat16, against float32, in shares of the largest.

    Returns:
        `errors` and `allowed`, one for the output and for each gradient, and `equal`.
    """
    reference = compute("sdpa", torch.float32)
    plain, found = (compute(name, torch.bfloat16) for name in ("sdpa", kernel))
    errors, usual = errors_of(found, reference), errors_of(plain, reference)
    allowed = [TIMES * error + SHARE for error in usual]
    return {"errors": errors, "allowed": allowed, "equal": all(e <= a for e, a in zip(errors, allowed, strict=True))}


def errors_of(found: list[Tensor], reference: list[Tensor]) -> list[float]:
    pairs_of = zip(found, reference, strict=True)
    return [float((one - other).abs().max() / other.abs().max().clamp_min(1e-30)) for one, other in pairs_of]


def control(device: torch.device) -> dict[str, Any]:
    """The wrong diagonal, in float32: by how much it fails. `equal` says that it is seen."""
    compute = attention_of(LAYOUTS["shared prefix"], device)
    right, wrong = (compute("sdpa", torch.float32, top_left=flag) for flag in (False, True))
    error = errors_of(wrong, right)[0]
    return {"errors": [error], "allowed": [10 * SHARE], "equal": error > 10 * SHARE}
