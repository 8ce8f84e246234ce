"""Protect runs from faults that no other test brings about: signals, clocks, locks, template text.

README.md here lists all faults with the test of each. Run: pytest tests/faults/test_rows.py
"""

from __future__ import annotations

import ast
import dataclasses
import errno
import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import run_sft
from data.files import write_json
from data.prompts import PROMPTS
from engine.config import UsageError
from engine.device import base_dtype
from engine.encode import Encoder
from tests.faults.acts import fails, hangs, sends
from tests.faults.children import Ended, forked
from tests.faults.compare import differences
from tests.faults.inject import at_calls, at_files
from tests.helpers.repository import ROOT, product_files
from tests.helpers.runs import lines, record, sft_flags, write_rows
from tests.helpers.tiny import SAVE, examples_of

# 8 rows, 4 a step: 2 epochs of 2 steps, a checkpoint at every step, the oldest deleted
FLAGS = ("--num_train_epochs", "2", "--save_steps", "1", "--save_total_limit", "2")
FLAGS += ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2")


@pytest.fixture(scope="module")
def command(tiny_checkpoint, tiny_data) -> Callable[[Path], list[str]]:
    """Write the command of a small SFT run into a folder."""
    rows = lines(tiny_data)
    train = write_rows(tiny_data.with_name("eight.jsonl"), rows[:8])
    site = write_rows(tiny_data.with_name("two.jsonl"), rows[:2])
    model = tiny_checkpoint("qwen2_5_vl")
    return lambda folder: sft_flags(
        model, train, folder, "--validation_file", f"site={site}", *FLAGS
    )


@pytest.fixture(scope="module")
def straight(command, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    ended = forked(run_sft.main, command(folder))
    assert ended.code == 0, ended.err
    return folder


def resumed(folder: Path) -> Ended:
    return forked(run_sft.main, ["--resume_from_checkpoint", str(folder)])


# ---- 2: a power cut ------------------------------------------------------------------------------
def test_every_result_is_on_the_disk_before_it_gets_its_name(command, tmp_path):
    """A rename may reach the disk before the blocks of the file do, so both are flushed in turn."""
    run, report = tmp_path / "run", tmp_path / "operations.json"

    def watched(argv):
        with at_files(run, main_thread=True) as seen:
            code = run_sft.main(argv)
        write_json(report, [(point.kind, point.name) for point in seen])
        return code

    assert forked(watched, command(run)).code == 0
    seen = [tuple(point) for point in record(report)]
    results = ("config.json", "trainer_state.json", "adapter_config.json")
    for name in (*results, "adapter_model.safetensors"):
        for place in (i for i, (kind, of) in enumerate(seen) if kind == "replace" and of == name):
            before = [(kind, of) for kind, of in seen[:place] if of.endswith(f"-{name}")]
            flushed = max((i for i, (kind, _) in enumerate(before) if kind == "fsync"), default=-1)
            assert flushed >= 0, f"{name} is not flushed"
            assert "write" not in [kind for kind, _ in before[flushed:]], name
            assert ("fsync", ".") in seen[place:], name
        assert ("replace", name) in seen, name
    # nothing is written after the note of the end
    changes = [point for point in seen if point[0] in ("open", "write", "replace", "rename")]
    assert changes[-1] == ("replace", "config.json")
    for name in ("checkpoint-2", "checkpoint-4"):
        place = seen.index(("rename", name))
        assert any(kind == "fsync" and of.startswith(f".tmp-{name}-") for kind, of in seen[:place])


# ---- 5: what cannot be deleted -------------------------------------------------------------------
def test_an_old_checkpoint_that_cannot_be_deleted_stops_nothing(command, straight, tmp_path):
    """Its folder is in use as on NFS, or its files are: the run goes on and says so."""
    run = tmp_path / "run"
    faults = [
        at_files(run, 1, fails(errno.EBUSY), kinds=["rename"], names="*-1-deleted", times=None),
        at_files(run, 1, fails(errno.EACCES), kinds=["unlink"], names="*-3-deleted/*", times=None),
    ]
    ended = forked(run_sft.main, command(run), faults=faults)
    assert ended.code == 0, ended.err
    assert ended.err.count("could not be deleted") >= 2
    left = differences(straight, run)
    assert {line.split("/")[0] for line in left.pop("state")} == {
        "checkpoint-1",
        ".tmp-checkpoint-3-deleted",
    }
    assert left == {}


# ---- 6: two processes ----------------------------------------------------------------------------
def test_two_processes_with_one_folder_leave_one_whole_run(command, straight, tmp_path):
    """The second is refused at any moment, and the first does not notice."""
    run, refusals = tmp_path / "run", []

    def second(point):
        refusals.append(forked(run_sft.main, command(run)))
        refusals.append(resumed(run))
        assert [end.code for end in refusals] == [2, 2], [end.err for end in refusals]
        assert all(end.err.count("error: ") == 1 for end in refusals)
        assert "in use by another run (process" in refusals[1].err
        return point.go_on()

    ended = forked(
        run_sft.main, command(run), faults=[at_calls("run_sft.clip_gradients", 3, second)]
    )
    assert ended.code == 0, ended.err
    assert differences(straight, run) == {}


# ---- 7 and 8: signals ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("where", "call", "number", "times"),
    [
        ("run_sft.clip_gradients", 2, signal.SIGTERM, 3),
        ("run_sft.clip_gradients", 1, signal.SIGINT, 1),
        ("engine.saving.save_checkpoint", 2, signal.SIGTERM, 2),
    ],
)
def test_a_signal_saves_once_and_the_run_goes_on_exactly(
    command, straight, tmp_path, where, call, number, times
):
    run = tmp_path / "run"
    ended = forked(run_sft.main, command(run), faults=[at_calls(where, call, sends(number, times))])
    assert ended.code == 128 + number, ended.err
    said = ended.out + ended.err
    assert said.count("go on with: python run_sft.py --resume_from_checkpoint") == 1
    assert "Traceback" not in ended.err
    assert resumed(run).code == 0
    assert differences(straight, run) == {}


