"""Remake the small pretrained checkpoints that the demo fine-tunes: base/ and base_gemma/ here.

    python -m data.demo.build_base [--family qwen2_5_vl | gemma3] [--output FOLDER] [--threads N]

Each checkpoint is of the real class, Qwen2_5_VLForConditionalGeneration or
Gemma3ForConditionalGeneration, with a little over 2 M parameters and a BPE tokenizer of its
family's form. The differences between the two are in `base_families.py`. It takes about 15 minutes
on one core. Seeds and step counts are fixed: the same machine and thread count give the same bytes.
Elsewhere sums round differently, which changes the bytes and moves the scores a little.

A base has seen 10,000 drawn radiographs that no other split contains, of the site `general`
(sites.py), always with CheXpert's words. It has seen no picture of site a or b, none of NIH's
vocabulary, and every mark as often with a label as without it.

    stage 1   the vision tower alone: where each label and mark is (4 x 4 cells) and which are there
    stage 2   all parameters, on five tasks: a caption, findings with an impression that lists the
              labels, a choice between two labels in tags, the presence of one label in tags, and
              what is burned in. Captions and findings name the marks, too. The loss of stage 1
              stays on as an auxiliary loss.

It has not seen the demo's prompt (though its words shaped the tokenizer), nor an answer with
several labels in tags. That is left to fine-tuning. It has seen every label right after
"<solution>" and, where CheXpert's order allows it, after ", ". It needs to: Qwen's pre-tokenizer
glues ">" to the word behind it, so ">Edema" is a token of its own, and LoRA leaves the tied
embedding frozen. A base without these tokens answers well greedily and falls apart when sampled.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.command_line import Parser, exit_code, plain_integer
from data.demo.base_families import BASE_FAMILIES, HIDDEN_SIZE, VISUAL_TOKENS, BaseFamily
from data.demo.radiographs import Radiograph, draw, mark_cells
from data.demo.sites import MARKS
from data.demo.splits import SPLITS, seeds
from data.demo.teacher import (
    film_phrases,
    finding_phrases,
    reasoning_trace,
    report,
    sentences,
)
from data.labels import LABELS
from data.prompts import PROMPTS, Prompt, build_messages

SEED = 0
SEEN = (*LABELS, *MARKS)  # what stage 1 teaches the tower to see
BATCH_SIZE = 32
VISION_STEPS, VISION_LEARNING_RATE = 1200, 1e-3
ALL_STEPS, ALL_LEARNING_RATE = 600, 1.5e-3
TOWER_RATE = 0.3  # of ALL_LEARNING_RATE, for the tower that stage 1 has trained

# --------------------------------------------------------------------------------------------------

_CAPTION_PROMPTS = ("Describe this chest X-ray.", "What does this chest X-ray show?")
_IMPRESSION_PROMPT = "Write the findings and the impression."
_IN_TAGS = " Reason inside <think></think>, then answer inside <solution></solution>."
_FILM_PROMPT = "What is burned into this chest X-ray?"
_TASKS = ("caption", "impression", "choice", "presence", "film")
_TASK_SHARES = (0.14, 0.18, 0.46, 0.14, 0.08)


def sample_task(radiograph: Radiograph, task: str, rng: np.random.Generator) -> tuple[str, str]:
    """Draw one question about a radiograph, and its answer."""
    if task == "film":
        return _FILM_PROMPT, sentences(film_phrases(radiograph, rng)) or "Nothing."
    if task == "caption":
        return str(rng.choice(_CAPTION_PROMPTS)), report(radiograph, rng)
    if task == "impression":
        return (
            _IMPRESSION_PROMPT,
            f"Findings: {report(radiograph, rng)} Impression: {', '.join(radiograph.findings)}.",
        )
    absent = [label for label in LABELS if label not in radiograph.findings]
    present_label, absent_label = str(rng.choice(radiograph.findings)), str(rng.choice(absent))
    if task == "choice":
        first, second = rng.permutation([present_label, absent_label])
        return (
            f"Which of these does it show, {first} or {second}?{_IN_TAGS}",
            f"<think>{report(radiograph, rng)}</think><solution>{present_label}</solution>",
        )
    if rng.random() < 0.5:
        phrase = finding_phrases(radiograph, rng)[present_label]
        return (
            f"Is there {present_label}?{_IN_TAGS}",
            f"<think>{phrase.capitalize()}.</think><solution>yes</solution>",
        )
    return (
        f"Is there {absent_label}?{_IN_TAGS}",
        f"<think>{report(radiograph, rng)}</think><solution>no</solution>",
    )


def tokenizer_corpus(radiographs: list[Radiograph], chat_words: str) -> Iterator[str]:
    """Yield the prompts, traces and answers from which the tokenizer learns its merges."""
    rng = np.random.default_rng(SEED)
    demo_prompt = "".join(
        part["text"]
        for message in build_messages(PROMPTS["demo"])
        for part in message["content"]
        if part["type"] == "text"
    )
    for radiograph in radiographs:
        yield f"{chat_words}{demo_prompt}"
        yield reasoning_trace(radiograph, radiograph.seed)
        for task in _TASKS:
            yield from sample_task(radiograph, task, rng)


# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """Hold drawn radiographs, and as arrays what the losses need of them."""

    radiographs: list[Radiograph]
    images: np.ndarray  # uint8 [N,112,112]
    grids: torch.Tensor  # float32 [N,16,16]: 1 in the cells where a label or mark can be seen
    labels: torch.Tensor  # float32 [N,16]

    @staticmethod
    def of(radiographs: list[Radiograph]) -> Pictures:
        """Collect the arrays of radiographs."""
        cells = {mark: mark_cells(mark) for mark in MARKS}
        grids = np.stack(
            [
                [*shown.grid, *(cells[mark] & (mark in shown.marks) for mark in MARKS)]
                for shown in radiographs
            ]
        ).reshape(-1, len(SEEN), VISUAL_TOKENS)
        labels = [
            [float(seen in (*radiograph.findings, *radiograph.marks)) for seen in SEEN]
            for radiograph in radiographs
        ]
        return Pictures(
            radiographs,
            np.stack([radiograph.image for radiograph in radiographs]),
            torch.tensor(grids, dtype=torch.float32).transpose(1, 2),
            torch.tensor(labels),
        )


def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move the batch by up to two pixels, so that the location cells stay true."""
    return np.roll(images, tuple(rng.integers(-2, 3, size=2)), axis=(1, 2))


