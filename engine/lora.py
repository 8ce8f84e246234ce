"""Compute linear layers with LoRA in few products, for policy, reference and sampler alike.

y = x W^T + b + s (x A^T) B^T, with W frozen and fp32 masters A and B. peft's own layer runs its two
products in fp32, and so casts, scales and adds tensors of all tokens. Here A and B are rounded to
the dtype of x, which costs nothing a token, and the second product is added to the base's output in
place. Layers that read the same input (q, k and v; gate and up) share one product with their A
stacked, and one gradient of x.

What LoRA alone moves beside the base's products, in bytes a token and forward, bf16:

    peft   for each layer 10 in + 8 r + 28 out: x is read and written in fp32 (2 + 4) and read (4),
           x A^T is written and read, its product with B written (4), scaled (4 + 4), added to the
           base's output (2 + 4 + 4) and rounded (4 + 2)
    here   for each input 2 in: x is read once for all its layers; for each layer 4 r + 4 out: the
           output is read and written once more

Over the 34 layers of Gemma 3 4B with r 16 that is 36.8 MB and 5.2 MB, over the 36 of Qwen2.5-VL 3B
37.3 MB and 5.4 MB.

Everything that is not plain LoRA on an ordinary linear layer runs peft's own forward: DoRA and
other variants, biases of LoRA, several adapters at once, merged weights, quantised layers, hooks
inside a layer, autocast.

Shapes: M tokens (any leading dimensions), r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from engine.families import SHARED_INPUTS, language_model
from engine.out_of_memory import HOLDERS

DTYPES = (torch.bfloat16, torch.float32, torch.float64)  # fp16 could lose small gradients of A


def fuse_adapters(net: nn.Module) -> None:
    """Let the decoder's layers with LoRA compute as this module does, for the model's life.

    They stay peft's layers, of a subclass: weights, names, files and methods are as before.

    net: a model in peft's wrapper.
    """
    for parent in language_model(net).modules():
        layers: dict[str, LoraLinear] = {}
        for name, layer in parent.named_children():
            if type(layer) is Linear:
                layer.__class__ = LoraLinear
            if isinstance(layer, LoraLinear):
                layers[name] = layer
        apart = [(name,) for name in layers if not any(name in names for names in SHARED_INPUTS)]
        for names in (*SHARED_INPUTS, *apart):
            SharedInput([layers[name] for name in names if name in layers])


class LoraLinear(Linear):
    """Be a linear layer with LoRA as peft's, with another forward."""

    shared: SharedInput

    def forward(self, x: Tensor, *args: Any, **keywords: Any) -> Tensor:
        """Compute [...,in] -> [...,out], in few products where the adapter is plain LoRA."""
        adapter = None if args or keywords else self.plain_adapter(x)
        if adapter is None:
            return super().forward(x, *args, **keywords)
        return self.shared.product(self, x, adapter)

    def plain_adapter(self, x: Tensor) -> str | None:
        """Name the one adapter that acts, None where peft's own forward has to run."""
        active, base = self.active_adapters, self.base_layer
        if self.disable_adapters or self.merged or len(active) != 1 or type(base) is not nn.Linear:
            return None
        name = active[0]
        if name not in self.lora_A or name in self.lora_variant or self.lora_bias[name]:
            return None
        if any(is_hooked(part) for part in (base, self.lora_A[name], self.lora_B[name])):
            return None
        device, dtype = x.device.type, x.dtype
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            return None
        return name if dtype == base.weight.dtype and dtype in DTYPES else None

    def noise(self, x: Tensor, adapter: str) -> Tensor | None:
        """Draw dropout's factors [...,in], in fp32 as peft does, or None where nothing drops."""
        dropout = self.lora_dropout[adapter]
        if isinstance(dropout, nn.Identity) or not self.training:
            return None
        return dropout(torch.ones_like(x, dtype=torch.promote_types(x.dtype, torch.float32)))


def is_hooked(module: nn.Module) -> bool:
    """Tell whether something looks at a module's forward or backward pass."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class SharedInput:
    """Compute layers that read the same input together, when the first of them is called.

    layers: in the order in which they are called. Each notes what it shares.
    """

    def __init__(self, layers: Sequence[LoraLinear]):
        self.layers = list(layers)
        for layer in layers:
            layer.shared = self
        self.input: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}  # by place in `layers`, until they are asked for
        HOLDERS.add(self)

    def release(self) -> bool:
        """Let go of outputs that a failed forward has not asked for, and so of all its memory."""
        self.input, self.outputs = None, {}
        return False

    def product(self, layer: LoraLinear, x: Tensor, adapter: str) -> Tensor:
        """Compute one layer's output, or hand out what was computed with that of the first."""
        place = next(i for i, own in enumerate(self.layers) if own is layer)
        if place and self.input is x and place in self.outputs:
            output = self.outputs.pop(place)
        else:
            adapters = [adapter] if place else [own.plain_adapter(x) for own in self.layers]
            together = [(i, name) for i, name in enumerate(adapters, place) if name is not None]
            output, *others = adapted_products(
                x, [self.layers[i] for i, _ in together], [name for _, name in together]
            )
            self.input = x
            self.outputs = {i: other for (i, _), other in zip(together[1:], others, strict=True)}
        if not self.outputs:
            self.input = None
        return output


