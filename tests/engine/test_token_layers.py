"""Protect decoder layers in few kernels: what they compute is what transformers' layers compute.

Checked: ids and log-probabilities of the sampler, how near bf16 is to fp32, how many operations a
layer needs, and that a layer that is not as its family says keeps transformers' forward.
"""

from __future__ import annotations

import copy
import dataclasses
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from data.prompts import Prompt
from engine import sampling_layers, token_layers
from engine.families import LORA_TARGETS, language_model
from engine.generate import Completion, SamplingConfig, generate
from engine.lora import fuse_adapters
from engine.model import REFERENCE, use_adapter
from engine.sampling_layers import merged_products
from engine.token_layers import AdaptedProducts, is_known
from tests.helpers.tiny import (
    SAVE,
    attach_random_adapter,
    examples_of,
    load,
    policy_of,
    uniform_for,
)

KINDS = ["torch", "onednn"]
LENGTH = 30  # beyond the window of the tiny Gemma 3, 24


@pytest.fixture(params=list(SAVE))
def family(request) -> str:
    return request.param


def loaded(folder, dtype: torch.dtype):
    """Load a checkpoint with norms and biases that are not as they begin, and no stop tokens."""
    base = load(folder, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in base.net.named_parameters():
        if "language_model.layers" in name and parameter.dim() == 1:
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.data += noise.bfloat16().to(dtype)
    return dataclasses.replace(base, stop_ids=frozenset())


def sampled(net, base, images, *, product: str = "beside", greedy: bool = False):
    """Sample with the adapter beside its weights, or merged with torch's or oneDNN's products."""
    prompts = [
        base.encode_prompt(example, Prompt("p", "Which?"))
        for example in examples_of(images, 56, 84)
    ]
    policy = policy_of(net, base, temperature=0.8)
    policy = dataclasses.replace(
        policy,
        sampling_copies=product != "beside",
        sampling_product="torch" if product == "beside" else product,
    )
    sampling = SamplingConfig(0.0 if greedy else 0.8, 0.95, LENGTH)
    uniform = None if greedy else uniform_for(2, 3, LENGTH)
    groups = generate(policy, prompts, sampling, num_generations=3, uniform=uniform)
    return [completion for group in groups for completion in group]


def ids_of(completions: list[Completion]) -> list[list[int]]:
    return [completion.ids.tolist() for completion in completions]


def logprobs_of(completions: list[Completion]) -> Tensor:
    return torch.cat([completion.logprobs for completion in completions])


def by_transformers(net, base, images, **settings) -> list[Completion]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling_layers, "token_layers", lambda net, *more: nullcontext([]))
        return sampled(net, base, images, **settings)


@pytest.mark.parametrize("product", ["beside", "torch", "onednn"])
@pytest.mark.parametrize(
    "adapter", ["policy", "reference", "none", "disabled", "merged", "no peft"]
)
def test_in_fp32_the_sampler_writes_what_transformers_layers_write(
    family, tiny_checkpoint, tiny_images, adapter, product, monkeypatch
):
    monkeypatch.setattr(token_layers, "LOW", (torch.float32,))  # beside its weights too
    base = loaded(tiny_checkpoint(family), torch.float32)
    net = base.net if adapter == "no peft" else attach_random_adapter(base)
    around = nullcontext()
    if adapter == "reference":
        net.add_adapter(REFERENCE, LoraConfig(r=6, lora_alpha=5, target_modules=LORA_TARGETS))
        for layer in language_model(net).modules():
            if hasattr(layer, "lora_B"):
                layer.lora_B[REFERENCE].weight.data.normal_(std=0.1)
        net.set_adapter("default")
        around = use_adapter(net, REFERENCE)
    elif adapter == "none":
        net = net.unload()
    elif adapter == "disabled":
        around = net.disable_adapter()
    elif adapter == "merged":
        net.merge_adapter()
    with around:
        expected = by_transformers(net, base, tiny_images)
        found = sampled(net, base, tiny_images, product=product)
    assert ids_of(found) == ids_of(expected)
    assert len({tuple(ids) for ids in ids_of(found)}) == 6  # all differ
    torch.testing.assert_close(logprobs_of(found), logprobs_of(expected), rtol=0, atol=5e-5)
    difference = (logprobs_of(found) - logprobs_of(expected)).abs()
    assert 0 < float(difference.mean()) <= 5e-6


def states(net, base, images, monkeypatch) -> Tensor:
    """Decode given tokens greedily and collect the states before the head -> [tokens,n,H]."""
    import engine.decoding as module

    read, kept = module.read_tokens, []

    def reading(*args, **keywords):
        fixed = torch.full_like(args[2], 60 + len(kept))
        kept.append(read(*args[:2], fixed, *args[3:], **keywords))
        return kept[-1]

    monkeypatch.setattr(module, "read_tokens", reading)
    sampled(net, base, images, greedy=True)
    monkeypatch.setattr(module, "read_tokens", read)
    return torch.stack(kept).float()


