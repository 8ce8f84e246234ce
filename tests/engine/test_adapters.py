"""Protect adapters from elsewhere: every kind gives what plain peft gives, or is refused in a line.

The oracle is plain peft around plain transformers, which run the vision tower and the head
themselves. The table of kinds in tests/README.md says what each kind must give.

Run: pytest tests/engine/test_adapters.py
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

import run_grpo
import run_sft
from data.prompts import Prompt
from engine.adapter_files import read_adapter
from engine.collate import collate_rows
from engine.config import UsageError
from engine.encode import EncodedRow
from engine.families import lm_head_weight
from engine.forward import completion_hidden_states
from engine.merge import check_can_be_folded_in, merge_adapter
from engine.merge import main as merge
from engine.model import (
    NO_EFFECT,
    REFERENCE,
    BaseModel,
    add_reference,
    attach_adapter,
    attach_new_adapter,
    check_adapter,
    frozen_parts,
    has_no_effect,
    load_model,
    trained_lora,
    use_adapter,
)
from engine.policy import Policy
from engine.saving import save_adapter
from eval.evaluate import main as evaluate
from tests.helpers.adapters import (
    KINDS,
    REFUSED_KINDS,
    change_settings,
    make_adapter,
    rename_tensors,
    write_adapter,
)
from tests.helpers.repository import ROOT
from tests.helpers.runs import GRPO, SFT, assert_same_run, record, snapshot, speak, train_log
from tests.helpers.tiny import examples_of

FAMILIES = ["qwen2_5_vl", "gemma3"]
BOUND = 5e-6  # of the largest logit; sums in another order give about 4e-7
BARE_BASE = ("embed_tokens", "lm_head")  # saved without the base's own matrix beside the LoRA


def table() -> dict[str, list[str]]:
    """Read the table of kinds -> {kind: evaluate, SFT, GRPO, merge}."""
    text = (ROOT / "tests/README.md").read_text(encoding="utf-8")
    rows = text.partition("| kind | settings of peft |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {kind: results for kind, _, *results in cells}


EXPECTED = table()


def is_right(kind: str, use: str, family: str) -> bool:
    cell = EXPECTED[kind][["evaluate", "SFT", "GRPO", "merge"].index(use)]
    of_family = cell.split(" / ")[-1 if family == "gemma3" else 0]
    assert of_family.startswith(("right", "refused"))
    return of_family.startswith("right")


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_checkpoint):
    """Make adapters once: `made("gemma3", "DoRA")` is the folder of one that peft saved."""
    folder = tmp_path_factory.mktemp("adapters")

    def make(family: str, kind: str) -> Path:
        place = folder / family / kind.replace(" ", "-")
        if not place.exists():
            bare: Any = False if kind in BARE_BASE else "auto"
            checkpoint = tiny_checkpoint(family)
            make_adapter(place, checkpoint, save_embedding_layers=bare, **KINDS[kind])
        return place

    return make


def open_model(folder: Path) -> BaseModel:
    return load_model(
        str(folder),
        dtype=torch.float32,
        device=torch.device("cpu"),
        min_visual_tokens=4,
        max_visual_tokens=16,
    )


def a_row(model: BaseModel, images: Path) -> tuple[EncodedRow, EncodedRow]:
    """Encode one example with an answer -> (with the image's features, with its pixels)."""
    question = examples_of(images, 56)[0], Prompt("p", "Which?"), "abc defg"
    return model.encode_answer(*question), model.encoder.encode_answer(*question)


@torch.no_grad()
def logits(net, model: BaseModel, row: EncodedRow) -> Tensor:
    hidden, _ = completion_hidden_states(
        net, model.family, collate_rows([row], model.encoder.pad_token_id)
    )
    return hidden @ lm_head_weight(net).T


@torch.no_grad()
def official_logits(net, row: EncodedRow) -> Tensor:
    """Compute the logits of the answer by the model's own forward, image and all."""
    prompt, answer = row.prompt, row.completion_ids
    ids = torch.cat([prompt.input_ids, answer])[None]
    types = torch.cat([prompt.token_types, torch.zeros_like(answer)])[None]
    name = "token_type_ids" if net.config.model_type == "gemma3" else "mm_token_type_ids"
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), name: types}
    first = len(prompt.input_ids) - 1
    return net(**inputs, **prompt.vision).logits[0, first : first + len(answer)]


