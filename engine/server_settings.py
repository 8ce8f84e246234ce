"""Declare the flags of a rollout server, and check them. Nothing here loads torch.

Names that TRL has too mean the same, and what differs is said. The client is engine/server.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from engine.adapter_files import adapter_record
from engine.config import UsageError, setting
from engine.inherited import FRESH
from engine.settings import ENGINE

TIMEOUT = 240.0  # seconds of a request
REMOTE_HELP = (
    "let images leave this machine: a server elsewhere, by https alone; the data's terms decide"
    " whether they may: MIMIC-CXR's forbid third parties and online services"
)
# They say nothing without --use_vllm.
_OF_THE_SERVER = ("vllm_server_base_url", "vllm_server_timeout", "allow_remote_server")


@dataclass(frozen=True)
class ServerSettings:
    """Hold the settings of a server that samples rollouts."""

    use_vllm: bool = setting(
        False,
        "sample rollouts on a vLLM server, which is given the adapter before each; evaluations, and"
        " every log-probability that is trained on, stay the engine's (engine/README.md)",
        source=ENGINE,
        group="rollout server",
    )
    vllm_mode: Literal["server"] = setting(
        "server",
        "where vLLM runs: as a server in an environment of its own; TRL's is colocate",
        source=ENGINE,
        group="rollout server",
    )
    vllm_server_base_url: str = setting(
        "http://127.0.0.1:8000",
        "address of the server; its key is read from the environment variable VLLM_API_KEY",
        source="vLLM's own port",
        group="rollout server",
    )
    vllm_server_timeout: float = setting(
        TIMEOUT,
        "longest time that one request may take, which is all completions of a prompt; one that"
        " takes longer ends the run, its state saved",
        unit="seconds",
        source="TRL, where it bounds the wait for the server's start",
        group="rollout server",
        within="(0, 86400]",
    )
    allow_remote_server: bool = setting(False, REMOTE_HELP, source=ENGINE, group="rollout server")


def server_problems(config: Any) -> list[str]:
    """Name what is wrong with the settings of a rollout server, one line each.

    config: a ServerSettings that holds those of a run, too.
    """
    if not config.use_vllm:
        return []
    from engine.server_address import url_problems  # here: a run without a server needs none of it

    found = [
        f"--vllm_server_base_url {line}"
        for line in url_problems(config.vllm_server_base_url, config.allow_remote_server)
    ]
    if config.shard_base:
        found.append(
            "--use_vllm and --shard_base do not go together: a forward through a sharded base needs"
            " all ranks at once, and each looks at its own answers of the server; leave out one"
        )
    return found + _adapter_problems(config.adapter_name_or_path)


def _adapter_problems(named: str) -> list[str]:
    """Name what of an adapter vLLM does not serve, by its own check (peft_helper.py of 0.32).

    named: the value of --adapter_name_or_path. What else it may not do the probe finds.
    """
    try:
        record = {} if named in ("", FRESH) else adapter_record(named)
    except UsageError:  # whoever loads it says what is wrong
        return []
    unserved = {
        "use_dora": "DoRA",
        "lora_bias": "biases of LoRA",
        "modules_to_save": "whole modules",
    }
    return [
        f"--use_vllm: {named} has {what} ({key} in its adapter_config.json), which vLLM does not"
        " serve; leave out --use_vllm, or fold the adapter into its base (python -m engine.merge)"
        " and begin with --adapter_name_or_path none"
        for key, what in unserved.items()
        if record.get(key)
    ]


def server_warnings(config: Any) -> list[str]:
    """Name settings that have no effect, one line each. config: as in `server_problems`."""
    if config.use_vllm:
        return []
    return [
        f"{name} has no effect without --use_vllm"
        for name in _OF_THE_SERVER
        if getattr(config, name) != getattr(ServerSettings, name)
    ]
