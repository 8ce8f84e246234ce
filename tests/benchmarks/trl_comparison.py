"""Compare the product's steps with TRL's on the same models.

Both get the same weights, prompts and completions.

    pip install -e '.[bench]'
    python tests/benchmarks/trl_comparison.py            # about 25 minutes
    python tests/benchmarks/trl_comparison.py --memory   # peak memory, a process for each side

TRL's GRPOTrainer and SFTTrainer run their own `train()`. The product's step runs between their
steps, so the two alternate in one process, on one thread, in fp32, with gradient checkpointing on
both sides. In every GRPO step both sides really draw a group of completions, of full length: no
token stops them. Then the same given completions and rewards take their place, so that loss and
gradients can be compared, which is done first. Models, times and ratios are those of models.py and
steps.py.

Some things are set so that TRL does the same work. `use_bias_correction_kl` is off (its default
multiplies the KL by a differentiable ratio: an equal value with another gradient). The head works
on the completions' tokens alone, as on CUDA (on a CPU TRL's would work on the prompts' too). No
image token is suppressed, on either side. TRL gets no torchvision: processors are made by hand of
the image processors that the product uses.

"As installed" TRL trains with hooks that make embeddings require a gradient, the vision tower's
patches too: the frozen tower is recomputed and a gradient goes through it. "Hooks off" is the same
trainer without them. It shares the sampler's times.

One update a rollout, for which neither side makes a pass for old log-probabilities.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import checkout  # noqa: F401  this checkout before an installed one
import datasets
import torch
import trl
import trl.trainer.utils
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    PrinterCallback,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from data.examples import Example
from data.images import load_image
from data.prompts import Prompt
from engine.encode import Encoder
from engine.families import unwrapped
from engine.model import load_adapter_weights, load_encoder
from tests.benchmarks.models import FAMILIES, Sizes
from tests.benchmarks.steps import (
    MAX_GRAD_NORM,
    OBJECTIVE,
    TEMPERATURE,
    TOP_P,
    TRAINING,
    Bounds,
    Clock,
    Product,
    Seconds,
    Task,
    add,
    add_arguments,
    check_equal,
    gradients,
    machine,
    make_answers,
    make_folder,
    make_tasks,
    print_header,
    print_row,
    quiet,
    sizes_of,
)
from tests.helpers.memory import profiled_peak, resident

PROMPTS_TOGETHER = 4  # of the sampler's second row


COMPARED = ["qwen2_5_vl", "gemma3"]


# ---- TRL -----------------------------------------------------------------------------------------
class QwenProcessor(Qwen2_5_VLProcessor):
    """Do without the video processor, which needs torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]

    def __init__(self, image_processor, tokenizer, chat_template) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(
            [self.image_token, self.video_token]
        )
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def make_processor(folder: Path, family: str, sizes: Sizes) -> ProcessorMixin:
    encoder: Encoder = load_encoder(
        str(folder / family / "model"),
        min_visual_tokens=sizes.image_tokens,
        max_visual_tokens=sizes.image_tokens,
    )
    tokenizer = encoder.tokenizer
    tokenizer.padding_side = "left"
    # The product learns an answer to its end of turn; without this TRL would learn the template's
    # line break after it too.
    template = tokenizer.chat_template
    for end in ("<|im_end|>", "<end_of_turn>"):
        line_break = "{{ '' if loop.last and m['role'] == 'assistant' else '\n' }}"
        template = template.replace(end + "\n{% endfor %}", end + line_break + "{% endfor %}")
    if family == "gemma3":
        return Gemma3Processor(
            encoder.image_processor,
            tokenizer,
            chat_template=template,
            image_seq_length=sizes.image_tokens,
        )
    return QwenProcessor(encoder.image_processor, tokenizer, template)


def load_peft_model(folder: Path, family: str, start: str) -> PeftModel:
    base = AutoModelForImageTextToText.from_pretrained(
        folder / family / "model", dtype=torch.float32
    )
    base.generation_config.eos_token_id = None  # completions have their full length
    return PeftModel.from_pretrained(base, folder / family / start, is_trainable=True)


