"""Run a decoder layer in few operations while sampling, with weights prepared once.

A GPU waits for the host where a token asks for thousands of small kernels. A CPU spends half of a
token's time on starting them. So while sampling a decoder layer computes with its own weights and
in its own order, but in few operations:

    norms           one kernel each on a GPU. Where the weight is 1 + w (Gemma 3) it is added up
                    once
    q, k and v      written into one tensor, and so are gate and up. Where the adapter is not
                    merged there is one product with their A stacked, and one with their B in a
                    block-diagonal matrix, which holds the scaling
    rotary          queries and keys together: x cos + roll(x) sin', with the sign in sin', which
                    is made once a token and kind of layer
    residual        the product's own addend, where no norm stands between

The states are those of transformers' layers but for rounding, and mostly less is rounded. What
multiplies tokens with the weights is given: `AdaptedProducts` here, which copies nothing large, or
those of engine/sampling_layers.py, where the adapter is merged.

A layer keeps transformers' forward where it is not as the family's description says
(`Family.layer_kind`): other classes, hooks inside, adapters that are not plain LoRA. So does every
layer where the adapter is not merged, for prompts and in fp32.

Shapes: n tokens, H query heads, K key-value heads, D head width, f intermediate, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from engine.attention import PackedMask
from engine.cache import DecodingMask
from engine.families import family_of, language_model, unwrapped
from engine.family import LayerKind
from engine.lora import LoraLinear, is_hooked

LOW = (torch.bfloat16, torch.float16)
# Multiply x [n,in] with the weights of layers that read the same input -> [n,width], their outputs
# beside one another, added to what comes second where that is not None.
Products = Callable[[Tensor, Tensor | None], Tensor]
# Put a tensor, which was just made, where the last call had the one of this name (`Graphs.placed`).
Placed = Callable[[Hashable, Tensor], Tensor]


def as_made(name: Hashable, made: Tensor) -> Tensor:
    """Leave a tensor where it is."""
    return made


@contextmanager
def token_layers(
    net: nn.Module,
    merged: Callable[[Sequence[nn.Module]], Products] | None = None,
    placed: Placed = as_made,
) -> Iterator[list[nn.Module]]:
    """Sample with few operations a layer within the block, where the layer is as its family says.

    merged(layers): makes the products of layers that read the same input, for prompts and new
        tokens. None: new tokens alone, with the adapter beside its weights, in low precision alone.
    placed: puts what is prepared where the last call had it, but for the products of `merged`.

    The active adapter is the one at the beginning. No gradient flows. Gives the layers that it has
    taken.
    """
    kind = family_of(unwrapped(net).config.model_type).layer_kind()
    decoder: Any = language_model(net)  # a ModuleList, which nn.Module's stubs do not know
    taken: list[nn.Module] = []
    rotary: dict[str | None, tuple[Tensor, ...]] = {}
    masks = DecodingMask if merged is None else PackedMask
    try:
        for layer in decoder.layers if merged or decoder.dtype in LOW else ():
            if is_known(layer, kind):
                products = merged or partial(AdaptedProducts, placed=placed)
                token_layer = TokenLayer(layer, kind, products, rotary, placed)
                layer.forward = partial(_forward, layer, token_layer, masks)
                taken.append(layer)
        yield taken
    finally:
        for layer in taken:
            vars(layer).pop("forward", None)  # so that its class's forward runs again


def _forward(
    layer: nn.Module,
    token_layer: TokenLayer,
    masks: type[PackedMask],
    hidden: Tensor,
    **given: Any,
) -> Tensor:
    """Run the tokens of such masks in few operations, and all others as transformers does."""
    mask = given.get("attention_mask")
    if not isinstance(mask, masks):
        return type(layer).forward(layer, hidden, **given)
    return token_layer(hidden[0], mask, *given["position_embeddings"])[None]


def is_known(layer: nn.Module, kind: LayerKind) -> bool:
    """Tell whether a decoder layer consists of what its family says, and nothing looks into it."""
    parts = dict(layer.named_modules())
    del parts[""]
    expected = {"self_attn": kind.attention, "mlp": kind.mlp}
    expected |= dict.fromkeys(kind.norms_of_layer, kind.norm)
    expected |= dict.fromkeys(kind.norms_of_heads, kind.norm)
    return (
        "forward" not in vars(layer)
        and all(type(parts.get(name)) is own for name, own in expected.items())
        and not any(is_hooked(part) or "forward" in vars(part) for part in parts.values())
        and all(base_of(parts[name]) is not None for name in PROJECTIONS)
    )


PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def base_of(layer: nn.Module) -> nn.Linear | None:
    """Find the linear layer of a projection with or without plain LoRA, None of anything else."""
    base = layer.base_layer if isinstance(layer, LoraLinear) else layer
    if type(base) is not nn.Linear:
        return None
    if isinstance(layer, LoraLinear) and not (layer.disable_adapters or layer.merged):
        return base if layer.plain_adapter(base.weight) else None
    return base


class AdaptedProducts:
    """Multiply tokens with weights as they are, and with the adapter beside them.

    layers: whose outputs lie beside one another in the result. placed: as in `token_layers`.
    """

    def __init__(self, layers: Sequence[nn.Module], placed: Placed = as_made):
        bases = [base for layer in layers if (base := base_of(layer)) is not None]
        self.bases = [(base.weight.detach().t(), base.bias) for base in bases]  # [in,out]
        ends = [0]
        for base in bases:
            ends.append(ends[-1] + base.out_features)
        self.parts = [slice(*ends[i : i + 2]) for i in range(len(bases))]
        self.width = ends[-1]
        downs, blocks = [], []
        for layer, part in zip(layers, self.parts, strict=True):
            if not isinstance(layer, LoraLinear) or layer.disable_adapters or layer.merged:
                continue
            name = layer.active_adapters[0]
            down, up = (
                own[name].get_parameter("weight").detach() for own in (layer.lora_A, layer.lora_B)
            )
            downs.append(down)
            block = up.new_zeros(len(down), self.width)
            block[:, part] = up.t() * layer.scaling[name]
            blocks.append(block)
        dtype = bases[0].weight.dtype
        self.down: Tensor | None = None  # [in,r of all]
        self.up: Tensor | None = None  # [r of all,width]
        if downs:
            self.down = placed(("down", layers[0]), torch.cat(downs).to(dtype).t())
            self.up = placed(("up", layers[0]), torch.cat(blocks).to(dtype))

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute x [n,in] -> [n,width], added to `residual` where there is one."""
        if residual is not None:
            ((weight, bias),) = self.bases
            output = torch.addmm(residual if bias is None else residual + bias, x, weight)
        else:
            output = x.new_empty(len(x), self.width)
            for (weight, bias), part in zip(self.bases, self.parts, strict=True):
                if bias is None:
                    torch.mm(x, weight, out=output[:, part])
                else:
                    torch.addmm(bias, x, weight, out=output[:, part])
        if self.down is not None and self.up is not None:
            output.addmm_(x @ self.down, self.up)
        return output


