"""Pad attention heads with zeros to a width that vLLM's CPU kernels have: a plug-in of vLLM.

The demo's heads are 40 wide, and the kernels know 32 and 64. It is exact: the scale is given, zeros
add nothing to a product of query and key, and what they add to the values is cut off. GPU kernels
take 40, so this is for checks on a CPU alone. It is installed beside vLLM, never beside the engine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of vLLM 0.32's CPU backend


def register() -> None:
    """Make vLLM's attention layers pad. vLLM calls this in each of its processes, maybe twice."""
    from vllm.model_executor.layers.attention.attention import Attention

    if getattr(Attention, "pads_heads", False):
        return
    init, forward = Attention.__init__, Attention.forward

    def padded_init(self: Any, num_heads: int, head_size: int, *more: Any, **options: Any) -> None:
        width = next((width for width in WIDTHS if width >= head_size), head_size)
        init(self, num_heads, width, *more, **options)
        self.own_width, self.missing = head_size, width - head_size

    def padded_forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output_shape: torch.Size | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> Tensor:
        if not self.missing:
            return forward(self, query, key, value, output_shape, output_dtype)
        q, k, v = (_padded(rows, self.own_width, self.missing) for rows in (query, key, value))
        heads = forward(self, q, k, v, None, output_dtype)
        heads = heads.unflatten(-1, (-1, self.own_width + self.missing))
        return heads[..., : self.own_width].flatten(-2)

    Attention.pads_heads = True
    Attention.__init__, Attention.forward = padded_init, padded_forward


def _padded(rows: Tensor, width: int, missing: int) -> Tensor:
    """Append zeros to every head: rows [N, heads * width] -> [N, heads * (width + missing)]."""
    heads = rows.reshape(len(rows), -1, width)
    return torch.nn.functional.pad(heads, (0, missing)).flatten(1)
