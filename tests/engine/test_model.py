"""Protect loading, LoRA and the two adapters on one base.

Checked: what is trained, what is saved, and that the reference is the SFT model. A key that
silently does not load, or a reference that follows the policy, shows in no loss curve.

Run: pytest tests/engine/test_model.py
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from data.prompts import Prompt
from engine.collate import collate_rows
from engine.config import UsageError
from engine.encode import EncodedRow
from engine.forward import completion_logprobs
from engine.logprobs import token_logprobs
from engine.model import (
    POLICY,
    REFERENCE,
    BaseModel,
    adapter_config_record,
    adapter_state,
    add_reference,
    attach_adapter,
    attach_new_adapter,
    enable_gradient_checkpointing,
    load_adapter_state,
    load_model,
    use_adapter,
)
from engine.model_files import EMBEDDED, model_path
from engine.optim import build_optimizer
from rl.objective import kl_estimate
from tests.helpers import plain as plain_forward
from tests.helpers.tiny import SAVE, attach_random_adapter, examples_of, load

CPU = torch.device("cpu")
LAYERS = {"qwen2_5_vl": 2, "gemma3": 3, "qwen3_vl": 3}
PROJECTIONS = {f"self_attn.{n}_proj" for n in "qkvo"} | {
    f"mlp.{n}_proj" for n in ("gate", "up", "down")
}


@pytest.fixture(params=list(SAVE))
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family, tiny_checkpoint) -> BaseModel:
    return load(tiny_checkpoint(family))


def open_model(name) -> BaseModel:
    return load_model(
        str(name), dtype=torch.float32, device=CPU, min_visual_tokens=4, max_visual_tokens=16
    )


def rows_of(model: BaseModel, images) -> list[EncodedRow]:
    return [
        model.encode_answer(example, Prompt("p", "Which?"), answer)
        for example, answer in zip(
            examples_of(images, 56, 84), ("abc", "a longer answer"), strict=True
        )
    ]


def logprobs_of(net, model: BaseModel, images) -> torch.Tensor:
    batch = collate_rows(rows_of(model, images), model.encoder.pad_token_id)
    return completion_logprobs(net, model.family, batch, temperature=0.8)[0]


def save(wrapped: PeftModel, folder, base_name: str = "base"):
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in adapter_state(wrapped).items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps(adapter_config_record(wrapped, base_name))
    )
    return folder


@pytest.fixture
def saved(family, tiny_checkpoint, tmp_path):
    """Make the folder of an adapter that changes the outputs."""
    return save(attach_random_adapter(load(tiny_checkpoint(family)), seed=5), tmp_path / "adapter")


def move_policy(wrapped: PeftModel) -> None:
    """Make one optimizer step in some direction."""
    optimizer = build_optimizer(wrapped, learning_rate=0.1, weight_decay=0.0)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


# Loading


def test_a_base_model_is_frozen_and_in_eval_mode(model, family, tiny_checkpoint):
    assert not any(parameter.requires_grad for parameter in model.net.parameters())
    assert not model.net.training and model.net.dtype == torch.float32
    assert (model.name, model.family.model_type, model.encoder.family.model_type) == (
        str(tiny_checkpoint(family)),
        family,
        family,
    )


def test_the_dtype_is_the_one_asked_for(family, tiny_checkpoint):
    assert load(tiny_checkpoint(family), dtype=torch.bfloat16).net.dtype == torch.bfloat16


def test_the_demos_are_embedded():
    assert model_path("elsewhere/model") == "elsewhere/model"
    types = {
        name: json.loads((Path(model_path(name)) / "config.json").read_text())["model_type"]
        for name in EMBEDDED
    }
    assert types == {"demo": "qwen2_5_vl", "demo-gemma": "gemma3"}


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(UsageError) as caught:
        call(*args, **kwargs)
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)
    return str(caught.value)


def test_no_such_folder(tmp_path):
    for name in (tmp_path / "none", "./none", "none", "a/b/c"):
        said = refusal(open_model, name)
        assert (
            said == f"--model_name_or_path {name}: no such folder; "
            "give a checkpoint's folder, a hub name (owner/model) or 'demo'"
        )


def test_a_folder_without_a_configuration(tmp_path):
    said = refusal(open_model, tmp_path)
    assert (
        said == f"--model_name_or_path {tmp_path}: the folder holds no config.json, so it is no"
        " checkpoint"
    )


def test_another_model_family(tmp_path):
    for content, kind in ({"model_type": "llama"}, "'llama'"), ({}, "None"):
        (tmp_path / "config.json").write_text(json.dumps(content))
        said = refusal(open_model, tmp_path)
        assert (
            said
            == f"--model_name_or_path {tmp_path}: a {kind} model; this engine trains qwen2_5_vl,"
            " gemma3 and qwen3_vl models"
        )


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", b"{", "its config.json is not valid JSON"),
        ("tokenizer.json", None, ""),
        ("preprocessor_config.json", None, "image processor"),
        ("model.safetensors", None, "the folder holds no weights (model.safetensors, or "),
        ("model.safetensors", b"\x10\0\0\0\0\0\0\0{", ""),
    ],
)
def test_damaged_checkpoints(tiny_checkpoint, tmp_path, file, content, said):
    folder = shutil.copytree(tiny_checkpoint("qwen2_5_vl"), tmp_path / "model")
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    message = refusal(open_model, folder)
    assert message.startswith(f"--model_name_or_path {folder}: ") and said in message


# A fresh adapter


def test_lora_is_on_the_language_models_projections_only(model, family):
    wrapped = attach_new_adapter(model, r=4, alpha=8, dropout=0.1)
    names = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    pattern = re.compile(
        r"base_model\.model\.model\.language_model\.layers\.(\d+)\.(.+)\.lora_([AB])\.default\.weight"
    )
    found = [pattern.fullmatch(name) for name in names]
    expected = {
        (str(layer), projection, side)
        for layer in range(LAYERS[family])
        for projection in PROJECTIONS
        for side in "AB"
    }
    assert (
        None not in found
        and {match.groups() for match in found} == expected
        and len(names) == 2 * 7 * LAYERS[family]
    )
    # none on the vision tower or the head
    assert sum("lora_" in name for name, _ in wrapped.named_parameters()) == len(names)
    layer = wrapped.get_base_model().model.language_model.layers[0].self_attn.q_proj
    assert (
        layer.r[POLICY],
        layer.lora_alpha[POLICY],
        layer.scaling[POLICY],
        layer.lora_dropout[POLICY].p,
    ) == (4, 8, 2.0, 0.1)


def test_nothing_of_vision_or_head_is_trained(model):
    wrapped = attach_new_adapter(model, r=2, alpha=4, dropout=0.0)
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert not any(
        part in name
        for name in trained
        for part in ("visual", "vision", "lm_head", "embed", "projector", "norm")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_float32(family, tiny_checkpoint, saved, dtype):
    new = attach_new_adapter(load(tiny_checkpoint(family), dtype=dtype), r=4, alpha=8, dropout=0.0)
    loaded = attach_adapter(load(tiny_checkpoint(family), dtype=dtype), saved, trainable=True)
    add_reference(loaded, saved)
    for wrapped in (new, loaded):
        assert {p.dtype for name, p in wrapped.named_parameters() if "lora_" in name} == {
            torch.float32
        }
        assert {p.dtype for name, p in wrapped.named_parameters() if "lora_" not in name} == {dtype}


def test_a_fresh_adapter_changes_no_output(model, tiny_images):
    before = logprobs_of(model.net, model, tiny_images)
    assert torch.equal(
        logprobs_of(attach_new_adapter(model, r=4, alpha=8, dropout=0.0), model, tiny_images),
        before,
    )


def test_dropout_acts_in_training_mode_only(model, tiny_images):
    wrapped = attach_new_adapter(model, r=4, alpha=8, dropout=0.5)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.eval()
    assert torch.equal(
        logprobs_of(wrapped, model, tiny_images), logprobs_of(wrapped, model, tiny_images)
    )
    wrapped.train()
    assert not torch.equal(
        logprobs_of(wrapped, model, tiny_images), logprobs_of(wrapped, model, tiny_images)
    )


def test_gradient_checkpointing_is_the_decoders(model):
    wrapped = attach_new_adapter(model, r=2, alpha=4, dropout=0.0)
    enable_gradient_checkpointing(wrapped)
    on = {
        name
        for name, module in wrapped.named_modules()
        if getattr(module, "gradient_checkpointing", False)
    }
    assert on and all("language_model" in name for name in on)


@pytest.mark.parametrize(("dropout", "draws"), [(0.0, False), (0.1, True)])
def test_checkpointing_keeps_random_numbers_where_some_are_drawn(
    model, tiny_images, monkeypatch, dropout, draws
):
    wrapped = attach_new_adapter(model, r=2, alpha=4, dropout=dropout).train()
    enable_gradient_checkpointing(wrapped)
    kept, keep = [], torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: kept.append(1) or keep())
    torch.manual_seed(0)
    logprobs_of(wrapped, model, tiny_images).sum().backward()
    assert bool(kept) == draws


# Saving and loading


def test_a_saved_adapter_loads_in_plain_peft(family, model, tiny_checkpoint, tiny_images, tmp_path):
    bare = logprobs_of(model.net, model, tiny_images)
    wrapped = attach_random_adapter(model)
    expected = logprobs_of(wrapped, model, tiny_images)
    assert (expected - bare).abs().max() > 1e-2
    folder = save(wrapped, tmp_path / "adapter", base_name=str(tiny_checkpoint(family)))

    base = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint(family), dtype=torch.float32)
    base.lm_head.weight = model.net.lm_head.weight  # tiny.load gives the base a head of its own
    plain = PeftModel.from_pretrained(base, folder).eval()
    rows = rows_of(model, tiny_images)
    torch.testing.assert_close(
        plain_forward.logprobs_of(plain, model.family, rows, temperature=0.8),
        expected,
        rtol=0,
        atol=5e-6,
    )

    again = attach_adapter(load(tiny_checkpoint(family)), folder)
    assert torch.equal(logprobs_of(again, model, tiny_images), expected)


def test_the_saved_configuration(model):
    wrapped = attach_new_adapter(model, r=4, alpha=8, dropout=0.25)
    record = adapter_config_record(wrapped, "demo-gemma")
    assert record["base_model_name_or_path"] == "demo-gemma" and record["inference_mode"] is True
    assert (
        record["peft_type"],
        record["task_type"],
        record["r"],
        record["lora_alpha"],
        record["lora_dropout"],
    ) == ("LORA", "CAUSAL_LM", 4, 8, 0.25)
    json.dumps(record)


def test_the_policy_is_saved_and_not_the_reference(model, saved):
    wrapped = attach_adapter(model, saved, trainable=True)
    add_reference(wrapped, saved)
    move_policy(wrapped)
    original = load_file(saved / "adapter_model.safetensors")
    state, reference = adapter_state(wrapped), adapter_state(wrapped, REFERENCE)
    assert state.keys() == reference.keys() == original.keys()
    for name in original:
        assert torch.equal(reference[name], original[name]) and not torch.equal(
            state[name], original[name]
        )


@pytest.mark.parametrize("trainable", [True, False])
def test_a_loaded_adapter_is_trainable_or_not_and_has_no_dropout(
    family, tiny_checkpoint, tiny_images, saved, trainable
):
    record = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(record | {"lora_dropout": 0.9}))
    model = load(tiny_checkpoint(family))
    wrapped = attach_adapter(model, saved, trainable=trainable)
    assert {p.requires_grad for name, p in wrapped.named_parameters() if "lora_" in name} == {
        trainable
    }
    assert not any(p.requires_grad for name, p in wrapped.named_parameters() if "lora_" not in name)
    wrapped.eval()
    expected = logprobs_of(wrapped, model, tiny_images)
    wrapped.train()
    assert torch.equal(logprobs_of(wrapped, model, tiny_images), expected)


def change_saved(folder, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_keys_that_do_not_fit_are_refused(model, saved):
    first = sorted(load_file(saved / "adapter_model.safetensors"))[0]
    other = first.replace("layers.0", "layers.9")
    wrapped = attach_adapter(model, saved)
    before = {name: tensor.clone() for name, tensor in adapter_state(wrapped).items()}
    changes = [
        (
            lambda t: t.pop(first),
            f"{saved}: the adapter does not fit the model, missing: 1, such as {first}. ",
        ),
        (
            lambda t: t.update({first: torch.zeros_like(before[first]), other: torch.zeros(1)}),
            f"{saved}: the adapter does not fit the model, left over: 1, such as {other}. ",
        ),
        (
            lambda t: (t.pop(other), t.update({first: torch.zeros(3, 2)})),
            f"{saved}: {first} has shape (3, 2), the model needs ",
        ),
    ]
    for change, said in changes:
        change_saved(saved, change)
        tensors = load_file(saved / "adapter_model.safetensors")
        assert refusal(load_adapter_state, wrapped, tensors, source=str(saved)).startswith(said)
        after = adapter_state(wrapped)
        # nothing was half loaded
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_an_adapter_of_another_model_is_refused(tiny_checkpoint, tmp_path):
    # three layers; Qwen has two
    folder = save(attach_random_adapter(load(tiny_checkpoint("gemma3"))), tmp_path / "gemma")
    said = refusal(attach_adapter, load(tiny_checkpoint("qwen2_5_vl")), folder)
    assert said.startswith(f"{folder}: the adapter does not fit the model, left over: 14, such as ")


def test_folders_without_a_readable_adapter(tiny_checkpoint, saved):
    model = load(tiny_checkpoint("qwen2_5_vl"))
    for file, content, said in (
        ("adapter_config.json", b"{", "adapter_config.json cannot be read"),
        ("adapter_model.safetensors", b"nonsense", "adapter_model.safetensors cannot be read"),
    ):
        kept = (saved / file).read_bytes()
        (saved / file).write_bytes(content)
        assert refusal(attach_adapter, model, saved).startswith(f"{saved}: {said}")
        (saved / file).unlink()
        assert (
            refusal(attach_adapter, model, saved)
            == f"{saved}: no adapter there; an adapter folder holds adapter_config.json and"
            " adapter_model.safetensors"
        )
        (saved / file).write_bytes(kept)
        # the refused adapter is on the first one's layers
        model = load(tiny_checkpoint("qwen2_5_vl"))


# Two adapters


@pytest.fixture
def both(model, saved) -> PeftModel:
    wrapped = attach_adapter(model, saved, trainable=True)
    add_reference(wrapped, saved)
    return wrapped


def flags(wrapped) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in wrapped.named_parameters()}


def test_only_the_policy_is_trained(both):
    trained = {name for name, flag in flags(both).items() if flag}
    assert trained == {
        name for name, _ in both.named_parameters() if "lora_" in name and ".default." in name
    }
    assert both.active_adapter == POLICY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_the_policy_at_the_start_and_stays(
    family, tiny_checkpoint, tiny_images, saved, dtype
):
    model = load(tiny_checkpoint(family), dtype=dtype)
    both = attach_adapter(model, saved, trainable=True)
    add_reference(both, saved)
    policy = logprobs_of(both, model, tiny_images)
    with use_adapter(both, REFERENCE):
        reference = logprobs_of(both, model, tiny_images)
    assert torch.equal(policy, reference) and (kl_estimate(policy, reference) == 0).all()
    move_policy(both)
    assert (logprobs_of(both, model, tiny_images) - policy).abs().max() > 1e-2
    with use_adapter(both, REFERENCE):
        assert torch.equal(logprobs_of(both, model, tiny_images), reference)


@pytest.mark.parametrize("fails", [False, True])
def test_use_adapter_puts_everything_back(both, fails):
    before = flags(both)
    try:
        with use_adapter(both, REFERENCE):
            assert both.active_adapter == REFERENCE and not torch.is_grad_enabled()
            assert flags(both) == before  # which nothing reads without gradient
            if fails:
                raise RuntimeError("inside")
    except RuntimeError as error:
        assert fails and str(error) == "inside"
    assert both.active_adapter == POLICY and flags(both) == before and torch.is_grad_enabled()
    with pytest.raises(ValueError, match="nowhere"), use_adapter(both, "nowhere"):
        raise AssertionError("not reached")
    assert both.active_adapter == POLICY and flags(both) == before


def test_use_adapter_switches_as_peft_does(both):
    def noted():
        return {
            name: module.active_adapters
            for name, module in both.named_modules()
            if hasattr(module, "active_adapters")
        }

    of_policy = noted()
    with use_adapter(both, REFERENCE):
        ours = noted()
    assert noted() == of_policy != ours
    both.set_adapter(REFERENCE)
    assert ours == noted()


def test_use_adapter_leaves_a_frozen_policy_frozen(both):
    both.requires_grad_(False)  # as in evaluation
    with use_adapter(both, REFERENCE):
        pass
    assert not any(flags(both).values())


def test_the_reference_is_no_part_of_the_gradient(both, model, tiny_images):
    with use_adapter(both, REFERENCE):
        assert not logprobs_of(both, model, tiny_images).requires_grad
    logprobs_of(both, model, tiny_images).sum().backward()
    for name, parameter in both.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_p24_the_reference_is_the_sft_adapter(case):
    with case("P24_lora_reference") as p24:
        given = {name: torch.tensor(value) for name, value in p24.inputs.items()}
        net = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False))
        net[0].weight.data = given["W"]
        settings = {
            "r": 1,
            "lora_alpha": p24.inputs["alpha"],
            "target_modules": ["0"],
            "lora_dropout": 0.0,
        }
        wrapped = get_peft_model(net, LoraConfig(**settings), adapter_name=POLICY)
        wrapped.add_adapter(REFERENCE, LoraConfig(**settings))
        layer = wrapped.get_base_model()[0]
        for adapter, name in ((POLICY, "policy"), (REFERENCE, "sft")):
            layer.lora_A[adapter].weight.data, layer.lora_B[adapter].weight.data = (
                given[f"A_{name}"],
                given[f"B_{name}"],
            )
        x, token = given["x"][None], torch.tensor([p24.inputs["token"]])

        def logprob(logits):
            return token_logprobs(logits, torch.eye(3), token)[0]  # [1]

        policy = wrapped(x)
        with use_adapter(wrapped, REFERENCE):
            reference = wrapped(x)
        # what the reference would be if it were taken for "no adapter"
        with wrapped.disable_adapter():
            disabled = wrapped(x)
        p24.close("scaling", layer.scaling[POLICY])
        p24.close("logits_policy", policy[0])
        p24.close("logits_ref_sft_adapter", reference[0])
        p24.close("logits_adapter_disabled", disabled[0])
        p24.close("logp_policy", logprob(policy)[0])
        p24.close("logp_ref_sft_adapter", logprob(reference)[0])
        p24.close("logp_adapter_disabled", logprob(disabled)[0])
        p24.close("k3_vs_sft_adapter", kl_estimate(logprob(policy), logprob(reference))[0])
        p24.close("k3_vs_adapter_disabled", kl_estimate(logprob(policy), logprob(disabled))[0])

        # At the start of GRPO the two adapters are the same.
        layer.lora_A[POLICY].weight.data, layer.lora_B[POLICY].weight.data = (
            given["A_sft"].clone(),
            given["B_sft"].clone(),
        )
        assert kl_estimate(logprob(wrapped(x)), logprob(reference)).tolist() == [0.0]
        assert kl_estimate(logprob(wrapped(x)), logprob(disabled)).item() > 1e-3


def test_a_checkpoint_that_lacks_weights_is_refused(tiny_checkpoint, family, tmp_path):
    """transformers fills missing weights with random numbers and only warns."""
    folder = shutil.copytree(tiny_checkpoint(family), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    dropped = next(
        name
        for name in weights
        if "down_proj" in name and "visual" not in name and "vision" not in name
    )
    del weights[dropped]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="lacks 1 weights of the model, such as .*down_proj"):
        load(folder)
