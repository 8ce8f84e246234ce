"""Protect kept image features from being another model's, another image's or damaged.

Checked against plain transformers with plain peft: an adapter in the vision tower changes the
features, whenever it comes, and those are never mixed up with the base's.

Run: pytest tests/engine/test_vision_key.py
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import engine.vision_key
from data.examples import Example
from data.files import DataError
from data.images import READING, load_image
from engine.encode import Encoder
from engine.vision import VisionCache
from engine.vision_key import TowerState, fingerprint
from tests.helpers.tiny import SAVE, attach_random_adapter, examples_of, load

FAMILIES = list(SAVE)


def plain(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def caches(model, **options) -> VisionCache:
    return VisionCache(model.net, model.family, model.encoder, **{"max_bytes": 10**9} | options)


def features_of(net, model, example) -> torch.Tensor:
    """Compute features with a model of plain transformers, with or without peft's layers in it."""
    inner = net.get_base_model() if isinstance(net, PeftModel) else net
    with torch.no_grad():
        return model.family.image_features(inner.eval(), model.encoder.encode_image(example))


@pytest.fixture(scope="module")
def tower_adapter(tiny_checkpoint, tmp_path_factory):
    """Make a peft adapter on every linear layer, those of tower and projector too."""
    made = {}

    def make(family, seed=0):
        if (family, seed) not in made:
            torch.manual_seed(seed)
            config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", lora_dropout=0.5)
            net = get_peft_model(plain(tiny_checkpoint(family)), config)
            for name, parameter in net.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.2)
            folder = tmp_path_factory.mktemp("adapter")
            net.save_pretrained(folder, save_embedding_layers=False)
            made[family, seed] = folder
        return made[family, seed]

    return make


