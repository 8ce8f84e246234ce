"""Time the product's GRPO and SFT steps phase by phase, and against the plain forward.

    python tests/benchmarks/steps.py                # against the plain forward
    python tests/benchmarks/steps.py --profile      # where the time of a step goes

Both run on the benchmark models (models.py). In the plain forward (tests/helpers/plain.py) every
completion has a prompt of its own and its image goes through the vision tower in every pass. Both
sides get the same weights, prompts, completions and rewards. Loss and gradients are compared before
anything is timed, then the two alternate in one process, on one thread. Times are CPU time of this
process and wall clock, medians of the pairs. A ratio is the median of the pairs' ratios, with the
smallest and the largest.

A GRPO step is one new image, one group of completions, one update, as in run_grpo.py. The group is
really sampled, with no stop ids, so that every completion has its full length. Then given
completions take its place. One update a rollout needs no pass for old log-probabilities. The
learning rate is 0, so all steps do the same.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import checkout  # noqa: F401  this checkout before an installed one
import torch
from peft import PeftModel
from torch import Tensor

from data.examples import Example
from data.prompts import Prompt
from engine import forward
from engine.collate import collate_rows, plan_batches
from engine.completion import Completion, SamplingConfig
from engine.encode import EncodedPrompt, EncodedRow
from engine.families import lm_head_weight
from engine.generate import generate
from engine.logprobs import predicted_correctly, token_logprobs
from engine.memory import model_shape
from engine.model import (
    REFERENCE,
    BaseModel,
    add_reference,
    attach_adapter,
    enable_gradient_checkpointing,
    use_adapter,
)
from engine.optim import build_optimizer, clip_gradients, trainable_parameters
from engine.policy import Policy
from engine.sampling_product import faster_product
from engine.vision import VisionCache
from rl.objective import (
    ObjectiveConfig,
    group_advantages,
    grpo_loss,
    objective_metrics,
    token_weights,
)
from rl.rewards import HardReward
from rl.rollout import Rollouts
from rl.settings import GRPOConfig
from tests.benchmarks import models
from tests.benchmarks.models import FAMILIES, Costs, Sizes
from tests.helpers import plain
from tests.helpers.tiny import uniform_for

OBJECTIVE = ObjectiveConfig()
TEMPERATURE, TOP_P, MAX_GRAD_NORM = 0.8, 0.95, 1.0
GENERATIONS = 4  # completions of a prompt, for which the sampler's product is measured


# ---- time ----------------------------------------------------------------------------------------
class Seconds(NamedTuple):
    cpu: float
    wall: float


class Clock:
    """Add up the seconds of named phases until they are taken. Phases may contain each other."""

    def __init__(self) -> None:
        self._found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            yield
        finally:
            self._found[name][0] += time.process_time() - cpu
            self._found[name][1] += time.perf_counter() - wall

    def timed(self, function: Callable, name: str | Callable[..., str]) -> Callable:
        """Time a function under a phase's name, which may depend on its arguments."""

        def call(*arguments, **keywords):
            with self(name(*arguments, **keywords) if callable(name) else name):
                return function(*arguments, **keywords)

        return call

    def take(self) -> dict[str, Seconds]:
        found = {name: Seconds(*seconds) for name, seconds in self._found.items()}
        self._found.clear()
        return found


def add(*phases: Seconds) -> Seconds:
    return Seconds(*map(sum, zip(*phases, strict=True)))