def adapted_products(
    x: Tensor, layers: Sequence[LoraLinear], adapters: Sequence[str]
) -> tuple[Tensor, ...]:
    """Compute x W^T + b + s (u A^T) B^T of layers that read the same input -> [...,out] each.

    x [...,in], in the dtype of W. u is x after dropout, which each layer draws for itself.
    adapters: the adapter of each layer.

    Gradients flow to x, A and B, those of A and B in their own dtype.
    """
    bases = [layer.get_base_layer() for layer in layers]
    pairs = list(zip(layers, adapters, strict=True))
    return _AdaptedProducts.apply(
        x,
        tuple(layer.scaling[name] for layer, name in pairs),
        *(layer.noise(x, name) for layer, name in pairs),
        *(base.weight for base in bases),
        *(base.bias for base in bases),
        *(layer.lora_A[name].weight for layer, name in pairs),
        *(layer.lora_B[name].weight for layer, name in pairs),
    )


class _AdaptedProducts(torch.autograd.Function):
    """Compute n adapted layers of one input, with the gradients of x, A and B.

    g is the gradient of y:  dB = s g^T (u A^T),  dA = s (g B)^T u,  dx = s (g B) A noise + g W.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scalings: tuple[float, ...], *given: Any
    ) -> tuple[Tensor, ...]:
        n = len(scalings)
        noises, bases, biases, downs, ups = (given[i * n : (i + 1) * n] for i in range(5))
        flat, ranks = x.flatten(0, -2), [len(down) for down in downs]  # [M,in]
        if all(noise is None for noise in noises):
            reads = [flat]  # u of all layers
            stacked = (downs[0] if n == 1 else torch.cat(downs)).to(x.dtype)  # [n r,in]
            inner = flat @ stacked.t()  # [M,n r]
        else:
            reads = [flat if noise is None else _times(flat, noise) for noise in noises]
            inner = torch.cat(
                [u @ down.to(x.dtype).t() for u, down in zip(reads, downs, strict=True)], 1
            )
        outputs = []
        for i, own in enumerate(inner.split(ranks, 1)):
            output = linear(x, bases[i], biases[i])
            output.view(-1, len(bases[i])).addmm_(own, ups[i].to(x.dtype).t(), alpha=scalings[i])
            outputs.append(output)
        ctx.save_for_backward(*noises, *bases, *downs, *ups, inner, *reads)
        ctx.scalings, ctx.shape = scalings, x.shape
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        n, saved = len(ctx.scalings), ctx.saved_tensors
        noises, bases, downs, ups = (saved[i * n : (i + 1) * n] for i in range(4))
        inner, *reads = saved[4 * n :]
        needs_x, needs_downs, needs_ups = (
            ctx.needs_input_grad[0],
            any(ctx.needs_input_grad[2 + 3 * n : 2 + 4 * n]),
            any(ctx.needs_input_grad[2 + 4 * n :]),
        )
        ranks = [len(down) for down in downs]
        grad_inner = torch.zeros_like(inner)  # [M,n r]
        inners, grad_inners = inner.split(ranks, 1), grad_inner.split(ranks, 1)
        grad_x: Tensor | None = None  # [M,in]
        grad_ups: list[Tensor | None] = [None] * n
        for i in reversed(range(n)):  # the order in which autograd would come to them
            if (grad := grads[i]) is None:  # the output has had no use
                continue
            grad = grad.flatten(0, -2)  # [M,out]
            grad_inners[i].addmm_(grad, ups[i].to(grad.dtype), alpha=ctx.scalings[i])
            if needs_ups:
                grad_ups[i] = (grad.t() @ inners[i]).to(ups[i].dtype).mul_(ctx.scalings[i])
            if needs_x:
                grad_x = _plus_product(grad_x, grad_inners[i], downs[i].to(grad.dtype), noises[i])
                grad_x = _plus_product(grad_x, grad, bases[i])
        grad_downs: Sequence[Tensor | None] = [None] * n
        if needs_downs:
            parts = (grad_inner,) if len(reads) == 1 else grad_inners
            products = [part.t() @ u for part, u in zip(parts, reads, strict=True)]
            grad_downs = torch.cat(products).to(downs[0].dtype).split(ranks)
        grad_x = None if grad_x is None else grad_x.view(ctx.shape)
        return grad_x, None, *[None] * (3 * n), *grad_downs, *grad_ups


def _plus_product(
    total: Tensor | None, left: Tensor, right: Tensor, noise: Tensor | None = None
) -> Tensor:
    """Add left @ right, times noise, to a total, in place.

    In bf16 the product is not rounded before. In fp32 it is, in the order of the caller: so the
    gradients are those of peft's layers to the bit, where both make the same products.
    """
    if total is not None and noise is None and total.dtype == torch.bfloat16:
        return total.addmm_(left, right)
    product = left @ right
    product = product if noise is None else _times(product, noise)
    return product if total is None else total.add_(product)


def _times(flat: Tensor, noise: Tensor) -> Tensor:
    """Multiply [M,in] with dropout's factors [...,in], which are of fp32 at least."""
    return (flat * noise.flatten(0, -2)).to(flat.dtype)