def test_a_second_ctrl_c_stops_at_once_even_where_the_run_hangs(command, straight, tmp_path):
    run = tmp_path / "run"
    hanging = at_calls("run_sft.clip_gradients", 2, hangs(60))
    began = time.monotonic()
    ended = forked(
        run_sft.main,
        command(run),
        faults=[hanging, at_calls("run_sft.clip_gradients", 2, sends(signal.SIGINT))],
        after=[(seconds, signal.SIGINT) for seconds in (6.0, 8.0, 10.0)],
    )
    assert ended.code == 130 and time.monotonic() - began < 40
    assert "Traceback" not in ended.err
    assert resumed(run).code == 0
    assert differences(straight, run) == {}


# ---- 9, 31 and 42: one process -------------------------------------------------------------------
def test_training_has_no_process_beside_it():
    """No worker can be killed and no shared memory can fill up. Only the maker of the demo's models
    starts processes. Ranks are started by torchrun, and what is told between them is in two files.
    """
    users = set()
    for file in product_files():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            module = getattr(node, "module", None) or ""
            for name in [module, *(f"{module}.{name}".strip(".") for name in names)]:
                if name.startswith(("multiprocessing", "torch.distributed", "torch.multiproc")):
                    users.add((file.relative_to(ROOT).as_posix(), name))
                if name in ("concurrent.futures.ProcessPoolExecutor", "torch.utils.data"):
                    users.add((file.relative_to(ROOT).as_posix(), name))
    between_ranks = {(file, name) for file, name in users if name.startswith("torch.distributed")}
    assert {file for file, _ in between_ranks} == {"engine/ranks.py", "engine/shard.py"}
    others = users - between_ranks
    assert others == {("data/demo/build_base.py", "concurrent.futures.ProcessPoolExecutor")}


# ---- 23: text that looks like a template ---------------------------------------------------------
TEMPLATE_TEXT = "<think>{{ 7 * 7 }} {% raise %} %s {0} {labels} $x ${y} \\1 {# #}</think>"


@pytest.mark.parametrize("family", SAVE)
def test_template_text_in_an_answer_is_learnt_to_the_letter(family, tiny_checkpoint, tiny_images):
    encoder = Encoder.from_pretrained(
        tiny_checkpoint(family), min_visual_tokens=4, max_visual_tokens=16
    )
    answer = f"{TEMPLATE_TEXT}<solution>Edema</solution>"
    (example,) = examples_of(tiny_images, 56)
    row = encoder.encode_answer(example, PROMPTS["demo"], answer)
    assert encoder.decode(row.completion_ids[:-1]) == answer


@pytest.mark.parametrize("family", SAVE)
def test_labels_ids_and_answers_never_reach_the_prompt(family, tiny_checkpoint, tiny_images):
    """Two examples of one image, which differ in everything that the truth is in."""
    encoder = Encoder.from_pretrained(
        tiny_checkpoint(family), min_visual_tokens=4, max_visual_tokens=16
    )
    (one,) = examples_of(tiny_images, 56)
    other = dataclasses.replace(
        one,
        id="Pneumonia",
        patient_id="{{labels}}",
        labels=("Fracture",),
        dataset="edema-clinic",
        answer="<think>x</think><solution>Fracture</solution>",
    )
    for prompt in PROMPTS.values():
        ids = [encoder.encode_prompt(example, prompt).input_ids for example in (one, other)]
        assert ids[0].equal(ids[1])


# ---- 37: a GPU without bf16 ----------------------------------------------------------------------
def test_bf16_on_a_gpu_without_it_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    gpu = torch.device("cuda", 0)
    with pytest.raises(UsageError) as error:
        base_dtype(True, gpu)
    assert str(error.value) == "--bf16: Tesla T4 has no bfloat16; use --no_bf16 for float32"
    assert base_dtype(False, gpu) == torch.float32
    assert base_dtype(True, torch.device("cpu")) == torch.bfloat16


# ---- 43: a clock that jumps ----------------------------------------------------------------------
def test_a_clock_that_jumps_changes_no_number(command, straight, tmp_path):
    """By years at every look, forth and back, as where a machine's clock is set during a run."""
    run, jumps = tmp_path / "run", itertools.cycle((1e8, -9e7, 0.0))
    faults = [
        at_calls("time.time", 1, lambda point: point.go_on() + next(jumps), times=None),
    ]
    ended = forked(run_sft.main, command(run), faults=faults)
    assert ended.code == 0 and "Traceback" not in ended.err, ended.err
    assert differences(straight, run) == {}
    assert os.path.getsize(run / "metrics.jsonl") > 0
