"""Let a server serve the adapter that is being trained: saved in a folder of its own, then loaded.

    served = ServedAdapter(server, run_dir)
    name = served.serve(policy, step)      what requests name as their model from now on
    served.close()

vLLM keeps what it has computed of a prompt by the adapter's name and folder, so each name is used
once: a name that is loaded again would be answered out of the cache of its earlier weights. The
weights are not merged into the base (bf16 rounds most of an update away) and travel by the disk, so
the server must see the run's folder at the same path. It is started with --enable-lora and
VLLM_ALLOW_RUNTIME_LORA_UPDATING=True.
"""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from data.files import remove, written_folder
from engine.policy import Policy
from engine.saving import save_adapter
from engine.server import Server, ServerError

FOLDER = "vllm"  # of a run's folder, while it runs
LAST_WORDS = 5.0  # seconds for which a run that ends waits for the server

logger = logging.getLogger(__name__)


class ServedAdapter:
    """Hold which adapter of a run a server serves.

    name: of the adapter that is loaded, None before the first.
    """

    def __init__(self, server: Server, run_dir: Path):
        """Begin with none, and remove what a killed run has left. run_dir: the run's folder."""
        self.server, self.folder = server, run_dir.resolve() / FOLDER
        remove(self.folder)
        self.name: str | None = None
        self._digest = ""

    def serve(self, policy: Policy, step: int) -> str:
        """Save the policy's adapter as it is now, let the server load it, and return its name.

        The earlier one is unloaded then, and its folder deleted. Where the server has this very
        adapter already nothing is done.

        step: optimizer steps that are done.

        Raises ServerError where the server does not take it or does not list it afterwards, OSError
        where the disk refuses.
        """
        digest, listed = policy.digest(), self.server.models()
        if self.name in listed and digest == self._digest:
            return str(self.name)
        name = self._new_name(step, digest, listed)
        with written_folder(self.folder / name) as folder:
            save_adapter(policy, folder)
        try:
            self._load(name)
        except ServerError:
            remove(self.folder / name)
            raise
        self._forget(self.server)
        self.name, self._digest = name, digest
        return name

    def close(self) -> None:
        """Let the server forget the adapter, and delete its folder. Nobody waits for it long."""
        server = replace(self.server, timeout=min(LAST_WORDS, self.server.timeout))
        self._forget(server)
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

    def _forget(self, server: Server) -> None:
        """Unload the adapter and delete its folder. A server that does not know it is no fault."""
        if self.name is None:
            return
        with suppress(ServerError):
            server.command("/v1/unload_lora_adapter", {"lora_name": self.name})
        remove(self.folder / self.name)
        self.name = None
