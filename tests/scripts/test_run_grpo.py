"""Protect run_grpo.py as a whole, on both model families.

Checked: the eight blocks leave what they should, the first update of a rollout has ratio exactly 1,
micro-batches do not change an update, every setting acts, the best checkpoint is the chosen one.

Run: pytest tests/scripts/test_run_grpo.py
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import rl.rollout
import run_grpo
from data.predictions import read_predictions
from engine.charts import sft_charts
from engine.config import UsageError
from engine.policy import Policy
from eval.end_table import stage_title
from eval.folders import load_entry
from eval.scores import score
from eval.since_start import SinceStart
from eval.votes import vote_predictions
from rl.logs import grpo_charts
from rl.objective import ObjectiveConfig
from rl.plan import BatchPlan
from rl.reward_choice import REGISTERED
from rl.settings import (
    BY_HOSPITAL,
    GAPS,
    SET_METRICS,
    GRPOConfig,
    resolve_grpo,
)
from tests.helpers.adapters import write_adapter
from tests.helpers.repository import ROOT
from tests.helpers.runs import (
    adapter,
    equal_tensors,
    eval_log,
    grpo,
    largest_difference,
    lines,
    record,
    speak,
    tensorboard,
    train_log,
)

FAMILIES = ["qwen2_5_vl", "gemma3"]
TRL_NAMES = {
    "loss",
    "grad_norm",
    "learning_rate",
    "num_tokens",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "kl",
    "entropy",
    "rewards/hard/mean",
    "rewards/hard/std",
    "rewards/nuanced/mean",
    "rewards/nuanced/std",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/clipped_ratio",
    "clip_ratio/low_mean",
    "clip_ratio/low_min",
    "clip_ratio/high_mean",
    "clip_ratio/high_max",
    "clip_ratio/region_mean",
    "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max",
}


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def readable(monkeypatch):
    speak(monkeypatch)


@pytest.fixture(scope="module", params=FAMILIES)
def finished(request, tmp_path_factory, tiny_sft_run, tiny_data):
    """Make (GRPO run, its SFT run).

    It has two rollouts of 2 prompts x 4 completions, two updates each, and two sites.
    """
    run = tmp_path_factory.mktemp("grpo") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        speak(monkeypatch)
        # Greedy answers of a random model hardly differ; scripted scores tell the checkpoints
        # apart. Site a is best at step 2.
        evaluate, scores = run_grpo.evaluate_policy, iter([(0.25, 0.5), (0.75, 0.25), (0.5, 0.125)])

        def scripted(*arguments):
            metrics = evaluate(*arguments)
            for name, score in zip(("a", "b"), next(scores), strict=True):
                metrics[name]["macro_f1"] = score
            return metrics

        monkeypatch.setattr(run_grpo, "evaluate_policy", scripted)
        assert (
            grpo(
                tiny_sft_run(request.param),
                tiny_data,
                run,
                "--max_steps",
                "4",
                "--seed",
                "1",
                "--validation_file",
                f"a={tiny_data}",
                f"b={tiny_data}",
                "--eval_steps",
                "2",
                "--save_steps",
                "1",
            )
            == 0
        )
    return run, tiny_sft_run(request.param)


def test_a_run_leaves_a_complete_folder(finished):
    run, _ = finished
    names = {path.name for path in run.iterdir() if not path.name.startswith("events.out.tfevents")}
    assert names >= {
        "config.json",
        "trainer_state.json",
        "metrics.jsonl",
        "completions.jsonl",
        "adapter_model.safetensors",
        "adapter_config.json",
        "best",
        "last",
        "reference",
        "README.md",
        "predictions-a.jsonl",
        "scores-a.json",
        "predictions-b.jsonl",
        "scores-b.json",
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-4",
    }
    assert not [
        name for name in names if name.startswith(".tmp-") or name.endswith(".partial.jsonl")
    ]
    assert {path.name for path in (run / "checkpoint-3").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "optimizer.safetensors",
        "optimizer.json",
        "rng.safetensors",
        "rng.json",
        "rollout.safetensors",
        "rollout.json",
        "rewards.json",
        "monitors.json",
        "trainer_state.json",
        "config.json",
        "manifest.json",
    }
    # Only between the two updates of a rollout is there a rollout to keep.
    assert [len(record(run / f"checkpoint-{step}/rollout.json")) for step in (1, 2, 3, 4)] == [
        8,
        0,
        8,
        0,
    ]


def test_without_an_adapter_the_newest_sft_run_of_the_recipes_base_goes_on(tmp_path, monkeypatch):
    """Of three finished runs the newest has another base; the recipe's base, not the date alone,
    decides.
    """
    monkeypatch.chdir(tmp_path)
    for day, base in enumerate(("demo", "demo", "elsewhere/model"), start=1):
        run = tmp_path / f"runs/2026010{day}-000000-sft"
        write_adapter(run, base_model_name_or_path=base)
        (run / "config.json").write_text("{}")
    chosen = resolve_grpo(["--recipe", "demo"])
    assert chosen.configs[0].adapter_name_or_path == "runs/20260102-000000-sft"
    assert chosen.origins["adapter_name_or_path"] == "newest SFT run of demo"
    (tmp_path / "any.toml").write_text('prompt = "demo"\ntrain_file = "demo:rl-train"\n')
    chosen = resolve_grpo(["--recipe", "any.toml"]).configs[0]
    assert (chosen.adapter_name_or_path, chosen.model_name_or_path) == (
        "runs/20260103-000000-sft",
        "elsewhere/model",
    )


def test_config_json_has_both_config_classes_the_data_and_the_reference(finished, tiny_data):
    run, sft_run = finished
    config = record(run / "config.json")
    assert set(config["settings"]) == {
        field.name for owner in (GRPOConfig, ObjectiveConfig) for field in fields(owner)
    }
    assert config["settings"]["adapter_name_or_path"] == {"value": str(sft_run), "origin": "flag"}
    assert config["settings"]["prompt"] == {"value": "demo", "origin": "adapter's run"}
    assert config["settings"]["beta"] == {"value": 0.15, "origin": "default"}
    digest = hashlib.sha256(tiny_data.read_bytes()).hexdigest()
    assert {name: entry["sha256"] for name, entry in config["data"].items()} == {
        "train": digest,
        "a": digest,
        "b": digest,
    }
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (run / "reference" / name).read_bytes() == (sft_run / name).read_bytes()
        assert (
            config["reference"][name] == hashlib.sha256((sft_run / name).read_bytes()).hexdigest()
        )


def test_every_rollout_row_is_kept_with_all_rewards(finished, tiny_data):
    run, _ = finished
    rows, examples = lines(run / "completions.jsonl"), {row["id"]: row for row in lines(tiny_data)}
    assert [row["step"] for row in rows] == [1] * 8 + [3] * 8
    assert [row["group"] for row in rows] == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4
    assert len({row["id"] for row in rows}) == 4  # four prompts of one epoch, each once
    for row in rows:
        example = examples[row["id"]]
        assert (row["image"], sorted(row["labels"])) == (
            example["image"],
            sorted(set(example["labels"])),
        )
        assert list(row["rewards"]) == ["hard", "nuanced", "weighted", "fbeta"]
        assert set(row["rewards"]["hard"]) == {"total", "jaccard", "length"}
        assert set(row["rewards"]["nuanced"]) == {
            "total",
            "match",
            "partial",
            "false_positive",
            "collapse",
            "format",
        }
        assert set(row["rewards"]["weighted"]) == {"total", "weighted_jaccard"}
        assert set(row["rewards"]["fbeta"]) == {"total", "right", "wrong", "unknown", "format"}
        for reward in row["rewards"].values():
            assert sum(value for name, value in reward.items() if name != "total") == pytest.approx(
                reward["total"], abs=1e-9
            )
        assert row["reward"] == row["rewards"]["hard"]["total"]
        overlap = len(set(row["predicted"]) & set(example["labels"])) / len(
            set(row["predicted"]) | set(example["labels"])
        )
        assert row["rewards"]["hard"]["jaccard"] == pytest.approx(overlap if row["valid"] else 0.0)
    for start in (0, 4, 8, 12):
        group = rows[start : start + 4]
        mean = sum(row["reward"] for row in group) / 4
        assert [row["advantage"] for row in group] == pytest.approx(
            [row["reward"] - mean for row in group], abs=1e-12
        )
    # the test would say nothing on equal rewards
    assert len({row["advantage"] for row in rows}) > 2


def test_metrics_have_trls_names_and_a_rollout_is_logged_once(finished):
    first, second, third, fourth = train_log(finished[0])
    assert first.keys() >= TRL_NAMES
    assert "reward" in third and "reward" not in second and "reward" not in fourth
    assert {"loss", "grad_norm", "kl", "ratio/min"} <= second.keys()
    rows = lines(finished[0] / "completions.jsonl")
    assert third["reward"] == pytest.approx(sum(row["reward"] for row in rows[8:]) / 8)
    # So far, as in TRL: of every completion, its prompt's tokens and its own. All prompts have the
    # same instruction and as many tokens of an image.
    completions = [row["completion_length"] for row in rows]
    prompts = second["num_tokens"] - sum(completions[:8])
    assert prompts > 0 and prompts % 8 == 0
    assert third["num_tokens"] == 2 * prompts + sum(completions)


def listed_metrics(*scripts: str) -> set[str]:
    """Read the metrics of these scripts from the table of rl/README.md."""
    page = (ROOT / "rl/README.md").read_text(encoding="utf-8")
    table = page.split("| metric | script | definition | unit | in TRL |\n")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()[1:]]
    assert all(len(row) == 7 and row[3] and row[5] for row in rows)  # a definition, and TRL's
    return {name for row in rows if row[2] in scripts for name in re.findall("`(.+?)`", row[1])}


def logged_metrics(run: Path) -> set[str]:
    """Gather the names of all that a run has logged, as the table writes them."""
    found = set()
    for entry in lines(run / "metrics.jsonl"):
        prefix = {"train": "", "eval": "eval/"}[entry["split"]]
        prefix += "<set>/" if "dataset" in entry else ""
        for name in entry.keys() - {"step", "epoch", "split", "dataset"}:
            name = re.sub(r"rewards/\w+/(?!mean|std)\w+", "rewards/<reward>/<part>", name)
            found.add(prefix + re.sub(r"rewards/\w+/", "rewards/<reward>/", name))
    return found


def test_the_table_of_metrics_is_what_a_run_logs(finished):
    grpo_run, sft_run = finished
    # a tiny run is over before its monitors say anything: test_monitors.py holds their names.
    # A random model may end no completion by itself
    unseen = {f"completions/{kind}_terminated_length" for kind in ("mean", "min", "max")}
    unseen.add("monitors/...")
    # with --vllm_importance_sampling_correction alone: test_objective.py holds these names
    truncated = "sampling/importance_sampling_ratio"
    unseen |= {f"{truncated}/{one}" for one in ("min", "mean", "max", "share_truncated")}
    # this run has one hospital: test_several_hospitals.py holds the names of several
    unseen |= {f"{name}/<hospital>" for name in BY_HOSPITAL}
    assert logged_metrics(grpo_run) | unseen == listed_metrics("both", "GRPO")
    assert logged_metrics(sft_run) == listed_metrics("both", "SFT")


def test_every_curve_of_the_charts_is_of_something_that_a_run_logs(finished):
    grpo_run, sft_run = finished
    for run, charts in ((grpo_run, grpo_charts(["a", "b"])), (sft_run, sft_charts(["site"]))):
        shown = {tag for chart in charts for tag in (*chart.curves.values(), chart.error) if tag}
        assert shown - tensorboard(run).keys() == set()


def test_ratio_is_one_in_the_first_update_of_a_rollout_and_kl_zero_in_the_first_of_a_run(finished):
    first, second, third, fourth = train_log(finished[0])
    for step in (first, third):
        assert step["ratio/min"] == step["ratio/max"] == 1.0 and step["approx_kl_old"] == 0.0
    for step in (second, fourth):
        assert step["ratio/min"] < 0.999 and step["ratio/max"] > 1.001
    assert first["kl"] == 0.0
    assert min(second["kl"], third["kl"], fourth["kl"]) > 1e-5
    assert all(
        step["sampling/sampling_logp_difference/max"] < 1e-4 for step in (first, third)
    )  # the sampler and the forward agree


def test_windows_of_the_rewards_see_each_rollout_once_and_no_evaluation(finished):
    run, _ = finished
    rows = lines(run / "completions.jsonl")
    readable = [row["predicted"] for row in rows if row["parsed"]]
    assert 0 < len(readable) < 16  # an unreadable answer predicts nothing
    assert record(run / "checkpoint-4/rewards.json") == {
        "hard": {},
        "nuanced": {"images": by_image(rows)},
        "weighted": {},
        "fbeta": {"images": [said_of(rows[start : start + 4]) for start in (0, 4, 8, 12)]},
    }
    assert record(run / "checkpoint-1/rewards.json")["nuanced"]["images"] == by_image(rows[:8])


def said_of(rows):
    """Write what fbeta keeps of an image: its labels, and the share of answers that say each."""
    said = sorted({label for row in rows for label in row["predicted"]})
    shares = {label: sum(label in row["predicted"] for row in rows) / 4 for label in said}
    return [None, sorted(rows[0]["evaluated_labels"]), sorted(rows[0]["labels"]), shares]


def by_image(rows):
    """Collect the readable answers of each image of each rollout, in the order of the rows."""
    images = {}
    for row in rows:
        if row["parsed"]:
            images.setdefault((row["step"], row["group"]), []).append(row["predicted"])
    return list(images.values())


def test_predictions_hold_the_rewards_whose_means_are_in_the_scores(finished):
    run, _ = finished
    for name in ("a", "b"):
        rows, logged = (
            lines(run / f"predictions-{name}.jsonl"),
            record(run / f"scores-{name}.json"),
        )
        for reward in REGISTERED:
            totals = [row["rewards"][reward]["total"] for row in rows]
            assert sum(totals) / len(totals) == pytest.approx(logged[f"rewards/{reward}/mean"])
            parts = [
                sum(value for part, value in row["rewards"][reward].items() if part != "total")
                for row in rows
            ]
            assert parts == pytest.approx(totals)
        assert logged["reward"] == pytest.approx(logged["rewards/hard/mean"])


def test_the_policy_is_trained_and_loads_in_plain_peft(finished, tiny_checkpoint):
    run, sft_run = finished
    trained, before = adapter(run), adapter(sft_run)
    assert largest_difference(trained, before) > 1e-3
    base = AutoModelForImageTextToText.from_pretrained(
        record(run / "adapter_config.json")["base_model_name_or_path"]
    )
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(base, run))
    assert loaded.keys() == trained.keys() and all(
        torch.equal(loaded[name], trained[name]) for name in trained
    )
    assert equal_tensors(
        run / "adapter_model.safetensors", run / "checkpoint-4/adapter_model.safetensors"
    )  # the last, not the best


def test_evaluations_at_start_regularly_and_at_the_end_with_the_gap(finished):
    run, _ = finished
    log = eval_log(run)
    assert [(entry["step"], entry.get("dataset")) for entry in log] == [
        (step, name) for step in (0, 2, 4) for name in ("a", "b", None)
    ]
    # Exactly what --metric_for_best_model may name
    evaluated = [set(entry) - {"step", "epoch", "split", "dataset"} for entry in log]
    assert evaluated == [set(SET_METRICS), set(SET_METRICS), set(GAPS)] * 3
    # Both sites are one file, so what they really answered moved alike: no gap.
    # At the start nothing has moved, whatever is drawn.
    gaps = [entry for entry in log if "gap" in entry]
    assert [(entry["gap"], entry["gap_shared"]) for entry in gaps] == [(0.0, 0.0)] * 3
    assert gaps[0]["gap_se"] == gaps[0]["gap_shared_se"] == 0
    state = record(run / "trainer_state.json")
    assert (state["best_metric"], state["best_model_checkpoint"]) == (0.75, "checkpoint-2")
    assert (
        run.joinpath("best").readlink().name == "checkpoint-2"
        and run.joinpath("last").readlink().name == "checkpoint-4"
    )
    assert sum("eval_gap" in entry for entry in state["log_history"]) == 3
    assert state["epoch"] == pytest.approx(4 / 12)  # 2 rollouts of 2 of the 12 prompts


def test_the_answers_of_the_start_are_kept_and_read_like_any_others(finished):
    run, sft_run = finished
    start = load_entry("before", run / "start")
    assert start.stage == "sft" and start.training == sft_run and set(start.sets) == {"a", "b"}
    assert "step" not in record(run / "start/scores-a.json")
    # What the same model answers by a vote of as many samples as a rollout has
    voted = load_entry("voted", run / "start-vote")
    scores = record(run / "start-vote/scores-a.json")
    assert voted.stage == "sft" and stage_title(voted, scores) == "SFT + vote of 4"
    assert scores["samples"]["num_generations"] == 4 and "rewards/hard/mean" in scores
    samples = read_predictions(run / "start-vote/samples-a.jsonl")
    assert [prediction.id for prediction in vote_predictions(samples)] == list(
        dict.fromkeys(sample.id for sample in samples)
    )
    assert len(samples) == 4 * 12 and not list(run.glob(".tmp-*"))
    rows = lines(run / "evaluations.jsonl")
    assert [(row["step"], row["dataset"]) for row in rows] == [
        (step, name) for step in (0, 2, 4) for name in ("a", "b")
    ]
    # The folder's own answers are those of the last step, which the last rows compare.
    before, after = (
        score(read_predictions(folder / "predictions-a.jsonl")) for folder in (run / "start", run)
    )
    change = rows[-2]["since_start"]
    assert change["jaccard"]["difference"] == pytest.approx(after["jaccard"] - before["jaccard"])
    assert rows[-2]["macro_f1"] == pytest.approx(after["macro"]["f1"])
    assert rows[0]["since_start"]["macro_f1"] == {"difference": 0.0, "interval": [0.0, 0.0]}


# ---- settings of the loop ------------------------------------------------------------------------
def updates(tiny_sft_run, tiny_data, run, *flags, family="qwen2_5_vl"):
    """Make a run without evaluation -> its train log."""
    assert grpo(tiny_sft_run(family), tiny_data, run, *flags) == 0
    return train_log(run)


def rollouts(run) -> list[int]:
    return sorted({row["step"] for row in lines(run / "completions.jsonl")})


def test_micro_batches_do_not_change_an_update(
    family, tiny_sft_run, tiny_data, tmp_path, readable, monkeypatch
):
    gradients, clip = [], run_grpo.clip_gradients

    def recording(parameters, max_norm):
        gradients.append({str(i): parameter.grad.clone() for i, parameter in enumerate(parameters)})
        return clip(parameters, max_norm)

    monkeypatch.setattr(run_grpo, "clip_gradients", recording)
    # the second update is taken: there the ratio is not 1 and the KL not 0
    splits = [(8, 1), (4, 2), (2, 4), (1, 8)]
    for micro, accumulation in splits:
        updates(
            tiny_sft_run,
            tiny_data,
            tmp_path / f"{micro}",
            "--max_steps",
            "2",
            "--num_iterations",
            "2",
            "--learning_rate",
            "1e-3",
            "--per_device_train_batch_size",
            str(micro),
            "--gradient_accumulation_steps",
            str(accumulation),
            "--steps_per_generation",
            str(accumulation),
            "--weight_decay",
            "0",
            family=family,
        )
    texts = [
        [row["completion"] for row in lines(tmp_path / f"{micro}/completions.jsonl")]
        for micro, _ in splits
    ]
    assert texts == [texts[0]] * 4
    first, second = gradients[0::2], gradients[1::2]
    for found in (first, second):
        size = max(gradient.abs().max().item() for gradient in found[0].values())
        assert all(largest_difference(found[0], other) < 1e-5 * size for other in found[1:])
    adapters = [adapter(tmp_path / f"{micro}") for micro, _ in splits]
    assert largest_difference(adapters[0], adapter(tiny_sft_run(family))) > 1e-4
    # AdamW's first updates have the full size 1e-3 wherever a gradient is not 0, however small:
    # rounding shows there the most
    assert all(largest_difference(adapters[0], other) < 2e-5 for other in adapters[1:])


def test_by_default_a_rollout_serves_two_optimizer_steps(
    tiny_sft_run, tiny_data, tmp_path, readable, capsys
):
    log = updates(
        tiny_sft_run,
        tiny_data,
        tmp_path / "run",
        "--max_steps",
        "4",
        "--per_device_train_batch_size",
        "2",
        "--gradient_accumulation_steps",
        "4",
    )
    # 2 completions x 8 micro-batches = 16 completions a rollout, 8 in each of its two steps
    assert (
        rollouts(tmp_path / "run") == [1, 3]
        and len(lines(tmp_path / "run/completions.jsonl")) == 32
    )
    assert [entry["ratio/max"] == 1.0 for entry in log] == [True, False, True, False]
    out = capsys.readouterr()
    assert "4 prompts x 4 completions = 16 completions, 2 optimizer steps each" in out.out
    assert "clipping cannot act" not in out.err


def test_batch_arithmetic_by_hand():
    config = GRPOConfig(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        num_generations=4,
        num_train_epochs=1.5,
    )
    # 2 x 8 micro-batches = 16 completions = 4 prompts a rollout; 1.5 epochs of 21 are 31.5 prompts,
    # nearest to 8 rollouts.
    assert BatchPlan.of(config).lines(21, "hard") == [
        "rollout     4 prompts x 4 completions = 16 completions, 2 optimizer steps each",
        "batch       2 completions x 4 accumulated = 8 an optimizer step",
        (
            "run         16 optimizer steps = 8 rollouts = 32 prompts (1.52 epochs) = 128"
            " completions; trained on the hard reward"
        ),
    ]
    assert BatchPlan.of(config).total_steps(21) == 16
    # The third rollout serves one step only, and is sampled as a whole; two iterations: four steps
    # a rollout.
    *_, run = BatchPlan.of(replace(config, max_steps=5)).lines(20, "hard")
    assert run.startswith("run         5 optimizer steps = 3 rollouts = 12 prompts (0.60 epochs)")
    assert BatchPlan.of(replace(config, num_iterations=2)).total_steps(21) == 32
    # never less than one rollout
    assert BatchPlan.of(replace(config, num_train_epochs=0.01)).total_steps(21) == 2


def test_one_update_a_rollout_is_possible_and_warned_of(
    tiny_sft_run, tiny_data, tmp_path, readable, capsys
):
    log = updates(
        tiny_sft_run, tiny_data, tmp_path / "run", "--max_steps", "3", "--steps_per_generation", "1"
    )
    assert rollouts(tmp_path / "run") == [1, 2, 3]
    assert all(entry["ratio/min"] == entry["ratio/max"] == 1.0 for entry in log)
    assert (
        "warning: one optimizer step a rollout: the ratio is always 1, so clipping cannot act"
        in capsys.readouterr().err
    )


def test_iterations_go_over_the_same_rollout_again(
    tiny_sft_run, tiny_data, tmp_path, readable, monkeypatch
):
    seen, collate = [], rl.rollout.collate_samples
    monkeypatch.setattr(
        rl.rollout,
        "collate_samples",
        lambda samples, *rest: seen.append([s.text for s in samples]) or collate(samples, *rest),
    )
    log = updates(
        tiny_sft_run, tiny_data, tmp_path / "run", "--max_steps", "6", "--num_iterations", "2"
    )
    # 2 updates x 2 iterations of the first rollout are steps 1 to 4; a rollout's scoring collates
    # the micro-batches of both updates first, for the reference, then the second's for its old ones
    assert rollouts(tmp_path / "run") == [1, 5]
    scoring, old, updates_of_first = seen[:2], seen[2], seen[3:7]
    assert updates_of_first == [*scoring, *scoring] and scoring[0] != scoring[1] == old
    assert [entry["ratio/max"] == 1.0 for entry in log] == [True, False, False, False, True, False]


def test_without_a_kl_term_the_reference_is_never_run(
    tiny_sft_run, tiny_data, tmp_path, readable, monkeypatch
):
    monkeypatch.setattr(Policy, "reference", lambda *_: pytest.fail("the reference was run"))
    log = updates(tiny_sft_run, tiny_data, tmp_path / "run", "--max_steps", "2", "--beta", "0")
    assert log[1]["ratio/max"] > 1.001 and log[1]["kl"] == 0.0


def test_masked_truncated_completions_give_no_gradient(tiny_sft_run, tiny_data, tmp_path, readable):
    flags = ("--max_steps", "2", "--max_completion_length", "3", "--weight_decay", "0")
    log = updates(
        tiny_sft_run, tiny_data, tmp_path / "masked", *flags, "--mask_truncated_completions"
    )
    assert log[0]["completions/clipped_ratio"] == 1.0, (
        "the seed must give completions that are all truncated"
    )
    assert [entry["grad_norm"] for entry in log] == [0.0, 0.0] and "ratio/mean" not in log[0]
    assert equal_tensors(
        tmp_path / "masked/adapter_model.safetensors",
        tiny_sft_run("qwen2_5_vl") / "adapter_model.safetensors",
    )
    assert all(row["reward"] is not None for row in lines(tmp_path / "masked/completions.jsonl"))
    kept = updates(tiny_sft_run, tiny_data, tmp_path / "kept", *flags)
    assert kept[0]["grad_norm"] > 0


def test_loss_types_weigh_tokens_differently(tiny_sft_run, tiny_data, tmp_path, readable):
    flags = (
        "--max_steps",
        "1",
        "--max_completion_length",
        "80",
        "--max_grad_norm",
        "1e9",
        "--seed",
        "1",
    )
    norms = {}
    for loss_type in ("dr_grpo", "grpo", "dapo"):
        norms[loss_type] = updates(
            tiny_sft_run, tiny_data, tmp_path / loss_type, *flags, "--loss_type", loss_type
        )[0]["grad_norm"]
    # the four of the first step
    lengths = [row["completion_length"] for row in lines(tmp_path / "dapo/completions.jsonl")][:4]
    assert len(set(lengths)) > 1, "the seed must give completions of different lengths"
    # dr_grpo divides each token by 4 x 80, dapo by the tokens of the step: the same gradient up to
    # that constant.
    assert norms["dapo"] / norms["dr_grpo"] == pytest.approx(4 * 80 / sum(lengths), rel=1e-4)
    assert abs(norms["grpo"] / norms["dapo"] - 1) > 1e-3


def test_the_nuanced_reward_can_be_trained_on(tiny_sft_run, tiny_data, tmp_path, readable):
    log = updates(
        tiny_sft_run, tiny_data, tmp_path / "run", "--max_steps", "1", "--reward", "nuanced"
    )
    rows = lines(tmp_path / "run/completions.jsonl")
    # points are logged as they are
    assert min(row["rewards"]["nuanced"]["total"] for row in rows) == -200.0
    for row in rows:
        assert row["reward"] == pytest.approx(0.01 * row["rewards"]["nuanced"]["total"])
    assert log[0]["reward"] == pytest.approx(sum(row["reward"] for row in rows) / 8)
    assert log[0]["rewards/nuanced/mean"] == pytest.approx(
        sum(row["rewards"]["nuanced"]["total"] for row in rows) / 8
    )


def test_gradient_checkpointing_and_bf16_keep_the_first_ratio_exact(
    family, tiny_sft_run, tiny_data, tmp_path, readable
):
    log = updates(
        tiny_sft_run,
        tiny_data,
        tmp_path / "run",
        "--max_steps",
        "2",
        "--bf16",
        "--gradient_checkpointing",
        family=family,
    )
    assert log[0]["ratio/min"] == log[0]["ratio/max"] == 1.0 and log[0]["kl"] == 0.0
    assert log[1]["ratio/max"] > 1.001
    assert {tensor.dtype for tensor in adapter(tmp_path / "run").values()} == {torch.float32}


# ---- best checkpoint -----------------------------------------------------------------------------
def scripted_run(
    monkeypatch, tiny_sft_run, tiny_data, run, scores: list[tuple[float, float]], *flags
) -> dict:
    """Make a run of 4 steps with given evaluations -> trainer_state.json.

    Those at 0, 2 and 4 give sites a and b these macro-F1.
    """
    evaluated = []

    def scripted(*arguments):
        evaluated.append(arguments[-1])  # the step
        return {
            name: (
                dict.fromkeys(
                    ("reward", "jaccard", "micro_f1", "fail_rate", "completion_length"), 0.0
                )
                | {"macro_f1": score}
            )
            for name, score in zip(("a", "b"), scores[evaluated[-1] // 2], strict=True)
        }

    def gap_of(*_):
        (a, b), (start_a, start_b) = scores[evaluated[-1] // 2], scores[0]
        return SinceStart(gaps={"gap": (a - start_a) - (b - start_b)})

    monkeypatch.setattr(run_grpo, "evaluate_policy", scripted)
    monkeypatch.setattr(run_grpo, "since_start_on_all", gap_of)
    assert (
        grpo(
            tiny_sft_run("qwen2_5_vl"),
            tiny_data,
            run,
            "--max_steps",
            "4",
            "--eval_steps",
            "2",
            "--validation_file",
            f"a={tiny_data}",
            f"b={tiny_data}",
            *flags,
        )
        == 0
    )
    # With --load_best_model_at_end the folder's scores must be those of the best, so it is decoded
    # again where it is not the last.
    best = int(record(run / "trainer_state.json")["best_model_checkpoint"].rpartition("-")[2])
    assert evaluated == [0, 2, 4] + [best] * (best != 4)
    return record(run / "trainer_state.json")


@pytest.mark.parametrize(
    ("metric", "best"),
    [
        ("a/macro_f1", 2),
        ("b/macro_f1", 4),
        ("gap", 4),
        ("a/macro_f1 + 0.5*b/macro_f1", 2),
        ("b/macro_f1 - gap", 4),
    ],
)
def test_any_evaluated_metric_can_choose_the_best_checkpoint(
    tiny_sft_run, tiny_data, tmp_path, readable, monkeypatch, metric, best
):
    # gap, where less is better: 0, (0.75 - 0.5) - (0.5 - 0.25) = 0, (0.5 - 0.5) - (0.625 - 0.25) =
    # -0.375. a + b/2: 0.625, 1, 0.8125. b - gap: 0.25, 0.5, 1.
    state = scripted_run(
        monkeypatch,
        tiny_sft_run,
        tiny_data,
        tmp_path / "run",
        [(0.5, 0.25), (0.75, 0.5), (0.5, 0.625)],
        "--metric_for_best_model",
        metric,
        "--load_best_model_at_end",
        "--save_total_limit",
        "1",
    )
    assert state["best_model_checkpoint"] == f"checkpoint-{best}"
    assert equal_tensors(
        tmp_path / "run/adapter_model.safetensors",
        tmp_path / f"run/checkpoint-{best}/adapter_model.safetensors",
    )
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {
        f"checkpoint-{best}",
        "checkpoint-4",
    }


def test_where_the_start_is_never_beaten_it_is_the_best_checkpoint(
    tiny_sft_run, tiny_data, tmp_path, readable, monkeypatch
):
    state = scripted_run(
        monkeypatch,
        tiny_sft_run,
        tiny_data,
        tmp_path / "run",
        [(0.9, 0), (0.5, 0), (0.25, 0)],
        "--load_best_model_at_end",
    )
    assert (
        state["best_model_checkpoint"] == "checkpoint-0"
        and (tmp_path / "run/best").readlink().name == "checkpoint-0"
    )
    assert equal_tensors(
        tmp_path / "run/adapter_model.safetensors",
        tiny_sft_run("qwen2_5_vl") / "adapter_model.safetensors",
    )


def test_a_condition_on_an_evaluation_ends_the_run(
    tiny_sft_run, tiny_data, tmp_path, readable, monkeypatch, capsys
):
    # the evaluation at step 4 never comes
    gaps = iter([0.0, 0.25])
    monkeypatch.setattr(
        run_grpo, "since_start_on_all", lambda *_: SinceStart(gaps={"gap": next(gaps)})
    )
    monkeypatch.setattr(
        run_grpo,
        "evaluate_policy",
        lambda policy, data, *_: {
            name: dict.fromkeys(SET_METRICS, 0.0) | {"macro_f1": f1}
            for name, f1 in zip(
                data.evaluated, [(0.5, 0.25), (0.75, 0.25)][_[-1] // 2], strict=True
            )
        },
    )
    run = tmp_path / "run"
    assert (
        grpo(
            tiny_sft_run("qwen2_5_vl"),
            tiny_data,
            run,
            "--max_steps",
            "4",
            "--eval_steps",
            "2",
            "--validation_file",
            f"a={tiny_data}",
            f"b={tiny_data}",
            "--stop_when",
            "gap>0.2",
            "a/macro_f1<0.1",
            "--load_best_model_at_end",
        )
        == 0
    )
    assert "stopping: gap>0.2: 0.25" in capsys.readouterr().err
    assert lines(run / "warnings.jsonl") == [{"step": 2, "warning": "stopping: gap>0.2: 0.25"}]
    assert len(train_log(run)) == 2 and run.joinpath("last").readlink().name == "checkpoint-2"
    # decoding was scripted
    assert (run / "adapter_model.safetensors").exists() and not (run / "scores-a.json").exists()
    # A stopped run does not go on by itself, only without the condition that ended it.
    again = ["--resume_from_checkpoint", str(run)]
    assert run_grpo.main(again) == 0 and len(train_log(run)) == 2
    monkeypatch.setattr(
        run_grpo,
        "evaluate_policy",
        lambda policy, data, *_: {name: dict.fromkeys(SET_METRICS, 0.0) for name in data.evaluated},
    )
    monkeypatch.setattr(run_grpo, "since_start_on_all", lambda *_: SinceStart(gaps={"gap": 0.0}))
    assert run_grpo.main([*again, "--stop_when", "gap>5"]) == 0 and len(train_log(run)) == 4


def test_a_condition_on_what_training_logs_ends_the_run_after_an_evaluation(
    tiny_sft_run, tiny_data, tmp_path, readable, capsys
):
    run = tmp_path / "run"
    assert (
        grpo(
            tiny_sft_run("qwen2_5_vl"),
            tiny_data,
            run,
            "--max_steps",
            "6",
            "--validation_file",
            f"a={tiny_data}",
            "--stop_when",
            "grad_norm>0 for 3",
            "--warn_when",
            "a/jaccard>-1",
        )
        == 0
    )
    assert [line["warning"].split(":")[:2] for line in lines(run / "warnings.jsonl")] == [
        ["warning", " a/jaccard>-1"],
        ["stopping", " grad_norm>0 for 3"],
    ]
    # in the middle of a rollout
    assert [entry["step"] for entry in eval_log(run)] == [0, 3] and len(train_log(run)) == 3
    assert (
        run.joinpath("last").readlink().name == "checkpoint-3"
        and (run / "adapter_model.safetensors").exists()
    )
    assert capsys.readouterr().err.count("a/jaccard>-1") == 1  # still true at step 3, and no news


def test_a_condition_on_something_that_is_never_logged_is_refused_at_the_first_step(
    tiny_sft_run, tiny_data, tmp_path, readable
):
    with pytest.raises(
        UsageError,
        match="--stop_when kll>5: nothing of the name kll is logged; there are gap, .* kl, ",
    ):
        grpo(
            tiny_sft_run("qwen2_5_vl"),
            tiny_data,
            tmp_path / "run",
            "--max_steps",
            "4",
            "--stop_when",
            "kll>5",
            "kl>50",
        )
    assert len(train_log(tmp_path / "run")) == 1


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_does_harm(
    tiny_sft_run, tiny_data, tmp_path, readable, monkeypatch
):
    loss, calls = run_grpo.grpo_loss, []

    def poisoned(*arguments, **options):
        value, terms = loss(*arguments, **options)
        calls.append(1)
        # the second update of the first rollout
        return (value * float("nan") if len(calls) == 2 else value), terms

    monkeypatch.setattr(run_grpo, "grpo_loss", poisoned)
    run = tmp_path / "run"
    with pytest.raises(
        RuntimeError,
        match="the gradient of step 2 is not finite; the state before it was saved. Examples: e",
    ):
        grpo(tiny_sft_run("qwen2_5_vl"), tiny_data, run, "--max_steps", "4")
    assert run.joinpath("last").readlink().name == "checkpoint-1"
    assert all(
        torch.isfinite(tensor).all()
        for tensor in load_file(run / "last/adapter_model.safetensors").values()
    )
    assert len(record(run / "last/rollout.json")) == 8
    assert not (run / "adapter_model.safetensors").exists()
