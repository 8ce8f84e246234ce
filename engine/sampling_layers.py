"""Run the decoder in few operations while sampling, with weights prepared once.

Every token reads all weights, so whatever a layer does beside its product counts. In fp32 the
adapter is added to a copy of the weight that it adapts, which saves two products a layer. On a CPU
these copies, and the head's, are laid out for the product that reads them: oneDNN's or torch's.
Which is faster depends on the processor and the model's size, so a run measures both
(engine/sampling_product.py). The model itself is not changed. Its layers have another `forward` for
a while, so hooks on a layer's parts do not see these products.

Whole decoder layers run in few operations (engine/token_layers.py), with products of this module
where the adapter is merged: one for q, k and v together, and one for gate and up. In layers that
stay transformers' every linear layer has a product of its own.

The copies take about as much memory as the decoder. Where they do not fit (engine/fit.py) the
layers stay as they are, with the adapter beside them: the same completions but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from engine.families import language_model, lm_head_weight
from engine.settings import SamplingProduct
from engine.token_layers import Placed, Products, as_made, base_of, token_layers


@contextmanager
def sampling_layers(
    net: nn.Module,
    *,
    copies: bool = True,
    kind: SamplingProduct = "auto",
    placed: Placed = as_made,
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Run the decoder in few operations, and put everything back afterwards.

    Gives the product with the head, [n,H] -> [n,V] in the head's dtype. No gradient flows.

    copies: False to copy no weight: the adapter stays beside its weights.
    kind: of the products of fp32 weights on a CPU. They are oneDNN's where torch has it, but for
        "torch".
    placed: puts what is prepared, but for copies of weights, where the last call had it.

    An adapter is merged only in fp32 and above. In bf16 most of its small differences would be
    rounded away, and the completions would be those of another model.
    """
    decoder, weight = language_model(net), lm_head_weight(net)
    merged = partial(merged_products, kind=kind) if decoder.dtype == torch.float32 else None
    before: list[tuple[nn.Module, dict]] = []
    with token_layers(net, merged if copies else None, placed) as taken:
        try:
            for layer in _linear_layers(decoder, taken) if copies else ():
                if (forward := _forward(layer, kind)) is not None:
                    own = {name: own for name, own in vars(layer).items() if name == "forward"}
                    before.append((layer, own))
                    layer.forward = forward
            head = product(weight, None, kind) if copies else partial(linear, weight=weight)
            yield lambda hidden: head(hidden.to(weight.dtype))
        finally:
            for layer, own in before:
                vars(layer).pop("forward", None)  # so that its class's forward runs again
                vars(layer).update(own)


def merged_products(layers: Sequence[nn.Module], kind: SamplingProduct) -> Products:
    """Multiply in one product with layers that read the same input, adapters merged.

    layers: as engine/token_layers.py knows them, in fp32.
    """
    bases = [base for layer in layers if (base := base_of(layer)) is not None]
    weights: list[Tensor] = [
        _merged(layer, base) for layer, base in zip(layers, bases, strict=True)
    ]
    biases: list[Tensor] = [
        weight.new_zeros(len(weight)) if base.bias is None else base.bias
        for base, weight in zip(bases, weights, strict=True)
    ]
    has_bias = any(base.bias is not None for base in bases)
    one = product(torch.cat(weights), torch.cat(biases) if has_bias else None, kind)

    def products(x: Tensor, residual: Tensor | None) -> Tensor:
        output = one(x)
        return output if residual is None else output.add_(residual)

    return products


def _linear_layers(module: nn.Module, taken: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """Find the linear layers, with or without adapters around them, outside of `taken`."""
    if isinstance(module, (LoraLayer, nn.Linear)):
        yield module
    elif not any(module is other for other in taken):
        for child in module.children():
            yield from _linear_layers(child, taken)


def _forward(layer: nn.Module, kind: SamplingProduct) -> Callable[[Tensor], Tensor] | None:
    """Return the layer's one-product forward, or None where the layer stays as it is."""
    if isinstance(layer, nn.Linear):
        return product(layer.weight, layer.bias, kind) if _is_copied(layer.weight) else None
    if not isinstance(layer, LoraLayer):
        return None
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear):
        return None
    is_plain = not (layer.merged or layer.lora_variant or any(layer.lora_bias.values()))
    if not is_plain or torch.finfo(base.weight.dtype).bits < 32:
        return None
    return product(_merged(layer, base), base.bias, kind)


def _merged(layer: nn.Module, base: nn.Linear) -> Tensor:
    """Return the base's weight, with the adapters that act beside it added in a copy."""
    merged = base.weight.detach()
    if not isinstance(layer, LoraLayer) or layer.merged or layer.disable_adapters:
        return merged
    for name in layer.active_adapters:
        if name in layer.lora_A:
            a, b = (
                part[name].get_parameter("weight").detach().to(merged.dtype)
                for part in (layer.lora_A, layer.lora_B)
            )  # [r,in], [out,r]
            merged = merged + b @ a * layer.scaling[name]
    return merged


def product(
    weight: Tensor, bias: Tensor | None, kind: SamplingProduct
) -> Callable[[Tensor], Tensor]:
    """Return x [...,in] -> x weight^T + bias [...,out], with a copy of the weight laid out once."""
    weight = weight.detach()
    if not _is_copied(weight):
        return partial(linear, weight=weight, bias=bias)
    if kind == "torch" or not torch.backends.mkldnn.is_available():
        # Of few rows torch's product is faster where the weights of one input lie side by side.
        return partial(linear, weight=weight.t().contiguous().t(), bias=bias)
    # torch's inductor calls these two operators for linear layers on a CPU whose number of rows
    # varies. torch has no public way to them.
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)  # a copy

    def packed_product(x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        more = _rounded_up(rows) - rows
        if more:
            padded = packed_product(pad(x.flatten(0, -2), (0, 0, 0, more)))
            return padded[:rows].unflatten(0, x.shape[:-1])
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    return packed_product


def _rounded_up(rows: int) -> int:
    """Round a number of rows up, by at most a fourth, to one of four numbers per power of two.

    oneDNN compiles a kernel for every number of rows and shape of weights, and keeps a thousand of
    them, half a megabyte each.
    """
    step = 2 ** max(0, rows.bit_length() - 3)
    return -(-rows // step) * step


def _is_copied(weight: Tensor) -> bool:
    """Tell whether a weight is worth a copy that is laid out for its product."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32