def messages(prompt: Prompt) -> list[dict]:
    return [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.text}]


class Hooks:
    """Switch the forward hooks that make embeddings require a gradient.

    TRL adds them again whenever it turns checkpointing back on.
    """

    def __init__(self, model: PeftModel) -> None:
        base = unwrapped(model).model
        tower = base.visual if hasattr(base, "visual") else base.vision_tower
        embeddings = [base.language_model.get_input_embeddings(), tower.get_input_embeddings()]
        self._hooks = [
            (module._forward_hooks, dict(module._forward_hooks)) for module in embeddings
        ]
        self._on = self._seen = True
        first = next(module for module in tower.modules() if isinstance(module, nn.ModuleList))[0]
        first.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module: nn.Module, arguments: tuple, keywords: dict) -> None:
        if torch.is_grad_enabled():
            self._seen = any(
                value.requires_grad
                for value in (*arguments, *keywords.values())
                if isinstance(value, Tensor)
            )

    def switch(self, on: bool) -> None:
        """Set what the next training pass does."""
        self._on = on
        for current, hooks in self._hooks:
            current.clear()
            current.update(hooks if on else {})

    def check(self) -> None:
        """Check that the tower's layers got in the last training pass what `switch` asked for.
        Raises SystemExit where not.
        """
        if self._seen != self._on:
            raise SystemExit(
                f"the vision tower's input {'requires' if self._seen else 'needs no'} gradient with"
                f" hooks {'on' if self._on else 'off'}"
            )


class Between(TrainerCallback):
    """Time TRL's steps and call back around them: before(step), after(step, its gradients before
    clipping).
    """

    def __init__(
        self, clock: Clock, before: Callable[[int], None], after: Callable[[int], None]
    ) -> None:
        self.clock, self.before, self.after, self._phase = clock, before, after, None

    def on_step_begin(self, arguments, state, control, **_) -> None:
        self.before(state.global_step)
        self._phase = self.clock("whole step")
        self._phase.__enter__()

    def on_step_end(self, arguments, state, control, **_) -> None:
        self._phase.__exit__(None, None, None)
        self.after(state.global_step - 1)


COMMON = dict(
    learning_rate=0.0,
    lr_scheduler_type="constant",
    weight_decay=0.0,
    max_grad_norm=MAX_GRAD_NORM,
    gradient_accumulation_steps=1,
    gradient_checkpointing=True,
    gradient_checkpointing_kwargs={"use_reentrant": False},
    use_cpu=True,
    bf16=False,
    dataloader_pin_memory=False,
    save_strategy="no",
    report_to="none",
    logging_strategy="no",
    disable_tqdm=True,
    seed=0,
)


