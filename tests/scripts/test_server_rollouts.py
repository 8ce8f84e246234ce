"""Protect runs whose rollouts a server samples.

Checked: over HTTP from a server that writes with the engine itself, ten steps end bit for bit where
those of the engine's own sampler do; a server that is killed in a rollout costs nothing that was
finished; each adapter is loaded under its own name; a server that ignores it is found out, also
where the first one changes nothing; a run without a server loads nothing of it.

Run: pytest tests/scripts/test_server_rollouts.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import engine.run
import run_grpo
from engine.runtime import main_guard
from tests.helpers.adapter_writer import rollout_server
from tests.helpers.repository import ROOT
from tests.helpers.runs import (
    GRPO,
    SFT,
    assert_same_run,
    equal_tensors,
    grpo,
    grpo_flags,
    lines,
    record,
    speak,
    train_log,
    without_times,
)

# Rollouts of 2 groups of 4 completions, for two steps each.
FLAGS = ["--max_steps", "10", "--eval_steps", "none", "--top_p", "0.9"]
LOAD = "/v1/load_lora_adapter"


@pytest.fixture(scope="module")
def own_sampler(tiny_sft_run, tiny_data, tmp_path_factory) -> Path:
    """Train ten steps without a server."""
    run = tmp_path_factory.mktemp("own") / "run"
    with pytest.MonkeyPatch.context() as patch:
        speak(patch)
        assert grpo(tiny_sft_run("qwen2_5_vl"), tiny_data, run, *FLAGS) == 0
    return run


@pytest.fixture
def server(tiny_checkpoint, tmp_path):
    with rollout_server(tiny_checkpoint("qwen2_5_vl"), tmp_path) as fake:
        yield fake


def over(fake) -> list[str]:
    return ["--use_vllm", "--vllm_server_base_url", fake.url]


def same_training(one: Path, other: Path) -> None:
    """Check that two runs have trained the same, whoever has sampled."""
    rows = [without_times(lines(run / "completions.jsonl")) for run in (one, other)]
    assert rows[0] == rows[1]
    for name in ("adapter_model", "last/adapter_model", "last/optimizer"):
        assert equal_tensors(one / f"{name}.safetensors", other / f"{name}.safetensors"), name
    for before, after in zip(train_log(one), train_log(other), strict=True):
        before, after = without_times(before), without_times(after)
        for name in before.keys() | after.keys():
            if name.startswith("sampling/"):  # a server's numbers come in other roundings
                assert before[name] == pytest.approx(after[name], abs=1e-5), name
            else:
                assert before[name] == after[name], name


def test_ten_steps_over_http_are_those_of_the_engines_own_sampler(
    own_sampler, server, tiny_sft_run, tiny_data, tmp_path, monkeypatch, capsys
):
    speak(monkeypatch)
    run = tmp_path / "run"
    assert grpo(tiny_sft_run("qwen2_5_vl"), tiny_data, run, *FLAGS, *over(server)) == 0
    same_training(own_sampler, run)
    # Five rollouts, each with an adapter of its own. The first is the probe's, too.
    loaded = [body["lora_name"] for body in server.bodies(LOAD)]
    assert [name.rpartition("-")[0] for name in loaded] == [
        f"run-{step}" for step in range(0, 10, 2)
    ]
    asked = {body["model"] for body in server.bodies()}
    assert asked == set(loaded) and not server.adapters and not (run / "vllm").exists()
    [entry] = record(run / "config.json")["rollout_servers"]
    assert (entry["step"], entry["version"]) == (0, "0.32.0")
    assert entry["probe"]["tokens"] > 0 and entry["probe"]["largest"] < 1e-5
    assert record(run / "last" / "config.json")["rollout_servers"] == [entry]
    said = capsys.readouterr()
    assert f"sampler     vLLM at {server.url}: resume is no longer exact to the bit" in said.out


def test_a_server_that_is_killed_in_a_rollout_costs_nothing_that_was_finished(
    own_sampler, server, tiny_sft_run, tiny_data, tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    """The run goes on with another server, and ends where the undisturbed one does: this server
    samples exactly.
    """
    speak(monkeypatch)
    monkeypatch.setattr("engine.server.PAUSES", (0.0, 0.0))
    run, write = tmp_path / "run", server.write

    def killed_in_the_second(body):
        answer = write(body)
        if body["model"].startswith("run-2-"):
            server.raw = b""
        return answer

    server.write = killed_in_the_second
    one_by_one = [*over(server), "--sampling_batch_size", "4"]  # a prompt at a time
    flags = grpo_flags(tiny_sft_run("qwen2_5_vl"), tiny_data, run, *FLAGS, *one_by_one)
    assert main_guard(lambda: run_grpo.main(flags)) == 1
    said = capsys.readouterr().err
    go_on = f"go on with: python run_grpo.py --resume_from_checkpoint {run}"
    assert f"saved after step 2; {go_on}" in said
    [error] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert server.url in error and "3 times in a row" in error and "Traceback" not in said
    assert len(lines(run / "completions.jsonl")) == 8 and not (run / "vllm").exists()
    # of the rollout that was cut short nothing is left
    assert [line["step"] for line in train_log(run)] == [1, 2]
    with rollout_server(tiny_checkpoint("qwen2_5_vl"), tmp_path) as other:
        resume = ["--resume_from_checkpoint", str(run), "--vllm_server_base_url", other.url]
        assert run_grpo.main(resume) == 0
        assert other.bodies(LOAD)[0]["lora_name"].startswith("run-2-")
    same_training(own_sampler, run)
    entries = record(run / "config.json")["rollout_servers"]
    assert [entry["step"] for entry in entries] == [0, 2]


def test_a_rollout_in_progress_is_not_asked_for_again(
    server, tiny_sft_run, tiny_data, tmp_path, monkeypatch
):
    """Stopped between the two steps of a rollout, the second learns from what is there."""
    speak(monkeypatch)
    run, first = tmp_path / "run", ["--max_steps", "4", "--save_steps", "1", "--eval_steps", "none"]
    assert grpo(tiny_sft_run("qwen2_5_vl"), tiny_data, run, *first, *over(server)) == 0
    asked = len(server.bodies())
    other = tmp_path / "other"
    resume = ["--resume_from_checkpoint", str(run / "checkpoint-3"), "--output_dir", str(other)]
    assert run_grpo.main([*resume, "--vllm_server_base_url", server.url]) == 0
    assert [body for body in server.bodies()[asked:] if body["n"] == 4] == []
    assert_same_run(run, other)


def test_a_run_without_a_server_loads_nothing_of_it(tiny_sft_run, tiny_data, tmp_path):
    flags = grpo_flags(tiny_sft_run("qwen2_5_vl"), tiny_data, tmp_path / "run", "--max_steps", "1")
    program = (
        "import sys, run_grpo\n"
        "assert run_grpo.main(sys.argv[1:]) == 0\n"
        "parts = 'server chat_api remote probe served_adapter'.split()\n"
        "names = {f'engine.{one}' for one in parts} | {'rl.server_sampler'}\n"
        "print('loaded:', sorted(names & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, *flags],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "loaded: []" in done.stdout, done.stderr


def test_no_server_there_is_said_before_the_first_step(
    tiny_sft_run, tiny_data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("engine.server.PAUSES", (0.0, 0.0))
    run = tmp_path / "run"
    flags = grpo_flags(tiny_sft_run("qwen2_5_vl"), tiny_data, run, *FLAGS, "--use_vllm")
    flags += ["--vllm_server_base_url", "http://127.0.0.1:9"]
    assert main_guard(lambda: run_grpo.main(flags)) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "--use_vllm: GET http://127.0.0.1:9/v" in error
    assert "(engine/README.md, A server for rollouts)" in error
    assert not list(run.glob("checkpoint-*")) and not (run / "start").exists()


def load_instead(server, folder: Path) -> None:
    """Let the server say that it has loaded an adapter, and answer with that of a folder."""
    answer = server.answer

    def another(verb, path, body):
        found = answer(verb, path, body)
        if path == LOAD:
            server.adapters[body["lora_name"]] = str(folder)
        return found

    server.answer = another


def test_a_server_with_another_policy_is_refused_before_the_first_step(
    server, tiny_sft_run, tiny_data, tmp_path, capsys
):
    """It says that it has loaded the adapter, and answers with that of an earlier step."""
    sft, run = tiny_sft_run("qwen2_5_vl"), tmp_path / "run"
    load_instead(server, sft / "checkpoint-1")
    flags = grpo_flags(sft, tiny_data, run, *FLAGS, *over(server))
    assert main_guard(lambda: run_grpo.main(flags)) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "its log-probabilities are not the policy's" in error
    assert not list(run.glob("checkpoint-*")) and not (run / "vllm").exists()


def fresh_flags(checkpoint: Path, data: Path, run: Path, fake) -> list[str]:
    """Write the command line of a run that begins with an adapter without effect."""
    files = {"train_file": data, "model_name_or_path": checkpoint, "output_dir": run}
    named = [part for name, value in files.items() for part in (f"--{name}", str(value))]
    start = ["--adapter_name_or_path", "none", "--lora_r", "8", "--max_steps", "6", *SFT[:6]]
    return [*named, *start, *GRPO, "--eval_steps", "none", *over(fake)]


def test_a_fresh_adapter_is_compared_again(
    server, tiny_checkpoint, tiny_data, tmp_path, monkeypatch
):
    speak(monkeypatch)
    run = tmp_path / "run"
    flags = fresh_flags(tiny_checkpoint("qwen2_5_vl"), tiny_data, run, server)
    assert run_grpo.main(flags) == 0
    entries = record(run / "config.json")["rollout_servers"]
    assert [(entry["step"], entry["probe"]["adapter_seen"]) for entry in entries] == [
        (0, False),
        (2, True),
    ]
    assert record(run / "last" / "config.json")["rollout_servers"] == entries


def test_a_server_that_ignores_a_fresh_adapter_is_found_out(
    server, tiny_checkpoint, tiny_data, tmp_path, monkeypatch, capsys
):
    """It answers as the base does, which the first adapter does too. The second is trained."""
    speak(monkeypatch)
    run = tmp_path / "run"
    load_instead(server, run / "reference")
    flags = fresh_flags(tiny_checkpoint("qwen2_5_vl"), tiny_data, run, server)
    assert main_guard(lambda: run_grpo.main(flags)) == 1
    said = capsys.readouterr().err
    [error] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert (
        "They are the base's without the adapter" in error and "saved after step 2; go on" in said
    )
    assert [line["step"] for line in train_log(run)] == [1, 2] and not (run / "vllm").exists()


def test_the_end_is_noted_after_all_else(server, tiny_sft_run, tiny_data, tmp_path, monkeypatch):
    """So what is killed before it leaves no folder in a run that has ended."""
    run, there, write = tmp_path / "run", [], engine.run.write_json

    def noted(path, document):
        if path == run / "config.json" and "finished" in document:
            there.append((run / "vllm").exists())
        write(path, document)

    monkeypatch.setattr(engine.run, "write_json", noted)
    short = ["--max_steps", "2", "--eval_steps", "none"]
    assert grpo(tiny_sft_run("qwen2_5_vl"), tiny_data, run, *short, *over(server)) == 0
    assert there == [False] and not server.adapters


def test_the_key_is_sent_and_in_no_file(
    server, tiny_sft_run, tiny_data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("VLLM_API_KEY", "the-secret-key")
    server.api_key = "the-secret-key"
    run, short = tmp_path / "run", ["--max_steps", "2", "--eval_steps", "none"]
    assert grpo(tiny_sft_run("qwen2_5_vl"), tiny_data, run, *short, *over(server)) == 0
    said = capsys.readouterr()
    assert "the-secret-key" not in said.out + said.err
    files = [path for path in run.rglob("*") if path.is_file()]
    assert not [path for path in files if b"the-secret-key" in path.read_bytes()]


def test_the_correction_and_a_condition_on_the_mismatch(
    server, tiny_sft_run, tiny_data, tmp_path, monkeypatch
):
    """A server that is ever less sure than the engine: the weights are cut, and the run stops."""
    speak(monkeypatch)
    run, write = tmp_path / "run", server.write

    def less_sure(body):
        answer = write(body)
        for choice in answer["choices"] if body["n"] == 4 else []:
            for token in choice["logprobs"]["content"]:
                token["logprob"] -= 1.0
        return answer

    server.write = less_sure
    stop = ["--stop_when", "sampling/sampling_logp_difference/mean > 0.9"]
    correction = ["--vllm_importance_sampling_correction"]
    flags = [*FLAGS, *over(server), *stop, *correction]
    assert grpo(tiny_sft_run("qwen2_5_vl"), tiny_data, run, *flags) == 0
    [line] = train_log(run)  # ended by the condition after one step
    assert line["sampling/ratio/mean"] == pytest.approx(2.71828, rel=1e-4)
    assert line["sampling/sampling_logp_difference/mean"] == pytest.approx(1.0, abs=1e-4)
    name = "sampling/importance_sampling_ratio"
    assert [line[f"{name}/{one}"] for one in ("min", "mean", "max")] == [2.0, 2.0, 2.0]
    assert line[f"{name}/share_truncated"] == 1.0
