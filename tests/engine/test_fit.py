"""Protect what is done with the memory forecast before weights are read.

Checked: the sampler's copies are left out where they do not fit, a run that cannot fit is refused
with a flag and a number that then does fit, and nothing is refused without need.

Run: pytest tests/engine/test_fit.py
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields, replace

import pytest
import torch

import engine.base_model
import engine.fit
import engine.generate
import engine.remedies
import engine.workload
import eval.decode
import eval.evaluate
import run_grpo
from engine.config import Resolved, UsageError
from engine.device import computes_bf16, slow_bf16
from engine.fit import Lengths, training_work
from engine.free_memory import Free
from engine.memory import (
    COPIES,
    GIB,
    KEPT,
    Forecast,
    ModelShape,
    Workload,
    forecast,
    lora_parameters,
)
from engine.out_of_memory import EVALUATION
from engine.ranks import Ranks
from engine.remedies import Question, certain, largest
from engine.sampling_layers import sampling_layers
from engine.settings import SFTConfig
from rl.plan import BatchPlan
from rl.settings import GRPOConfig
from tests.helpers.runs import grpo, sft

CPU = torch.device("cpu")
# Qwen2.5-VL-3B's published sizes: its weights take 3,754,622,976 x 4 bytes = 13.99 GiB in fp32.
QWEN_3B = ModelShape(
    3_754_622_976, 2048, 36, 16, 2, 128, 11_008, 151_936, 2, False, None, False, 1280, 3420, 4, 1176
)
LENGTHS = Lengths(text=300, image=256, answer=200)


@pytest.mark.parametrize("votes", [True, False])
def test_a_vote_of_the_start_draws_answers(votes):
    config = GRPOConfig(bf16=False, vote_baseline=votes)
    work = training_work(config, QWEN_3B, LENGTHS, CPU, 16, BatchPlan.of(config))
    assert work.eval_sampled is votes


def question(config, device: torch.device = CPU, shape: ModelShape = QWEN_3B) -> Question:
    """Ask of a run of SFT, or of GRPO with its rollouts."""
    plan = BatchPlan.of if isinstance(config, GRPOConfig) else None

    def forecast_of(changed) -> Forecast:
        of_run = None if plan is None else plan(changed)
        return forecast(shape, training_work(changed, shape, LENGTHS, device, 16, of_run))

    def allowed(changed) -> bool:
        return plan is None or not plan(changed).problems()

    return Question(config, device, forecast_of, allowed)


def free(gigabytes: float, swap: float = 0.0) -> Free:
    return Free(int(gigabytes * GIB), int(swap * GIB), "the test")


# ---- arithmetic ----------------------------------------------------------------------------------
def test_what_is_certain_of_a_phase_by_hand():
    # what is held is exact, of the rest four fifths
    parts = {"base": 100, "adapters": 10, "AdamW": 20, "gradients": 5, "KV cache": 50, COPIES: 50}
    assert certain(parts) == 135 + 80
    # what a rollout keeps for the next can be given up
    assert certain(parts | {KEPT: 1000}) == 135 + 80


@pytest.mark.parametrize(("most", "limit", "found"), [(7, 100, 7), (0, 100, 0), (200, 100, 100)])
def test_the_largest_number_that_fits(most, limit, found):
    assert largest(lambda n: n <= most, limit) == found


def test_the_copies_of_the_3b_model_in_fp32_do_not_fit_into_24_gigabytes():
    """36 layers x 2048 x (2 x 2048 + 2 x 256 + 3 x 11008) + a head of 151936 x 2048, 4 bytes."""
    config = SFTConfig(bf16=False)
    asked = question(config)
    parts = asked.forecast(config).phases["evaluation"]
    copies = 4 * (36 * 2048 * (2 * 2048 + 2 * 256 + 3 * 11_008) + 151_936 * 2048)
    assert parts[COPIES] == copies and 10 * GIB < copies < 12 * GIB
    smaller = engine.fit.without_copies(asked, free(22))
    assert smaller is not None and smaller.config == replace(config, sampling_copies=False)
    assert (
        COPIES not in smaller.forecast(smaller.config).phases["evaluation"]
        or not (smaller.forecast(smaller.config).phases["evaluation"][COPIES])
    )
    assert smaller.problems(free(22)) == []
    assert engine.fit.without_copies(asked, free(40)) is None
    assert engine.fit.without_copies(question(SFTConfig()), free(22)) is None  # bf16 copies nothing


def test_a_phase_is_refused_only_where_it_cannot_fit():
    config = SFTConfig(bf16=False, sampling_copies=False)
    asked = question(config)
    parts = asked.forecast(config).phases["update"]
    least = certain(parts) / GIB
    assert not [line for line in asked.problems(free(least + 0.01)) if " update " in line]
    assert [
        line for line in asked.problems(free(least - 0.01)) if line.startswith("memory: update")
    ]
    # swap keeps a process alive
    assert not [line for line in asked.problems(free(least - 1, swap=1.01)) if " update " in line]


@pytest.mark.parametrize(
    ("config", "gigabytes", "phase"),
    [
        (SFTConfig(bf16=False, sampling_copies=False, per_device_eval_batch_size=512), 24, "eval"),
        (SFTConfig(gradient_checkpointing=False, per_device_train_batch_size=64), 16, "update"),
        (GRPOConfig(per_device_train_batch_size=64, steps_per_generation=64), 16, "rollout"),
        (GRPOConfig(per_device_train_batch_size=90, num_generations=6), 9, "rollout"),
    ],
)
def test_the_flag_that_is_named_makes_the_phase_fit(config, gigabytes, phase):
    asked, there = question(config), free(gigabytes)
    line = next(line for line in asked.problems(there) if line.startswith(f"memory: {phase}"))
    advice = re.findall(r"--(\w+)(?: (\d+))?", line)
    assert advice and line.endswith(" would fit")
    for name, number in advice:
        changed = replace(config, **{name: int(number) if number else True})
        full = phase if phase != "eval" else "evaluation"
        assert sum(asked.forecast(changed).phases[full].values()) <= 0.9 * there.memory
        assert asked.allowed(changed)
        if number:  # and the next one that the batches allow does not fit
            value = int(number) + 1
            while not asked.allowed(replace(config, **{name: value})):
                value += 1
            larger = replace(config, **{name: value})
            assert sum(asked.forecast(larger).phases[full].values()) > 0.9 * there.memory


def test_nothing_is_refused_or_made_smaller_for_what_rollouts_keep(monkeypatch):
    monkeypatch.setattr(engine.workload, "base_dtype", lambda *_: torch.bfloat16)
    # 15 completions of a prompt, decoded together, and updates of one completion each
    config = GRPOConfig(per_device_train_batch_size=1, steps_per_generation=240, num_generations=15)
    asked = question(config, torch.device("cuda"))
    parts = asked.forecast(config).phases["update"]
    needed = sum(size for name, size in parts.items() if name != KEPT)
    assert parts[KEPT] > 5 * GIB and needed < 9 * GIB
    lines = asked.problems(free(9))
    assert lines and not [line for line in lines if " update " in line]
    # An update that must be refused fits with this flag, if it does without what is kept.
    large = replace(
        config,
        gradient_checkpointing=False,
        per_device_train_batch_size=30,
        steps_per_generation=8,
    )
    asked = question(large, torch.device("cuda"))
    line = next(line for line in asked.problems(free(12)) if line.startswith("memory: update"))
    assert line.endswith(": --gradient_checkpointing would fit") and KEPT not in line
    smaller = replace(large, gradient_checkpointing=True)
    assert sum(asked.forecast(smaller).phases["update"].values()) > 15 * GIB


def test_a_base_that_is_too_large_is_said_to_be():
    lines = question(SFTConfig(bf16=False)).problems(free(10))
    assert len(lines) == 3  # one a phase
    assert all("the base model alone takes 13.99 GiB; " in line for line in lines)
    assert re.match(
        r"memory: update needs \d+\.\d\d GiB \(base 13.99, .*\) and 10.00 GiB are free \(the test",
        lines[0],
    )


def test_bf16_is_advised_where_the_device_computes_it(monkeypatch):
    asked = question(SFTConfig(bf16=False))
    monkeypatch.setattr(engine.remedies, "computes_bf16", lambda device: False)
    assert asked.problems(free(10))[0].endswith("; take a smaller model, or free memory")
    monkeypatch.setattr(engine.remedies, "computes_bf16", lambda device: True)
    assert asked.problems(free(10))[0].endswith("; --bf16 would fit")


def test_adapters_and_moments_are_among_what_is_exact():
    parts = question(GRPOConfig()).forecast(GRPOConfig()).phases["update"]
    adapter = 4 * lora_parameters(QWEN_3B, 16)
    assert (parts["adapters"], parts["AdamW"], parts["gradients"]) == (
        2 * adapter,
        2 * adapter,
        adapter,
    )


# ---- bf16 on a CPU -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("processor : 0\nflags : fpu avx2 avx512f avx512_bf16\n", True),
        ("processor : 0\nflags : fpu avx2 avx512f\n", False),
        ("processor : 0\nFeatures : fp asimd bf16\n", True),
        ("processor : 0\nFeatures : fp asimd\n", True),  # nothing certain: nothing is said
    ],
)
def test_a_cpu_that_only_imitates_bf16_is_told_by_its_flags(text, has, tmp_path):
    (tmp_path / "cpuinfo").write_text(text)
    assert computes_bf16(CPU, tmp_path / "cpuinfo") is has
    assert computes_bf16(CPU, tmp_path / "missing") is True


def test_bf16_on_such_a_cpu_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr("engine.device.computes_bf16", lambda device: False)
    assert "0.3 to 9 GFLOP/s there, against 60 in float32; --no_bf16" in slow_bf16(True, CPU)
    assert slow_bf16(False, CPU) is None and slow_bf16(True, torch.device("cuda")) is None


# ---- whole commands ------------------------------------------------------------------------------
def test_a_run_that_cannot_fit_is_refused_before_weights_are_read(
    tiny_checkpoint, tiny_data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine.fit, "free_memory", lambda device: Free(100_000, 0, "the test"))
    monkeypatch.setattr(
        engine.base_model.AutoModelForImageTextToText,
        "from_pretrained",
        lambda *_, **__: pytest.fail("weights were read"),
    )
    with pytest.raises(UsageError) as error:
        sft(tiny_checkpoint("qwen2_5_vl"), tiny_data, tmp_path / "run", "--dry_run")
    assert [line.partition(" needs ")[0] for line in error.value.problems] == [
        "memory: update",
        "memory: validation",
        "memory: evaluation",
    ]
    assert "; --no_memory_check tries it all the same" in error.value.problems[-1]
    assert "forecast in GiB" in capsys.readouterr().out  # a dry run shows the table all the same
    assert not (tmp_path / "run").exists()


def test_a_run_without_copies_says_so_and_resumes_so(
    tiny_sft_run, tiny_data, tmp_path, monkeypatch, capsys
):
    """Where memory is short, but for swap, a run does without copies, wherever it is resumed."""
    monkeypatch.chdir(tmp_path)
    start = tiny_sft_run("qwen2_5_vl")
    copied, short, plenty = [], Free(1_000_000, GIB, "the test"), Free(GIB, 0, "the test")

    def layers(net, *, copies, kind, placed):
        copied.append(copies)
        return sampling_layers(net, copies=copies, kind=kind, placed=placed)

    monkeypatch.setattr(engine.generate, "sampling_layers", layers)
    monkeypatch.setattr(engine.fit, "free_memory", lambda device: short)
    flags = ("--max_steps", "3", "--save_steps", "2")  # the third step begins a rollout
    assert grpo(start, tiny_data, tmp_path / "run", *flags) == 0
    said = capsys.readouterr().err
    assert said.count("are sampled without them, the same but for rounding") == 1
    entry = json.loads((tmp_path / "run/config.json").read_text())["settings"]["sampling_copies"]
    assert entry == {"value": False, "origin": "memory forecast"}
    assert copied and not any(copied)

    copied.clear()
    monkeypatch.setattr(engine.fit, "free_memory", lambda device: plenty)
    resume = ["--resume_from_checkpoint", str(tmp_path / "run/checkpoint-2")]
    assert run_grpo.main([*resume, "--output_dir", str(tmp_path / "resumed")]) == 0
    assert copied and not any(copied)
    assert adapter(tmp_path / "resumed") == adapter(tmp_path / "run")

    copied.clear()
    assert grpo(start, tiny_data, tmp_path / "other", *flags) == 0
    assert copied and all(copied)


def test_a_run_without_evaluated_sets_is_not_measured_by_an_evaluation(
    tiny_sft_run, tiny_data, tmp_path, monkeypatch, capsys
):
    """4096 rows at a time would take 1.2 GiB, and a run that never evaluates takes none of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine.fit, "free_memory", lambda device: Free(GIB // 2, 0, "the test"))
    start, flags = tiny_sft_run("qwen2_5_vl"), ("--per_device_eval_batch_size", "4096", "--dry_run")
    flags = (*flags, "--max_completion_length", "512")
    assert grpo(start, tiny_data, tmp_path / "run", *flags) == 0
    capsys.readouterr()
    evaluated = (*flags, "--validation_file", f"site={tiny_data}")
    with pytest.raises(UsageError, match="memory: evaluation needs"):
        grpo(start, tiny_data, tmp_path / "run", *evaluated)


def adapter(folder) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_an_evaluation_is_fitted_too(tiny_checkpoint, tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name, data = str(tiny_checkpoint("gemma3")), f"site={tiny_data}"
    command = ["--model_name_or_path", name, "--data_file", data, "--max_completion_length", "3"]
    command += ["--output_dir", str(tmp_path / "out"), "--max_samples", "2", "--prompt", "demo"]
    monkeypatch.setattr(engine.fit, "free_memory", lambda device: Free(10_000, 0, "the test"))
    assert eval.evaluate.main(command) == 2
    error = capsys.readouterr().err
    assert "error: memory: evaluation needs 0.0" in error
    assert not (tmp_path / "out").exists()
    assert eval.evaluate.main([*command, "--no_memory_check"]) == 0


def test_grpo_evaluates_as_many_rows_together_as_the_forecast_allows(
    tiny_sft_run, tiny_data, tmp_path, monkeypatch, capsys
):
    """128, the most, fit in 1 GiB: what config.json says is what the run does."""
    monkeypatch.setattr(engine.fit, "free_memory", lambda device: Free(GIB, 0, "the test"))
    rows = []

    def noted(*args, max_rows, **keywords):
        rows.append(max_rows)
        return engine.generate.generate(*args, max_rows=max_rows, **keywords)

    monkeypatch.setattr(eval.decode, "generate", noted)
    flags = ("--validation_file", f"site={tiny_data}", "--max_steps", "1")
    assert grpo(tiny_sft_run("gemma3"), tiny_data, tmp_path / "run", *flags) == 0
    entry = json.loads((tmp_path / "run/config.json").read_text())["settings"][EVALUATION]
    assert entry == {"value": 128, "origin": "memory forecast"}
    assert rows
    assert set(rows) == {128}


def test_the_cache_is_counted_with_the_deepstack_features_of_qwen3_vl():
    """10 images of 256 tokens x 2048 numbers x 2 bytes are 10 MiB, with 3 x as much deepstack 40.

    There is room for 20 MiB.
    """
    origins = dict.fromkeys((field.name for field in fields(SFTConfig)), "default")
    resolved = Resolved((SFTConfig(),), origins)

    def kept(shape: ModelShape) -> float:
        fitting = engine.fit._with_room_for_images(resolved, shape, LENGTHS, 10, 20 * 2**20)
        return fitting.configs[0].vision_cache_gb

    assert kept(QWEN_3B) == 4.0
    assert kept(replace(QWEN_3B, extra_features=3)) == 0.0


def test_where_nothing_tells_what_is_free_nothing_is_refused(
    tiny_checkpoint, tiny_data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine.fit, "free_memory", lambda device: None)
    assert sft(tiny_checkpoint("gemma3"), tiny_data, tmp_path / "run", "--dry_run") == 0
    assert "memory:" not in capsys.readouterr().err


def test_the_cache_of_image_features_takes_what_is_left(
    tiny_checkpoint, tiny_data, tmp_path, monkeypatch, capsys
):
    """12 images of 4 tokens x 32 numbers x 4 bytes are 6,144 bytes, more than the 0 left here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine.fit, "free_on_host", lambda: Free(1000, 0, "the test"))
    start = sft(tiny_checkpoint("qwen2_5_vl"), tiny_data, tmp_path / "run", "--dry_run")
    printed = capsys.readouterr()
    assert start == 0 and "note: 0.0 GB of host memory are left for image features" in printed.err
    assert "vision_cache_gb" in printed.out and "memory forecast" in printed.out
    # a flag's word is not changed
    flags = ("--dry_run", "--vision_cache_gb", "4")
    assert sft(tiny_checkpoint("qwen2_5_vl"), tiny_data, tmp_path / "run", *flags) == 0
    assert "image features" not in capsys.readouterr().err


# ---- where no cut makes a row fit ----------------------------------------------------------------
@pytest.mark.parametrize(
    ("config", "work", "flags"),
    [
        (
            SFTConfig(gradient_checkpointing=False),
            "update",
            ["gradient_checkpointing"],  # an image of 256 tokens is the smallest
        ),
        (GRPOConfig(max_completion_length=8192), "update", ["max_completion_length"]),
        (SFTConfig(bf16=False), "evaluation", ["no_sampling_copies", "bf16"]),
    ],
)
def test_the_last_advice_names_what_a_single_row_would_need(monkeypatch, config, work, flags):
    monkeypatch.setattr(engine.remedies, "computes_bf16", lambda device: True)
    monkeypatch.setattr(engine.remedies, "free_memory", lambda device: free(5))
    asked = question(config)
    line = asked.last_advice(work)
    single = {"max_tokens_per_forward": 1, "per_device_eval_batch_size": 1}
    if isinstance(config, GRPOConfig):
        single["sampling_batch_size"] = 1
    alone = replace(config, **single)
    parts = asked.forecast(alone).phases[work]
    room = 5 * GIB + sum(parts[name] for name in ("base", "adapters", "AdamW"))
    found = re.findall(r"--(\w+)(?: (\d+))? would need (\d+\.\d\d) GiB", line)
    assert set(flags) <= {name for name, _, _ in found}
    assert line.endswith(f" of the {room / GIB:.2f} GiB that are free (the test)")
    for name, number, gigabytes in found:
        value = int(number) if number else not name.startswith("no_")
        needed = total_of(asked, replace(alone, **{name.removeprefix("no_"): value}), work)
        assert gigabytes == f"{needed / GIB:.2f}"
        assert needed <= min(0.9 * room, certain(parts))


def total_of(asked: Question, config, phase: str) -> int:
    return sum(asked.forecast(config).phases[phase].values())


def test_the_last_advice_without_a_setting_to_lower(monkeypatch):
    monkeypatch.setattr(engine.remedies, "free_memory", lambda device: None)
    asked = question(SFTConfig())
    assert re.fullmatch(
        r"the forecast for a single row is \d+\.\d\d GiB; take a smaller model, or free memory",
        asked.last_advice("vision tower"),
    )


def test_the_last_advice_never_hides_the_error():
    def fails():
        raise MemoryError

    assert engine.fit._advice("update", fails) == "" == engine.fit._advice("update", lambda: None)


@pytest.mark.parametrize(
    ("rows", "together"),
    [(None, (4, 6)), (24, (4, 6)), (12, (2, 6)), (5, (1, 3)), (2, (1, 2)), (1, (1, 1))],
)
def test_a_rollout_is_sampled_in_whole_groups_while_they_fit(rows, together):
    """4 prompts of 6 completions: 5 rows are parts of 3, since 6 falls into 3 and 3."""
    work = Workload(
        element_size=4,
        device="cpu",
        lora_r=4,
        lora_dropout=0.0,
        adapters=2,
        gradient_checkpointing=False,
        prompt_length=10,
        image_tokens=4,
        completion_length=5,
        max_completion_length=5,
        micro_batch=2,
        eval_rows=2,
        rollout_prompts=4,
        num_generations=6,
        sampling_rows=rows,
    )
    assert work.sampled() == together


# ---- several ranks -------------------------------------------------------------------------------
class TwoRanks(Ranks):
    """Stand for one of two ranks of a node. others: what the other has free."""

    def __init__(self, rank: int, other: Free | None, told: list):
        super().__init__()
        self.rank, self.size, self.first, self.local_size = rank, 2, rank == 0, 2
        self.other, self.told = other, told

    def gather(self, value):
        other = {} if self.other is None else asdict(self.other)
        return [value, other] if self.first else [other, value]

    def on_first(self, function):
        if self.first:
            self.told[:] = json.loads(json.dumps(function()))
        return self.told


def test_all_ranks_decide_by_the_one_that_has_least_free(monkeypatch):
    """The copies take 11.1 GiB. They fit into 40 GiB of one GPU, not into 22 of the other."""
    origins = dict.fromkeys((field.name for field in fields(SFTConfig)), "default")
    config = SFTConfig(bf16=False, validation_file=("a=b",), sampling_product="torch")
    resolved, gpu, told = Resolved((config,), origins), torch.device("cuda"), []
    known = engine.fit.Known(question(config, CPU), QWEN_3B, LENGTHS, 10)
    asked = []
    monkeypatch.setattr(
        engine.fit, "_of_training", lambda *arguments: asked.append(arguments) or known
    )
    monkeypatch.setattr(engine.fit, "base_dtype", lambda bf16, device: torch.float32)

    def settled(rank: int, own: float, other: float | None, device=gpu) -> Resolved:
        monkeypatch.setattr(engine.fit, "free_memory", lambda device: free(own))
        ranks = TwoRanks(rank, None if other is None else free(other), told)
        return engine.fit.fitted(resolved, device, [], {}, None, ranks=ranks)

    for own, other in ((40, 22), (22, 40)):
        first = settled(0, own, other)
        assert first.configs[0].sampling_copies is False
        assert first.origins["sampling_copies"] == "memory forecast"
        assert settled(1, other, own) == first
    # rank 0 alone computes the forecast, for the two ranks of this node
    assert len(asked) == 2 and {arguments[-1] for arguments in asked} == {2}
    both = settled(0, 40, 40)
    assert both == settled(1, 40, 40) and both.configs[0].sampling_copies is True
    # and in an evaluation each decodes as many rows as fit on the one that has least
    assert settled(0, 40, 36) == settled(1, 36, 40)
    rows = [
        settled(0, *there).configs[0].per_device_eval_batch_size for there in ((40, 36), (36, 36))
    ]
    assert rows[0] == rows[1] < both.configs[0].per_device_eval_batch_size
    # where one of them cannot tell, nothing is said
    assert settled(0, 22, None) == resolved
    # processes on the CPUs of a node share what is free there: 22 of 44 GiB
    assert settled(0, 80, 80, CPU).configs[0].sampling_copies is True
    assert settled(0, 44, 80, CPU).configs[0].sampling_copies is False
