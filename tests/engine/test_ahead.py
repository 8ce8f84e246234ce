"""Protect the threads that prepare images ahead.

Checked: a run is the same to the last bit with them and without, an image goes with its own
example, an error comes where the image is used and as it comes without, what is kept is not
prepared, at most so many images wait, and no thread outlives its work.

Run: pytest tests/engine/test_ahead.py
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import engine.ahead
import engine.vision
from data.examples import Example
from data.files import DataError
from engine.ahead import ImagesAhead
from engine.encode import Encoder
from engine.launch import Launch
from engine.order import Order
from engine.vision import VisionCache
from tests.helpers.runs import assert_same_run, grpo, sft, speak
from tests.helpers.tiny import examples_of, load

FAMILY = "qwen2_5_vl"


def example(name: str) -> Example:
    return Example(
        id=name,
        patient_id=name,
        image=f"{name}.png",
        image_root=Path("/nowhere"),
        labels=("Edema",),
        dataset="site",
    )


NAMES = [example(name) for name in "abcdefgh"]


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something that threads do has come about."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.001)


def finished(ahead: ImagesAhead) -> bool:
    return not ahead._threads


def prepared_in_order(ahead_of: Callable, most: int, monkeypatch) -> list[str]:
    """Note in which order one thread prepares what is expected. ahead_of(ahead): expects it."""
    monkeypatch.setattr(engine.ahead, "MOST", most)
    order: list[str] = []
    ahead: ImagesAhead[str] = ImagesAhead(lambda one: order.append(one.id), 1)
    ahead_of(ahead)
    wait_for(lambda: finished(ahead))
    return order


# ---- the threads ---------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [1, 3])
def test_each_image_is_taken_once_by_its_own_example(workers):
    ahead = ImagesAhead(lambda one: one.id.upper(), workers)
    ahead.expect(NAMES)
    wait_for(lambda: finished(ahead))
    # in any order, also of one that was not expected
    assert [ahead.take(one) for one in (NAMES[3], NAMES[0], example("z"))] == ["D", "A", None]
    assert ahead.take(NAMES[3]) is None  # it is taken


def test_images_are_prepared_in_the_order_in_which_they_are_expected(monkeypatch):
    assert prepared_in_order(lambda a: a.expect(NAMES), 8, monkeypatch) == list("abcdefgh")


def test_what_is_expected_last_is_needed_first(monkeypatch):
    """An evaluation comes between two rollouts: its images go before those of the next rollout."""
    begun, go_on = threading.Event(), threading.Event()
    order: list[str] = []

    def prepare(one: Example) -> None:
        order.append(one.id)
        begun.set()
        assert go_on.wait(20)

    ahead = ImagesAhead(prepare, 1)
    ahead.expect(NAMES[:3])
    assert begun.wait(20)
    ahead.expect([NAMES[5], NAMES[6], NAMES[1]])  # b is expected already, and keeps its place
    go_on.set()
    wait_for(lambda: finished(ahead))
    assert order == list("afgbc")


def test_so_many_images_wait_and_no_more(monkeypatch):
    monkeypatch.setattr(engine.ahead, "MOST", 3)
    order: list[str] = []
    ahead = ImagesAhead(lambda one: order.append(one.id) or one.id, 2)
    ahead.expect(NAMES)
    wait_for(lambda: finished(ahead))
    assert sorted(order) == ["a", "b", "c"]
    assert ahead.take(NAMES[1]) == "b"  # which makes room for one more
    wait_for(lambda: finished(ahead))
    assert sorted(order) == ["a", "b", "c", "d"]
    # those of another call have room of their own, so that they are not held up
    ahead.expect([example("y"), example("z")])
    wait_for(lambda: finished(ahead))
    assert sorted(order) == ["a", "b", "c", "d", "y", "z"]


def test_one_that_is_needed_before_its_turn_is_left_to_the_caller():
    begun, go_on = threading.Event(), threading.Event()
    order: list[str] = []

    def prepare(one: Example) -> str:
        order.append(one.id)
        begun.set()
        assert go_on.wait(20)
        return one.id

    ahead = ImagesAhead(prepare, 1)
    ahead.expect(NAMES[:3])
    assert begun.wait(20)
    assert ahead.take(NAMES[2]) is None
    go_on.set()
    assert ahead.take(NAMES[0]) == "a"  # waits for the thread
    wait_for(lambda: finished(ahead))
    assert order == ["a", "b"]


def test_what_fails_leaves_nothing_and_the_others_are_prepared():
    def prepare(one: Example) -> str:
        if one.id == "b":
            raise MemoryError
        return one.id

    ahead = ImagesAhead(prepare, 1)
    ahead.expect(NAMES[:3])
    wait_for(lambda: finished(ahead))
    assert [ahead.take(one) for one in NAMES[:3]] == ["a", None, "c"]


def test_without_a_thread_nothing_is_prepared(monkeypatch):
    def fails(thread):
        raise RuntimeError("can't start new thread")

    ahead = ImagesAhead(lambda one: one.id, 2)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fails)
        ahead.expect(NAMES[:2])
        assert ahead.take(NAMES[0]) is None
    ahead.expect(NAMES[:1])
    wait_for(lambda: finished(ahead))
    assert [ahead.take(one) for one in NAMES[:2]] == ["a", "b"]


def test_the_end_of_the_process_waits_for_one_image():
    begun = threading.Event()

    def prepare(one: Example) -> str:
        begun.set()
        time.sleep(0.05)
        return one.id

    ahead = ImagesAhead(prepare, 1)
    ahead.expect(NAMES)
    assert begun.wait(20)
    ahead.close()
    assert finished(ahead) and ahead.take(NAMES[0]) == "a" and ahead.take(NAMES[1]) is None


def test_a_thread_that_is_gone_is_not_waited_for():
    """As in a process that was forked while it worked."""
    begun, go_on = threading.Event(), threading.Event()
    ahead = ImagesAhead(lambda one: begun.set() or go_on.wait(20) and one.id, 1)
    ahead.expect(NAMES[:1])
    assert begun.wait(20)
    child = os.fork()
    if child == 0:
        os._exit(0 if ahead.take(NAMES[0]) is None else 1)
    go_on.set()
    assert os.waitpid(child, 0)[1] == 0
    assert ahead.take(NAMES[0]) == "a"


# ---- the images of a run -------------------------------------------------------------------------
@pytest.fixture
def vision(tiny_checkpoint) -> VisionCache:
    return cache(tiny_checkpoint)


def cache(tiny_checkpoint, **options) -> VisionCache:
    model = load(tiny_checkpoint(FAMILY))
    options = {"max_bytes": 10**9} | options
    return VisionCache(model.net, model.family, model.encoder, **options)


@pytest.fixture
def opened(monkeypatch) -> dict[str, list[bool]]:
    """Note of each image that is encoded whether the main thread did it."""
    found: dict[str, list[bool]] = {}
    encode = Encoder.encode_image

    def noting(encoder, one, content=None):
        here = threading.current_thread() is threading.main_thread()
        found.setdefault(one.id, []).append(here)
        return encode(encoder, one, content)

    monkeypatch.setattr(Encoder, "encode_image", noting)
    return found


def ready(vision: VisionCache) -> None:
    wait_for(lambda: finished(vision._ahead))


def test_features_are_the_same_to_the_last_bit(vision, tiny_checkpoint, tiny_images, opened):
    examples = examples_of(tiny_images, 56, 84, 112)
    alone = [cache(tiny_checkpoint).look(one) for one in examples]
    opened.clear()
    vision.expect(examples)
    ready(vision)
    for one, expected in zip(examples, alone, strict=True):
        found = vision.look(one)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert opened == {one.id: [False] for one in examples}


def test_a_file_that_changes_is_read_again(vision, tiny_checkpoint, tiny_images, tmp_path, opened):
    one = examples_of(Path(shutil.copytree(tiny_images, tmp_path / "images")), 56)[0]
    vision.expect([one])
    ready(vision)
    file = one.image_root / one.image
    other = examples_of(tiny_images, 112)[0]
    shutil.copyfile(other.image_root / other.image, file)
    os.utime(file, ns=(1, 1))
    found = vision.look(one)
    expected = cache(tiny_checkpoint).look(other)
    assert torch.equal(found["features"], expected["features"])
    assert opened[one.id][:2] == [False, True]


def test_what_is_kept_is_not_prepared(
    vision, tiny_checkpoint, tiny_images, tmp_path, opened, monkeypatch
):
    examples = examples_of(tiny_images, 56, 84)
    for one in examples:
        vision.look(one)
    opened.clear()
    with monkeypatch.context() as patch:
        read: list[str] = []
        patch.setattr(engine.vision, "read_image", lambda one: read.append(one.id))
        vision.expect(examples)
        ready(vision)
    assert not opened and not read  # nor is its file read
    assert all(vision.look(one) for one in examples)
    # on the disk, where another run has looked at them: read, to know which they are, not resized
    first = cache(tiny_checkpoint, folder=tmp_path)
    for one in examples:
        first.look(one)
    opened.clear()
    second = cache(tiny_checkpoint, folder=tmp_path, max_bytes=0)
    second.look(examples[0])  # from now on it knows under which key
    second.expect(examples)
    ready(second)
    second.look(examples[1])
    assert not opened


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_the_error_of_an_image_comes_where_it_is_used(
    vision, tiny_checkpoint, tiny_images, tmp_path, damage
):
    good, bad = examples_of(Path(shutil.copytree(tiny_images, tmp_path / "images")), 56, 84)
    file = bad.image_root / bad.image
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(DataError) as without:
        cache(tiny_checkpoint).look(bad)
    vision.expect([bad, good])
    ready(vision)
    vision.look(good)
    with pytest.raises(DataError) as error:
        vision.look(bad)
    assert error.value.problems == without.value.problems
    assert repr(bad.id) in error.value.problems[0]


@pytest.mark.parametrize(
    ("device", "cores", "local_size", "workers"),
    # on a GPU up to four, one core of each rank's share is left to what computes
    [
        ("cpu", 64, 1, 1),
        ("cuda", 16, 1, 4),
        ("cuda", 16, 8, 1),
        ("cuda", 6, 2, 2),
        ("cuda", 1, 1, 1),
    ],
)
def test_how_many_threads_there_are(monkeypatch, device, cores, local_size, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    launch = Launch(local_size=local_size)
    monkeypatch.setattr(Launch, "of", classmethod(lambda cls: launch))
    assert engine.vision._workers(torch.device(device)) == workers


# ---- whole runs ----------------------------------------------------------------------------------
@pytest.fixture
def without(monkeypatch) -> Callable[[bool], None]:
    """Prepare nothing ahead from now on, or as many as ever."""
    most = engine.ahead.MOST
    return lambda nothing: monkeypatch.setattr(engine.ahead, "MOST", 0 if nothing else most)


FLAGS = ("--save_steps", "1", "--max_steps", "3", "--vision_cache_gb", "0")


def test_sft_is_the_same_with_them_and_without(
    tiny_checkpoint, tiny_data, tmp_path, opened, without
):
    for name in ("alone", "ahead"):
        without(name == "alone")
        opened.clear()
        assert sft(tiny_checkpoint(FAMILY), tiny_data, tmp_path / name, *FLAGS) == 0
        here = [where for of_image in opened.values() for where in of_image]
        assert all(here) if name == "alone" else not all(here)
    assert_same_run(tmp_path / "alone", tmp_path / "ahead")


def test_grpo_is_the_same_with_them_and_without_and_resumed(
    tiny_sft_run, tiny_data, tmp_path, monkeypatch, opened, without
):
    speak(monkeypatch)
    start = tiny_sft_run(FAMILY)
    flags = (*FLAGS, "--validation_file", f"site={tiny_data}", "--steps_per_generation", "1")
    for name in ("alone", "ahead"):
        without(name == "alone")
        opened.clear()
        assert grpo(start, tiny_data, tmp_path / name, *flags) == 0
        assert any(not where for of in opened.values() for where in of) == (name == "ahead")
    assert_same_run(tmp_path / "alone", tmp_path / "ahead")
    resume = ("--resume_from_checkpoint", str(tmp_path / "ahead/checkpoint-1"))
    assert grpo(start, tiny_data, tmp_path / "resumed", *resume, flags=flags) == 0
    assert_same_run(tmp_path / "alone", tmp_path / "resumed")


def test_the_examples_of_a_step_are_those_of_its_place_in_its_epoch():
    order = Order(NAMES[:5], {}, 7)
    taken = [order.of_step(step, 3, 2) for step in range(6)]
    assert [len(of_step) for of_step in taken] == [2, 2, 1] * 2  # the last of an epoch has fewer
    for epoch in (0, 1):
        ids = [one.id for of_step in taken[3 * epoch : 3 * epoch + 3] for one in of_step]
        assert ids == [NAMES[i].id for i in order.epoch(epoch)]