class Encoder:
    """Turn questions and answers into the tensors that the model takes."""

    def __init__(self, family: BaseFamily, tokenizer: PreTrainedTokenizerBase) -> None:
        self.family, self.tokenizer = family, tokenizer
        self.image_token_id = family.special_ids(tokenizer)[family.image_token]
        # few different questions are asked, many times each
        self.prompt_ids = cache(self._prompt_ids)

    def _prompt_ids(self, text: str) -> list[int]:
        messages = build_messages(Prompt("base", text))
        rendered = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        assert isinstance(rendered, str)  # ids only with tokenize=True
        return self._ids(self.family.expand_image(rendered))

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def batch(
        self, images: np.ndarray, questions: list[str], answers: list[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Encode a batch, padded on the right.

        images [B,112,112] uint8: one a question.
        answers: for training, with the loss on the answer and its end of turn. None for generation.
        """
        rows, labels = [], []
        for number, question in enumerate(questions):
            prompt = self.prompt_ids(question)
            answer = [] if answers is None else self._ids(answers[number] + self.family.end_of_turn)
            rows.append(prompt + answer)
            labels.append([-100] * len(prompt) + answer)
        length = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])  # [B, L]
        batch = {
            "input_ids": input_ids,
            "attention_mask": torch.tensor(
                [[1] * len(row) + [0] * (length - len(row)) for row in rows]
            ),
            # Without it transformers 5 silently treats the image as text: its positions (Qwen), its
            # attention (Gemma).
            self.family.token_types_name: (input_ids == self.image_token_id).int(),
            **self.family.pixel_inputs(images),
        }
        if answers is not None:
            batch["labels"] = torch.tensor([row + [-100] * (length - len(row)) for row in labels])
        return batch


# --------------------------------------------------------------------------------------------------


class LocationHeads(nn.Module):
    """Read from the visual tokens where each label and mark is, and from both which are there.

    Used in training only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cell_head = nn.Linear(HIDDEN_SIZE, len(SEEN))
        self.image_head = nn.Linear(HIDDEN_SIZE, len(SEEN))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the logits of cells [B,16,16] and of images [B,16] from tokens [B,16,hidden]."""
        cells = self.cell_head(tokens)  # [B,16 cells,16]
        pooled = (tokens.mean(dim=1) + tokens.amax(dim=1)) / 2  # [B,hidden]
        return cells, self.image_head(pooled) + cells.amax(dim=1)

    def loss(self, tokens: torch.Tensor, grids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Compute the cross-entropy of images and of cells, where the rare positives count more."""
        cells, image = self(tokens)
        rare_cells = torch.tensor(4.0)  # few cells of a picture show anything
        return F.binary_cross_entropy_with_logits(
            image, labels
        ) + F.binary_cross_entropy_with_logits(cells, grids, pos_weight=rare_cells)


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int = 50) -> float:
    """Scale the learning rate: linear warm-up times a cosine from 1 to 0.02."""
    return min(1.0, (step + 1) / warmup_steps) * (
        0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * step / total_steps))
    )