def plain_logits(checkpoint: Path, folder: Path, row: EncodedRow) -> Tensor:
    base = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    return official_logits(PeftModel.from_pretrained(base, folder).eval(), row)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= BOUND * expected.abs().max()


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(UsageError) as caught:
        call(*args, **kwargs)
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)
    return str(caught.value)


# ---- the table -----------------------------------------------------------------------------------
def test_the_table_has_all_kinds():
    assert EXPECTED.keys() == KINDS.keys() and len(KINDS) >= 18
    text = (ROOT / "tests/README.md").read_text(encoding="utf-8").replace("pissa_niter_N", "")
    section = text.partition("Refused in all four as well:")[2].partition("Where two")[0]
    for kind in REFUSED_KINDS.keys() - {"pissa_niter_4"}:
        assert kind.split()[0].lower() in section.lower(), kind


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, kind) for family in FAMILIES for kind in KINDS),
        ("qwen3_vl", "all-linear"),
        ("qwen3_vl", "MedGemma notebook"),
    ],
)
def test_a_kind_of_adapter_gives_what_the_table_says(
    family, kind, made, tiny_checkpoint, tiny_images, tmp_path
):
    checkpoint, folder = tiny_checkpoint(family), made(family, kind)
    if not is_right(kind, "evaluate", family):
        refusal(read_adapter, folder)  # which every command asks first
        return
    skeleton = check_adapter(str(checkpoint), folder)
    model = open_model(checkpoint)
    seen, pixels = a_row(model, tiny_images)
    bare = official_logits(model.net, pixels)
    net = attach_adapter(model, folder).eval()
    seen, _ = a_row(model, tiny_images)  # by the tower with its LoRA
    expected = plain_logits(checkpoint, folder, pixels)
    assert (expected - bare).abs().max() > 1e-3 * bare.abs().max()
    assert_close(logits(net, model, seen), expected)

    if is_right(kind, "merge", family):
        check_can_be_folded_in(skeleton, folder)
        merge_adapter(net, torch.float32).save_pretrained(tmp_path / "merged")
        merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
        assert_close(official_logits(merged, pixels), expected)
        config = record(tmp_path / "merged/config.json")
        names = load_file(tmp_path / "merged/model.safetensors").keys()
        tied = {
            config["tie_word_embeddings"],
            config["text_config"].get("tie_word_embeddings", config["tie_word_embeddings"]),
        }
        # a loader that reads the flag alone finds the head that was trained
        assert tied == {"untied" not in EXPECTED[kind][3]}
        assert ("lm_head.weight" in names) == ("untied" in EXPECTED[kind][3])
    else:
        assert "lora_bias cannot be folded in" in refusal(check_can_be_folded_in, skeleton, folder)

    model = open_model(checkpoint)
    if not is_right(kind, "SFT", family):
        assert "nothing could be trained" in refusal(
            attach_adapter, model, folder, trainable=True, dropout=0.1
        )
        return
    check_training(model, folder, tiny_images, checkpoint, tmp_path / "saved")
    frozen = frozen_parts(attach_adapter(open_model(checkpoint), folder))
    also_in_tower = family == "gemma3" and "q_proj" in str(KINDS[kind].get("target_modules"))
    assert ("frozen" in EXPECTED[kind][1]) == bool(frozen) or also_in_tower or kind == "projector"


def check_training(
    model: BaseModel, folder: Path, images: Path, checkpoint: Path, saved: Path
) -> None:
    """Take one step as GRPO does: what is trained, the reference, and what is saved."""
    net = attach_adapter(model, folder, trainable=True)
    add_reference(net)
    net.train()
    seen, pixels = a_row(model, images)
    before = logits(net, model, seen)
    hidden, _ = completion_hidden_states(
        net, model.family, collate_rows([seen], model.encoder.pad_token_id)
    )
    (hidden @ lm_head_weight(net).T).square().sum().backward()
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert trained == {
        name for name, parameter in net.named_parameters() if parameter.grad is not None
    }
    assert all("language_model.layers." in name and ".default." in name for name in trained)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name in trained:
                parameter -= 0.05 * parameter.grad.sign()
    moved = logits(net, model, seen)
    assert (moved - before).abs().max() > 1e-3 * before.abs().max()
    with use_adapter(net, REFERENCE):  # it has not moved, and still is the policy's start
        assert torch.equal(logits(net, model, seen), before)
    assert {name for name, p in net.named_parameters() if p.requires_grad} == trained
    saved.mkdir()
    save_adapter(Policy(net, model, Prompt("p", "Which?")), saved)
    assert_close(moved, plain_logits(checkpoint, saved, pixels))
    read_adapter(saved)  # and it goes on here
    rank, dropout = trained_lora(net)
    assert rank == max(
        tensor.shape[0]
        for name, tensor in load_file(saved / "adapter_model.safetensors").items()
        if "language_model.layers" in name and ".lora_A." in name
    )
    assert dropout == 0.0


