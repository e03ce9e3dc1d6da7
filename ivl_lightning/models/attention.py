"""Attention over a pack: a document never sees another one; answers to one prompt see it, and not each other.

Registered with transformers as `ivl_packed`. On CUDA one variable-length kernel call (torch's own, or flash-attn where
torch has none); elsewhere one scaled-dot-product call per document, which costs the sum of squared document lengths
where a dense block mask would cost the square of the whole pack. `ivl_packed_torch`, `ivl_packed_flash` and
`ivl_packed_sdpa` choose one of the three, to compare them.

Queries and keys are cut into segments. Where documents stand alone both are cut alike. Where answers share a prompt,
the keys of an answer are the prompt's and its own, gathered; the causal diagonal then ends at the bottom right, as the
variable-length kernels have it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from ivl_lightning.autocast import in_autocast_dtype

PACKED_ATTENTION = "ivl_packed"
KERNELS = {"torch": "ivl_packed_torch", "flash": "ivl_packed_flash", "sdpa": "ivl_packed_sdpa"}
"""Ways to compute it -> the name that asks for one of them."""

_HALF = (torch.bfloat16, torch.float16)
VarlenKernel = Callable[[Tensor, Tensor, Tensor, "Segments", float, int | None], Tensor]


class Segments(NamedTuple):
    """Which keys each query may see.

    Attributes:
        cu_queries: int32 `[segments + 1]`, cumulative numbers of queries.
        cu_keys: int32 `[segments + 1]`, cumulative numbers of keys; a segment has at least as many keys as queries.
        most_queries, most_keys: of one segment.
    """

    cu_queries: Tensor
    cu_keys: Tensor
    most_queries: int
    most_keys: int


def boundaries(cu_seqlens: Tensor, device: torch.device) -> dict[str, Tensor | int]:
    """Keyword arguments that carry document boundaries through transformers to the attention function.

    Args:
        cu_seqlens: int32 `[D + 1]`, cumulative lengths from 0 to L; on the CPU, so that reading the longest
            document does not wait for the device.
        device: where the kernel runs.
    """
    longest = int(cu_seqlens.diff().max())
    on_device = cu_seqlens.to(device, non_blocking=True)
    return {
        "cu_seq_lens_q": on_device,
        "cu_seq_lens_k": on_device,
        "max_length_q": longest,
        "max_length_k": longest,
        "cu_queries": cu_seqlens,
        "cu_keys": cu_seqlens,
    }


def shared_prefix_boundaries(
    cu_queries: Tensor, cu_keys: Tensor, key_rows: Tensor, device: torch.device
) -> dict[str, Tensor | int]:
    """Keyword arguments for segments that share keys; see `structures.PreferenceBatch`.

    Args:
        cu_queries: int32 `[segments + 1]`, on the CPU.
        cu_keys: int32 `[segments + 1]`, on the CPU.
        key_rows: int64 `[K]`, place in the row of each key.
        device: where the kernel runs.
    """
    return {
        "cu_seq_lens_q": cu_queries.to(device, non_blocking=True),
        "cu_seq_lens_k": cu_keys.to(device, non_blocking=True),
        "max_length_q": int(cu_queries.diff().max()),
        "max_length_k": int(cu_keys.diff().max()),
        "cu_queries": cu_queries,
        "cu_keys": cu_keys,
        "key_rows": key_rows.to(device, non_blocking=True),
    }


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    key_rows: Tensor | None = None,
    cu_queries: Tensor | None = None,
    cu_keys: Tensor | None = None,
    kernel: str | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment of a pack.

    Args:
        module: the calling attention layer.
        query: `[1, H, L, D]`.
        key: `[1, K, L, D]`, K dividing H.
        value: as key.
        attention_mask: must be None; boundaries come from `cu_seq_lens_q`.
        scaling: factor on the scores; D^-0.5 where None.
        dropout: must be 0; packed kernels of this kind have none.
        sliding_window: keys a query sees at most, itself included.
        cu_seq_lens_q: int32 `[segments + 1]`.
        cu_seq_lens_k: int32 `[segments + 1]`; as `cu_seq_lens_q` where None.
        max_length_q: queries of the longest segment.
        max_length_k: keys of the longest segment; as `max_length_q` where None.
        key_rows: int64, the rows of key and value that the segments' keys stand for; None for all, in order.
        cu_queries: as `cu_seq_lens_q`, on the CPU, where reading it does not wait for a device.
        cu_keys: as `cu_seq_lens_k`, on the CPU.
        kernel: one of `KERNELS`; None takes the best there is.

    Returns:
        `[1, L, H, D]` and None for the attention weights.

    Raises:
        ValueError: there are no boundaries, a mask was given, keys of a cache are present, or dropout is asked for.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError("packed attention needs cu_seq_lens_q: without document boundaries documents would leak")
    if attention_mask is not None:
        raise ValueError("packed attention takes cu_seq_lens_q instead of an attention mask")
    if key.shape[2] != query.shape[2]:
        raise ValueError("packed attention cannot use a cache: pass use_cache=False, or generate with sdpa")
    if dropout:
        raise ValueError(f"packed attention has no dropout, but the model asks for {dropout}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Behind the rotation queries and keys are float32 under autocast, and values are not.
    query, key, value = in_autocast_dtype(query, key, value)
    if key_rows is not None:
        key, value = key.index_select(2, key_rows), value.index_select(2, key_rows)
    cu_seq_lens_k = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
    # The kernels know half precision only; float32 on a device takes the exact path.
    if kernel != "sdpa" and query.is_cuda and query.dtype in _HALF:
        most_keys = max_length_q if max_length_k is None else max_length_k
        segments = Segments(cu_seq_lens_q, cu_seq_lens_k, max_length_q, most_keys)
        q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
        run = varlen_kernel(kernel) if kernel == "flash" or _OF_TORCH is None else _OF_TORCH
        return run(q, k, v, segments, scaling, sliding_window).unsqueeze(0), None
    cu_queries = cu_seq_lens_q if cu_queries is None else cu_queries
    cu_keys = cu_seq_lens_k if cu_keys is None else cu_keys
    return _uncompiled(query, key, value, cu_queries, cu_keys, scaling, sliding_window), None


def _per_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    scaling: float,
    window: int | None,
) -> Tensor:
    num_queries, num_keys = cu_queries.diff().tolist(), cu_keys.diff().tolist()
    parts = zip(query.split(num_queries, 2), key.split(num_keys, 2), value.split(num_keys, 2), strict=True)
    attend = partial(scaled_dot_product_attention, scale=scaling, enable_gqa=key.shape[1] != query.shape[1])
    outputs = [
        attend(q, k, v, is_causal=True)
        if q.shape[2] == k.shape[2] and (window is None or window >= k.shape[2])
        else attend(q, k, v, attn_mask=_causal_mask(q.shape[2], k.shape[2], window, q.device))
        for q, k, v in parts
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


# A compiled block would be compiled anew for each number of segments.
_uncompiled: Callable[..., Tensor] = torch.compiler.disable(_per_segment)


def _causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """The last query sees all keys, but for the window; `[queries, keys]`."""
    place = torch.arange(keys - queries, keys, device=device)
    distance = place[:, None] - torch.arange(keys, device=device)
    return (distance >= 0) & (distance < (keys if window is None else window))


@cache
def varlen_kernel(name: str | None = None) -> VarlenKernel:
    """A variable-length kernel of this machine.

    Args:
        name: `torch` or `flash`; None takes the first of them that is there.

    Raises:
        RuntimeError: it is not there.
    """
    if name != "flash" and _OF_TORCH is not None:
        return _OF_TORCH
    if name != "torch" and _is_there("flash_attn"):
        return partial(_flash_attn, importlib.import_module("flash_attn").flash_attn_varlen_func)
    wanted = {"torch": "torch>=2.11", "flash": "flash-attn (extra `flash`)"}
    missing = " or ".join(text for key, text in wanted.items() if name in (None, key))
    raise RuntimeError(f"no packed attention kernel for CUDA: install {missing}")


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _torch_kernel(varlen_attn: Callable[..., Tensor]) -> VarlenKernel:
    accepted = frozenset(inspect.signature(varlen_attn).parameters)

    def kernel(
        query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float, window: int | None
    ) -> Tensor:
        options: dict[str, object] = {}
        if "window_size" in accepted:
            options["window_size"] = (-1 if window is None else window - 1, 0)
        elif window is None or window >= segments.most_keys:
            options["is_causal"] = True
        else:
            raise ValueError(f"this torch has no sliding window of {window} in packed attention: use flash_attention_2")
        if "scale" in accepted:
            options["scale"] = scaling
        else:
            query = query * (scaling * query.shape[-1] ** 0.5)
        if "enable_gqa" in accepted:
            options["enable_gqa"] = key.shape[1] != query.shape[1]
        else:
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        return varlen_attn(query, key, value, *segments, **options)

    return kernel


def _flash_attn(
    function: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float,
    window: int | None,
) -> Tensor:
    size = (-1, -1) if window is None else (window - 1, 0)
    return function(query, key, value, *segments, softmax_scale=scaling, causal=True, window_size=size)


# Found at import: a compiled block cannot look for it while it is traced.
_OF_TORCH = (
    _torch_kernel(importlib.import_module("torch.nn.attention.varlen").varlen_attn)
    if _is_there("torch.nn.attention.varlen")
    else None
)

AttentionInterface.register(PACKED_ATTENTION, packed_attention)
for _kernel, _name in KERNELS.items():
    AttentionInterface.register(_name, partial(packed_attention, kernel=_kernel))
