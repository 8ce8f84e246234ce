"""Protect run_sft.py as a whole, on both model families.

Checked: what a run leaves behind, Eq. 1 of a whole optimizer step whatever the micro-batches,
validation by hand, early stopping, the held-out split, and what a gradient that is not finite does.

Run: pytest tests/scripts/test_run_sft.py
"""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForImageTextToText

import engine.policy
import run_sft
from data.examples import read_jsonl
from data.prompts import PROMPTS
from engine.encode import Encoder
from engine.model import load_model
from engine.model_files import EMBEDDED
from engine.order import shuffled
from engine.policy import Policy
from engine.settings import SFTConfig
from tests.helpers import plain
from tests.helpers.runs import (
    adapter,
    equal_tensors,
    largest_difference,
    lines,
    record,
    sft,
    train_log,
    validation_log,
    write_rows,
)
from tests.helpers.tiny import SAVE

FAMILIES = ["qwen2_5_vl", "gemma3"]
ONE_STEP = ("--max_steps", "1", "--lora_dropout", "0")


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def test_a_run_leaves_a_complete_folder(family, tiny_sft_run):
    run = tiny_sft_run(family)
    names = {path.name for path in run.iterdir() if not path.name.startswith("events.out.tfevents")}
    assert names == {
        "config.json",
        "trainer_state.json",
        "metrics.jsonl",
        "charts",
        "adapter_model.safetensors",
        "adapter_config.json",
        "best",
        "last",
        ".lock",
        "README.md",
        "predictions-site.jsonl",
        "scores-site.json",
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-4",
    }
    assert len(list(run.glob("events.out.tfevents*"))) == 1
    assert {path.name for path in (run / "checkpoint-3").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "optimizer.safetensors",
        "optimizer.json",
        "rng.safetensors",
        "rng.json",
        "trainer_state.json",
        "config.json",
        "manifest.json",
    }
    assert run.joinpath("last").readlink().name == "checkpoint-4"
    assert (
        len(lines(run / "predictions-site.jsonl")) == 12
        and record(run / "scores-site.json")["n"] == 12
    )


def test_config_json_has_every_value_with_its_origin_the_data_and_the_versions(
    family, tiny_sft_run, tiny_data
):
    config = record(tiny_sft_run(family) / "config.json")
    assert set(config["settings"]) == {field.name for field in fields(run_sft.SFTConfig)}
    assert config["settings"]["learning_rate"] == {"value": 0.01, "origin": "flag"}
    assert config["settings"]["lora_r"] == {"value": 16, "origin": "default"}
    digest = hashlib.sha256(tiny_data.read_bytes()).hexdigest()
    about = {"datasets": ["site"], "images": 12, "patients": 6}
    assert config["data"] == {
        name: {"file": str(tiny_data), "sha256": digest} | about for name in ("train", "site")
    }
    assert {"python", "torch", "transformers", "peft"} <= config["versions"].keys()
    assert config["script"] == "sft" and config["recipe"] is None


def test_trainer_state_has_the_form_that_hf_tools_read(family, tiny_sft_run):
    run = tiny_sft_run(family)
    state = record(run / "trainer_state.json")
    assert (state["global_step"], state["epoch"]) == (4, 2.0)
    train = [entry for entry in state["log_history"] if "loss" in entry]
    evaluations = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert [(entry["step"], entry["epoch"]) for entry in train] == [
        (1, 0.5),
        (2, 1.0),
        (3, 1.5),
        (4, 2.0),
    ]
    assert all(
        {"grad_norm", "learning_rate", "mean_token_accuracy", "num_tokens"} <= entry.keys()
        for entry in train
    )
    assert [entry["step"] for entry in evaluations] == [2, 4] and all(
        "eval_mean_token_accuracy" in entry for entry in evaluations
    )
    best = min(evaluations, key=lambda entry: entry["eval_loss"])
    assert (state["best_metric"], state["best_model_checkpoint"]) == (
        best["eval_loss"],
        f"checkpoint-{best['step']}",
    )
    assert run.joinpath("best").readlink().name == state["best_model_checkpoint"]
    assert equal_tensors(run / "adapter_model.safetensors", run / "best/adapter_model.safetensors")


