"""Let the engine itself answer in the place of a server's model (`FakeServer.write`)."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable
from pathlib import Path

from data.examples import Example
from engine.completion import SamplingConfig
from engine.policy import Policy
from engine.random_numbers import uniform_numbers
from tests.helpers.engine_writer import generate_in_a_thread
from tests.helpers.fake_server import Document, chat_answer


def written_by(policy: Policy, folder: Path) -> Callable[[Document], Document]:
    """Make the function that answers a request by the engine's sampler.

    policy: what answers. The request must hold its prompt, in text. folder: where the images that
    come are kept, to be read as any other.
    """
    one_at_a_time = threading.Lock()

    def write(body: Document) -> Document:
        system, user = body["messages"]
        image, text = user["content"]
        assert (system["role"], system["content"]) == ("system", policy.prompt.system)
        assert (user["role"], text) == ("user", {"type": "text", "text": policy.prompt.text})
        start, _, content = image["image_url"]["url"].partition("base64,")
        assert start == "data:image/png;" and image["type"] == "image_url"
        sampling = SamplingConfig(body["temperature"], body.get("top_p", 1.0), body["max_tokens"])
        uniform = None
        if sampling.temperature > 0:
            numbers = uniform_numbers("rollout", body["seed"], 0, 1, sampling.max_completion_length)
            uniform = [numbers]
        with one_at_a_time:
            (folder / "came.png").write_bytes(base64.b64decode(content))
            prompt = policy.encode(Example("came", "came", "came.png", (), "came", folder))
            [[completion]] = generate_in_a_thread(policy, [prompt], sampling, uniform=uniform)
        ids, logprobs = completion.ids.tolist(), completion.logprobs.tolist()
        answer = chat_answer(body, [ids], [logprobs], prompt.input_ids.tolist())
        choice = answer["choices"][0]
        choice["message"]["content"] = policy.encoder.decode(completion.ids)
        choice["finish_reason"] = "length" if completion.truncated else "stop"
        return answer

    return write
