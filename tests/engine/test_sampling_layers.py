"""Protect the layers while sampling: what they do is what they do otherwise, in fewer products.

Nothing of it stays. Whole decoder layers, in which these products are made for several linear
layers at once, are in test_token_layers.py. Here they are made for each, as in a decoder layer that
is not as its family says.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode

from data.prompts import Prompt
from engine.completion import SamplingConfig
from engine.families import LORA_TARGETS, language_model, lm_head_weight
from engine.generate import generate
from engine.model import REFERENCE, use_adapter
from engine.sampling_layers import _rounded_up, sampling_layers
from tests.helpers.tiny import SAVE, attach_random_adapter, examples_of, load, policy_of

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN"
)
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "linear", "_linear_pointwise"}


class Products(TorchDispatchMode):
    """Count matrix products by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.seen.update([name] if name in PRODUCTS else [])
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=list(SAVE))
def family(request) -> str:
    return request.param


@pytest.fixture
def wrapped(family, tiny_checkpoint):
    """Give a model an adapter that changes outputs, and biases that are not zero if it has some."""
    model = watched(attach_random_adapter(load(tiny_checkpoint(family))).eval())
    for layer in adapted(model):
        if layer.get_base_layer().bias is not None:
            torch.nn.init.normal_(layer.get_base_layer().bias)
    return model


def watched(net):
    """Look into every decoder layer, so that it keeps transformers' forward."""
    for layer in language_model(net).layers:
        layer.mlp.act_fn.register_forward_hook(lambda module, inputs, output: None)
    return net


def adapted(wrapped) -> list[LoraLayer]:
    return [module for module in language_model(wrapped).modules() if isinstance(module, LoraLayer)]


def inputs(layer, dtype=torch.float32, rows: int = 5) -> torch.Tensor:
    return torch.randn(
        1, rows, layer.in_features, generator=torch.Generator().manual_seed(0), dtype=dtype
    )


@torch.no_grad()
def outputs(layers, dtype=torch.float32) -> list[torch.Tensor]:
    return [layer(inputs(layer, dtype)) for layer in layers]


def close(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 2e-6) -> None:
    assert len(found) == len(expected) > 0
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=tolerance * float(right.abs().max()))


def untouched(layers) -> bool:
    return not any("forward" in vars(layer) or layer.merged for layer in layers)


@needs_onednn
def test_an_adapter_costs_no_product_of_its_own(wrapped):
    layers = adapted(wrapped)
    expected = outputs(layers)
    with Products() as beside:
        outputs(layers)
    with sampling_layers(wrapped), Products() as merged:
        found = outputs(layers)
    assert len(layers) >= 14 and beside.seen.total() >= 3 * len(layers)
    assert merged.seen == {"_linear_pointwise": len(layers)}  # oneDNN's
    close(found, expected)


@pytest.mark.parametrize("rows", [1, 2, 7, 9, 33, 300])
def test_any_number_of_rows(wrapped, rows):
    layer = adapted(wrapped)[0]
    x = inputs(layer, rows=rows)
    with torch.no_grad():
        expected = layer(x)
        with sampling_layers(wrapped) as head:
            close([layer(x), layer(x[0])], [expected, expected[0]])
            hidden, weight = (
                torch.randn(rows, lm_head_weight(wrapped).shape[1]),
                lm_head_weight(wrapped),
            )
            close([head(hidden)], [hidden @ weight.t()])


def test_products_have_few_numbers_of_rows():
    sizes = {_rounded_up(rows) for rows in range(1, 2049)}
    assert len(sizes) == 40  # 1 to 7, then four for each of 8, 16, ..., 1024, and 2048
    assert {5, 7, 8, 10, 12, 14, 16, 20, 640, 2048} <= sizes
    assert all(rows <= _rounded_up(rows) <= 1.25 * rows for rows in range(1, 2049))


