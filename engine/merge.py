"""Fold a trained adapter into its base and write a folder that plain transformers loads, without
peft.

    python -m engine.merge --adapter_name_or_path runs/20260101-120000-grpo --output_dir merged

Every projection becomes W + scaling * B A, summed in fp32 and then cast, one projection at a time,
so that a model needs its own size in memory and little more. Tokenizer, image processor, chat
template and generation_config are the base's files.

The saved folder is loaded again and compared with base + adapter on one image and answer. Let D be
the root mean square over all logits of the answer's tokens of the difference to base + adapter
computed in fp32, relative to that of the logits themselves:

    float32     D(merged) <= 1e-4
    bfloat16    D(merged) <= 2 * D(base + adapter, computed in bfloat16 as in training)

The folder gets its name only after that, so a merge that fails or is killed leaves none that looks
finished.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from data.examples import Example
from data.files import sha256_of, write_json
from data.prompts import PROMPTS
from engine.collate import collate_rows
from engine.config import UsageError, parse_config, setting
from engine.encode import EncodedRow
from engine.families import language_model, lm_head_weight
from engine.forward import completion_hidden_states
from engine.model import (
    EMBEDDED,
    POLICY,
    LoadedModel,
    adapter_config,
    attach_adapter,
    load_model,
    looks_local,
    model_path,
)
from engine.run import saved_settings
from engine.runtime import main_guard, pick_device, versions
from engine.settings import FALLBACKS

# of D: fp32 arithmetic in another order gives about 1e-6, a projection left out far more
FLOAT32_BOUND = 1e-4
# times the rounding of base + adapter itself: rounding W + delta once more costs about as much
# again
BFLOAT16_BOUND = 2.0
PROBE_ANSWER = (
    "<think>Clear lungs, normal heart size, no effusion.</think><solution>No Finding</solution>"
)
# What a tokenizer, an image processor or `generate` of transformers reads beside weights and
# config.json.
COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)


@dataclass(frozen=True)
class MergeConfig:
    """Flags of `python -m engine.merge`."""

    adapter_name_or_path: str | None = setting(
        None, "folder of the adapter: a finished run, or a checkpoint-<step> of one"
    )
    output_dir: str | None = setting(None, "new folder for the merged model")
    model_name_or_path: str | None = setting(
        None,
        "base model, where it has moved: a folder, a hub name or 'demo'; without it, the base that"
        " the adapter names",
    )
    dtype: Literal["bfloat16", "float32"] = setting(
        "bfloat16", "of the merged weights; the sum itself is always in float32"
    )
    num_threads: int | None = setting(
        None, "CPU threads of torch; else torch's own choice", unit="threads"
    )


def config_problems(config: MergeConfig) -> list[str]:
    """What is missing on the command line."""
    return [
        f"--{name} is missing"
        for name in ("adapter_name_or_path", "output_dir")
        if not getattr(config, name)
    ]


# ---- merge ---------------------------------------------------------------------------------------
def merge_adapter(wrapped: PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with `default` folded in and no adapter left, its weights in `dtype`; `wrapped` is
    used up.

    One projection at a time is in fp32. peft's own merge rounds the product B A to the base's dtype
    before it adds it.
    """
    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight
            weight.data = (weight.float() + module.get_delta_weight(POLICY)).to(dtype)
    merged = wrapped.unload()
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(dtype)
    return merged


def copy_processor(path: str, folder: Path) -> list[str]:
    """Copy the base's tokenizer, image processor, chat template and generation_config; returns the
    names of what there was.
    """
    copied = []
    for name in COPIED_FILES:
        try:
            source = cached_file(path, name)
        except OSError:
            # the base has none, and so it is not needed: the loaded processors are compared later
            continue
        shutil.copyfile(source, folder / name)
        copied.append(name)
    return copied


