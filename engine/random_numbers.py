"""Draw random numbers that are functions of their place in the run, never of what came before.

    uniform_numbers("rollout", seed, position, G, T)    those of one prompt's completions
    server_seed("rollout", seed, position)              from which a server draws them itself
    dropout_numbers(seed, step, row)                    those of one micro-batch's dropout

So nothing that a resume, a cut by memory or the number of ranks changes can change them, and no
generator's state is passed around or saved. The order of the examples is engine/order.py.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

Purpose = Literal["rollout", "evaluation"]

# The highest word of Philox's counter: streams of one key that never meet.
_STREAMS: dict[Purpose, int] = {"rollout": 0, "evaluation": 1}


def uniform_numbers(
    purpose: Purpose, seed: int, position: int, generations: int, length: int
) -> Tensor:
    """Draw the numbers that decide one prompt's completions, from its place alone.

    They come row by row, so the numbers of fewer completions are the first rows of those of more.
    Philox is used because its key takes seed and position whole, 64 bits each. torch's CPU
    generator keeps 32 bits of a seed, so that other pairs of seed and position would share numbers.

    purpose: what samples. The numbers of a rollout and of an evaluation have nothing in common.
    seed: the run's. position: of the prompt in the run, or of the image in the data set, from 0.
    generations: G, completions of the prompt. length: T, tokens of a completion at most.
    Returns [G,T] fp32 in [0, 1), on the CPU.
    """
    philox = np.random.Philox(
        key=np.array([seed, position], dtype=np.uint64),
        counter=np.array([0, 0, 0, _STREAMS[purpose]], dtype=np.uint64),
    )
    return torch.from_numpy(np.random.Generator(philox).random((generations, length), np.float32))


def server_seed(purpose: Purpose, seed: int, position: int) -> int:
    """Make the seed with which an inference server draws one prompt's completions.

    Servers add the index of a completion to it, so seeds of neighbouring places lie far apart: it
    is a hash. Arguments as those of `uniform_numbers`.
    Returns 48 bits, which every JSON parser keeps, and to which an index can be added.
    """
    words = np.random.SeedSequence(seed, spawn_key=(_STREAMS[purpose], position))
    return int(words.generate_state(1, np.uint64)[0]) >> 16


def dropout_numbers(seed: int, step: int, row: int) -> None:
    """Seed torch on every device, so that a micro-batch's dropout depends on its place alone.

    Dropout draws from torch's global generators, so these are seeded before each micro-batch. The
    seed is a hash of all three numbers, because torch's CPU generator keeps 32 bits of it only.
    Gradient checkpointing draws the same numbers again: torch puts the state of the forward back.

    seed: the run's. step: optimizer steps before this one. row: index of the micro-batch's first
    row among all rows of the step, on whichever rank it is.
    """
    words = np.random.SeedSequence(seed, spawn_key=(step, row)).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0]))