@pytest.mark.parametrize("kind", ["auto", "torch", "onednn"])
def test_elsewhere_or_where_it_is_chosen_the_product_is_torchs(wrapped, monkeypatch, kind):
    layers = adapted(wrapped)
    expected = outputs(layers)
    if kind != "torch":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with sampling_layers(wrapped, kind=kind), Products() as products:
        found = outputs(layers)
    assert "_linear_pointwise" not in products.seen and products.seen.total() == len(layers)
    close(found, expected)


def test_in_fp64(family, tiny_checkpoint):
    loaded = load(tiny_checkpoint(family), dtype=torch.float64)
    wrapped = attach_random_adapter(loaded).eval().double()  # the adapter too
    layers = adapted(wrapped)
    expected = outputs(layers, torch.float64)
    with sampling_layers(wrapped):
        assert not any(layer.forward == type(layer).forward.__get__(layer) for layer in layers)
        close(outputs(layers, torch.float64), expected, 1e-14)


def test_an_adapter_stays_beside_weights_of_bf16(family, tiny_checkpoint):
    wrapped = attach_random_adapter(load(tiny_checkpoint(family), dtype=torch.bfloat16)).eval()
    layers = adapted(wrapped)
    expected = outputs(layers, torch.bfloat16)
    with sampling_layers(wrapped) as head:
        assert untouched(layers)
        for found, right in zip(outputs(layers, torch.bfloat16), expected, strict=True):
            assert torch.equal(found, right)
        weight = lm_head_weight(wrapped)
        x = torch.randn(3, weight.shape[1]).bfloat16()
        assert torch.equal(head(x), x @ weight.t())


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_nothing_of_it_stays(wrapped, error):
    layers = adapted(wrapped)
    weights = [
        (layer.get_base_layer().weight.data_ptr(), layer.get_base_layer().weight.clone())
        for layer in layers
    ]
    expected = outputs(layers)
    try:
        with sampling_layers(wrapped):
            assert not untouched(layers)
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    assert untouched(layers)
    assert all(
        torch.equal(found, right) for found, right in zip(outputs(layers), expected, strict=True)
    )
    for layer, (place, weight) in zip(layers, weights, strict=True):
        now = layer.get_base_layer().weight
        assert now.data_ptr() == place and torch.equal(now, weight)


def test_the_adapter_is_the_active_one_as_it_is_now(wrapped):
    layers = adapted(wrapped)
    wrapped.add_adapter(REFERENCE, wrapped.peft_config["default"])
    wrapped.set_adapter("default")
    for layer in layers:
        layer.lora_B[REFERENCE].weight.data.normal_(std=0.1)
        layer.lora_B["default"].weight.data.mul_(-1)  # an update of the policy
    after = outputs(layers)
    with sampling_layers(wrapped):
        close(outputs(layers), after)
    with use_adapter(wrapped, REFERENCE):
        reference = outputs(layers)
        with sampling_layers(wrapped):
            close(outputs(layers), reference)
    with wrapped.disable_adapter():
        base = outputs(layers)
        with sampling_layers(wrapped):
            close(outputs(layers), base)
    wrapped.base_model.set_adapter(["default", REFERENCE])  # peft adds both
    both = outputs(layers)
    with sampling_layers(wrapped):
        close(outputs(layers), both)
    for one, other in ((both, after), (after, reference), (after, base), (reference, base)):
        assert max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)) > 0.1


def test_a_forward_of_a_modules_own_is_there_again(wrapped):
    layer = adapted(wrapped)[0]
    layer.forward = own = lambda x: x
    try:
        with sampling_layers(wrapped):
            assert layer.forward is not own
            with sampling_layers(wrapped):
                inner = outputs(adapted(wrapped))
            close(outputs(adapted(wrapped)), inner)
        assert layer.forward is own
    finally:
        del layer.forward


def test_an_adapter_that_is_merged_already_is_not_added_twice(wrapped):
    layers = adapted(wrapped)
    expected = outputs(layers)
    wrapped.merge_adapter()
    try:
        with sampling_layers(wrapped):
            close(outputs(layers), expected)
    finally:
        wrapped.unmerge_adapter()


