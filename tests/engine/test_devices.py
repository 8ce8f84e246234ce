"""Protect the engine's independence of the device.

Checked: the training forward, the objective, their backward pass and a step of decoding run for
every family, in bf16 and fp32, on a device that this machine does not have. They mix no devices,
and nowhere wait for the device.

The device is a pretended one: torch's fake tensors on `meta` have shapes, dtypes and a device but
no values. What needs a value (int(), bool(), a boolean index, nonzero) fails here, where on a GPU
it would wait for it. Kernels that wait inside, and copies of Python numbers to the device, are not
seen.

Run: pytest tests/engine/test_devices.py
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine.forward
import engine.qwen2_5_vl
from data.prompts import Prompt
from engine.attention import spread
from engine.collate import Batch, collate_rows
from engine.completion import SamplingConfig
from engine.decoding import DecodingBuffers, DecodingStep, Room
from engine.device import on_device, pick_device
from engine.encode import EncodedRow
from engine.families import Qwen25VL
from engine.forward import completion_logprobs, embed, read_prompts
from engine.model import BaseModel, enable_gradient_checkpointing
from engine.ranks import Ranks
from engine.sampling_layers import sampling_layers
from rl.objective import ObjectiveConfig, grpo_loss, token_weights
from tests.helpers.tiny import SAVE, attach_random_adapter, examples_of, load, policy_of

DEVICE = torch.device("meta")
LENGTHS = ((0, 5), (1, 7), (0, 2))  # (prompt, tokens) of every completion; the prompts are padded


class OneDevice(TorchDispatchMode):
    """Raise for an operation that takes or makes a tensor of another device than DEVICE.

    A list of numbers may be made into a tensor of the CPU that is copied without a wait.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function in (torch.ops.aten.lift_fresh.default, torch.ops.prim.device.default):
            return result
        waits = function is not torch.ops.aten._to_copy.default or not kwargs.get("non_blocking")
        for tensor in tree_leaves((args, kwargs, result) if waits else result):
            assert not isinstance(tensor, torch.Tensor) or tensor.device == DEVICE, (
                f"{function}: {tuple(tensor.shape)} on {tensor.device}"
            )
        return result


@contextmanager
def pretended_device() -> Iterator[None]:
    # inputs: torch makes lists of numbers into `meta` tensors of its own
    with FakeTensorMode(allow_non_fake_inputs=True), OneDevice():
        yield


def pretended(value):
    """Turn tensors, and what holds them, into values of the pretended device."""
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device=DEVICE)
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(
            value,
            **{
                field.name: pretended(getattr(value, field.name))
                for field in dataclasses.fields(value)
            },
        )
    if isinstance(value, list):
        return [pretended(item) for item in value]
    return (
        {name: pretended(item) for name, item in value.items()}
        if isinstance(value, dict)
        else value
    )


