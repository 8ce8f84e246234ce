"""Make what tests against a real vLLM server share: its address, the demo's SFT run, the policy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import run_sft
from data.prompts import PROMPTS
from engine.model import attach_adapter, load_model
from engine.policy import Policy
from engine.server import Server


@pytest.fixture(scope="session")
def url() -> str:
    """Return the server's address, or skip the test, saying so, where there is none."""
    found = os.environ.get("VLLM_TEST_URL")
    return found or pytest.skip("VLLM_TEST_URL names no vLLM server")


@pytest.fixture(scope="session")
def sft_run(url, tmp_path_factory) -> Path:
    """Train the demo's SFT adapter, or take that of VLLM_TEST_ADAPTER."""
    given = os.environ.get("VLLM_TEST_ADAPTER")
    if given:
        return Path(given).absolute()
    run = tmp_path_factory.mktemp("vllm") / "sft"
    assert run_sft.main(["--output_dir", str(run)]) == 0
    return run


@pytest.fixture(scope="session")
def policy(sft_run) -> Policy:
    """Load the demo with its SFT adapter into this process, at a rollout's temperature."""
    torch.set_num_threads(1)
    base = load_model(
        "demo",
        dtype=torch.float32,
        device=torch.device("cpu"),
        min_visual_tokens=16,
        max_visual_tokens=16,
    )
    return Policy(attach_adapter(base, sft_run), base, PROMPTS["demo"], temperature=0.8)


@pytest.fixture(scope="session")
def server(url) -> Server:
    return Server.of(url, 240)


@pytest.fixture
def loaded(server, request) -> Iterator[Callable[[Path], str]]:
    """Load an adapter's folder into the server -> its name there. Unloaded after the test."""
    names: list[str] = []

    def load(folder: Path) -> str:
        names.append(f"{request.node.name}-{os.getpid()}-{len(names)}")
        body = {"lora_name": names[-1], "lora_path": str(folder)}
        server.command("/v1/load_lora_adapter", body)
        return names[-1]

    yield load
    for name in names:
        server.command("/v1/unload_lora_adapter", {"lora_name": name})
