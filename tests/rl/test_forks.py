"""Protect the objective as a file to fork.

Checked: eight published variants are few-line diffs of rl/objective.py alone, whose flags and
metrics appear by themselves. Each is applied to a copy and checked against its worked case;
switched off it changes nothing, switched on only what it means to change; and it runs in the whole
of run_grpo.py.

Run: pytest tests/rl/test_forks.py
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import rl.objective
from engine.config import ConfigError, parse_config
from tests.helpers.cases import CASES, NOT_IN_THE_PRODUCT, covers, leaves, open_case
from tests.helpers.objective import (
    HOSPITAL_GROUPS,
    HOSPITAL_REWARDS,
    HOSPITALS,
    close,
    f64,
    random_batch,
    step_weights,
    weights_of,
)
from tests.helpers.patches import FOLDER, FORKS, OBJECTIVE, REWARD_FORKS, module_of, patched
from tests.helpers.repository import ROOT
from tests.helpers.rollouts import advantages_of, rollouts_of, sample
from tests.helpers.runs import GRPO, read_dump, record, speak, train_log

# Expected values of the forks' cases that no patch makes; the form is that of NOT_IN_THE_PRODUCT.
NOT_IN_THE_FORKS = {
    "P21_kl_in_reward.penalised_reward": (
        "a step of the calculation; the product returns it centred"
    ),
}
# Checks of the battery that fail with a variant switched on, because they state what it changes.
TOY_NUMBERS = {"test_toy_terms", "test_toy_loss_and_gradient", "test_toy_metrics"}
TIS = {"test_p10_truncated_importance_sampling"}
# both count the terms; nothing else of theirs changes
A_NEW_TERM = {"test_toy_terms", "test_toy_metrics"}
CHANGED = {
    # P03 has one token a completion
    "gspo": TOY_NUMBERS | TIS | {"test_p05_full_loss", "test_clip_extremes_are_over_completions"},
    "cispo": TOY_NUMBERS | TIS | {"test_p03_clip", "test_p05_full_loss"},
    "dual_clip": A_NEW_TERM,  # no ratio of the cases reaches 3
    # it leaves both completions of P10 out; elsewhere the sampler agrees with pi_old
    "mis": A_NEW_TERM | TIS,
    "entropy_bonus": A_NEW_TERM,  # the checks give no entropy
    # P08 and P10 make their losses of the KL term; one row of the last has advantage 0, so nothing
    # is left of its loss
    "kl_in_reward": TIS
    | {
        "test_p05_full_loss",
        "test_p08_microbatches",
        "test_toy_terms",
        "test_toy_loss_and_gradient",
        "test_masked_slots_carry_no_loss",
    },
    # the others have one hospital, whose number they do not give
    "drpo": {
        "test_toy_hospitals",
        "test_a_hospital_alone_is_scaled_by_nothing",
        "test_a_hospitals_completions_without_a_reward_do_not_count",
    },
    "rloo": (
        TOY_NUMBERS
        | {
            "test_p01_advantages",
            "test_p02_zero_variance",
            "test_p22_groups_by_id",
            "test_toy_advantages",
            "test_toy_hospitals",
            "test_a_hospitals_completions_without_a_reward_do_not_count",
        }
    ),
}
# of DRPO there is no worked case: its test has the numbers
fork_case = partial(open_case, listed=NOT_IN_THE_FORKS)


@pytest.fixture
def fork(monkeypatch):
    """Make patched modules: `fork("gspo")` -> rl/objective.py with that patch."""
    return lambda name: module_of(patched(name), monkeypatch)


def switched_on(module: ModuleType, **settings) -> SimpleNamespace:
    """Switch the variant on in every call of the module, as the checks make them.

    They give no KL, no entropy and no log-probabilities of the sampler: 0, 0, and those of pi_old.
    """
    config = partial(module.ObjectiveConfig, **settings)

    def group_advantages(rewards, group_ids, scale_rewards="none", **more):
        given = {"kl": torch.zeros_like(rewards), "config": config()} | more
        return module.group_advantages(rewards, group_ids, scale_rewards, **given)

    def grpo_loss(logprobs, old_logprobs, *rest, sampling_logprobs=None, entropy=None, **more):
        more["sampling_logprobs"] = old_logprobs if sampling_logprobs is None else sampling_logprobs
        more["entropy"] = torch.zeros_like(logprobs) if entropy is None else entropy
        return module.grpo_loss(logprobs, old_logprobs, *rest, **more)

    changed = {
        "ObjectiveConfig": config,
        "group_advantages": group_advantages,
        "grpo_loss": grpo_loss,
    }
    return SimpleNamespace(**vars(module) | changed)


def fails(check, module) -> bool:
    try:
        check(module)
    except AssertionError:
        return True
    return False


# ---- what a patch touches ------------------------------------------------------------------------
def test_every_patch_is_known():
    known = {*FORKS, *REWARD_FORKS}
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.patch" for name in known}
    named = [
        name
        for reason in NOT_IN_THE_PRODUCT.values()
        for name in re.findall(r"tests/forks/(\w+)\.patch", reason)
    ]
    # each worked case that the product leaves to a fork; there is none of the others
    assert sorted(set(named)) == sorted(FORKS.keys() - {"entropy_bonus", "drpo"})


@pytest.mark.parametrize("name", FORKS)
def test_switched_off_a_fork_changes_nothing(name, fork, checks):
    module = fork(name)
    assert [check for check, run in checks.items() if fails(run, module)] == []


@pytest.mark.parametrize("name", FORKS)
def test_switched_on_a_fork_changes_what_it_means_to(name, fork, checks):
    module = switched_on(fork(name), **{FORKS[name].field: FORKS[name].on})
    assert {check for check, run in checks.items() if fails(run, module)} == CHANGED[name]


@pytest.mark.parametrize("name", FORKS)
def test_the_new_field_is_a_flag_by_itself(name, fork, capsys):
    config_class, flag = fork(name).ObjectiveConfig, f"--{FORKS[name].field}"
    before = {field.name for field in dataclasses.fields(rl.objective.ObjectiveConfig)}
    [field] = [field for field in dataclasses.fields(config_class) if field.name not in before]
    assert field.name == FORKS[name].field and field.metadata["help"] and field.metadata["source"]
    parse = partial(parse_config, [config_class], script="grpo", prog="run_grpo.py")
    resolved = parse([flag, str(FORKS[name].on)])
    assert getattr(resolved.configs[0], field.name) == FORKS[name].on != field.default
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert flag in capsys.readouterr().out


@pytest.mark.parametrize("name", FORKS)
def test_the_new_term_is_logged_by_itself(name, fork):
    """And only where the variant is on; its metric is the mean over tokens, as for any term of a
    fork.
    """
    module, batch = fork(name), random_batch(seed=0)
    found = {}
    for switch in ({}, {FORKS[name].field: FORKS[name].on}):
        config = module.ObjectiveConfig(**switch)
        _, terms = module.grpo_loss(
            **batch, weights=step_weights(module, batch["mask"], "dr_grpo"), config=config
        )
        found[bool(switch)] = module.objective_metrics(
            terms, batch["advantages"], batch["mask"], config
        )
    new = found[True].keys() - found[False].keys()
    assert new == ({FORKS[name].metric} if FORKS[name].metric else set())
    for metric in new:
        close(found[True][metric].value, terms[metric][batch["mask"]].double().mean().item())
        assert found[True][metric][1:] == (15, "mean")


@pytest.mark.parametrize(
    ("name", "value"),
    [("dual_clip", 1.0), ("dual_clip", math.nan), ("mis_cap", 0.0)]
    + [("entropy_bonus", -0.1), ("entropy_bonus", math.inf), ("entropy_bonus", math.nan)],
)
def test_a_value_that_makes_no_sense_is_refused(name, value, fork):
    with pytest.raises(ValueError, match=f"{name} is {value}; it must (be|lie)"):
        fork(name.removesuffix("_cap")).ObjectiveConfig(**{name: value})


def test_an_unknown_choice_of_a_new_field_is_refused(fork):
    with pytest.raises(
        ConfigError, match="importance_sampling_level: 'sentence' is not one of token, sequence"
    ):
        parse_config(
            [fork("gspo").ObjectiveConfig],
            ["--importance_sampling_level", "sentence"],
            script="grpo",
            prog="",
        )


def test_a_patch_that_no_longer_fits_says_what_to_do():
    moved = OBJECTIVE.replace("ratio = log_ratio.exp()", "ratio = torch.exp(log_ratio)")
    with pytest.raises(
        AssertionError,
        match=r"(?s)gspo.patch no longer fits: .*`git diff rl/objective.py > .*log_ratio.exp",
    ):
        patched("gspo", moved)
    with pytest.raises(AssertionError, match="rloo.patch no longer fits"):
        patched("rloo", OBJECTIVE + OBJECTIVE)  # fits twice


# ---- the worked cases ----------------------------------------------------------------------------
def test_the_list_has_no_stale_entry():
    existing = [
        f"{case_id}.{leaf}"
        for case_id, entry in CASES.items()
        for leaf in leaves(entry["expected"])
    ]
    assert [
        key for key in NOT_IN_THE_FORKS if not any(covers(key, leaf) for leaf in existing)
    ] == []


def test_p01_rloo(fork):
    module = fork("rloo")
    with fork_case("P01_advantage", "adv_rloo") as p01:
        rewards, groups = f64(p01.inputs["rewards"]).flatten(), torch.tensor([0] * 4 + [1] * 4)
        config = module.ObjectiveConfig(baseline="leave_one_out")
        p01.close("adv_rloo", module.group_advantages(rewards, groups, config=config).view(2, 4))
    # 3 less the mean of 1 and 2, 1 less that of 3 and 2, 2 less that of 3 and 1; the unrated one
    # counts for nobody.
    close(
        module.group_advantages(f64([3, 1, math.nan, 2]), torch.zeros(4), config=config),
        [1.5, -1.5, 0, 0],
    )


def test_p10_masked_importance_sampling(fork):
    module = fork("mis")
    with fork_case("P10_tis", "seq_weight_product", "seq_mask") as p10:
        old, sampling = f64(p10.inputs["old_logp"]), f64(p10.inputs["behaviour_logp"])
        mask = torch.tensor(p10.inputs["mask"]).bool()
        logprobs = (old + 0.1).requires_grad_()  # [2,3]
        weights = weights_of(module, mask, "dapo")

        def evaluate(cap):
            loss, terms = module.grpo_loss(
                logprobs,
                old,
                None,
                f64([1, -1]),
                mask,
                weights,
                module.ObjectiveConfig(mis_cap=cap, beta=0),
                sampling_logprobs=sampling,
            )
            (gradient,) = torch.autograd.grad(loss, logprobs)
            return terms, gradient

        kept, gradient = evaluate(10.0)
        p10.close("seq_weight_product", kept["mis_weight"][:, 0])
        p10.close("seq_mask", evaluate(p10.inputs["C"])[0]["mis_weight"][:, 0])
    # the same weight for every token, of the policy term and of its gradient
    assert (kept["mis_weight"] == kept["mis_weight"][:, :1]).all()
    _, plain = evaluate(None)
    torch.testing.assert_close(gradient, f64([[3.004166], [2.225541]]) * plain, rtol=1e-6, atol=0)
    # the first is 3.004166 and left out, the second 2.225541 and kept
    between, one_left = evaluate(2.5)
    close(between["mis_weight"][:, 0], [0, 2.225541], atol=1e-6)
    assert not one_left[0].any() and one_left[1].any()
    assert between["mis_weight"].requires_grad is False


def test_p11_dual_clip(fork):
    module = fork("dual_clip")
    with fork_case("P11_dual_clip") as p11:
        rows = leaves(p11.inputs["rows"])
        settings = {
            "epsilon_low": p11.inputs["eps_low"],
            "epsilon_high": p11.inputs["eps_high"],
            "beta": 0,
        }
        ones, mask = torch.ones(4, 1, dtype=torch.float64), torch.ones(4, 1, dtype=torch.bool)
        terms = {}
        for c in (None, p11.inputs["c"]):
            logprobs = f64(rows["ratio"])[:, None].log().requires_grad_()  # [4,1]
            loss, terms[c] = module.grpo_loss(
                logprobs,
                0 * ones,
                None,
                f64(rows["advantage"]),
                mask,
                ones,
                module.ObjectiveConfig(**settings, dual_clip=c),
            )
            loss.backward()
        p11.close("rows.loss_standard", terms[None]["per_token_loss"][:, 0])
        p11.close("rows.loss_dual_clip", terms[c]["per_token_loss"][:, 0])
        # TRL clamps the ratio; the numbers are the same
        p11.close("rows.loss_trl_delta", terms[c]["per_token_loss"][:, 0])
    assert terms[c]["dual_clipped"][:, 0].tolist() == [True, False, False, False]
    # Held at c A the first token has no gradient left; 5 with A > 0 and 0.5 with A < 0 are clipped
    # as ever; -r A = 1
    close(logprobs.grad[:, 0], [0, 0, 0, 1])


def test_p12_gspo(fork):
    module = fork("gspo")
    with fork_case("P12_gspo") as p12:
        config = module.ObjectiveConfig(
            importance_sampling_level="sequence",
            epsilon_low=p12.inputs["eps_low"],
            epsilon_high=p12.inputs["eps_high"],
            beta=0,
        )
        # [4,4]
        logprobs, mask = (
            f64(p12.inputs["logp"]).requires_grad_(),
            torch.tensor(p12.inputs["mask"]).bool(),
        )
        advantages, weights = f64(p12.inputs["advantages"]), weights_of(module, mask, "grpo")
        loss, terms = module.grpo_loss(
            logprobs, f64(p12.inputs["old_logp"]), None, advantages, mask, weights, config
        )
        loss.backward()
        p12.close("seq_ratio", terms["ratio"][:, 0])
        p12.close("objective_per_seq", terms["surrogate"][:, 0])
        p12.close("loss", loss)
        p12.close("grad_logp", logprobs.grad)
        clipped = [
            module.objective_metrics(
                {name: term[i : i + 1] for name, term in terms.items()},
                advantages[i : i + 1],
                mask[i : i + 1],
                config,
            )["clip_ratio/region_mean"].value
            for i in range(4)
        ]
        p12.close("clipped", [bool(share == 1) for share in clipped])
    assert all((terms["ratio"] == terms["ratio"][:, :1]).flatten())
    close(terms["token_ratio"][mask][:4], [math.exp(x) for x in (0.1, 0, -0.1, 0.3)])


def test_gspo_inside_its_clip_by_hand(fork):
    # Log-ratios 0.02 and 0.04, so s = e^0.03 for both tokens, A = 2, and a masked slot. With
    # 1/|t_i| = 1/2 a token the loss is -s A = -2.060909; d loss / d logp_j = -A s / |t_i| =
    # -1.030455 for each token, whatever its own ratio.
    module = fork("gspo")
    config = module.ObjectiveConfig(importance_sampling_level="sequence", beta=0)
    logprobs, mask = (
        f64([[-0.98, -0.96, math.nan]]).requires_grad_(),
        torch.tensor([[True, True, False]]),
    )
    loss, _ = module.grpo_loss(
        logprobs, f64([[-1, -1, 7]]), None, f64([2]), mask, weights_of(module, mask, "grpo"), config
    )
    loss.backward()
    close(loss, -2.060909, atol=1e-6)
    close(logprobs.grad, [[-1.030455, -1.030455, 0]], atol=1e-6)


def test_p13_cispo(fork):
    """Weights clipped to the interval of this project's flags; an absolute cap is that interval
    with epsilon_high = cap - 1.
    """
    module = fork("cispo")
    with fork_case("P13_cispo") as p13:
        given, ones = p13.inputs, torch.ones(3, 1, dtype=torch.float64)
        bounds = {
            "relative_clip": {"epsilon_low": given["eps_low"], "epsilon_high": given["eps_high"]},
            "absolute_cap": {"epsilon_low": 0.999, "epsilon_high": given["absolute_cap"] - 1},
        }
        for name, settings in bounds.items():
            logprobs = f64(given["logp"])[:, None].requires_grad_()  # [3,1]
            loss, terms = module.grpo_loss(
                logprobs,
                f64(given["old_logp"])[:, None],
                None,
                f64(given["advantages"]),
                ones.bool(),
                ones,
                module.ObjectiveConfig(**settings, policy_term="cispo", beta=0),
            )
            loss.backward()
            p13.close("ratio", terms["ratio"][:, 0])
            p13.close(f"weight_{name}", terms["cispo_weight"][:, 0])
            p13.close(f"loss_{name}", terms["per_token_loss"][:, 0])
            p13.close(f"grad_{name}", logprobs.grad[:, 0])


def test_the_entropy_bonus_by_hand(fork):
    # Two tokens of entropy 1 and 2 and a masked slot with NaN, weights 1/2, coefficient 0.1: J has
    # 0.1 x (1 + 2) / 2 = 0.15 more, so the loss 0.15 less. Ratio 1 and A = 2 give -2 of its own.
    # d loss / d entropy = -0.1 / 2 for each token, and 0 in the masked slot.
    module, mask = fork("entropy_bonus"), torch.tensor([[True, True, False]])
    logprobs, weights = f64([[-1, -2, math.nan]]), weights_of(module, mask, "grpo")
    entropy = f64([[1, 2, math.nan]]).requires_grad_()
    config = module.ObjectiveConfig(entropy_bonus=0.1, beta=0)
    given = logprobs, logprobs, None, f64([2]), mask, weights, config
    loss, terms = module.grpo_loss(*given, entropy=entropy)
    loss.backward()
    close(loss, -2.15)
    close(terms["entropy_bonus"][mask], [0.1, 0.2])
    close(entropy.grad, [[-0.05, -0.05, 0]])


def test_drpo_by_hand(fork):
    """The rewards of `test_toy_hospitals`, centred as they are there: +-0.5, 0, 0, +-0.25.

    Hospital 4 has two questions of mean rewards 0.5 and 1, so 0.75: T_g = sqrt(2) 0.75. Its hard
    cluster is the first, T_c = 0.5, its easy one the second. Hospital 9 has one question of 0.25:
    T_g = T_c = 0.25. So 0.5 / (1.060660 x 0.5) = 0.942809 and 0.25 / 0.0625 = 4. All are divided by
    their standard deviation, sqrt(2 (0.888889 + 16) / 5) = 2.599145, and 1e-4: 0.362724, 1.538908.
    """
    module, rewards = fork("drpo"), f64(HOSPITAL_REWARDS)
    config = module.ObjectiveConfig(domain_scaling="drpo")
    found = module.group_advantages(rewards, HOSPITAL_GROUPS, config=config, hospitals=HOSPITALS)
    close(found, [0.362724, -0.362724, 0, 0, 1.538908, -1.538908], atol=1e-6)
    # the weaker hospital, which rms leaves the smaller one (0.322749 beside 0.456435), leads now
    by_rms = module.ObjectiveConfig(scale_by_hospital="rms")
    other = module.group_advantages(rewards, HOSPITAL_GROUPS, config=by_rms, hospitals=HOSPITALS)
    assert found[4] > found[0] and other[4] < other[0]
    # rewards of 0 hold T at 1e-4; what nobody has rated, or nobody tells apart, stays 0
    assert not module.group_advantages(
        f64([0, 0, math.nan, math.nan]),
        torch.tensor([0, 0, 1, 1]),
        config=config,
        hospitals=torch.tensor([0, 0, 0, 0]),
    ).any()


def test_p21_kl_in_reward(fork):
    """Through `Rollouts`, which makes the KL of each completion."""
    module = fork("kl_in_reward")
    with fork_case("P21_kl_in_reward") as p21:
        rows = zip(
            *(p21.inputs[key] for key in ("rewards", "mask", "logp", "ref_logp")), strict=True
        )
        samples = [
            sample(
                0, reward, mask=f64(mask).bool(), sampling_logprobs=f64(old), ref_logprobs=f64(ref)
            )
            for reward, mask, old, ref in rows
        ]
        for key, in_reward in {"adv_center_only": True, "adv_without_kl": False}.items():
            config = module.ObjectiveConfig(beta=p21.inputs["beta"], kl_in_reward=in_reward)
            p21.close(key, advantages_of(samples, config, module.group_advantages))
        p21.close("seq_k1", rollouts_of(samples).kl)
    # It must not count twice: the loss is that of beta 0, while its KL is logged as ever.
    batch = random_batch(seed=0)
    weights = step_weights(module, batch["mask"], "dr_grpo")
    in_reward, terms = module.grpo_loss(
        **batch, weights=weights, config=module.ObjectiveConfig(kl_in_reward=True)
    )
    without, _ = module.grpo_loss(**batch, weights=weights, config=module.ObjectiveConfig(beta=0))
    assert torch.equal(in_reward, without) and (terms["kl"][batch["mask"]] > 0).all()


# ---- the whole of run_grpo.py --------------------------------------------------------------------
def grpo_flags(adapter, data, run, name: str) -> list[str]:
    """List the flags of two rollouts of 2 groups. Each of the 4 steps takes one group."""
    return [
        "--adapter_name_or_path",
        str(adapter),
        "--train_file",
        str(data),
        "--output_dir",
        str(run),
        *GRPO,
        "--max_steps",
        "4",
        f"--{FORKS[name].field}",
        str(FORKS[name].on),
    ]


@pytest.fixture
def forked_main(tmp_path, monkeypatch):
    """Make patched copies: `forked_main("gspo")` -> `main` of run_grpo.py with that patch.

    The copy of run_grpo.py and rl/ is imported in place of the product's.
    """
    tree = tmp_path / "tree"

    def is_ours(name: str) -> bool:
        return name.partition(".")[0] in ("rl", "run_grpo")

    def load(name: str):
        shutil.copytree(ROOT / "rl", tree / "rl")
        shutil.copy(ROOT / "run_grpo.py", tree)
        (tree / "rl" / "objective.py").write_text(patched(name), encoding="utf-8")
        for module in filter(is_ours, list(sys.modules)):
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.syspath_prepend(str(tree))
        module = importlib.import_module("run_grpo")
        assert module.__file__ == str(tree / "run_grpo.py")
        return module.main

    yield load
    for module in filter(is_ours, list(sys.modules)):
        del sys.modules[module]  # the copies; monkeypatch then puts the product's back


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_trains(name, forked_main, tiny_sft_run, tiny_data, tmp_path, monkeypatch):
    speak(monkeypatch)
    run, fork = tmp_path / "run", FORKS[name]
    assert (
        forked_main(name)(
            [*grpo_flags(tiny_sft_run("qwen2_5_vl"), tiny_data, run, name), "--dump_step", "4"]
        )
        == 0
    )
    assert record(run / "config.json")["settings"][fork.field] == {
        "value": fork.on,
        "origin": "flag",
    }
    step, notes = read_dump(run / "step-4.safetensors")
    mask, rows = step["mask"], step["rollout_row"]
    assert notes["settings"][fork.field] == fork.on
    assert step["terms/ratio"][mask].std() > 0 and step["terms/kl"][mask].max() > 1e-4
    if fork.metric:
        metric = [line[fork.metric] for line in train_log(run)]
        assert len(metric) == 4 and metric[3] == pytest.approx(
            step[f"terms/{fork.metric}"][mask].astype(float).mean(), rel=1e-6
        )
    if name == "gspo":
        for ratio, token_ratio, own in zip(
            step["terms/ratio"], step["terms/token_ratio"], mask, strict=True
        ):
            assert len(set(ratio[own].tolist())) == 1
            assert math.log(ratio[own][0]) == pytest.approx(
                np.log(token_ratio[own]).mean(), abs=1e-6
            )
    # step 4 holds the second group; at its rollout the policy had left the reference
    if name == "kl_in_reward":
        kl = np.where(mask, step["sampling_logprobs"].astype(float) - step["ref_logprobs"], 0).sum(
            1
        )
        penalised = step["rollout/reward"][rows] - 0.15 * kl
        np.testing.assert_allclose(
            step["advantages"], penalised - penalised.mean(), rtol=0, atol=1e-6
        )
        assert np.abs(kl).max() > 1e-3
        np.testing.assert_array_equal(
            step["terms/per_token_loss"][mask], -step["terms/surrogate"][mask]
        )
    if name == "rloo":
        rewards = step["rollout/reward"][rows]
        np.testing.assert_allclose(
            step["advantages"], 4 / 3 * (rewards - rewards.mean()), rtol=1e-6, atol=1e-7
        )


def test_a_patched_copy_of_the_project_is_all_that_gspo_with_mis_needs(
    tiny_sft_run, tiny_data, tmp_path
):
    """As a researcher does it: copy, patch twice, run the script."""
    tree, run = tmp_path / "tree", tmp_path / "run"
    for package in ("data", "engine", "eval", "rl"):
        shutil.copytree(
            ROOT / package, tree / package, ignore=shutil.ignore_patterns("base", "__pycache__")
        )
    shutil.copy(ROOT / "run_grpo.py", tree)
    both = patched("mis", patched("gspo"))
    (tree / "rl" / "objective.py").write_text(both, encoding="utf-8")
    command = [
        sys.executable,
        "run_grpo.py",
        *grpo_flags(tiny_sft_run("qwen2_5_vl"), tiny_data, run, "gspo"),
        *("--mis_cap", "2"),
    ]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # in the banner
    assert re.search(r"^importance_sampling_level +sequence +flag$", done.stdout, re.MULTILINE)
    logged = {"ratio/mean", "token_ratio", "mis_weight"}
    assert all(logged <= line.keys() for line in train_log(run))