def optimizer_step(
    optimizer: torch.optim.AdamW, loss: torch.Tensor, step: int, total_steps: int
) -> None:
    """Take one optimizer step at the step's learning rate, with gradients clipped to norm 1."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * learning_rate_factor(step, total_steps)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(
        [parameter for group in optimizer.param_groups for parameter in group["params"]], 1.0
    )
    optimizer.step()


def make_optimizer(*groups: tuple[list[nn.Parameter], float]) -> torch.optim.AdamW:
    """Build the optimizer of groups (parameters, learning rate)."""
    return torch.optim.AdamW(
        [dict(params=parameters, base_lr=rate) for parameters, rate in groups],
        lr=0.0,
        weight_decay=0.05,
        betas=(0.9, 0.98),
    )


def visual_tokens(family: BaseFamily, model: PreTrainedModel, images: np.ndarray) -> torch.Tensor:
    """Compute the visual tokens [B,16,hidden] of images, uint8 [B,112,112]."""
    features = model.model.get_image_features(
        **family.pixel_inputs(images), return_dict=True
    ).pooler_output
    return torch.cat(tuple(features)).view(len(images), VISUAL_TOKENS, HIDDEN_SIZE)


def vision_parameters(family: BaseFamily, model: PreTrainedModel) -> list[nn.Parameter]:
    """List the parameters between pixels and language model."""
    return [
        parameter for module in family.vision_modules(model) for parameter in module.parameters()
    ]


def pretrain_vision(
    family: BaseFamily, model: PreTrainedModel, heads: LocationHeads, pictures: Pictures
) -> None:
    """Train the vision tower alone: stage 1."""
    rng = np.random.default_rng([SEED, 1])
    parameters = [*vision_parameters(family, model), *heads.parameters()]
    optimizer = make_optimizer((parameters, VISION_LEARNING_RATE))
    progress = Progress("stage 1", VISION_STEPS)
    for step in range(VISION_STEPS):
        chosen = rng.choice(len(pictures.images), BATCH_SIZE, replace=False)
        tokens = visual_tokens(family, model, augment(pictures.images[chosen], rng))
        loss = heads.loss(tokens, pictures.grids[chosen], pictures.labels[chosen])
        optimizer_step(optimizer, loss, step, VISION_STEPS)
        progress.log(step, vision=loss.item())


def pretrain_all(
    model: PreTrainedModel, heads: LocationHeads, pictures: Pictures, encoder: Encoder
) -> None:
    """Train all parameters: stage 2."""
    rng = np.random.default_rng([SEED, 2])
    tower = vision_parameters(encoder.family, model)
    in_tower = set(map(id, tower))
    language = [parameter for parameter in model.parameters() if id(parameter) not in in_tower]
    optimizer = make_optimizer(
        (language, ALL_LEARNING_RATE),
        ([*tower, *heads.parameters()], TOWER_RATE * ALL_LEARNING_RATE),
    )
    features: list[torch.Tensor] = []  # of the current step, for the auxiliary loss

    def keep(module: nn.Module, inputs: tuple, output: Any) -> None:
        features.append(getattr(output, "pooler_output", output))

    hook = encoder.family.vision_modules(model)[-1].register_forward_hook(keep)
    progress = Progress("stage 2", ALL_STEPS)
    for step in range(ALL_STEPS):
        chosen = rng.choice(len(pictures.images), BATCH_SIZE, replace=False)
        tasks = rng.choice(_TASKS, BATCH_SIZE, p=_TASK_SHARES)
        pairs = [
            sample_task(pictures.radiographs[index], task, rng)
            for index, task in zip(chosen, tasks, strict=True)
        ]
        questions, answers = map(list, zip(*pairs, strict=True))
        text_loss = model(
            **encoder.batch(augment(pictures.images[chosen], rng), questions, answers)
        ).loss
        tokens = features.pop().view(BATCH_SIZE, VISUAL_TOKENS, HIDDEN_SIZE)
        vision_loss = heads.loss(tokens, pictures.grids[chosen], pictures.labels[chosen])
        optimizer_step(optimizer, text_loss + vision_loss, step, ALL_STEPS)
        progress.log(step, text=text_loss.item(), vision=vision_loss.item())
    hook.remove()


class Progress:
    """Print the mean of each loss every 50 steps."""

    def __init__(self, stage: str, total_steps: int, every: int = 50) -> None:
        self.stage, self.total_steps, self.every = stage, total_steps, every
        self.start = time.monotonic()
        self.sums: dict[str, float] = {}

    def log(self, step: int, **losses: float) -> None:
        """Add the losses of a step, and print when it is time."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if (step + 1) % self.every == 0:
            means = "  ".join(
                f"{name} {total / self.every:.3f}" for name, total in self.sums.items()
            )
            print(
                f"{self.stage}  {step + 1}/{self.total_steps}  {means} "
                f" {time.monotonic() - self.start:.0f} s",
                flush=True,
            )
            self.sums.clear()


