"""Run run_sft.py and run_grpo.py on tiny models, read what a run leaves behind, and compare two
runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

# what its pages are made of
from tensorboard.backend.event_processing.plugin_event_accumulator import TENSORS, EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

import run_grpo
import run_sft
from data.files import write_json
from engine.encode import Encoder
from engine.run import TrainerState
from engine.saving import save_final_adapter
from tests.helpers.tiny import SAVE, attach_random_adapter, load, policy_of, save_images

torch.set_num_threads(1)  # the models are so small that threads only cost time
LABELS = ("Edema", "Pneumonia", "Fracture")
DECODE = Encoder.decode  # as it is before `speak`
SFT = [
    "--prompt",
    "demo",
    "--min_visual_tokens",
    "4",
    "--max_visual_tokens",
    "4",
    "--no_bf16",
    "--no_gradient_checkpointing",
    "--max_completion_length",
    "6",
    "--learning_rate",
    "1e-2",
    "--warmup_ratio",
    "0",
    "--save_total_limit",
    "none",
]
GRPO = [
    "--no_bf16",
    "--no_gradient_checkpointing",
    "--max_completion_length",
    "6",
    "--min_length",
    "4",
    "--learning_rate",
    "1e-2",
    "--save_total_limit",
    "none",
    "--num_generations",
    "4",
    "--per_device_train_batch_size",
    "4",
    "--gradient_accumulation_steps",
    "1",
    "--temperature",
    "1.2",
    "--top_p",
    "1",
]


def write_data(folder: Path, count: int = 12) -> Path:
    """Write data.jsonl and its images into `folder`.

    There are two rows a patient, answers of different lengths, and one or two of three labels.
    """
    rows = [
        {
            "id": f"e{i}",
            "patient_id": f"p{i // 2}",
            "image": name,
            "labels": [LABELS[i % 3]] + [LABELS[2]] * (i % 2 and i % 3 < 2),
            "dataset": "site",
            "answer": f"<think>{'x' * (i * i % 19)}</think><solution>{LABELS[i % 3]}</solution>",
        }
        for i, name in enumerate(save_images(folder, count))
    ]
    return write_rows(folder / "data.jsonl", rows)


def save_run(folder: Path, settings: Mapping[str, object]) -> None:
    """Save a base model in folder/base and, as SFT leaves it in folder/run, an adapter of it.

    settings: values that its config.json holds.
    """
    base = load(SAVE["qwen2_5_vl"](folder / "base"))
    run = folder / "run"
    run.mkdir()
    save_final_adapter(run, TrainerState(), policy_of(attach_random_adapter(base, std=1.0), base))
    given = {name: {"value": value, "origin": "flag"} for name, value in settings.items()}
    write_json(run / "config.json", {"script": "sft", "settings": given})


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def overriding(argv: Sequence[str]) -> list[str]:
    """Keep the last of two flags of one name, which a command line may not give twice."""
    given: dict[str, list[str]]
    name, given = "", {"": []}  # what stands before the first flag
    for token in argv:
        if token.startswith("--"):
            name = token.partition("=")[0].removeprefix("--").removeprefix("no_")
            given.pop(name, None)
            given[name] = []
        given[name].append(token)
    return [token for tokens in given.values() for token in tokens]


def sft_flags(
    model: Path, data: Path, output_dir: Path, *more: str, flags: Sequence[str] = ()
) -> list[str]:
    """Write the command line of a small run of run_sft.py. The last of two flags counts."""
    files = [
        "--model_name_or_path",
        str(model),
        "--train_file",
        str(data),
        "--output_dir",
        str(output_dir),
    ]
    return overriding([*files, *SFT, *flags, *more])


def grpo_flags(
    adapter: Path, data: Path, output_dir: Path, *more: str, flags: Sequence[str] = ()
) -> list[str]:
    """Write the command line of a small run of run_grpo.py, from an SFT run."""
    files = [
        "--adapter_name_or_path",
        str(adapter),
        "--train_file",
        str(data),
        "--output_dir",
        str(output_dir),
    ]
    return overriding([*files, *GRPO, *flags, *more])


def sft(model: Path, data: Path, output_dir: Path, *more: str, flags: Sequence[str] = ()) -> int:
    """Return the exit code of run_sft.py. The last of two flags of one name counts."""
    return run_sft.main(sft_flags(model, data, output_dir, *more, flags=flags))


def grpo(adapter: Path, data: Path, output_dir: Path, *more: str, flags: Sequence[str] = ()) -> int:
    """Return the exit code of run_grpo.py, from an SFT run."""
    return run_grpo.main(grpo_flags(adapter, data, output_dir, *more, flags=flags))


def speak(monkeypatch) -> None:
    """Make a random model's completions readable, so that rewards differ in a group.

    The text depends on two of its ids.
    """

    def decode(encoder, ids):
        first, second = ids[0].item(), ids[-1].item()
        if first % 4 == 0:
            return "unreadable"
        labels = ", ".join(sorted({LABELS[first % 3], LABELS[second % 3]}))
        return f"<think>{first}</think><solution>{labels}</solution>"

    monkeypatch.setattr(Encoder, "decode", decode)


# ---- what a run leaves behind --------------------------------------------------------------------
def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def record(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def read_dump(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """Return the tensors and the metadata of a step-<N>.safetensors."""
    with safe_open(path, "numpy") as file:
        names, notes = file.keys(), file.metadata()
        return {name: file.get_tensor(name) for name in names}, {
            name: json.loads(note) for name, note in notes.items() if name != "format"
        }


def train_log(run: Path) -> list[dict]:
    return [line for line in lines(run / "metrics.jsonl") if line["split"] == "train"]


def eval_log(run: Path) -> list[dict]:
    return [line for line in lines(run / "metrics.jsonl") if line["split"] == "eval"]


def validation_log(run: Path) -> list[dict]:
    """Read the lines of SFT's validation, without those of the sets that its end scores."""
    return [line for line in eval_log(run) if "dataset" not in line]


