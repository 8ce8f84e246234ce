"""Forecast a run on several GPUs by arithmetic: what each must hold, and what travels between them.

It is for a dry run, which may be of a model whose weights are not there yet. Nothing of it was
measured on GPUs.

    the base    whole on every GPU; or in shards, its decoder layers divided among the GPUs of a
                node (`--shard_base`), which gather a layer at a time to learn, and all to sample
    a step      completions (SFT: rows) of all GPUs: each has as many as it would have alone
    summed      gradients of all adapters, one fp32 buffer, in a ring: each GPU sends 2 (n - 1) / n
                of it in a step
    gathered    before a rollout or an evaluation, once: each GPU gets what the others of its node
                hold
"""

from __future__ import annotations

from dataclasses import replace

from engine.memory import (
    FP32,
    GIB,
    SAMPLING_PHASES,
    Forecast,
    ModelShape,
    Workload,
    forecast,
    layer_parameters,
    lora_parameters,
)
from engine.memory_table import CARDS, USABLE, fits

GPUS, NODE = (1, 8, 64), 8  # the rows of the table, and GPUs in a node


def summed_bytes(shape: ModelShape, lora_r: int, gpus: int) -> int:
    """Compute the bytes that each GPU sends to add up the gradients of a step, in a ring."""
    return 2 * (gpus - 1) * FP32 * lora_parameters(shape, lora_r) // gpus


def gathered_bytes(shape: ModelShape, element_size: int, shards: int) -> int:
    """Compute the bytes that each GPU gets of the others to have all layers, for the sampler."""
    return (shards - 1) * shape.layers * layer_parameters(shape) * element_size // shards


def ranks_table(shape: ModelShape, work: Workload, per_step: int, *, evaluates: bool) -> str:
    """Write what 1, 8 and 64 GPUs would need, with the base whole and in shards.

    work: of one GPU. per_step: completions or rows of a step on one. evaluates: whether any set is
    evaluated.
    """
    work = replace(work, device="cuda")
    rows = []
    for gpus in GPUS:
        for shards in sorted({1, min(gpus, NODE)}):
            found = forecast(shape, replace(work, shards=shards))
            if not evaluates:
                del found.phases["evaluation"]
            summed = summed_bytes(shape, work.lora_r, gpus)
            gathered = gathered_bytes(shape, work.element_size, shards)
            rows.append(
                f"  {gpus:4}  {'whole' if shards == 1 else f'{shards} shards':9}"
                f" {gpus * per_step:7} {_largest(found, False)} {_largest(found, True)} "
                + "".join(f" {'yes' if fits(found, card) else 'no':>6}" for card in CARDS)
                + f" {summed / 1e9:8.3f} {gathered / 1e9:9.2f}"
            )
    buffer = lora_parameters(shape, work.lora_r)
    return "\n".join(
        [
            "GPUs        arithmetic for GPUs in nodes of 8, with these micro-batches on each; not"
            " measured",
            f"  {'GPUs':>4}  {'base':9} {'a step':>7} {'learning':>9} {'sampling':>9} "
            + "".join(f" {f'{card} GB':>6}" for card in CARDS)
            + f" {'summed':>8} {'gathered':>9}",
            *rows,
            f"  learning and sampling: GiB that a GPU must hold; a card counts as full at"
            f" {USABLE:.0%}. summed: GB that each sends in a step, of {FP32 * buffer / 1e9:.3f} GB"
            f" of gradients ({buffer:,} numbers). gathered: GB that each gets before it samples",
        ]
    )


def _largest(found: Forecast, sampling: bool) -> str:
    """Write the largest phase of a kind in GiB, "-" where there is none."""
    sizes = [
        sum(parts.values())
        for phase, parts in found.phases.items()
        if (phase in SAMPLING_PHASES) == sampling
    ]
    return f"{max(sizes) / GIB:9.1f}" if sizes else f"{'-':>9}"
