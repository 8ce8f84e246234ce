"""Linear layers while sampling: one product each, with weights that are copied once for all the
tokens to come.

Every token reads all weights, and what its layers do beside that counts. In fp32 the adapter is
added to copies of the weights that it adapts, in place of two more products beside each. On a CPU
these copies, and the head's, are laid out as oneDNN likes them; how much faster its products are
depends on the processor (tests/benchmarks/sampling_layers.py: 1.6 to 2.8 times as fast as torch's
on an AMD EPYC). The model itself is not changed: its layers have another `forward` for a while, so
hooks on a layer's parts do not see it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from engine.families import language_model, lm_head_weight


@contextmanager
def sampling_layers(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Run the decoder's linear layers with the active adapter as described above, and put
    everything back. Gives the product with the head, [n,H] -> [n,V] in the head's dtype. Without
    gradient.

    An adapter is merged in fp32 and above alone: bf16 would round most of its small differences
    away, and completions would be those of another model.
    """
    before: list[tuple[nn.Module, dict]] = []
    try:
        for layer in _linear_layers(language_model(model)):
            if (forward := _forward(layer)) is not None:
                before.append(
                    (layer, {name: own for name, own in vars(layer).items() if name == "forward"})
                )
                layer.forward = forward
        weight = lm_head_weight(model)
        product = _product(weight)
        yield lambda hidden: product(hidden.to(weight.dtype))
    finally:
        for layer, own in before:
            vars(layer).pop("forward", None)  # what its class says holds again
            vars(layer).update(own)


def _linear_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Linear layers, with adapters around them or without."""
    if isinstance(module, (LoraLayer, nn.Linear)):
        yield module
    else:
        for child in module.children():
            yield from _linear_layers(child)


def _forward(layer: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What a layer does in one product; None where it stays as it is."""
    if not isinstance(layer, LoraLayer):
        return _product(layer.weight, layer.bias) if _is_packable(layer.weight) else None
    base = layer.get_base_layer()
    is_plain = isinstance(base, nn.Linear) and not (
        layer.merged or layer.lora_variant or any(layer.lora_bias.values())
    )
    if not is_plain or torch.finfo(base.weight.dtype).bits < 32:
        return None
    merged = base.weight.detach()
    for name in layer.active_adapters:
        if name in layer.lora_A and not layer.disable_adapters:
            # [out,r]
            a, b = (
                part[name].weight.detach().to(merged.dtype) for part in (layer.lora_A, layer.lora_B)
            )  # [r,in]
            merged = merged + b @ a * layer.scaling[name]
    return _product(merged, base.bias)


def _product(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """x [...,in] -> x weight^T + bias [...,out]"""
    weight = weight.detach()
    if not _is_packable(weight):
        return partial(linear, weight=weight, bias=bias)
    # What torch's inductor calls for linear layers on a CPU whose number of rows varies; torch has
    # no public way to it.
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)  # a copy

    def product(x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        more = _rounded_up(rows) - rows
        if more:
            return product(pad(x.flatten(0, -2), (0, 0, 0, more)))[:rows].unflatten(0, x.shape[:-1])
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    return product


def _rounded_up(rows: int) -> int:
    """At least `rows` and at most a fourth more: one of four numbers between a power of two and the
    next.

    oneDNN compiles a kernel for every number of rows and shape of weights, and keeps a thousand, of
    half a megabyte each.
    """
    step = 2 ** max(0, rows.bit_length() - 3)
    return -(-rows // step) * step


def _is_packable(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
    )
