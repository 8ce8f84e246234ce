"""Measure what it saves to prepare images ahead: in a thread, in a process, or not at all.

    python tests/benchmarks/images_ahead.py                # about a minute on two cores
    python tests/benchmarks/images_ahead.py --images 8 --side 3000 --pairs 5

Each step computes for as long as its images take to open and resize (products of torch on one
thread, in place of a GPU's work), and needs the images of the next one then. The three ways
alternate. Printed are wall seconds a step, and how many times as fast as without. The images are
JPEGs of noise and gradients of the size of an X-ray, through the image processor of Qwen2.5-VL at
512 visual tokens. All ways give the same pixels, which is checked.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import checkout  # noqa: F401  this checkout before an installed one
import numpy as np
import torch
from PIL import Image

from data.examples import Example
from engine.ahead import ImagesAhead
from engine.base_model import load_encoder
from engine.encode import Encoder
from engine.families import ImageTensors
from tests.helpers.tiny import save_qwen


def save_xrays(folder: Path, count: int, side: int) -> list[Example]:
    """Save JPEGs of side x 5/6 side -> an example of each."""
    rng = np.random.default_rng(0)
    examples = []
    for i in range(count):
        grey = np.linspace(0, 200, side)[:, None] + rng.normal(20, 8, (side, side * 5 // 6))
        Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg")
        examples.append(Example(f"e{i}", f"p{i}", f"{i}.jpg", (), "drawn", folder))
    return examples


def encoder_at(folder: Path) -> Encoder:
    return load_encoder(str(folder), min_visual_tokens=256, max_visual_tokens=512)


def compute(seconds: float) -> None:
    """Keep one core busy in torch, which lets go of Python's lock."""
    a, end = torch.randn(512, 512), time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.mm(a, a)


# ---- the three ways: each makes the images of a step, and begins with those of the next ----------
class Alone:
    def __init__(self, encoder: Encoder):
        self.encoder = encoder

    def images(self, examples: list[Example]) -> list[ImageTensors]:
        return [self.encoder.encode_image(example) for example in examples]

    def expect(self, examples: list[Example]) -> None:
        pass


class InThread(Alone):
    def __init__(self, encoder: Encoder):
        super().__init__(encoder)
        self.ahead: ImagesAhead[ImageTensors] = ImagesAhead(encoder.encode_image, 1)

    def images(self, examples: list[Example]) -> list[ImageTensors]:
        return [self.ahead.take(one) or self.encoder.encode_image(one) for one in examples]

    def expect(self, examples: list[Example]) -> None:
        self.ahead.expect(examples)


_of_process: list[Encoder] = []


def _begin(folder: Path) -> None:
    torch.set_num_threads(1)
    _of_process.append(encoder_at(folder))


def _encode(example: Example) -> dict[str, np.ndarray]:
    return {k: tensor.numpy() for k, tensor in _of_process[0].encode_image(example).items()}


class InProcess(Alone):
    def __init__(self, encoder: Encoder, folder: Path):
        super().__init__(encoder)
        self.pool = ProcessPoolExecutor(1, get_context("spawn"), _begin, (folder,))
        self.futures: list = []
        self.pool.submit(int).result()

    def images(self, examples: list[Example]) -> list[ImageTensors]:
        made, self.futures = [future.result() for future in self.futures], []
        if not made:
            return super().images(examples)
        return [{k: torch.from_numpy(array) for k, array in one.items()} for one in made]

    def expect(self, examples: list[Example]) -> None:
        self.futures = [self.pool.submit(_encode, one) for one in examples]


def seconds_a_step(way: Alone, examples: list[Example], busy: Callable[[], None]) -> float:
    """Time two steps whose images are expected, after one whose images are not."""
    way.images(examples)
    way.expect(examples)
    busy()
    start = time.perf_counter()
    for _ in range(2):
        way.images(examples)
        way.expect(examples)
        busy()
    seconds = (time.perf_counter() - start) / 2
    way.images(examples)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--side", type=int, default=3056)
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        examples = save_xrays(folder, arguments.images, arguments.side)
        model = save_qwen(folder / "model")
        encoder = encoder_at(model)
        alone = Alone(encoder)
        expected = alone.images(examples)
        start = time.perf_counter()
        alone.images(examples)
        took = time.perf_counter() - start
        print(f"{arguments.images} images: {took / arguments.images:.3f} s each, on one core")
        ways = {"none": alone, "thread": InThread(encoder), "process": InProcess(encoder, model)}
        for name, way in ways.items():
            way.expect(examples)
            found = way.images(examples)
            same = all(
                torch.equal(a[k], b[k]) for a, b in zip(found, expected, strict=True) for k in a
            )
            assert same, f"{name}: other pixels"
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.pairs):
            for name, way in ways.items():
                times[name].append(seconds_a_step(way, examples, partial(compute, took)))
        for name, seconds in times.items():
            ratios = [none / own for none, own in zip(times["none"], seconds, strict=True)]
            print(
                f"{name:8} {statistics.median(seconds):6.2f} s a step,"
                f" {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) times as"
                " fast as none"
            )


if __name__ == "__main__":
    main()
