"""Protect that the patches of tests/forks go together: whoever needs two of them applies two.

Checked: every pair fits in either order and gives the same file, by the strict reading of
tests/helpers/patches.py and by `patch -p1`; all together switched off change nothing; everyday
pairs switched on give what both mean, by hand.

Run: pytest tests/rl/test_fork_pairs.py
"""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess

import pytest
import torch

from tests.helpers.objective import close, f64, weights_of
from tests.helpers.patches import FOLDER, FORKS, OBJECTIVE, module_of, patched

PAIRS = list(itertools.combinations(FORKS, 2))


@pytest.fixture
def fork(monkeypatch):
    """Make patched modules: `fork("gspo", "mis")` -> rl/objective.py with both."""

    def load(*names: str):
        source = OBJECTIVE
        for name in names:
            source = patched(name, source)
        return module_of(source, monkeypatch)

    return load


def one_row(module, *tokens: float, old: tuple[float, ...]):
    """Return what a loss of one completion needs: log pi, log pi_old, mask and weights 1/|t|."""
    logprobs, mask = f64([tokens]), torch.ones(1, len(tokens), dtype=torch.bool)
    return logprobs, f64([old]), mask, weights_of(module, mask, "grpo")


# ---- they fit ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_pair_fits_in_either_order(first, second):
    """To the letter: no hunk stands in the context of another."""
    assert patched(second, patched(first)) == patched(first, patched(second))


@pytest.mark.skipif(shutil.which("patch") is None, reason="there is no program `patch` here")
def test_patch_itself_needs_no_guessing(tmp_path):
    file = tmp_path / "rl" / "objective.py"
    file.parent.mkdir()
    for first, second in itertools.permutations(FORKS, 2):
        file.write_text(OBJECTIVE, encoding="utf-8")
        for name in (first, second):
            text = (FOLDER / f"{name}.patch").read_text(encoding="utf-8")
            command = ["patch", "-p1", "--fuzz=0"]
            done = subprocess.run(
                command, cwd=tmp_path, input=text, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, (first, second, done.stdout)
        assert file.read_text(encoding="utf-8") == patched(second, patched(first))


def test_all_together_switched_off_change_nothing(fork, checks):
    module, failed = fork(*FORKS), []
    for name, check in checks.items():
        try:
            check(module)
        except AssertionError:
            failed.append(name)
    assert failed == []


# ---- what a pair computes ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("names", "settings", "term", "weights_by_hand", "expected"),
    [
        # -(1.5 + 2) / 2 x 2 e^0.03 = -3.5 e^0.03
        (
            ("gspo",),
            {"vllm_importance_sampling_correction": True},
            "importance_sampling_ratio",
            [[1.5, 2]],
            -3.606591,
        ),
        # 1.5 x 4 = 6 for both: -6 x 2 e^0.03 = -12 e^0.03
        (("gspo", "mis"), {"mis_cap": 8.0}, "mis_weight", [[6, 6]], -12.365454),
    ],
)
def test_gspo_with_importance_sampling(names, settings, term, weights_by_hand, expected, fork):
    """Log-ratios 0.02 and 0.04: s = e^0.03 for both tokens. A = 2.

    The sampler was 1.5 and 4 times less sure than pi_old: by token 1.5 and the cap 2, by completion
    their product. Weights of the loss are 1/2.
    """
    module = fork(*names)
    logprobs, old, mask, weights = one_row(module, -0.98, -0.96, old=(-1, -1))
    config = module.ObjectiveConfig(importance_sampling_level="sequence", beta=0, **settings)
    sampling = old - f64([[math.log(1.5), math.log(4)]])
    loss, terms = module.grpo_loss(
        logprobs, old, None, f64([2]), mask, weights, config, sampling_logprobs=sampling
    )
    close(loss, expected, atol=1e-6)
    close(terms["token_ratio"], [[math.exp(0.02), math.exp(0.04)]])
    close(terms[term], weights_by_hand)


@pytest.mark.parametrize(
    ("other", "settings", "expected"),
    [
        # Ratio 5 and A = -1: min(-5, -1.22) = -5 is held at 3 A = -3. Dr. GRPO's constant is 1/4.
        ("rloo", {}, 3 / 4),
        # times the sampler's weight 1.5
        ("mis", {"mis_cap": 2.0}, 4.5 / 4),
        # one token is its own sequence
        ("gspo", {"importance_sampling_level": "sequence"}, 3 / 4),
        # CISPO takes no minimum, so nothing is left to hold: 1.22 x -1 x log pi, log pi = log 5 - 3
        ("cispo", {"policy_term": "cispo"}, 1.22 * (math.log(5) - 3) / 4),
        # beta 0.15 x KL stays out of the loss, else k3 of log(pi_ref/pi) = 0.2 would add 0.0008
        ("kl_in_reward", {"kl_in_reward": True, "beta": 0.15}, 3 / 4),
    ],
)
def test_dual_clip_under_dr_grpo_with_others(other, settings, expected, fork):
    module = fork("dual_clip", other)
    old, mask = f64([[-3]]), torch.ones(1, 1, dtype=torch.bool)
    logprobs = old + math.log(5)
    weights = weights_of(module, mask, "dr_grpo", max_completion_length=4)
    config = module.ObjectiveConfig(**{"dual_clip": 3.0, "beta": 0} | settings)
    loss, terms = module.grpo_loss(
        logprobs,
        old,
        logprobs + 0.2,
        f64([-1]),
        mask,
        weights,
        config,
        sampling_logprobs=old - math.log(1.5),
    )
    close(loss, expected)
    assert terms["dual_clipped"].all()


def test_rloo_with_the_kl_in_the_reward(fork):
    # 3, 1, 2 less 0.5 x (2, 0, 0) are 2, 1, 2; each less the mean of the others: 2 - 1.5, 1 - 2,
    # 2 - 1.5.
    module = fork("rloo", "kl_in_reward")
    config = module.ObjectiveConfig(baseline="leave_one_out", kl_in_reward=True, beta=0.5)
    advantages = module.group_advantages(
        f64([3, 1, 2]), torch.zeros(3), kl=f64([2, 0, 0]), config=config
    )
    close(advantages, [0.5, -1, 0.5])


@pytest.mark.parametrize("other", sorted(FORKS.keys() - {"entropy_bonus"}))
def test_the_entropy_bonus_with_each_of_the_others(other, fork):
    """Whatever else is on, entropies of 1 and 2 take 0.1 x (1 + 2) / 2 = 0.15 off the loss."""
    module = fork("entropy_bonus", other)
    logprobs, old, mask, weights = one_row(module, -0.5, -2, old=(-1, -1))
    losses = {}
    for bonus in (0.0, 0.1):
        settings = {FORKS[other].field: FORKS[other].on, "entropy_bonus": bonus}
        losses[bonus], _ = module.grpo_loss(
            logprobs,
            old,
            logprobs + 0.2,
            f64([1]),
            mask,
            weights,
            module.ObjectiveConfig(**settings),
            sampling_logprobs=old - 0.1,
            entropy=f64([[1, 2]]),
        )
    close(losses[0.1] - losses[0.0], -0.15)
