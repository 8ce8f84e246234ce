"""Loading a model, attaching LoRA, and the two adapters of GRPO on one base.

The base is frozen and in bf16 (fp32 on a CPU run); adapters are fp32. GRPO loads the SFT adapter
twice: `default` is trained, so that what is saved loads in plain peft, and `reference` is the
frozen SFT checkpoint. There is never a second base.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from data.examples import Example
from data.prompts import Prompt
from engine.attention import IMPLEMENTATION
from engine.config import UsageError
from engine.encode import EncodedPrompt, EncodedRow, Encoder, read_config
from engine.families import (
    LORA_TARGETS,
    Family,
    family_of,
    language_model,
    stop_ids,
    suppressed_ids,
)
from engine.vision import VisionCache

# The embedded checkpoints, by name, with their folders in data/demo. Adapters trained on one name
# their base so, not by a path of this machine.
EMBEDDED = {"demo": "base", "demo-gemma": "base_gemma"}
POLICY, REFERENCE = "default", "reference"
_HUB_ADVICE = (
    "A hub model must exist and be reachable, or with HF_HUB_OFFLINE lie in the local cache; for a"
    " gated one accept its licence at https://huggingface.co/{} and run `hf auth login`"
)


@dataclass(frozen=True)
class LoadedModel:
    """A base model with its family facts, its processor and the token ids that the sampler and the
    objective need.
    """

    name: str  # as given: a folder, a hub name, 'demo' or 'demo-gemma'
    base: PreTrainedModel
    family: Family
    encoder: Encoder
    stop_ids: frozenset[int]
    suppressed_ids: tuple[int, ...]
    vision: VisionCache

    def encode_prompt(self, example: Example, prompt: Prompt) -> EncodedPrompt:
        """As Encoder.encode_prompt, with the image's features."""
        return self.encoder.encode_prompt(example, prompt, self.vision.look(example))

    def encode_answer(self, example: Example, prompt: Prompt, answer: str) -> EncodedRow:
        """As Encoder.encode_answer, with the image's features."""
        return self.encoder.encode_answer(example, prompt, answer, self.vision.look(example))


def model_path(name: str) -> str:
    """Where transformers finds `name`: an embedded checkpoint's folder, else the name itself (a
    folder or a hub name).
    """
    import data.demo

    return str(Path(data.demo.__path__[0]) / EMBEDDED[name]) if name in EMBEDDED else name


def load_encoder(name: str, *, min_visual_tokens: int, max_visual_tokens: int) -> Encoder:
    """Tokenizer and image processor of a checkpoint, without its weights. Raises UsageError (one
    line) as `load_model` does.
    """
    path = model_path(name)
    _check_checkpoint(name, path)
    try:
        return Encoder.from_pretrained(
            path, min_visual_tokens=min_visual_tokens, max_visual_tokens=max_visual_tokens
        )
    except (OSError, ValueError) as error:
        raise UsageError(_unusable(name, error)) from error


def load_model(
    name: str,
    *,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device,
    min_visual_tokens: int,
    max_visual_tokens: int,
    vision_cache_gb: float = 0.0,
    vision_cache_dir: str | None = None,
) -> LoadedModel:
    """Load and freeze a base model of one of the two families. dtype: "auto" for the one that its
    weights are stored in; vision_cache_gb, vision_cache_dir: see VisionCache.

    Raises UsageError (one line) where there is no such model at `name`.
    """
    path = model_path(name)
    if not sys.stderr.isatty():
        disable_progress_bar()  # of reading weights; in a log file it is one long line
    # peft 0.21 asks transformers 5.24 by a name that is on its way out; nothing a user could do
    # about it.
    warnings.filterwarnings(
        "ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning
    )
    encoder = load_encoder(
        name, min_visual_tokens=min_visual_tokens, max_visual_tokens=max_visual_tokens
    )
    try:
        base, loading = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation={"": "sdpa", "text_config": IMPLEMENTATION},
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(_unusable(name, error)) from error
    if loading["missing_keys"]:  # transformers would fill them with random numbers and go on
        missing = sorted(loading["missing_keys"])
        raise UsageError(
            f"--model_name_or_path {name}: the checkpoint lacks {len(missing)} weights of the"
            f" model, such as {missing[0]}"
        )
    base.requires_grad_(False)
    base.to(device).eval()
    family = family_of(base.config.model_type)
    stops = stop_ids(base, encoder.tokenizer, encoder.end_of_turn_id)
    vision = VisionCache(
        base, family, encoder, max_bytes=int(vision_cache_gb * 2**30), folder=vision_cache_dir
    )
    return LoadedModel(
        name, base, family, encoder, stops, suppressed_ids(family, encoder.tokenizer), vision
    )


