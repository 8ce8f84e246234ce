"""Protect the start with checkpoints as people bring them: what is known to work does, and all else
is one line and exit code 2, before weights are read where that is possible.

Run: pytest tests/engine/test_model_checks.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import engine.base_model
import run_grpo
import run_sft
from data.files import DataError
from data.prompts import Prompt
from engine.config import UsageError
from engine.encode import Encoder
from engine.model import load_encoder, load_model
from engine.model_checks import quantised_name
from engine.runtime import main_guard
from tests.helpers.runs import SFT
from tests.helpers.tiny import SAVE, examples_of

FAMILIES = list(SAVE)
PROMPT = Prompt("short", "Which?")
INDEX = "model.safetensors.index.json"
HALF = "model-0000{}-of-00002.safetensors"


@pytest.fixture
def base(tiny_checkpoint, tmp_path):
    """Copy a family's checkpoint, to be changed."""
    return lambda family: Path(shutil.copytree(tiny_checkpoint(family), tmp_path / "base"))


def edit(path, remove=(), **changes):
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in record.items() if key not in remove}))


def encoder_of(folder) -> Encoder:
    return load_encoder(str(folder), min_visual_tokens=4, max_visual_tokens=16)


def model_of(folder, dtype=torch.float32):
    return load_model(
        str(folder),
        dtype=dtype,
        device=torch.device("cpu"),
        min_visual_tokens=4,
        max_visual_tokens=16,
    )


def refusal(load, folder) -> str:
    with pytest.raises(UsageError) as caught:
        load(folder)
    (line,) = caught.value.problems
    assert line.startswith(f"--model_name_or_path {folder}: ") and "\n" not in line
    return line


# ---- quantised -----------------------------------------------------------------------------------
QUANTISED = {
    "awq": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "fp8": {"quantization_config": {"quant_method": "fp8"}},
    "mxfp4": {"quantization_config": {"quant_method": "mxfp4"}},
    "compressed-tensors": {"quantization_config": {"quant_method": "compressed-tensors"}},
    "4 bits": {"quantization_config": {"load_in_4bit": True}},
    "quantization": {"quantization": {"group_size": 64, "bits": 4}},  # MLX
    "torchao": {"text_config": {"quantization_config": {"quant_method": "torchao"}}},
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_checkpoint_is_one_line(kind, base, monkeypatch):
    folder = base("qwen2_5_vl")
    edit(folder / "config.json", **QUANTISED[kind])
    (folder / "model.safetensors").unlink()  # not looked at
    for load in (encoder_of, model_of):
        line = refusal(load, folder)
        assert f"a quantised checkpoint ({kind}); quantised weights are neither" in line
        assert "Give the model in full precision (bf16) that it was made from" in line


@pytest.mark.parametrize("file", ["quantize_config.json", "hf_quant_config.json"])
def test_a_quantisers_own_file_tells_it_too(file, base):
    folder = base("gemma3")
    (folder / file).write_text("{}")
    assert f"a quantised checkpoint ({file})" in refusal(encoder_of, folder)


@pytest.mark.parametrize(
    ("dtype", "key"), [(torch.uint8, "x.weight"), (torch.float8_e4m3fn, "x"), (None, "x.qweight")]
)
def test_quantised_weights_without_a_word_are_found(dtype, key, base):
    folder = base("qwen2_5_vl")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[key] = torch.zeros(4, dtype=dtype or torch.int32)
    save_file(tensors, path, {"format": "pt"})
    assert f"a quantised checkpoint ({key} in model.safetensors is " in refusal(model_of, folder)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("unsloth/qwen2.5-vl-7b-instruct-bnb-4bit", "bnb"),
        ("unsloth/gemma-3-4b-it-unsloth-bnb-4bit", "bnb"),
        ("Qwen/Qwen2.5-VL-3B-Instruct-AWQ", "awq"),
        ("someone/medgemma-4b-it-GPTQ-Int4", "gptq"),
        ("RedHatAI/Qwen2.5-VL-3B-Instruct-quantized.w8a8", "quantized"),
        ("someone/Qwen2.5-VL-7B-Instruct-FP8-dynamic", "fp8"),
        ("mlx-community/gemma-3-4b-it-4bit", "4bit"),
        ("unsloth/medgemma-4b-it-GGUF", "gguf"),
        ("someone/medgemma-4b-it-Q4_K_M", "q4_k"),
        ("google/gemma-3-4b-it-qat-int4-unquantized", "int4"),
        ("Qwen/Qwen2.5-VL-3B-Instruct", None),
        ("google/medgemma-27b-it", None),
        ("someone/awqward-model", None),
        ("Qwen/Qwen3-VL-4B-Instruct", None),
        ("someone/bits-of-4", None),
    ],
)
def test_hub_names_of_quantised_checkpoints(name, method):
    found = quantised_name(name)
    assert found == method or (method == "q4_k" and found is not None)


