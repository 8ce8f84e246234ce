"""Protect what the client relies on, against a real vLLM server of the demo's base.

Checked: prompts, greedy answers and log-probabilities of a served adapter are the engine's own.

The server is that of tests/vllm/serve.py, in float32, on this machine. These tests load adapters of
names of their own and unload them. They train the demo's SFT adapter first, in some three minutes,
unless VLLM_TEST_ADAPTER names a finished run.

Run: VLLM_TEST_URL=http://127.0.0.1:8811 pytest tests/vllm -s
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

import run_sft
from data.images import load_image
from data.prompts import PROMPTS, build_messages
from data.records import read_examples
from engine.chat_api import ask, ask_all, chat_messages, training_options
from engine.completion import SamplingConfig
from engine.generate import generate
from engine.model import attach_adapter, load_model
from engine.policy import Policy
from engine.server import Server

URL = os.environ.get("VLLM_TEST_URL", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not URL, reason="VLLM_TEST_URL names no vLLM server"),
    pytest.mark.timeout(1800),
]
IMAGES, LONGEST = 100, 96
CLOSE = 1e-4  # a token's log-probability in float32, in nats


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory) -> Path:
    """Train the demo's SFT adapter, or take that of VLLM_TEST_ADAPTER."""
    given = os.environ.get("VLLM_TEST_ADAPTER")
    if given:
        return Path(given).absolute()
    run = tmp_path_factory.mktemp("vllm") / "sft"
    assert run_sft.main(["--output_dir", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def policy(sft_run) -> Policy:
    """Load the demo with its SFT adapter into this process."""
    torch.set_num_threads(1)
    base = load_model(
        "demo",
        dtype=torch.float32,
        device=torch.device("cpu"),
        min_visual_tokens=16,
        max_visual_tokens=16,
    )
    return Policy(attach_adapter(base, sft_run), base, PROMPTS["demo"])


@pytest.fixture(scope="module")
def server() -> Server:
    return Server.of(URL, 240)


@pytest.fixture(scope="module")
def adapter(server, sft_run) -> Iterator[str]:
    """Load the adapter into the server -> its name there."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    server.command("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(sft_run)})
    yield name
    server.command("/v1/unload_lora_adapter", {"lora_name": name})


def test_greedy_answers_are_those_of_the_engine(policy, server, adapter):
    examples = read_examples("demo:test-a")[:IMAGES]
    options = training_options(policy.base.stop_ids, policy.base.suppressed_ids)
    options |= {"model": adapter, "temperature": 0.0, "max_tokens": LONGEST}

    def asked(example):
        messages = chat_messages(build_messages(policy.prompt), [load_image(example)])
        return partial(ask, server, {"messages": messages, **options}, with_ids=True)

    answers = ask_all([asked(example) for example in examples], 16, lambda: False)
    prompts = [policy.encode(example) for example in examples]
    own = generate(policy, prompts, SamplingConfig(0.0, 1.0, LONGEST), max_rows=50)
    furthest = 0.0
    for prompt, answer, [completion] in zip(prompts, answers, own, strict=True):
        [choice] = answer.choices
        assert answer.prompt_ids == prompt.input_ids.tolist()
        assert choice.ids == completion.ids.tolist()
        assert choice.text == policy.encoder.decode(completion.ids)
        difference = (torch.tensor(choice.logprobs) - completion.logprobs).abs().max().item()
        furthest = max(furthest, difference)
    print(f"{IMAGES} greedy answers: equal; log-probabilities differ by {furthest:.1e} at most")
    assert furthest < CLOSE