def is_timing(name: str) -> bool:
    """Tell whether a metric is a wall-clock time, which differs between equal runs."""
    return name == "step_time" or name.startswith("time/")


def tensorboard(run: Path) -> dict[str, list[tuple[int, object]]]:
    """Read all that TensorBoard shows of a run: {tag: [(step, value)]} of scalars, images and text.

    Wall-clock times are left out.
    """
    events = EventAccumulator(str(run), size_guidance={TENSORS: 0}).Reload()
    return {
        tag: [
            (event.step, make_ndarray(event.tensor_proto).tolist()) for event in events.Tensors(tag)
        ]
        for tag in events.Tags()[TENSORS]
        if not is_timing(tag.removeprefix("train/"))
    }


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Read every file under a folder, to show that nothing was written."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


# ---- two runs that must be the same --------------------------------------------------------------
def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if not is_timing(key)}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def equal_tensors(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def assert_same_run(one: Path, other: Path) -> None:
    """Check that two runs are equal to the last bit, but for wall-clock times and the settings that
    may change.
    """
    for name in ("metrics.jsonl", "completions.jsonl"):
        if (one / name).exists():
            assert without_times(lines(one / name)) == without_times(lines(other / name)), name
    assert equal_tensors(one / "adapter_model.safetensors", other / "adapter_model.safetensors")
    for link in ("last", "best"):
        assert (one / link).exists() == (other / link).exists(), link
        if (one / link).exists():
            assert (one / link).readlink() == (other / link).readlink(), link
    assert (one / "trainer_state.json").exists()
    for name in (
        "trainer_state.json",
        "last/trainer_state.json",
        "last/optimizer.json",
        "last/rng.json",
        "last/rollout.json",
        "last/rewards.json",
        "last/monitors.json",
    ):
        if (one / name).exists():
            assert without_times(record(one / name)) == without_times(record(other / name)), name
    for name in ("last/adapter_model", "last/optimizer", "last/rng", "last/rollout"):
        if (one / f"{name}.safetensors").exists():
            assert equal_tensors(one / f"{name}.safetensors", other / f"{name}.safetensors"), name
    for path in one.glob("predictions-*.jsonl"):
        assert lines(path) == lines(other / path.name), path.name
    assert not list(other.glob("*.partial.jsonl")) and not list(other.glob(".tmp-*"))
