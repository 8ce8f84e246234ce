"""Protect the cache of image features.

Checked: the frozen tower runs once for an image in a whole run, features do not depend on what else
is in the cache, and what is kept is bounded, found again on disk and made anew where it is damaged.

Run: pytest tests/engine/test_vision.py
"""

from __future__ import annotations

import errno
import shutil
from collections import Counter
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

import engine.base_model
import run_grpo
import run_sft
from data.examples import Example
from data.files import DataError
from data.prompts import Prompt
from engine.config import UsageError
from engine.encode import Encoder
from engine.vision import VisionCache, fingerprint, num_bytes
from tests.helpers.runs import assert_same_run, grpo, sft, speak
from tests.helpers.tiny import SAVE, examples_of, load

FAMILIES = list(SAVE)
GRID = "image_grid_thw"


@pytest.fixture
def towers(monkeypatch) -> Counter:
    """Record forward passes of the vision tower by the image's pixels.

    Every model that is loaded from here on is watched.
    """
    calls: Counter = Counter()
    load_model = engine.base_model.AutoModelForImageTextToText.from_pretrained

    def hooked(*arguments, **options):
        base, information = load_model(*arguments, **options)
        gemma = base.config.model_type == "gemma3"
        tower = base.model.vision_tower if gemma else base.model.visual

        def count(_, inputs, keywords):
            pixels = (
                inputs[0] if inputs else keywords.get("hidden_states", keywords.get("pixel_values"))
            )
            calls[pixels.float().numpy().tobytes()] += 1

        tower.register_forward_pre_hook(count, with_kwargs=True)
        return base, information

    monkeypatch.setattr(engine.base_model.AutoModelForImageTextToText, "from_pretrained", hooked)
    return calls


def caches(model, **options) -> VisionCache:
    return VisionCache(model.net, model.family, model.encoder, **{"max_bytes": 10**9} | options)


# ---- once an image -------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_sft_looks_at_each_image_once(family, tiny_checkpoint, tiny_data, tmp_path, towers):
    # two epochs of 12 images with a validation after each, and the same 12 decoded at the end
    assert (
        sft(
            tiny_checkpoint(family),
            tiny_data,
            tmp_path / "run",
            "--validation_file",
            f"site={tiny_data}",
            "--num_train_epochs",
            "2",
            "--per_device_train_batch_size",
            "2",
            "--gradient_accumulation_steps",
            "3",
            "--gradient_checkpointing",
        )
        == 0
    )
    assert len(towers) == 12 and set(towers.values()) == {1}


@pytest.mark.parametrize("family", FAMILIES)
def test_grpo_looks_at_each_image_once(
    family, tiny_sft_run, tiny_data, tmp_path, towers, monkeypatch
):
    speak(monkeypatch)
    start = tiny_sft_run(family)
    towers.clear()
    # two rollouts of 4 prompts from 12 rows, two updates each, old, reference and policy passes,
    # and evaluations
    assert (
        grpo(
            start,
            tiny_data,
            tmp_path / "run",
            "--validation_file",
            f"site={tiny_data}",
            "--max_steps",
            "4",
            "--eval_steps",
            "2",
            "--per_device_train_batch_size",
            "8",
            "--gradient_checkpointing",
        )
        == 0
    )
    assert len(towers) == 12 and set(towers.values()) == {1}