# --------------------------------------------------------------------------------------------------


def f1_scores(predicted: torch.Tensor, true: torch.Tensor) -> tuple[float, float]:
    """Compute (micro, macro) F1 of predicted and true labels, both bool [N,14]."""
    hits, sizes = (predicted & true).sum(0).float(), (predicted.sum(0) + true.sum(0)).float()
    return (2 * hits.sum() / sizes.sum()).item(), (2 * hits / sizes.clamp(min=1)).mean().item()


@torch.no_grad()
def report_vision(
    family: BaseFamily, model: PreTrainedModel, heads: LocationHeads, pictures: Pictures
) -> None:
    """Print how well the vision tower tells which labels are there."""
    logits = torch.cat(
        [
            heads(visual_tokens(family, model, images))[1]
            for images in np.array_split(pictures.images, 10)
        ]
    )
    predicted, true = logits > 0, pictures.labels > 0
    micro, macro = f1_scores(predicted[:, : len(LABELS)], true[:, : len(LABELS)])
    marks = (predicted == true)[:, len(LABELS) :].float().mean().item()
    print(
        f"labels that the vision tower sees: micro F1 {micro:.3f}, macro F1 {macro:.3f};"
        f" marks right: {marks:.3f}",
        flush=True,
    )


@torch.no_grad()
def report_text(model: PreTrainedModel, encoder: Encoder, pictures: Pictures) -> None:
    """Print how well the written impressions list the labels."""
    impressions: list[str] = []
    for images in np.array_split(pictures.images, 10):
        batch = encoder.batch(images, [_IMPRESSION_PROMPT] * len(images))
        generate: Any = model.generate  # of both families' classes, not of their common one
        output = generate(**batch, do_sample=False, max_new_tokens=120)
        output = output[:, batch["input_ids"].shape[1] :]
        impressions += encoder.tokenizer.batch_decode(output, skip_special_tokens=True)
    listed = [
        set(text.partition("Impression: ")[2].rstrip(".").split(", ")) for text in impressions
    ]
    predicted = torch.tensor([[label in labels for label in LABELS] for labels in listed])
    true = pictures.labels[:, : len(LABELS)] > 0
    micro, macro = f1_scores(predicted, true)
    print(
        f"labels in the written impression: micro F1 {micro:.3f}, macro F1 {macro:.3f}",
        flush=True,
    )


# --------------------------------------------------------------------------------------------------


def save(
    family: BaseFamily, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write the checkpoint in bf16, with its tokenizer and image processor."""
    model.to(torch.bfloat16)  # type: ignore[arg-type]  # transformers wraps it without its type
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    family.image_processor().save_pretrained(folder)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = Parser(
        prog="python -m data.demo.build_base", description="Train a base checkpoint of the demo."
    )
    parser.add_argument(
        "--family",
        choices=list(BASE_FAMILIES),
        default="qwen2_5_vl",
        help="model type (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder to write (default: the shipped checkpoint's, data/demo/base or base_gemma)",
    )
    parser.add_argument(
        "--threads",
        type=plain_integer,
        default=1,
        help="torch's CPU threads (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    family = BASE_FAMILIES[options.family]
    output = options.output or family.folder
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)

    with ProcessPoolExecutor(max_workers=2) as pool:
        radiographs, validation = (
            list(pool.map(partial(draw, site=SPLITS[name].site), seeds(name), chunksize=100))
            for name in ("base-train", "base-validation")
        )
    train, unseen = Pictures.of(radiographs), Pictures.of(validation)
    tokenizer = family.train_tokenizer(tokenizer_corpus(radiographs[:2500], family.chat_words))
    encoder = Encoder(family, tokenizer)
    model, heads = family.build_model(tokenizer), LocationHeads()
    print(
        f"{len(train.images)} radiographs, {len(tokenizer)} tokens, {model.num_parameters():,}"
        " parameters",
        flush=True,
    )

    model.train()
    pretrain_vision(family, model, heads, train)
    report_vision(family, model, heads, unseen)
    pretrain_all(model, heads, train, encoder)
    model.eval()
    report_vision(family, model, heads, unseen)
    report_text(model, encoder, unseen)
    save(family, model, tokenizer, output)
    print(f"saved {output}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
