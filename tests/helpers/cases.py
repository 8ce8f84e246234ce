"""Open the worked cases of objective_cases.json: `with open_case("P05_full_loss") as p05: ...`.

Every expected number of a case that a test opens must be compared, or be listed below with the
reason why it is not ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CASES_FILE = Path(__file__).with_name("objective_cases.json")
CASES: dict[str, dict] = {
    entry["id"]: entry for entry in json.loads(CASES_FILE.read_text(encoding="utf-8"))["cases"]
}

# Expected values that the product does not make, as "<case>.<key>", or "<case>" for a case as a
# whole. `Case.differs` shows that the product's own value is another one, where there is one to
# compare with.
NOT_IN_THE_PRODUCT = {
    "P01_advantage.adv_std_ddof0_eps1e_4": (
        "population standard deviation; ours is the sample's (ddof 1)"
    ),
    "P01_advantage.adv_rloo": "leave-one-out baseline, G/(G-1) times ours: tests/forks/rloo.patch",
    "P04_kl_estimators.rows.k3_is_corrected": "k3 times the importance ratio: a variant for forks",
    "P04_kl_estimators.rows.grad_k3_is_corrected_ratio_differentiable": "gradient of that variant",
    "P04_kl_estimators.rows.grad_k3_is_corrected_ratio_detached": (
        "gradient of that variant with the ratio held fixed"
    ),
    "P04_kl_estimators.rows.grad_unbiased_w_k1": (
        "straight-through estimator with the detached ratio: a variant for forks"
    ),
    "P04_kl_estimators.identity": (
        "a sentence about that variant; its part on k2 is asserted in the test"
    ),
    "P05_full_loss.metrics.kl_seq_mean": (
        "mean of completions' means; we log the mean over tokens, as TRL does"
    ),
    "P05_full_loss.metrics.completions/mean_length": (
        "about completions, not the objective; P07 compares it"
    ),
    "P08_microbatch_invariance.naive_mean_of_microbatch_losses_divided_by_K.token_mean_dapo": (
        "a mean of means: wrong"
    ),
    "P08_microbatch_invariance.naive_mean_of_microbatch_losses_divided_by_K.seq_mean_eq2": (
        "a mean of means; right here only because both micro-batches hold two completions"
    ),
    "P08_microbatch_invariance.naive_mean_of_microbatch_losses_divided_by_K.dr_grpo_const": (
        "a mean of means; right here only because both micro-batches hold two completions"
    ),
    "P08_microbatch_invariance.wrong_sum_over_Lmax_times_one_over_K": (
        "forgets the number of completions in a micro-batch"
    ),
    "P10_tis.token_mask_icepop": "tokens outside a band get weight 0: another variant (IcePop)",
    "P10_tis.seq_weight_product": "one weight for a completion: tests/forks/mis.patch",
    "P10_tis.seq_truncate": "one weight for a completion: another variant",
    "P10_tis.seq_mask": "one weight for a completion, 0 above the cap: tests/forks/mis.patch",
    "P10_tis.seq_geometric_mean": "one weight for a completion: another variant",
    "P10_tis.mismatch_k1": "signed mean of the mismatch; the product logs that of its size",
    "P10_tis.mismatch_k3": "another statistic of the mismatch",
    "P10_tis.ess_fraction": "another statistic of the weights",
    "P11_dual_clip": "dual clip: tests/forks/dual_clip.patch",
    "P12_gspo": "one ratio for a sequence: tests/forks/gspo.patch",
    "P13_cispo": "detached clipped weights: tests/forks/cispo.patch",
    "P14_jaccard.rows.intersection": "a step of the calculation; the product returns the quotient",
    "P14_jaccard.rows.union": "a step of the calculation; the product returns the quotient",
    "P14_jaccard.rows.precision": (
        "of one image, 1 where both sets are empty; our scores count over a data set, with 0"
        " for 0/0"
    ),
    "P14_jaccard.rows.recall": (
        "of one image, 1 where both sets are empty; our scores count over a data set, with 0"
        " for 0/0"
    ),
    "P15_reward_sum": (
        "a weighted sum of reward components; the paper's rewards are Eq. 3 and Eq. 4, whose parts"
        " just add up"
    ),
    "P16_sft_mask_loss.wrong_mean_of_microbatch_means": "a mean of means: wrong",
    "P19_position_ids.wrong_arange": "positions that count the padding: wrong",
    "P21_kl_in_reward": (
        "KL inside the reward: tests/forks/kl_in_reward.patch; the paper has it in the loss"
    ),
    "P22_group_order.wrong_if_viewed_as_contiguous_groups": (
        "groups taken from the memory layout: wrong"
    ),
    "P24_lora_reference.scaling_rslora": "rank-stabilised LoRA is not used",
}


def leaves(value: Any, key: str = "") -> dict[str, Any]:
    """List expected values by dotted key.

    A list of records becomes one column for each field: `rows.k3` lists k3 of all rows.
    """
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = {name: [row[name] for row in value] for name in value[0]}
    if not isinstance(value, dict):
        return {key: value}
    return {
        path: leaf
        for name, item in value.items()
        for path, leaf in leaves(item, f"{key}.{name}" if key else name).items()
    }


def covers(prefix: str, key: str) -> bool:
    """Tell whether `prefix` names `key` or something that contains it."""
    return key == prefix or key.startswith(prefix + ".")


def scalars(value: Any, index: str = "") -> list[tuple[str, Any]]:
    """List (index, number) of all numbers in nested lists, tensors or arrays."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, (list, tuple)):
        return [(index, value)]
    return [
        pair
        for position, item in enumerate(value)
        for pair in scalars(item, f"{index}[{position}]")
    ]


