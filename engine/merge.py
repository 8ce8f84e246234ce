"""Fold a trained adapter into its base and write a folder that plain transformers loads.

    python -m engine.merge --adapter_name_or_path runs/20260101-120000-grpo --output_dir merged
    python -m engine.merge --interpolate runs/...-sft runs/...-grpo --alpha 0 0.25 0.5 0.75 1 \\
                           --output_dir between    # adapters instead: engine/interpolate.py

Every projection becomes W + scaling * B A (with DoRA, of the adapter's magnitudes), summed in fp32
and then cast, one projection at a time, so that a model needs its own size in memory and little
more. Whole modules that the adapter brings take their places. Where that parts a head from the
embedding that it was tied to, both are written and the configuration says so. Tokenizer, image
processor, chat template and generation_config are the base's files.

The saved folder is loaded again and compared with base + adapter on one image and answer. Let D be
the root mean square over all logits of the answer's tokens of the difference to base + adapter
computed in fp32, relative to that of the logits themselves:

    float32     D(merged) <= 1e-4
    bfloat16    D(merged) <= 2 * D(base + adapter, computed in bfloat16 as in training)

The folder gets its name only after that, so a merge that fails or is killed leaves none that looks
finished. Its reader needs no peft.
"""

from __future__ import annotations

import shlex
import sys

from engine.merge_settings import (
    MergeConfig,
    keep_asking,
    new_folder,
    resolve_merge,
)
from engine.runtime import accepted, main_guard, versions

if __name__ == "__main__":  # --help and mistakes are answered before torch is loaded
    RESOLVED = accepted(resolve_merge)

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from data.examples import Example
from data.files import sha256_of, write_json
from data.prompts import PROMPTS
from engine.adapter_files import PREFIX, adapter_record, base_to_use
from engine.card import write_merged_card
from engine.collate import collate_rows
from engine.config import Resolved, UsageError
from engine.device import pick_device
from engine.encode import EncodedRow
from engine.families import language_model, lm_head_weight
from engine.forward import completion_hidden_states
from engine.inherited import settings_of_adapter
from engine.interpolate import interpolate
from engine.model import (
    POLICY,
    BaseModel,
    adapter_state,
    attach_adapter,
    check_adapter,
    load_model,
)
from engine.model_checks import DESCRIPTIONS
from engine.model_files import check_model_folder, model_path
from engine.resume import changed_base_of
from engine.settings import TrainingConfig

# of D: fp32 arithmetic in another order gives about 1e-6, a projection left out far more
FLOAT32_BOUND = 1e-4
# times the rounding of base + adapter itself: rounding W + delta once more costs about as much
# again
BFLOAT16_BOUND = 2.0
DECODER = f"{PREFIX}model.language_model."  # in the names of an adapter's tensors
PROBE_ANSWER = (
    "<think>Clear lungs, normal heart size, no effusion.</think><solution>No Finding</solution>"
)
# What a tokenizer, an image processor or `generate` of transformers reads beside weights and
# config.json.
COPIED_FILES = (
    *(name for name in DESCRIPTIONS if name != "config.json"),
    "video_preprocessor_config.json",
)


# ---- merge ---------------------------------------------------------------------------------------
def check_can_be_folded_in(net: PeftModel | None, folder: Path) -> None:
    """Raise UsageError where no weight of the base could hold what the adapter adds.

    net: base and adapter, whose weights are not looked at. None where the base cannot be loaded.
    folder: of the adapter.
    """
    for name, module in [] if net is None else net.named_modules():
        if not isinstance(module, LoraLayer) or not module.lora_bias.get(POLICY):
            continue
        if getattr(module.get_base_layer(), "bias", None) is None:
            raise UsageError(
                f"{folder}: lora_bias cannot be folded in: {name.removeprefix(PREFIX)} of the base"
                " has no bias to add it to; use the adapter beside its base"
            )