def grpo_trainer(
    folder: Path,
    family: str,
    sizes: Sizes,
    generations: int,
    tasks: Sequence[Task],
    prompt: Prompt,
    clock: Clock,
    callback: TrainerCallback,
    installed: Callable[[int], bool],
) -> GRPOTrainer:
    """Make a trainer whose step s is tasks[s], whose completions and rewards are given.

    installed: whether a step is made as TRL makes it, and draws completions of its own first, or
    without hooks.
    """
    rewards = {
        task.completions[0][i].tolist().__repr__(): reward
        for task in tasks
        for i, reward in enumerate(task.rewards[0])
    }
    # TRL copies the adapter that it finds: this is its reference
    model = load_peft_model(folder, family, "reference")
    rows = datasets.Dataset.from_list(
        [{"prompt": messages(prompt), "image": load_image(task.examples[0])} for task in tasks]
    )
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=generations,
        num_generations=generations,
        max_steps=len(tasks),
        max_completion_length=sizes.new_tokens,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        top_k=0,
        beta=OBJECTIVE.beta,
        epsilon=OBJECTIVE.epsilon_low,
        epsilon_high=OBJECTIVE.epsilon_high,
        loss_type="dr_grpo",
        scale_rewards="none",
        use_bias_correction_kl=False,
        shuffle_dataset=False,
        remove_unused_columns=False,
        generation_kwargs={"eos_token_id": -1, "suppress_tokens": None},
        **COMMON,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completion_ids, **_: [rewards[repr(ids)] for ids in completion_ids],
        args=config,
        train_dataset=rows,
        processing_class=make_processor(folder, family, sizes),
        callbacks=[callback],
    )
    load_adapter_weights(trainer.model, folder / family / "policy")
    trainer.eos_token_ids = [-1]  # nor is a drawn completion cut at one afterwards
    draw, tokenize = trainer._generate_single_turn, trainer._tokenize_prompts

    def given(*arguments, **keywords):
        task = tasks[trainer.state.global_step]
        if installed(trainer.state.global_step):
            with clock("sampler"):
                drawn, _ = draw(*arguments, **keywords)
            if {len(ids) for ids in drawn} != {sizes.new_tokens}:
                raise SystemExit("TRL's completions do not have their full length")
        return [ids.tolist() for ids in task.completions[0]], None

    trainer._generate_single_turn = given
    trainer._tokenize_prompts = clock.timed(tokenize, "sampler")
    trainer.really_draw = draw
    hooks, logprobs, loss = (
        Hooks(trainer.model),
        trainer._get_per_token_logps_and_entropies,
        trainer.compute_loss,
    )

    def policy_pass(*arguments, **keywords):
        hooks.switch(installed(trainer.state.global_step))
        with clock("policy forward"):
            found = loss(*arguments, **keywords)
        hooks.check()
        return found

    def reference_pass(*arguments, **keywords):
        if torch.is_grad_enabled():
            return logprobs(*arguments, **keywords)
        with clock("reference log-probabilities"):
            return logprobs(*arguments, **keywords)

    trainer._get_per_token_logps_and_entropies, trainer.compute_loss = reference_pass, policy_pass
    trainer.accelerator.backward = clock.timed(trainer.accelerator.backward, "backward")
    trainer.remove_callback(PrinterCallback)
    return trainer


def installed(step: int) -> bool:
    """Tell which steps are TRL as installed: they alternate with those without hooks."""
    return step % 2 == 0


def compare_grpo(
    folder: Path,
    family: str,
    sizes: Sizes,
    generations: int,
    examples: Sequence[Example],
    pairs: int,
) -> None:
    """Time each task with the product, TRL as installed, and TRL without its hooks.

    The first round is not timed.
    """
    product, clock = Product(folder, family, sizes), Clock()
    product.forget_images(keep=False)
    prompt = product.prompt_for(examples[0])
    tasks = make_tasks(examples[: pairs + 1], 1, generations, sizes.new_tokens)
    doubled = [task for task in tasks for _ in (True, False)]
    found: dict[str, list[dict[str, Seconds]]] = defaultdict(list)
    results: dict[str, tuple[float, dict[str, Tensor]]] = {}

    def before(step: int) -> None:
        if installed(step):
            results["ours"] = product.grpo_step(doubled[step], prompt)
            found["ours"].append(product.clock.take())
        clock.take()

    def after(step: int) -> None:
        found["installed" if installed(step) else "hooks off"].append(clock.take())
        if step < 2:
            side = "as installed" if installed(step) else "with hooks off"
            check_equal(f"G {generations}, TRL {side}", results["ours"], results["theirs"])

    trainer = grpo_trainer(
        folder,
        family,
        sizes,
        generations,
        doubled,
        prompt,
        clock,
        Between(clock, before, after),
        installed,
    )
    keep_results(trainer, results)
    trainer.train()
    drop_first(found)
    ours, sampled = found["ours"], [phases["sampler"] for phases in found["installed"]]
    bounds = Bounds(product.costs, generations)
    our_sampler, our_training = (
        bounds.image() + bounds.sampler(),
        bounds.scoring() + bounds.policy(),
    )
    print_header()
    for name in ("installed", "hooks off"):
        theirs, label = (
            found[name],
            f"G {generations}, {'as installed' if name == 'installed' else name}",
        )
        training = bounds.unshared_scoring() + bounds.unshared_policy(
            tower_trained=name == "installed"
        )
        whole = [
            add(phases["whole step"], *([] if name == "installed" else [sampler]))
            for phases, sampler in zip(theirs, sampled, strict=True)
        ]
        print_row(
            f"{label}: whole step",
            [phases["whole step"] for phases in ours],
            whole,
            (bounds.unshared_sampler() + training) / (our_sampler + our_training),
        )
        print_row(
            f"{label}: ref + policy + backward",
            [add(*(phases[name] for name in TRAINING)) for phases in ours],
            [add(*(phases[name] for name in TRAINING)) for phases in theirs],
            training / our_training,
        )
    print_row(
        f"G {generations}: sampler, 1 prompt",
        [add(phases["images"], phases["sampler"]) for phases in ours],
        sampled,
        bounds.unshared_sampler() / our_sampler,
    )
    compare_samplers(product, trainer, examples, prompt, generations, pairs, sampled, clock)


