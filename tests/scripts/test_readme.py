"""Protect every README from drifting away from the code.

README.md is a front door, so its size is held too. Each folder's README maps its files: links and
anchors, files, flags, line links into the objective, the forks' diffs and sizes, recipes, prompts,
splits and commands are compared with what is there. Run: pytest tests/scripts/test_readme.py
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from data.check import main as check
from data.demo.splits import SPLITS, WRITTEN_SPLITS
from data.dicom import main as dicom
from data.prompts import PROMPTS
from data.select_flags import build_parser as select_parser
from data.table import build_parser as table_parser
from data.traces import main as traces
from engine.merge_settings import MergeConfig
from engine.settings import SFTConfig
from eval.compare import CompareConfig
from eval.figures import FiguresConfig
from eval.matrix import MatrixConfig
from eval.report import ReportConfig
from eval.settings import EvalConfig
from rl.objective import ObjectiveConfig
from rl.settings import GRPOConfig
from tests.helpers.patches import FORKS, module_of, patch_of, patched, size
from tests.helpers.repository import ROOT

REPORTS = (ReportConfig, CompareConfig, MatrixConfig, FiguresConfig)
BENCHMARKS = ROOT / "tests" / "benchmarks"
FOLDERS = ("engine", "rl", "data", "data/demo", "eval", "tests", "tests/benchmarks")
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", *(f"{folder}/README.md" for folder in FOLDERS))
} | {".github/CONTRIBUTING.md": (ROOT / ".github/CONTRIBUTING.md").read_text(encoding="utf-8")}
README = PAGES["README.md"]
TERMS = re.findall(r"\| \[(\d+)\]\(rl/objective\.py#L(\d+)\) \| `(.+?)` \|", README)
CODE_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def prose(page: str) -> str:
    """Take the code blocks out of a page."""
    return CODE_BLOCK.sub("", PAGES[page])


def commands(text: str) -> str:
    """Join the code blocks of a page, with continued lines in one piece."""
    return "\n".join(CODE_BLOCK.findall(text)).replace("\\\n", " ")


def first_cells(text: str, header: str) -> list[str]:
    """Read the first cell of each row of the table that begins with `header`."""
    table = text.split(header, 1)[1].split("\n\n")[0]
    return [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]


# The front door


def test_the_front_door_is_read_in_one_sitting():
    lines = README.splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 100] == []
    assert 1300 <= len(README.split()) <= 1800


@pytest.mark.parametrize("page", PAGES)
def test_lines_of_prose_have_at_most_100_columns(page):
    lines = [line for line in prose(page).splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > 100] == []


def test_the_two_commands_of_the_front_door_stay():
    lines = [line.partition("#")[0].strip() for line in commands(README).splitlines()]
    assert "pip install -e . && python run_sft.py && python run_grpo.py" in lines
    assert "pip install -e '.[test]' && pytest -n auto" in lines


@pytest.mark.parametrize("runner", [".ci/run", ".github/workflows/ci.yml"])
def test_what_runs_on_every_change_is_the_readmes_test_command_and_the_linters(runner):
    text = (ROOT / runner).read_text(encoding="utf-8")
    steps = [
        "ruff check",
        "ruff format --check",
        "mypy",
        "pip install -e '.[test]' && pytest -n auto",
    ]
    places = [re.search(f"^ *(?:- run: )?{re.escape(step)}", text, re.MULTILINE) for step in steps]
    assert all(places)
    assert [place.start() for place in places] == sorted(place.start() for place in places)


def test_pictures_are_small_and_have_a_text():
    pictures = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", README)
    assert pictures
    for text, path in pictures:
        assert len(text.split()) >= 10 and (ROOT / path).stat().st_size < 200_000


# Links and files


def anchors(page: Path) -> set[str]:
    """List the anchors that GitHub gives a page's headings."""
    headings = re.findall(
        r"^#+ (.+)$", CODE_BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(text: str, folder: Path) -> list[str]:
    """Find relative links without a file, a heading or a line. Links are relative to `folder`."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (folder / path).resolve()
        if not target.exists():
            broken.append(link)
        elif anchor.startswith("L"):
            number_of_lines = len(target.read_text(encoding="utf-8").splitlines())
            broken += [] if 0 < int(anchor[1:]) <= number_of_lines else [link]
        elif anchor and anchor not in anchors(target):
            broken.append(link)
    return broken


def test_a_broken_link_is_found():
    text = "[a](setup.py) [b](nothing.py) [c](README.md#map) [d](README.md#none) [e](setup.py#L9)"
    assert broken_links(text, ROOT) == ["nothing.py", "README.md#none", "setup.py#L9"]


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_and_anchor_exists(page):
    assert broken_links(prose(page), (ROOT / page).parent) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folders_map_is_its_files(folder):
    """Every file that is named exists, and every file that is there is named."""
    header = "| folder | what it tests |" if folder == "tests" else "| file | what it"
    cells = first_cells(PAGES[f"{folder}/README.md"], header)
    named = {name.rstrip("/") for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    entries = {
        path.name
        for path in (ROOT / folder).iterdir()
        if (path.suffix == ".py" or path.is_dir()) and not path.name.startswith(("__", "."))
    }
    assert named == entries - ({"conftest.py"} if folder == "tests" else set())


def test_the_readmes_map_is_the_repository():
    linked = re.findall(r"^\| \[(.+?)/?\]\((.+?)\) \|", README.split("## Map")[1], re.MULTILINE)
    scripts = [path.name for path in sorted(ROOT.glob("run_*.py"))]
    assert sorted(linked) == sorted(
        [(folder, f"{folder}/README.md") for folder in FOLDERS]
        + [(script, script) for script in scripts]
    )


@pytest.mark.parametrize("page", PAGES)
def test_every_file_of_ours_that_is_named_exists(page):
    """A name is a path from the root or from the page's folder, in prose and in commands."""
    folder, text = (ROOT / page).parent, PAGES[page]
    names = re.findall(r"`([\w./-]+\.(?:py|patch|toml|cfg))`", prose(page))
    names += re.findall(r"(?:python|pytest|<) ([\w./-]+\.(?:py|patch))", text)
    assert [name for name in names if not any((at / name).exists() for at in (ROOT, folder))] == []
    modules = re.findall(r"python -m ([a-z_.]+)", text)
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []


def test_every_flag_named_is_a_flag(capsys):
    configs = (SFTConfig, GRPOConfig, ObjectiveConfig, EvalConfig, MergeConfig, *REPORTS)
    fields = {field.name for config in configs for field in dataclasses.fields(config)}
    fields |= {fork.field for fork in FORKS.values()}
    for parser in (select_parser(), table_parser()):
        fields |= {action.dest for action in parser._actions}
    for run, argv in ((traces, ["export"]), (traces, ["import"]), (check, []), (dicom, [])):
        with pytest.raises(SystemExit):
            run([*argv, "--help"])
    fields |= set(re.findall(r"--([a-z_0-9]+)", capsys.readouterr().out))
    fields |= set(re.findall(r"--([a-z_0-9]+)", get_args_parser().format_help()))  # torchrun's
    lines = [line for page in PAGES for line in PAGES[page].splitlines() if not OTHERS.search(line)]
    own = [line for line in lines if not (benchmark := BENCHMARK.search(line)) or not benchmark[2]]
    own_text = OF_VLLM.sub("", "\n".join(own))
    named = set(re.findall(r"--([a-z_0-9]+)", own_text)) - {"help"}
    # which parse_config adds; of data.demo.build_base
    assert named - fields == {"recipe", "family"}


# Commands of others, with flags of their own.
OTHERS = re.compile(r"^ *`?(?:pip install|ruff|git|pre-commit|#SBATCH|sbatch|trap) .*--")
OF_VLLM = re.compile(
    r"--(?:host|port|dtype|enable-lora|max-lora-rank|max-loras|max-cpu-loras|generation-config"
    r"|logprobs-mode|max-num-batched-tokens|mm-processor-kwargs)\b"
)
BENCHMARK = re.compile(
    rf"\b({'|'.join(path.stem for path in BENCHMARKS.glob('*.py'))})\.py\b(.*--.*)?"
)


def test_every_flag_of_a_benchmark_is_its_flag():
    found = [
        (benchmark[1], flag)
        for page in PAGES
        for line in PAGES[page].splitlines()
        if (benchmark := BENCHMARK.search(line)) and benchmark[2]
        for flag in re.findall(r"--[a-z_0-9]+", benchmark[2])
    ]
    assert len(found) >= 3
    for script, flag in found:
        text = (BENCHMARKS / f"{script}.py").read_text(encoding="utf-8")
        assert f'"{flag}"' in text, (script, flag)


# The objective and its forks


def test_every_term_of_the_objective_has_its_line():
    assert len(TERMS) >= 9  # ratio, clip, min, advantage, KL, beta, the normalisers, the sum
    assert len(TERMS) == README.count("(rl/objective.py#L")


@pytest.mark.parametrize("shown, linked, code", TERMS)
def test_a_line_link_points_to_its_code(shown, linked, code):
    lines = (ROOT / "rl" / "objective.py").read_text(encoding="utf-8").splitlines()
    now = [number for number, line in enumerate(lines, 1) if code in line]
    assert shown == linked and int(linked) in now, (
        f"README.md, The objective: {code!r} stands in line {now} of rl/objective.py, not {linked}"
    )


def test_the_forks_diff_that_is_shown_is_the_patch():
    shown = re.search(r"```diff\n(.*?)```", PAGES["rl/README.md"], re.DOTALL)[1]
    # without the two header lines
    changed = [line for line in patch_of("gspo").splitlines() if line[0] in "+-"][2:]
    assert [line for line in shown.splitlines() if line[0] in "+-"] == changed
    assert all(line in patch_of("gspo").splitlines() for line in shown.splitlines() if line != "@@")


def test_the_schedule_that_is_shown_fits_the_loop():
    """Context and removed lines of each hunk stand in run_grpo.py, together and once."""
    shown = re.findall(r"```diff\n(.*?)```", PAGES["rl/README.md"], re.DOTALL)[1]
    loop = (ROOT / "run_grpo.py").read_text(encoding="utf-8")
    for hunk in shown.split("@@\n"):
        old = "".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] in " -")
        assert old and loop.count(old) == 1, old