# ---- verify --------------------------------------------------------------------------------------
def probe_rows(model: LoadedModel) -> tuple[EncodedRow, EncodedRow]:
    """One image of fixed noise, 512 x 512, with an instruction and an answer: with the image's
    pixels, with its features.
    """
    with tempfile.TemporaryDirectory() as folder:
        pixels = np.random.default_rng(0).integers(0, 256, (512, 512), dtype=np.uint8)
        Image.fromarray(pixels).save(Path(folder) / "probe.png")
        example = Example("probe", "probe", "probe.png", (), "probe", Path(folder))
        question = example, PROMPTS["free_reasoning"], PROBE_ANSWER
        return model.encoder.encode_answer(*question), model.encode_answer(*question)


@torch.no_grad()
def probe_logits(model: LoadedModel, net: nn.Module) -> tuple[EncodedRow, Tensor]:
    """(the probe with its pixels, logits [T,V] fp32 on the CPU of its answer's T tokens); the head
    itself is always applied in fp32.
    """
    device = next(net.parameters()).device
    probe, seen = probe_rows(model)
    batch = collate_rows([seen], model.encoder.pad_token_id).to(device)
    hidden, _ = completion_hidden_states(net, model.family, batch)  # [T,H]
    # the whole head in fp32 would be the largest tensor by far
    pieces = lm_head_weight(net).split(16_384)
    return probe, torch.cat([(hidden.float() @ piece.float().T).cpu() for piece in pieces], dim=1)