def keep_results(trainer, results: dict) -> None:
    """Keep TRL's loss and gradients in results["theirs"] after each of its backward passes."""
    backward = trainer.accelerator.backward

    def kept(loss: Tensor, **keywords) -> None:
        backward(loss, **keywords)
        results["theirs"] = float(loss.detach()), gradients(trainer.model)

    trainer.accelerator.backward = kept


def drop_first(found: dict[str, list]) -> None:
    for side in found.values():
        del side[0]


def compare_samplers(
    product: Product,
    trainer: GRPOTrainer,
    examples: Sequence[Example],
    prompt: Prompt,
    generations: int,
    pairs: int,
    one_by_one: Sequence[Seconds],
    clock: Clock,
) -> None:
    """Compare several prompts together on both sides, and on ours against TRL's one at a time."""
    ours, theirs = [], []
    for i in range(pairs):
        chosen = [examples[(i + j) % len(examples)] for j in range(PROMPTS_TOGETHER)]
        with product.clock("sampler"):
            product.sample(product.look(chosen, prompt), generations)
        ours.append(product.clock.take()["sampler"])
        prompts = [
            trl.data_utils.prepare_multimodal_messages(
                messages(prompt), images=[load_image(example)]
            )
            for example in chosen
            for _ in range(generations)
        ]
        clock.take()
        ids, images, fields = trainer._tokenize_prompts(prompts)
        with clock("sampler"):
            trainer.really_draw(ids, images, fields, generations)
        theirs.append(clock.take()["sampler"])
    bounds = Bounds(product.costs, generations)
    bound = bounds.unshared_sampler() / (bounds.image() + bounds.sampler())
    print_row(f"G {generations}: sampler, {PROMPTS_TOGETHER} prompts", ours, theirs, bound)
    print_row(
        f"G {generations}: sampler, {PROMPTS_TOGETHER} prompts against 1 at a time",
        ours,
        [
            Seconds(PROMPTS_TOGETHER * seconds.cpu, PROMPTS_TOGETHER * seconds.wall)
            for seconds in one_by_one
        ],
        bound,
    )


def sft_trainer(
    folder: Path,
    family: str,
    sizes: Sizes,
    batches: Sequence[Sequence[Example]],
    answers: Sequence[str],
    prompt: Prompt,
    callback: TrainerCallback,
    installed: Callable[[int], bool],
) -> SFTTrainer:
    rows = datasets.Dataset.from_list(
        [
            {
                "prompt": messages(prompt),
                "completion": [{"role": "assistant", "content": answer}],
                "images": [load_image(example)],
            }
            for batch in batches
            for example, answer in zip(batch, answers, strict=True)
        ]
    )
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=len(answers),
        max_steps=len(batches),
        max_length=None,
        completion_only_loss=True,
        packing=False,
        shuffle_dataset=False,
        train_sampling_strategy="sequential",
        **COMMON,
    )
    trainer = SFTTrainer(
        model=load_peft_model(folder, family, "policy"),
        args=config,
        train_dataset=rows,
        processing_class=make_processor(folder, family, sizes),
        callbacks=[callback],
    )
    hooks, loss = Hooks(trainer.model), trainer.compute_loss

    def forward_pass(*arguments, **keywords):
        hooks.switch(installed(trainer.state.global_step))
        found = loss(*arguments, **keywords)
        hooks.check()
        return found

    trainer.compute_loss = forward_pass
    trainer.remove_callback(PrinterCallback)
    return trainer


