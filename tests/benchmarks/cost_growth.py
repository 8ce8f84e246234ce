"""Measure how the cost of a GRPO step's parts grows, and what a second look at an image costs.

It grows with completions of a prompt, prompts, their length, the completions' length and the
vocabulary. A second look at an image costs no time in the vision tower.

    python tests/benchmarks/cost_growth.py                              # about half an hour
    python tests/benchmarks/cost_growth.py --new_tokens 32 --rounds 1   # a first look

On the benchmark models (models.py), with gradient checkpointing, in fp32 on one thread. The parts
are those of the loops: the sampler, old and reference log-probabilities, the policy's forward and
backward pass with entropy. One quantity grows at a time. Seconds are CPU time of this process,
medians over rounds that go through all sizes in turn. Memory is what torch allocates at most at
once over the loaded model, from its profiler: the same each time. All tokens go through one
forward. In the last column they go in pieces, through forwards of at most --max_tokens_per_forward
tokens.

Below each table cost is fitted by a line over all tokens, n(S + G C) for n prompts of S tokens with
G completions of C: seconds a thousand tokens, R^2, and the largest distance of a measured time from
the line, in percent of the time. Attention is the part that no line describes: its share of a
training pass's operations is in the table, and below all tables the same fit has a second term for
the pairs of tokens that see each other.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import checkout  # noqa: F401  this checkout before an installed one
import torch
from peft import PeftModel

from data.examples import Example
from engine.collate import collate_rows, plan_batches
from engine.completion import SamplingConfig
from engine.encode import EncodedPrompt, EncodedRow
from engine.generate import generate
from engine.model import (
    BaseModel,
    add_reference,
    attach_adapter,
    enable_gradient_checkpointing,
)
from tests.benchmarks import models
from tests.benchmarks.models import FAMILIES, Costs, Sizes
from tests.benchmarks.steps import machine, quiet
from tests.helpers.memory import allocated_peak
from tests.helpers.tiny import policy_of, uniform_for

PARTS = ("sampler", "old + reference", "policy")
PIECES = "policy in pieces"
VOCABULARY_TOKENS = 64  # of a completion where the vocabulary grows


@dataclass(frozen=True)
class Point:
    """Name one size of a rollout: `prompts` prompts, `generations` completions each."""

    sizes: Sizes
    prompts: int = 1
    generations: int = 4

    @property
    def tokens(self) -> int:
        return self.prompts * (self.sizes.prompt_length + self.generations * self.sizes.new_tokens)

    @property
    def pairs(self) -> float:
        """Count the pairs of a token and one that it sees, itself left out."""
        prompt, new = self.sizes.prompt_length, self.sizes.new_tokens
        return self.prompts * (prompt**2 / 2 + self.generations * (new * prompt + new**2 / 2))


@dataclass(frozen=True)
class Found:
    """Hold seconds and bytes by part, and the bytes of the policy's pass in pieces."""

    seconds: dict[str, float]
    bytes: dict[str, int]


class Workbench:
    """Hold the benchmark model of one family and vocabulary with both adapters."""

    def __init__(self, family: str, folder: Path, sizes: Sizes, max_tokens: int) -> None:
        model_folder = models.save_checkpoint(
            family, folder / f"{family}-{sizes.vocabulary}", sizes
        )
        adapters = [
            models.save_adapter(model_folder, folder / f"{family}-{name}", seed, sizes)
            for seed, name in enumerate(("policy", "reference"))
        ]
        # completions are full
        self.model: BaseModel = replace(
            models.load(model_folder, sizes, vision_cache_gb=1.0), stop_ids=frozenset()
        )
        self.net: PeftModel = attach_adapter(self.model, adapters[0], trainable=True)
        add_reference(self.net, adapters[1])
        enable_gradient_checkpointing(self.net)
        self.costs, self.max_tokens = Costs(self.model.net.config, sizes), max_tokens

    def prompts(self, point: Point, examples: Sequence[Example]) -> list[EncodedPrompt]:
        prompt = models.make_prompt(self.model, examples[0], point.sizes)
        return [self.model.encode_prompt(example, prompt) for example in examples[: point.prompts]]

    def parts(self, point: Point, examples: Sequence[Example]) -> dict[str, Callable[[], None]]:
        prompts, generator = self.prompts(point, examples), torch.Generator().manual_seed(0)
        length = point.sizes.new_tokens
        rows = [
            EncodedRow(
                prompt,
                torch.randint(33, 123, (length,), generator=generator),
                torch.ones(length, dtype=torch.bool),
            )
            for prompt in prompts
            for _ in range(point.generations)
        ]
        asked = policy_of(self.net, self.model, temperature=0.8)

        def batches(max_tokens: int | None = None):
            for indices in plan_batches(rows, len(rows), max_tokens):
                yield collate_rows([rows[i] for i in indices], self.model.encoder.pad_token_id)

        def sampler() -> None:
            generate(
                asked,
                prompts,
                SamplingConfig(0.8, 0.95, length),
                num_generations=point.generations,
                uniform=uniform_for(len(prompts), point.generations, length),
            )

        @torch.no_grad()
        def scoring() -> None:
            asked.net.eval()
            for batch in batches():
                asked.logprobs(batch)
                with asked.reference():
                    asked.logprobs(batch)

        def policy(max_tokens: int | None = None) -> None:
            asked.net.train()
            for batch in batches(max_tokens):
                logprobs, _ = asked.logprobs_and_entropy(batch)
                logprobs.sum().backward()
            asked.net.zero_grad()

        return dict(
            zip(
                (*PARTS, PIECES),
                (sampler, scoring, policy, lambda: policy(self.max_tokens)),
                strict=True,
            )
        )

    def attention_share(self, point: Point) -> float:
        """Return attention's share of a training pass's operations, without the head."""
        operations = self.costs.language(point.tokens, point.pairs)
        return 4 * operations.attention / operations.trained


