"""Measure what the sampler's layers and its nucleus pay (engine/sampling_layers.py, nucleus.py).

First come products alone, then the nucleus, then whole samplings.

    python tests/benchmarks/sampling_layers.py       # about 10 minutes

The products are x W^T of the benchmark models' shapes (models.py) and of their head, for rows from
one token to a prompt: torch's `linear` on weights as they are, against torch's and oneDNN's
products on weights laid out for them, beside a plain sum of the same weights, which says how fast
memory is. The nucleus of four rows is found by sorting and bit by bit.
Then come samplings of one prompt on both models: with the adapter beside its weights, and merged
with either product, in decoder layers of few operations and in transformers' own. All run on one
thread in fp32. Printed are CPU time, median of the rounds, and ratios of each round's pairs with
their range.
Which is faster depends on the processor: torch's own products are Intel's MKL. A run measures it
(engine/sampling_product.py).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import checkout  # noqa: F401  this checkout before an installed one
import torch
from torch import nn
from torch.nn.functional import linear

from engine import generate, nucleus
from engine import sampling_layers as layers
from engine.encode import EncodedPrompt
from engine.sampling_layers import product, sampling_layers
from tests.benchmarks.cost_growth import seconds
from tests.benchmarks.models import FAMILIES, Sizes
from tests.benchmarks.steps import Product, machine, make_folder, quiet

KINDS = ("torch", "onednn")
# bytes of weights in turn, or they would stay in the fastest cache as they do not in a model
WEIGHTS = 45_000_000


def ratios(slow: list[float], fast: list[float]) -> str:
    values = [a / b for a, b in zip(slow, fast, strict=True)]
    return f"{statistics.median(values):5.2f} ({min(values):.2f} to {max(values):.2f})"


@torch.no_grad()
def compare_products(out_size: int, in_size: int, rows: int, rounds: int) -> None:
    weights = [
        torch.randn(out_size, in_size) for _ in range(max(1, WEIGHTS // (4 * out_size * in_size)))
    ]
    ways: list[list[Callable]] = [
        [partial(linear, weight=weight) for weight in weights],
        *([product(weight, None, kind) for weight in weights] for kind in KINDS),
        # of copies, or it would bring the weights of the first way into the cache
        [lambda x, weight=weight: weight.sum() for weight in [one.clone() for one in weights]],
    ]
    x = torch.randn(rows, in_size)
    for products in ways[1:-1]:
        torch.testing.assert_close(products[0](x), linear(x, weights[0]), rtol=0, atol=1e-3)
    calls = max(1, len(weights) * 4 // max(1, rows // 32))

    def run(products: Sequence[Callable]) -> None:
        for i in range(calls):
            products[i % len(products)](x)

    for products in ways:
        run(products)
    found = [[seconds(partial(run, products)) for products in ways] for _ in range(rounds)]
    columns = list(zip(*found, strict=True))
    times = "".join(f" {statistics.median(one) / calls * 1e6:10.0f}" for one in columns)
    against = "   ".join(ratios(columns[0], one) for one in columns[1:-1])
    print(f"  {rows:5} x {in_size:4} -> {out_size:4}{times}   {against}", flush=True)


def compare_nuclei(vocabulary: int, spread: float, rounds: int) -> None:
    """Find the nucleus of four rows in both ways. spread: of the logits; small ones are flat."""
    logprobs = torch.randn(4, vocabulary).mul(spread).log_softmax(1)
    by_bits = patch.object(nucleus, "_border_by_sorting", lambda *given: None)
    found: dict[str, list[float]] = {"sorting": [], "bits": []}
    calls = max(1, 500_000 // vocabulary)
    for _ in range(rounds + 1):  # the first is not counted
        for name, way in (("sorting", nullcontext()), ("bits", by_bits)):
            with way:
                found[name].append(
                    seconds(lambda: [nucleus.nucleus(logprobs, 0.95) for _ in range(calls)])
                )
    for times in found.values():
        del times[0]
    time = statistics.median(found["sorting"]) / calls * 1e6
    print(f"  {vocabulary:10} {spread:6} {time:9.0f}   {ratios(found['bits'], found['sorting'])}")


def adapter_beside(net: nn.Module, **_: object) -> AbstractContextManager:
    """Take the place of `sampling_layers`: the adapter stays beside its weights."""
    return sampling_layers(net, copies=False)


def compare_samplings(
    engine: Product, prompts: Sequence[EncodedPrompt], generations: int, rounds: int
) -> None:
    torchs, onednns = (patch.object(engine, "sampling_product", kind) for kind in KINDS)
    plain = patch.object(layers, "token_layers", lambda *given: nullcontext([]))
    ways: dict[str, tuple[Sequence[AbstractContextManager], str | None]] = {  # and against which
        "adapter beside": (
            [patch.object(generate, "sampling_layers", adapter_beside)],
            "merged, oneDNN",
        ),
        "merged, torch": ([torchs], "merged, oneDNN"),
        "merged, oneDNN": ([onednns], None),
        "torch, plain layers": ([torchs, plain], "merged, torch"),
        "oneDNN, plain layers": ([onednns, plain], "merged, oneDNN"),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):  # the first is not counted
        for name, (patches, _) in ways.items():
            with ExitStack() as stack:
                for one in patches:
                    stack.enter_context(one)
                found[name].append(seconds(lambda: engine.sample(prompts, generations)))
    for times in found.values():
        del times[0]
    for name, (_, other) in ways.items():
        against = f"   {ratios(found[name], found[other])} {other}" if other else ""
        time = statistics.median(found[name])
        print(f"  G {generations}, {name:20} {time:7.2f}{against}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument(
        "--rows", nargs="+", type=int, default=[1, 4, 8, 32, 577], help="of a product"
    )
    parser.add_argument(
        "--num_generations", nargs="+", type=int, default=[4, 8], help="completions of the prompt"
    )
    parser.add_argument("--new_tokens", type=int, default=Sizes.new_tokens, help="of a completion")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    quiet()
    print(machine())
    if not torch.backends.mkldnn.is_available():
        raise SystemExit("this torch has no oneDNN: the sampler uses torch's products here")
    sizes = Sizes(new_tokens=arguments.new_tokens)
    print(
        f"\nOne product\n  {'rows':>5}   {'in -> out':12} {'as it is':>10} {'torch, us':>10}"
        f" {'oneDNN, us':>10} {'a sum':>10}   times as fast as it is"
    )
    for shape in (
        (sizes.hidden, sizes.hidden),
        (sizes.intermediate, sizes.hidden),
        (sizes.hidden, sizes.intermediate),
        (sizes.vocabulary, sizes.hidden),
    ):
        for rows in arguments.rows:
            compare_products(*shape, rows, arguments.rounds)
    print(
        f"\nNucleus of four rows\n  {'vocabulary':>10} {'spread':>6} {'us':>9}   bit by bit: times"
        " as long"
    )
    for vocabulary, spread in ((300, 2.0), (4096, 2.0), (151_936, 0.5)):
        compare_nuclei(vocabulary, spread, arguments.rounds)
    for family in arguments.families:
        print(f"\n{FAMILIES[family]}, one prompt\n  {'':25} {'CPU s':>7}   times as long as")
        with tempfile.TemporaryDirectory() as name:
            [example] = make_folder(Path(name), family, sizes, 1)
            engine = Product(Path(name), family, sizes)
            prompts = engine.look([example], engine.prompt_for(example))
            for generations in arguments.num_generations:
                compare_samplings(engine, prompts, generations, arguments.rounds)


if __name__ == "__main__":
    main()