def compare_sft(
    folder: Path, family: str, sizes: Sizes, examples: Sequence[Example], rows: int, pairs: int
) -> None:
    """Time each batch with the product, with new images and with known ones, and with TRL as
    installed and without its hooks.
    """
    product, clock = Product(folder, family, sizes), Clock()
    prompt, answers = product.prompt_for(examples[0]), make_answers(rows, sizes.new_tokens)
    batches = [
        [examples[(i + j) % len(examples)] for j in range(rows)]
        for i in range(pairs + 1)
        for _ in (True, False)
    ]
    found: dict[str, list[Seconds]] = defaultdict(list)
    results: dict[str, tuple[float, dict[str, Tensor]]] = {}
    collating: list[Seconds] = []  # of each batch, in order; the trainer makes them before its step

    def before(step: int) -> None:
        if installed(step):
            product.forget_images(keep=True)
            for name in ("new images", "known images"):
                results["ours"] = product.sft_step(batches[step], answers, prompt)
                found[name].append(product.clock.take()["whole step"])
        clock.take()

    def after(step: int) -> None:
        found["as installed" if installed(step) else "hooks off"].append(
            add(clock.take()["whole step"], collating[step])
        )
        if step < 2:
            check_equal(
                f"SFT, TRL {'as installed' if installed(step) else 'with hooks off'}",
                results["ours"],
                results["theirs"],
            )

    trainer = sft_trainer(
        folder, family, sizes, batches, answers, prompt, Between(clock, before, after), installed
    )
    collate = trainer.data_collator

    def timed_collate(batch):
        stopwatch = Clock()
        with stopwatch("collate"):
            made = collate(batch)
        collating.append(stopwatch.take()["collate"])
        return made

    trainer.data_collator = timed_collate
    keep_results(trainer, results)
    trainer.train()
    drop_first(found)
    bounds = Bounds(product.costs, 1)
    print_header()
    for side in ("as installed", "hooks off"):
        theirs = bounds.unshared_policy(tower_trained=side == "as installed")
        for images, ours in (
            ("new images", bounds.policy() + bounds.image()),
            ("known images", bounds.policy()),
        ):
            print_row(f"SFT of {rows}, {side}: {images}", found[images], found[side], theirs / ours)


# ---- memory --------------------------------------------------------------------------------------
class Peaks:
    """Measure the memory of three steps.

    The first touches all that stays. Of the second resident memory is measured, of the third
    torch's own.
    """

    def __init__(self) -> None:
        self.resident = self.allocated = 0
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        )

    def before(self, step: int) -> None:
        if step == 1:
            ctypes.CDLL(None).malloc_trim(0)  # what the first step freed goes back to the system
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
            self.resident = -resident("VmRSS")
        if step == 2:
            self._profile.__enter__()

    def after(self, step: int) -> None:
        if step == 1:
            self.resident += resident("VmHWM")
        if step == 2:
            self._profile.__exit__(None, None, None)
            self.allocated = profiled_peak(self._profile)


