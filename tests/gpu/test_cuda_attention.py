"""On a CUDA device: the variable-length kernel computes what the per-document path computes."""

import pytest
import torch

from ivl_lightning.models.attention import boundaries, packed_attention, varlen_kernel

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
    assert varlen_kernel.cache_info().currsize == 1