@pytest.mark.parametrize("kind", REFUSED_KINDS)
def test_other_kinds_are_refused_in_one_line(kind, tmp_path):
    folder = write_adapter(tmp_path / "adapter", **REFUSED_KINDS[kind])
    with pytest.raises(UsageError) as caught:
        read_adapter(folder)
    setting, value = list(REFUSED_KINDS[kind].items())[-1]
    (said,) = caught.value.problems
    assert said.startswith(f"{folder}: adapter_config.json: {setting} is ")
    assert str(value if isinstance(value, str) else "")[:20] in said


def test_every_command_refuses_before_it_loads_a_model(
    tiny_checkpoint, tiny_data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("engine.policy.load_model", None)  # never reached
    base = str(tiny_checkpoint("qwen2_5_vl"))
    settings = {"base_model_name_or_path": base, "peft_type": "IA3"}
    folder = str(write_adapter(tmp_path / "adapter", **settings))
    pair = ["--adapter_name_or_path", folder, "--model_name_or_path", base]
    said = f"{folder}: adapter_config.json: peft_type is 'IA3'; only LORA adapters can be used here"
    before = snapshot(tmp_path)
    for main, more in (
        (run_sft.main, ["--train_file", str(tiny_data)]),
        (run_grpo.main, ["--train_file", str(tiny_data)]),
    ):
        assert refusal(main, [*pair, *more]) == said
    for command, more in (
        (evaluate, ["--data_file", f"site={tiny_data}"]),
        (merge, ["--output_dir", str(tmp_path / "merged")]),
    ):
        assert command([*pair, *more]) == 2
        assert capsys.readouterr().err == f"error: {said}\n"
    assert snapshot(tmp_path) == before


def test_what_is_frozen_has_no_dropout(made, tiny_checkpoint, tiny_images):
    """An image is seen once in a run: with dropout its features would be those of one draw."""
    model = open_model(tiny_checkpoint("qwen2_5_vl"))
    folder = made("qwen2_5_vl", "suffix list")
    net = attach_adapter(model, folder, trainable=True, dropout=0.5)
    pixels = model.encoder.encode_image(examples_of(tiny_images, 56)[0])
    net.eval()
    expected = model.family.image_features(model.net, pixels)
    net.train()
    found = model.family.image_features(model.net, pixels)
    tensors = [found] if torch.is_tensor(found) else list(found.values())
    before = [expected] if torch.is_tensor(expected) else list(expected.values())
    assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True))
    assert trained_lora(net) == (4, 0.5)


# ---- whole runs ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "kind"), [("qwen2_5_vl", "unsloth"), ("gemma3", "MedGemma notebook")]
)
def test_runs_go_on_with_lora_in_the_vision_tower(
    family, kind, made, tiny_checkpoint, tiny_data, tmp_path, monkeypatch, capsys
):
    """SFT and GRPO, each also resumed from its middle to the last bit."""
    speak(monkeypatch)
    start = made(family, kind)
    flags = ["--adapter_name_or_path", str(start), "--train_file", str(tiny_data)]
    of_sft = [*flags, *SFT, "--max_steps", "2", "--save_steps", "1", "--lora_dropout", "0.1"]
    assert run_sft.main([*of_sft, "--output_dir", str(tmp_path / "sft")]) == 0
    said = capsys.readouterr().out
    assert "frozen      loaded, not trained, saved with the result: LoRA on " in said
    again = ["--resume_from_checkpoint", str(tmp_path / "sft/checkpoint-1")]
    assert run_sft.main([*again, "--output_dir", str(tmp_path / "sft-again")]) == 0
    assert_same_run(tmp_path / "sft", tmp_path / "sft-again")

    flags[1] = str(tmp_path / "sft")
    of_grpo = [*flags, *GRPO, "--max_steps", "3", "--save_steps", "1"]
    assert run_grpo.main([*of_grpo, "--output_dir", str(tmp_path / "grpo")]) == 0
    assert train_log(tmp_path / "grpo")[0]["kl"] == 0.0
    again = ["--resume_from_checkpoint", str(tmp_path / "grpo/checkpoint-1")]
    assert run_grpo.main([*again, "--output_dir", str(tmp_path / "grpo-again")]) == 0
    assert_same_run(tmp_path / "grpo", tmp_path / "grpo-again")

    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (start, tmp_path / "grpo")
    )
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) != ("language_model.layers" in name), name
    settings = record(start / "adapter_config.json")
    saved = record(tmp_path / "grpo/adapter_config.json")
    for name in ("r", "lora_alpha", "modules_to_save", "base_model_name_or_path"):
        assert saved[name] == settings[name], name
    capsys.readouterr()
    dry = [*of_grpo, "--dry_run", "--output_dir", str(tmp_path / "dry")]
    assert run_grpo.main(dry) == 0
    assert "dry run: nothing was trained" in capsys.readouterr().out