def looks_local(name: str) -> bool:
    """Whether `name` can only be a folder (or an embedded one): anything but owner/model, or
    owner/model where such a folder exists.
    """
    return (
        name in EMBEDDED
        or name.startswith((".", "~", "/"))
        or name.count("/") != 1
        or Path(name).is_dir()
    )


def _check_checkpoint(name: str, path: str) -> None:
    """Everything that can be said before weights are read, in one line."""
    if looks_local(name) and not Path(path).is_dir():
        raise UsageError(
            f"--model_name_or_path {name}: no such folder; give a checkpoint's folder, a hub name"
            " (owner/model) or 'demo'"
        )
    if looks_local(name) and not (Path(path) / "config.json").is_file():
        raise UsageError(
            f"--model_name_or_path {name}: the folder holds no config.json, so it is no checkpoint"
        )
    try:
        text = read_config(path).get("text_config") or {}
    except ValueError as error:
        raise UsageError(f"--model_name_or_path {name}: {_first_line(error)}") from error
    except OSError as error:
        raise UsageError(
            f"--model_name_or_path {name}: no config.json could be had ({_first_line(error)})."
            f" {_HUB_ADVICE.format(name)}"
        ) from error
    if text.get("attn_logit_softcapping") is not None:
        raise UsageError(
            f"--model_name_or_path {name}: its config.json sets attn_logit_softcapping to"
            f" {text['attn_logit_softcapping']}, which transformers' attention leaves out: another"
            " model than the trained one would run. null there means that this is intended"
        )


def _unusable(name: str, error: Exception) -> str:
    """What to say where a file of the checkpoint is missing, damaged or of another kind."""
    advice = (
        ""
        if looks_local(name) or not isinstance(error, OSError)
        else f". {_HUB_ADVICE.format(name)}"
    )
    return f"--model_name_or_path {name}: {_first_line(error)}{advice}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def attach_new_adapter(model: LoadedModel, *, r: int, alpha: int, dropout: float) -> PeftModel:
    """A fresh, trainable LoRA adapter on the language model's projections; B is zero, so the
    model's outputs are unchanged.
    """
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=LORA_TARGETS,
        bias="none",
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model.base, config)
    _finish(wrapped, model.name)
    return wrapped


def attach_adapter(
    model: LoadedModel, folder: str | Path, *, trainable: bool = False, dropout: float = 0.0
) -> PeftModel:
    """A saved adapter as `default`; without dropout, as sampling, GRPO and evaluation need it,
    unless SFT goes on with it.

    Raises UsageError for a folder without an adapter, and where adapter and model do not fit: a key
    that is missing or left over means that something else than the trained model would run.
    """
    folder = Path(folder)
    config = adapter_config(folder)
    config.lora_dropout, config.inference_mode = dropout, not trainable
    wrapped = PeftModel(model.base, config, adapter_name=POLICY)
    load_adapter_weights(wrapped, folder)
    if trainable:
        _finish(wrapped, model.name)
    else:
        wrapped.requires_grad_(False)
    return wrapped


def add_reference(wrapped: PeftModel, folder: str | Path) -> None:
    """Load the SFT adapter a second time, frozen, as `reference`; `default` stays active and
    trainable.
    """
    config = adapter_config(Path(folder))
    config.lora_dropout, config.inference_mode = 0.0, True
    wrapped.add_adapter(REFERENCE, config)
    load_adapter_weights(wrapped, folder, REFERENCE)
    wrapped.set_adapter(POLICY)
    _set_trainable(wrapped)


def adapter_config(folder: Path) -> LoraConfig:
    """The LoraConfig saved in a folder. Raises UsageError where there is none that can be read."""
    if (
        not (folder / "adapter_config.json").is_file()
        or not (folder / "adapter_model.safetensors").is_file()
    ):
        raise UsageError(
            f"{folder}: no adapter there; an adapter folder holds adapter_config.json and"
            " adapter_model.safetensors"
        )
    try:
        return LoraConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{folder}: adapter_config.json cannot be read ({_first_line(error)})"
        ) from error


def load_adapter_weights(wrapped: PeftModel, folder: str | Path, adapter: str = POLICY) -> None:
    """Put a folder's weights into an attached adapter; every key must find its place, none may be
    left over.
    """
    try:
        saved = load_file(Path(folder) / "adapter_model.safetensors")
    except SafetensorError as error:
        raise UsageError(
            f"{folder}: adapter_model.safetensors cannot be read ({_first_line(error)})"
        ) from error
    load_adapter_state(wrapped, saved, adapter, source=str(folder))


