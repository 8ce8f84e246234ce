"""Sample completions on an inference server, in the place of engine/generate.py.

    served = Served(server, "adapter-3")
    generate_remote(served, policy, prompts, examples, sampling, seeds=seeds, num_generations=8)

The server is asked for chat completions and tokenises itself, so its tokens of every prompt are
compared with the engine's. Images go there as PNG at the size that the vision tower sees, which the
server's own resizing leaves as it is. Its log-probabilities are of the nucleus alone
(`--logprobs-mode processed_logprobs`). Those of the engine are over the whole vocabulary, so the
nucleus' mass is put back. It comes from the engine's own pass over the completions, which runs
while the server computes others.

Whether the server's model is the policy cannot be seen in a single answer: engine/probe.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from data.examples import Example
from engine.chat_api import PATH, Answer, Choice, ask, ask_all, chat_messages, training_options
from engine.collate import Rows, collate_rows
from engine.completion import Completion, SamplingConfig
from engine.encode import EncodedPrompt, EncodedRow
from engine.nucleus import nucleus_mass
from engine.policy import Policy
from engine.server import Server

CONCURRENCY = 32  # requests at a time, of num_generations completions each


@dataclass(frozen=True)
class Served:
    """Name a model on a server, which answers in the engine's place.

    model: its name there, of the base or of an adapter. concurrency: requests at a time.
    """

    server: Server
    model: str
    concurrency: int = CONCURRENCY


@torch.no_grad()
def generate_remote(
    served: Served,
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    examples: Sequence[Example],
    sampling: SamplingConfig,
    *,
    num_generations: int = 1,
    seeds: Sequence[int] = (),
    should_stop: Callable[[], bool] = lambda: False,
    on_finished: Callable[[int, list[Completion]], None] = lambda prompt, completions: None,
) -> list[list[Completion]]:
    """Sample `num_generations` completions of every prompt and return them in the prompts' order.

    Everything is as `engine.generate.generate` returns it: ids with the stop token,
    log-probabilities over the whole vocabulary, the nucleus' mass. The mass is 1 where nothing lies
    outside of the nucleus (greedy, or top_p 1).

    policy: what the server's model must be; its active adapter makes the pass for the mass.
    prompts, examples: encoded, and where their images are.
    seeds: of each prompt (engine.random_numbers.server_seed). Not needed when greedy.
    should_stop(): asked ten times a second. Once it returns True, StopRequested is raised.
    on_finished(i, completions): called as soon as prompt i has all its completions.

    Raises ServerError where an answer is not whole, of another prompt, or not what was asked for;
    ServerGone where none comes; DataError where an image cannot be read.
    """
    finished: dict[int, list[Completion]] = {}

    def on_answer(i: int, answer: Answer) -> None:
        finished[i] = _completions(policy, prompts[i], answer.choices, sampling, should_stop)
        if sampling.temperature == 0:  # one was asked for
            finished[i] *= num_generations
        on_finished(i, finished[i])

    given: Sequence[int | None] = seeds or [None] * len(prompts)
    asks = [
        partial(_ask, served, policy, prompt, example, _options(sampling, num_generations, seed))
        for prompt, example, seed in zip(prompts, examples, given, strict=True)
    ]
    with policy.evaluating(), policy.gathered():
        ask_all(asks, served.concurrency, should_stop, on_answer)
    return [finished[i] for i in range(len(prompts))]


def own_pass(
    policy: Policy,
    prompt: EncodedPrompt,
    completions: Sequence[Tensor],
    measure: Callable[[Tensor, Tensor], Tensor],
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Tensor]:
    """Run the policy over completions of one prompt -> what is measured at each token.

    Where memory runs out, it is done again in smaller micro-batches, as scoring is.

    completions: ids [C] int64 of each. measure(hidden [K,H], targets [K]): what is wanted of states
    and the tokens that they predict, [K] or [K,..].
    Returns a tensor [C] or [C,..] for each completion, on the CPU.
    """
    rows = [EncodedRow(prompt, ids, torch.ones(len(ids), dtype=torch.bool)) for ids in completions]

    def run(indices: list[int]) -> Tensor:
        own = [rows[i] for i in indices]
        batch = collate_rows(own, policy.encoder.pad_token_id).to(policy.device)
        return measure(*policy.hidden_states(batch)).cpu()

    _, found = policy.limits.each("scoring", Rows(rows, len(rows)), run, (), should_stop)
    return list(torch.cat(found).split([len(ids) for ids in completions]))


# ---- a request and its answer --------------------------------------------------------------------
def _options(sampling: SamplingConfig, count: int, seed: int | None) -> dict[str, Any]:
    """Make what a request says of sampling. Raises ValueError where a seed is needed."""
    options = {"temperature": sampling.temperature, "max_tokens": sampling.max_completion_length}
    if sampling.temperature == 0:  # several greedy completions are refused, and are the same
        return options | {"n": 1, "top_p": 1.0}
    if seed is None:
        raise ValueError("sampling needs seeds; give them, or temperature 0 for greedy decoding")
    return options | {"n": count, "top_p": sampling.top_p, "seed": seed}


def _ask(
    served: Served,
    policy: Policy,
    prompt: EncodedPrompt,
    example: Example,
    options: dict[str, Any],
) -> Answer:
    """Ask for the completions of one prompt, and check all that needs no pass over them."""
    image = policy.encoder.final_image(example)
    stops, suppressed = policy.base.stop_ids, policy.base.suppressed_ids
    body = {
        "model": served.model,
        "messages": chat_messages(policy.encoder.chat.messages(policy.prompt), [image]),
        **options,
        **training_options(stops, suppressed),
    }
    answer = ask(served.server, body, with_ids=True)
    wrong = _prompt_problem(policy, prompt, answer.prompt_ids or [])
    for choice in answer.choices:
        wrong = wrong or _choice_problem(policy, choice.ids or [], options["max_tokens"])
    if wrong:
        raise served.server.error("POST", PATH, f"example {example.id!r}: {wrong}")
    return answer


def _prompt_problem(policy: Policy, prompt: EncodedPrompt, theirs: list[int]) -> str | None:
    """Name the first difference between the prompt that the server read and the engine's."""
    own = prompt.input_ids.tolist()
    if theirs == own:
        return None
    shorter = min(len(own), len(theirs))
    place = next((i for i in range(shorter) if own[i] != theirs[i]), shorter)
    read, has = (
        _token(policy, ids[place]) if place < len(ids) else "nothing" for ids in (theirs, own)
    )
    return (
        f"the server read another prompt: {len(theirs)} tokens, and the engine's has {len(own)};"
        f" from token {place} on it read {read}, and the engine's has {has}. Let it serve the same"
        " checkpoint, with its own chat template, tokenizer and bounds on the size of images"
    )


