"""Start a vLLM server of the demo's base on this machine, and end it with all of its processes.

    VLLM_TEST_PYTHON=FOLDER/bin/python python -m tests.vllm.serve 8811      # until Ctrl-C

The server's Python is that of another environment (tests/README.md), where the engine is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.model_files import model_path

BASE = "base"  # the name that the base is served under
# Adapters come and go while it runs. No VLLM_SERVER_DEV_MODE, which would open /collective_rpc.
ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_PLUGINS": "padded_heads",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
# What a rollout needs of a server: engine/README.md. Its sizes are the demo's.
FLAGS = {
    "--host": "127.0.0.1",
    "--logprobs-mode": "processed_logprobs",
    "--generation-config": "vllm",
    "--served-model-name": BASE,
    "--max-lora-rank": "16",
    "--max-loras": "1",
    "--max-cpu-loras": "2",
    "--max-model-len": "256",
    "--max-num-seqs": "64",
    "--max-num-batched-tokens": "8192",
    # Images come at their final size, and stay at it: the demo's own bounds would let none pass but
    # squares of 112 pixels. 28 by 28 are one token.
    "--mm-processor-kwargs": json.dumps({"min_pixels": 28 * 28, "max_pixels": 2**24}),
    "--limit-mm-per-prompt": json.dumps({"image": 1, "video": 0}),
}
SWITCHES = ("--enable-lora", "--enforce-eager", "--skip-mm-profiling")


@dataclass(frozen=True)
class Running:
    """Hold a server that runs: its URL and its first process, which leads a group of its own."""

    url: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """End it with all of its processes, as SIGKILL does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def served(python: str, port: int, log: Path) -> Iterator[Running]:
    """Serve the demo's base in float32 until the context ends. It begins once the server answers.

    python: of the environment that vLLM is in. port: 0 for a free one. log: a file that takes what
    the server says.

    Raises OSError where the port is taken, RuntimeError with the end of the log where the server
    ends by itself or is not up in ten minutes.
    """
    with socket.create_server(("127.0.0.1", port)) as free:
        port = free.getsockname()[1]
    program = os.path.abspath(python)  # not resolved: a link tells Python of its environment
    command = [program, "-m", "vllm.entrypoints.openai.api_server", "--model", model_path("demo")]
    command += ["--port", str(port), "--dtype", "float32", *SWITCHES]
    command += [word for flag in FLAGS.items() for word in flag]
    with log.open("wb") as said:
        process = subprocess.Popen(
            command,
            cwd=log.parent,
            env=os.environ | ENVIRONMENT,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its group is all that it starts
        )
    running = Running(f"http://127.0.0.1:{port}", process)
    try:
        _wait_until_up(running, log)
        yield running
    finally:
        running.kill()


def _wait_until_up(running: Running, log: Path) -> None:
    for _ in range(600):
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"{running.url}/health", timeout=5),
        ):
            return
        if running.process.poll() is not None:
            break
        time.sleep(1)
    raise RuntimeError(f"no vLLM server came up at {running.url}:\n{log.read_text()[-3000:]}")


def main() -> None:
    """Serve at the port that is given, in the foreground."""
    log = Path(tempfile.gettempdir(), f"vllm-{sys.argv[1]}.log")
    for ending in (signal.SIGINT, signal.SIGTERM):  # a shell's background job ignores the first
        signal.signal(ending, signal.default_int_handler)
    python, port = os.environ["VLLM_TEST_PYTHON"], int(sys.argv[1])
    with contextlib.suppress(KeyboardInterrupt), served(python, port, log) as running:
        print(f"{running.url} is up; its log: {log}", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