def test_the_heads_product_is_in_its_own_dtype(family, tiny_checkpoint):
    base = load(tiny_checkpoint(family), dtype=torch.bfloat16).net
    base.lm_head = torch.nn.Linear(32, 7, bias=False)  # fp32, as a fork may have it
    x = torch.randn(3, 32).bfloat16()
    with torch.no_grad(), sampling_layers(base) as head:
        close([head(x)], [x.float() @ base.lm_head.weight.t()])


@pytest.mark.parametrize(
    ("family", "targets", "kind"),
    [
        *((family, LORA_TARGETS, {"use_dora": True}) for family in SAVE),
        ("qwen2_5_vl", r".*language_model.*self_attn\.[qkv]_proj", {"lora_bias": True}),
    ],
)
def test_other_adapters_than_lora_stay_as_they_are(tiny_checkpoint, family, targets, kind):
    """Merging would lose DoRA's magnitudes, or change the bias of the base for ever."""
    wrapped = get_peft_model(
        load(tiny_checkpoint(family)).net, LoraConfig(r=2, target_modules=targets, **kind)
    ).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    layers = adapted(wrapped)
    biases = [layer.get_base_layer().bias for layer in layers]
    expected, before = outputs(layers), [None if bias is None else bias.clone() for bias in biases]
    with sampling_layers(wrapped):
        assert untouched(layers)
        assert all(
            torch.equal(found, right)
            for found, right in zip(outputs(layers), expected, strict=True)
        )
    assert all(
        bias is None or torch.equal(bias, right) for bias, right in zip(biases, before, strict=True)
    )


@needs_onednn
def test_without_an_adapter(family, tiny_checkpoint):
    base = watched(load(tiny_checkpoint(family)).net)
    layers = [
        module for module in language_model(base).modules() if isinstance(module, torch.nn.Linear)
    ]
    expected = outputs(layers)
    with sampling_layers(base) as head, Products() as products:
        found = outputs(layers)
        x = torch.randn(3, lm_head_weight(base).shape[1])
        close([head(x)], [x @ lm_head_weight(base).t()])
    assert products.seen["_linear_pointwise"] == len(layers) + 1
    close(found, expected)
    assert not any("forward" in vars(layer) for layer in layers)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sampler_uses_them(family, tiny_checkpoint, tiny_images, dtype):
    """Every pass, of the prompt and of each token but the last: in fp32 one product for all layers
    of an input, in bf16 one for each, and the adapter's beside it: B's in each layer, A's once for
    q, k and v, once for gate and up.
    """
    loaded = dataclasses.replace(load(tiny_checkpoint(family), dtype=dtype), stop_ids=frozenset())
    wrapped = attach_random_adapter(loaded)
    prompts = [loaded.encode_prompt(examples_of(tiny_images, 56)[0], Prompt("short", "Which?"))]
    with Products() as products:
        generate(
            policy_of(wrapped, loaded),
            prompts,
            SamplingConfig(temperature=0.0, max_completion_length=4),
        )
    layers, passes = len(adapted(wrapped)), 4
    if dtype == torch.float32:
        inputs = layers // 7 * 4  # of q, k and v, of o, of gate and up, and of down
        assert products.seen["_linear_pointwise"] == passes * (inputs + 1)  # with the head
        assert products.seen["mm"] == layers  # each adapter's A and B, once
    else:
        assert products.seen["_linear_pointwise"] == 0
        # B's of a decoder layer's tokens: of q, k and v together, and of gate and up
        decoder_layers, tokens = layers // 7, passes - 1
        assert products.seen["addmm_"] == layers + tokens * 4 * decoder_layers
        assert sum(products.seen[name] for name in ("mm", "addmm", "linear")) == passes * (
            layers + 4 * decoder_layers + 1
        )