def test_without_room_it_is_once_a_rollout(tiny_sft_run, tiny_data, tmp_path, towers, monkeypatch):
    speak(monkeypatch)
    start = tiny_sft_run("qwen2_5_vl")
    towers.clear()
    assert (
        grpo(start, tiny_data, tmp_path / "run", "--max_steps", "4", "--vision_cache_gb", "0") == 0
    )
    assert sum(towers.values()) == 4  # two rollouts of two prompts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_does_not_depend_on_the_cache(
    family, tiny_checkpoint, tiny_sft_run, tiny_data, tmp_path, towers, monkeypatch
):
    speak(monkeypatch)
    flags = ("--validation_file", f"site={tiny_data}", "--max_steps", "4", "--save_steps", "1")
    start = tiny_sft_run(family)
    caching = {
        "cold": (),
        "none": ("--vision_cache_gb", "0"),
        "writes": ("--vision_cache_dir", str(tmp_path / "kept")),
        "reads": ("--vision_cache_dir", str(tmp_path / "kept")),
    }
    for name, more in caching.items():
        towers.clear()
        assert grpo(start, tiny_data, tmp_path / name, *flags, *more) == 0
    assert not towers  # the last run found everything on disk
    for name in list(caching)[1:]:
        assert_same_run(tmp_path / "cold", tmp_path / name)
    # resumed in the middle of a rollout, with warm features, where the first process had computed
    # them
    resume = [
        "--resume_from_checkpoint",
        str(tmp_path / "cold/checkpoint-1"),
        "--output_dir",
        str(tmp_path / "resumed"),
    ]
    assert (
        run_grpo.main(
            [*resume, "--vision_cache_dir", str(tmp_path / "kept"), "--vision_cache_gb", "1"]
        )
        == 0
    )
    assert_same_run(tmp_path / "cold", tmp_path / "resumed")


def test_sft_resumes_with_a_warm_cache(tiny_checkpoint, tiny_data, tmp_path, towers):
    flags = ("--max_steps", "3", "--save_steps", "1", "--vision_cache_dir", str(tmp_path / "kept"))
    assert sft(tiny_checkpoint("qwen2_5_vl"), tiny_data, tmp_path / "run", *flags) == 0
    towers.clear()
    assert (
        run_sft.main(
            [
                "--resume_from_checkpoint",
                str(tmp_path / "run/checkpoint-2"),
                "--output_dir",
                str(tmp_path / "resumed"),
            ]
        )
        == 0
    )
    assert not towers
    assert_same_run(tmp_path / "run", tmp_path / "resumed")


# ---- the cache itself ----------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_the_image_alone(family, tiny_checkpoint, tiny_images):
    model = load(tiny_checkpoint(family))
    examples = examples_of(tiny_images, 56, 112, 84)
    alone = [caches(model).look(example) for example in examples]
    shared = caches(model)
    for example, expected in [
        *zip(examples, alone, strict=True),
        *zip(examples[::-1], alone[::-1], strict=True),
    ]:
        found = shared.look(example)
        assert found.keys() == expected.keys() and all(
            torch.equal(found[name], expected[name]) for name in expected
        )
    with torch.no_grad():
        official = model.family.image_features(model.net, model.encoder.encode_image(examples[1]))
    assert torch.equal(alone[1]["features"], official) and not alone[1]["features"].requires_grad


@torch.no_grad()
def test_deepstack_features_are_kept_with_the_others(tiny_checkpoint, tiny_images, tmp_path):
    model = load(tiny_checkpoint("qwen3_vl"))
    examples = examples_of(tiny_images, 56, 112, 84)
    pixels = [model.encoder.encode_image(example) for example in examples]
    # transformers', of all three images at once
    official = model.net.model.get_image_features(
        *(torch.cat([image[name] for image in pixels]) for name in ("pixel_values", GRID))
    )
    layers = zip(*official.deepstack_features, strict=True)  # image by image
    for _ in ("computed", "read from the disk"):
        kept = caches(model, folder=tmp_path)
        for example, features, deepstack in zip(
            examples, official.pooler_output, layers, strict=True
        ):
            found = kept.look(example)
            assert found.keys() == {"features", "deepstack", GRID}
            assert found["deepstack"].shape == (len(features), 2, 32)
            torch.testing.assert_close(found["features"], features, rtol=0, atol=1e-5)
            expected = torch.stack(deepstack, 1)
            torch.testing.assert_close(found["deepstack"], expected, rtol=1e-5, atol=1e-5)
        layers = zip(*official.deepstack_features, strict=True)
        # the second cache has them from its folder
        model.net.model.visual.forward = None
    # 4 tokens of 3 x 32 fp32 numbers; the grid
    assert num_bytes(kept.look(examples[0])) == 4 * 3 * 32 * 4 + 3 * 8


