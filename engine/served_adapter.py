"""Let a server serve the adapter that is being trained: saved in a folder of its own, then loaded.

    served = ServedAdapter(server, run_dir)
    name = served.serve(policy, step, should_stop)     what requests name as their model from now on
    served.close()

vLLM keeps what it has computed of a prompt by the adapter's name and folder: a name that is loaded
again would be answered out of the cache of its earlier weights. So a name, which holds the step and
the weights' SHA-256, is never used for other weights. These are not merged into the base (bf16
rounds most of an update away) and travel by the disk, so the server must see the run's folder at
the same path. It is started with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from data.files import remove, written_folder
from engine.chat_api import ask_all
from engine.policy import Policy
from engine.runtime import StopRequested
from engine.saving import save_adapter
from engine.server import Server, ServerError

FOLDER = "vllm"  # of a run's folder, while it runs
LAST_WORDS = 5.0  # seconds for which the server is waited for to forget an adapter

logger = logging.getLogger(__name__)
T = TypeVar("T")


class ServedAdapter:
    """Hold which adapter of a run a server serves.

    name: of the adapter that is loaded, "" before the first.
    """

    def __init__(self, server: Server, run_dir: Path):
        """Begin with none, and remove what a killed run has left. run_dir: the run's folder."""
        self.server, self.folder = server, run_dir.resolve() / FOLDER
        remove(self.folder)
        self.name = self._digest = ""
        self._given: list[str] = []  # all that the server may have: a load's answer may be lost

    def serve(self, policy: Policy, step: int, should_stop: Callable[[], bool]) -> str:
        """Save the policy's adapter as it is now, let the server load it, and return its name.

        The earlier one is unloaded then, and its folder deleted. Where the server has this very
        adapter already nothing is done.

        step: optimizer steps that are done. should_stop(): asked ten times a second while the
        server is waited for.

        Raises ServerError where the server does not take it or does not list it afterwards, OSError
        where the disk refuses, StopRequested once should_stop says so. `close` is called then.
        """
        digest, listed = policy.digest(), ask_one(self.server.models, should_stop)
        if self.name in listed and digest == self._digest:
            return self.name
        name = self._new_name(step, digest, listed)
        with written_folder(self.folder / name) as folder:
            save_adapter(policy, folder)
        self._given.append(name)
        ask_one(partial(self._load, name), should_stop)
        self._forget(self._given[:-1], should_stop)
        self.name, self._digest = name, digest
        return name

    def close(self, *, at_once: bool = False) -> None:
        """Let the server forget all that it was given, within LAST_WORDS, and delete the folder.

        at_once: only delete the folder, after a second Ctrl-C, which waits for nothing.
        """
        try:
            if not at_once:
                self._forget(self._given)
        finally:
            remove(self.folder)

    def _new_name(self, step: int, digest: str, listed: list[str]) -> str:
        """Choose a name that this server does not have: <run>-<step>-<8 hex of the SHA-256>.

        One that has it from a run that was killed at this step gets a number behind it.
        """
        run = re.sub(r"[^A-Za-z0-9._-]", "_", self.folder.parent.name)[:80]
        name, number = f"{run}-{step}-{digest[:8]}", 1
        while name in listed or (self.folder / name).exists():
            number += 1
            name = f"{run}-{step}-{digest[:8]}-{number}"
        return name

    def _load(self, name: str) -> None:
        """Let the server load an adapter's folder. Raises ServerError unless it lists it then."""
        path, body = (
            "/v1/load_lora_adapter",
            {"lora_name": name, "lora_path": str(self.folder / name)},
        )
        try:
            self.server.command(path, body)
        except ServerError as error:
            # loaded by a first try whose answer was lost
            if error.status == 400 and name in self.server.models():
                return
            if error.status == 404:
                raise ServerError(
                    f"{error}. The server does not see {self.folder / name}, or loads no adapters:"
                    " it and the training must see one file system, and it is started with"
                    " --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True",
                    error.status,
                ) from error
            raise
        if name not in self.server.models():
            raise self.server.error("POST", path, f"it took {name} and does not list it")

    def _forget(self, names: list[str], should_stop: Callable[[], bool] = lambda: False) -> None:
        """Unload adapters, within LAST_WORDS, and delete their folders.

        A server that does not know one is no fault, and no other fault ends a run.
        """
        end = time.monotonic() + LAST_WORDS
        for name in list(names):
            body = {"lora_name": name}
            unload = partial(self.server.command, "/v1/unload_lora_adapter", body)
            try:
                ask_one(unload, lambda: should_stop() or time.monotonic() > end)
            except ServerError as error:
                if error.status not in (None, 404):
                    logger.warning("the server may keep adapter %s: %s", name, error)
            except StopRequested:
                logger.warning("the server may keep adapter %s: it was not waited for", name)
            remove(self.folder / name)
            self._given.remove(name)


def ask_one(ask: Callable[[], T], should_stop: Callable[[], bool]) -> T:
    """Call a function that asks a server -> what it returns. A signal breaks it off.

    Raises what it raises, and StopRequested within a second once should_stop says so.
    """
    (answer,) = ask_all([ask], 1, should_stop)
    return answer