@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_an_adapter_of_a_quantised_base_is_one_line_without_the_hub(
    script, tiny_sft_run, tiny_data, tmp_path, monkeypatch, capsys
):
    """The base is named by the adapter alone, as Unsloth's adapters do."""
    adapter = shutil.copytree(tiny_sft_run("qwen2_5_vl"), tmp_path / "adapter")
    named = "unsloth/qwen2.5-vl-7b-instruct-unsloth-bnb-4bit"
    edit(adapter / "adapter_config.json", base_model_name_or_path=named)
    (adapter / "config.json").unlink()
    monkeypatch.setattr("engine.encode.cached_file", lambda *_, **__: pytest.fail("hub asked"))
    argv = ["--adapter_name_or_path", str(adapter), "--train_file", str(tiny_data)]
    main = {"sft": run_sft.main, "grpo": run_grpo.main}[script]
    assert main_guard(lambda: main([*argv, "--prompt", "demo"]), errors=(DataError,)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert errors == [
        f"error: --model_name_or_path {named}: a quantised checkpoint (bnb); quantised weights are"
        " neither trained on nor run here. Give the model in full precision (bf16) that it was made"
        " from with --model_name_or_path, such as unsloth/qwen2.5-vl-7b-instruct"
    ]


# ---- weights -------------------------------------------------------------------------------------
def shard(folder):
    """Cut model.safetensors into two shards with an index, as the hub has them."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = names[::2], names[1::2]
    weight_map = {}
    for number, half in enumerate(halves, 1):
        save_file({n: tensors[n] for n in half}, folder / HALF.format(number), {"format": "pt"})
        weight_map |= dict.fromkeys(half, HALF.format(number))
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_load_as_the_whole_does(base, tiny_checkpoint):
    folder = base("qwen2_5_vl")
    shard(folder)
    whole, parts = (model_of(f).net.state_dict() for f in (tiny_checkpoint("qwen2_5_vl"), folder))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)


def test_a_missing_shard_is_named(base):
    folder = base("qwen2_5_vl")
    shard(folder)
    (folder / HALF.format(2)).unlink()
    assert f"1 of its 2 weights files are missing, such as {HALF.format(2)}" in refusal(
        model_of, folder
    )


@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_that_leaves_the_folder_is_refused(base, target):
    folder = base("qwen2_5_vl")
    shard(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = target
    (folder / INDEX).write_text(json.dumps(index))
    assert f"{INDEX} names {target!r}, which is no .safetensors file beside it" in refusal(
        model_of, folder
    )


def test_an_index_that_is_wrong_is_refused(base):
    folder = base("qwen2_5_vl")
    shard(folder)
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({"weight_map": ["x"]}))
    assert f"{INDEX} has no 'weight_map' from tensors to files" in refusal(model_of, folder)
    index["weight_map"]["not.there"] = HALF.format(1)
    (folder / INDEX).write_text(json.dumps(index))
    assert f"puts not.there into {HALF.format(1)}, which does not hold it" in refusal(
        model_of, folder
    )


DAMAGES = {
    "cut": lambda whole: whole[: len(whole) // 2],
    "cut by one byte": lambda whole: whole[:-1],
    "empty": lambda whole: b"",
    "long header": lambda whole: (2**63 - 1).to_bytes(8, "little") + whole[8:],
    "no JSON": lambda whole: whole[:8] + b"x" + whole[9:],
    "a pointer of Git LFS": lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(damage, base):
    folder = base("gemma3")
    path = folder / "model.safetensors"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert "model.safetensors is damaged or not whole (" in refusal(model_of, folder)


def change_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"format": "pt"})


def first(tensors, part):
    return next(key for key in sorted(tensors) if part in key)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(family, value, base):
    folder = base(family)
    change_weights(folder, lambda t: t[first(t, "mlp")].view(-1)[1:2].fill_(value))
    assert "holds numbers that are not finite (NaN or infinite)" in refusal(model_of, folder)


def test_a_wrong_shape_is_named(base):
    folder = base("qwen2_5_vl")
    change_weights(folder, lambda t: t.update({(k := first(t, "embed_tokens")): t[k][:-1]}))
    line = refusal(model_of, folder)
    assert "embed_tokens.weight has shape (267, 32), and its config.json makes a model" in line
    assert "needs (268, 32)" in line


def test_missing_weights_are_counted(base):
    folder = base("qwen2_5_vl")
    change_weights(folder, lambda t: t.pop(first(t, "q_proj.weight")))
    assert "the checkpoint lacks 1 weights of the model, such as " in refusal(model_of, folder)


def test_weights_without_a_place_are_said(base, capsys):
    folder = base("qwen2_5_vl")
    change_weights(
        folder, lambda t: t.update({"model.language_model.extra.weight": torch.zeros(2)})
    )
    model_of(folder)
    (note,) = [line for line in capsys.readouterr().err.splitlines() if "have no place" in line]
    assert note == (
        f"note: {folder}: 1 weights of the checkpoint have no place in the model and are left out,"
        " such as model.language_model.extra.weight"
    )
    change_weights(folder, lambda t: t.update({"model.q_proj.lora_A.weight": torch.zeros(2)}))
    assert "holds an adapter's weights beside its own" in refusal(model_of, folder)


def test_a_folder_of_pickles_is_one_line_and_nothing_is_unpickled(base, tmp_path):
    folder = base("qwen2_5_vl")
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self):
            return Path.touch, (marker,)

    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    line = refusal(model_of, folder)
    assert "its weights are in pytorch_model.bin (PyTorch's pickle format" in line
    assert "save_pretrained" in line and not marker.exists()


@pytest.mark.parametrize(
    "left",
    ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "adapter_model.bin"],
)
def test_what_a_trainer_leaves_is_not_taken_for_weights(left, base):
    folder = base("qwen2_5_vl")
    (folder / "model.safetensors").unlink()
    (folder / left).write_bytes(b"")
    assert "the folder holds no weights (model.safetensors, or" in refusal(model_of, folder)
    (folder / "z.bin").write_bytes(b"")
    assert "its weights are in z.bin (" in refusal(model_of, folder)


def test_no_code_of_a_checkpoint_runs_and_none_is_asked_about(base, tmp_path, monkeypatch):
    folder = base("qwen2_5_vl")
    marker = tmp_path / "marker"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    maps = dict.fromkeys(
        ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor"), "evil.Evil"
    )
    maps |= {"AutoImageProcessor": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        edit(folder / file, auto_map=maps)
    edit(folder / "preprocessor_config.json", image_processor_type="Evil")
    edit(folder / "tokenizer_config.json", tokenizer_class="Evil")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    try:
        model_of(folder)
    except UsageError as error:
        assert len(error.problems) == 1
    assert not marker.exists()


# ---- tokenizers and templates --------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["jinja", "json", "config", "named", "folder", "named json"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_is_found_wherever_it_stands(family, kind, base, tiny_checkpoint, tiny_images):
    example = examples_of(tiny_images, 56)[0]
    expected = encoder_of(tiny_checkpoint(family)).encode_answer(example, PROMPT, "Edema")
    folder = base(family)
    path = folder / "chat_template.jinja"
    template = path.read_text()
    if kind != "jinja":
        path.unlink()
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": template}]
    if kind == "json":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    elif kind == "named json":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": named}))
    elif kind == "config":
        edit(folder / "tokenizer_config.json", chat_template=template)
    elif kind == "named":
        edit(folder / "tokenizer_config.json", chat_template=named)
    elif kind == "folder":
        path.write_text(template)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates/rag.jinja").write_text("x")
    row = encoder_of(folder).encode_answer(example, PROMPT, "Edema")
    assert torch.equal(row.prompt.input_ids, expected.prompt.input_ids)
    assert torch.equal(row.completion_ids, expected.completion_ids)


def test_without_a_template_one_line_says_so(base):
    folder = base("qwen2_5_vl")
    (folder / "chat_template.jinja").unlink()
    assert "it has no chat template; put the one of the model it was made from" in refusal(
        encoder_of, folder
    )
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": 3}))
    assert "its chat_template.json holds no 'chat_template'" in refusal(encoder_of, folder)
    (folder / "chat_template.json").write_text("{")
    assert "its chat_template.json is not valid JSON" in refusal(encoder_of, folder)


def test_several_templates_without_a_default_are_one_line(base):
    folder = base("qwen2_5_vl")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    named = [{"name": name, "template": template} for name in ("a", "b")]
    edit(folder / "tokenizer_config.json", chat_template=named)
    assert "its chat template fails: " in refusal(encoder_of, folder)


def test_slow_tokenizer_files_are_converted(base, tiny_checkpoint, tiny_images):
    """vocab.json and merges.txt alone, as early checkpoints of Qwen have them."""
    folder = base("qwen2_5_vl")
    record = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(record["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer.json").unlink()
    edit(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    # without the numbers of the special tokens they would get others, in silence
    assert "nothing beside it says which numbers its special tokens have" in refusal(
        encoder_of, folder
    )
    numbers = {token.pop("id"): token for token in record["added_tokens"]}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=numbers)
    example = examples_of(tiny_images, 56)[0]
    rows = [
        encoder_of(f).encode_answer(example, PROMPT, "Edema, 2 cm.")
        for f in (tiny_checkpoint("qwen2_5_vl"), folder)
    ]
    assert torch.equal(rows[0].prompt.input_ids, rows[1].prompt.input_ids)
    assert torch.equal(rows[0].completion_ids, rows[1].completion_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_tokenizer_is_one_line_with_the_remedy(family, base):
    folder = base(family)
    (folder / "tokenizer.json").unlink()
    assert "Put the tokenizer.json of the model that it was made from" in refusal(
        encoder_of, folder
    )


@pytest.mark.parametrize("content", ["{}", "[", "[]", '{"model": {"type": "Evil"}}', "\x00"])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_tokenizer_files_are_one_line(file, content, base):
    folder = base("gemma3")
    (folder / file).write_text(content)
    if (file, content) == ("tokenizer_config.json", "{}"):
        return  # nothing is needed of it
    if file == "tokenizer_config.json" and content.startswith('{"model'):
        return
    refusal(encoder_of, folder)


def test_a_tokenizer_larger_than_the_model_is_refused(base):
    folder = base("qwen2_5_vl")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder / "config.json", text_config=text | {"vocab_size": 260})
    encoder_of(folder)  # the tokenizer alone can be looked at
    line = refusal(model_of, folder)
    assert "its tokenizer has a token 262 ('<|video_pad|>')" in line and "has 260 (vocab" in line


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_token_that_the_tokenizer_lacks_is_refused(family, base):
    folder = base(family)
    key = "image_token_index" if family == "gemma3" else "image_token_id"
    edit(folder / "config.json", **{key: 7})
    assert "config.json says that token 7 stands for images, and its tokenizer has" in refusal(
        encoder_of, folder
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_padding_token_another_fills_up(family, base, tiny_checkpoint, tiny_images):
    folder = base(family)
    edit(folder / "tokenizer_config.json", remove=("pad_token",))
    encoder = encoder_of(folder)
    assert encoder.tokenizer.pad_token_id is None
    assert encoder.pad_token_id == encoder.tokenizer.eos_token_id
    (note,) = encoder.notes
    assert "the tokenizer has no padding token; " in note
    model = model_of(folder)  # nothing is masked by the id: the same row, the same loss mask
    row = model.encode_answer(examples_of(tiny_images, 56)[0], PROMPT, "Edema")
    assert row.completion_mask.all() and row.completion_ids[-1] == encoder.end_of_turn_id


# ---- image processors and configurations ---------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "name",
    [
        "Qwen2_5_VLImageProcessor",
        "Qwen2_5_VLImageProcessorFast",
        "Qwen2VLImageProcessorFast",
        "Gemma3ImageProcessorFast",
        "CLIPImageProcessor",
        "NoSuchProcessor",
        None,
    ],
)
def test_the_image_processor_is_the_familys_whatever_its_name(
    family, name, base, tiny_checkpoint, tiny_images
):
    example = examples_of(tiny_images, 112)[0]
    expected = encoder_of(tiny_checkpoint(family)).encode_image(example)
    folder = base(family)
    path = folder / "preprocessor_config.json"
    edit(path, remove=("image_processor_type",))
    edit(path, **({"feature_extractor_type": name} if name == "NoSuchProcessor" else {}))
    if name is not None:
        edit(path, image_processor_type=name)
    found = encoder_of(folder).encode_image(example)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_a_processor_config_alone_will_do(base, tiny_checkpoint, tiny_images):
    example = examples_of(tiny_images, 112)[0]
    expected = encoder_of(tiny_checkpoint("gemma3")).encode_image(example)
    folder = base("gemma3")
    path = folder / "preprocessor_config.json"
    inner = json.loads(path.read_text())
    path.unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    assert torch.equal(
        encoder_of(folder).encode_image(example)["pixel_values"], expected["pixel_values"]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_without_an_image_processor_one_line_says_so(family, base):
    folder = base(family)
    (folder / "preprocessor_config.json").unlink()
    assert "it has no preprocessor_config.json that can be read; put the one of" in refusal(
        encoder_of, folder
    )


def test_pan_and_scan_is_left_out_and_said(base, tiny_checkpoint, tmp_path):
    from PIL import Image

    from data.examples import Example

    folder = base("gemma3")
    edit(
        folder / "preprocessor_config.json",
        do_pan_and_scan=True,
        pan_and_scan_min_crop_size=16,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
    )
    Image.new("L", (120, 40), 90).save(tmp_path / "wide.png")
    example = Example("e", "p", "wide.png", (), "site", tmp_path)
    encoder = encoder_of(folder)
    row = encoder.encode_answer(example, PROMPT, "Edema")
    assert int(row.prompt.token_types.sum()) == 4
    expected = encoder_of(tiny_checkpoint("gemma3")).encode_image(example)["pixel_values"]
    assert torch.equal(row.prompt.vision["pixel_values"], expected)
    (note,) = encoder.notes
    assert "do_pan_and_scan" in note


PROCESSORS = {
    "qwen2_5_vl": [{"patch_size": 16}, {"merge_size": 1}, {"image_mean": [0.5]}, {"resample": "x"}],
    "gemma3": [{"size": {"height": 28, "width": 28}}, {"size": {"width": 56}}, {"image_std": 0}],
}


@pytest.mark.parametrize(("family", "number"), [(f, n) for f in PROCESSORS for n in range(3)])
def test_processor_settings_of_another_model_are_one_line(family, number, base):
    folder = base(family)
    edit(folder / "preprocessor_config.json", **PROCESSORS[family][number])
    assert "image processor" in refusal(encoder_of, folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"text_config": 3},
        {"text_config": {"vocab_size": "x"}},
        {"vision_config": []},
        {"vision_config": {"depth": -1}},
        {"image_token_id": None},
        {"image_token_id": "x"},
        {"model_type": None},
        {"model_type": 3},
        {"model_type": ["qwen2_5_vl"]},
        {"model_type": {}},
        {"dtype": "no dtype"},
    ],
)
def test_configurations_that_are_wrong_are_one_line(changes, base):
    folder = base("qwen2_5_vl")
    edit(folder / "config.json", **changes)
    refusal(model_of, folder)


@pytest.mark.parametrize("eos", [[[1]], "x", {"a": 1}, [None]])
def test_an_end_of_text_that_is_no_token_is_one_line(eos, base):
    folder = base("qwen2_5_vl")
    edit(folder / "generation_config.json", eos_token_id=eos)
    with pytest.raises(UsageError, match="generation_config.json says that completions end at"):
        model_of(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '"x"', "null", "[" * 100_000, "\ud800"])
def test_a_config_json_that_is_no_object_is_one_line(content, base):
    folder = base("gemma3")
    (folder / "config.json").write_bytes(content.encode(errors="surrogatepass"))
    assert "its config.json" in refusal(encoder_of, folder)


def test_a_model_is_loaded_without_code_and_without_pickles(tiny_checkpoint, monkeypatch):
    asked = {}
    load = engine.base_model.AutoModelForImageTextToText.from_pretrained

    def noted(*arguments, **options):
        asked.update(options)
        return load(*arguments, **options)

    monkeypatch.setattr(engine.base_model.AutoModelForImageTextToText, "from_pretrained", noted)
    model_of(tiny_checkpoint("qwen2_5_vl"))
    assert asked["trust_remote_code"] is False and asked["use_safetensors"] is True


def test_the_scripts_say_it_before_any_weights(base, tiny_data, tmp_path, monkeypatch, capsys):
    folder = base("qwen2_5_vl")
    edit(folder / "config.json", quantization_config={"quant_method": "awq"})
    monkeypatch.setattr("engine.policy.load_model", lambda *_, **__: pytest.fail("weights read"))
    argv = ["--model_name_or_path", str(folder), "--train_file", str(tiny_data), *SFT]
    assert main_guard(lambda: run_sft.main([*argv, "--dry_run"]), errors=(DataError,)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "a quantised checkpoint (awq)" in line