# ---- adapters outside the decoder ----------------------------------------------------------------
@pytest.mark.parametrize("kept_on_disk", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_in_the_tower_has_features_of_its_own(
    family, kept_on_disk, tiny_checkpoint, tiny_images, tower_adapter, tmp_path
):
    """Base, first adapter, second, first again, none: each by plain peft, from one cache folder."""
    (example,) = examples_of(tiny_images, 56)
    checkpoint = tiny_checkpoint(family)
    model = load(checkpoint)
    folder = tmp_path / "kept" if kept_on_disk else None
    cache = caches(model, folder=folder)
    base = features_of(plain(checkpoint), model, example)
    torch.testing.assert_close(cache.look(example)["features"], base, rtol=0, atol=1e-6)
    first, second = (tower_adapter(family, seed) for seed in (0, 1))
    net = PeftModel.from_pretrained(model.net, first, adapter_name="default")
    right = features_of(PeftModel.from_pretrained(plain(checkpoint), first), model, example)
    assert (right - base).norm() > 0.02 * base.norm()  # it matters
    torch.testing.assert_close(cache.look(example)["features"], right, rtol=0, atol=1e-6)
    net.load_adapter(second, adapter_name="other")
    net.set_adapter("other")
    other = features_of(PeftModel.from_pretrained(plain(checkpoint), second), model, example)
    torch.testing.assert_close(cache.look(example)["features"], other, rtol=0, atol=1e-6)
    assert (other - right).norm() > 0.02 * right.norm()
    net.set_adapter("default")
    torch.testing.assert_close(cache.look(example)["features"], right, rtol=0, atol=1e-6)
    with net.disable_adapter():
        torch.testing.assert_close(cache.look(example)["features"], base, rtol=0, atol=1e-6)
    if kept_on_disk:  # another process with the base, and one with the adapter, read their own
        again = load(checkpoint)
        assert torch.equal(caches(again, folder=folder).look(example)["features"], base)
        PeftModel.from_pretrained(again.net, first, adapter_name="default")
        found = caches(again, folder=folder).look(example)["features"]
        torch.testing.assert_close(found, right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_that_changes_later_is_noticed(
    family, tiny_checkpoint, tiny_images, tower_adapter
):
    """In place, by `.data`, by its strength, by a new tensor in the same place."""
    (example,) = examples_of(tiny_images, 56)
    model = load(tiny_checkpoint(family))
    PeftModel.from_pretrained(model.net, tower_adapter(family), adapter_name="default")
    cache = caches(model)
    name, layer = next(
        (name, module)
        for name, module in model.net.named_modules()
        if hasattr(module, "lora_B") and "language_model" not in name and "lm_head" not in name
    )
    b = layer.lora_B["default"].weight
    before = cache.look(example)
    assert cache.look(example) is before

    def in_place():
        with torch.no_grad():
            b.add_(0.3)

    def by_data():
        b.data.mul_(2)

    def strength():
        layer.scaling["default"] *= 3

    def replaced():
        b.data = torch.randn(b.shape, generator=torch.Generator().manual_seed(1))

    for change in (in_place, by_data, strength, replaced):
        change()
        after = cache.look(example)
        assert not torch.equal(after["features"], before["features"]), (name, change.__name__)
        torch.testing.assert_close(
            after["features"], features_of(model.net, model, example), rtol=0, atol=1e-6
        )
        before = after


def test_an_adapters_dropout_in_the_tower_does_not_act(tiny_checkpoint, tiny_images, tower_adapter):
    (example,) = examples_of(tiny_images, 56)
    model = load(tiny_checkpoint("gemma3"))
    PeftModel.from_pretrained(model.net, tower_adapter("gemma3"), adapter_name="default")
    model.net.train()
    looks = [caches(model).look(example)["features"] for _ in range(2)]
    assert model.net.training and all(module.training for module in model.net.modules())
    assert torch.equal(*looks)
    assert torch.equal(looks[0], features_of(model.net, model, example))


def test_an_adapter_of_the_decoder_alone_shares_the_bases_features(
    tiny_checkpoint, tiny_images, tmp_path, monkeypatch
):
    (example,) = examples_of(tiny_images, 56)
    model = load(tiny_checkpoint("qwen2_5_vl"))
    base = caches(model, folder=tmp_path).look(example)["features"]
    attach_random_adapter(model)
    monkeypatch.setattr(VisionCache, "_compute", lambda *_: pytest.fail("computed again"))
    assert torch.equal(caches(model, folder=tmp_path).look(example)["features"], base)


# ---- the key -------------------------------------------------------------------------------------
def change_processor(name, value):
    return lambda encoder, _: setattr(encoder.image_processor, name, value)


CHANGES = {
    "mean": change_processor("image_mean", [0.4, 0.5, 0.5]),
    "std": change_processor("image_std", [0.4, 0.5, 0.5]),
    "resample": change_processor("resample", 0),
    "size": change_processor("size", {"shortest_edge": 3136, "longest_edge": 9999}),
    "do_resize": change_processor("do_resize", False),
    "do_rescale": change_processor("do_rescale", False),
    "do_normalize": change_processor("do_normalize", False),
    "pan and scan": change_processor("do_pan_and_scan", True),
    "epsilon": lambda _, net: setattr(net.config.vision_config, "layer_norm_eps", 0.1),
    "activation": lambda _, net: setattr(net.config.vision_config, "hidden_act", "relu"),
    "pooled tokens": lambda _, net: setattr(net.config, "mm_tokens_per_image", 1),
    "dtype": lambda _, net: net.bfloat16(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_a_feature_changes_the_key(change, tiny_checkpoint):
    model = load(tiny_checkpoint("gemma3"))
    encoder = copy.deepcopy(model.encoder)
    before = fingerprint(model.net, encoder)
    state = TowerState(model.net, encoder)
    assert state == TowerState(model.net, encoder)
    CHANGES[change](encoder, model.net)
    assert fingerprint(model.net, encoder) != before
    if change not in ("epsilon", "activation", "pooled tokens"):  # fixed once a model is loaded
        assert state != TowerState(model.net, encoder)


@pytest.mark.parametrize("library", ["torch", "transformers", "PIL", "numpy"])
def test_another_version_of_a_library_has_another_key(library, tiny_checkpoint, monkeypatch):
    model = load(tiny_checkpoint("qwen2_5_vl"))
    before = fingerprint(model.net, model.encoder)
    monkeypatch.setattr(getattr(engine.vision_key, library), "__version__", "0.0")
    assert fingerprint(model.net, model.encoder) != before


def test_another_reading_of_images_has_another_key(tiny_checkpoint, monkeypatch):
    model = load(tiny_checkpoint("qwen2_5_vl"))
    before = fingerprint(model.net, model.encoder)
    monkeypatch.setattr(engine.vision_key, "READING", READING + 1)
    assert fingerprint(model.net, model.encoder) != before


def test_the_reading_of_images_has_the_number_it_had(tmp_path):
    """Whoever changes the pixels that a file gives raises READING, and then this sum too."""
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (9, 7), dtype=np.uint8)
    deep = rng.integers(300, 40_000, (9, 7)).astype(np.uint16)
    deep[0, 0] = 65_535  # one hot pixel
    colours = rng.integers(0, 256, (9, 7, 4), dtype=np.uint8)
    images = {
        "grey": Image.fromarray(grey),
        "16 bits": Image.fromarray(deep),
        "transparent": Image.fromarray(colours, "RGBA"),
        "palette": Image.fromarray(grey).convert("P"),
        "one bit": Image.fromarray(grey).convert("1"),
    }
    total = hashlib.sha256()
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
        read = load_image(Example(name, "p", f"{name}.png", (), "site", tmp_path))
        total.update(name.encode() + np.asarray(read).tobytes())
    assert (READING, total.hexdigest()[:16]) == (2, "228e9f81b4479c0b")


# ---- what is read is verified --------------------------------------------------------------------
def damage(kind, path, others):
    whole, image = path.read_bytes(), load_file(path)
    noted = {"sha256": "0" * 64}
    if kind == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "bit flipped":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif kind == "another image's":
        shutil.copyfile(others, path)
    elif kind == "other features":
        save_file(image | {"features": image["features"] + 1}, path)
    elif kind == "other features, a sum":
        save_file(image | {"features": image["features"] + 1}, path, noted)
    elif kind == "NaN":
        save_file(image | {"features": image["features"] * float("nan")}, path, noted)
    elif kind == "shape":
        save_file(image | {"features": image["features"][:, :-1].contiguous()}, path, noted)
    elif kind == "no features":
        save_file({"x": torch.zeros(2)}, path)
    elif kind == "a header that is no object":
        path.write_bytes((2).to_bytes(8, "little") + b"[]")
    else:
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to(others)
        elif kind == "pipe":
            os.mkfifo(path)


REASONS = {
    "cut": "header|incomplete|InvalidOffset|deserializing",
    "empty": "header",
    "bit flipped": "SHA-256",
    "another image's": "SHA-256",
    "other features": "SHA-256",
    "other features, a sum": "SHA-256",
    "NaN": "its features are not finite",
    "shape": r"its features have shape \(4, 31\), not \[tokens,32\]",
    "no features": "it has no 'features', only x",
    "a header that is no object": "",
    "folder": "not a regular file",
    "link": "not a regular file",
    "pipe": "not a regular file",
}


@pytest.mark.parametrize("kind", REASONS)
def test_a_wrong_file_is_named_and_made_anew(kind, tiny_checkpoint, tiny_images, tmp_path, caplog):
    model = load(tiny_checkpoint("qwen2_5_vl"))
    example, other = examples_of(tiny_images, 56, 84)
    expected = caches(model, folder=tmp_path).look(example)
    (file,) = tmp_path.glob("*/*.safetensors")
    whole = file.read_bytes()
    caches(model, folder=tmp_path).look(other)
    (others,) = set(tmp_path.glob("*/*.safetensors")) - {file}
    untouched = others.read_bytes()
    damage(kind, file, others)
    found = caches(model, folder=tmp_path).look(example)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    (line,) = caplog.messages
    assert str(file) in line and line.endswith("; they are made anew")
    assert re.search(REASONS[kind], line)
    assert others.read_bytes() == untouched
    if kind == "folder":
        assert file.is_dir()  # not ours to remove
    else:
        assert not file.is_symlink() and file.read_bytes() == whole


def test_features_that_are_not_finite_are_refused(tiny_checkpoint, tiny_images, tmp_path):
    model = load(tiny_checkpoint("qwen2_5_vl"))
    next(model.net.model.visual.parameters()).data.fill_(float("nan"))
    (example,) = examples_of(tiny_images, 56)
    with pytest.raises(
        DataError, match="example 'e0': the model's features of image .* are not finite numbers"
    ):
        caches(model, folder=tmp_path).look(example)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_bounds_of_the_images_have_keys_of_their_own(tiny_checkpoint):
    model = load(tiny_checkpoint("qwen2_5_vl"))
    folder = tiny_checkpoint("qwen2_5_vl")
    keys = {
        fingerprint(
            model.net, Encoder.from_pretrained(folder, min_visual_tokens=low, max_visual_tokens=16)
        )
        for low in (4, 5)
    }
    assert len(keys) == 2
