"""Protect the number of rows that an evaluation decodes together where no setting says it.

Checked: it is the largest that the forecast allows, a given one stays, a resumed run keeps its own,
and it is written down.

Run: pytest tests/engine/test_eval_batch.py
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch

import engine.fit
import eval.evaluate
import run_grpo
from engine.config import Resolved
from engine.eval_batch import with_eval_batch
from engine.free_memory import Free
from engine.memory import GIB, Forecast
from engine.remedies import Question
from engine.settings import SFTConfig
from tests.helpers.runs import grpo

GPU, CPU = torch.device("cuda"), torch.device("cpu")
EVALUATION = "per_device_eval_batch_size"


@dataclass(frozen=True)
class Settings:
    """Hold the settings that the choice reads."""

    per_device_eval_batch_size: int = 8
    dry_run: bool = False
    resume_from_checkpoint: str | None = None


def resolved(config: Any = None, **origins: str) -> Resolved:
    config = config or Settings()
    return Resolved((config,), {field.name: "default" for field in fields(config)} | origins)


def chosen(given: Resolved, gigabytes: float, device=GPU, phases=("evaluation",)) -> Resolved:
    """Choose for a model of 10 GiB whose rows take a quarter of a GiB each."""

    def forecast(config: Any) -> Forecast:
        rows = config.per_device_eval_batch_size * GIB // 4
        parts = {"base": 8 * GIB, "adapters": GIB, "AdamW": GIB, "KV cache": rows}
        return Forecast({"update": {"base": 10 * GIB}} | dict.fromkeys(phases, parts))

    free = Free(int(gigabytes * GIB), 0, "the test")
    settings, question = with_eval_batch(given, Question(given.configs[0], device, forecast), free)
    assert question.config == settings.configs[0]
    return settings


@pytest.mark.parametrize(
    ("gigabytes", "device", "rows"),
    [
        # 0.9 x 20 - 10 = 8 GiB are 32 rows; of 19 GiB 28.4, and 24 is the multiple of 8 below
        (20, GPU, 32),
        (19, GPU, 24),
        # 0.9 x 12 - 10 = 0.8 GiB are 3 rows, below 8 every number is taken
        (12, GPU, 3),
        # not even one fits, or half of one: whether the run is refused is another question
        (11.2, GPU, 1),
        (9, GPU, 1),
        # 128 rows are 32 GiB, which 0.9 x 46.7 - 10 just holds, and there are never more
        (46.7, GPU, 128),
        (46.6, GPU, 120),
        (200, GPU, 128),
        # on a CPU half of the 8 GiB beside the model
        (20, CPU, 16),
        (200, CPU, 128),
    ],
)
def test_as_many_rows_as_the_forecast_allows(gigabytes, device, rows):
    settings = chosen(resolved(), gigabytes, device)
    assert settings.configs[0].per_device_eval_batch_size == rows
    assert settings.origins[EVALUATION] == "memory forecast"


def test_all_phases_that_it_is_about_have_to_fit():
    assert chosen(resolved(), 20, phases=("validation",)).configs[0] == Settings(32)
    given = resolved()
    assert chosen(given, 20, phases=()) is given  # a run that never evaluates


@pytest.mark.parametrize("origin", ["flag", "recipe demo", "out of memory", "resumed run"])
def test_a_number_that_is_given_stays(origin):
    given = resolved(**{EVALUATION: origin})
    assert chosen(given, 200) is given


def test_a_dry_run_forecasts_no_more_than_the_default():
    """Else its table would call every card too small that is smaller than today's."""
    given = resolved(Settings(dry_run=True))
    assert chosen(given, 200) is given
    assert chosen(given, 12).configs[0].per_device_eval_batch_size == 3


@pytest.mark.parametrize(
    ("origin", "gigabytes", "rows"),
    [("memory forecast", 200, 40), ("memory forecast", 20, 32), ("default", 20, 40)],
)
def test_a_resumed_run_keeps_what_was_chosen_as_long_as_it_fits(
    monkeypatch, origin, gigabytes, rows
):
    record = {"settings": {EVALUATION: {"value": 40, "origin": origin}}}
    monkeypatch.setattr("engine.eval_batch.record_of", {"runs/x": record}.__getitem__)
    given = resolved(Settings(40, False, "runs/x"), **{EVALUATION: "resumed run"})
    assert chosen(given, gigabytes).configs[0].per_device_eval_batch_size == rows


# ---- whole commands ------------------------------------------------------------------------------
def entry(folder) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["settings"][EVALUATION]


def test_a_run_says_it_writes_it_down_and_goes_on_with_it(
    tiny_sft_run, tiny_data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    start, free = tiny_sft_run("qwen2_5_vl"), Free(GIB // 64, 0, "the test")
    monkeypatch.setattr(engine.fit, "free_memory", lambda device: free)
    capsys.readouterr()
    flags = ("--max_steps", "2", "--save_steps", "1", "--validation_file", f"site={tiny_data}")
    assert grpo(start, tiny_data, tmp_path / "run", *flags) == 0
    found = entry(tmp_path / "run")
    assert found["origin"] == "memory forecast" and 1 < found["value"] < 128
    banner = next(line for line in capsys.readouterr().out.splitlines() if EVALUATION in line)
    assert banner.split() == [EVALUATION, str(found["value"]), "memory", "forecast"]

    plenty = replace(free, memory=GIB)  # which holds 128
    monkeypatch.setattr(engine.fit, "free_memory", lambda device: plenty)
    resume = ["--resume_from_checkpoint", str(tmp_path / "run/checkpoint-1")]
    assert run_grpo.main([*resume, "--output_dir", str(tmp_path / "resumed")]) == 0
    assert entry(tmp_path / "resumed") == found
    assert grpo(start, tiny_data, tmp_path / "other", *flags) == 0
    assert entry(tmp_path / "other") == {"value": 128, "origin": "memory forecast"}


def test_an_evaluation_writes_it_down(tiny_checkpoint, tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine.fit, "free_memory", lambda device: Free(GIB, 0, "the test"))
    command = ["--model_name_or_path", str(tiny_checkpoint("gemma3")), "--prompt", "demo"]
    command += ["--data_file", f"site={tiny_data}", "--max_completion_length", "3"]
    for flags, value in (((), (128, "memory forecast")), (("--no_memory_check",), (8, "default"))):
        folder = tmp_path / f"out{len(flags)}"
        assert eval.evaluate.main([*command, *flags, "--output_dir", str(folder)]) == 0
        settings = json.loads((folder / "scores-site.json").read_text())["run"]["settings"]
        assert tuple(settings[EVALUATION].values()) == value


def test_the_default_stands_where_nobody_chooses():
    assert SFTConfig().per_device_eval_batch_size == 8
