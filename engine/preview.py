"""What --show_batch and --dry_run print: a batch as the model gets it, token by token, and what a
run will need.

Texts come from data files and vocabularies: control characters in them are printed as escapes and
never reach the terminal.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TextIO

import torch
from torch import Tensor

from data.examples import Example
from data.prompts import PROMPTS
from engine.collate import collate_prompts
from engine.encode import IMAGE_TYPE, EncodedPrompt, EncodedRow, Encoder
from engine.memory import GIB, Forecast, Workload, forecast, model_shape
from engine.model import LoadedModel, load_encoder
from engine.order import shuffled
from engine.settings import TrainingConfig

CHECKED_ROWS = 64  # examples of a data set that a dry run encodes, images included
# SGR foregrounds
COLOURS = {"supervised": "32", "prompt": "39", "control": "35", "image": "36", "padding": "90"}
CARDS = (24, 40, 80)  # GB
# of a card: the rest is a guess at CUDA's context and at what the caching allocator cannot reuse
USABLE = 0.9


# ---- one batch -----------------------------------------------------------------------------------
def wants_colour(stream: TextIO) -> bool:
    """Colours go to a terminal only, and not where NO_COLOR is set (no-color.org) or the terminal
    is a dumb one.
    """
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def printable(text: str, also: str = "") -> str:
    """The text with a backslash before backslashes and the characters of `also`, and with escapes
    for what a terminal would act on or not show: control, format, separator and private characters.
    """
    named = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    shown = []
    for character in text:
        if character in named:
            shown.append(named[character])
        elif character == "\\" or character in also:
            shown.append("\\" + character)
        elif character != " " and unicodedata.category(character)[0] in "CZ":
            code = ord(character)
            shown.append(
                f"\\x{code:02x}"
                if code < 256
                else f"\\u{code:04x}"
                if code < 65536
                else f"\\U{code:08x}"
            )
        else:
            shown.append(character)
    return "".join(shown)


def row_pieces(
    encoder: Encoder, ids: Tensor, token_types: Tensor, attention_mask: Tensor, supervised: Tensor
) -> list[tuple[str, str, str]]:
    """One row, all [S] -> (kind, text, control text or "") of every token; runs of image
    placeholders and of padding are one piece. kind: supervised, prompt, image or padding.
    """
    pieces: list[tuple[str, str, str]] = []
    runs: list[int] = []  # length of the run that each piece stands for
    tokenizer, control = encoder.tokenizer, set(encoder.control_tokens)
    is_image_type = token_types == IMAGE_TYPE
    for token, is_image, attended, scored in zip(
        *(tensor.tolist() for tensor in (ids, is_image_type, attention_mask, supervised))
    ):
        kind = (
            "supervised"
            if scored
            else "padding"
            if not attended
            else "image"
            if is_image
            else "prompt"
        )
        if kind in ("image", "padding"):
            if pieces and pieces[-1][0] == kind:
                runs[-1] += 1
            else:
                pieces.append((kind, "", ""))
                runs.append(1)
            pieces[-1] = (kind, "", f"<{kind} x {runs[-1]}>")
            continue
        raw = tokenizer.convert_ids_to_tokens(token)
        text = tokenizer.decode(
            [token], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if raw in control:
            pieces.append((kind, "", raw))
        else:  # part of a character: as the vocabulary writes it
            pieces.append(
                (
                    kind,
                    text if "\ufffd" not in text else "",
                    "" if "\ufffd" not in text else f"{{{raw}}}",
                )
            )
        runs.append(1)
    return pieces


def row_fields(row: EncodedRow) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, token types, attention mask, supervised, all [S], of a row of training; it has no
    padding.
    """
    prompt, ids = row.prompt, row.completion_ids
    supervised = torch.cat(
        [torch.zeros(len(prompt.input_ids), dtype=torch.bool), row.completion_mask]
    )
    return (
        torch.cat([prompt.input_ids, ids]),
        torch.cat([prompt.token_types, torch.zeros_like(ids)]),
        torch.ones_like(supervised),
        supervised,
    )


def row_text(pieces: Sequence[tuple[str, str, str]], colour: bool) -> str:
    """A row for the eye; a line ends after each newline token. Colour: every second token is
    underlined. Plain: | between tokens, [[ ]] around supervised ones, and a backslash before these
    characters in the text.
    """
    parts, inside = [], False
    for number, (kind, text, control) in enumerate(pieces):
        shown = printable(control) if control else printable(text, "" if colour else "|[]")
        end = "\n" if text.endswith("\n") else ""
        if colour:
            code = COLOURS["control" if control and kind in ("prompt", "supervised") else kind]
            parts.append(
                f"\x1b[{code}{';1' if kind == 'supervised' else ''}{';4' if number % 2 else ''}m{shown}\x1b[0m{end}"
            )
            continue
        scored = kind == "supervised"
        mark = (
            "[["
            if scored and not inside
            else "]]"
            if inside and not scored
            else "|"
            if number
            else ""
        )
        parts.append(mark + shown + end)
        inside = scored
    return "".join(parts) + ("]]" if inside else "")


