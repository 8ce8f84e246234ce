"""Let the engine write a fake server's answers with the adapters that the server was given.

with rollout_server(checkpoint, tmp_path) as fake:
    grpo(..., "--use_vllm", "--vllm_server_base_url", fake.url)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from engine.model import attach_adapter, load_model
from engine.probe import PROMPTS
from engine.random_numbers import server_seed
from tests.helpers.engine_writer import EngineWriter
from tests.helpers.fake_server import Document, FakeServer
from tests.helpers.tiny import policy_of

POSITIONS = 400  # prompts of a run at most


class AdapterWriter:
    """Write each answer with the adapter whose name is asked for, as it lies in its folder.

    seed: of the run, from which it made the seeds that come.
    """

    def __init__(self, checkpoint: Path, folder: Path, fake: FakeServer, seed: int = 42):
        self.checkpoint, self.folder, self.fake, self.seed = checkpoint, folder, fake, seed
        self.positions = {server_seed("rollout", seed, at): at for at in range(POSITIONS)}
        # those of the probe, with numbers of their own
        probed = {server_seed("evaluation", 0, at): POSITIONS + at for at in range(PROMPTS)}
        self.positions |= probed
        self._name = ""
        self._write: EngineWriter
        self._loading = threading.Lock()

    def __call__(self, body: Document) -> Document:
        """Answer a chat completion."""
        with self._loading:
            if body["model"] != self._name:
                with torch.random.fork_rng(
                    devices=[]
                ):  # the numbers are those of the run's process
                    self._write, self._name = self._writer(body), body["model"]
            write = self._write
        return write(body)

    def _writer(self, body: Document) -> EngineWriter:
        base = load_model(
            str(self.checkpoint),
            dtype=torch.float32,
            device=torch.device("cpu"),
            min_visual_tokens=4,
            max_visual_tokens=4,
        )
        net = attach_adapter(base, Path(self.fake.adapters[body["model"]]))
        policy = policy_of(net, base, temperature=body["temperature"])
        return EngineWriter(policy, self.folder, self.positions, self.seed)


@contextmanager
def rollout_server(checkpoint: Path, folder: Path) -> Iterator[FakeServer]:
    """Serve the adapters of a run with a base. folder: for the images that come."""
    with FakeServer() as fake:
        fake.write = AdapterWriter(checkpoint, folder, fake)
        yield fake
