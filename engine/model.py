"""Attach LoRA adapters to a base model, and put GRPO's two adapters on one base.

Adapters are fp32. GRPO has its start adapter twice: `default` is trained, so that what is saved
loads in plain peft, and `reference` stays frozen. There is never a second base. What loads the base
(engine/base_model.py) can be imported from here as well: a model is a base with its adapters.

Trained is the LoRA of the decoder's layers alone. An adapter from elsewhere may hold more: LoRA in
the vision tower, whole modules, biases, tokens. All that is loaded, frozen and saved again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from engine.adapter_files import PREFIX, read_adapter
from engine.adapter_places import PLACES, explicit_config, placed_config
from engine.adapter_settings import alpha_of_peft
from engine.base_model import BaseModel, first_line, load_encoder, load_model
from engine.config import UsageError
from engine.encode import read_config
from engine.families import LORA_TARGETS, family_of, language_model
from engine.lora import fuse_adapters
from engine.model_files import model_path

__all__ = [
    "NO_EFFECT",
    "POLICY",
    "REFERENCE",
    "BaseModel",
    "adapter_config_record",
    "adapter_state",
    "add_reference",
    "attach_adapter",
    "attach_new_adapter",
    "check_adapter",
    "compile_decoder",
    "enable_gradient_checkpointing",
    "frozen_parts",
    "has_no_effect",
    "is_decoders_lora",
    "load_adapter_state",
    "load_adapter_weights",
    "load_encoder",
    "load_model",
    "model_path",
    "prepare_for_training",
    "trained_lora",
    "use_adapter",
]

POLICY, REFERENCE = "default", "reference"
NO_EFFECT = "every B matrix of the adapter is zero, so the base itself answers"


def attach_new_adapter(base: BaseModel, *, r: int, alpha: float, dropout: float) -> PeftModel:
    """Attach a fresh, trainable LoRA adapter to the language model's projections.

    B is zero, so the model's outputs are unchanged.
    """
    config = LoraConfig(
        r=r,
        lora_alpha=alpha_of_peft(alpha),
        lora_dropout=dropout,
        target_modules=LORA_TARGETS,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with _without_peft_notice():
        net = get_peft_model(base.net, config)
    fuse_adapters(net)
    _finish(net, base.name)
    return net


def attach_adapter(
    base: BaseModel, folder: str | Path, *, trainable: bool = False, dropout: float = 0.0
) -> PeftModel:
    """Attach a saved adapter as `default`.

    trainable: whether the LoRA of the decoder's layers is trained. The rest stays frozen.
    dropout: 0 for sampling, GRPO and evaluation. SFT that goes on with an adapter has its own.

    Raises UsageError for a folder without an adapter that can be used, and where adapter and model
    do not fit: a key that is missing or left over means that something else than the trained model
    would run.
    """
    saved = read_adapter(folder)
    config = placed_config(base.net, saved)
    config.lora_dropout, config.inference_mode = dropout, not trainable
    net = _wrapped(base.net, config, folder)
    load_adapter_weights(net, folder)
    if not saved.renamed:  # what is saved again names its modules as the adapter did
        for name in PLACES:
            value = saved.settings.get(name, getattr(LoraConfig(), name))
            setattr(config, name, set(value) if isinstance(value, list) else value)
    if not trainable:
        net.requires_grad_(False)
        return net
    for layer in _lora_layers(net, of_decoder=False).values():
        layer.lora_dropout[POLICY] = nn.Identity()  # frozen, and seen once an image
    _finish(net, base.name)
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise UsageError(
            f"{folder}: the adapter has no LoRA in the language model's layers, so nothing could be"
            " trained"
        )
    return net


def add_reference(net: PeftModel, folder: str | Path | None = None) -> None:
    """Add the frozen `reference`: the adapter of a folder, or a copy of `default` as it stands.

    What neither training nor this changes (whole modules, biases) is shared. `default` stays active
    and trainable.

    folder: of an adapter that has the form of `default`, None for the copy.
    """
    layers = {
        name.removeprefix(PREFIX): (layer.r[POLICY], layer.lora_alpha[POLICY])
        for name, layer in _lora_layers(net).items()
    }
    own = net.peft_config[POLICY]
    assert isinstance(own, LoraConfig)  # nothing else is ever attached
    shared = ("modules_to_save", "trainable_token_indices", "task_type")
    kinds = ("use_rslora", "use_dora", "lora_bias")
    config = explicit_config(layers, {name: getattr(own, name) for name in (*shared, *kinds)})
    config.inference_mode = True
    net.add_adapter(REFERENCE, config)
    if folder is None:
        state = adapter_state(net)
        names = adapter_state(net, REFERENCE)
        load_adapter_state(
            net, {name: state[name] for name in names}, REFERENCE, source="reference"
        )
    else:
        load_adapter_weights(net, folder, REFERENCE)
    for module in net.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save[REFERENCE] = module.modules_to_save[POLICY]
    net.set_adapter(POLICY)
    _set_trainable(net)


# ---- what is trained -----------------------------------------------------------------------------
def _lora_layers(net: nn.Module, *, of_decoder: bool | None = None) -> dict[str, LoraLayer]:
    """Find the modules with LoRA by name: of the decoder's layers, all others, or (None) both."""
    return {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, LoraLayer) and of_decoder in (None, _in_decoder(name))
    }


