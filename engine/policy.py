"""Hold one model with everything that is needed to ask it something: one model is one argument."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from data.examples import Example
from data.prompts import Prompt
from engine.checkpoint import Checkpoint
from engine.collate import Batch
from engine.device import base_dtype, slow_bf16
from engine.encode import EncodedPrompt, EncodedRow, Encoder
from engine.families import Family, lm_head_weight, logit_softcap
from engine.forward import completion_hidden_states, completion_logprobs
from engine.graphs import Graphs
from engine.model import (
    REFERENCE,
    BaseModel,
    add_reference,
    attach_adapter,
    attach_new_adapter,
    check_adapter,
    load_encoder,
    load_model,
    prepare_for_training,
    use_adapter,
)
from engine.optim import trainable_parameters
from engine.out_of_memory import Limits
from engine.ranks import ALONE, Ranks
from engine.settings import SamplingProduct, SFTConfig, TrainingConfig


class ModelSettings(Protocol):
    """Describe the settings that a base model is loaded by: those of training and of evaluation."""

    @property
    def model_name_or_path(self) -> str: ...
    @property
    def bf16(self) -> bool: ...
    @property
    def min_visual_tokens(self) -> int: ...
    @property
    def max_visual_tokens(self) -> int: ...
    @property
    def vision_cache_dir(self) -> str | None: ...


def encoder_of(config: ModelSettings) -> Encoder:
    """Load the tokenizer and image processor that the settings name, without any weights.

    Raises UsageError where the checkpoint cannot be used.
    """
    return load_encoder(
        config.model_name_or_path,
        min_visual_tokens=config.min_visual_tokens,
        max_visual_tokens=config.max_visual_tokens,
    )


def encoder_for(config: SFTConfig, examples: Sequence[Example]) -> Encoder:
    """Load what encodes the examples, and check all their answers before any weights are read.

    examples: those whose answers will be learnt.

    Raises UsageError where the checkpoint cannot be used, DataError naming every example whose
    answer cannot be learnt as it is.
    """
    encoder = encoder_of(config)
    encoder.check_answers(examples, config.instruction)
    return encoder


def load_base(
    config: ModelSettings,
    device: torch.device,
    *,
    vision_cache_gb: float = 0.0,
    encoder: Encoder | None = None,
    shard_among: Ranks | None = None,
) -> BaseModel:
    """Load and freeze the base model that the settings name, and say what is unusual about it.

    vision_cache_gb: host memory for image features, GB. encoder: where it is loaded already.
    shard_among: ranks to shard it among.
    """
    warning = slow_bf16(config.bf16, device)
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)
    base = load_model(
        config.model_name_or_path,
        dtype=base_dtype(config.bf16, device),
        device=device,
        min_visual_tokens=config.min_visual_tokens,
        max_visual_tokens=config.max_visual_tokens,
        vision_cache_gb=vision_cache_gb,
        vision_cache_dir=config.vision_cache_dir,
        encoder=encoder,
        shard_among=shard_among,
    )
    for note in base.encoder.notes:
        print(f"note: {base.name}: {note}", file=sys.stderr)
    return base


@dataclass(frozen=True)
class Policy:
    """Hold the model that is trained, sampled from and scored.

    net: the base model, inside peft's wrapper where it has adapters. The active adapter answers.
    base: what belongs to the base model alone: name, family, processor, token ids, image features.
    prompt: the instruction that goes with every image.
    temperature: divides the logits of every log-probability that this policy gives.
    sampling_copies: whether the sampler may copy weights (engine/sampling_layers.py).
    sampling_product: of the copies on a CPU, torch's or oneDNN's.
    limits: how much is run at once.
    graphs: what the sampler replays on a GPU (engine/graphs.py).
    """

    net: PreTrainedModel | PeftModel
    base: BaseModel
    prompt: Prompt
    temperature: float = 1.0
    sampling_copies: bool = True
    sampling_product: SamplingProduct = "auto"
    limits: Limits = field(default_factory=Limits)
    graphs: Graphs = field(default_factory=Graphs, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Let nothing be done again by this rank alone that others compute with it."""
        self.limits.alone = self.base.sharded is None

    @property
    def adapted(self) -> PeftModel:
        """Return `net` with its adapters. Raises TypeError for a base model, which has none."""
        if not isinstance(self.net, PeftModel):
            raise TypeError(f"{self.base.name} has no adapter")
        return self.net

    @property
    def family(self) -> Family:
        """Return the facts of the model's family."""
        return self.base.family

    @property
    def encoder(self) -> Encoder:
        """Return the tokenizer and image processor."""
        return self.base.encoder

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.head.device

    @property
    def head(self) -> Tensor:
        """Return the language-model head's weight [V,H]."""
        return lm_head_weight(self.net)

    @property
    def softcap(self) -> float | None:
        """Return the bound of Gemma's logit soft-capping, or None for a model without one."""
        return logit_softcap(self.net)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters that are trained, in the order of the optimizer's state."""
        return [parameter for _, parameter in trainable_parameters(self.net)]

    def digest(self) -> str:
        """Hash what is trained, to compare it between ranks."""
        found = hashlib.sha256()
        for parameter in self.parameters:
            flat = parameter.detach().cpu().contiguous().flatten()
            found.update(flat.view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    # ---- examples --------------------------------------------------------------------------------
    def expect(self, examples: Iterable[Example]) -> None:
        """Prepare the images that are encoded next, in this order, while the model computes.

        Nothing but time depends on it. An image that cannot be read is told where it is encoded.
        """
        self.base.vision.expect(examples)

    def encode(self, example: Example) -> EncodedPrompt:
        """Turn an example into the prompt's tokens, with the frozen vision tower's features.

        Raises DataError where its image cannot be read, DoesNotFit where memory runs out.
        """
        return self.limits.once_more(
            "vision tower", lambda: self.base.encode_prompt(example, self.prompt)
        )

    def encode_answer(self, example: Example) -> EncodedRow:
        """Turn an example into its prompt followed by its own answer, which is supervised.

        Raises DataError where its image cannot be read, ValueError where it has no answer,
        DoesNotFit where memory runs out.
        """
        answer = example.answer
        if answer is None:
            raise ValueError(f"{example.id} has no answer to learn")
        return self.limits.once_more(
            "vision tower", lambda: self.base.encode_answer(example, self.prompt, answer)
        )

    # ---- forward passes --------------------------------------------------------------------------
    def hidden_states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run a batch -> (states [K,H] that predict the K scored tokens, the tokens' ids [K])."""
        return completion_hidden_states(self.net, self.family, batch)

    def logprobs(self, batch: Batch) -> Tensor:
        """Give log pi of every completion token [N,T] fp32 at the temperature, 0 beyond the end."""
        logprobs, _ = completion_logprobs(
            self.net,
            self.family,
            batch,
            temperature=self.temperature,
            suppress_token_ids=self.base.suppressed_ids,
        )
        return logprobs

    def logprobs_and_entropy(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Give log pi and the entropy of pi at every completion token, both [N,T] fp32."""
        logprobs, entropy = completion_logprobs(
            self.net,
            self.family,
            batch,
            temperature=self.temperature,
            suppress_token_ids=self.base.suppressed_ids,
            entropy=True,
        )
        assert entropy is not None  # asked for
        return logprobs, entropy

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Answer as the frozen reference within the block, without gradient."""
        with use_adapter(self.adapted, REFERENCE):
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run the block in eval() mode and restore the mode that was there."""
        was_training = self.net.training
        self.net.eval()
        try:
            yield
        finally:
            self.net.train(was_training)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Hold the whole base within the block, where it is sharded among ranks, for the sampler.

        All ranks enter it, or come to the end of their `Ranks.together`. It may be nested.
        """
        with self.base.sharded.gathered() if self.base.sharded else nullcontext():
            yield


class SamplingSettings(Protocol):
    """Describe the settings that the sampler's layers are made by, of training and evaluation."""

    @property
    def sampling_copies(self) -> bool: ...
    @property
    def sampling_product(self) -> SamplingProduct: ...


def sampled_by(config: SamplingSettings) -> dict[str, Any]:
    """Return a policy's fields that say how its layers sample (engine/sampling_layers.py)."""
    names = "sampling_copies", "sampling_product"
    return {name: getattr(config, name) for name in names}


# ---- the policies that the scripts train ---------------------------------------------------------
def policy_to_fine_tune(
    config: SFTConfig,
    device: torch.device,
    checkpoint: Checkpoint | None = None,
    encoder: Encoder | None = None,
    ranks: Ranks = ALONE,
) -> Policy:
    """Load what SFT trains: a base model with a fresh LoRA adapter, or with one to go on training.

    checkpoint: one to go on from, which has the form of the run's adapter.
    encoder: of `encoder_for`. ranks: that train it.

    Raises UsageError where the model or the adapter cannot be used.
    """
    start = checkpoint.place if checkpoint else config.adapter_name_or_path
    base = _base_for(config, device, start, ranks, encoder)
    dropout = config.lora_dropout
    if start:
        net = attach_adapter(base, start, trainable=True, dropout=dropout)
    else:
        net = attach_new_adapter(base, r=config.lora_r, alpha=config.lora_alpha, dropout=dropout)
    prepare_for_training(net, config.gradient_checkpointing, config.compile)
    prompt, limits = config.instruction, Limits(config)
    return Policy(net, base, prompt, **sampled_by(config), limits=limits)


def policy_with_reference(
    config: TrainingConfig,
    device: torch.device,
    adapter: Path | None,
    temperature: float,
    limits: Limits,
    ranks: Ranks = ALONE,
) -> Policy:
    """Load what GRPO trains: an adapter twice on one base, once trained and once frozen.

    adapter: its folder, None for a fresh one, whose frozen twin answers as the base itself.
    temperature: of the sampler, and so of every log-probability.
    limits: those of the rollouts. ranks: that train it.

    Raises UsageError where the model or the adapter cannot be used.
    """
    base = _base_for(config, device, adapter, ranks)
    if adapter is None:
        net = attach_new_adapter(base, r=config.lora_r, alpha=config.lora_alpha, dropout=0.0)
    else:
        net = attach_adapter(base, adapter, trainable=True)
    add_reference(net)
    prepare_for_training(net, config.gradient_checkpointing, config.compile)
    prompt = config.instruction
    return Policy(net, base, prompt, temperature, **sampled_by(config), limits=limits)


def _base_for(
    config: TrainingConfig,
    device: torch.device,
    adapter: str | Path | None,
    ranks: Ranks,
    encoder: Encoder | None = None,
) -> BaseModel:
    """Load the base that is trained on, once it is known that the adapter can go on it."""
    among = ranks if config.shard_base else None
    if adapter:
        check_adapter(config.model_name_or_path, adapter, sharded=config.shard_base)
    gb = config.vision_cache_gb
    return load_base(config, device, vision_cache_gb=gb, encoder=encoder, shard_among=among)
