"""Speed up linear layers while sampling: one product each, with weights prepared once.

Every token reads all weights, so whatever a layer does beside its product counts. In fp32 the
adapter is added to a copy of the weight that it adapts, which saves two products a layer. On a CPU
these copies, and the head's, are laid out as oneDNN likes them. How much faster oneDNN's products
are depends on the processor (tests/benchmarks/sampling_layers.py measured 1.6 to 2.8 times torch's
speed on an AMD EPYC). The model itself is not changed. Its layers have another `forward` for a
while, so hooks on a layer's parts do not see these products.

The copies take about as much memory as the decoder. Where they do not fit (engine/fit.py) the
layers stay as they are, with the adapter beside them: the same completions but for rounding.
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
def sampling_layers(net: nn.Module, *, copies: bool = True) -> Iterator[Callable[[Tensor], Tensor]]:
    """Run the decoder's linear layers in one product each, and put everything back afterwards.

    Gives the product with the head, [n,H] -> [n,V] in the head's dtype. No gradient flows.

    copies: False to copy no weight, which leaves every layer as it is.

    An adapter is merged only in fp32 and above. In bf16 most of its small differences would be
    rounded away, and the completions would be those of another model.
    """
    before: list[tuple[nn.Module, dict]] = []
    try:
        for layer in _linear_layers(language_model(net)) if copies else ():
            if (forward := _forward(layer)) is not None:
                before.append(
                    (layer, {name: own for name, own in vars(layer).items() if name == "forward"})
                )
                layer.forward = forward
        weight = lm_head_weight(net)
        product = _product(weight) if copies else partial(linear, weight=weight)
        yield lambda hidden: product(hidden.to(weight.dtype))
    finally:
        for layer, own in before:
            vars(layer).pop("forward", None)  # so that its class's forward runs again
            vars(layer).update(own)


def _linear_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Find the linear layers, with or without adapters around them."""
    if isinstance(module, (LoraLayer, nn.Linear)):
        yield module
    else:
        for child in module.children():
            yield from _linear_layers(child)


def _forward(layer: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return the layer's one-product forward, or None where the layer stays as it is."""
    if isinstance(layer, nn.Linear):
        return _product(layer.weight, layer.bias) if _is_packable(layer.weight) else None
    if not isinstance(layer, LoraLayer):
        return None
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear):
        return None
    is_plain = not (layer.merged or layer.lora_variant or any(layer.lora_bias.values()))
    if not is_plain or torch.finfo(base.weight.dtype).bits < 32:
        return None
    merged = base.weight.detach()
    for name in layer.active_adapters:
        if name in layer.lora_A and not layer.disable_adapters:
            a, b = (
                part[name].get_parameter("weight").detach().to(merged.dtype)
                for part in (layer.lora_A, layer.lora_B)
            )  # [r,in], [out,r]
            merged = merged + b @ a * layer.scaling[name]
    return _product(merged, base.bias)


def _product(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Return x [...,in] -> x weight^T + bias [...,out], with the weight laid out once."""
    weight = weight.detach()
    if not _is_packable(weight):
        return partial(linear, weight=weight, bias=bias)
    # torch's inductor calls these two operators for linear layers on a CPU whose number of rows
    # varies. torch has no public way to them.
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)  # a copy

    def product(x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        more = _rounded_up(rows) - rows
        if more:
            return product(pad(x.flatten(0, -2), (0, 0, 0, more)))[:rows].unflatten(0, x.shape[:-1])
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    return product


def _rounded_up(rows: int) -> int:
    """Round a number of rows up, by at most a fourth, to one of four numbers per power of two.

    oneDNN compiles a kernel for every number of rows and shape of weights, and keeps a thousand of
    them, half a megabyte each.
    """
    step = 2 ** max(0, rows.bit_length() - 3)
    return -(-rows // step) * step


def _is_packable(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
    )
