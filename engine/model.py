"""Attach LoRA adapters to a base model, and put GRPO's two adapters on one base.

Adapters are fp32. GRPO loads the SFT adapter twice: `default` is trained, so that what is saved
loads in plain peft, and `reference` stays frozen. There is never a second base. What loads the base
(engine/base_model.py) can be imported from here as well: a model is a base with its adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

from engine.base_model import BaseModel, first_line, load_encoder, load_model
from engine.config import UsageError
from engine.families import LORA_TARGETS, language_model
from engine.model_files import adapter_record, model_path

__all__ = [
    "POLICY",
    "REFERENCE",
    "BaseModel",
    "adapter_config",
    "adapter_config_record",
    "adapter_state",
    "add_reference",
    "attach_adapter",
    "attach_new_adapter",
    "compile_decoder",
    "enable_gradient_checkpointing",
    "load_adapter_state",
    "load_adapter_weights",
    "load_encoder",
    "load_model",
    "model_path",
    "prepare_for_training",
    "use_adapter",
]

POLICY, REFERENCE = "default", "reference"


def attach_new_adapter(base: BaseModel, *, r: int, alpha: int, dropout: float) -> PeftModel:
    """Attach a fresh, trainable LoRA adapter to the language model's projections.

    B is zero, so the model's outputs are unchanged.
    """
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=LORA_TARGETS,
        bias="none",
        task_type="CAUSAL_LM",
    )
    net = get_peft_model(base.net, config)
    _finish(net, base.name)
    return net


def attach_adapter(
    base: BaseModel, folder: str | Path, *, trainable: bool = False, dropout: float = 0.0
) -> PeftModel:
    """Attach a saved adapter as `default`.

    dropout: 0 for sampling, GRPO and evaluation. SFT that goes on with an adapter has its own.

    Raises UsageError for a folder without an adapter, and where adapter and model do not fit: a key
    that is missing or left over means that something else than the trained model would run.
    """
    folder = Path(folder)
    config = adapter_config(folder)
    config.lora_dropout, config.inference_mode = dropout, not trainable
    net = PeftModel(base.net, config, adapter_name=POLICY)
    load_adapter_weights(net, folder)
    if trainable:
        _finish(net, base.name)
    else:
        net.requires_grad_(False)
    return net


def add_reference(net: PeftModel, folder: str | Path) -> None:
    """Load the SFT adapter a second time, frozen, as `reference`.

    `default` stays active and trainable.
    """
    config = adapter_config(Path(folder))
    config.lora_dropout, config.inference_mode = 0.0, True
    net.add_adapter(REFERENCE, config)
    load_adapter_weights(net, folder, REFERENCE)
    net.set_adapter(POLICY)
    _set_trainable(net)


def adapter_config(folder: Path) -> LoraConfig:
    """Read the LoraConfig saved in a folder. Raises UsageError where none can be read."""
    adapter_record(folder)  # which says in one line what is missing or cannot be read
    try:
        return LoraConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{folder}: adapter_config.json cannot be read ({first_line(error)})"
        ) from error


def load_adapter_weights(net: PeftModel, folder: str | Path, adapter: str = POLICY) -> None:
    """Put a folder's weights into an attached adapter.

    Raises UsageError where a key finds no place or is left over.
    """
    try:
        saved = load_file(Path(folder) / "adapter_model.safetensors")
    except SafetensorError as error:
        raise UsageError(
            f"{folder}: adapter_model.safetensors cannot be read ({first_line(error)})"
        ) from error
    load_adapter_state(net, saved, adapter, source=str(folder))


def load_adapter_state(
    net: PeftModel, saved: dict[str, Tensor], adapter: str = POLICY, *, source: str
) -> None:
    """Put tensors into an attached adapter, each under the name that `adapter_state` gives it.

    Raises UsageError that names `source` and the keys or shapes that do not fit.
    """
    expected = adapter_state(net, adapter)
    missing = sorted(expected.keys() - saved.keys())
    unexpected = sorted(saved.keys() - expected.keys())
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
    set_peft_model_state_dict(net, saved, adapter_name=adapter)


def adapter_state(net: PeftModel, adapter: str = POLICY) -> dict[str, Tensor]:
    """Return the adapter's tensors under the names that peft saves and loads."""
    # with save_embedding_layers peft would ask the hub for the base
    return get_peft_model_state_dict(net, adapter_name=adapter, save_embedding_layers=False)


