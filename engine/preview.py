"""Print what a run is about to do: its banner, and what --show_batch and --dry_run ask for.

--show_batch shows a batch as the model gets it, token by token. --dry_run checks the first rows of
every data set and forecasts the memory.

Texts come from data files and vocabularies: control characters in them are printed as escapes and
never reach the terminal.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from data.examples import Example
from data.prompt_files import prompt_warnings
from engine.collate import collate_prompts
from engine.config import Resolved, UsageError, describe
from engine.encode import IMAGE_TYPE, EncodedPrompt, EncodedRow, Encoder
from engine.inherited import FRESH
from engine.memory import forecast, lora_parameters, model_shape
from engine.memory_table import memory_table
from engine.model import (
    NO_EFFECT,
    frozen_parts,
    has_no_effect,
    is_decoders_lora,
    trained_lora,
)
from engine.model_files import lacks_weights
from engine.order import Order
from engine.policy import Policy, encoder_of
from engine.ranks import ALONE, Ranks
from engine.ranks_forecast import ranks_table
from engine.runtime import environment_banner
from engine.settings import TrainingConfig
from engine.workload import Lengths, Plan, rank_of, shape_of, shards_of, training_work

CHECKED_ROWS = 64  # examples of a data set that a dry run encodes, images included
# SGR foregrounds
COLOURS = {"supervised": "32", "prompt": "39", "control": "35", "image": "36", "padding": "90"}


# ---- the start of a run -------------------------------------------------------------------------
def banner(
    title: str,
    folder: Path | str,
    policy: Policy,
    adapter: str,
    lines: Sequence[str],
    resolved: Resolved,
) -> str:
    """Say what is about to run: where, on what, with which data and settings.

    title: "SFT" or "GRPO". folder: the run's. adapter: what the policy begins as.
    lines: what the script knows of its data and batches.
    """
    config: TrainingConfig = resolved.configs[0]
    trainable = sum(parameter.numel() for parameter in policy.parameters)
    total = sum(parameter.numel() for parameter in policy.net.parameters())
    return "\n".join(
        [
            f"{title} -> {folder}",
            environment_banner(policy.device),
            f"model       {policy.base.name} ({policy.family.model_type}) with {adapter}:"
            f" {total:,} parameters, {trainable:,} trainable",
            *_adapter_lines(policy, resolved.configs[0].adapter_name_or_path),
            *lines,
            "settings that differ from the paper's or the engine's defaults:",
            describe(resolved),
            *(f"warning: {line}" for line in prompt_warnings(config.prompt, config.label_set)),
            "",
        ]
    )


def _adapter_lines(policy: Policy, named: str | None) -> list[str]:
    """Say what of a saved adapter is not trained, and where it changes nothing.

    named: the adapter that was given, or FRESH.
    """
    frozen = frozen_parts(policy.adapted)
    lines = [f"frozen      loaded, not trained, saved with the result: {frozen}"] if frozen else []
    if named and named != FRESH and has_no_effect(policy.adapted):
        lines.append(f"warning     {NO_EFFECT}")
    return lines


# ---- one batch -----------------------------------------------------------------------------------
def wants_colour(stream: TextIO) -> bool:
    """Tell whether a stream shows colours: a terminal that is not dumb, without NO_COLOR.

    NO_COLOR is the variable of no-color.org.
    """
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def printable(text: str, also: str = "") -> str:
    """Escape what a terminal would act on or not show, so that a text is printed as it is.

    These are control, format, separator and private characters. A backslash is put before
    backslashes and the characters of `also`.
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
    """Cut a row into its tokens, to be shown -> (kind, text, control text or "") of each.

    ids [S] int64, token_types [S] int64, attention_mask [S] bool: as the model gets them.
    supervised [S] bool: true on the tokens in the loss.

    kind is supervised, prompt, image or padding. A run of image placeholders is one piece, and so
    is a run of padding.
    """
    pieces: list[tuple[str, str, str]] = []
    runs: list[int] = []  # length of the run that each piece stands for
    tokenizer, control = encoder.tokenizer, set(encoder.control_tokens)
    is_image_type = token_types == IMAGE_TYPE
    for token, is_image, attended, scored in zip(
        *(tensor.tolist() for tensor in (ids, is_image_type, attention_mask, supervised)),
        strict=True,
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
        assert isinstance(text, str)  # a list comes only of several rows
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
    """Give the arguments of `row_pieces` for a row of training, which has no padding.

    Returns ids, token types, attention mask and supervised, all [S].
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
    """Write a row for the eye. A line ends after each newline token.

    With colour, every second token is underlined. Without, there is | between tokens and [[ ]]
    around supervised ones, and a backslash before these characters in the text.

    pieces: of `row_pieces`.
    """
    parts, inside = [], False
    for number, (kind, text, control) in enumerate(pieces):
        shown = printable(control) if control else printable(text, "" if colour else "|[]")
        end = "\n" if text.endswith("\n") else ""
        if colour:
            code = COLOURS["control" if control and kind in ("prompt", "supervised") else kind]
            style = (";1" if kind == "supervised" else "") + (";4" if number % 2 else "")
            parts.append(f"\x1b[{code}{style}m{shown}\x1b[0m{end}")
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
    """Explain the marks of `row_text` in one line."""
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
    """Write a whole batch. Rows with the same tokens (prompts of different images) are shown once.

    batch: of each row the arguments of `row_pieces`. examples: of each row its example.
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
    total = counts(*(torch.cat(tensors) for tensors in list(zip(*batch, strict=True))[1:]))
    return "\n".join([*lines, f"batch of {len(batch)} rows: {total}"])


def counts(token_types: Tensor, attention_mask: Tensor, supervised: Tensor) -> str:
    """Count tokens of every kind. All arguments [S], as in `row_pieces`."""
    return (
        f"{int(attention_mask.sum())} tokens, {int(supervised.sum())} supervised,"
        f" {int((token_types == IMAGE_TYPE).sum())} image, {int((~attention_mask).sum())} padding"
    )


def first_examples(
    config: TrainingConfig, examples: Sequence[Example], count: int
) -> list[Example]:
    """Take the examples that the loop takes first, in its order."""
    order = Order(examples, config.hospital_weights, config.seed)
    return [examples[i] for i in order.epoch(0)[:count]]


def _encode_answer(config: TrainingConfig, encoder: Encoder, example: Example) -> EncodedRow:
    """Encode a training example with its answer and its image's pixels."""
    assert example.answer is not None  # run_sft.py leaves examples without one out
    return encoder.encode_answer(example, config.instruction, example.answer)


def _encode_prompt(config: TrainingConfig, encoder: Encoder, example: Example) -> EncodedPrompt:
    """Encode an example's prompt with its image's pixels."""
    return encoder.encode_prompt(example, config.instruction)


def show_answers(config: TrainingConfig, examples: Sequence[Example], stream: TextIO) -> int:
    """Show the first micro-batch: --show_batch of run_sft.py. Returns the exit code 0."""
    encoder = encoder_of(config)
    chosen = first_examples(config, examples, config.per_device_train_batch_size)
    batch = [row_fields(_encode_answer(config, encoder, example)) for example in chosen]
    _write(
        stream,
        f"first micro-batch of training, prompt {config.instruction.name!r}\n"
        + batch_text(encoder, batch, chosen, wants_colour(stream)),
    )
    return 0


def show_prompts(
    config: TrainingConfig, examples: Sequence[Example], count: int, stream: TextIO
) -> int:
    """Show the prompts of the first rollout as they are sampled from: --show_batch of run_grpo.py.

    count: prompts of a rollout. Returns the exit code 0.
    """
    encoder = encoder_of(config)
    chosen = first_examples(config, examples, count)
    prompts = collate_prompts(
        [_encode_prompt(config, encoder, example) for example in chosen], encoder.pad_token_id
    )
    batch = list(
        zip(
            prompts.input_ids,
            prompts.token_types,
            prompts.attention_mask,
            torch.zeros_like(prompts.attention_mask),
            strict=True,
        )
    )
    _write(
        stream,
        f"prompts of the first rollout, prompt {config.instruction.name!r}, padded on the left as"
        " the sampler takes them\n"
        + batch_text(encoder, batch, chosen, wants_colour(stream))
        + "\nsupervised later: the tokens that are sampled after each prompt, stop token included;"
        " nothing of the prompt ever is",
    )
    return 0


def _write(stream: TextIO, text: str) -> None:
    encoding = stream.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)