def load_adapter_state(
    wrapped: PeftModel, saved: dict[str, Tensor], adapter: str = POLICY, *, source: str
) -> None:
    """As `load_adapter_weights`, from tensors. Raises UsageError that names `source` and the keys
    or shapes that do not fit.
    """
    expected = adapter_state(wrapped, adapter)
    missing, unexpected = (
        sorted(expected.keys() - saved.keys()),
        sorted(saved.keys() - expected.keys()),
    )
    if missing or unexpected:
        examples = "; ".join(
            f"{kind}: {len(keys)}, such as {keys[0]}"
            for kind, keys in (("missing", missing), ("left over", unexpected))
            if keys
        )
        raise UsageError(
            f"{source}: the adapter does not fit the model, {examples}. It was trained on another"
            " model or by another version"
        )
    misshapen = [name for name in expected if expected[name].shape != saved[name].shape]
    if misshapen:
        name = misshapen[0]
        raise UsageError(
            f"{source}: {name} has shape {tuple(saved[name].shape)}, the model needs"
            f" {tuple(expected[name].shape)}"
        )
    set_peft_model_state_dict(wrapped, saved, adapter_name=adapter)


def adapter_state(wrapped: PeftModel, adapter: str = POLICY) -> dict[str, Tensor]:
    """The adapter's tensors under the names that peft saves and loads."""
    return get_peft_model_state_dict(
        wrapped, adapter_name=adapter, save_embedding_layers=False
    )  # else peft asks the hub for the base


def adapter_config_record(wrapped: PeftModel, base_name: str) -> dict:
    """The contents of adapter_config.json, as plain peft reads it, with the base's name as the user
    gave it.
    """
    config = wrapped.peft_config[POLICY].to_dict()
    config |= {"base_model_name_or_path": base_name, "inference_mode": True}
    return {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for key, value in config.items()
    }


@contextmanager
def use_adapter(wrapped: PeftModel, adapter: str) -> Iterator[None]:
    """Run with another adapter, without gradient, and put everything back.

    peft's `set_adapter` turns requires_grad on for the adapter it selects and off for the others,
    so the flags are restored too.
    """
    flags = {name: parameter.requires_grad for name, parameter in wrapped.named_parameters()}
    active = wrapped.active_adapter
    wrapped.set_adapter(adapter)
    try:
        with torch.no_grad():
            yield
    finally:
        wrapped.set_adapter(active)
        for name, parameter in wrapped.named_parameters():
            parameter.requires_grad_(flags[name])


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Recompute the decoder's layers in the backward pass, in train() mode only.

    Not reentrant, so nothing needs inputs that require a gradient, and only the decoder: the frozen
    vision tower is never recomputed.
    """
    decoder = language_model(model)
    decoder.activation_checkpointing_enable({"use_reentrant": False})
    # transformers turns it on for reentrant checkpointing; here it would only cost a gradient
    decoder.disable_input_require_grads()


def compile_decoder(model: nn.Module) -> None:
    """Let torch compile what the decoder's layers do with single tokens: norms, projections with
    their adapters, rotary embedding, MLP.

    In place, so that modules and weights keep their names. Attention and checkpointing stay as they
    are, around the compiled parts, and the graphs serve every number of tokens. Low precision is
    rounded after every operation, as without compiling: else the graphs with and without gradient
    would round differently, and the ratio would not begin at 1. Raises UsageError (one line) where
    nothing can be compiled, as on a machine without a C++ compiler.
    """
    decoder, options = language_model(model), {"emulate_precision_casts": True}
    try:
        torch.compile(lambda x: x.sin() + 1, options=options)(torch.zeros(8, device=decoder.device))
    except (RuntimeError, ImportError, OSError) as error:
        raise UsageError(
            f"--compile: torch cannot compile on this machine: {_first_line(error)}"
        ) from error
    # A part has a graph for each adapter, kind of layer, and with and without gradient. Past the
    # limit torch would go on without compiling, unseen, and round differently from then on.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for layer in decoder.layers:
        for part in layer.children():
            part.compile(dynamic=True, options=options)


def _finish(wrapped: PeftModel, base_name: str) -> None:
    wrapped.peft_config[POLICY].base_model_name_or_path = base_name
    _set_trainable(wrapped)


def _set_trainable(wrapped: PeftModel) -> None:
    """Exactly the `default` adapter of the language model is trained; anything else trainable is a
    bug of the target pattern.
    """
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            # also the reference: in bf16 it would not be the policy's start
            parameter.data = parameter.data.float()
        parameter.requires_grad_("lora_" in name and f".{POLICY}." in name)
    leaked = [
        name
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad and "language_model." not in name
    ]
    if leaked:
        raise RuntimeError(
            f"LoRA reached outside the language model: {leaked[0]} and {len(leaked) - 1} more"
        )