def test_what_was_not_used_for_longest_goes_first(tiny_checkpoint, tiny_images, monkeypatch):
    model = load(tiny_checkpoint("qwen2_5_vl"))
    computed, encode = [], Encoder.encode_image
    monkeypatch.setattr(
        Encoder,
        "encode_image",
        lambda self, example, *content: (
            computed.append(example.image) or encode(self, example, *content)
        ),
    )
    a, b, c = examples_of(tiny_images, 56, 56, 56)
    size = num_bytes(caches(model).look(a))
    assert size == 4 * 32 * 4 + 3 * 8  # 4 tokens of 32 fp32 numbers; the grid
    computed.clear()
    cache = caches(model, max_bytes=2 * size)
    for example in (a, b, a, c, a, b):  # c drops b, which was used before a; b then drops c
        cache.look(example)
    assert computed == [a.image, b.image, c.image, b.image]
    cache = caches(model, max_bytes=size - 1)
    computed.clear()
    assert all(cache.look(example)["features"].shape == (4, 32) for example in (a, a))
    assert computed == [a.image] * 2  # nothing fits


def test_the_same_picture_under_two_names_is_one_and_a_changed_file_another(
    tiny_checkpoint, tiny_images, tmp_path, monkeypatch
):
    model = load(tiny_checkpoint("qwen2_5_vl"))
    computed, encode = [], Encoder.encode_image
    monkeypatch.setattr(
        Encoder,
        "encode_image",
        lambda self, example, *content: (
            computed.append(example.image) or encode(self, example, *content)
        ),
    )
    for name in ("a.png", "b.png"):
        shutil.copyfile(tiny_images / "56/image-0.png", tmp_path / name)
    first, second = (Example(name, "p", name, (), "site", tmp_path) for name in ("a.png", "b.png"))
    cache = caches(model)
    before = cache.look(first)
    assert cache.look(second) is before and computed == ["a.png"]
    Image.new("L", (60, 60), 200).save(tmp_path / "a.png")
    assert not torch.equal(cache.look(first)["features"], before["features"]) and computed == [
        "a.png",
        "a.png",
    ]
    (tmp_path / "b.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match="b.png is not a readable JPEG or PNG"):
        cache.look(second)
    (tmp_path / "b.png").unlink()
    with pytest.raises(DataError, match="no such file"):
        cache.look(second)


@pytest.mark.parametrize("drive", ["away", "failing"])
def test_an_image_whose_drive_is_gone_is_known_from_memory(
    tiny_checkpoint, tiny_images, tmp_path, monkeypatch, caplog, drive
):
    for i, name in enumerate(("a.png", "b.png", "c.png")):
        shutil.copyfile(tiny_images / f"56/image-{i}.png", tmp_path / name)
    known, dropped, new = (
        Example(name, "p", name, (), "site", tmp_path) for name in ("a.png", "b.png", "c.png")
    )
    cache = caches(load(tiny_checkpoint("qwen2_5_vl")))
    before = cache.look(known)
    cache.look(dropped)
    cache._kept.popitem()  # as where memory has no room for it
    if drive == "away":
        tmp_path.rename(tmp_path.with_name("unmounted"))
    else:
        stat, waited = Path.stat, []

        def failing(path, **options):
            if path.suffix == ".png":
                raise OSError(errno.EIO, "Input/output error")
            return stat(path, **options)

        monkeypatch.setattr(Path, "stat", failing)
        monkeypatch.setattr("data.images.time.sleep", waited.append)
    assert cache.look(known) is before and cache.look(known) is before
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.startswith("example 'a.png': image 'a.png': ")
    assert warning.endswith("; its features are kept, and serve on")
    for example in (dropped, new):
        with pytest.raises(DataError, match=f"example '{example.id}': image"):
            cache.look(example)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_file_is_read_once(family, tiny_checkpoint, tiny_images, monkeypatch):
    model = load(tiny_checkpoint(family))
    opened = []
    monkeypatch.setattr(
        "pathlib.Path.read_bytes", lambda path: opened.append(path) or path.open("rb").read()
    )
    image_open = Image.open
    monkeypatch.setattr(
        Image, "open", lambda file, **rest: opened.append(file) or image_open(file, **rest)
    )
    (example,) = examples_of(tiny_images, 56)
    path = (tiny_images / example.image).resolve()
    cache = caches(model)
    features = cache.look(example)["features"]
    # once from the disk, then from memory
    assert opened[0] == path and [isinstance(file, BytesIO) for file in opened] == [False, True]
    opened.clear()
    assert cache.look(example)["features"] is features and opened == []
    # known, but no longer kept: read again, once
    cache = caches(model, max_bytes=0)
    cache.look(example)
    opened.clear()
    assert torch.equal(cache.look(example)["features"], features)
    assert opened[0] == path and [isinstance(file, BytesIO) for file in opened] == [False, True]


def test_files_of_another_tower_or_processor_are_not_taken(tiny_checkpoint, tiny_images, tmp_path):
    model = load(tiny_checkpoint("qwen2_5_vl"))
    kept = fingerprint(model.net, model.encoder)
    assert fingerprint(load(tiny_checkpoint("qwen2_5_vl")).net, model.encoder) == kept
    language = model.net.model.language_model.layers[0].mlp.up_proj.weight
    language.data += 1  # what follows the tower has no part in its features
    assert fingerprint(model.net, model.encoder) == kept
    tower = next(model.net.model.visual.parameters())
    tower.data.flatten()[0] += 1
    changed = fingerprint(model.net, model.encoder)
    tower.data.flatten()[0] -= 1
    smaller = Encoder.from_pretrained(
        tiny_checkpoint("qwen2_5_vl"), min_visual_tokens=4, max_visual_tokens=9
    )
    assert (
        len(
            {
                kept,
                changed,
                fingerprint(model.net, smaller),
                fingerprint(model.net.bfloat16(), model.encoder),
            }
        )
        == 4
    )


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_file_that_is_damaged_is_made_anew(damage, tiny_checkpoint, tiny_images, tmp_path):
    model = load(tiny_checkpoint("gemma3"))
    (example,) = examples_of(tiny_images, 56)
    expected = caches(model, folder=tmp_path).look(example)
    (file,) = tmp_path.glob("*/*.safetensors")
    whole = file.read_bytes()
    file.unlink() if damage == "missing" else file.write_bytes(whole[:100])
    assert torch.equal(
        caches(model, folder=tmp_path).look(example)["features"], expected["features"]
    )
    # the folder and the file
    assert file.read_bytes() == whole and len(list(tmp_path.rglob("*"))) == 2


def test_a_disk_that_takes_nothing_ends_no_run(tiny_checkpoint, tiny_images, tmp_path, caplog):
    model = load(tiny_checkpoint("qwen2_5_vl"))
    cache = caches(model, folder=tmp_path / "kept")
    (tmp_path / "kept").write_text("in the way")
    for example in examples_of(tiny_images, 56, 112):
        assert torch.equal(cache.look(example)["features"], caches(model).look(example)["features"])
    assert len([line for line in caplog.messages if "image features are not kept in" in line]) == 1
    with pytest.raises(
        UsageError, match="--vision_cache_dir .*kept: not a folder; give one, it need not exist yet"
    ):
        caches(model, folder=tmp_path / "kept")


def test_a_loaded_model_encodes_with_features(tiny_checkpoint, tiny_images):
    model = load(tiny_checkpoint("qwen2_5_vl"))
    prompt = model.encode_prompt(examples_of(tiny_images, 112)[0], Prompt("a", "Which?"))
    assert (
        prompt.vision.keys() == {"features", "image_grid_thw"}
        and len(prompt.vision["features"]) == int(prompt.token_types.sum()) == 16
    )
