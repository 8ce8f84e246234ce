"""Protect linear layers with LoRA in few products: they are peft's layers but for rounding.

Checked by hand, against peft's own forward, and in bf16 against fp32. And what is not plain LoRA
still runs peft's forward.
"""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from data.prompts import Prompt
from engine.collate import collate_rows
from engine.encode import EncodedRow
from engine.families import LORA_TARGETS, language_model
from engine.forward import completion_logprobs
from engine.lora import LoraLinear, SharedInput, fuse_adapters
from engine.model import (
    POLICY,
    REFERENCE,
    adapter_state,
    add_reference,
    attach_new_adapter,
    enable_gradient_checkpointing,
    use_adapter,
)
from engine.out_of_memory import Limits
from engine.random_numbers import dropout_numbers
from rl.objective import kl_estimate
from tests.helpers.tiny import SAVE, attach_random_adapter, examples_of, load

WIDTHS = (24, 8, 8)  # of q, k and v


@pytest.fixture(params=list(SAVE))
def family(request) -> str:
    return request.param


# ---- layers --------------------------------------------------------------------------------------
def pefts_layers(
    dtype: torch.dtype = torch.float32, *, bias: bool = True, share: float = 1.0, **settings
) -> list[Linear]:
    """Make layers [16] -> WIDTHS as peft makes them, of ranks 3, 4 and 5 and other scalings.

    share: about how large the adapter's part is, of the base's output. settings: of LoraConfig.
    """
    torch.manual_seed(0)
    layers = []
    for i, width in enumerate(WIDTHS):
        base = nn.Linear(16, width, bias=bias).to(dtype).requires_grad_(False)
        config = LoraConfig(**settings)
        layer = Linear(base, POLICY, config=config, r=3 + i, lora_alpha=5 + 2 * i)
        masters = torch.promote_types(dtype, torch.float32)
        for part in (layer.lora_A[POLICY], layer.lora_B[POLICY]):
            part.weight.data = (share * torch.randn(part.weight.shape) / 4).to(masters)
        layers.append(layer)
    return layers