def legend(colour: bool) -> str:
    if not colour:
        return (
            "legend: [[supervised]], others are not; | between tokens; \\ before | [ ] \\ of the"
            " text and in escapes; {..} part of a character"
        )
    painted = " ".join(
        f"\x1b[{code}{';1' if kind == 'supervised' else ''}m{kind}\x1b[0m"
        for kind, code in COLOURS.items()
    )
    return (
        f"legend: {painted}; supervised is bold; every second token is underlined; {{..}} part of a"
        " character"
    )


def batch_text(
    encoder: Encoder, batch: Sequence[tuple[Tensor, ...]], examples: Sequence[Example], colour: bool
) -> str:
    """The whole batch, of each row the arguments of `row_pieces`; rows with the same tokens (the
    prompts of different images) are shown once.
    """
    same: dict[tuple, list[int]] = {}
    for i, row in enumerate(batch):
        same.setdefault(tuple(tuple(tensor.tolist()) for tensor in row), []).append(i)
    lines = [legend(colour), ""]
    for rows in same.values():
        fields = batch[rows[0]]
        lines += [
            f"row {i + 1}: {printable(examples[i].id)}, {printable(examples[i].image)}"
            for i in rows
        ]
        lines += [counts(*fields[1:]), row_text(row_pieces(encoder, *fields), colour), ""]
    total = counts(*(torch.cat(tensors) for tensors in list(zip(*batch))[1:]))
    return "\n".join([*lines, f"batch of {len(batch)} rows: {total}"])


def counts(token_types: Tensor, attention_mask: Tensor, supervised: Tensor) -> str:
    return (
        f"{int(attention_mask.sum())} tokens, {int(supervised.sum())} supervised,"
        f" {int((token_types == IMAGE_TYPE).sum())} image, {int((~attention_mask).sum())} padding"
    )


def first_examples(
    config: TrainingConfig, examples: Sequence[Example], count: int
) -> list[Example]:
    """The examples that the loop takes first, in its order."""
    return [examples[i] for i in shuffled(len(examples), 0, config.seed)[:count]]


def _encoder(config: TrainingConfig) -> Encoder:
    return load_encoder(
        config.model_name_or_path,
        min_visual_tokens=config.min_visual_tokens,
        max_visual_tokens=config.max_visual_tokens,
    )


def show_answers(config: TrainingConfig, examples: Sequence[Example], stream: TextIO) -> int:
    """--show_batch of run_sft.py: the first micro-batch. Returns the exit code 0."""
    encoder = _encoder(config)
    chosen = first_examples(config, examples, config.per_device_train_batch_size)
    batch = [row_fields(encoder.encode_answer(e, PROMPTS[config.prompt], e.answer)) for e in chosen]
    _write(
        stream,
        f"first micro-batch of training, prompt {config.prompt!r}\n"
        + batch_text(encoder, batch, chosen, wants_colour(stream)),
    )
    return 0


def show_prompts(
    config: TrainingConfig, examples: Sequence[Example], prompts: int, stream: TextIO
) -> int:
    """--show_batch of run_grpo.py: the prompts of the first rollout, as they are sampled from.
    Returns the exit code 0.
    """
    encoder = _encoder(config)
    chosen = first_examples(config, examples, prompts)
    prompts = collate_prompts(
        [encoder.encode_prompt(e, PROMPTS[config.prompt]) for e in chosen], encoder.pad_token_id
    )
    batch = list(
        zip(
            prompts.input_ids,
            prompts.token_types,
            prompts.attention_mask,
            torch.zeros_like(prompts.attention_mask),
        )
    )
    _write(
        stream,
        f"prompts of the first rollout, prompt {config.prompt!r}, padded on the left as the sampler"
        " takes them\n"
        + batch_text(encoder, batch, chosen, wants_colour(stream))
        + "\nsupervised later: the tokens that are sampled after each prompt, stop token included;"
        " nothing of the prompt ever is",
    )
    return 0


def _write(stream: TextIO, text: str) -> None:
    encoding = stream.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)