def test_in_bf16_states_are_as_near_to_fp32_as_transformers(
    family, tiny_checkpoint, tiny_images, monkeypatch
):
    """Over 29 tokens that are given, with all that the cache remembers of them.

    Less is rounded in the residual stream and in rotary, more in Gemma 3's norms, whose 1 + w is
    rounded here: 0.96 to 1.10 times transformers' distance with three seeds and families.
    """
    low = loaded(tiny_checkpoint(family), torch.bfloat16)
    net = attach_random_adapter(low)
    high = loaded(tiny_checkpoint(family), torch.float32)
    exact = attach_random_adapter(high)
    exact.load_state_dict({name: weight.float() for name, weight in net.state_dict().items()})
    oracle = states(exact, high, tiny_images, monkeypatch)
    own = states(net, low, tiny_images, monkeypatch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling_layers, "token_layers", lambda net, *more: nullcontext([]))
        of_transformers = states(net, low, tiny_images, monkeypatch)
    errors = [(found - oracle).norm() / oracle.norm() for found in (own, of_transformers)]
    assert len(oracle) == LENGTH - 1 and not torch.equal(own, of_transformers)
    assert 0 < errors[0] <= 1.15 * errors[1] <= 0.1


def decoder_layers(net) -> list[nn.Module]:
    return list(language_model(net).layers)


def test_nothing_of_it_stays(family, tiny_checkpoint):
    net = attach_random_adapter(load(tiny_checkpoint(family), dtype=torch.bfloat16)).eval()
    layers = decoder_layers(net)
    with pytest.raises(KeyboardInterrupt), token_layers.token_layers(net):
        assert all("forward" in vars(layer) for layer in layers)
        raise KeyboardInterrupt
    assert not any("forward" in vars(layer) for layer in layers)


def hook(layer):
    layer.mlp.act_fn.register_forward_hook(lambda module, inputs, output: output)


def other_norm(layer):
    layer.input_layernorm = nn.LayerNorm(32)


def two_adapters(layer):
    config = LoraConfig(init_lora_weights=False)
    layer.mlp.up_proj.update_layer("other", 2, 4, config=config)
    layer.mlp.up_proj.set_adapter(["default", "other"])


def other_attention(layer):
    layer.self_attn.__class__ = type("Fork", (type(layer.self_attn),), {})


def own_forward(layer):
    layer.mlp.forward = lambda x: x


UNKNOWN = [hook, other_norm, two_adapters, other_attention, own_forward]


@pytest.mark.parametrize("change", UNKNOWN)
def test_a_layer_that_is_not_as_its_family_says_is_left_alone(family, tiny_checkpoint, change):
    base = load(tiny_checkpoint(family), dtype=torch.bfloat16)
    net = attach_random_adapter(base).eval()
    first, *others = decoder_layers(net)
    assert all(is_known(layer, base.family.layer_kind()) for layer in (first, *others))
    change(first)
    with token_layers.token_layers(net):
        assert "forward" not in vars(first)
        assert all("forward" in vars(layer) for layer in others)


def test_a_merged_adapter_is_not_added_again(family, tiny_checkpoint):
    net = attach_random_adapter(load(tiny_checkpoint(family), dtype=torch.bfloat16)).eval()
    layer = decoder_layers(net)[0].self_attn.q_proj
    assert AdaptedProducts([layer]).down is not None
    layer.merge()
    assert AdaptedProducts([layer]).down is None


def test_dora_keeps_transformers_layers(family, tiny_checkpoint):
    base = load(tiny_checkpoint(family), dtype=torch.bfloat16)
    net = get_peft_model(base.net, LoraConfig(r=2, target_modules=LORA_TARGETS, use_dora=True))
    fuse_adapters(net)
    with token_layers.token_layers(net):
        assert not any("forward" in vars(layer) for layer in decoder_layers(net))


def test_products_by_hand():
    """Two layers of x = (1, 2), beside one another, the second with LoRA of scaling 3.

    x (3 4)^T = 11;  x (5 6)^T + 7 = 24, x A^T = (1, 2) (1 1)^T = 3, 24 + 3 x 3 x 2 = 42
    """
    from peft.tuners.lora import Linear

    from engine.lora import LoraLinear, SharedInput

    first, base = nn.Linear(2, 1, bias=False), nn.Linear(2, 1)
    second = Linear(base, "default", config=LoraConfig(), r=1, lora_alpha=3)
    second.__class__ = LoraLinear
    SharedInput([second])
    for parameter, value in (
        (first.weight, [[3.0, 4]]),
        (base.weight, [[5.0, 6]]),
        (base.bias, [7.0]),
        (second.lora_A["default"].weight, [[1.0, 1]]),
        (second.lora_B["default"].weight, [[2.0]]),
    ):
        parameter.data = torch.tensor(value)
    x = torch.tensor([[1.0, 2]])
    with torch.no_grad():
        for make in (AdaptedProducts, *(partial(merged_products, kind=kind) for kind in KINDS)):
            assert make([first, second])(x, None).tolist() == [[11, 42]]
            residual = torch.tensor([[100.0]])
            assert make([second])(x, residual).tolist() == [[142]]
            assert residual.tolist() == [[100]]
        assert copy.deepcopy(second)(x).tolist() == [[42]]