def test_the_final_adapter_loads_in_plain_peft(family, tiny_sft_run, tiny_checkpoint):
    base = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint(family))
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(base, tiny_sft_run(family)))
    saved = adapter(tiny_sft_run(family))
    assert loaded.keys() == saved.keys() and all(
        torch.equal(loaded[name], saved[name]) for name in saved
    )
    assert all(
        saved[name].abs().max() > 0 for name in saved if "lora_B" in name
    )  # B starts at zero: every projection was trained


def by_hand(checkpoint, adapter_folder, data) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Compute (log-probabilities, correct) of the answer tokens of every row.

    They are by transformers' and peft's own forward, row by row.
    """
    model = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(checkpoint), adapter_folder
    ).eval()
    encoder = Encoder.from_pretrained(checkpoint, min_visual_tokens=4, max_visual_tokens=4)
    logprobs, correct = [], []
    for example in read_jsonl(data):
        row = encoder.encode_answer(example, PROMPTS["demo"], example.answer)
        rows = plain.plain_batch([row], encoder.pad_token_id).prompts
        types = (
            "mm_token_type_ids" if encoder.family.model_type == "qwen2_5_vl" else "token_type_ids"
        )
        with torch.no_grad():
            # [S,V]
            logits = model(
                input_ids=rows.input_ids, **{types: rows.token_types}, **row.prompt.vision
            ).logits[0]
        # ASCII and a byte tokenizer: one token a character, and the end of turn
        length = len(example.answer) + 1
        predicted, targets = logits[-length - 1 : -1], rows.input_ids[0, -length:]
        logprobs.append(predicted.log_softmax(1).gather(1, targets[:, None])[:, 0])
        correct.append(predicted.argmax(1) == targets)
    return logprobs, correct


def test_validation_loss_and_accuracy_are_means_over_all_answer_tokens(
    family, tiny_sft_run, tiny_checkpoint, tiny_data
):
    run = tiny_sft_run(family)
    logprobs, correct = by_hand(tiny_checkpoint(family), run / "checkpoint-4", tiny_data)
    logged = validation_log(run)[-1]
    assert logged["step"] == 4
    assert logged["loss"] == pytest.approx(-torch.cat(logprobs).mean().item(), abs=2e-5)
    assert logged["mean_token_accuracy"] == pytest.approx(
        torch.cat(correct).float().mean().item(), abs=1e-6
    )
    mean_of_rows = (
        -torch.stack(
            [
                row.mean()
                # what a mean over rows would give: visibly another number
                for row in logprobs
            ]
        )
        .mean()
        .item()
    )
    assert abs(logged["loss"] - mean_of_rows) > 1e-4


def test_soft_capping_holds_in_training_and_validation(tmp_path, tiny_data):
    # Logits of this model reach 2.4. B is zero, so the adapter changes nothing at the first step.
    capped = SAVE["gemma3"](tmp_path / "capped", text={"final_logit_softcapping": 0.5})
    assert (
        sft(
            capped,
            tiny_data,
            tmp_path / "run",
            "--validation_file",
            f"site={tiny_data}",
            *ONE_STEP,
            "--per_device_train_batch_size",
            "4",
            "--gradient_accumulation_steps",
            "3",
            "--learning_rate",
            "1e-9",
        )
        == 0
    )
    model = load_model(
        str(capped),
        dtype=torch.float32,
        device=torch.device("cpu"),
        min_visual_tokens=4,
        max_visual_tokens=4,
    )
    rows = [
        model.encode_answer(example, PROMPTS["demo"], example.answer)
        for example in read_jsonl(tiny_data)
    ]
    expected = -plain.logprobs_of(model.net, model.family, rows, temperature=1.0)
    mean = float(expected.sum() / sum(len(row.completion_ids) for row in rows))
    logged = [
        entry["loss"] for entry in (*train_log(tmp_path / "run"), *validation_log(tmp_path / "run"))
    ]
    assert logged == pytest.approx([mean, mean], abs=1e-5)


def test_the_end_logs_its_scores_under_the_names_of_grpo(family, tiny_sft_run):
    run = tiny_sft_run(family)
    scores = record(run / "scores-site.json")
    line = lines(run / "metrics.jsonl")[-1]
    assert (line["step"], line["split"], line["dataset"]) == (4, "eval", "site")
    assert line["macro_f1"] == scores["macro"]["f1"] and line["fail_rate"] == scores["fail_rate"]
    history = record(run / "trainer_state.json")["log_history"]
    assert history[-1]["eval_site_macro_f1"] == line["macro_f1"] and history[-1]["step"] == 4
    # the final adapter is as finished without them: its checkpoint does not have them
    saved = record(run / "checkpoint-4/trainer_state.json")["log_history"]
    assert history[:-1] == saved
    tags = EventAccumulator(str(run / "charts/site")).Reload().Tags()["scalars"]
    assert tags == ["charts/macro_f1"]


def test_num_tokens_counts_prompts_and_answers_as_trl_does(tiny_sft_run, tiny_data):
    answers = [row["answer"] for row in lines(tiny_data)]
    logged = [entry["num_tokens"] for entry in train_log(tiny_sft_run("qwen2_5_vl"))]
    # Steps 1 and 2 together are the first epoch, 3 and 4 the second: each row once, one token a
    # character and one end of turn. All prompts have the same instruction and as many tokens of an
    # image.
    prompts = logged[1] - sum(len(answer) + 1 for answer in answers)
    assert prompts > 0 and prompts % len(answers) == 0
    assert logged[3] == 2 * logged[1]  # so far


def test_micro_batches_do_not_change_the_step(
    family, tiny_checkpoint, tiny_data, tmp_path, monkeypatch
):
    gradients, clip = [], run_sft.clip_gradients
    seeded: list[tuple[int, ...]] = []  # for dropout: (seed, step, first row) of each micro-batch

    def recording(parameters, max_norm):
        gradients.append({str(i): parameter.grad.clone() for i, parameter in enumerate(parameters)})
        return clip(parameters, max_norm)

    monkeypatch.setattr(run_sft, "clip_gradients", recording)
    monkeypatch.setattr(run_sft, "dropout_numbers", lambda *place: seeded.append(place))
    monkeypatch.setattr(run_sft, "evaluate_sets", lambda *_, **__: {})
    monkeypatch.setattr(run_sft, "format_scores", lambda scores: "")
    # the last one is 6 rows: other rows, another gradient
    splits = [(4, 1), (2, 2), (1, 4), (3, 2)]
    for micro, accumulation in splits:
        sft(
            tiny_checkpoint(family),
            tiny_data,
            tmp_path / f"{micro}",
            *ONE_STEP,
            "--validation_file",
            f"site={tiny_data}",
            "--per_device_train_batch_size",
            str(micro),
            "--gradient_accumulation_steps",
            str(accumulation),
            "--learning_rate",
            "1e-4",
        )
    assert seeded == [(42, 0, row) for row in (0, *(0, 2), *(0, 1, 2, 3), *(0, 3))]
    size = max(gradient.abs().max().item() for gradient in gradients[0].values())
    assert largest_difference(gradients[0], gradients[1]) < 1e-5 * size
    assert largest_difference(gradients[0], gradients[2]) < 1e-5 * size
    assert largest_difference(gradients[0], gradients[3]) > 1e-2 * size
    adapters = [adapter(tmp_path / f"{micro}") for micro, _ in splits]
    assert (
        largest_difference(adapters[0], adapters[1]) < 1e-6
        and largest_difference(adapters[0], adapters[2]) < 1e-6
    )
    losses = [train_log(tmp_path / f"{micro}")[0]["loss"] for micro, _ in splits]
    assert losses[1:3] == pytest.approx([losses[0]] * 2, rel=1e-6)


def test_tokens_bound_the_forwards_of_a_step(
    family, tiny_checkpoint, tiny_data, tmp_path, monkeypatch
):
    gradients, tokens, clip, forward = (
        [],
        [],
        run_sft.clip_gradients,
        engine.policy.completion_hidden_states,
    )

    def recording(parameters, max_norm):
        gradients.append({str(i): parameter.grad.clone() for i, parameter in enumerate(parameters)})
        return clip(parameters, max_norm)

    def counting(wrapped, of_family, batch):
        tokens[-1].append(
            (len(batch.completion_ids), len(batch.prompt_places) + int(batch.completion_mask.sum()))
        )
        return forward(wrapped, of_family, batch)

    monkeypatch.setattr(run_sft, "clip_gradients", recording)
    monkeypatch.setattr(engine.policy, "completion_hidden_states", counting)
    monkeypatch.setattr(
        run_sft, "validation_metrics", lambda *_, **__: {"loss": 1.0, "mean_token_accuracy": 0.0}
    )
    monkeypatch.setattr(run_sft, "evaluate_sets", lambda *_, **__: {})
    monkeypatch.setattr(run_sft, "format_scores", lambda scores: "")
    for bound in ("none", "900"):
        tokens.append([])
        assert (
            sft(
                tiny_checkpoint(family),
                tiny_data,
                tmp_path / bound,
                *ONE_STEP,
                "--validation_file",
                f"site={tiny_data}",
                "--per_device_train_batch_size",
                "6",
                "--gradient_accumulation_steps",
                "1",
                "--max_tokens_per_forward",
                bound,
            )
            == 0
        )
    whole, cut = tokens  # two rows have 867 to 893 tokens
    assert [rows for rows, _ in whole] == [6] and whole[0][1] > 2500
    assert (
        [rows for rows, _ in cut] == [2, 2, 2]
        and all(n <= 900 for _, n in cut)
        and sum(n for _, n in cut) == whole[0][1]
    )
    size = max(gradient.abs().max().item() for gradient in gradients[0].values())
    assert largest_difference(*gradients) < 1e-5 * size
    losses = [train_log(tmp_path / bound)[0]["loss"] for bound in ("none", "900")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_a_last_micro_batch_that_is_not_full_weighs_by_its_tokens(
    tiny_checkpoint, tiny_data, tmp_path, monkeypatch
):
    monkeypatch.setattr(run_sft, "evaluate_sets", lambda *_, **__: {})
    monkeypatch.setattr(run_sft, "format_scores", lambda scores: "")
    # 5 rows in micro-batches of 3 and 2, B still zero: the loss of the step is that of the base
    # model over all answer tokens.
    few = write_rows(tiny_data.with_name("five.jsonl"), lines(tiny_data)[:5])
    sft(
        tiny_checkpoint("qwen2_5_vl"),
        few,
        tmp_path / "run",
        *ONE_STEP,
        "--validation_file",
        f"site={few}",
        "--per_device_train_batch_size",
        "3",
        "--gradient_accumulation_steps",
        "2",
        "--learning_rate",
        "1e-30",
    )
    logprobs, _ = by_hand(tiny_checkpoint("qwen2_5_vl"), tmp_path / "run", few)
    assert train_log(tmp_path / "run")[0]["loss"] == pytest.approx(
        -torch.cat(logprobs).mean().item(), abs=2e-5
    )
    # The same rows in steps of 2 x 2: the last step of the epoch has one row, and the next epoch
    # begins with four again.
    sft(
        tiny_checkpoint("qwen2_5_vl"),
        few,
        tmp_path / "short",
        "--max_steps",
        "3",
        "--lora_dropout",
        "0",
        "--validation_file",
        f"site={few}",
        "--per_device_train_batch_size",
        "2",
        "--gradient_accumulation_steps",
        "2",
        "--learning_rate",
        "1e-30",
    )
    first, second = shuffled(5, 0, 42), shuffled(5, 1, 42)
    expected = [
        -torch.cat([logprobs[i] for i in rows]).mean().item()
        for rows in (first[:4], first[4:], second[:4])
    ]
    assert [entry["loss"] for entry in train_log(tmp_path / "short")] == pytest.approx(
        expected, abs=2e-5
    )
    # or it would not show
    assert min(abs(one - other) for one in expected for other in expected if one != other) > 1e-4


def test_steps_by_hand():
    config = SFTConfig(
        per_device_train_batch_size=2, gradient_accumulation_steps=4, num_train_epochs=1.5
    )
    # 21 rows in steps of 8: 3 an epoch, the last of 5 rows. 1.5 epochs are 4.5 steps, so 5.
    assert (config.steps_per_epoch(21), config.total_steps(21)) == (3, 5)
    assert replace(config, max_steps=4).total_steps(21) == 4


def test_a_handful_of_rows_is_learnt_and_the_base_is_untouched(
    family, tiny_checkpoint, tiny_data, tmp_path, monkeypatch
):
    trained = {}
    monkeypatch.setattr(
        run_sft,
        "save_final_adapter",
        lambda folder, state, policy: trained.update(model=policy.net),
    )
    monkeypatch.setattr(run_sft, "write_run_card", lambda folder: None)
    monkeypatch.setattr(run_sft, "evaluate_sets", lambda *_, **__: {})
    monkeypatch.setattr(run_sft, "format_scores", lambda scores: "")
    few = write_rows(tiny_data.with_name("three.jsonl"), lines(tiny_data)[:3])
    sft(
        tiny_checkpoint(family),
        few,
        tmp_path / "run",
        "--num_train_epochs",
        "8",
        "--lora_dropout",
        "0",
        "--validation_file",
        f"site={few}",
        "--per_device_train_batch_size",
        "1",
        "--gradient_accumulation_steps",
        "1",
        "--early_stopping_patience",
        "9",
    )
    evaluations = validation_log(tmp_path / "run")
    # A random model starts at about ln(268) = 5.6 nats, and far from every token right.
    assert evaluations[-1]["loss"] < train_log(tmp_path / "run")[0]["loss"] - 1, evaluations
    assert evaluations[-1]["mean_token_accuracy"] > 0.3, evaluations
    base = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): tensor
        for name, tensor in trained["model"].state_dict().items()
        if "lora_" not in name
    }
    before = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint(family)).state_dict()
    assert base.keys() == before.keys() and all(
        torch.equal(base[name], before[name]) for name in before
    )


def test_bf16_and_gradient_checkpointing_train_fp32_adapters(
    family, tiny_checkpoint, tiny_data, tmp_path, monkeypatch
):
    monkeypatch.setattr(run_sft, "evaluate_sets", lambda *_, **__: {})
    monkeypatch.setattr(run_sft, "format_scores", lambda scores: "")
    flags = (
        "--max_steps",
        "4",
        "--per_device_train_batch_size",
        "4",
        "--gradient_accumulation_steps",
        "1",
        "--lora_dropout",
        "0",
        "--validation_file",
        f"site={tiny_data}",
    )
    for name, more in (("fp32", ()), ("bf16", ("--bf16", "--gradient_checkpointing"))):
        assert sft(tiny_checkpoint(family), tiny_data, tmp_path / name, *flags, *more) == 0
    losses, mixed = (
        [entry["loss"] for entry in train_log(tmp_path / name)] for name in ("fp32", "bf16")
    )
    # bf16 keeps 8 bits, a relative 2^-8 = 0.4 %; the losses are about 5.6 nats, so it shows and
    # stays below a few times 0.02.
    assert mixed != losses and mixed == pytest.approx(losses, abs=0.06)
    assert mixed[-1] < mixed[0] - 0.1
    assert {tensor.dtype for tensor in adapter(tmp_path / "bf16").values()} == {torch.float32}
    state = load_file(tmp_path / "bf16/last/optimizer.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def scripted(monkeypatch, losses: list[float]) -> None:
    """Let the validation losses of the epochs be these, the last one from then on."""
    remaining = list(losses)
    monkeypatch.setattr(
        run_sft,
        "validation_metrics",
        lambda *_, **__: {
            "loss": remaining.pop(0) if len(remaining) > 1 else remaining[0],
            "mean_token_accuracy": 0.0,
        },
    )
    monkeypatch.setattr(run_sft, "evaluate_sets", lambda *_, **__: {})
    monkeypatch.setattr(run_sft, "format_scores", lambda scores: "")


# 12 rows
FOUR_STEPS_AN_EPOCH = ("--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "1")


def test_early_stop_keeps_and_uses_the_best_epoch(
    tiny_checkpoint, tiny_data, tmp_path, monkeypatch, capsys
):
    # epoch 4 only equals the best, so patience 2 ends the run before the 1.0
    scripted(monkeypatch, [3.0, 2.0, 2.5, 2.0, 1.0])
    run = tmp_path / "run"
    assert (
        sft(
            tiny_checkpoint("qwen2_5_vl"),
            tiny_data,
            run,
            *FOUR_STEPS_AN_EPOCH,
            "--validation_file",
            f"site={tiny_data}",
            "--save_total_limit",
            "1",
        )
        == 0
    )
    state = record(run / "trainer_state.json")
    assert (state["global_step"], state["epoch"]) == (16, 4.0)
    assert (state["best_metric"], state["best_model_checkpoint"]) == (2.0, "checkpoint-8")
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [
        "checkpoint-16",
        "checkpoint-8",
    ]
    assert equal_tensors(
        run / "adapter_model.safetensors", run / "checkpoint-8/adapter_model.safetensors"
    )
    assert not equal_tensors(
        run / "adapter_model.safetensors", run / "checkpoint-16/adapter_model.safetensors"
    )
    assert "stopped early: 2 evaluations in a row were no better" in capsys.readouterr().err


def test_a_better_epoch_starts_the_patience_anew(tiny_checkpoint, tiny_data, tmp_path, monkeypatch):
    scripted(monkeypatch, [3.0, 3.5, 2.0, 2.5, 1.0, 1.0])
    run = tmp_path / "run"
    assert (
        sft(
            tiny_checkpoint("qwen2_5_vl"),
            tiny_data,
            run,
            "--per_device_train_batch_size",
            "12",
            "--gradient_accumulation_steps",
            "1",
            "--validation_file",
            f"site={tiny_data}",
        )
        == 0
    )
    assert record(run / "trainer_state.json")["global_step"] == 6  # all 6 epochs of 1 step
    assert record(run / "trainer_state.json")["best_model_checkpoint"] == "checkpoint-5"


def test_without_a_validation_file_patients_are_held_out(
    tiny_checkpoint, tiny_data, tmp_path, monkeypatch
):
    seen, encode = [], Policy.encode_answer
    monkeypatch.setattr(
        Policy,
        "encode_answer",
        lambda self, example: seen.append(example) or encode(self, example),
    )
    monkeypatch.setattr(
        run_sft, "validation_metrics", lambda *_, **__: {"loss": 1.0, "mean_token_accuracy": 0.0}
    )
    run = tmp_path / "run"
    assert (
        sft(
            tiny_checkpoint("qwen2_5_vl"),
            tiny_data,
            run,
            *FOUR_STEPS_AN_EPOCH,
            "--num_train_epochs",
            "1",
            "--validation_split",
            "0.3",
        )
        == 0
    )
    held_out = lines(run / "predictions-validation.jsonl")
    # the first two are the check before the run
    trained_on = {example.id: example.patient_id for example in seen[2:]}
    # 30 % of 12 rows are 3.6, and patients have 2 rows each: two patients are held out.
    assert (len(trained_on), len(held_out)) == (8, 4)
    assert not set(trained_on.values()) & {row["patient_id"] for row in held_out}
    assert set(trained_on) | {row["id"] for row in held_out} == {f"e{i}" for i in range(12)}


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_does_harm(
    tiny_checkpoint, tiny_data, tmp_path, monkeypatch
):
    logprobs, calls = run_sft.token_logprobs, []

    def poisoned(*arguments, **options):
        values, entropy = logprobs(*arguments, **options)
        calls.append(1)
        return (values * float("nan") if len(calls) == 3 else values), entropy  # the third step

    monkeypatch.setattr(run_sft, "token_logprobs", poisoned)
    run = tmp_path / "run"
    with pytest.raises(
        RuntimeError,
        match="the gradient of step 3 is not finite; the state before it was saved. Examples: e",
    ):
        sft(
            tiny_checkpoint("qwen2_5_vl"),
            tiny_data,
            run,
            *FOUR_STEPS_AN_EPOCH,
            "--validation_file",
            f"site={tiny_data}",
        )
    assert run.joinpath("last").readlink().name == "checkpoint-2"
    assert all(torch.isfinite(tensor).all() for tensor in adapter(run / "last").values())
    assert [entry["step"] for entry in train_log(run)] == [1, 2]
    assert not (run / "adapter_model.safetensors").exists()  # the run is not finished


def test_training_goes_on_with_an_adapter(family, tiny_sft_run, tiny_data, tmp_path):
    """With a learning rate of 1e-12 one step leaves the adapter as it was (a fresh one would have B
    = 0): base model, prompt, rank and image size come from it.
    """
    start = tiny_sft_run(family)
    flags = [
        "--no_bf16",
        "--no_gradient_checkpointing",
        "--max_completion_length",
        "6",
        "--learning_rate",
        "1e-12",
        "--max_steps",
        "1",
        "--per_device_train_batch_size",
        "2",
        "--gradient_accumulation_steps",
        "1",
    ]
    assert (
        run_sft.main(
            [
                "--adapter_name_or_path",
                str(start),
                "--train_file",
                str(tiny_data),
                "--output_dir",
                str(tmp_path / "more"),
                *flags,
            ]
        )
        == 0
    )
    assert largest_difference(adapter(start), adapter(tmp_path / "more")) < 1e-10
    settings = record(tmp_path / "more/config.json")["settings"]
    assert settings["lora_r"] == {"value": 16, "origin": "adapter"}
    assert settings["max_visual_tokens"] == {"value": 4, "origin": "adapter's run"}
    assert settings["prompt"] == {"value": "demo", "origin": "adapter's run"}
    # SFT's own, also on an adapter that goes on
    assert record(tmp_path / "more/adapter_config.json")["lora_dropout"] == 0.1


@pytest.mark.parametrize("name", list(EMBEDDED))
def test_the_embedded_models_train(name, tiny_data, tmp_path):
    """By their names, and every projection of every layer gets a gradient: B, zero at first, has
    moved in all of them.
    """
    assert (
        sft(
            name,
            tiny_data,
            tmp_path / "run",
            "--max_steps",
            "2",
            "--min_visual_tokens",
            "16",
            "--max_visual_tokens",
            "16",
        )
        == 0
    )
    assert record(tmp_path / "run/adapter_config.json")["base_model_name_or_path"] == name
    moved = {
        key: tensor.abs().max().item()
        for key, tensor in adapter(tmp_path / "run").items()
        if "lora_B" in key
    }
    assert len(moved) == 7 * 4 and min(moved.values()) > 0  # four layers in both