@pytest.mark.parametrize("name", FORKS)
def test_a_forks_row_has_its_size_flag_and_metric(name):
    fork, (added, removed) = FORKS[name], size(patch_of(name))
    value = (
        "" if fork.on is True else f" {fork.on:g}" if isinstance(fork.on, float) else f" {fork.on}"
    )
    metric = f"`{fork.metric}` " if fork.metric else ""
    assert (
        f"| [{name}](../tests/forks/{name}.patch) | +{added} -{removed} | `--{fork.field}{value}` |"
        f" {metric}| " in PAGES["rl/README.md"]
    )


def test_the_forks_toy_example_gives_what_it_says(monkeypatch, capsys):
    """-2 e^0.03 = -2.060909; e^0.03 = 1.030455; e^0.02 and e^0.04 = 1.020201 and 1.040811."""
    monkeypatch.setitem(sys.modules, "rl.objective", module_of(patched("gspo"), monkeypatch))
    [example] = re.findall(r"```python\n(import torch\n.*?)```", PAGES["rl/README.md"], re.DOTALL)
    exec(example, {})
    numbers = [float(number) for number in re.findall(r"-?\d\.\d{4}", capsys.readouterr().out)]
    assert numbers == [-2.0609, 1.0305, 1.0305, 1.0202, 1.0408]
    assert [
        float(number) for number in re.findall(r"-?\d\.\d{4}", example.rpartition("#")[2])
    ] == numbers


