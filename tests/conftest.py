"""Make what many tests share: the worked cases, small checkpoints, data and finished runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# An assert of a helper shows its values as one of a test does. Before anything imports them.
pytest.register_assert_rewrite("tests.helpers")

from tests.helpers.cases import open_case  # noqa: E402  after the line above


@pytest.fixture
def case():
    """Open worked cases: `with case("P05_full_loss") as p05:` a whole one, `with
    case("P16_sft_mask_loss", "labels") as p16:` a part.

    The id and the keys are literals: tests/rl/test_objective.py reads them from the source, to find
    cases that no test opens.
    """
    return open_case


@pytest.fixture(autouse=True)
def forget_what_was_cut_off() -> Iterator[None]:
    """Forget after each test that a call was cut off.

    A process that has cut off a call ends by `os._exit`. A later test that runs a script to its end
    would so end pytest's own process, and all of its tests.
    """
    yield
    if (time_limit := sys.modules.get("engine.time_limit")) is not None:
        time_limit._cut_off = False


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """Write a data file of 12 rows with answers, beside its images."""
    from tests.helpers.runs import write_data

    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tiny_sft_run(tmp_path_factory, tiny_checkpoint, tiny_data):
    """Train each family once: `tiny_sft_run("gemma3")` is the folder of a finished SFT run.

    It has 2 epochs of 2 steps of 6 rows, and a checkpoint at every step.
    """
    # here: most tests need no run
    from engine.encode import Encoder
    from tests.helpers.runs import DECODE, sft

    made: dict[str, Path] = {}

    def run(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("runs") / f"sft-{family}"
            flags = [
                "--num_train_epochs",
                "2",
                "--save_steps",
                "1",
                "--per_device_train_batch_size",
                "2",
                "--gradient_accumulation_steps",
                "3",
            ]
            # whichever test asks first: its `speak` must not get into the predictions
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Encoder, "decode", DECODE)
                assert (
                    sft(
                        tiny_checkpoint(family),
                        tiny_data,
                        made[family],
                        "--validation_file",
                        f"site={tiny_data}",
                        *flags,
                    )
                    == 0
                )
        return made[family]

    return run


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Callable[[str], Path]:
    """Make each family once: `tiny_checkpoint("gemma3")` is the folder of a random checkpoint.

    See tests/helpers/tiny.py. A test must not change it.
    """
    from tests.helpers.tiny import SAVE  # here: most tests need no transformers

    folders: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in folders:
            folders[family] = SAVE[family](tmp_path_factory.mktemp(family))
        return folders[family]

    return make


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory) -> Path:
    """Draw three random images of each size: 56/image-0.png (4 visual tokens for Qwen), 84/... (9),
    112/... (16).
    """
    from tests.helpers.tiny import save_images  # here: most tests need no transformers

    folder = tmp_path_factory.mktemp("images")
    for size in (56, 84, 112):
        save_images(folder / str(size), 3, size)
    return folder
