"""Write all tensors of one optimizer step (--dump_step), enough to compute its loss again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from data.files import written_whole
from engine.encode import EncodedPrompt
from rl.objective import ObjectiveConfig
from rl.samples import PER_TOKEN, Sample
from rl.settings import GRPOConfig


def step_tensors(
    loss: Tensor, logprobs: Tensor, entropy: Tensor, weights: Tensor, terms: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Copy one micro-batch's tensors to the CPU, free of the graph, which holds the GPU's memory.

    logprobs, entropy, weights, terms: [n,t] each.
    Returns one entry of `computed` in `write_step`.
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
    """Write step-<N>.safetensors: every tensor of one step's loss, enough to compute it again.

    computed: `step_tensors` of each micro-batch.
    micro_batches: for each micro-batch, the index of its completions in `samples`.
    samples: the whole rollout.
    prompts: the rollout's prompts.

    The step has N completions in K micro-batches. They are in the order of the micro-batches,
    padded on the right to the longest of them, T. The whole rollout has R completions of P prompts.
    The tensors:

        [N,T] fp32   logprobs, entropy, weights, terms/<name of each>, old_logprobs, ref_logprobs
                     (not at beta 0), sampling_logprobs, top_p_mass
        [N,T]        ids int64, -1 beyond a completion's end, and mask bool, true on the tokens in
                     the loss
        [N]          advantages fp32, rollout_row and micro_batch int64: where a completion is in
                     the rollout and in the step
        [R]          rollout/reward (trained on, scaled), rollout/rewards/<name> (in its own units),
                     rollout/advantage, all fp64, and rollout/group int64, the index of its prompt
        [P,S]        prompt_ids int64, an image as its placeholders, -1 beyond the end
        [K]          micro_batch_loss fp32
        []           loss fp64, the sum of micro_batch_loss, as it is logged

    Metadata, as JSON: step, settings (all of run_grpo.py's), examples (the ids of the P prompts),
    hospitals (theirs, null where there is one alone), num_completions, num_tokens.
    """
    rows = [i for indices in micro_batches for i in indices]
    width = max(len(samples[i].ids) for i in rows)

    tensors = {
        name: torch.cat([pad(part[name], (0, width - part[name].shape[1])) for part in computed])
        for name in computed[0]
        if name != "loss"
    }  # [n,t] each -> [N,T]
    for name in PER_TOKEN:
        beyond = -1 if name == "ids" else 0
        tensors[name] = pad_sequence(
            [getattr(samples[i], name) for i in rows], batch_first=True, padding_value=beyond
        )
    if objective.beta == 0:
        del tensors["ref_logprobs"]  # at beta 0 the reference is not run
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
        "rollout/group": torch.tensor([sample.group for sample in samples]),
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
    examples = {sample.group: sample.example for sample in samples}.values()
    notes = {
        "step": step,
        "settings": asdict(config) | asdict(objective),
        "examples": [example.id for example in examples],
        "hospitals": [example.hospital for example in examples],
        "num_completions": len(rows),
        "num_tokens": int(tensors["mask"].sum()),
    }
    with written_whole(run_dir / f"step-{step}.safetensors") as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            temporary,
            {"format": "pt"} | {name: json.dumps(note) for name, note in notes.items()},
        )