def _in_decoder(name: str) -> bool:
    return ".language_model.layers." in f".{name}"


def frozen_parts(net: PeftModel) -> str:
    """Say what of the adapter is not trained, "" where that is nothing."""
    config = net.peft_config[POLICY]
    assert isinstance(config, LoraConfig)  # nothing else is ever attached
    parts = []
    if outside := list(_lora_layers(net, of_decoder=False)):
        parts.append(f"LoRA on {len(outside)} modules such as {outside[0].removeprefix(PREFIX)}")
    if config.modules_to_save:
        parts.append(f"modules_to_save {', '.join(sorted(config.modules_to_save))}")
    if config.trainable_token_indices:
        parts.append("trainable_token_indices")
    if config.bias != "none":
        parts.append(f"biases (bias {config.bias!r})")
    return "; ".join(parts)


def is_decoders_lora(name: str) -> bool:
    """Tell whether a parameter belongs to LoRA in the decoder's layers, of policy or reference."""
    return _in_decoder(name) and "lora_" in name


def trained_lora(net: PeftModel) -> tuple[int, float]:
    """Give the largest rank of what is trained, and its dropout."""
    layers = _lora_layers(net, of_decoder=True).values()
    dropouts = (getattr(layer.lora_dropout[POLICY], "p", 0.0) for layer in layers)
    return max(layer.r[POLICY] for layer in layers), max(dropouts)


def has_no_effect(net: PeftModel) -> bool:
    """Tell whether `default` is nothing but LoRA that is zero everywhere, as a fresh adapter is."""
    seconds = [
        tensor
        for name, tensor in adapter_state(net).items()
        if "lora_" not in name  # a whole module, a bias, a token
        or "lora_B" in name
        or "lora_embedding_A" in name
        or "lora_magnitude" in name
    ]
    return not any(tensor.any() for tensor in seconds)


def check_adapter(base_name: str, folder: str | Path, *, sharded: bool = False) -> PeftModel | None:
    """Check that an adapter fits a base model, by names and shapes, before any weight is read.

    base_name: of the base, as the user gave it. One that cannot be loaded is left to `load_model`,
    which says why. sharded: whether its layers are sharded among ranks, so that only plain LoRA can
    be in them.

    Returns both without weights, None without a base. Raises UsageError as `attach_adapter` does.
    """
    saved = read_adapter(folder)
    path = model_path(base_name)
    try:
        family_of(read_config(path).get("model_type"))
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            net = AutoModelForImageTextToText.from_config(config)
    except (OSError, ValueError, ImportError, TypeError, KeyError, AttributeError):
        return None
    with torch.device("meta"):
        wrapped = _wrapped(net, placed_config(net, saved), folder)
    expected = {name: tuple(tensor.shape) for name, tensor in adapter_state(wrapped).items()}
    of_base = _weights_of_base(wrapped, saved.shapes.keys() - expected.keys())
    found = {name: shape for name, shape in saved.shapes.items() if name not in of_base}
    _check_fit(expected, found, str(folder))
    for name in expected if sharded else ():
        if _in_decoder(name) and "lora_A." not in name and "lora_B." not in name:
            raise UsageError(
                f"{folder}: --shard_base shards the decoder's layers among ranks, and the adapter"
                f" has more in them than plain LoRA, such as {name}: train it without --shard_base"
            )
    return wrapped


def _wrapped(net: PreTrainedModel, config: LoraConfig, folder: str | Path) -> PeftModel:
    """Put an adapter's modules into a base. Raises UsageError where peft cannot."""
    try:
        with _without_peft_notice():
            wrapped = PeftModel(net, config, adapter_name=POLICY)
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        raise UsageError(
            f"{folder}: peft cannot attach the adapter ({first_line(error)})"
        ) from error
    fuse_adapters(wrapped)
    return wrapped


