"""Choose the product of the sampler's linear layers on a CPU, torch's or oneDNN's, by measuring.

Which of them is faster depends on the processor and on the model's size. They round differently, so
a run keeps the one that it began with: it stands in config.json as `sampling_product`. Where the
two are about as fast it is oneDNN's, so that a run that is begun again makes the same choice.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from engine.config import Resolved
from engine.device import base_dtype
from engine.memory import ModelShape
from engine.ranks import ALONE, Ranks
from engine.sampling_layers import product
from engine.settings import SamplingProduct
from engine.workload import shape_of

TIMES_AS_FAST = 1.1  # that torch's product must be to be chosen
ROUNDS = 7  # of both in turn
LARGEST = 2048  # rows and columns of a weight that are measured: the rest would take no other way


def with_product(
    resolved: Resolved, device: torch.device, rows: Callable[[Any], int], ranks: Ranks = ALONE
) -> Resolved:
    """Return settings with the product that samples faster here, where they leave it open.

    Only in float32 on a CPU: nothing is measured elsewhere.

    rows(config): how many are decoded together. ranks: all of them call this, and take what rank 0
    measures.
    """
    config = resolved.configs[0]
    has_onednn = torch.backends.mkldnn.is_available()
    is_fp32_on_cpu = device.type == "cpu" and base_dtype(config.bf16, device) == torch.float32
    if config.sampling_product == "onednn" and is_fp32_on_cpu and not has_onednn:
        print(
            "note: --sampling_product onednn: this torch was built without oneDNN, so torch's own"
            " products sample, the same but for rounding",
            file=sys.stderr,
        )
    if config.sampling_product != "auto" or not (
        is_fp32_on_cpu and has_onednn and config.sampling_copies
    ):
        return resolved

    def measured() -> str | None:
        shape = shape_of(config.model_name_or_path)
        return None if shape is None else faster_product(shape, rows(config))

    found = ranks.on_first(measured)
    return resolved if found is None else resolved.with_value("sampling_product", found, "measured")


@cache
def faster_product(shape: ModelShape, rows: int) -> SamplingProduct:
    """Measure both products on weights of a model's shapes -> the one to take.

    One token's worth of products of each kind in turn, for so many rows. Weights that read the
    same input lie in one, as where they are used (sampling_layers.merged_products). Takes some
    0.1 s.
    """
    h, q, k, f = shape.hidden, shape.query_width, shape.key_width, shape.intermediate
    layer = [(h, q + 2 * k), (q, h), (h, 2 * f), (f, h)]
    seconds: dict[SamplingProduct, list[float]] = {"torch": [], "onednn": []}
    generator = torch.Generator().manual_seed(0)  # the run's own random state stays as it is
    weights = [_weight(size, generator) for size in [*layer, (h, shape.vocabulary)]]
    inputs = [torch.rand(rows, weight.shape[1], generator=generator) for weight in weights]
    products = {kind: [product(weight, None, kind) for weight in weights] for kind in seconds}
    for round_ in range(ROUNDS + 1):
        for kind, found in seconds.items():
            times = []
            for one, x in zip(products[kind], inputs, strict=True):
                began = time.perf_counter()
                one(x)
                times.append(time.perf_counter() - began)
            if round_:  # in the first oneDNN compiles its kernels
                found.append(shape.layers * sum(times[:-1]) + times[-1])
    medians = {kind: statistics.median(found) for kind, found in seconds.items()}
    return "torch" if medians["torch"] * TIMES_AS_FAST <= medians["onednn"] else "onednn"


def _weight(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Make a weight [out,in] of such a size, at most LARGEST either way."""
    width, height = (min(side, LARGEST) for side in size)
    return torch.rand(height, width, generator=generator)
