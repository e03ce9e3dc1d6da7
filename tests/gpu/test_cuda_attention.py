"""On a CUDA device: the variable-length kernel computes what the per-document path computes."""

import pytest
import torch

from ivl_lightning.models.attention import (
    boundaries,
    packed_attention,
    shared_prefix_boundaries,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("window", [None, 7])
def test_kernel_equals_per_document(window):
    """Three documents, grouped keys, bf16 on the device against float32 on the CPU."""
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 60, 64), torch.randn(1, 2, 60, 64), torch.randn(1, 2, 60, 64)
    cu = torch.tensor([0, 11, 40, 60], dtype=torch.int32)
    layer = torch.nn.Identity()
    wanted, _ = packed_attention(
        layer, query, key, value, None, sliding_window=window, **boundaries(cu, torch.device("cpu"))
    )
    inputs = [tensor.cuda().bfloat16() for tensor in (query, key, value)]
    found, _ = packed_attention(layer, *inputs, None, sliding_window=window, **boundaries(cu, torch.device("cuda")))
    torch.testing.assert_close(found.float().cpu(), wanted, atol=3e-2, rtol=3e-2)


def test_kernel_equals_per_segment_where_answers_share_a_prompt():
    """Two pairs: queries [P, C, R], keys [P, P + C, P + R], the causal diagonal ending at the bottom right.

    A kernel that aligned the diagonal at the top left would let the first token of an answer see one key.
    """
    torch.manual_seed(0)
    lengths = [(5, 3, 2), (200, 70, 90)]
    queries, keys, rows, start = [], [], [], 0
    for prompt, chosen, rejected in lengths:
        seen = list(range(start, start + prompt))
        answers = [
            list(range(start + prompt, start + prompt + chosen)),
            list(range(start + prompt + chosen, start + prompt + chosen + rejected)),
        ]
        queries += [prompt, chosen, rejected]
        keys += [prompt, *(prompt + len(own) for own in answers)]
        rows += [*seen, *(row for own in answers for row in (*seen, *own))]
        start += prompt + chosen + rejected
    cu_queries, cu_keys = (torch.tensor([0, *counts]).cumsum(0).int() for counts in (queries, keys))
    q, k, v = (torch.randn(1, heads, start, 64) for heads in (8, 2, 2))
    key_rows = torch.tensor(rows)
    wanted = packed_attention(
        torch.nn.Identity(), q, k, v, None, **shared_prefix_boundaries(cu_queries, cu_keys, key_rows, q.device)
    )[0]
    halves = [tensor.to("cuda", torch.bfloat16) for tensor in (q, k, v)]
    arguments = shared_prefix_boundaries(cu_queries, cu_keys, key_rows, halves[0].device)
    found = packed_attention(torch.nn.Identity(), *halves, None, **arguments)[0]
    torch.testing.assert_close(found.float().cpu(), wanted, atol=2e-2, rtol=2e-2)
