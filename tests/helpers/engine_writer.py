"""Let the engine itself write what a fake inference server answers.

    write = EngineWriter(policy, folder, positions={seed: 0, ...})
    with FakeServer(write) as fake: ...

It reads a request as a server would: the image out of its data URL, the prompt by the checkpoint's
chat template, and the options. Its policy is another object than the one that asks, for a server
computes while the engine does.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from data.examples import Example
from data.prompts import Prompt
from engine.completion import SamplingConfig
from engine.generate import generate
from engine.policy import Policy
from engine.random_numbers import uniform_numbers
from tests.helpers.fake_server import Document, chat_answer

START = "data:image/png;base64,"


class EngineWriter:
    """Write answers with a policy.

    folder: for the images that come.
    positions: {seed of a request: the prompt's position}, by which the engine's numbers are drawn.
    seed: of these numbers.
    raw: report log-probabilities at temperature 1, as vLLM does by default.
    """

    def __init__(
        self, policy: Policy, folder: Path, positions: Mapping[int, int], seed: int = 0
    ) -> None:
        self.policy, self.folder, self.positions, self.seed = policy, folder, positions, seed
        self.raw = False
        self._one_at_a_time = threading.Lock()

    def __call__(self, body: Document) -> Document:
        """Answer a chat completion."""
        with self._one_at_a_time:
            return self._answer(body)

    def _answer(self, body: Document) -> Document:
        system, user = body["messages"]
        image, text = user["content"]
        url = image["image_url"]["url"]
        assert url.startswith(START) and body["stop_token_ids"] == sorted(self.policy.base.stop_ids)
        assert body["logit_bias"] == {str(i): -100 for i in self.policy.base.suppressed_ids}
        (self.folder / "sent.png").write_bytes(base64.b64decode(url.removeprefix(START)))
        example = Example("sent", "sent", "sent.png", (), "site", self.folder)
        prompt = Prompt("sent", text["text"], system=system["content"])
        encoded = self.policy.base.encode_prompt(example, prompt)
        sampling = SamplingConfig(body["temperature"], body["top_p"], body["max_tokens"])
        uniform = None
        if sampling.temperature > 0:
            place = self.positions[body["seed"]]
            shape = body["n"], body["max_tokens"]
            uniform = [uniform_numbers("rollout", self.seed, place, *shape)]
        (found,) = generate(
            self.policy, [encoded], sampling, num_generations=body["n"], uniform=uniform
        )
        logprobs = [self._reported(one, sampling).tolist() for one in found]
        ids = [one.ids.tolist() for one in found]
        return chat_answer(body, ids, logprobs, encoded.input_ids.tolist())

    def _reported(self, completion: Any, sampling: SamplingConfig) -> torch.Tensor:
        """Return log-probabilities [C] fp64 of the nucleus, where there is one."""
        whole = completion.logprobs.double()
        if sampling.temperature == 0 or sampling.top_p >= 1:
            return whole
        return (whole - completion.top_p_mass.double().log()).clamp(max=0)