@contextmanager
def float32_decoder(net: nn.Module) -> Iterator[None]:
    """The decoder computes in fp32: each module's own weights are cast for its call alone, and are
    then as before.
    """
    stored: dict[Tensor, Tensor] = {}

    def cast(module: nn.Module, arguments: tuple, keywords: dict) -> tuple[tuple, dict]:
        for parameter in module.parameters(recurse=False):
            stored[parameter] = parameter.data
            parameter.data = parameter.data.float()
        return arguments, keywords

    def restore(module: nn.Module, arguments: tuple, output: object) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = stored.pop(parameter)

    def inputs(module: nn.Module, arguments: tuple, keywords: dict) -> tuple[tuple, dict]:
        return arguments, keywords | {"inputs_embeds": keywords["inputs_embeds"].float()}

    decoder = language_model(net)
    owners = [
        module
        for module in decoder.modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    handles = [decoder.register_forward_pre_hook(inputs, with_kwargs=True)]
    handles += [module.register_forward_pre_hook(cast, with_kwargs=True) for module in owners]
    handles += [module.register_forward_hook(restore) for module in owners]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def relative_difference(logits: Tensor, truth: Tensor) -> float:
    """D of the module's docstring. [T,V] both."""
    return float((logits - truth).square().mean().sqrt() / truth.square().mean().sqrt())


def check_same_inputs(merged: EncodedRow, base: EncodedRow) -> None:
    """Raises RuntimeError where the copied processor does not give the base's tokens and pixels."""
    first, second = (
        {"ids": row.prompt.input_ids, "answer": row.completion_ids} | row.prompt.vision
        for row in (merged, base)
    )
    if first.keys() != second.keys() or not all(
        torch.equal(first[name], second[name]) for name in second
    ):
        raise RuntimeError(
            "the copied tokenizer, chat template or image processor does not give the base's"
            " inputs; nothing was written"
        )


# ---- command -------------------------------------------------------------------------------------
def base_of(config: MergeConfig) -> str:
    """The base to merge into. Raises UsageError where the adapter names none, or where it names
    another hub model than the flag.

    A folder may be a moved or downloaded copy of what the adapter names; that keys and shapes fit
    is checked in any case.
    """
    folder = Path(config.adapter_name_or_path)
    named, given = adapter_config(folder).base_model_name_or_path, config.model_name_or_path
    if given is None or given == named:
        if not named:
            raise UsageError(
                f"{folder}: adapter_config.json names no base model; give --model_name_or_path"
            )
        return named
    if named and not any(name not in EMBEDDED and looks_local(name) for name in (named, given)):
        raise UsageError(
            f"--model_name_or_path {given}: the adapter in {folder} was trained on {named}; give"
            " that model or a copy of it"
        )
    print(
        f"note: {folder} names {named or 'no model'} as its base; {given} is taken for a copy"
        " of it",
        file=sys.stderr,
    )
    return given


def new_folder(output_dir: str) -> tuple[Path, Path]:
    """(the folder to be, the temporary one beside it, empty). Raises UsageError where something is
    there already.
    """
    final = Path(output_dir).absolute()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        kind = "is not empty" if final.is_dir() else "is a file"
        raise UsageError(
            f"--output_dir {output_dir} {kind} and nothing is overwritten: name another folder"
        )
    temporary = final.with_name(f".tmp-{final.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a merge that was killed
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"--output_dir {output_dir}: cannot be used: {error.strerror}") from error
    return final, temporary


def merge(config: MergeConfig) -> dict:
    """Merge, save, verify, give the folder its name; returns what merge.json holds.

    Raises UsageError for a base or an adapter that does not fit and for an output_dir in use,
    RuntimeError where the saved model differs from base + adapter by more than the bound.
    """
    adapter, base, dtype = (
        Path(config.adapter_name_or_path),
        base_of(config),
        getattr(torch, config.dtype),
    )
    settings = saved_settings(adapter)
    bounds = {
        name: settings.get(name) or FALLBACKS[name]
        for name in ("min_visual_tokens", "max_visual_tokens")
    }
    device = pick_device(config.num_threads)
    final, temporary = new_folder(config.output_dir)
    try:
        # The truth: base + adapter in fp32. Then the merge itself, in place.
        model = load_model(
            base, dtype="auto" if dtype != torch.float32 else dtype, device=device, **bounds
        )
        wrapped = attach_adapter(model, adapter)
        with float32_decoder(wrapped):
            inputs, truth = probe_logits(model, wrapped)
        merge_adapter(wrapped, dtype).save_pretrained(temporary)
        copied = copy_processor(model_path(base), temporary)
        del model, wrapped  # one model in memory at a time

        model = load_model(base, dtype=dtype, device=device, **bounds)
        _, logits = probe_logits(model, attach_adapter(model, adapter))
        rounding = relative_difference(logits, truth)
        bound = FLOAT32_BOUND if dtype == torch.float32 else BFLOAT16_BOUND * rounding
        del model

        model = load_model(str(temporary), dtype=dtype, device=device, **bounds)
        merged_inputs, logits = probe_logits(model, model.base)
        check_same_inputs(merged_inputs, inputs)
        difference = relative_difference(logits, truth)
        if not difference <= bound:
            raise RuntimeError(
                f"the merged model differs from base + adapter by {difference:.2e} of the logits'"
                f" root mean square, more than the bound {bound:.2e}; nothing was written"
            )
        record = {
            "base": base,
            "adapter": str(adapter),
            "adapter_sha256": sha256_of(adapter / "adapter_model.safetensors"),
            "dtype": config.dtype,
            "difference": difference,
            "bound": bound,
            "difference_of_base_and_adapter": rounding,
            "copied": copied,
            **bounds,
            "prompt": settings.get("prompt"),
            "versions": versions(),
        }
        write_json(temporary / "merge.json", record)
        os.rename(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0 done, 2 usage."""
    return main_guard(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    resolved = parse_config(
        [MergeConfig],
        argv,
        script="merge",
        prog="python -m engine.merge",
        validate=config_problems,
        description=(
            "Fold a trained adapter into its base and write a folder that plain transformers loads."
        ),
    )
    config: MergeConfig = resolved.configs[0]
    done = merge(config)
    prompt = f" --prompt {done['prompt']}" if done["prompt"] else ""
    lowest, highest = done["min_visual_tokens"], done["max_visual_tokens"]
    print(
        f"{config.output_dir}: {done['base']} with {config.adapter_name_or_path} folded in,"
        f" {done['dtype']}; its logits differ from base + adapter by {done['difference']:.1e} of"
        f" their root mean square (bound {done['bound']:.1e})\ntrained with bounds of {lowest} to"
        f" {highest} visual tokens an image (Gemma 3 ignores them): serve it so too\nnext: python"
        f" -m eval.evaluate --model_name_or_path {config.output_dir}{prompt} --min_visual_tokens"
        f" {lowest} --max_visual_tokens {highest} --data_file NAME=FILE"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
