"""All tensors of one optimizer step, for --dump_step: with them any program can compute the loss
again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from engine.encode import EncodedPrompt
from rl.logs import PER_TOKEN
from rl.objective import ObjectiveConfig
from rl.rollout import Sample
from rl.settings import GRPOConfig


def step_tensors(
    loss: Tensor, logprobs: Tensor, entropy: Tensor, weights: Tensor, terms: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What a micro-batch of `write_step` is made of, on the CPU and free of the graph, which holds
    the GPU's memory.
    """
    tensors = {"loss": loss, "logprobs": logprobs, "entropy": entropy, "weights": weights}
    tensors |= {f"terms/{name}": term for name, term in terms.items()}
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def write_step(
    run_dir: Path,
    step: int,
    computed: Sequence[dict[str, Tensor]],
    micro_batches: Sequence[Sequence[int]],
    samples: Sequence[Sample],
    prompts: Sequence[EncodedPrompt],
    config: GRPOConfig,
    objective: ObjectiveConfig,
) -> None:
    """step-<N>.safetensors: every tensor of one optimizer step's loss, so that any program can
    compute it again.

    computed: `step_tensors` of each micro-batch. micro_batches: the rows of `samples`, the whole
    rollout, that each holds. The file's tensors, for the N completions of the step in the order of
    its K micro-batches, padded on the right to the longest of them, T, and for the R completions
    and P prompts of the whole rollout:

        [N,T] fp32   logprobs, entropy, weights, terms/<each of them>, old_logprobs, ref_logprobs
                     (not at beta 0),
                     sampling_logprobs, top_p_mass
        [N,T]        ids int64, -1 beyond a completion's end; mask bool, true on the tokens in the
                     loss
        [N]          advantages fp32; rollout_row and micro_batch int64: where a completion is in
                     the rollout and in the step
        [R]          rollout/reward (trained on, scaled), rollout/rewards/<name> (in its own units),
                     rollout/advantage, all fp64;
                     rollout/group int64, its prompt
        [P,S]        prompt_ids int64, an image as its placeholders, -1 beyond the end
        [K], []      micro_batch_loss fp32; loss fp64, their sum, as it is logged

    Metadata, as JSON: step, settings (all of run_grpo.py's), examples (the ids of the P prompts),
    num_completions, num_tokens.
    """
    rows = [i for indices in micro_batches for i in indices]
    width = max(len(samples[i].ids) for i in rows)

    tensors = {
        # [n,t] each -> [N,T]
        name: torch.cat([pad(part[name], (0, width - part[name].shape[1])) for part in computed])
        for name in computed[0]
        if name != "loss"
    }
    for name in PER_TOKEN:
        beyond = -1 if name == "ids" else 0
        tensors[name] = pad_sequence(
            [getattr(samples[i], name) for i in rows], batch_first=True, padding_value=beyond
        )
    if objective.beta == 0:
        del tensors["ref_logprobs"]  # that pass was not made
    losses = [float(part["loss"]) for part in computed]
    tensors |= {
        "advantages": torch.tensor([samples[i].advantage for i in rows]),
        "rollout_row": torch.tensor(rows),
        "micro_batch": torch.tensor(
            [k for k, indices in enumerate(micro_batches) for _ in indices]
        ),
        "rollout/reward": torch.tensor([sample.reward for sample in samples], dtype=torch.float64),
        "rollout/advantage": torch.tensor(
            [sample.advantage for sample in samples], dtype=torch.float64
        ),
        "rollout/group": torch.tensor([sample.prompt for sample in samples]),
        "prompt_ids": pad_sequence(
            [prompt.input_ids for prompt in prompts], batch_first=True, padding_value=-1
        ),
        "micro_batch_loss": torch.tensor(losses),
        "loss": torch.tensor(sum(losses), dtype=torch.float64),
    }
    for name in samples[0].rewards:
        tensors[f"rollout/rewards/{name}"] = torch.tensor(
            [sample.rewards[name].total for sample in samples], dtype=torch.float64
        )
    notes = {
        "step": step,
        "settings": asdict(config) | asdict(objective),
        "examples": list({sample.prompt: sample.example.id for sample in samples}.values()),
        "num_completions": len(rows),
        "num_tokens": int(tensors["mask"].sum()),
    }
    temporary = run_dir / f".tmp-step-{step}.safetensors"
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        temporary,
        {"format": "pt"} | {name: json.dumps(note) for name, note in notes.items()},
    )
    os.replace(temporary, run_dir / f"step-{step}.safetensors")
