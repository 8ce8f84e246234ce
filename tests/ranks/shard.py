"""Run in every rank of tests/ranks/test_shard.py: a sharded base beside the same one, whole.

Each function prints what it found as one line of JSON.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText

import run_grpo
import run_sft
from data.prompts import PROMPTS
from engine import shard
from engine.collate import Batch, Rows, collate_rows
from engine.completion import SamplingConfig
from engine.encode import EncodedRow
from engine.families import language_model
from engine.generate import generate
from engine.launch import Launch
from engine.model import (
    BaseModel,
    adapter_state,
    add_reference,
    enable_gradient_checkpointing,
    load_model,
)
from engine.optim import build_optimizer, clip_gradients
from engine.policy import Policy
from engine.ranks import Ranks
from engine.runtime import StopRequested
from engine.shard import ShardedBase
from tests.helpers.runs import grpo_flags, sft_flags, speak
from tests.helpers.tiny import attach_random_adapter, examples_of, uniform_for
from tests.helpers.torchrun import meet_again

LOGPROBS = Policy.logprobs
# family, dtype, gradient checkpointing, whether the head is the embedding
CASES = [
    ("qwen2_5_vl", torch.float32, False, True),
    ("qwen2_5_vl", torch.bfloat16, True, False),
    ("gemma3", torch.float32, True, False),
    ("gemma3", torch.bfloat16, False, True),
]
CPU = torch.device("cpu")


# ---- models --------------------------------------------------------------------------------------
def load(folder: Path, dtype: torch.dtype, ranks: Ranks | None) -> BaseModel:
    """Load a base whole, or sharded among ranks."""
    return load_model(
        str(folder),
        dtype=dtype,
        device=CPU,
        min_visual_tokens=4,
        max_visual_tokens=16,
        shard_among=ranks,
    )


def policy_of(base: BaseModel, checkpointing: bool) -> Policy:
    """Give a base an adapter and a reference that differ."""
    net = attach_random_adapter(base)
    add_reference(net)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B.default" in name:
                parameter.mul_(1.5)
    if checkpointing:
        enable_gradient_checkpointing(net)
    return Policy(net, base, PROMPTS["free_reasoning"], 0.8)


def rows_of(
    policy: Policy, images: Path, lengths: tuple[int, ...] = (9, 4, 12)
) -> list[EncodedRow]:
    """Make three completions of each of two prompts."""
    generator = torch.Generator().manual_seed(5)
    return [
        EncodedRow(prompt, ids, torch.ones(len(ids), dtype=torch.bool))
        for prompt in map(policy.encode, examples_of(images, 56, 112))
        for ids in (torch.randint(0, 200, (length,), generator=generator) for length in lengths)
    ]


def whole(tensor: Tensor) -> Tensor:
    """Give all of a tensor, of which this rank may have a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ---- what a run does -----------------------------------------------------------------------------
def update(policy: Policy, rows: list[EncodedRow], ranks: Ranks, size: int = 2) -> list[Tensor]:
    """Run forward and backward of each micro-batch, as the loops do -> their log-probabilities."""

    def work(indices: list[int]) -> Tensor:
        micro = [rows[i] for i in indices]
        logprobs = policy.logprobs(collate_rows(micro, policy.encoder.pad_token_id))
        (-logprobs.sum() / 50).backward()
        return logprobs.detach()

    policy.net.train()
    with ranks.together():
        return policy.limits.each("update", Rows(rows, size), work)[1]


def score(policy: Policy, rows: list[EncodedRow], ranks: Ranks, own: bool) -> list[Tensor]:
    """Score with the reference, and with the policy too where `own`."""

    @torch.no_grad()
    def work(indices: list[int]) -> list[Tensor]:
        batch = collate_rows([rows[i] for i in indices], policy.encoder.pad_token_id)
        with policy.reference():
            found = [policy.logprobs(batch)]
        return [*found, policy.logprobs(batch)] if own else found

    with policy.evaluating(), ranks.together():
        return sum(policy.limits.each("scoring", Rows(rows, 2), work)[1], [])


def sample(
    policy: Policy,
    rows: list[EncodedRow],
    ranks: Ranks,
    most: int = 5,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Tensor]:
    """Sample three completions of each prompt -> their tokens and log-probabilities."""
    prompts = list({id(row.prompt): row.prompt for row in rows}.values())
    with ranks.together():
        groups = generate(
            policy,
            prompts,
            SamplingConfig(0.8, 0.95, most),
            num_generations=3,
            uniform=uniform_for(len(prompts), 3, most),
            should_stop=should_stop,
        )
    return [part for group in groups for one in group for part in (one.ids, one.logprobs)]