class Case:
    """Compare the product with one worked case: `close` and `differs`, on its `inputs`."""

    def __init__(self, case_id: str, keys: tuple[str, ...], listed: dict[str, str]) -> None:
        self.listed = listed  # expected values that are not to be compared, with the reason
        self.id, self.inputs, self.atol = case_id, CASES[case_id]["inputs"], CASES[case_id]["atol"]
        self.lr_rtol = CASES[case_id].get("lr_rtol", 0.0)
        self.expected = leaves(CASES[case_id]["expected"])
        unknown = [key for key in keys if not any(covers(key, leaf) for leaf in self.expected)]
        assert not unknown, f"{case_id} expects nothing under {unknown}"
        opened = {
            leaf for leaf in self.expected if not keys or any(covers(key, leaf) for key in keys)
        }
        self.unchecked = {leaf for leaf in opened if not self._reason(leaf)}

    def _reason(self, leaf: str) -> str | None:
        return next(
            (reason for key, reason in self.listed.items() if covers(key, f"{self.id}.{leaf}")),
            None,
        )

    def close(self, key: str, actual: Any, rtol: float | None = None) -> None:
        """Check that the product's value is the expected one.

        Numbers are within the case's atol, or within rtol if it is given. Truth values and text are
        equal.
        """
        assert not self._reason(key), f"{self.id}.{key} is listed as not ours"
        assert not self._mismatches(key, actual, rtol)
        self.unchecked.discard(key)

    def differs(self, key: str, actual: Any) -> None:
        """Check that the product's value is not this one, which is listed as not ours."""
        assert self._reason(key), f"{self.id}.{key} is not listed as not ours"
        assert self._mismatches(key, actual), f"{self.id}.{key} came out: {self._reason(key)}"

    def _mismatches(self, key: str, actual: Any, rtol: float | None = None) -> list[str]:
        expected_scalars, actual_scalars = scalars(self.expected[key]), scalars(actual)
        expected_shape, actual_shape = (
            [index for index, _ in expected_scalars],
            [index for index, _ in actual_scalars],
        )
        assert actual_shape == expected_shape, (
            f"{self.id}.{key} has another shape: {actual} for {self.expected[key]}"
        )
        mismatches = []
        for (index, expected), (_, value) in zip(expected_scalars, actual_scalars, strict=True):
            if isinstance(expected, (bool, str)):
                same = type(value) is type(expected) and value == expected
            else:
                # False for NaN
                same = abs(value - expected) <= (
                    self.atol if rtol is None else rtol * abs(expected)
                )
            if not same:
                mismatches.append(f"{self.id}.{key}{index}: {value}, expected {expected}")
        return mismatches


@contextmanager
def open_case(
    case_id: str, *keys: str, listed: dict[str, str] = NOT_IN_THE_PRODUCT
) -> Iterator[Case]:
    """Open the case `case_id`, or its part under `keys`.

    At the end every expected value must have been compared, or be `listed`.
    """
    opened = Case(case_id, keys, listed)
    yield opened
    assert not opened.unchecked, (
        f"{case_id}: neither compared nor listed as not ours: {sorted(opened.unchecked)}"
    )