def quiet() -> None:
    """Use one thread, and keep libraries' bars, notes and warnings from between the tables."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)


def machine() -> str:
    """Say in one line what ran."""
    import peft
    import transformers

    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        "unknown CPU",
    )
    return (
        f"{name}, 1 thread, fp32; torch {torch.__version__}, transformers"
        f" {transformers.__version__}, peft {peft.__version__}"
    )


# ---- the product ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Task:
    """Hold what both sides of a step get: new images, and for each of them a group of completions
    [G,C] and its rewards [G].
    """

    examples: list[Example]
    completions: list[Tensor]
    rewards: list[list[float]]


def make_tasks(
    examples: Sequence[Example], prompts: int, generations: int, new_tokens: int
) -> list[Task]:
    """Make one task for every `prompts` examples.

    Completions are random printable bytes, so that they stay themselves as text.
    """
    generator = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        return torch.randint(33, 123, (generations, new_tokens), generator=generator)

    rewards = [(i % 4) / 4 + i / 64 for i in range(generations)]
    return [
        Task(list(examples[i : i + prompts]), [draw() for _ in range(prompts)], [rewards] * prompts)
        for i in range(0, len(examples), prompts)
    ]


class Product:
    """Hold the benchmark model with both adapters, and its steps as the loops of run_grpo.py and
    run_sft.py have them.
    """

    def __init__(
        self, folder: Path, family: str, sizes: Sizes, *, gradient_checkpointing: bool = True
    ) -> None:
        self.sizes, self.clock = sizes, Clock()
        # No stop ids: completions are full. No suppressed ids: others know none in their
        # log-probabilities.
        loaded = models.load(folder / family / "model", sizes)
        self.model: BaseModel = replace(loaded, stop_ids=frozenset(), suppressed_ids=())
        self.net: PeftModel = attach_adapter(self.model, folder / family / "policy", trainable=True)
        add_reference(self.net, folder / family / "reference")
        if gradient_checkpointing:
            enable_gradient_checkpointing(self.net)
        self.optimizer = build_optimizer(self.net, learning_rate=0.0, weight_decay=0.0)
        self.parameters = [parameter for _, parameter in trainable_parameters(self.net)]
        self.costs = Costs(self.model.net.config, sizes)
        # As a run measures it before it begins, for one group.
        self.sampling_product = faster_product(model_shape(self.model.net.config, 0), GENERATIONS)

    def prompt_for(self, example: Example) -> Prompt:
        return models.make_prompt(self.model, example, self.sizes)

    def forget_images(self, *, keep: bool) -> None:
        """Start a new cache of image features, which holds all it sees or nothing."""
        cache = VisionCache(
            self.model.net, self.model.family, self.model.encoder, max_bytes=2**30 if keep else 0
        )
        self.model = replace(self.model, vision=cache)

    def policy(self, prompt: Prompt) -> Policy:
        """Ask the model with the images' features of the cache at hand."""
        product = self.sampling_product
        return Policy(self.net, self.model, prompt, TEMPERATURE, sampling_product=product)

    def rollouts(self, task: Task) -> Rollouts:
        """Make a rollout of the task's images, of one update in one micro-batch, to be filled."""
        generations = len(task.rewards[0])
        config = GRPOConfig(
            temperature=TEMPERATURE,
            top_p=TOP_P,
            max_completion_length=self.sizes.new_tokens,
            num_generations=generations,
            per_device_train_batch_size=generations * len(task.examples),
            gradient_accumulation_steps=1,
            steps_per_generation=1,
            max_tokens_per_forward=None,
            mask_truncated_completions=False,
            reward="hard",
            seed=0,
        )
        rollouts = Rollouts(task.examples, {"hard": HardReward()}, config)
        rollouts.examples = task.examples
        return rollouts

    def sample(
        self, prompts: Sequence[EncodedPrompt], generations: int, new_tokens: int | None = None
    ) -> list[list[Completion]]:
        sampling = SamplingConfig(TEMPERATURE, TOP_P, new_tokens or self.sizes.new_tokens)
        return generate(
            self.policy(Prompt("", "")),  # the prompts are encoded already
            prompts,
            sampling,
            num_generations=generations,
            uniform=uniform_for(len(prompts), generations, sampling.max_completion_length),
        )

    def look(self, examples: Sequence[Example], prompt: Prompt) -> list[EncodedPrompt]:
        with self.clock("images"):
            return [self.model.encode_prompt(example, prompt) for example in examples]

    def grpo_step(
        self, task: Task, prompt: Prompt, *, sample: bool = True
    ) -> tuple[float, dict[str, Tensor]]:
        """Return loss and gradients of one step. Its phases are on the clock.

        sample: whether completions are really drawn first.
        """
        clock, policy = self.clock, self.policy(prompt)
        with clock("whole step"):
            rollouts = self.rollouts(task)
            rollouts.prompts = self.look(task.examples, prompt)
            if sample:
                with clock("sampler"):
                    rollouts.sample(policy, lambda: False)
            completions = [
                [
                    Completion(ids, torch.zeros(len(ids)), torch.ones(len(ids)), True)
                    for ids in group
                ]
                for group in task.completions
            ]
            with clock("rewards"):
                rollouts.reward(completions, policy)
            rewards = [reward for group in task.rewards for reward in group]
            for one, reward in zip(rollouts.samples, rewards, strict=True):
                one.reward = reward
            with clock("reference log-probabilities"):
                rollouts.score(policy, with_reference=True)
            advantages = group_advantages(
                rollouts.rewards,
                rollouts.groups,
                OBJECTIVE.scale_rewards,
                kl=rollouts.kl,
                config=OBJECTIVE,
            )
            rollouts.set_advantages(advantages)
            micro_batches = rollouts.micro_batches(0)
            totals = rollouts.totals(0)
            self.net.train()
            total, old = 0.0, []
            for rows in micro_batches:
                with clock("policy forward"):
                    micro = rollouts.micro_batch(rows, policy)
                    logprobs, entropy = policy.logprobs_and_entropy(micro.batch)
                    weights = token_weights(micro.mask, OBJECTIVE.loss_type, **totals)
                    loss, terms = grpo_loss(
                        logprobs,
                        logprobs.detach(),
                        micro.ref_logprobs,
                        micro.advantages,
                        micro.mask,
                        weights,
                        OBJECTIVE,
                        sampling_logprobs=micro.sampling_logprobs,
                        entropy=entropy,
                    )
                with clock("backward"):
                    loss.backward()
                old.append(logprobs.detach())
                with clock("metrics"):
                    objective_metrics(terms, micro.advantages, micro.mask, OBJECTIVE)
                total += float(loss.detach())
            rollouts.keep_old(micro_batches, old)
        return total, self._update()

    def sft_step(
        self, examples: Sequence[Example], answers: Sequence[str], prompt: Prompt
    ) -> tuple[float, dict[str, Tensor]]:
        """Return loss and gradients of one step of one micro-batch."""
        clock, policy = self.clock, self.policy(prompt)
        with clock("whole step"):
            with clock("images"):
                rows = [
                    self.model.encode_answer(example, prompt, answer)
                    for example, answer in zip(examples, answers, strict=True)
                ]
            supervised_tokens = sum(int(row.completion_mask.sum()) for row in rows)
            self.net.train()
            for indices in plan_batches(rows, len(rows), None):
                with clock("forward"):
                    batch = collate_rows(
                        [rows[i] for i in indices], self.model.encoder.pad_token_id
                    )
                    hidden, targets = policy.hidden_states(batch)
                    logprobs, _ = token_logprobs(
                        hidden, policy.head, targets, softcap=policy.softcap
                    )
                    loss = -logprobs.sum() / supervised_tokens
                with clock("backward"):
                    loss.backward()
                with clock("metrics"):
                    predicted_correctly(hidden, policy.head, targets).float().mean()
        return float(loss.detach()), self._update()

    def _update(self) -> dict[str, Tensor]:
        """Do the optimizer's part of a step, on the clock. Returns the gradients before it."""
        found = gradients(self.net)
        with self.clock("whole step"), self.clock("update"):
            clip_gradients(self.parameters, MAX_GRAD_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return found

    @contextmanager
    def _apart(self, module, name: str, phase: str | Callable[..., str]) -> Iterator[None]:
        """Time a function that a module calls, as a phase."""
        original = getattr(module, name)
        setattr(module, name, self.clock.timed(original, phase))
        try:
            yield
        finally:
            setattr(module, name, original)

    def profiled_step(self, task: Task, prompt: Prompt) -> dict[str, Seconds]:
        """Time the phases of a GRPO step, with the head of every pass and the reading of prompts
        apart.
        """
        with self._apart(forward, "token_logprobs", "head"):
            self.grpo_step(task, prompt)
        phases = self.clock.take()
        prompts = self.look(task.examples, prompt)
        self.clock.take()
        with self.clock("prefill"):
            self.sample(prompts, len(task.rewards[0]), 1)
        return phases | self.clock.take()


def gradients(net: PeftModel) -> dict[str, Tensor]:
    """Copy the gradients, by parameter."""
    return {
        name: parameter.grad.clone()
        for name, parameter in net.named_parameters()
        if parameter.grad is not None
    }


# ---- the plain forward ---------------------------------------------------------------------------
def plain_grpo_step(
    product: Product, task: Task, prompt: Prompt, clock: Clock
) -> tuple[float, dict[str, Tensor]]:
    """Run the passes of a step with given completions, on the product's model."""
    net, model, sizes = product.net, product.model, product.sizes
    prompts = [model.encoder.encode_prompt(example, prompt) for example in task.examples]
    rows = [
        EncodedRow(encoded, ids, torch.ones(len(ids), dtype=torch.bool))
        for encoded, group in zip(prompts, task.completions, strict=True)
        for ids in group
    ]

    def logprobs_of(**options) -> Tensor:
        return plain.logprobs_of(
            net,
            model.family,
            rows,
            temperature=TEMPERATURE,
            suppress_token_ids=model.suppressed_ids,
            **options,
        )

    net.eval()
    with use_adapter(net, REFERENCE), clock("reference log-probabilities"):
        ref = logprobs_of()
    net.train()
    advantages = torch.cat(
        [torch.tensor(group) - sum(group) / len(group) for group in task.rewards]
    )
    mask = torch.ones_like(ref, dtype=torch.bool)
    with clock("policy forward"):
        logprobs = logprobs_of(entropy=True)
        weights = token_weights(
            mask,
            OBJECTIVE.loss_type,
            num_completions=len(rows),
            num_tokens=int(mask.sum()),
            max_completion_length=sizes.new_tokens,
        )
        loss, _ = grpo_loss(logprobs, logprobs.detach(), ref, advantages, mask, weights, OBJECTIVE)
    with clock("backward"):
        loss.backward()
    found = gradients(net)
    net.zero_grad()
    return float(loss.detach()), found


def plain_sft_step(
    product: Product,
    examples: Sequence[Example],
    answers: Sequence[str],
    prompt: Prompt,
    clock: Clock,
) -> tuple[float, dict[str, Tensor]]:
    net, model = product.net, product.model
    net.train()
    with clock("whole step"):
        rows = [
            model.encoder.encode_answer(example, prompt, answer)
            for example, answer in zip(examples, answers, strict=True)
        ]
        hidden, targets = plain.hidden_states(
            net, model.family, plain.plain_batch(rows, model.encoder.pad_token_id)
        )
        logprobs, _ = token_logprobs(hidden, lm_head_weight(net), targets)
        loss = -logprobs.mean()
        loss.backward()
        predicted_correctly(hidden, lm_head_weight(net), targets).float().mean()
    found = gradients(net)
    net.zero_grad()
    return float(loss.detach()), found


# ---- comparing -----------------------------------------------------------------------------------
TRAINING = ("reference log-probabilities", "policy forward", "backward")


def check_equal(
    what: str,
    ours: tuple[float, dict[str, Tensor]],
    theirs: tuple[float, dict[str, Tensor]],
    bound: float = 1e-5,
) -> None:
    """Print by how much losses and gradients differ.

    Raises SystemExit where a parameter's gradient differs by more than `bound` of its norm, or
    where one side trains what the other does not.
    """
    (our_loss, our_gradients), (their_loss, their_gradients) = ours, theirs
    if our_gradients.keys() != their_gradients.keys():
        raise SystemExit(
            f"{what}: the two sides train different parameters:"
            f" {sorted(our_gradients.keys() ^ their_gradients.keys())[:3]}"
        )
    worst = max(
        float((our_gradients[name] - their).norm() / their.norm())
        for name, their in their_gradients.items()
    )
    of_loss = abs(our_loss - their_loss) / max(abs(their_loss), 1e-12)
    print(
        f"  {what}: loss {our_loss:.7f} and {their_loss:.7f}; gradients of {len(our_gradients)}"
        f" tensors differ by at most {worst:.1e} of a tensor's norm",
        flush=True,
    )
    if not worst <= bound or not of_loss <= 1e-4:
        raise SystemExit(
            f"{what}: gradients may differ by {bound:.0e}; nothing is timed between two sides that"
            " do not do the same"
        )


def print_header() -> None:
    print(
        f"  {'':44} {'ours':>7} {'theirs':>7}   times as fast, by CPU time {'':5} by wall {'':9} by"
        " operations"
    )


def print_row(
    name: str, ours: Sequence[Seconds], theirs: Sequence[Seconds], bound: float | None
) -> None:
    def ratios(field: str) -> str:
        values = [
            getattr(their, field) / getattr(our, field)
            for our, their in zip(ours, theirs, strict=True)
        ]
        return f"{statistics.median(values):5.2f} ({min(values):.2f} to {max(values):.2f})"

    seconds = [statistics.median(side.cpu for side in sides) for sides in (ours, theirs)]
    print(
        f"  {name:44} {seconds[0]:7.2f} {seconds[1]:7.2f}   {ratios('cpu'):>26}  "
        f" {ratios('wall'):>22}   {'' if bound is None else f'{bound:.2f}':>6}",
        flush=True,
    )


@dataclass(frozen=True)
class Bounds:
    """Count the operations of each side (see models.py), for G completions of a prompt.

    The head costs two products of a training pass here, since its gradient is taken in the forward
    pass, and three elsewhere.
    """

    costs: Costs
    generations: int

    @property
    def _new(self):
        return self.generations * self.costs.completion

    @property
    def _head(self) -> float:
        return self.generations * self.costs.head(self.costs.sizes.new_tokens).forward

    def image(self) -> float:
        return self.costs.image.forward

    def sampler(self) -> float:
        return self.costs.prompt.forward + self._new.forward + self._head

    def scoring(self) -> float:
        """Count the reference pass."""
        return self.sampler()

    def policy(self) -> float:
        return (self.costs.prompt + self._new).trained + 2 * self._head

    def unshared_sampler(self) -> float:
        return self.generations * (self.costs.image + self.costs.sequence).forward + self._head

    def unshared_scoring(self) -> float:
        return self.unshared_sampler()

    def unshared_policy(self, *, tower_trained: bool) -> float:
        """Count a policy pass without shared prompts. tower_trained: the frozen tower is recomputed
        and a gradient goes through it.
        """
        image = self.costs.image.trained if tower_trained else self.costs.image.forward
        return self.generations * (image + self.costs.sequence.trained) + 3 * self._head


def make_folder(folder: Path, family: str, sizes: Sizes, images: int) -> list[Example]:
    """Save checkpoint, adapters and images of one family."""
    model = models.save_checkpoint(family, folder / family / "model", sizes)
    models.save_adapter(model, folder / family / "policy", 0, sizes)
    models.save_adapter(model, folder / family / "reference", 1, sizes)
    return models.make_examples(folder / family / "images", images, sizes)


def make_answers(count: int, tokens: int) -> list[str]:
    """Make answers of random printable bytes, of `tokens` tokens with the end of turn."""
    generator = torch.Generator().manual_seed(1)
    return [
        bytes(torch.randint(97, 123, (tokens - 1,), generator=generator).tolist()).decode()
        for _ in range(count)
    ]


def against_plain(
    family: str, folder: Path, sizes: Sizes, groups: Sequence[int], rows: int, pairs: int
) -> None:
    examples = make_folder(folder, family, sizes, max(pairs + 1, rows))
    product, clock = Product(folder, family, sizes), Clock()
    product.forget_images(keep=False)
    prompt = product.prompt_for(examples[0])
    print(f"\n{FAMILIES[family]}: one image costs {product.costs.image_share:.0%} of a sequence")
    for generations in groups:
        tasks = make_tasks(examples, 1, generations, sizes.new_tokens)
        first = product.grpo_step(tasks[0], prompt, sample=False)
        check_equal(f"G {generations}", first, plain_grpo_step(product, tasks[0], prompt, clock))
        ours, theirs = [], []
        product.clock.take(), clock.take()
        for task in tasks[1 : pairs + 1]:
            product.grpo_step(task, prompt, sample=False)
            ours.append(product.clock.take())
            plain_grpo_step(product, task, prompt, clock)
            theirs.append(clock.take())
        print_header()
        bounds = Bounds(product.costs, generations)
        plain_pass, plain_policy = (
            bounds.unshared_scoring(),
            bounds.unshared_policy(tower_trained=False) - bounds._head,
        )
        sides = (
            [add(*(found[phase] for phase in TRAINING)) for found in side]
            for side in (ours, theirs)
        )
        print_row(
            f"G {generations}: ref + policy + backward",
            *sides,
            (plain_pass + plain_policy) / (bounds.scoring() + bounds.policy()),
        )
        images = [found["images"].cpu for found in ours]
        print(f"  the image, once: {statistics.median(images):.2f} s")
    answers = make_answers(rows, sizes.new_tokens)
    arguments = examples[:rows], answers, prompt
    check_equal("SFT", product.sft_step(*arguments), plain_sft_step(product, *arguments, clock))
    found: dict[str, list[Seconds]] = defaultdict(list)
    for keep in (False, True):
        product.forget_images(keep=keep)
        product.sft_step(*arguments)
        product.clock.take(), clock.take()
        for _ in range(pairs):
            product.sft_step(*arguments)
            found[f"ours {keep}"].append(product.clock.take()["whole step"])
            plain_sft_step(product, *arguments, clock)
            found[f"theirs {keep}"].append(clock.take()["whole step"])
    bounds = Bounds(product.costs, 1)
    plain_step = bounds.unshared_policy(tower_trained=False) - bounds._head
    for keep, name, bound in (
        (False, "new images", bounds.policy() + bounds.image()),
        (True, "known images", bounds.policy()),
    ):
        print_row(
            f"SFT step of {rows}, {name}",
            found[f"ours {keep}"],
            found[f"theirs {keep}"],
            plain_step / bound,
        )


def profile(family: str, folder: Path, sizes: Sizes, groups: Sequence[int], steps: int) -> None:
    examples = make_folder(folder, family, sizes, steps + 1)
    product = Product(folder, family, sizes)
    product.forget_images(keep=False)
    prompt = product.prompt_for(examples[0])
    for generations in groups:
        tasks = make_tasks(examples, 1, generations, sizes.new_tokens)
        product.grpo_step(tasks[0], prompt)
        product.clock.take()
        found = [product.profiled_step(task, prompt) for task in tasks[1 : steps + 1]]
        median = {
            name: statistics.median(phases[name].cpu for phases in found) for name in found[0]
        }
        median["decode"] = median["sampler"] - median["prefill"]
        bounds = Bounds(product.costs, generations)
        heads = 3 * bounds._head  # two in the policy pass, one in the reference's
        operations = {
            "images": bounds.image(),
            "prefill": product.costs.prompt.forward,
            "decode": bounds.sampler() - product.costs.prompt.forward,
            "reference log-probabilities": bounds.scoring(),
            "policy forward": bounds.scoring() + bounds._head,
            "backward": bounds.policy() - bounds.scoring() - bounds._head,
            "head": heads,
        }
        print(
            f"\n{FAMILIES[family]}, G {generations}: a step takes {median['whole step']:.2f} s of"
            f" CPU time, median of {steps}"
        )
        print(f"  {'':34} {'s':>7} {'share':>6} {'1e9 operations a s':>19}")
        for name in (
            "images",
            "prefill",
            "decode",
            "rewards",
            "reference log-probabilities",
            "policy forward",
            "backward",
            "metrics",
            "update",
        ):
            rate = f"{operations[name] / median[name] / 1e9:19.1f}" if name in operations else ""
            print(
                f"  {name:34} {median[name]:7.3f} {median[name] / median['whole step']:6.1%} {rate}"
            )
        print(
            f"  {'of these in the head':34} {median['head']:7.3f}"
            f" {median['head'] / median['whole step']:6.1%} {heads / median['head'] / 1e9:19.1f}",
            flush=True,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument(
        "--num_generations", nargs="+", type=int, default=[4, 8], help="completions of a prompt"
    )
    parser.add_argument("--rows", type=int, default=4, help="examples of an SFT step")
    parser.add_argument("--pairs", type=int, default=5, help="steps of either side that are timed")
    parser.add_argument(
        "--new_tokens",
        type=int,
        default=Sizes.new_tokens,
        help="of a completion or an answer, tokens",
    )
    parser.add_argument(
        "--prompt_length", type=int, default=Sizes.prompt_length, help="with the image, tokens"
    )
    parser.add_argument(
        "--image_tokens", type=int, default=Sizes.image_tokens, help="a square number, tokens"
    )


def sizes_of(arguments: argparse.Namespace) -> Sizes:
    return Sizes(
        new_tokens=arguments.new_tokens,
        prompt_length=arguments.prompt_length,
        image_tokens=arguments.image_tokens,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument(
        "--profile",
        action="store_true",
        help="the phases of the product's step alone, --pairs steps",
    )
    arguments = parser.parse_args()
    quiet()
    print(machine())
    for family in arguments.families:
        with tempfile.TemporaryDirectory() as folder:
            if arguments.profile:
                profile(
                    family,
                    Path(folder),
                    sizes_of(arguments),
                    arguments.num_generations,
                    arguments.pairs,
                )
            else:
                against_plain(
                    family,
                    Path(folder),
                    sizes_of(arguments),
                    arguments.num_generations,
                    arguments.rows,
                    arguments.pairs,
                )


if __name__ == "__main__":
    main()
