"""Protect runs over HTTP against a real vLLM server of the demo's base.

Checked: a GRPO run of ten steps learns from what it would have sampled itself, with an adapter of
its own for each rollout; a server that is killed in a rollout costs that rollout alone.

The second test starts its own server, with the Python that VLLM_TEST_PYTHON names, and kills it.

Run: see test_served_policy.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import rl.server_sampler
import run_grpo
from engine.runtime import main_guard
from engine.server import Server
from tests.helpers.runs import lines, record, train_log
from tests.vllm.serve import served

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]
CLOSE = 1e-4  # a token's log-probability in float32, in nats
# Of the recipe `demo`, without its evaluations. Rollouts of 16 images, for two steps each.
DEMO = {
    "--train_file": "demo:rl-train",
    "--max_steps": "10",
    "--learning_rate": "1e-3",
    "--max_grad_norm": "0.2",
    "--warmup_ratio": "0.1",
    "--scale_rewards": "group",
    "--per_device_train_batch_size": "32",
    "--max_completion_length": "96",
    "--min_length": "0",
    "--num_threads": "1",
    "--eval_steps": "none",
}


def flags(sft_run: Path, run: Path, url: str) -> list[str]:
    """Write the command line of a run of ten steps over a server."""
    given = {"--adapter_name_or_path": str(sft_run), "--output_dir": str(run), **DEMO}
    given |= {"--vllm_server_base_url": url}
    words = [word for flag in given.items() for word in flag]
    return [*words, "--use_vllm", "--no_bf16", "--no_gradient_checkpointing"]


@pytest.fixture(scope="module")
def ten_steps(url, server, sft_run, tmp_path_factory) -> tuple[Path, list[str]]:
    """Train ten steps over the server -> the run's folder, and the adapters that were loaded."""
    run, loaded = tmp_path_factory.mktemp("served") / "run", []
    command = Server.command

    def noted(self, path, body):
        loaded.extend([body["lora_name"]] * path.endswith("/load_lora_adapter"))
        return command(self, path, body)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Server, "command", noted)
        assert run_grpo.main(flags(sft_run, run, url)) == 0
    return run, loaded


def test_ten_steps_learn_from_what_the_engine_would_have_sampled(ten_steps, server):
    run, loaded = ten_steps
    steps = train_log(run)
    rollouts = [step for step in steps if "sampling/sampling_logp_difference/max" in step]
    print("\nstep  |log-probability - server's|  mean, max      ratio, min to max")
    for step in rollouts:
        mean, most = (step[f"sampling/sampling_logp_difference/{key}"] for key in ("mean", "max"))
        low, high = (step[f"sampling/ratio/{key}"] for key in ("min", "max"))
        print(f"{step['step']:4}  {mean:31.1e}, {most:.1e}  {low:.6f} to {high:.6f}")
        assert most < CLOSE
    assert [step["step"] for step in steps] == list(range(1, 11)) and len(rollouts) == 5
    # the probe asks the first rollout's
    assert len(set(loaded)) == len(loaded) == 5
    assert not set(loaded) & set(server.models())  # unloaded since
    [entry] = record(run / "config.json")["rollout_servers"]
    print("config.json:", entry)
    assert entry["version"] == server.version()


@pytest.mark.skipif("VLLM_TEST_PYTHON" not in os.environ, reason="VLLM_TEST_PYTHON names no Python")
def test_a_server_that_is_killed_in_a_rollout_costs_that_rollout_alone(
    ten_steps, sft_run, tmp_path, monkeypatch, capsys
):
    run, calls = tmp_path / "run", []
    generate_remote = rl.server_sampler.generate_remote

    with served(os.environ["VLLM_TEST_PYTHON"], 0, tmp_path / "log") as first:

        def killed_in_the_second(*arguments, **options):
            calls.append(1)
            if len(calls) == 2:
                options["on_finished"] = lambda prompt, completions: first.kill()
            return generate_remote(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(rl.server_sampler, "generate_remote", killed_in_the_second)
            command = flags(sft_run, run, first.url)
            assert main_guard(lambda: run_grpo.main(command)) == 1
    said = capsys.readouterr().err
    assert "saved after step 2; go on with" in said and "Traceback" not in said
    first_rollout = lines(run / "completions.jsonl")
    assert len(first_rollout) == 64 and [step["step"] for step in train_log(run)] == [1, 2]

    port = int(first.url.rpartition(":")[2])
    with served(os.environ["VLLM_TEST_PYTHON"], port, tmp_path / "log"):
        assert run_grpo.main(command) == 0  # the same command again
    assert [step["step"] for step in train_log(run)] == list(range(1, 11))
    rows, undisturbed = (lines(folder / "completions.jsonl") for folder in (run, ten_steps[0]))
    assert rows[:64] == first_rollout
    assert [row["id"] for row in rows] == [row["id"] for row in undisturbed]
    assert [entry["step"] for entry in record(run / "config.json")["rollout_servers"]] == [0, 2]
    pairs = zip(rows, undisturbed, strict=True)
    same = sum(one["completion"] == other["completion"] for one, other in pairs)
    with capsys.disabled():
        print(
            "",
            *(line for line in said.splitlines() if first.url in line or "saved" in line),
            sep="\n",
        )
        print(f"of {len(rows)} completions {same} are those of the undisturbed run")
