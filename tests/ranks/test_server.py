"""Two ranks whose rollouts a server samples: one loads the adapters, each asks for its own prompts.

Run: pytest tests/ranks/test_server.py
"""

from __future__ import annotations

import json

from tests.helpers.adapter_writer import rollout_server
from tests.helpers.runs import adapter, grpo, grpo_flags, largest_difference, lines
from tests.helpers.torchrun import torchrun
from tests.ranks.runs import readable

LOAD = "/v1/load_lora_adapter"
# Rollouts of 4 prompts, for two steps each.
FLAGS = ["--max_steps", "4", "--eval_steps", "none", "--learning_rate", "1e-3"]
ALONE = ["--gradient_accumulation_steps", "2"]


def test_two_ranks_ask_for_their_own_prompts(tiny_sft_run, tiny_data, tiny_checkpoint, tmp_path):
    start, one, two = tiny_sft_run("qwen2_5_vl"), tmp_path / "one", tmp_path / "two"
    with rollout_server(tiny_checkpoint("qwen2_5_vl"), tmp_path) as fake:
        served = ["--use_vllm", "--vllm_server_base_url", fake.url]
        with readable():
            assert grpo(start, tiny_data, one, *FLAGS, *ALONE, *served) == 0
        asked = sorted(body["seed"] for body in fake.bodies())
        fake.requests.clear()
        argv = grpo_flags(start, tiny_data, two, *FLAGS, *served)
        file = tmp_path / "jobs.json"
        job = {
            "name": "two",
            "script": "grpo",
            "argv": argv,
            "rank": 1,
            "fault": "none",
            "mutant": False,
        }
        file.write_text(json.dumps([job]))
        end = torchrun(2, "tests.ranks.runs:several", file, time_limit=280)
        assert end.code == 0 and not end.left, end.told()
        # each prompt once, and each adapter
        assert sorted(body["seed"] for body in fake.bodies()) == asked
        names = [body["lora_name"] for body in fake.bodies(LOAD)]
        assert [name.rpartition("-")[0] for name in names] == ["two-0", "two-2"]
        assert not fake.adapters
    texts = [[row["completion"] for row in lines(run / "completions.jsonl")] for run in (one, two)]
    assert texts[0] == texts[1]
    assert largest_difference(adapter(one), adapter(two)) < 1e-6
