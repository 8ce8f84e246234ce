"""Protect the command line.

Checked: where a value comes from, that every problem is reported at once, and that nothing misspelt
or ill-typed is ever accepted silently.

Run: python -m pytest tests/engine/test_config.py
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from engine.config import (
    ConfigError,
    Resolved,
    Resuming,
    UsageError,
    describe,
    parse_config,
    recipe_entry,
    recipes_of,
    setting,
    to_json,
)


@dataclass(frozen=True)
class ModelConfig:
    model_name_or_path: str | None = setting(None, "the base model", unset="the adapter's")
    bf16: bool = setting(True, "keep the base in bfloat16; saves 50% of the memory")


@dataclass(frozen=True)
class TrainConfig(ModelConfig):
    learning_rate: float = setting(
        5e-5,
        "peak learning rate",
        source="paper 3.2.1",
        group="optimizer",
        within="(-inf, inf)",
    )
    max_steps: int | None = setting(None, "stop here", unit="optimizer steps", within="[1, 1000]")
    warmup_steps: int = setting(0, "steps of warm-up", unit="optimizer steps", within="[0, 1000)")
    validation_file: tuple[str, ...] = setting((), "NAME=FILE, repeatable")


@dataclass(frozen=True)
class LossConfig:
    """Hold plain fields with metadata, as in a file that knows nothing of this package."""

    epsilon_low: float = field(
        default=0.15, metadata={"help": "lower clip", "aliases": ("epsilon",)}
    )
    estimator: Literal["k1", "k2", "k3"] = field(default="k3", metadata={"help": "KL estimator"})

    def __post_init__(self):
        if self.epsilon_low < 0:
            raise ValueError("epsilon_low must not be negative")


def parse(*argv: str, **options) -> Resolved:
    return parse_config([TrainConfig, LossConfig], argv, script="sft", prog="run_sft.py", **options)


def problems(*argv: str, **options) -> list[str]:
    with pytest.raises(ConfigError) as error:
        parse(*argv, **options)
    return error.value.problems


@pytest.fixture
def recipe(tmp_path: Path):
    def write(text: str) -> str:
        (tmp_path / "mine.toml").write_text(text)
        return str(tmp_path / "mine.toml")

    return write


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    package = tmp_path / "shipped_recipes"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "demo.toml").write_text(
        'model_name_or_path = "tiny"\n[sft]\nmax_steps = 3\n[grpo]\nbeta = 1.0\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "shipped_recipes"


def test_without_flags_every_value_is_the_default():
    resolved = parse()
    assert resolved.configs == (TrainConfig(), LossConfig())
    assert set(resolved.origins.values()) == {"default"} and resolved.recipes == ()
    assert describe(resolved) == "every setting has its default value"


def test_flags_are_typed_and_one_namespace_feeds_several_classes():
    train, loss = parse(
        "--learning-rate",
        "1e-4",
        "--max_steps=7",
        "--no-bf16",
        "--validation_file",
        "a=x",
        "b=y",
        "--validation-file",
        "c=z",
        "--estimator",
        "k1",
        "--model_name_or_path",
        "m-4b",
    ).configs
    assert train == TrainConfig("m-4b", False, 1e-4, 7, 0, ("a=x", "b=y", "c=z"))
    assert loss == LossConfig(0.15, "k1")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("--bf16",), True),
        (("--bf16", "false"), False),
        (("--bf16=True",), True),
        (("--no_bf16",), False),
    ],
)
def test_forms_of_a_boolean_flag(argv, expected):
    assert parse(*argv).configs[0].bf16 is expected


def test_optional_accepts_none_and_a_value_may_begin_with_a_minus():
    assert parse("--max_steps", "None").configs[0].max_steps is None
    assert parse("--learning_rate", "-1e-5").configs[0].learning_rate == -1e-5
    assert parse("--model_name_or_path", "-x").configs[0].model_name_or_path == "-x"
    assert parse("--model-name-or-path=a--b-c=d").configs[0].model_name_or_path == "a--b-c=d"


def test_an_alias_sets_its_field():
    resolved = parse("--epsilon", "0.3")
    assert resolved.configs[1].epsilon_low == 0.3
    assert resolved.origins["epsilon_low"] == "flag" and "epsilon" not in resolved.origins


def test_all_problems_of_a_command_line_are_listed_together(recipe):
    path = recipe("max_step = 3\n[sft]\nwarmup_steps = 1.0\n")
    found = problems(
        "--lerning_rate",
        "3",
        "--max_steps",
        "ten",
        "--bf16",
        "maybe",
        "--estimator",
        "k4",
        "--recipe",
        path,
        "--warmup_steps",
        validate=lambda train, loss: ["these two do not combine"],
    )
    assert found == [
        "--warmup_steps: expected an integer at least 0 and below 1000, got nothing",
        "unknown flag --lerning_rate; did you mean --learning_rate?",
        f"{path}: unknown key 'max_step'; did you mean max_steps?",
        f"{path}: warmup_steps in [sft]: expected an integer at least 0 and below 1000, got the"
        " float 1.0",
        "--bf16: expected true or false, got 'maybe'",
        "--max_steps: expected an integer from 1 to 1000 or none, got 'ten'",
        "--estimator: 'k4' is not one of k1, k2, k3",
        "these two do not combine",
    ]


def test_config_error_is_a_usage_error_with_one_line_a_problem():
    with pytest.raises(
        UsageError, match=r"^--max_steps: .*\n--learning_rate: |^--learning_rate: .*\n--max_steps: "
    ):
        parse("--max_steps", "x", "--learning_rate", "nan")


@pytest.mark.parametrize(
    "argv", [("--learning", "1"), ("--model", "x"), ("--no_learning_rate",), ("-l", "1")]
)
def test_no_abbreviations(argv):
    assert problems(*argv)[0].startswith(f"unknown flag {argv[0]}")


def test_stray_arguments_are_refused_but_the_value_of_an_unknown_flag_is_not_reported_twice():
    assert problems("--max_steps", "3", "stray") == [
        "unexpected argument 'stray': every value needs a flag in front"
    ]
    assert len(problems("--zzzzzz", "3")) == 1
    assert len(problems("--zzzzzz", "-3")) == 1


@pytest.mark.parametrize("text", ["", "1.5", "1e3", "true"])
def test_an_integer_flag_takes_integers_only(text):
    assert problems(f"--warmup_steps={text}") == [
        f"--warmup_steps: expected an integer at least 0 and below 1000, got {text!r}"
    ]


def test_what_post_init_refuses_is_a_problem_and_validate_is_not_called_without_a_config():
    called = []
    assert problems("--epsilon", "-1", validate=lambda *configs: called.append(configs) or []) == [
        "epsilon_low must not be negative"
    ]
    assert called == []


def test_precedence_is_default_then_recipe_shared_then_recipe_table_then_flag(recipe):
    path = recipe(
        'learning_rate = 1\nmax_steps = 10\nwarmup_steps = 5\nvalidation_file = ["a=x"]\nepsilon ='
        ' 0.2\n[sft]\nmax_steps = "none"\nwarmup_steps = 6\n[grpo]\nbeta = "not read by this'
        ' script"\n'
    )
    resolved = parse("--recipe", path, "--warmup_steps", "7")
    assert resolved.configs[0] == TrainConfig(None, True, 1.0, None, 7, ("a=x",))
    assert type(resolved.configs[0].learning_rate) is float
    assert resolved.configs[1].epsilon_low == 0.2
    assert resolved.origins == {
        "model_name_or_path": "default",
        "bf16": "default",
        "learning_rate": f"recipe {path}",
        "max_steps": f"recipe {path}",
        "warmup_steps": "flag",
        "validation_file": f"recipe {path}",
        "epsilon_low": f"recipe {path}",
        "estimator": "default",
    }


def test_of_several_recipes_later_ones_win(recipe, tmp_path):
    first = recipe("learning_rate = 0.5\n[sft]\nmax_steps = 9\nwarmup_steps = 4\n")
    (tmp_path / "second.toml").write_text("warmup_steps = 6\n[sft]\nmax_steps = 7\n")
    second = str(tmp_path / "second.toml")
    resolved = parse("--recipe", first, "--recipe", second, "--warmup_steps", "8")
    assert resolved.recipes == (first, second)
    config = resolved.configs[0]
    assert (config.learning_rate, config.max_steps, config.warmup_steps) == (0.5, 7, 8)
    # each value says which recipe gave it
    origins = {name: resolved.origins[name] for name in ("learning_rate", "max_steps")}
    assert origins == {"learning_rate": f"recipe {first}", "max_steps": f"recipe {second}"}
    assert parse("--recipe", second, "--recipe", first).configs[0].max_steps == 9
    # in the other order: a shared key of a later recipe wins over a table of an earlier one
    assert parse("--recipe", first, "--recipe", second).configs[0].warmup_steps == 6
    (tmp_path / "third.toml").write_text("nothing = 1\n")
    found = problems("--recipe", first, "--recipe", first, "--recipe", str(tmp_path / "third.toml"))
    assert found == [
        f"--recipe {first} is given 2 times; give it once",
        f"{tmp_path / 'third.toml'}: unknown key 'nothing'",
    ]
    again = Resolved.of_record([type(one) for one in resolved.configs], resolved.record())
    assert again == resolved


@pytest.mark.parametrize(
    ("recipes", "entry"), [((), None), (("a",), "a"), (("a", "b.toml"), ["a", "b.toml"])]
)
def test_config_json_keeps_one_recipe_as_before_and_lists_several(recipes, entry):
    assert recipe_entry(recipes) == entry
    assert recipes_of(json.loads(json.dumps({"recipe": entry}))) == recipes
    assert recipes_of({}) == ()


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("[sft]\nbf16 = 1", "bf16 in [sft]: expected true or false, got the integer 1"),
        (
            "warmup_steps = true",
            "warmup_steps: expected an integer at least 0 and below 1000, got the boolean True",
        ),
        ('learning_rate = "5e-5"', "learning_rate: expected a number, got the string '5e-5'"),
        ("learning_rate = nan", "learning_rate: expected a number, got nan"),
        ("validation_file = 5", "validation_file: expected an array, got the integer 5"),
        ("validation_file = [1]", "validation_file: expected text, got the integer 1"),
        ('estimator = "k33"', "estimator: 'k33' is not one of k1, k2, k3"),
        (
            "[sftt]\nbf16 = true",
            "unknown table [sftt]; did you mean sft?; known: sft, grpo, eval, merge",
        ),
        (
            "[sft]\nepsilon = 0.1\nepsilon_low = 0.2",
            "epsilon_low is given twice in [sft], once as an alias",
        ),
        ("sft = 3", "unknown key 'sft'"),
        (
            "[sft]\n[sft.bf16]\nx = 1",
            "bf16 in [sft]: expected true or false, got the table {'x': 1}",
        ),
    ],
)
def test_recipe_problems_name_file_and_key(recipe, toml, expected):
    path = recipe(toml)
    assert problems("--config", path) == [f"{path}: {expected}"]


def test_one_text_of_a_recipe_stands_for_an_array_of_one(recipe):
    """As train_file had it while there was one hospital."""
    path = recipe('validation_file = "a=x"')
    assert parse("--recipe", path).configs[0].validation_file == ("a=x",)


def test_a_recipe_that_cannot_be_read_is_one_problem(recipe, shipped, tmp_path):
    path = recipe("learning_rate = = 3")
    assert problems("--recipe", path)[0].startswith(f"--recipe {path}: is not valid TOML: ")
    missing = f"{tmp_path}/no.toml"
    assert problems("--recipe", missing) == [
        f"--recipe {missing}: cannot be read: No such file or directory"
    ]
    assert problems("--recipe", "demu", recipes_package=shipped) == [
        "--recipe demu: no such recipe; did you mean demo? (shipped: demo; the name of a file ends"
        " in .toml)"
    ]


def test_the_default_recipe_applies_only_without_the_named_flags(shipped, recipe):
    demo = {
        "recipes_package": shipped,
        "default_recipe": "demo",
        "default_recipe_unless": ("model_name_or_path",),
    }
    resolved = parse("--warmup_steps", "2", **demo)
    assert (
        resolved.recipes,
        resolved.configs[0].model_name_or_path,
        resolved.configs[0].max_steps,
    ) == (("demo",), "tiny", 3)
    assert resolved.origins["max_steps"] == "recipe demo"
    for argv in (
        ("--model-name-or-path", "m"),
        ("--model_name_or_path=m",),
        ("--recipe", recipe("bf16 = false")),
    ):
        assert parse(*argv, **demo).configs[0].max_steps is None
    assert parse("--recipe", "demo", "--model_name_or_path", "m", **demo).configs[0].max_steps == 3


def test_describe_lists_what_differs_from_the_defaults_with_its_origin(shipped):
    resolved = parse(
        "--recipe", "demo", "--no_bf16", "--warmup_steps", "0", recipes_package=shipped
    )
    assert describe(resolved).splitlines() == [
        "model_name_or_path  tiny   recipe demo",
        "bf16                false  flag",
        "max_steps           3      recipe demo",
    ]


def test_a_script_can_fill_in_a_value_and_its_origin_is_kept():
    resolved = parse().with_value("model_name_or_path", "runs/x", "newest run")
    assert resolved.configs[0].model_name_or_path == "runs/x"
    assert describe(resolved).split() == ["model_name_or_path", "runs/x", "newest", "run"]
    with pytest.raises(KeyError):
        resolved.with_value("modle", "x", "y")


# ---- a resumed run -------------------------------------------------------------------------------
def resuming(settings_of) -> Resuming:
    """Let --model_name_or_path name the run, so that it and --max_steps are free to change."""
    return Resuming("model_name_or_path", settings_of, ("max_steps", "model_name_or_path"))


def saved(*argv: str, **options) -> dict:
    """Return the settings of an earlier run as they come back from its config.json."""
    return {
        name: entry["value"]
        for name, entry in json.loads(json.dumps(to_json(parse(*argv, **options)))).items()
    }


def resume(earlier: dict, *argv: str, **options) -> Resolved:
    return parse(
        "--model_name_or_path",
        "run-1",
        *argv,
        resuming=resuming(lambda named: earlier if named == "run-1" else {}),
        **options,
    )


def resume_problems(earlier: dict, *argv: str, **options) -> list[str]:
    with pytest.raises(ConfigError) as error:
        resume(earlier, *argv, **options)
    return error.value.problems


@pytest.mark.parametrize(("before", "now"), [("own.jsonl", ("own.jsonl",)), ("", ())])
def test_a_run_that_kept_one_text_where_there_are_several_now_goes_on(before, now):
    earlier = saved("--max_steps", "5") | {"validation_file": before}
    config = resume(earlier).configs[0]
    assert (config.validation_file, config.max_steps) == (now, 5)


def test_json_keeps_every_value_with_its_origin(recipe):
    written = to_json(
        parse("--recipe", path := recipe("max_steps = 3"), "--validation_file", "a=x", "--no_bf16")
    )
    assert written == {
        "model_name_or_path": {"value": None, "origin": "default"},
        "bf16": {"value": False, "origin": "flag"},
        "learning_rate": {"value": 5e-05, "origin": "default"},
        "max_steps": {"value": 3, "origin": f"recipe {path}"},
        "warmup_steps": {"value": 0, "origin": "default"},
        "validation_file": {"value": ["a=x"], "origin": "flag"},
        "epsilon_low": {"value": 0.15, "origin": "default"},
        "estimator": {"value": "k3", "origin": "default"},
    }


def test_a_resumed_run_has_the_settings_of_the_run(shipped):
    earlier = saved(
        "--learning_rate",
        "1e-4",
        "--validation_file",
        "a=x",
        "b=y",
        "--no_bf16",
        "--estimator",
        "k2",
        "--max_steps",
        "9",
    )
    # The default recipe would give max_steps 3; it does not apply to a resumed run.
    resolved = resume(earlier, recipes_package=shipped, default_recipe="demo")
    assert resolved.configs == (
        # tuples come back from JSON's lists
        TrainConfig("run-1", False, 1e-4, 9, 0, ("a=x", "b=y")),
        LossConfig(0.15, "k2"),
    )
    assert resolved.origins == {
        "model_name_or_path": "flag",
        "bf16": "resumed run",
        "learning_rate": "resumed run",
        "max_steps": "resumed run",
        "warmup_steps": "default",
        "validation_file": "resumed run",
        "epsilon_low": "default",
        "estimator": "resumed run",
    }
    assert resolved.recipes == ()


def test_a_resumed_run_refuses_every_changed_setting_at_once(recipe):
    earlier = saved("--learning_rate", "1e-4", "--max_steps", "9")
    path = recipe("warmup_steps = 5\nmax_steps = 10\n")
    remedy = "a resumed run keeps its settings: leave it out, or start a new run"
    assert resume_problems(
        earlier, "--learning_rate", "5e-5", "--estimator", "k1", "--recipe", path, "--zzzzzzz"
    ) == [
        "unknown flag --zzzzzzz",
        # also where it is the default
        f"--learning_rate: the resumed run has 0.0001, not 5e-05 (flag); {remedy}",
        f"--warmup_steps: the resumed run has 0, not 5 (recipe {path}); {remedy}",
        f"--estimator: the resumed run has k3, not k1 (flag); {remedy}",
    ]


def test_what_changes_no_number_may_be_changed_and_the_same_value_may_be_repeated():
    earlier = saved("--learning_rate", "1e-4", "--max_steps", "9", "--validation_file", "a=x")
    resolved = resume(
        earlier, "--max_steps", "20", "--learning_rate", "0.0001", "--validation_file", "a=x"
    )
    assert (resolved.configs[0].max_steps, resolved.origins["max_steps"]) == (20, "flag")
    assert resolved.configs[0].validation_file == ("a=x",)


def test_without_the_resuming_flag_nothing_is_inherited():
    resolved = parse(
        "--max_steps", "2", resuming=resuming(lambda named: pytest.fail("asked for a run"))
    )
    assert resolved.configs[0] == TrainConfig(max_steps=2)


def test_a_run_of_another_version_is_refused():
    earlier = saved()
    del earlier["bf16"]
    earlier["old_setting"] = 1
    (line,) = resume_problems(earlier)
    assert (
        "do not have the same settings (bf16, old_setting differ)" in line
        and "start a new run from its adapter" in line
    )


def test_what_the_resumed_run_says_of_itself_is_not_lost():
    def no_checkpoint(named):
        raise ConfigError(f"--resume {named}: no such folder")

    with pytest.raises(ConfigError, match="^--resume gone: no such folder$"):
        parse("--model_name_or_path", "gone", resuming=resuming(no_checkpoint))


# ---- help ----------------------------------------------------------------------------------------
def test_help_names_default_unit_source_and_groups(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help", "--max_steps", "not looked at")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "peak learning rate [default 5e-05; paper 3.2.1]" in text
    assert "steps of warm-up [default 0 optimizer steps]" in text
    assert "stop here [default none; in optimizer steps]" in text
    assert "the base model [default the adapter's]" in text  # what none stands for
    assert "saves 50% of the memory [default true] (off: --no_bf16)" in text
    assert "--epsilon_low FLOAT, --epsilon FLOAT lower clip [default 0.15]" in text
    assert "--estimator {k1,k2,k3}" in text
    # an inherited field stands under the class that declares it, an explicit group under its own
    # heading
    assert (
        text.index("model: --model_name_or_path")
        < text.index("optimizer: --learning_rate")
        < text.index("loss: --eps")
    )


@dataclass(frozen=True)
class Twice:
    bf16: bool = True


@dataclass(frozen=True)
class Unsupported:
    sizes: dict[str, int] | None = None


@pytest.mark.parametrize("other", [Twice, Unsupported])
def test_classes_that_cannot_be_flags_are_a_programming_error(other):
    with pytest.raises(TypeError, match="bf16|sizes|dict"):
        parse_config([TrainConfig, other], [], script="sft", prog="x")