def measure_memory(side: str, family: str, generations: int, sizes: Sizes, rows: int) -> None:
    """Print allocated and resident bytes of one side, in a process of its own: GRPO with
    generations, SFT where that is 0.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, peaks = Path(name), Peaks()
        examples = make_folder(folder, family, sizes, max(rows, 2))
        answers = make_answers(rows, sizes.new_tokens)
        product = Product(folder, family, sizes)
        product.forget_images(keep=False)
        prompt = product.prompt_for(examples[0])
        tasks = 3 * make_tasks(examples[:1], 1, generations or 1, sizes.new_tokens)
        if side == "ours":
            for step, task in enumerate(tasks):
                peaks.before(step)
                (
                    product.grpo_step(task, prompt)
                    if generations
                    else product.sft_step(examples[:rows], answers, prompt)
                )
                peaks.after(step)
        else:
            del product
            callback, as_installed = (
                Between(Clock(), peaks.before, peaks.after),
                lambda step: side == "installed",
            )
            if generations:
                trainer = grpo_trainer(
                    folder,
                    family,
                    sizes,
                    generations,
                    tasks,
                    prompt,
                    Clock(),
                    callback,
                    as_installed,
                )
            else:
                trainer = sft_trainer(
                    folder,
                    family,
                    sizes,
                    3 * [examples[:rows]],
                    answers,
                    prompt,
                    callback,
                    as_installed,
                )
            trainer.train()
    print(peaks.allocated, peaks.resident)


def compare_memory(arguments: argparse.Namespace) -> None:
    print(
        "Peak memory of a step over the loaded model, MB: what torch allocates (exact) and, beside"
        " it, resident memory of the process."
    )
    print(
        f"  {'':28} {'allocated: ours':>16} {'installed':>10} {'hooks off':>10}"
        f" {'ours / theirs':>15}    {'resident: ours':>15} {'installed':>10} {'hooks off':>10}"
        f" {'ours / theirs':>15}"
    )
    for family in arguments.families:
        for generations in (*arguments.num_generations, *([] if arguments.no_sft else [0])):
            found = []
            for side in ("ours", "installed", "hooks off"):
                command = [
                    sys.executable,
                    __file__,
                    "--measure",
                    side,
                    family,
                    str(generations),
                    "--rows",
                    str(arguments.rows),
                    "--new_tokens",
                    str(arguments.new_tokens),
                    "--prompt_length",
                    str(arguments.prompt_length),
                    "--image_tokens",
                    str(arguments.image_tokens),
                ]
                output = subprocess.run(
                    command,
                    check=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                ).stdout
                found.append([int(word) / 1e6 for word in output.split()[-2:]])
            name = (
                f"{FAMILIES[family]},"
                f" {f'G {generations}' if generations else f'SFT of {arguments.rows}'}"
            )
            parts = [
                f"{ours:{width}.0f} {installed:10.0f} {off:10.0f} {ours / installed:7.2f}"
                f" {ours / off:7.2f}"
                for width, (ours, installed, off) in zip(
                    (16, 15), zip(*found, strict=True), strict=True
                )
            ]
            print(f"  {name:28} {'    '.join(parts)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--no_sft", action="store_true", help="GRPO alone")
    parser.add_argument(
        "--measure", nargs=3, metavar=("SIDE", "FAMILY", "G"), help=argparse.SUPPRESS
    )
    parser.set_defaults(families=COMPARED)
    arguments = parser.parse_args()
    if not set(arguments.families) <= set(COMPARED):
        parser.error(f"--families: compared with TRL are {' and '.join(COMPARED)}")
    quiet()

    # the head works on the completions' tokens alone
    trl.trainer.utils._use_triton = lambda device: True
    sizes = sizes_of(arguments)
    if arguments.measure:
        side, family, generations = arguments.measure
        measure_memory(side, family, int(generations), sizes, arguments.rows)
        return
    print(f"{machine()}, trl {trl.__version__}")
    if arguments.memory:
        compare_memory(arguments)
        return
    for family in arguments.families:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            examples = make_folder(
                folder, family, sizes, max(arguments.pairs + 1, arguments.rows, PROMPTS_TOGETHER)
            )
            print(f"\n{FAMILIES[family]}")
            for generations in arguments.num_generations:
                compare_grpo(folder, family, sizes, generations, examples, arguments.pairs)
            if not arguments.no_sft:
                compare_sft(folder, family, sizes, examples, arguments.rows, arguments.pairs)


if __name__ == "__main__":
    main()