def _choice_problem(policy: Policy, ids: list[int], most: int) -> str | None:
    """Say what the sampler would never have drawn."""
    stops, suppressed = policy.base.stop_ids, policy.base.suppressed_ids
    if beyond := [token for token in ids if token >= len(policy.head)]:
        return f"token {beyond[0]} came, and the model has {len(policy.head)}"
    if drawn := [token for token in ids if token in suppressed]:
        return f"it drew {_token(policy, drawn[0])}, which logit_bias suppresses"
    ends = [place for place, token in enumerate(ids) if token in stops]
    if not ends and len(ids) < most:
        return f"a completion ends after {len(ids)} of {most} tokens, without a stop token"
    if ends and ends[0] < len(ids) - 1:
        return f"a completion goes on after its stop token {_token(policy, ids[ends[0]])}"
    return None


def _token(policy: Policy, token: int) -> str:
    """Write a token id with its text."""
    text = policy.encoder.tokenizer.convert_ids_to_tokens([token])[0]
    return f"{token} ({ascii(text)})"


def _completions(
    policy: Policy,
    prompt: EncodedPrompt,
    choices: Sequence[Choice],
    sampling: SamplingConfig,
    should_stop: Callable[[], bool],
) -> list[Completion]:
    """Turn checked choices into completions, with the nucleus' mass put back."""
    ids = [torch.tensor(choice.ids) for choice in choices]
    if sampling.temperature == 0 or sampling.top_p >= 1:
        masses = [torch.ones(len(own)) for own in ids]
    else:

        def mass(hidden: Tensor, targets: Tensor) -> Tensor:
            return nucleus_mass(
                hidden,
                policy.head,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                suppress_token_ids=policy.base.suppressed_ids,
                softcap=policy.softcap,
            )

        masses = [own.float() for own in own_pass(policy, prompt, ids, mass, should_stop)]
    stops = torch.tensor(sorted(policy.base.stop_ids))
    found = []
    for choice, own, mass_of in zip(choices, ids, masses, strict=True):
        within = torch.tensor(choice.logprobs, dtype=torch.float64)  # of the nucleus
        whole = (within + mass_of.double().log()).float()
        found.append(Completion(own, whole, mass_of, not bool(torch.isin(own, stops).any())))
    return found