class TokenLayer:
    """Compute one decoder layer for tokens of a packed row.

    kind: what the family says of its layers.
    products(layers): makes the products of layers that read the same input.
    rotary: cos and sin' of the newest token, by kind of layer, after the sin of which they are.
    placed: as in `token_layers`.
    """

    def __init__(
        self,
        layer: Any,
        kind: LayerKind,
        products: Callable[[Sequence[nn.Module]], Products],
        rotary: dict[str | None, tuple[Tensor, ...]],
        placed: Placed,
    ):
        self.attention, self.act, self.rotary = layer.self_attn, layer.mlp.act_fn, rotary
        attention, mlp = layer.self_attn, layer.mlp
        self.into_heads = products([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out_of_heads = products([attention.o_proj])
        self.into_mlp = products([mlp.gate_proj, mlp.up_proj])
        self.out_of_mlp = products([mlp.down_proj])
        self.width = attention.head_dim
        self.queries = attention.q_proj.out_features // self.width  # H
        self.keys = attention.k_proj.out_features // self.width  # K
        self.epsilon = getattr(layer.input_layernorm, kind.epsilon)
        self.floor = placed(("floor", layer), torch.tensor([self.epsilon]))  # for a CPU

        def weight(name: str) -> Tensor:
            own = layer.get_submodule(name).get_parameter("weight").detach()
            if not kind.one_is_added:
                return own
            return placed((name, layer), (1.0 + own.float()).to(own.dtype))

        self.before_attention, self.after_attention, self.before_mlp, self.after_mlp = (
            None if name is None else weight(name) for name in kind.norms
        )
        self.one_is_added = kind.one_is_added
        self.heads: Tensor | None = None  # weights of the heads' norms as they are, [H+K,D]
        if kind.norms_of_heads:
            q, k = (
                layer.get_submodule(name).get_parameter("weight").detach()
                for name in kind.norms_of_heads
            )
            heads = torch.cat([q.expand(self.queries, -1), k.expand(self.keys, -1)])
            self.heads = placed(("heads", layer), heads)
        half = torch.ones(self.width // 2, device=layer.input_layernorm.weight.device)
        signs = torch.cat([-half, half]).to(attention.q_proj.weight.dtype)
        self.signs = placed(("signs", layer), signs)

    def __call__(self, hidden: Tensor, mask: PackedMask, cos: Tensor, sin: Tensor) -> Tensor:
        """Run n tokens [n,hidden] -> [n,hidden]. cos, sin [1,n,D]: of their positions."""
        seen = self._attend(hidden, mask, cos, sin)
        hidden = self._added(hidden, seen, self.out_of_heads, self.after_attention)
        del seen
        return self._added(hidden, self._gated(hidden), self.out_of_mlp, self.after_mlp)

    def _attend(self, hidden: Tensor, mask: PackedMask, cos: Tensor, sin: Tensor) -> Tensor:
        """Compute what the heads see -> [n,H x D]."""
        states = self.into_heads(self._norm(hidden, self.before_attention), None)
        heads = states.view(len(states), -1, self.width)  # [n,H+2K,D]
        turned, value = heads.split([self.queries + self.keys, self.keys], 1)
        if self.heads is not None:
            turned = self._norm(turned, None)
            turned = (
                torch.addcmul(turned, turned, self.heads)
                if self.one_is_added
                else turned * self.heads
            )
        query, key = self._rotated(turned, cos, sin).split([self.queries, self.keys], 1)
        attention = self.attention
        seen = mask.attend(attention.layer_idx, query, key, value, 0.0, attention.scaling)
        return seen.flatten(1)

    def _gated(self, hidden: Tensor) -> Tensor:
        """Compute what the MLP's last product reads -> [n,f]."""
        gate, up = self.into_mlp(self._norm(hidden, self.before_mlp), None).chunk(2, 1)
        return self.act(gate).mul_(up)

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        if x.device.type != "cpu":
            return rms_norm(x, x.shape[-1:], weight, self.epsilon)  # one kernel on CUDA
        # On a CPU torch's rms_norm takes longer than these operations (25 us for 17).
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.addcmul(self.floor, length, length, value=1 / x.shape[-1]).rsqrt_()
        normed = wide * scale
        return (normed if weight is None else normed.mul_(weight)).to(x.dtype)

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate heads [n,heads,D]. A half of sin' has the sign of transformers' rotate_half."""
        kind = getattr(self.attention, "layer_type", None)
        if kind not in self.rotary or self.rotary[kind][0] is not sin:
            self.rotary[kind] = sin, cos[0, :, None], (sin * self.signs)[0, :, None]
        _, cos, signed = self.rotary[kind]
        return (x * cos).addcmul_(x.roll(self.width // 2, -1), signed)

    def _added(
        self, hidden: Tensor, x: Tensor, products: Products, weight: Tensor | None
    ) -> Tensor:
        """Add a product to the residual stream, after its norm where it has one."""
        if weight is None:
            return products(x, hidden)
        return torch.addcmul(hidden, self._norm(products(x, None), None), weight)