# ---- what a run will need ------------------------------------------------------------------------
def encoded_rows(
    config: TrainingConfig, encoder: Encoder, examples: Sequence[Example], answers: bool
) -> list[EncodedRow | EncodedPrompt]:
    """The first examples in the loop's order, encoded with their images. Raises DataError for one
    that cannot be.
    """
    prompt = PROMPTS[config.prompt]
    chosen = first_examples(config, examples, CHECKED_ROWS)
    return [
        encoder.encode_answer(e, prompt, e.answer) if answers else encoder.encode_prompt(e, prompt)
        for e in chosen
    ]


def dry_run_report(
    config: TrainingConfig,
    model: LoadedModel,
    wrapped,
    train: Sequence[Example],
    sets: Mapping[str, Sequence[Example]],
    rollout_prompts: int = 0,
    num_generations: int = 1,
) -> str:
    """Token lengths of the first rows of every data set, and the memory forecast. rollout_prompts
    0: SFT.

    Raises DataError where one of these rows cannot be encoded.
    """
    sft = rollout_prompts == 0
    rows = encoded_rows(config, model.encoder, train, answers=sft)
    prompts = [row.prompt if sft else row for row in rows]
    evaluated = [
        prompt
        for examples in sets.values()
        for prompt in encoded_rows(config, model.encoder, examples, answers=False)
    ]
    completions = (
        [len(row.completion_ids) for row in rows] if sft else [config.max_completion_length]
    )
    adapter = wrapped.peft_config["default"]
    micro = config.per_device_train_batch_size
    work = Workload(
        element_size=model.base.dtype.itemsize,
        device=model.base.device.type,
        lora_r=adapter.r,
        lora_dropout=adapter.lora_dropout,
        adapters=len(wrapped.peft_config),
        gradient_checkpointing=config.gradient_checkpointing,
        prompt_length=max(len(prompt.input_ids) for prompt in prompts + evaluated),
        image_tokens=max(int(prompt.token_types.sum()) for prompt in prompts + evaluated),
        completion_length=max(completions),
        max_completion_length=config.max_completion_length,
        micro_batch=micro,
        eval_rows=config.per_device_eval_batch_size,
        rollout_prompts=rollout_prompts,
        num_generations=num_generations,
        max_tokens_per_forward=config.max_tokens_per_forward,
    )
    adapters = {id(p) for name, p in wrapped.named_parameters() if "lora_" in name}
    base = sum(p.numel() for p in wrapped.parameters() if id(p) not in adapters)
    lengths, images = (
        [len(prompt.input_ids) for prompt in prompts],
        [int(prompt.token_types.sum()) for prompt in prompts],
    )
    return "\n".join(
        [
            (
                f"checked     {len(rows)} of {len(train)} training rows and {len(evaluated)} of"
                f" {sum(map(len, sets.values()))} to evaluate, images included"
            ),
            f"tokens      prompt {_spread(lengths)}, of them image {_spread(images)}; "
            + (
                f"answer {_spread(completions)}"
                if sft
                else f"completion up to {config.max_completion_length}"
            ),
            memory_table(forecast(model_shape(model.base.config, base), work), work),
            "dry run: nothing was trained, no run folder was made",
        ]
    )


def _spread(lengths: Sequence[int]) -> str:
    return f"min {min(lengths)}, mean {sum(lengths) / len(lengths):.1f}, max {max(lengths)}"


def memory_table(found: Forecast, work: Workload) -> str:
    """The forecast's phases as columns, its parts as rows, in GiB; then the peak and the cards that
    hold it.
    """
    parts = list(dict.fromkeys(part for phase in found.phases.values() for part in phase))
    width = max(map(len, (*parts, "total")))
    lines = [
        (
            "memory      forecast in GiB, at the largest moment of each phase, with the longest"
            " rows that were seen"
        ),
        f"  {'':{width}} " + " ".join(f"{phase:>10}" for phase in found.phases),
    ]
    for part in parts:
        lines.append(
            f"  {part:{width}} "
            + " ".join(f"{phase.get(part, 0) / GIB:10.3f}" for phase in found.phases.values())
        )
    lines.append(
        f"  {'total':{width}} "
        + " ".join(f"{sum(phase.values()) / GIB:10.3f}" for phase in found.phases.values())
    )
    lines.append(
        f"  peak {found.peak / GIB:.3f} GiB in {found.peak_phase}; "
        + (
            "fits "
            + ", ".join(f"{card} GB: {'yes' if fits(found, card) else 'no'}" for card in CARDS)
            + f" (at most {USABLE:.0%} of a card)"
            if work.device == "cuda"
            else "beside what Python and its libraries take"
        )
    )
    return "\n".join(lines)


def fits(found: Forecast, card: int) -> bool:
    return found.peak <= USABLE * card * GIB
