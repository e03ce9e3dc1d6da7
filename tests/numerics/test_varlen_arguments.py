"""What the variable-length kernels are told. None runs on a CPU: stand-ins with their signatures compute by a mask.

A kernel promises: query i of a segment of q queries and k keys sees key j where j <= i + k - q, so that the diagonal
ends at the bottom right, and with a window that reaches w to the left j >= i + k - q - w.
"""

import inspect
import itertools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ivl_lightning.models.attention import Segments, _flash_attn, _torch_kernel, packed_attention, varlen_kernel
from tests.gpu.equality import LAYOUTS


def dense(query, key, value, cu_queries, cu_keys, *, left, scale):
    """`[L, H, D]` by the promise; heads of query and key may differ."""
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
    outputs = []
    for (a, b), (c, d) in zip(
        itertools.pairwise(cu_queries.tolist()), itertools.pairwise(cu_keys.tolist()), strict=True
    ):
        scores = torch.einsum("qhd,khd->hqk", query[a:b], key[c:d]) * scale
        distance = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
        seen = (distance >= 0) & (distance <= (d - c if left < 0 else left))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, value[c:d]))
    return torch.cat(outputs)


def newest(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """torch 2.13: causal is a window of (-1, 0), and unequal heads have to be announced."""
    assert window_size[1] == 0
    assert enable_gqa == (q.shape[1] != k.shape[1])
    assert max_q == int(cu_q.diff().max())
    assert max_k == int(cu_k.diff().max())
    return dense(q, k, v, cu_q, cu_k, left=window_size[0], scale=scale)


def without_grouped_heads(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """torch 2.11."""
    assert window_size[1] == 0
    assert q.shape[1] == k.shape[1] == v.shape[1]
    return dense(q, k, v, cu_q, cu_k, left=window_size[0], scale=scale)


def oldest(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False):
    """Before windows and scale: scores are scaled by D^-0.5."""
    assert is_causal
    return dense(q, k, v, cu_q, cu_k, left=-1, scale=q.shape[-1] ** -0.5)


def flash(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size):
    """flash-attn 2."""
    assert causal
    return dense(q, k, v, cu_q, cu_k, left=window_size[0], scale=softmax_scale)


KERNELS = {
    "newest torch": _torch_kernel(newest),
    "torch without grouped heads": _torch_kernel(without_grouped_heads),
    "oldest torch": _torch_kernel(oldest),
    "flash-attn": lambda *arguments: _flash_attn(flash, *arguments),
}


def tensors_of(layout):
    torch.manual_seed(0)
    return [torch.randn(1, heads, sum(layout.queries), 8) for heads in (4, 2, 2)]


@pytest.mark.parametrize("name", list(KERNELS))
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_kernel_is_told_what_the_exact_path_computes(name, layout):
    """Documents, a window of 7, and answers that share a prompt; a scale of its own."""
    shape = LAYOUTS[layout]
    query, key, value = tensors_of(shape)
    arguments = shape.arguments(query.device)
    wanted = packed_attention(nn.Identity(), query, key, value, None, scaling=0.3, **arguments)[0][0]
    if shape.key_rows is not None:
        key, value = (tensor.index_select(2, arguments["key_rows"]) for tensor in (key, value))
    segments = Segments(
        *(arguments[name] for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"))
    )
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    if name == "oldest torch" and shape.window is not None:
        with pytest.raises(ValueError, match="no sliding window of 7"):
            KERNELS[name](*rows, segments, 0.3, shape.window)
        return
    torch.testing.assert_close(KERNELS[name](*rows, segments, 0.3, shape.window), wanted, atol=1e-5, rtol=1e-4)


def test_the_installed_torch_accepts_the_call():
    """Its own `varlen_attn`, on tensors without memory: names and order of the arguments are those of this version."""
    shape = LAYOUTS["shared prefix"]
    query, key, value = (tensor[0].transpose(0, 1).to("meta") for tensor in tensors_of(shape))
    key, value = (tensor.new_empty(sum(shape.keys), *tensor.shape[1:]) for tensor in (key, value))
    cu_queries, cu_keys = (torch.empty(len(shape.keys) + 1, dtype=torch.int32, device="meta") for _ in range(2))
    segments = Segments(cu_queries, cu_keys, max(shape.queries), max(shape.keys))
    output = varlen_kernel("torch")(query, key, value, segments, 0.3, None)
    assert output.shape == query.shape
    assert "window_size" in inspect.signature(torch.nn.attention.varlen.varlen_attn).parameters


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_compiled_block_runs_through_the_kernel(layout):
    """Traced whole, on CUDA tensors that have a device and no memory: nothing in the path makes the compiler stop."""
    shape = LAYOUTS[layout]
    arguments = shape.arguments(torch.device("cpu"))
    with FakeTensorMode():
        query, key, value = (
            torch.empty(1, heads, sum(shape.queries), 64, device="cuda", dtype=torch.bfloat16) for heads in (14, 2, 2)
        )
        moved = {
            name: torch.empty(value.shape, dtype=value.dtype, device="cuda")
            for name, value in arguments.items()
            if isinstance(value, torch.Tensor) and name not in ("cu_queries", "cu_keys")
        }

        @torch.compile(backend="eager", fullgraph=True)
        def attend(query, key, value):
            return packed_attention(nn.Identity(), query, key, value, None, **arguments | moved)[0] * 2

        output = attend(query, key, value)
    assert output.shape == (1, sum(shape.queries), 14, 64)
    assert output.device.type == "cuda"


def test_a_kernel_that_is_missing_is_named():
    with pytest.raises(RuntimeError, match=r"install flash-attn \(extra `flash`\)$"):
        varlen_kernel("flash")


def test_under_autocast_all_three_are_in_half_precision():
    """The rotation makes float32 of queries and keys there; the kernels take one type for all."""
    shape = LAYOUTS["documents"]
    query, key, value = tensors_of(shape)
    arguments = shape.arguments(query.device)
    with torch.autocast("cpu", torch.bfloat16):
        output = packed_attention(nn.Identity(), query, key, value.bfloat16(), None, **arguments)[0]
    wanted = packed_attention(nn.Identity(), *(t.bfloat16() for t in (query, key, value)), None, **arguments)[0]
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, wanted)