def measured(
    bench: Workbench, points: Sequence[Point], examples: Sequence[Example], rounds: int
) -> list[Found]:
    """Measure every point, all in turn in each round. What is allocated is counted once."""
    parts = [bench.parts(point, examples) for point in points]
    for step in parts[0].values():
        step()  # what libraries do once
    times = [
        [
            {name: seconds(step) for name, step in of_point.items() if name in PARTS}
            for of_point in parts
        ]
        for _ in range(rounds)
    ]
    return [
        Found(
            {name: statistics.median(found[i][name] for found in times) for name in PARTS},
            {name: allocated(step) for name, step in of_point.items()},
        )
        for i, of_point in enumerate(parts)
    ]


def allocated(step: Callable[[], None]) -> int:
    """Count bytes as allocated_peak does.

    A sampler's profile has a million events, in cycles that would pile up to tens of GB.
    """
    found = allocated_peak(step, models.CPU)
    gc.collect()
    return found


def seconds(step: Callable[[], object]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


# ---- lines ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Fit:
    """Hold a fit.

    coefficients: of a constant and of each term
    residual: the largest distance from a measured value, as a share of it
    """

    coefficients: list[float]
    r_squared: float
    residual: float


def fit(values: Sequence[float], *terms: Sequence[float]) -> Fit:
    """Fit `values` by a constant and the terms, in least squares."""
    y = torch.tensor(values, dtype=torch.float64)
    x = torch.tensor([[1.0] * len(values), *terms], dtype=torch.float64).t()
    scale = x.abs().amax(0)
    solution = torch.linalg.lstsq(x / scale, y[:, None]).solution[:, 0] / scale
    left, spread = y - x @ solution, (y - y.mean()).square().sum()
    return Fit(
        solution.tolist(),
        1 - float(left.square().sum() / spread) if spread else 1.0,
        float((left / y).abs().max()),
    )


def described(found: Fit) -> str:
    return f"R^2 {found.r_squared:.4f}, at most {found.residual:.1%} off"


def print_growth(
    title: str,
    quantity: Sequence[object],
    bench: Workbench,
    points: Sequence[Point],
    found: Sequence[Found],
) -> None:
    print(f"\n  {'':20} {'':7} {'':9} {'CPU time, s':>33}   {'memory, MB':>41}")
    print(
        f"  {title:20} {'tokens':>7} {'attention':>9} {'sampler':>9} {'old + ref':>11}"
        f" {'policy':>11}   {'sampler':>9} {'old + ref':>10} {'policy':>9} {'in pieces':>10}"
    )
    for name, point, costs in zip(quantity, points, found, strict=True):
        sampler, scoring, policy = (costs.seconds[part] for part in PARTS)
        held = [costs.bytes[part] / 1e6 for part in (*PARTS, PIECES)]
        print(
            f"  {name:>20} {point.tokens:7} {bench.attention_share(point):9.1%} {sampler:9.3f}"
            f" {scoring:11.3f} {policy:11.3f}   {held[0]:9.1f} {held[1]:10.1f} {held[2]:9.1f}"
            f" {held[3]:10.1f}"
        )
    tokens = [point.tokens / 1000 for point in points]
    if len(set(tokens)) < 3:
        return
    for part in PARTS:
        line, memory = (
            fit([costs.seconds[part] for costs in found], tokens),
            fit([costs.bytes[part] / 1e6 for costs in found], tokens),
        )
        print(
            f"    {part:16} {line.coefficients[0]:7.3f} s + {line.coefficients[1]:6.3f} s a"
            f" thousand tokens: {described(line)};   {memory.coefficients[0]:7.1f} MB +"
            f" {memory.coefficients[1]:6.1f} MB: {described(memory)}",
            flush=True,
        )


def second_look(bench: Workbench, examples: Sequence[Example], sizes: Sizes) -> None:
    """Print times and tower forwards of the first and the second look at some images."""
    base, forwards = bench.model.net, []
    gemma = bench.model.family.model_type == "gemma3"
    tower = base.model.vision_tower if gemma else base.model.visual
    hook = tower.register_forward_hook(lambda *_: forwards.append(1))
    prompt = models.make_prompt(bench.model, examples[0], sizes)
    print(f"\n  {len(examples)} images, each looked at twice:")
    for look in ("first", "second"):
        forwards.clear()
        times = [
            seconds(partial(bench.model.encode_prompt, example, prompt)) for example in examples
        ]
        print(
            f"    {look:6} look: {len(forwards)} forwards of the tower,"
            f" {statistics.median(times) * 1000:8.2f} ms an image with its prompt"
            f" ({min(times) * 1000:.2f} to {max(times) * 1000:.2f})",
            flush=True,
        )
    hook.remove()


def grow(family: str, folder: Path, arguments: argparse.Namespace) -> None:
    sizes = Sizes(new_tokens=arguments.new_tokens)
    most_prompts = max(arguments.prompts)
    examples = models.make_examples(folder / "images", most_prompts, sizes)
    bench = Workbench(family, folder, sizes, arguments.max_tokens_per_forward)
    print(
        f"\n{FAMILIES[family]}: prompts of {sizes.prompt_length} tokens, 256 of them an image,"
        f" completions of {sizes.new_tokens}, 1 prompt, 4 completions, vocabulary"
        f" {sizes.vocabulary:,}, where nothing else is said"
    )
    second_look(bench, examples, sizes)
    base = Point(sizes)
    sweeps = {
        "completions a prompt": [
            (n, replace(base, generations=n)) for n in arguments.num_generations
        ],
        "prompts": [(n, replace(base, prompts=n)) for n in arguments.prompts],
        "prompt length": [
            (n, replace(base, sizes=replace(sizes, prompt_length=n)))
            for n in arguments.prompt_lengths
        ],
        "completion length": [
            (n, replace(base, sizes=replace(sizes, new_tokens=n)))
            for n in arguments.completion_lengths
        ],
    }
    everything: list[tuple[Point, Found]] = []
    for title, entries in sweeps.items():
        names, points = zip(*entries, strict=True)
        found = measured(bench, points, examples, arguments.rounds)
        print_growth(title, names, bench, points, found)
        everything += zip(points, found, strict=True)
    print(f"\n  all {len(everything)} sizes above")
    tokens, pairs = (
        [point.tokens / 1000 for point, _ in everything],
        [point.pairs / 1e6 for point, _ in everything],
    )
    for part in PARTS[1:]:
        values = [costs.seconds[part] for _, costs in everything]
        line, plane = fit(values, tokens), fit(values, tokens, pairs)
        print(
            f"    {part:16} {line.coefficients[0]:.3f} s + {line.coefficients[1]:.3f} s a thousand"
            f" tokens: {described(line)};  with attention {plane.coefficients[0]:.3f} s +"
            f" {plane.coefficients[1]:.3f} s a thousand tokens + {plane.coefficients[2]:.3f} s a"
            f" million pairs: {described(plane)}",
            flush=True,
        )
    of_vocabularies, shorter = (
        [],
        replace(sizes, new_tokens=min(sizes.new_tokens, VOCABULARY_TOKENS)),
    )
    print(f"\n  completions of {shorter.new_tokens}")
    for vocabulary in arguments.vocabularies:
        larger = replace(shorter, vocabulary=vocabulary)
        del bench
        bench = Workbench(family, folder, larger, arguments.max_tokens_per_forward)
        of_vocabularies += measured(bench, [Point(larger)], examples, arguments.rounds)
    print_growth(
        "vocabulary",
        [f"{n:,}" for n in arguments.vocabularies],
        bench,
        [Point(shorter)] * len(of_vocabularies),
        of_vocabularies,
    )
    if len(of_vocabularies) > 2:
        for part in PARTS:
            line = fit(
                [costs.seconds[part] for costs in of_vocabularies],
                [n / 1000 for n in arguments.vocabularies],
            )
            print(
                f"    {part:16} {line.coefficients[0]:7.3f} s + {line.coefficients[1]:6.4f} s a"
                f" thousand words of the vocabulary: {described(line)}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument(
        "--num_generations",
        nargs="+",
        type=int,
        default=[1, 2, 4, 8, 16],
        help="completions of a prompt",
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        type=int,
        default=[1, 2, 4, 8],
        help="of a rollout, each with an image of its own",
    )
    parser.add_argument(
        "--prompt_lengths",
        nargs="+",
        type=int,
        default=[321, 577, 1089, 2113],
        help="tokens, 256 of them an image",
    )
    parser.add_argument(
        "--completion_lengths", nargs="+", type=int, default=[64, 128, 256, 512], help="tokens"
    )
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[4096, 151_936, 262_208])
    parser.add_argument(
        "--new_tokens",
        type=int,
        default=Sizes.new_tokens,
        help="of a completion where its length is not what grows",
    )
    parser.add_argument(
        "--max_tokens_per_forward", type=int, default=2048, help="of the last column, tokens"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is taken")
    arguments = parser.parse_args()
    quiet()
    print(machine())
    for family in arguments.families:
        with tempfile.TemporaryDirectory() as folder:
            grow(family, Path(folder), arguments)


if __name__ == "__main__":
    main()
