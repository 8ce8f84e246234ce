"""Let the engine itself write what a fake inference server answers.

    write = EngineWriter(policy, folder, positions={seed: 0, ...})
    with FakeServer(write) as fake: ...

It reads a request as a server would: the image out of its data URL, the prompt by the checkpoint's
chat template, and the options. Its policy is another object than the one that asks, for a server
computes while the engine does.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data.examples import Example
from data.prompts import Prompt
from engine.completion import Completion, SamplingConfig
from engine.generate import generate
from engine.model import BaseModel
from engine.policy import Policy
from engine.random_numbers import uniform_numbers
from engine.remote import Served, own_pass
from engine.server import Server
from tests.helpers.fake_server import Document, FakeServer, chat_answer
from tests.helpers.tiny import attach_random_adapter, load, policy_of

START = "data:image/png;base64,"
# `generate` tells torch for the whole process not to compile. Two threads that do so, one within
# the other, would leave it so.
generate_in_a_thread: Any = generate.__wrapped__  # type: ignore[attr-defined]


class EngineWriter:
    """Write answers with a policy.

    folder: for the images that come.
    positions: {seed of a request: the prompt's position}, by which the engine's numbers are drawn.
        A seed that is not there is a position itself.
    seed: of these numbers.
    raw: report log-probabilities at temperature 1 without logit_bias, as vLLM does by default.
        whole: report those of the whole distribution, not of the nucleus.
    seen: what becomes of an image before the model sees it.
    """

    def __init__(
        self, policy: Policy, folder: Path, positions: Mapping[int, int], seed: int = 0
    ) -> None:
        self.policy, self.folder, self.positions, self.seed = policy, folder, positions, seed
        self.raw = self.whole = False
        self.seen: Callable[[Image.Image], Image.Image] = lambda image: image
        self._one_at_a_time = threading.Lock()

    def __call__(self, body: Document) -> Document:
        """Answer a chat completion."""
        with self._one_at_a_time:
            return self._answer(body)

    def _answer(self, body: Document) -> Document:
        system, user = body["messages"]
        image, text = user["content"]
        url = image["image_url"]["url"]
        assert url.startswith(START)
        if body.get("return_token_ids"):  # for training
            base = self.policy.base
            assert body["stop_token_ids"] == sorted(base.stop_ids)
            assert body["logit_bias"] == {str(i): -100 for i in base.suppressed_ids}
        sent = Image.open(io.BytesIO(base64.b64decode(url.removeprefix(START))))
        self.seen(sent).save(self.folder / "sent.png")
        example = Example("sent", "sent", "sent.png", (), "site", self.folder)
        prompt = Prompt("sent", text["text"], system=system["content"])
        encoded = self.policy.base.encode_prompt(example, prompt)
        sampling = SamplingConfig(body["temperature"], body.get("top_p", 1.0), body["max_tokens"])
        uniform, count = None, body.get("n", 1)
        if sampling.temperature > 0:
            place = self.positions.get(body["seed"], body["seed"])
            uniform = [uniform_numbers("rollout", self.seed, place, count, body["max_tokens"])]
        (found,) = generate_in_a_thread(
            self.policy, [encoded], sampling, num_generations=count, uniform=uniform
        )
        ids = [one.ids for one in found]
        if self.raw:
            reported = own_pass(self.policy, encoded, ids, self._at_temperature_1)
        else:
            reported = [self._reported(one, sampling) for one in found]
        answer = chat_answer(
            body,
            [own.tolist() for own in ids],
            [own.double().clamp(max=0).tolist() for own in reported],
            encoded.input_ids.tolist(),
        )
        for choice, completion in zip(answer["choices"], found, strict=True):
            choice["message"]["content"] = self.policy.encoder.decode(completion.ids)
        return answer

    def _reported(self, completion: Completion, sampling: SamplingConfig) -> torch.Tensor:
        """Return log-probabilities [C] of the nucleus, where there is one."""
        logprobs = completion.logprobs.double()
        if self.whole or sampling.temperature == 0 or sampling.top_p >= 1:
            return logprobs
        return logprobs - completion.top_p_mass.double().log()

    def _at_temperature_1(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = (hidden @ self.policy.head.t()).detach()  # logit_bias comes after them
        return logits.log_softmax(1).gather(1, targets[:, None])[:, 0]


class RemoteSetting:
    """Hold a policy, what it is asked, and a server with another copy of it.

    Every tenth token ends a completion: those of a random model else never do.
    """

    def __init__(self, folder: Path, examples: list[Example], place: Path, seeds: list[int]):
        """Load both copies. seeds: of the examples' requests. place: for images that come."""
        prompt = Prompt("short", "Which?", system="Read.")
        self.policy, theirs = (
            policy_of(attach_random_adapter(base), base, prompt)
            for base in (self._with_stops(load(folder)) for _ in range(2))
        )
        self.examples = examples
        self.prompts = [self.policy.encode(example) for example in examples]
        self.write = EngineWriter(theirs, place, {seed: i for i, seed in enumerate(seeds)})
        self.fake = FakeServer(self.write)
        self.served = Served(Server.of(self.fake.url, 60), "base", 3)

    @staticmethod
    def _with_stops(base: BaseModel) -> BaseModel:
        stops = set(range(0, len(base.net.lm_head.weight), 10)) - set(base.suppressed_ids)
        return dataclasses.replace(base, stop_ids=frozenset(stops))