def move(module: nn.Module, dtype: torch.dtype) -> None:
    """Move weights and buffers to the pretended device.

    The base gets `dtype`, adapters and buffers stay as they are.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            of = parameter.dtype if parameter.requires_grad else dtype
            part._parameters[name] = nn.Parameter(
                torch.empty(parameter.shape, dtype=of, device=DEVICE), parameter.requires_grad
            )
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = pretended(buffer)


def loaded(checkpoint, images) -> tuple[BaseModel, nn.Module, Batch]:
    """Load a model with an adapter in training, and a ragged batch, on the CPU."""
    model = load(checkpoint)
    wrapped = attach_random_adapter(model).train()
    enable_gradient_checkpointing(wrapped)
    texts = (Prompt("a", "Which?"), Prompt("b", "A longer question?"))
    prompts = [
        model.encode_prompt(*pair) for pair in zip(examples_of(images, 56, 112), texts, strict=True)
    ]
    rows = [
        EncodedRow(prompts[p], torch.full((n,), 65), torch.ones(n, dtype=torch.bool))
        for p, n in LENGTHS
    ]
    return model, wrapped, collate_rows(rows, 0)


def update(checkpoint, images, dtype: torch.dtype) -> tuple[torch.Tensor, list[nn.Parameter]]:
    """Compute log-probabilities, loss and gradients of one micro-batch on the pretended device.

    Returns the log-probabilities and what is trained.
    """
    model, wrapped, batch = loaded(checkpoint, images)
    objective = ObjectiveConfig()
    with pretended_device():
        move(wrapped, dtype)
        batch = pretended(batch)
        logprobs, entropy = completion_logprobs(
            wrapped,
            model.family,
            batch,
            temperature=0.8,
            suppress_token_ids=model.suppressed_ids,
            entropy=True,
        )
        mask, old = batch.completion_mask, torch.empty_like(logprobs)
        weights = token_weights(
            mask, objective.loss_type, num_completions=3, num_tokens=14, max_completion_length=8
        )
        loss, _ = grpo_loss(
            logprobs,
            old,
            old,
            old[:, 0],
            mask,
            weights,
            objective,
            sampling_logprobs=old,
            entropy=entropy,
        )
        loss.backward()
    return logprobs, [parameter for parameter in wrapped.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", list(SAVE))
def test_an_update_stays_on_the_device(family, dtype, tiny_checkpoint, tiny_images):
    logprobs, trained = update(tiny_checkpoint(family), tiny_images, dtype)
    assert (
        logprobs.device == DEVICE and logprobs.dtype == torch.float32 and logprobs.shape == (3, 7)
    )
    assert trained and all(
        p.grad.device == DEVICE and p.grad.dtype == torch.float32 for p in trained
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", list(SAVE))
def test_a_step_of_decoding_stays_on_the_device(family, dtype, tiny_checkpoint, tiny_images):
    """Its parts, as the sampler puts them together."""
    model, wrapped, batch = loaded(tiny_checkpoint(family), tiny_images)
    policy = policy_of(wrapped.eval(), model)
    with pretended_device():
        move(wrapped, dtype)
        prompts, places = pretended(batch.prompts), pretended(batch.prompt_places)
        length = prompts.input_ids.shape[1]
        of = DecodingBuffers(policy, Room(6, 2, length, 3, 8))
        with sampling_layers(wrapped) as head:
            hidden, positions = read_prompts(
                wrapped,
                model.family,
                prompts,
                places,
                partial(of.cache.keep_prompts, slots=torch.arange(2, device=DEVICE)),
            )
            of.prompt_positions[:] = positions
            of.keep_states(hidden.repeat_interleave(3, 0))
            step = DecodingStep(policy, head, SamplingConfig(0.8, 0.95, 8), of)
            for rows in (6, 5):  # of six completions one has finished
                of.arrange([(i, i, 4) for i in range(rows)])
                of.make_masks(policy, rows, length, 8)
                step.draw(rows)
                step.read(rows, length, 5)
    assert of.hidden.device == DEVICE and of.hidden.dtype == dtype and of.hidden.shape == (6, 32)
    assert length == of.cache.layers[0].prompt_keys.shape[2]
    assert of.cache.layers[0].keys.dtype == dtype


# ---- controls: each leaves something behind that the tests above must see ------------------------
def arange_on_the_cpu(patch):
    patch.setattr(
        engine.qwen2_5_vl,
        "causal_mask",
        lambda mask, queries: (
            torch.tril(torch.ones(len(queries), mask.shape[1])).bool() & mask[:, None]
        ),
    )


def count_of_a_mask(patch):
    patch.setattr(
        engine.forward,
        "embed",
        lambda model, prompts: embed(model, prompts) * int(prompts.attention_mask.sum()),
    )


def boolean_index(patch):
    patch.setattr(
        engine.forward,
        "spread",
        lambda values, places, shape: spread(values, places, shape) + values[values > 0].sum(),
    )


def transformers_positions(patch):
    def positions(self, model, prompts):
        grids = torch.cat([image["image_grid_thw"] for image in prompts.vision])
        return model.model.get_rope_index(
            prompts.input_ids,
            mm_token_type_ids=prompts.token_types,
            image_grid_thw=grids,
            attention_mask=prompts.attention_mask,
        )[0]

    patch.setattr(Qwen25VL, "positions", positions)


@pytest.mark.parametrize(
    ("leave", "error"),
    [
        (arange_on_the_cpu, AssertionError),
        (count_of_a_mask, DataDependentOutputException),
        (boolean_index, DynamicOutputShapeException),
        (transformers_positions, (DataDependentOutputException, DynamicOutputShapeException)),
    ],
)
def test_control_something_is_left_behind(leave, error, tiny_checkpoint, tiny_images, monkeypatch):
    leave(monkeypatch)
    with pytest.raises(error):
        update(tiny_checkpoint("qwen2_5_vl"), tiny_images, torch.bfloat16)


# ---- which device a rank takes, and how it computes ----------------------------------------------
@pytest.fixture
def as_before(monkeypatch):
    """Put back what `pick_device` sets in the process."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is put back as well
        monkeypatch.delenv(name)
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def precision() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


def test_float32_is_float32_unless_tf32_is_asked_for(monkeypatch, as_before, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    pick_device(tf32=True)
    assert precision() == ("high", True)
    pick_device()  # the next command of the same process, without the flag
    assert precision() == ("highest", False)
    assert capsys.readouterr().err == ""


def test_tf32_is_nothing_to_a_cpu(monkeypatch, as_before, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pick_device(tf32=True)
    assert precision() == ("highest", False)
    assert capsys.readouterr().err == "note: --tf32 has no effect on a CPU\n"


@pytest.mark.parametrize(
    ("cuda", "given", "found"),
    [
        (True, {}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        (True, {"PYTORCH_CUDA_ALLOC_CONF": "a:1"}, {"PYTORCH_CUDA_ALLOC_CONF": "a:1"}),
        (True, {"PYTORCH_ALLOC_CONF": "a:1"}, {"PYTORCH_ALLOC_CONF": "a:1"}),
        (False, {}, {}),
    ],
)
def test_the_allocators_segments_grow_unless_the_user_says_otherwise(
    monkeypatch, as_before, cuda, given, found
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    pick_device()
    assert {name: value for name, value in os.environ.items() if "ALLOC_CONF" in name} == found


def test_copies_to_a_gpu_are_made_from_pinned_memory(monkeypatch):
    done: list[tuple] = []
    tensor, pinned = torch.zeros(2), torch.ones(2)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda one: done.append(("pin",)) or pinned)

    def to(one, device, *, non_blocking):
        done.append((bool(one[0]), torch.device(device).type, non_blocking))

    monkeypatch.setattr(torch.Tensor, "to", to)
    on_device(tensor, torch.device("cuda", 1))
    on_device(tensor, "cpu")
    assert done == [("pin",), (True, "cuda", True), (False, "cpu", True)]


def test_each_rank_of_a_node_computes_on_its_own_gpu(monkeypatch, as_before):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device() == torch.device("cuda")  # one process: whichever GPU is the first
    ranks = Ranks()
    for rank, local_rank in ((0, 0), (3, 3), (8, 0), (13, 5)):
        ranks.rank, ranks.size, ranks.local_rank = rank, 16, local_rank
        assert pick_device(None, ranks) == torch.device("cuda", local_rank)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(None, ranks) == pick_device() == torch.device("cpu")