# ---- what a run will need ------------------------------------------------------------------------
def dry_run_report(
    config: TrainingConfig,
    policy: Policy,
    train: Sequence[Example],
    sets: Mapping[str, Sequence[Example]],
    plan: Plan | None = None,
    ranks: Ranks = ALONE,
) -> str:
    """Report the token lengths of the first rows of every data set, and the memory forecast.

    sets: the evaluated data sets by name. plan: of GRPO's rollouts.

    Raises DataError where one of these rows cannot be encoded.
    """
    rank, _ = trained_lora(policy.adapted)
    own = {id(p) for name, p in policy.net.named_parameters() if is_decoders_lora(name)}
    base = sum(p.numel() for p in policy.net.parameters() if id(p) not in own)
    shape = model_shape(policy.base.net.config, base)
    lines, longest = _checked_rows(config, policy.encoder, train, sets, plan)
    shards = shards_of(config, ranks.local_size)
    work = training_work(config, shape, longest, policy.device, rank, plan, shards)
    return "\n".join(
        [
            *lines,
            memory_table(forecast(shape, work), policy.device),
            ranks_table(shape, work, _per_rank(config), evaluates=bool(sets)),
            "dry run: nothing was trained, no run folder was made",
        ]
    )


def only_described(
    config: TrainingConfig,
    adapter: str | Path | None,
    train: Sequence[Example],
    sets: Mapping[str, Sequence[Example]],
    lines: Sequence[str],
    plan: Plan | None = None,
) -> bool:
    """Print the forecast of a dry run whose model's folder holds no weights -> whether it is one.

    adapter: the folder that the run starts from, None for a fresh one. The others are as in
    `dry_run_report`, lines as in `banner`.

    Raises UsageError where no model can be made of its config.json, DataError as `dry_run_report`.
    """
    name = config.model_name_or_path
    if not config.dry_run or not lacks_weights(name):
        return False
    shape, rank = shape_of(name), rank_of(adapter, config)
    if shape is None:
        raise UsageError(f"--model_name_or_path {name}: no model can be made of its config.json")
    checked, longest = _checked_rows(config, encoder_of(config), train, sets, plan)
    gpu = torch.device("cuda")
    work = training_work(config, shape, longest, torch.device("cpu"), rank, plan)
    found = forecast(shape, replace(work, device=gpu.type))
    if not sets:  # then nothing is ever evaluated
        del found.phases["evaluation"]
    print(
        "\n".join(
            [
                f"dry run of {name}, whose folder holds no weights: all of this is arithmetic from"
                " its config.json, and nothing was tried",
                f"model       {shape.base_parameters:,} parameters,"
                f" {lora_parameters(shape, rank):,} trainable in LoRA of rank {rank}",
                *lines,
                *checked,
                memory_table(found, gpu),
                ranks_table(shape, work, _per_rank(config), evaluates=bool(sets)),
                "dry run: nothing was trained, no run folder was made",
            ]
        )
    )
    return True