def everything(policy: Policy, rows: list[EncodedRow], ranks: Ranks) -> dict[str, list[Tensor]]:
    """Do what two steps of a run do, with other numbers of forwards on each rank."""
    optimizer = build_optimizer(policy.net, learning_rate=1e-2, weight_decay=0.1)
    own = rows[:1] if ranks.first else rows[1:]  # 1 micro-batch and 3
    found = {"sampled": sample(policy, rows, ranks)}
    found["scored"] = score(policy, own, ranks, own=not ranks.first)  # 1 forward and 6
    for step in ("first", "second"):
        found[f"{step} logprobs"] = update(policy, own, ranks)
        ranks.sum_gradients(policy.parameters)
        found[f"{step} gradients"] = [p.grad.clone() for p in policy.parameters]
        clip_gradients(policy.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    # one rank writes more tokens than the other, and with an empty share nothing at all
    found["after"] = sample(policy, rows, ranks, 2 + 3 * ranks.rank)
    found["ragged"] = sample(policy, rows, ranks) if ranks.first else nothing(ranks)
    found["rest"] = nothing(ranks) if ranks.first else update(policy, own, ranks)
    found["adapter"] = list(adapter_state(policy.adapted).values())
    return found


def nothing(ranks: Ranks) -> list[Tensor]:
    """Come to the end of a block in which others work."""
    with ranks.together():
        return []


def differences(one: dict[str, list[Tensor]], other: dict[str, list[Tensor]]) -> dict[str, float]:
    """Give the largest difference by name. Tensors of other shapes are infinitely different."""
    assert one.keys() == other.keys()
    return {
        name: max(
            (
                float((a.double() - b.double()).abs().max()) if a.shape == b.shape else torch.inf
                for a, b in zip(tensors, other[name], strict=True)
            ),
            default=0.0,
        )
        for name, tensors in one.items()
    }


def refused(work: Callable[[], object]) -> str:
    """Say what a piece of work raises, and after how long at most, "" where it goes through."""
    start = time.perf_counter()
    try:
        work()
        return ""
    except (Exception, KeyboardInterrupt) as error:
        took = time.perf_counter() - start
        assert took < 30, f"{took} s: {error}"
        return f"{type(error).__name__}: {error}".splitlines()[0]


# ---- programs ------------------------------------------------------------------------------------
def two_ranks(folder: str) -> None:
    """Run all that two ranks can show: it is the imports that cost."""
    torch.set_num_threads(1)
    with Ranks(Launch.of()) as ranks:
        for case in CASES:
            tell("exact", exact(Path(folder), ranks, *case))
        tell("wrong", wrong_ways(Path(folder), ranks))
        tell("faults", faults(Path(folder), ranks))
    tell("runs", runs(Path(folder)))


def two_nodes(folder: str) -> None:
    """Compare on two nodes of two ranks, which hold a copy of the base each."""
    torch.set_num_threads(1)
    launch = Launch.of()
    launch = replace(launch, local_rank=launch.rank % 2, local_size=2)
    with Ranks(launch) as ranks:
        tell("exact", exact(Path(folder), ranks, *CASES[1]))


def tell(what: str, found: object) -> None:
    print(f"told {json.dumps([what, found])}", flush=True)


def exact(
    folder: Path, ranks: Ranks, family: str, dtype: torch.dtype, checkpointing: bool, tied: bool
) -> dict[str, Any]:
    """Compare a sharded base with the whole one."""
    path, found = folder / f"{family}-{'tied' if tied else 'untied'}", []
    one = load(path, dtype, None)
    with reading_on_first(ranks):
        other = load(path, dtype, ranks)
    own, layers = dict(other.net.named_parameters()), language_model(other.net).layers
    loaded = [torch.equal(whole(own[name]), p) for name, p in one.net.named_parameters()]
    buffers = dict(one.net.named_buffers())
    loaded += [torch.equal(b, buffers[name]) for name, b in other.net.named_buffers()]
    facts = {
        "case": [family, str(dtype), checkpointing, tied],
        "loaded": all(loaded) and own.keys() == dict(one.net.named_parameters()).keys(),
        "same stops": one.stop_ids == other.stop_ids,
        "tied": "lm_head.weight" not in own,
        "share": sum(p.to_local().numel() for p in layers.parameters())
        / sum(p.numel() for p in layers.parameters()),
    }
    for base in (one, other):
        policy = policy_of(base, checkpointing)
        found.append(everything(policy, rows_of(policy, folder), ranks))
    changed = differences(
        *({"": found[0][f"{step} gradients"]} for step in ("first", "second"))
    )  # by the first step
    return facts | {"changed": changed[""], "differences": differences(*found)}


@contextmanager
def reading_on_first(ranks: Ranks) -> Iterator[None]:
    """Let other ranks than the first read no weights."""

    def read(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a rank reads weights that are broadcast to it")

    with pytest.MonkeyPatch.context() as patch:
        if not ranks.first:
            patch.setattr(AutoModelForImageTextToText, "from_pretrained", read)
        yield


def wrong_ways(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Shard a model that has adapters already, rightly and in two wrong ways.

    Returns for each how many parameters are trained and how many get a whole gradient in a step
    after the reference was used, as GRPO uses it first, or what is raised.
    """
    mesh = shard.node_mesh(ranks, CPU)

    def adapters_inside(module: nn.Module, mesh: DeviceMesh, **options: Any) -> object:
        # as torch's examples do it, layer by layer
        return None if hasattr(module, "embed_tokens") else fully_shard(module, mesh=mesh)

    def embedding_inside(module: nn.Module, **options: Any) -> object:
        adapters = {p for name, p in module.named_parameters() if "lora_" in name}
        return fully_shard(module, **options | {"ignored_params": adapters})

    def reached(how: Callable[..., object]) -> list[int]:
        policy = policy_of(load(folder / "qwen2_5_vl-tied", torch.float32, None), False)
        rows = rows_of(policy, folder)[:2]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shard, "fully_shard", how)
            shard.shard_base(policy.adapted, mesh)
        score(policy, rows, ranks, own=False)
        update(policy, rows, ranks)
        return [len(policy.parameters), sum(type(p.grad) is Tensor for p in policy.parameters)]

    return {
        "right": reached(fully_shard),
        "adapters inside": reached(adapters_inside),
        "embedding inside": refused(lambda: reached(embedding_inside)),
    }


def runs(folder: Path) -> dict[str, list[int]]:
    """Run both scripts with a whole and a sharded base -> {script: the empty forwards of each run}.

    A step's last rows are fewer than the ranks, validation has 1 and 2 images a rank. A GRPO prompt
    has 389 tokens: two of its completions fit into a forward where they have 11 tokens at most.
    """
    model, data = folder / "gemma3-tied", folder / "data" / "data.jsonl"
    common = ["--validation_file", f"site={folder / 'three' / 'data.jsonl'}"]
    common += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    common += ["--per_device_eval_batch_size", "1", "--gradient_checkpointing"]
    sft = [*common, "--num_train_epochs", "1", "--lora_dropout", "0.3"]
    grpo = [*common, "--per_device_train_batch_size", "2", "--max_tokens_per_forward", "400"]
    grpo += ["--max_steps", "4", "--steps_per_generation", "4", "--num_iterations", "1"]
    jobs = [
        ("sft", run_sft.main, sft_flags, model, sft),
        ("grpo", run_grpo.main, grpo_flags, folder / "sft-whole", grpo),
    ]
    empty: dict[str, list[int]] = {}
    for name, main, flags, start, more in jobs:
        for kind in ("whole", "sharded"):
            meet_again()
            argv = flags(start, data, folder / f"{name}-{kind}", *more)
            argv += ["--shard_base"] * (kind == "sharded")
            with (
                pytest.MonkeyPatch.context() as patch,
                mock.patch.object(
                    ShardedBase, "_idle", autospec=True, side_effect=ShardedBase._idle
                ) as idle,
            ):
                if name == "grpo":
                    speak(patch)
                assert main(argv) == 0
            empty.setdefault(name, []).append(idle.call_count)
    return empty


def faults(folder: Path, ranks: Ranks) -> dict[str, str]:
    """Let rank 1 fail in ways that others must not wait for, and at last in one that they must."""
    policy = policy_of(load(folder / "qwen2_5_vl-tied", torch.float32, ranks), True)
    rows, found = rows_of(policy, folder), {}
    before = update(policy, rows, ranks)
    calls = []

    def failing(error: BaseException) -> Callable[..., Tensor]:
        def logprobs(own: Policy, batch: Batch) -> Tensor:
            calls.append(1)
            if len(calls) == 2 and not ranks.first:
                raise error
            return LOGPROBS(own, batch)

        return logprobs

    for name, error in {
        "fails": ValueError("of rank 1"),
        "stops": StopRequested(),
        "memory": torch.OutOfMemoryError("Tried to allocate 2 GiB. More"),
    }.items():
        calls.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Policy, "logprobs", failing(error))
            found[name] = refused(partial(update, policy, rows, ranks))

    def stop() -> bool:
        calls.append(1)
        return len(calls) > 2 and not ranks.first

    calls.clear()
    found["sampler stops"] = refused(partial(sample, policy, rows, ranks, should_stop=stop))
    policy.net.zero_grad()
    after = update(policy, rows, ranks)
    found["goes on"] = str(all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))

    # in the middle of a forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "TIMEOUT", timedelta(seconds=3))
        policy = policy_of(load(folder / "qwen2_5_vl-tied", torch.float32, ranks), False)
    if not ranks.first:
        language_model(policy.net).layers[1].mlp.forward = None
    found["within a forward"] = refused(partial(update, policy, rows, ranks))
    return found