@contextmanager
def _without_peft_notice() -> Iterator[None]:
    """Leave out that peft 0.21 asks transformers 5.24 by a name that is on its way out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        yield


def load_adapter_weights(net: PeftModel, folder: str | Path, adapter: str = POLICY) -> None:
    """Put a folder's weights into an attached adapter, under the names of today.

    Raises UsageError where a key finds no place or is left over. Weights of the base itself, which
    peft saves beside LoRA on the embedding, must be those of the base.
    """
    stored = read_adapter(folder).stored
    try:
        file = load_file(Path(folder) / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"{folder}: adapter_model.safetensors cannot be read ({first_line(error)})"
        ) from error
    tensors = {name: file[former] for name, former in stored.items()}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            kind = "not finite" if tensor.is_floating_point() else f"of {tensor.dtype}"
            raise UsageError(f"{folder}: {stored[name]} is {kind}; the adapter is damaged")
    for name, own in _weights_of_base(
        net, tensors.keys() - adapter_state(net, adapter).keys()
    ).items():
        saved = tensors.pop(name)
        if own.shape != saved.shape or not torch.equal(own.detach().cpu(), saved.to(own.dtype)):
            raise UsageError(
                f"{folder}: {stored[name]} is a weight of the base, and not as in this base: the"
                " adapter was trained on another model"
            )
    load_adapter_state(net, tensors, adapter, source=str(folder))


def _weights_of_base(net: PeftModel, names: Iterable[str]) -> dict[str, Tensor]:
    """Find the weights of the base among names of an adapter's file -> {name: the weight}."""
    own = dict(net.named_parameters(remove_duplicate=False))  # a tied one has two names
    found: dict[str, Tensor] = {}
    for name in names:
        module, _, weight = name.rpartition(".")
        if place := next(
            (at for at in (name, f"{module}.original_module.{weight}") if at in own), None
        ):
            found[name] = own[place]
    return found


def load_adapter_state(
    net: PeftModel, saved: dict[str, Tensor], adapter: str = POLICY, *, source: str
) -> None:
    """Put tensors into an attached adapter, each under the name that `adapter_state` gives it.

    Raises UsageError that names `source` and the keys or shapes that do not fit.
    """
    _check_fit(
        {name: tuple(tensor.shape) for name, tensor in adapter_state(net, adapter).items()},
        {name: tuple(tensor.shape) for name, tensor in saved.items()},
        source,
    )
    set_peft_model_state_dict(net, saved, adapter_name=adapter)


def _check_fit(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Raise UsageError where names or shapes of an adapter are not those that the model needs."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
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
    for name, shape in expected.items():
        if shape != found[name]:
            raise UsageError(f"{source}: {name} has shape {found[name]}, the model needs {shape}")


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

    peft's `set_adapter` also turns requires_grad on for the adapter that it selects and off for the
    others, and walks over each layer's parameters for that. It is called once a micro-batch here,
    where no gradient is taken, so only what peft's layers note of the active adapter is changed.

    Raises ValueError where there is no adapter of that name.
    """
    if adapter not in net.peft_config:
        raise ValueError(f"there is no adapter {adapter!r}")
    noted = [(part, "active_adapter") for part in (net, net.base_model)]
    noted += [
        (part, "_active_adapter") for part in net.modules() if "_active_adapter" in vars(part)
    ]
    before = [getattr(part, name) for part, name in noted]
    try:
        for (part, name), active in zip(noted, before, strict=True):
            setattr(part, name, [adapter] if isinstance(active, list) else adapter)
        with torch.no_grad():
            yield
    finally:
        for (part, name), active in zip(noted, before, strict=True):
            setattr(part, name, active)


def enable_gradient_checkpointing(net: nn.Module) -> None:
    """Recompute the decoder's layers in the backward pass, in train() mode only.

    Not reentrant, so nothing needs inputs that require a gradient, and only the decoder: the frozen
    vision tower is never recomputed. Random numbers are put back for the recomputation only where
    dropout draws some.
    """
    decoder = language_model(net)
    settings = {"use_reentrant": False, "preserve_rng_state": _draws(decoder)}
    decoder.activation_checkpointing_enable(settings)
    # transformers turns it on for reentrant checkpointing; here it would only cost a gradient
    decoder.disable_input_require_grads()


def _draws(decoder: nn.Module) -> bool:
    """Tell whether a forward of the decoder in train() mode draws random numbers."""
    dropouts = [module.p for module in decoder.modules() if isinstance(module, nn.Dropout)]
    of_attention = getattr(decoder.config, "attention_dropout", 0.0)
    return any([*dropouts, of_attention])


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
    """Train the `default` adapter in the language model's layers and nothing else."""
    for name, parameter in net.named_parameters():
        if "lora_" in name:
            # also the reference: in bf16 it would not be the policy's start
            parameter.data = parameter.data.float()
        parameter.requires_grad_(is_decoders_lora(name) and f".{POLICY}." in name)