def test_the_readme_counts_the_choices():
    counted = len(first_cells(PAGES["rl/README.md"], "| question | choice | why |"))
    assert f"All {counted} with" in README


# Tables of what is shipped


def test_the_recipe_table_is_the_shipped_recipes():
    listed = first_cells(PAGES["engine/README.md"], "| recipe | what it is |")
    shipped = (ROOT / "engine" / "recipes").glob("*.toml")
    assert sorted(listed) == sorted(f"`{path.stem}`" for path in shipped)


def test_the_prompt_table_is_all_prompts_but_the_demos():
    listed = first_cells(PAGES["data/README.md"], "| prompt | what it asks for | answer form |")
    assert set(listed) == set(PROMPTS) - {"demo"}


def test_the_demo_splits_named_exist():
    named = {name for page in PAGES for name in re.findall(r"demo:([a-z0-9-]+)", PAGES[page])}
    assert named and named <= set(WRITTEN_SPLITS)


def test_the_split_table_has_each_splits_count():
    page = PAGES["data/demo/README.md"]
    rows = page.split("| split | images | for |", 1)[1].split("\n\n")[0].splitlines()[2:]
    listed = {}
    for names, counts in (row.split("|")[1:3] for row in rows):
        numbers = [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", counts)]
        listed |= dict(zip(re.findall(r"[a-z0-9-]+", names), numbers, strict=True))
    assert listed == {name: split.count for name, split in SPLITS.items()}


def test_nothing_is_left_to_fill_in():
    for text in PAGES.values():
        assert re.findall(r"@[A-Z]+@|TBD|XXX", text) == []


# Plain numbers: ratios, ranks, seeds, and what stands in a formula.
WITHOUT_UNIT = {
    "learning_rate",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "validation_split",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "seed",
    "temperature",
    "top_p",
    "reward_scale",
    "length_penalty",
    "epsilon_low",
    "epsilon_high",
    "dual_clip",
    "mis_cap",
    "vllm_importance_sampling_clip_max",
}


@pytest.mark.parametrize("owner", [SFTConfig, GRPOConfig, ObjectiveConfig, EvalConfig, *REPORTS])
def test_every_setting_of_the_commands_explains_itself(owner):
    explains_itself(owner)


@pytest.mark.parametrize("name", FORKS)
def test_every_setting_of_a_fork_explains_itself(name, monkeypatch):
    explains_itself(module_of(patched(name), monkeypatch).ObjectiveConfig)


def explains_itself(owner) -> None:
    for field in dataclasses.fields(owner):
        what = f"{owner.__name__}.{field.name}"
        assert field.metadata.get("help"), what
        if field.default in (None, ""):  # says nothing: what happens then?
            assert field.metadata.get("unset"), f"{what}: say what happens then, under unset"
        elif field.default != () and not field.metadata.get("unset"):
            assert field.metadata.get("source"), f"{what}: say where the default comes from"
        is_number = any(kind in str(field.type) for kind in ("int", "float"))
        assert bool(field.metadata.get("unit")) == (is_number and field.name not in WITHOUT_UNIT), (
            f"{what}: a number has a unit or stands in WITHOUT_UNIT, anything else has none"
        )
        assert "default" not in field.metadata["help"], (
            f"{what}: the default stands in the brackets"
        )