def adapter_config_record(net: PeftModel, base_name: str) -> dict:
    """Make the contents of adapter_config.json, as plain peft reads it.

    base_name: of the base model, as the user gave it.
    """
    config = net.peft_config[POLICY].to_dict()
    config |= {"base_model_name_or_path": base_name, "inference_mode": True}
    return {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for key, value in config.items()
    }


@contextmanager
def use_adapter(net: PeftModel, adapter: str) -> Iterator[None]:
    """Run with another adapter, without gradient, and put everything back.

    peft's `set_adapter` turns requires_grad on for the adapter it selects and off for the others,
    so the flags are restored too.
    """
    flags = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    active = net.active_adapter
    net.set_adapter(adapter)
    try:
        with torch.no_grad():
            yield
    finally:
        net.set_adapter(active)
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(flags[name])


def enable_gradient_checkpointing(net: nn.Module) -> None:
    """Recompute the decoder's layers in the backward pass, in train() mode only.

    Not reentrant, so nothing needs inputs that require a gradient, and only the decoder: the frozen
    vision tower is never recomputed.
    """
    decoder = language_model(net)
    decoder.activation_checkpointing_enable({"use_reentrant": False})
    # transformers turns it on for reentrant checkpointing; here it would only cost a gradient
    decoder.disable_input_require_grads()


def compile_decoder(net: nn.Module) -> None:
    """Let torch compile what the decoder's layers do with single tokens, for speed.

    These are norms, projections with their adapters, rotary embedding and MLP. It is done in place,
    so that modules and weights keep their names. Attention and checkpointing stay as they are,
    around the compiled parts, and the graphs serve every number of tokens. Low precision is rounded
    after every operation, as without compiling: else the graphs with and without gradient would
    round differently, and the ratio would not begin at 1.

    Raises UsageError (one line) where nothing can be compiled, as on a machine without a C++
    compiler.
    """
    decoder = language_model(net)
    options: dict[str, str | int | bool | Callable[..., Any]] = {"emulate_precision_casts": True}
    try:
        torch.compile(lambda x: x.sin() + 1, options=options)(torch.zeros(8, device=decoder.device))
    except (RuntimeError, ImportError, OSError) as error:
        raise UsageError(
            f"--compile: torch cannot compile on this machine: {first_line(error)}"
        ) from error
    # A part has a graph for each adapter, kind of layer, and with and without gradient. Past the
    # limit torch would go on without compiling, unseen, and round differently from then on.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    layers: Any = decoder.layers  # a ModuleList, which nn.Module's stubs do not know
    for layer in layers:
        for part in layer.children():
            part.compile(dynamic=True, options=options)


def prepare_for_training(net: PeftModel, gradient_checkpointing: bool, compile: bool) -> None:
    """Switch on what the settings ask for: gradient checkpointing, compiled decoder layers."""
    if gradient_checkpointing:
        enable_gradient_checkpointing(net)
    if compile:
        compile_decoder(net)


def _finish(net: PeftModel, base_name: str) -> None:
    net.peft_config[POLICY].base_model_name_or_path = base_name
    _set_trainable(net)


def _set_trainable(net: PeftModel) -> None:
    """Train the `default` adapter of the language model and nothing else.

    Anything else that is trainable is a bug of the target pattern.
    """
    for name, parameter in net.named_parameters():
        if "lora_" in name:
            # also the reference: in bf16 it would not be the policy's start
            parameter.data = parameter.data.float()
        parameter.requires_grad_("lora_" in name and f".{POLICY}." in name)
    leaked = [
        name
        for name, parameter in net.named_parameters()
        if parameter.requires_grad and "language_model." not in name
    ]
    if leaked:
        raise RuntimeError(
            f"LoRA reached outside the language model: {leaked[0]} and {len(leaked) - 1} more"
        )
