"""Compare a server's log-probabilities with the engine's, before anything is learnt from them.

A server that answers well can still be another model: another base, an adapter of which a part or
nothing is in force, images that are resized otherwise, image tokens that do not see each other. It
can also mean something else by a log-probability. None of that is seen in its texts, and all of it
in the numbers. So some completions are drawn there and scored here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor

from data.examples import Example
from engine.completion import SamplingConfig
from engine.encode import EncodedPrompt
from engine.logprobs import token_logprobs
from engine.policy import Policy
from engine.random_numbers import server_seed
from engine.remote import Served, generate_remote, own_pass
from engine.server import ServerError

PROMPTS, GENERATIONS, TOKENS = 4, 2, 64
# Far from 1, for at 1 the two modes of a server's log-probabilities are the same.
TEMPERATURE, TOP_P = 0.8, 0.95
EACH = 1e-4  # the most by which a token may differ in float32
MEAN = 5e-3  # the most by which tokens may differ in bfloat16, on average
# Of the nucleus' tokens: where its border lies within rounding, another token is the last one.
ON_BORDER = 0.05


@torch.no_grad()
def probe(
    served: Served,
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    examples: Sequence[Example],
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Draw completions on a server and compare their log-probabilities with the engine's.

    Half of them are drawn from the whole distribution, and must agree; the other half from the
    nucleus, where the server must report what is left after it. In float32 each token may differ by
    EACH, in bfloat16 all by MEAN on average.

    policy: what the server's model must be. prompts, examples: as `generate_remote` takes them; the
    first PROMPTS are used.
    Returns "tokens", how many were compared, and by how much they differ in nats: "mean" and
    "largest" of the whole distribution, "nucleus_mean" of the nucleus. "adapter_seen" says whether
    the base without the adapter would have been refused. Where it is False the adapter changes too
    little as yet, a fresh one nothing, and a server that ignores it passes too.

    Raises ServerError where the difference is larger, with the likely cause, and as
    `generate_remote` does.
    """
    asked = prompts[:PROMPTS], examples[:PROMPTS]
    whole, nucleus = (
        _Drawn(served, policy, *asked, SamplingConfig(TEMPERATURE, top_p, TOKENS), should_stop)
        for top_p in (1.0, TOP_P)
    )
    strict = policy.head.dtype == torch.float32
    differs = partial(_differs, strict=strict)
    found, of_nucleus = whole.difference(), nucleus.difference()
    if differs(found):
        raise ServerError(
            f"{served.server.base_url}, model {served.model!r}: its log-probabilities are not the"
            f" policy's. {_described(found, strict)}. {_cause(whole, differs)}"
        )
    if differs(of_nucleus, ON_BORDER):
        raise ServerError(
            f"{served.server.base_url}, model {served.model!r}: its log-probabilities of a nucleus"
            f" (top_p) are not those of what is left in it. {_described(of_nucleus, strict)}. Start"
            " it with --logprobs-mode processed_logprobs"
        )
    return {
        "tokens": len(found) + len(of_nucleus),
        "mean": float(found.mean()),
        "largest": float(found.max()),
        "nucleus_mean": float(of_nucleus.mean()),
        "adapter_seen": (alone := whole.base_alone()) is not None and differs(alone),
    }


class _Drawn:
    """Hold completions that a server has drawn, and score them with the engine."""

    def __init__(
        self,
        served: Served,
        policy: Policy,
        prompts: Sequence[EncodedPrompt],
        examples: Sequence[Example],
        sampling: SamplingConfig,
        should_stop: Callable[[], bool],
    ):
        self.policy, self.prompts, self.should_stop = policy, prompts, should_stop
        seeds = [server_seed("evaluation", 0, place) for place in range(len(prompts))]
        self.groups = generate_remote(
            served,
            policy,
            prompts,
            examples,
            sampling,
            num_generations=GENERATIONS,
            seeds=seeds,
            should_stop=should_stop,
        )

    def difference(self, *, raw: bool = False) -> Tensor:
        """Compute by how much each token differs from the engine's [K] fp64.

        raw: compare with the model's own distribution, before temperature and logit_bias.
        """

        def score(hidden: Tensor, targets: Tensor) -> Tensor:
            logprobs, _ = token_logprobs(
                hidden,
                self.policy.head,
                targets,
                temperature=1.0 if raw else TEMPERATURE,
                suppress_token_ids=() if raw else self.policy.base.suppressed_ids,
                softcap=self.policy.softcap,
            )
            return logprobs

        found = []
        with self.policy.evaluating(), self.policy.gathered():
            for prompt, group in zip(self.prompts, self.groups, strict=True):
                ids = [one.ids for one in group]
                own = own_pass(self.policy, prompt, ids, score, self.should_stop)
                found += [
                    mine.double() - theirs.logprobs.double()
                    for mine, theirs in zip(own, group, strict=True)
                ]
        return torch.cat(found).abs()

    def base_alone(self) -> Tensor | None:
        """Compute by how much each token differs from the base's [K] fp64.

        Returns None where the policy is a base without an adapter.
        """
        if not isinstance(self.policy.net, PeftModel):
            return None
        trained = self.policy.parameters
        try:
            with self.policy.adapted.disable_adapter():
                return self.difference()
        finally:  # peft makes all of the adapter trained at the end, frozen parts too
            self.policy.net.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_()


def _differs(difference: Tensor, share: float = 0.0, *, strict: bool) -> bool:
    """Tell whether tokens differ by more than they may. NaN does.

    share: of the tokens, that may differ by anything in float32. strict: in float32.
    """
    if not strict:
        return not float(difference.mean()) <= MEAN
    return int((~(difference <= EACH)).sum()) > share * len(difference)


def _described(difference: Tensor, strict: bool) -> str:
    allowed = f"{EACH:g} each in float32" if strict else f"{MEAN:g} on average in bfloat16"
    return (
        f"Over {len(difference)} tokens they differ by {float(difference.mean()):.2g} on average"
        f" and by {float(difference.max()):.2g} at most; allowed is {allowed}"
    )


def _cause(drawn: _Drawn, differs: Callable[[Tensor], bool]) -> str:
    """Find what the server's numbers are instead, or list what it may be."""
    if not differs(drawn.difference(raw=True)):
        return "They are those of temperature 1: start it with --logprobs-mode processed_logprobs"
    alone = drawn.base_alone()
    if alone is not None and not differs(alone):
        return (
            "They are the base's without the adapter: name the adapter, and start the server with"
            " --enable-lora"
        )
    return (
        "Likely: other weights of the base; an adapter of which only a part is in force (its log"
        " says which modules); another precision (--dtype); images that it changes; or an attention"
        " in which the tokens of an image do not see each other (--attention-backend TRITON_ATTN"
        " lets them)"
    )