def merge_adapter(net: PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """Fold the adapter `default` into its base and return the model without any adapter.

    peft folds in, which knows every kind of LoRA, but in fp32 and one layer at a time: by itself it
    would round the product B A to the base's dtype before it adds it.

    net: the base with its adapter, which is used up.
    dtype: of the returned weights.
    """
    for module in net.modules():
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            own = dict(base.named_parameters(recurse=False))
            for name, parameter in own.items():  # new ones: a head tied to it stays as it is
                setattr(base, name, frozen(parameter.to(torch.float32, copy=True)))
            module.merge(adapter_names=[POLICY])
            for name in own:
                setattr(base, name, frozen(base.get_parameter(name).to(dtype)))
        elif isinstance(module, TrainableTokensWrapper):
            module.token_adapter.merge(adapter_names=[POLICY])
    merged = net.unload()
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(dtype)
    say_whether_tied(merged)
    return merged


def frozen(tensor: Tensor) -> nn.Parameter:
    """Make a parameter that is not trained."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


def say_whether_tied(model: PreTrainedModel) -> None:
    """Write into the configuration whether the head still is the embedding.

    Some loaders look only at the configuration, and would take the embedding for a head of its own.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    flag = "tie_word_embeddings"
    configs = [
        config
        for config in (model.config, model.config.get_text_config())
        if getattr(config, flag, False)
    ]
    if configs and torch.equal(embedding.weight, head.weight):
        head.weight = embedding.weight
    else:
        for config in configs:
            setattr(config, flag, False)


def copy_processor(path: str, folder: Path) -> list[str]:
    """Copy the base's tokenizer, image processor, chat template and generation_config to `folder`.

    path: the base, as transformers finds it.

    Returns the names of what there was.
    """
    copied = []
    for name in COPIED_FILES:
        try:
            source = cached_file(path, name)
        except OSError:
            # the base has none, and so it is not needed: the loaded processors are compared later
            continue
        assert source is not None  # it raises where there is none
        shutil.copyfile(source, folder / name)
        copied.append(name)
    return copied


# ---- verify --------------------------------------------------------------------------------------
def probe_rows(base: BaseModel) -> tuple[EncodedRow, EncodedRow]:
    """Encode one image of fixed noise, 512 x 512, with an instruction and an answer.

    Returns the row with the image's pixels, and the row with its features.
    """
    with tempfile.TemporaryDirectory() as folder:
        pixels = np.random.default_rng(0).integers(0, 256, (512, 512), dtype=np.uint8)
        Image.fromarray(pixels).save(Path(folder) / "probe.png")
        example = Example("probe", "probe", "probe.png", (), "probe", Path(folder))
        question = example, PROMPTS["free_reasoning"], PROBE_ANSWER
        return base.encoder.encode_answer(*question), base.encode_answer(*question)


@torch.no_grad()
def probe_logits(base: BaseModel, net: nn.Module) -> tuple[EncodedRow, Tensor]:
    """Compute the logits of the probe's answer, with the head itself always in fp32.

    net: `base.net`, or that with its adapter.

    Returns the probe with its pixels, and logits [T,V] fp32 on the CPU of its answer's T tokens.
    """
    device = next(net.parameters()).device
    probe, seen = probe_rows(base)
    batch = collate_rows([seen], base.encoder.pad_token_id).to(device)
    hidden, _ = completion_hidden_states(net, base.family, batch)  # [T,H]
    # the whole head in fp32 would be the largest tensor by far
    pieces = lm_head_weight(net).split(16_384)
    return probe, torch.cat([(hidden.float() @ piece.float().T).cpu() for piece in pieces], dim=1)


@contextmanager
def float32_decoder(net: nn.Module) -> Iterator[None]:
    """Let the decoder compute in fp32 within the block, as the truth to compare with.

    Each module's own weights are cast for its call alone, and are then as before.
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
    """Compute D of the module's docstring from logits [T,V] and true logits [T,V]."""
    return float((logits - truth).square().mean().sqrt() / truth.square().mean().sqrt())


def check_same_inputs(merged: EncodedRow, base: EncodedRow) -> None:
    """Raise RuntimeError where the copied processor does not give the base's tokens and pixels."""
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
def merge(config: MergeConfig) -> dict[str, Any]:
    """Merge, save, verify, give the folder its name, and return what merge.json holds.

    Raises UsageError for a base or an adapter that does not fit and for an output_dir in use, and
    RuntimeError where the saved model differs from base + adapter by more than the bound.
    """
    adapter = Path(config.adapter_name_or_path)
    name, note = base_to_use(adapter, config.model_name_or_path)
    check_model_folder(name)
    if note:
        print(note, file=sys.stderr)
    if line := changed_base_of(adapter, name):
        print(f"warning: {line}", file=sys.stderr)
    dtype: torch.dtype = getattr(torch, config.precision)
    check_can_be_folded_in(check_adapter(name, adapter), adapter)
    unset, size = TrainingConfig(), ("min_visual_tokens", "max_visual_tokens")
    asking = ("answer_format", "label_file", "prompt")
    settings = settings_of_adapter(str(adapter), (*size, *asking), unset)
    bounds = {key: settings.get(key, getattr(unset, key)) for key in size}
    device = pick_device(config.num_threads)
    with new_folder(config.output_dir) as temporary:
        # The truth: base + adapter in fp32. Then the merge itself, in place.
        base = load_model(
            name, dtype="auto" if dtype != torch.float32 else dtype, device=device, **bounds
        )
        net = attach_adapter(base, adapter)
        if any(not name.startswith(DECODER) for name in adapter_state(net)):
            for name_of_part, part in base.net.model.named_children():
                if name_of_part != "language_model":
                    part.float()  # small; its own parts ask each other for their dtype
        with float32_decoder(net):
            inputs, truth = probe_logits(base, net)
        merge_adapter(net, dtype).save_pretrained(temporary)
        for shard in temporary.glob("*.safetensors"):  # which only their owner may read
            shard.chmod((temporary / "config.json").stat().st_mode & 0o777)
        copied = copy_processor(model_path(name), temporary)
        del base, net  # one model in memory at a time

        base = load_model(name, dtype=dtype, device=device, **bounds)
        _, logits = probe_logits(base, attach_adapter(base, adapter))
        rounding = relative_difference(logits, truth)
        bound = FLOAT32_BOUND if dtype == torch.float32 else BFLOAT16_BOUND * rounding
        del base

        merged = load_model(str(temporary), dtype=dtype, device=device, **bounds)
        merged_inputs, logits = probe_logits(merged, merged.net)
        check_same_inputs(merged_inputs, inputs)
        difference = relative_difference(logits, truth)
        if not difference <= bound:
            raise RuntimeError(
                f"the merged model differs from base + adapter by {difference:.2e} of the logits'"
                f" root mean square, more than the bound {bound:.2e}; nothing was written"
            )
        record = {
            "base": name,
            "base_of_adapter": adapter_record(adapter).get("base_model_name_or_path"),
            "adapter": str(adapter),
            "adapter_sha256": sha256_of(adapter / "adapter_model.safetensors"),
            "dtype": config.precision,
            "difference": difference,
            "bound": bound,
            "difference_of_base_and_adapter": rounding,
            "copied": copied,
            **bounds,
            **keep_asking(settings, temporary),
            "versions": versions(),
        }
        write_json(temporary / "merge.json", record)
        write_merged_card(temporary, adapter, name)
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 2 usage."""
    return main_guard(lambda: _run(resolve_merge(sys.argv[1:] if argv is None else argv)))


def _run(resolved: Resolved) -> int:
    config: MergeConfig = resolved.configs[0]
    if config.interpolate:
        print(interpolate(config))
        return 0
    done = merge(config)
    lowest, highest = done["min_visual_tokens"], done["max_visual_tokens"]
    command = ["python", "-m", "eval.evaluate", "--model_name_or_path", config.output_dir]
    for name in ("answer_format", "label_file", "prompt"):
        if asked := done[name]:
            kept = Path(config.output_dir) / asked if name in done["kept"] else asked
            command += [f"--{name}", str(kept)]
    command += ["--min_visual_tokens", str(lowest), "--max_visual_tokens", str(highest)]
    command += ["--data_file", "NAME=FILE"]
    print(
        f"{config.output_dir}: {done['base']} with {config.adapter_name_or_path} folded in,"
        f" {done['dtype']}; its logits differ from base + adapter by {done['difference']:.1e} of"
        f" their root mean square (bound {done['bound']:.1e})\ntrained with bounds of {lowest} to"
        f" {highest} visual tokens an image (Gemma 3 ignores them): serve it so too\nnext:"
        f" {shlex.join(command)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(lambda: _run(RESOLVED)))