def _per_rank(config: TrainingConfig) -> int:
    """Count the completions (SFT: rows) of a step that one rank learns from."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps


def _checked_rows(
    config: TrainingConfig,
    encoder: Encoder,
    train: Sequence[Example],
    sets: Mapping[str, Sequence[Example]],
    plan: Plan | None,
) -> tuple[list[str], Lengths]:
    """Encode the first rows of every data set -> (lines about them, the longest of each kind)."""
    sft = plan is None
    checked = first_examples(config, train, CHECKED_ROWS)
    if sft:
        rows = [_encode_answer(config, encoder, example) for example in checked]
        prompts = [row.prompt for row in rows]
        completions = [len(row.completion_ids) for row in rows]
    else:
        prompts = [_encode_prompt(config, encoder, example) for example in checked]
        completions = [config.max_completion_length]
    evaluated = [
        _encode_prompt(config, encoder, example)
        for examples in sets.values()
        for example in first_examples(config, examples, CHECKED_ROWS)
    ]
    lengths = [len(prompt.input_ids) for prompt in prompts]
    images = [int(prompt.token_types.sum()) for prompt in prompts]
    image = max(int(prompt.token_types.sum()) for prompt in prompts + evaluated)
    text = max(len(prompt.input_ids) for prompt in prompts + evaluated) - image
    lines = [
        f"checked     {len(checked)} of {len(train)} training rows and {len(evaluated)} of"
        f" {sum(map(len, sets.values()))} to evaluate, images included",
        f"tokens      prompt {_spread(lengths)}, of them image {_spread(images)}; "
        + (
            f"answer {_spread(completions)}"
            if sft
            else f"completion up to {config.max_completion_length}"
        ),
    ]
    return lines, Lengths(text, image, max(completions))


def _spread(lengths: Sequence[int]) -> str:
    return f"min {min(lengths)}, mean {sum(lengths) / len(lengths):.1f}, max {max(lengths)}"
