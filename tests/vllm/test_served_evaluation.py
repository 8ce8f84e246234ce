"""Protect evaluations over HTTP against a real vLLM server of the demo's base.

Checked: what is served has the answers and scores that the engine gives it, without its weights.

Run: see test_served_policy.py
"""

from __future__ import annotations

import pytest

from eval import evaluate
from tests.helpers.runs import lines, record

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]


def test_an_evaluation_over_http_has_the_engines_answers(url, sft_run, loaded, tmp_path):
    both = {
        "engine": ["--adapter_name_or_path", str(sft_run), "--no_bf16"],
        "server": ["--vllm_server_base_url", url, "--model_name_or_path", loaded(sft_run)],
    }
    both["server"] += ["--prompt", "demo", "--max_completion_length", "96"]
    found = {}
    for name, command in both.items():
        shared = ["--data_file", "a=demo:validation-a", "--output_dir", str(tmp_path / name)]
        assert evaluate.main([*command, *shared]) == 0
        rows = lines(tmp_path / name / "predictions-a.jsonl")
        scores = record(tmp_path / name / "scores-a.json")
        found[name] = [(row["id"], row["completion"]) for row in rows], scores["macro"]["f1"]
    assert found["engine"] == found["server"] and len(found["engine"][0]) == 150