def fused(layers: list[Linear]) -> list[LoraLinear]:
    """Copy layers as those of this engine, which share their input."""
    copies = copy.deepcopy(layers)
    for layer in copies:
        layer.__class__ = LoraLinear
    return SharedInput(copies).layers


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def passed(layers, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Run layers on one input, and back from random gradients -> outputs and gradients by name."""
    torch.manual_seed(1)  # of dropout
    x = numbers(2, 9, 16, dtype=dtype).requires_grad_()
    outputs = [layer(x) for layer in layers]
    gradients = [numbers(*y.shape, seed=2 + i, dtype=y.dtype) for i, y in enumerate(outputs)]
    torch.autograd.backward(outputs, gradients)
    found = {f"y{i}": output.detach() for i, output in enumerate(outputs)} | {"x": x.grad}
    for i, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad:
                found[f"{name}{i}"] = parameter.grad
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_by_hand():
    """With x = (1, 2), W = (3 4), A = (5 6), B = (7), s = 2 and the gradient 10 of y.

    x W^T = 3 + 8 = 11,  x A^T = 5 + 12 = 17,  y = 11 + 2 x 17 x 7 = 249
    dB = s g (x A^T) = 2 x 10 x 17 = 340,  dA = s g B x = 2 x 10 x 7 x (1, 2) = (140, 280)
    dx = g W + s g B A = (30, 40) + 140 (5, 6) = (730, 880)
    """
    base = nn.Linear(2, 1, bias=False).requires_grad_(False)
    layer = Linear(base, POLICY, config=LoraConfig(), r=1, lora_alpha=2)
    down, up = layer.lora_A[POLICY].weight, layer.lora_B[POLICY].weight
    base.weight.data, down.data, up.data = map(torch.tensor, ([[3.0, 4]], [[5.0, 6]], [[7.0]]))
    (layer,) = fused([layer])
    down, up = layer.lora_A[POLICY].weight, layer.lora_B[POLICY].weight
    x = torch.tensor([[1.0, 2]], requires_grad=True)
    y = layer(x)
    y.backward(torch.tensor([[10.0]]))
    assert y.tolist() == [[249]] and x.grad.tolist() == [[730, 880]]
    assert up.grad.tolist() == [[340]] and down.grad.tolist() == [[140, 280]]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_outputs_and_gradients_are_those_of_peft(dtype, tolerance, bias, dropout):
    """Dropout draws the same numbers, so each of the three layers drops the same values."""
    layers = pefts_layers(dtype, bias=bias, lora_dropout=dropout)
    expected, found = passed(layers, dtype), passed(fused(layers), dtype)
    assert found.keys() == expected.keys() and len(found) == 10
    for name, right in expected.items():
        assert found[name].dtype == right.dtype, name
        assert distance(found[name], right) <= tolerance, name


def test_in_eval_mode_nothing_is_dropped():
    layers = pefts_layers(lora_dropout=0.3)
    for layer in layers:
        layer.eval()
    expected, found = passed(layers), passed(fused(layers))
    assert all(distance(found[name], right) <= 1e-6 for name, right in expected.items())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("share", [0.01, 0.1])
def test_in_bf16_they_are_as_near_to_fp32_as_pefts_are(share, dropout):
    """With adapters of a hundredth and a tenth of the base's output, as trained ones have.

    The base's output is rounded before the adapter is added and after it, here and in peft, each
    time by 2^-9 of it at most. What A, B and x A^T lose here is 2^-9 each of the adapter's part.

    Of the gradient of A, the product itself, x, B and g B are rounded, by 2^-9 each.
    """
    layers = pefts_layers(torch.bfloat16, share=share**0.5, lora_dropout=dropout)
    exact = copy.deepcopy(layers)
    for layer in exact:
        layer.base_layer.float()
    x = numbers(4000, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.manual_seed(1)
        oracle = torch.cat([layer(x.float()) for layer in exact], 1)
        torch.manual_seed(1)
        of_peft = torch.cat([layer(x) for layer in layers], 1)
        torch.manual_seed(1)
        own = torch.cat([layer(x) for layer in fused(layers)], 1)
    assert own.dtype == of_peft.dtype == torch.bfloat16 and not torch.equal(own, oracle)
    assert distance(own, oracle) <= 1.03 * distance(of_peft, oracle)
    oracle, of_peft, own = (
        passed(exact),
        passed(layers, torch.bfloat16),
        passed(fused(layers), torch.bfloat16),
    )
    for name, right in oracle.items():
        assert own[name].dtype == of_peft[name].dtype, name
        if "lora" in name:
            assert own[name].dtype == torch.float32
            assert distance(own[name], right) <= 4 * 2.0**-9, name


def test_an_output_without_use_has_no_gradient():
    layers = fused(pefts_layers())
    q, k, v = layers
    x = numbers(3, 16).requires_grad_()
    outputs = [layer(x) for layer in (q, k, v)]
    outputs[1].sum().backward()
    gradient, expected = x.grad.clone(), k.base_layer.weight.sum(0)
    expected = expected + k.scaling[POLICY] * (
        k.lora_B[POLICY].weight.sum(0) @ k.lora_A[POLICY].weight
    )
    torch.testing.assert_close(gradient, expected.expand(3, -1))
    assert q.lora_B[POLICY].weight.grad is None and v.lora_B[POLICY].weight.grad is None
    assert not q.lora_A[POLICY].weight.grad.any() and k.lora_A[POLICY].weight.grad.any()


class Operations(TorchDispatchMode):
    """Note the operations that are no views, with the number of their elements."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.seen.append(function.overloadpacket.__name__)
        return output


@torch.no_grad()
def test_three_layers_share_one_product_with_a():
    """One product with A, then for each layer its base's and B's, which is added to it. The casts
    and the stack are of weights. Nothing else reads or writes what all tokens have.
    """
    layers = fused(pefts_layers(torch.bfloat16, bias=False))
    x = numbers(7, 16, dtype=torch.bfloat16)
    with Operations() as operations:
        q, k, v = (layer(x) for layer in layers)
    expected = ["cat", "_to_copy", "mm", *["mm", "_to_copy", "addmm_"] * 3]
    assert operations.seen == expected
    # in another order, on inputs of their own, and one alone: always the same
    other = x.clone()
    assert torch.equal(layers[2](other), v) and torch.equal(layers[0](other), q)
    assert torch.equal(layers[1](x.clone()), k)


def test_what_is_held_is_for_its_own_input_alone():
    layers = fused(pefts_layers())
    x = numbers(3, 16)
    layers[0](x)
    torch.testing.assert_close(layers[1](2 * x), Linear.forward(layers[1], 2 * x))


def test_nothing_is_held_after_the_last_layer():
    layers = fused(pefts_layers())
    shared = layers[0].shared
    x = numbers(3, 16)
    first = layers[0](x)
    assert shared.input is x and len(shared.outputs) == 2 and first.requires_grad
    for layer in layers[1:]:
        layer(x)
    assert shared.input is None and not shared.outputs


def test_outputs_that_a_failed_forward_has_not_asked_for_are_let_go():
    """Memory runs out between two layers of one input: the others' outputs hold all before them."""
    first, *_ = fused(pefts_layers())
    alive: list[weakref.ref] = []

    def work() -> None:
        if alive:
            assert alive[0]() is None
            return
        x = numbers(5, 16).requires_grad_().exp()
        alive.append(weakref.ref(x))
        first(x)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    Limits().once_more("update", work)
    assert alive and not first.shared.outputs


# ---- what keeps peft's forward -------------------------------------------------------------------
def hooked(layer: Linear) -> None:
    layer.base_layer.register_forward_hook(lambda module, inputs, output: output * 2)


def with_another_active(layer: Linear) -> None:
    layer.update_layer("other", 2, 4, config=LoraConfig(init_lora_weights=False))
    layer.set_adapter([POLICY, "other"])


KEPT = {
    "DoRA": ({"use_dora": True}, None),
    "bias": ({"lora_bias": True}, None),
    "two adapters": ({}, with_another_active),
    "no such adapter": ({}, lambda layer: layer.set_adapter(["other"])),
    "merged": ({}, lambda layer: layer.merge()),
    "disabled": ({}, lambda layer: layer.enable_adapters(False)),
    "a hook": ({}, hooked),
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_is_not_plain_lora_is_as_in_peft(kind):
    settings, change = KEPT[kind]
    layers = pefts_layers(**settings)
    plain = [layer(numbers(5, 16)) for layer in fused(pefts_layers())]
    for layer in layers if change else ():
        torch.manual_seed(0)
        change(layer)
    own = fused(layers)
    assert [layer.plain_adapter(numbers(5, 16)) for layer in own] == [None] * 3
    x = numbers(5, 16)
    for layer, mine, without in zip(layers, own, plain, strict=True):
        assert torch.equal(mine(x), layer(x)) and (
            kind in ("merged", "bias") or not torch.allclose(layer(x), without, atol=1e-3)
        )


def test_one_layer_that_is_not_plain_leaves_the_others_plain():
    layers = pefts_layers()
    hooked(layers[1])
    own, x = fused(layers), numbers(5, 16)
    for layer, mine in zip(layers, own, strict=True):
        torch.testing.assert_close(mine(x), layer(x))
    assert own[0].shared.input is None


def test_under_autocast_and_in_fp16_it_is_as_in_peft():
    layers = pefts_layers()
    x = numbers(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        for layer, mine in zip(layers, fused(layers), strict=True):
            assert mine.plain_adapter(x) is None and torch.equal(mine(x), layer(x))
    (half, *_) = fused(pefts_layers(torch.float16))
    assert half.plain_adapter(x.half()) is None


def test_a_copy_has_layers_of_its_own():
    layers = fused(pefts_layers())
    q, k, v = copy.deepcopy(nn.ModuleList(layers))
    assert q.shared is v.shared is not layers[0].shared and q.shared.layers == [q, k, v]
    k.lora_B[POLICY].weight.data.zero_()
    x = numbers(5, 16)
    assert torch.equal(q(x), layers[0](x))
    assert torch.equal(k(x), k.base_layer(x)) and not torch.equal(k(x), layers[1](x))


# ---- whole models --------------------------------------------------------------------------------
def batch_of(model, images):
    """Make two prompts with two completions each."""
    generator = torch.Generator().manual_seed(0)
    prompts = [
        model.encode_prompt(example, Prompt("p", "Which?"))
        for example in examples_of(images, 56, 84)
    ]
    lengths = zip([prompts[0]] * 2 + [prompts[1]] * 2, (5, 9, 12, 3), strict=True)
    rows = [
        EncodedRow(
            prompt,
            torch.randint(40, 200, (n,), generator=generator),
            torch.ones(n, dtype=torch.bool),
        )
        for prompt, n in lengths
    ]
    return collate_rows(rows, 0)


def logprobs_of(net, model, batch) -> Tensor:
    return completion_logprobs(
        net, model.family, batch, temperature=0.8, suppress_token_ids=model.suppressed_ids
    )[0]


def own_layers(net) -> list[Linear]:
    return [module for module in language_model(net).modules() if isinstance(module, Linear)]


def of_peft(net):
    """Give the layers with LoRA peft's own class again."""
    for layer in own_layers(net):
        layer.__class__ = Linear
    return net


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_run_in_fp32_is_pefts_to_the_bit(
    family, tiny_checkpoint, tiny_images, dropout, checkpointing
):
    """Scalings that are powers of two move no rounding. Masks are those of the same place."""
    model = load(tiny_checkpoint(family))
    net = attach_new_adapter(model, r=4, alpha=8, dropout=dropout)
    for layer in own_layers(net):
        layer.lora_B[POLICY].weight.data.normal_(std=0.1)
    if checkpointing:
        enable_gradient_checkpointing(net)
    batch, results = batch_of(model, tiny_images), []
    assert {type(layer) for layer in own_layers(net)} == {LoraLinear}
    for change in (lambda net: net, of_peft):
        change(net).train()
        dropout_numbers(3, 5, 7)
        logprobs = logprobs_of(net, model, batch)
        (logprobs * numbers(*logprobs.shape)).sum().backward()
        results.append(
            [logprobs.detach()] + [p.grad.clone() for p in net.parameters() if p.requires_grad]
        )
        net.zero_grad()
    assert len(results[0]) > 14 and {type(layer) for layer in own_layers(net)} == {Linear}
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_ratio_begins_at_1_and_the_kl_at_0(family, tiny_checkpoint, tiny_images, dtype):
    """To the bit: policy with checkpointing, old log-probabilities without gradient, reference."""
    model = load(tiny_checkpoint(family), dtype=dtype)
    net = attach_random_adapter(model)
    add_reference(net)
    enable_gradient_checkpointing(net)
    batch = batch_of(model, tiny_images)
    with torch.no_grad():
        old = logprobs_of(net.eval(), model, batch)
    with use_adapter(net, REFERENCE):
        reference = logprobs_of(net, model, batch)
    policy = logprobs_of(net.train(), model, batch)
    policy.sum().backward()
    with torch.no_grad(), net.disable_adapter():
        base = logprobs_of(net, model, batch)
    ratio, kl = (policy - old).exp(), kl_estimate(policy, reference)
    assert ratio.unique().tolist() == [1.0] and not kl.any()
    assert float((policy - base).abs().max()) > 0.1
    # after an update the two part
    for layer in own_layers(net):
        layer.lora_B[POLICY].weight.data.mul_(1.5)
    assert float((logprobs_of(net, model, batch) - reference).abs().max()) > 0.1


def test_names_files_and_methods_are_pefts(family, tiny_checkpoint, tiny_images):
    model = load(tiny_checkpoint(family))
    net = attach_random_adapter(model)
    batch = batch_of(model, tiny_images)
    names = list(adapter_state(net))
    with torch.no_grad():
        expected = logprobs_of(net, model, batch)
        net.merge_adapter()
        merged = logprobs_of(net, model, batch)
        net.unmerge_adapter()
        torch.testing.assert_close(merged, expected, rtol=0, atol=2e-5)
        fuse_adapters(net)  # once more changes nothing
        torch.testing.assert_close(logprobs_of(net, model, batch), expected, rtol=0, atol=2e-5)
        assert list(adapter_state(of_peft(net))) == names
        unloaded = net.merge_and_unload()
        torch.testing.assert_close(logprobs_of(unloaded, model, batch), expected, rtol=0, atol=2e-5)
    assert not own_layers(unloaded)


@pytest.mark.parametrize("targets", [LORA_TARGETS, r".*language_model.*\.(q|v)_proj"])
def test_layers_of_one_input_are_found(tiny_checkpoint, family, targets):
    from peft import get_peft_model

    net = get_peft_model(load(tiny_checkpoint(family)).net, LoraConfig(r=2, target_modules=targets))
    fuse_adapters(net)
    first = language_model(net).layers[0]
    attention = first.self_attn
    assert attention.q_proj.shared is attention.v_proj.shared
    if targets == LORA_TARGETS:
        assert attention.q_proj.shared.layers == [
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
        ]
        assert first.mlp.gate_proj.shared.layers == [first.mlp.gate_proj, first.mlp.up_proj]
        assert attention.o_proj.shared.layers == [attention.o_proj]
        assert first.mlp.down_proj.shared.layers == [first.mlp.down_proj]
    else:
        assert attention.q_proj.shared.layers == [attention.q_proj, attention.v_proj]
        assert type(attention.k_proj) is type(first.mlp.up_proj) is nn.Linear
