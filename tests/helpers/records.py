"""Hold the smallest config.json and trainer_state.json of a run's checkpoint at step 4."""

from __future__ import annotations

from typing import Any

CONFIG: dict[str, Any] = {
    "script": "grpo",
    "recipe": None,
    "settings": {
        "seed": {"value": 1, "origin": "default"},
        "save_total_limit": {"value": None, "origin": "default"},
    },
    "data": {"train": {"file": "a.jsonl", "sha256": "0" * 64, "images": 3}},
    "bad_images": {"val": [{"id": "1"}]},
    "reference": {"adapter_model.safetensors": "1" * 64},
    "base": {
        "name": "demo",
        "hash": "sample",
        "files": {"config.json": {"bytes": 3, "sha256": "2" * 64}},
    },
    "versions": {"torch": "2"},
}
STATE: dict[str, Any] = {
    "global_step": 4,
    "epoch": 0.5,
    "best_metric": 0.25,
    "best_model_checkpoint": "checkpoint-2",
    "evaluations_without_improvement": 1,
    "num_tokens": 10,
    "evaluated_step": -1,
    "log_history": [{"step": 2, "loss": None}],
    "unlogged_metrics": {"loss": ["mean", [[1.5, 1.0]]]},
}