# ---- names of earlier versions -------------------------------------------------------------------
BASE = "base_model.model."
FORMER = {
    "qwen2_5_vl": [  # transformers < 4.52
        (f"{BASE}model.language_model.", f"{BASE}model."),
        (f"{BASE}model.visual.", f"{BASE}visual."),
    ],
    "gemma3": [  # transformers 4.50, 4.51
        (f"{BASE}model.language_model.", f"{BASE}language_model.model."),
        (f"{BASE}model.vision_tower.", f"{BASE}vision_tower.vision_model."),
        (f"{BASE}lm_head.", f"{BASE}language_model.lm_head."),
    ],
    "gemma3 until 4.57": [
        (f"{BASE}model.vision_tower.", f"{BASE}model.vision_tower.vision_model.")
    ],
}


@pytest.mark.parametrize("kind", ["suffix list", "MedGemma notebook", "DoRA", "embed_tokens"])
@pytest.mark.parametrize("version", FORMER)
def test_names_of_earlier_versions_are_renamed(
    version, kind, made, tiny_checkpoint, tiny_images, tmp_path
):
    family = version.split()[0]
    checkpoint = tiny_checkpoint(family)
    old = rename_tensors(shutil.copytree(made(family, kind), tmp_path / "old"), *FORMER[version])
    names = list(load_file(old / "adapter_model.safetensors"))
    if kind == "MedGemma notebook":  # peft has written the names of the modules at that time
        modules = {
            name.removeprefix(BASE).rpartition(".lora_")[0] for name in names if ".lora_" in name
        }
        change_settings(old, target_modules=sorted(modules))
    assert names != list(load_file(made(family, kind) / "adapter_model.safetensors")) or kind in (
        "DoRA",
        "embed_tokens",
    )
    check_adapter(str(checkpoint), old)
    model = open_model(checkpoint)
    _, pixels = a_row(model, tiny_images)
    net = attach_adapter(model, old).eval()
    seen, _ = a_row(model, tiny_images)
    expected = plain_logits(checkpoint, made(family, kind), pixels)
    assert_close(logits(net, model, seen), expected)
    # what goes on from it has today's names, in plain peft too
    check_training(open_model(checkpoint), old, tiny_images, checkpoint, tmp_path / "saved")
    merge_adapter(net, torch.float32).save_pretrained(tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert_close(official_logits(merged, pixels), expected)


def test_patterns_of_earlier_versions_find_their_modules(
    made, tiny_checkpoint, tiny_images, tmp_path
):
    """A rank_pattern by a former name: left aside, its modules would have another scaling."""
    checkpoint = tiny_checkpoint("gemma3")
    settings = {
        "target_modules": r"model\.language_model\.layers\.\d+\.self_attn\.(q|v)_proj",
        "alpha_pattern": {r"model\.language_model\.layers\.1\.self_attn\.q_proj": 80},
    }
    new = make_adapter(tmp_path / "new", checkpoint, **settings)
    old = rename_tensors(shutil.copytree(new, tmp_path / "old"), *FORMER["gemma3"])
    former = json.dumps(settings).replace(r"model\\.language_model", r"language_model\\.model")
    change_settings(old, **json.loads(former))
    model = open_model(checkpoint)
    seen, pixels = a_row(model, tiny_images)
    net = attach_adapter(model, old).eval()
    assert_close(logits(net, model, seen), plain_logits(checkpoint, new, pixels))


@pytest.mark.parametrize(
    "renames",
    [
        [(f"{BASE}model.", "model.")],  # without peft's own prefix
        [(f"{BASE}model.", f"{BASE}_orig_mod.model.")],  # torch.compile
        [(f"{BASE}model.", f"{BASE}_fsdp_wrapped_module.model.")],
    ],
)
def test_wrappers_in_names_are_taken_out(renames, made, tiny_checkpoint, tmp_path):
    folder = shutil.copytree(made("qwen2_5_vl", "DoRA"), tmp_path / "adapter")
    names = load_file(folder / "adapter_model.safetensors").keys()
    rename_tensors(folder, *renames)
    assert load_file(folder / "adapter_model.safetensors").keys() != names
    assert read_adapter(folder).shapes.keys() == names
    check_adapter(str(tiny_checkpoint("qwen2_5_vl")), folder)


def test_the_adapters_own_name_in_names_is_taken_out(made, tmp_path):
    """A plain state_dict has `lora_A.default.weight` and `modules_to_save.default.weight`."""
    for kind in ("DoRA", "MedGemma notebook", "embed_tokens", "trainable tokens"):
        folder = shutil.copytree(made("gemma3", kind), tmp_path / kind)
        names = list(load_file(folder / "adapter_model.safetensors"))
        marked = [
            name.replace(".lora_A.", ".lora_A.mine.")
            .replace(".lora_B.", ".lora_B.mine.")
            .replace(".lora_magnitude_vector", ".lora_magnitude_vector.mine.weight")
            .replace("lm_head.weight", "lm_head.modules_to_save.mine.weight")
            .replace("_embedding_A", "_embedding_A.mine")
            .replace("trainable_tokens_delta", "trainable_tokens_delta.mine")
            for name in names
        ]
        rename_tensors(folder, *zip(names, marked, strict=True))
        assert set(marked) != set(names)
        assert read_adapter(folder).shapes.keys() == set(names), kind


def test_two_adapters_in_one_file_are_refused(made, tmp_path):
    folder = shutil.copytree(made("qwen2_5_vl", "attention only"), tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    first = next(iter(tensors))
    twin = first.replace(".lora_A.", ".lora_A.other.").replace(".lora_B.", ".lora_B.other.")
    save_file(tensors | {twin: tensors[first].clone()}, folder / "adapter_model.safetensors")
    assert "are one tensor under two names" in refusal(read_adapter, folder)


# ---- what does not fit ---------------------------------------------------------------------------
def test_patterns_that_hit_what_cannot_have_lora(made, tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint("qwen2_5_vl")
    folder = shutil.copytree(made("qwen2_5_vl", "decoder"), tmp_path / "adapter")
    where = f"{folder}: adapter_config.json"
    for pattern, said in (
        ("^model.*", "target_modules hits model, a Qwen2_5_VLModel, which cannot have LoRA; it "),
        (["layers"], "target_modules hits model.language_model.layers, a ModuleList, which cannot"),
        (["norm"], "target_modules hits model.language_model.norm, a Qwen2_5_VLRMSNorm, which"),
        (["nothing"], "target_modules names no module of the model; it was trained on another "),
        ("(?:", "target_modules '(?:' is no regular expression (missing ), unterminated subpatt"),
    ):
        change_settings(folder, target_modules=pattern)
        assert refusal(check_adapter, str(checkpoint), folder).startswith(f"{where}: {said}")


def test_a_pattern_that_would_never_end_is_given_up(made, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.adapter_settings.PATTERN_SECONDS", 0.3)
    folder = shutil.copytree(made("qwen2_5_vl", "decoder"), tmp_path / "adapter")
    change_settings(folder, target_modules=r"(?:[a-z_.0-9]+)+!!")
    said = refusal(read_adapter, folder)
    assert "target_modules '(?:[a-z_.0-9]+)+!!' takes too long to compare" in said
    change_settings(folder, target_modules=["q_proj"], rank_pattern={r"(a|[a-z_.0-9]+)+x": 2})
    assert "rank_pattern '(a|[a-z_.0-9]+)+x' takes too long" in refusal(read_adapter, folder)


def test_a_rank_that_no_tensor_has_is_refused_before_memory_is_taken(
    made, tiny_checkpoint, tmp_path
):
    folder = shutil.copytree(made("qwen2_5_vl", "decoder"), tmp_path / "adapter")
    change_settings(folder, r=16_384)
    said = refusal(check_adapter, str(tiny_checkpoint("qwen2_5_vl")), folder)
    assert "asks for rank 16384 at model.language_model.layers.0." in said
    assert said.endswith("; the largest in adapter_model.safetensors is 4")


def test_an_embedding_of_another_base_is_refused(made, tiny_checkpoint, tmp_path):
    """peft would put the file's embedding in the place of the base's, and the head's with it."""
    checkpoint = tiny_checkpoint("qwen2_5_vl")
    kind = "embed_tokens, as peft saves it"
    folder = shutil.copytree(made("qwen2_5_vl", kind), tmp_path / "adapter")
    name = f"{BASE}model.language_model.embed_tokens.base_layer.weight"
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[name][3] += 1.0
    save_file(tensors, folder / "adapter_model.safetensors")
    said = refusal(attach_adapter, open_model(checkpoint), folder)
    assert said.startswith(f"{folder}: {name} is a weight of the base, and not as in this base")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda tensor: tensor.fill_(float("nan")), "is not finite; the adapter is damaged"),
        (lambda tensor: tensor.to(torch.int8), "is of torch.int8; the adapter is damaged"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(damage, said, made, tiny_checkpoint, tmp_path):
    folder = shutil.copytree(made("qwen2_5_vl", "attention only"), tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = sorted(tensors)[3]
    save_file(tensors | {name: damage(tensors[name])}, folder / "adapter_model.safetensors")
    model = open_model(tiny_checkpoint("qwen2_5_vl"))
    assert refusal(attach_adapter, model, folder) == f"{folder}: {name} {said}"


def test_no_notice_of_peft_is_shown(made, tiny_checkpoint):
    """Neither where an adapter is only checked, before any weight is read, nor later."""
    checkpoint, folder = tiny_checkpoint("qwen2_5_vl"), made("qwen2_5_vl", "decoder")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        check_adapter(str(checkpoint), folder)
        add_reference(attach_adapter(open_model(checkpoint), folder, trainable=True), folder)
        attach_new_adapter(open_model(checkpoint), r=2, alpha=4, dropout=0)
    assert not [one for one in shown if "checkpointing" in str(one.message)]


def test_an_adapter_without_effect_is_said(made, tiny_checkpoint, tiny_data, tmp_path, capsys):
    checkpoint = tiny_checkpoint("qwen2_5_vl")
    folder = shutil.copytree(made("qwen2_5_vl", "decoder"), tmp_path / "zero")
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.zero_()
    save_file(tensors, folder / "adapter_model.safetensors")
    flags = ["--adapter_name_or_path", str(folder), "--train_file", str(tiny_data), "--dry_run"]
    for main, more in ((run_sft.main, SFT), (run_grpo.main, [*SFT[:6], *GRPO])):
        assert main([*flags, *more, "--output_dir", str(tmp_path / "run")]) == 0
        assert f"warning     {NO_EFFECT}" in capsys.readouterr().out
    flags[1] = str(made("qwen2_5_vl", "decoder"))
    assert run_sft.main([*flags, *SFT, "--output_dir", str(tmp_path / "run")]) == 0
    assert NO_EFFECT not in capsys.readouterr().out
    flags = ["--adapter_name_or_path", str(folder), "--data_file", f"site={tiny_data}"]
    flags += ["--max_samples", "1", "--output_dir", str(tmp_path / "eval"), *SFT[:7]]
    assert evaluate([*flags, "--max_completion_length", "2"]) == 0
    assert f"warning: {folder}: {NO_EFFECT}" in capsys.readouterr().err
    assert checkpoint.is_dir()


@pytest.mark.parametrize("kind", ["modules_to_save lm_head", "trainable tokens"])
def test_an_adapter_without_lora_but_with_a_module_of_its_own_has_an_effect(
    kind, made, tiny_checkpoint
):
    net = attach_adapter(
        open_model(tiny_checkpoint("qwen2_5_vl")), made("qwen2_5_vl", kind), trainable=True
    )
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    assert not has_no_effect(net)
