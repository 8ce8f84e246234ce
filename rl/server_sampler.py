"""Sample rollouts on a vLLM server, in the place of the engine's own sampler.

The server is given the adapter of each rollout under a new name (engine/served_adapter.py), and its
answers become the completions that `engine.generate.generate` would give (engine/remote.py). Before
the first of them, also after a resume, its log-probabilities are compared (engine/probe.py).

A run without --use_vllm imports nothing of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from data.examples import Example
from engine.completion import Completion, SamplingConfig
from engine.config import UsageError
from engine.encode import EncodedPrompt
from engine.policy import Policy
from engine.probe import PROMPTS, probe
from engine.random_numbers import server_seed
from engine.ranks import Ranks
from engine.remote import CONCURRENCY, Served, generate_remote
from engine.runtime import StepFailed
from engine.served_adapter import ServedAdapter
from engine.server import Server, ServerError
from rl.settings import GRPOConfig


class ServerSampler:
    """Hold the server that samples a run's rollouts.

    Of several ranks the first saves the adapter and lets the server load it. Each asks for the
    completions of its own prompts, so each must reach the server.
    """

    def __init__(self, config: GRPOConfig, run_dir: Path, ranks: Ranks):
        """Note where the server is. run_dir: the run's folder."""
        self.config, self.ranks = config, ranks
        with _correctable():
            self.server = Server.of(config.vllm_server_base_url, config.vllm_server_timeout)
        self._served = ServedAdapter(self.server, run_dir) if ranks.first else None

    def begin(
        self,
        policy: Policy,
        examples: Sequence[Example],
        step: int,
        should_stop: Callable[[], bool],
    ) -> dict[str, Any]:
        """Let the server load the policy's adapter, and see that it answers as the policy.

        examples: of the training data, the first of which are asked about. step: optimizer steps
        that are done. Returns the entry of config.json.

        Raises UsageError where no server answers, or one that would sample from something else.
        """
        asked = examples[:PROMPTS]

        def begun() -> dict[str, Any]:
            with ExitStack() as unless_begun, _correctable():
                unless_begun.callback(self.close)
                version, name = self.server.version(), self._serve(policy, step)
                served = Served(self.server, name)
                found = probe(served, policy, list(map(policy.encode, asked)), asked, should_stop)
                unless_begun.pop_all()
            return {"step": step, "version": version, "probe": found}

        return self.ranks.on_first(begun)

    def sample(
        self,
        policy: Policy,
        examples: Sequence[Example],
        prompts: Sequence[EncodedPrompt],
        positions: Sequence[int],
        step: int,
        should_stop: Callable[[], bool],
    ) -> list[list[Completion]]:
        """Sample G completions of each prompt from the policy as it is now.

        examples, prompts: this rank's, the prompts encoded. positions: theirs in the run. step:
        optimizer steps that are done.

        Raises StepFailed where the server does not answer, or not as it must: the rollout has not
        begun then. Raises StopRequested once should_stop says so.
        """
        config = self.config

        def serve() -> str:
            with _failing_the_step():
                return self._serve(policy, step)

        name = self.ranks.on_first(serve)
        with self.ranks.together(), _failing_the_step():
            return generate_remote(
                Served(self.server, name, self._concurrency),
                policy,
                prompts,
                examples,
                SamplingConfig(config.temperature, config.top_p, config.max_completion_length),
                num_generations=config.num_generations,
                seeds=[server_seed("rollout", config.seed, position) for position in positions],
                should_stop=should_stop,
            )

    @property
    def _concurrency(self) -> int:
        """Count the prompts that are asked for at a time."""
        rows = self.config.sampling_batch_size
        return CONCURRENCY if rows is None else max(1, rows // self.config.num_generations)

    def _serve(self, policy: Policy, step: int) -> str:
        assert self._served is not None, "the first rank alone has a folder"
        return self._served.serve(policy, step)

    def close(self) -> None:
        """Let the server forget the adapter."""
        if self._served is not None:
            self._served.close()


@contextmanager
def _correctable() -> Iterator[None]:
    """Let what a server says before the first step be a mistake that the user can correct."""
    try:
        yield
    except ServerError as error:
        raise UsageError(
            f"--use_vllm: {error} (engine/README.md, A server for rollouts)"
        ) from error


@contextmanager
def _failing_the_step() -> Iterator[None]:
    """Let what a server says in a rollout end the run, its state saved."""
    try:
        yield
    except ServerError as error:
        raise StepFailed(str(error)) from error
