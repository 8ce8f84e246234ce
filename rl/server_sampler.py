"""Sample rollouts on a vLLM server, in the place of the engine's own sampler.

The server is given the adapter of each rollout under a new name (engine/served_adapter.py), and its
answers become the completions that `engine.generate.generate` would give (engine/remote.py). Before
the first of them, also after a resume, its log-probabilities are compared (engine/probe.py). Where
they do not show that the adapter is in force, for a fresh one changes nothing, they are compared
again with later ones.

A run without --use_vllm imports nothing of this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from engine.served_adapter import ServedAdapter, ask_one
from engine.server import Server, ServerError
from rl.settings import GRPOConfig


class ServerSampler:
    """Hold the server that samples a run's rollouts.

    Of several ranks the first saves the adapter and lets the server load it. Each asks for the
    completions of its own prompts, so each must reach the server.
    """

    def __init__(
        self,
        config: GRPOConfig,
        run_dir: Path,
        ranks: Ranks,
        note: Callable[[dict[str, Any]], object],
    ):
        """Note where the server is.

        run_dir: the run's folder. note(entry): called on every rank with what a comparison has
        found, for config.json.

        Raises UsageError for a key that cannot be sent, OSError where the disk refuses.
        """
        self.config, self.ranks, self.note = config, ranks, note
        self._served: ServedAdapter | None = None  # the first rank's alone
        self._compare_from = 0.0  # optimizer steps
        with ranks.together(), _correctable():
            self.server = Server.of(config.vllm_server_base_url, config.vllm_server_timeout)
            if ranks.first:
                self._served = ServedAdapter(self.server, run_dir)

    def begin(
        self,
        policy: Policy,
        examples: Sequence[Example],
        step: int,
        should_stop: Callable[[], bool],
    ) -> None:
        """Let the server load the policy's adapter, and see that it answers as the policy.

        examples: of the training data, the first of which are asked about. step: optimizer steps
        that are done.

        Raises UsageError where no server answers, or one that would sample from something else.
        """
        asked = examples[:PROMPTS]

        def serve() -> list[Any]:
            with _correctable():
                prompts = [policy.encode(example) for example in asked]
                return self._serve(policy, asked, prompts, step, should_stop)

        try:
            self._noted(self.ranks.on_first(serve))
        except BaseException as error:
            self.close(at_once=type(error) is KeyboardInterrupt)
            raise

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

        Raises StepFailed where the server does not answer, or not as it must, or would sample from
        something else: the rollout has not begun then. StopRequested once should_stop says so.
        """
        config = self.config

        def serve() -> list[Any]:
            with _failing_the_step():
                return self._serve(policy, examples, prompts, step, should_stop)

        name = self._noted(self.ranks.on_first(serve))
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

    def _serve(
        self,
        policy: Policy,
        examples: Sequence[Example],
        prompts: Sequence[EncodedPrompt],
        step: int,
        should_stop: Callable[[], bool],
    ) -> list[Any]:
        """Let the server load the adapter -> its name, and config.json's entry of a comparison.

        The entry is None where no comparison is due.
        """
        assert self._served is not None, "the first rank alone has a folder"
        name = self._served.serve(policy, step, should_stop)
        if step < self._compare_from:
            return [name, None]
        version = ask_one(self.server.version, should_stop)
        found = probe(Served(self.server, name), policy, prompts, examples, should_stop)
        return [name, {"step": step, "version": version, "probe": found}]

    def _noted(self, served: list[Any]) -> str:
        """Note on every rank what a comparison has found, if one was made -> the adapter's name.

        Until the adapter is seen the number of steps doubles, for a comparison takes time, and the
        first adapters of a small learning rate differ from the base by less than rounding.
        """
        name, entry = served
        if entry is not None:
            step, seen = entry["step"], entry["probe"]["adapter_seen"]
            self._compare_from = math.inf if seen else max(1, 2 * step)
            self.note(entry)
        return str(name)

    def close(self, *, at_once: bool = False) -> None:
        """Let the server forget the adapter, without waiting for it at_once."""
        if self._served is not None:
            self._served.close(at_once=at_once)


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
