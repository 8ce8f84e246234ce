"""Protect the evaluation of a server's model: the same answers as the engine's, and nothing loaded.

The server is a fake one in which the engine itself writes.

Run: pytest tests/eval/test_served.py
"""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import engine.server
from data.examples import read_jsonl
from data.files import write_jsonl
from data.images import load_image
from data.labels import CHEXPERT
from data.prompts import PROMPTS
from engine.chat_api import PLAIN_SAMPLING
from engine.policy import Policy
from eval.decode import load_policy
from eval.evaluate import main
from eval.folders import load_entry
from eval.matrix import main as matrix_main
from eval.report import main as report_main
from eval.settings import OF_ENGINE, EvalConfig
from tests.helpers.engine_writer import EngineWriter
from tests.helpers.fake_server import Document, FakeServer
from tests.helpers.repository import ROOT
from tests.helpers.runs import lines, overriding, record, save_run
from tests.helpers.tiny import save_images

IMAGES = 5
SETTINGS = {
    "prompt": "demo",
    "max_completion_length": 12,
    "min_visual_tokens": 4,
    "max_visual_tokens": 16,
    "bf16": False,
}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Make a base model, an adapter with its run's config.json, and a data file of five images."""
    folder = tmp_path_factory.mktemp("project")
    save_run(folder, SETTINGS)
    names = save_images(folder, IMAGES)
    write_jsonl(
        folder / "site.jsonl",
        [
            {"id": name, "patient_id": name, "image": name, "labels": ["Edema"], "dataset": "site"}
            for name in names
        ],
    )
    return folder


@pytest.fixture(scope="module")
def policy(project) -> Policy:
    config = EvalConfig(
        model_name_or_path=str(project / "base"),
        adapter_name_or_path=str(project / "run"),
        **SETTINGS,
    )
    return load_policy(config, torch.device("cpu"))


@pytest.fixture
def fake(policy, tmp_path) -> Iterator[FakeServer]:
    with FakeServer(EngineWriter(policy, tmp_path, {})) as server:
        server.adapters["sft-9"] = "/adapters/sft-9"
        yield server


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(engine.server, "PAUSES", (0.0, 0.0))


def evaluated(project: Path, fake: FakeServer, out: Path, *more: str) -> int:
    """Evaluate the served adapter on the data file -> the exit code."""
    command = ["--vllm_server_base_url", fake.url, "--model_name_or_path", "sft-9"]
    command += ["--data_file", f"site={project / 'site.jsonl'}", "--prompt", "demo"]
    command += ["--max_completion_length", "12", "--output_dir", str(out), *more]
    return main(overriding(command))


def by_engine(project: Path, out: Path, *more: str) -> list[dict]:
    """Evaluate the same adapter with the engine -> its rows."""
    command = ["--adapter_name_or_path", str(project / "run"), "--output_dir", str(out)]
    command += ["--data_file", f"site={project / 'site.jsonl'}", *more]
    assert main(command) == 0
    return lines(out / "predictions-site.jsonl")


def test_greedy_answers_are_the_engines_own(project, fake, tmp_path, capsys):
    assert evaluated(project, fake, tmp_path / "served") == 0
    told = capsys.readouterr().out
    assert f"server {fake.url} | version 0.32.0 | model sft-9" in told
    rows, own = lines(tmp_path / "served/predictions-site.jsonl"), by_engine(project, tmp_path)
    cut = [row.pop("truncated", False) for row in rows]
    assert rows == [{k: v for k, v in row.items() if k != "text_length"} for row in own]
    assert len({row["completion"] for row in rows}) > 1
    assert cut == [row["completion_length"] == 12 for row in rows]
    assert f"site: of {IMAGES} answers {sum(cut)} cut at --max_completion_length" in told


# ---- what is sent --------------------------------------------------------------------------------
def test_a_request_holds_the_pixels_the_prompt_and_how_to_sample(project, fake, tmp_path):
    assert evaluated(project, fake, tmp_path / "out") == 0
    bodies = fake.bodies()
    assert len(bodies) == IMAGES
    expected = {"model": "sft-9", "max_tokens": 12, "temperature": 0.0} | PLAIN_SAMPLING
    for body in bodies:
        system, user = body["messages"]
        assert system == {"role": "system", "content": PROMPTS["demo"].system}
        assert user["role"] == "user" and user["content"][0].keys() == {"type", "image_url"}
        assert user["content"][1:] == [{"type": "text", "text": PROMPTS["demo"].text}]
        assert {name: value for name, value in body.items() if name != "messages"} == expected
    sent = {picture(body).tobytes() for body in bodies}
    examples = read_jsonl(project / "site.jsonl", None, CHEXPERT)
    assert sent == {load_image(example).tobytes() for example in examples}


def picture(body: Document) -> Image.Image:
    url = body["messages"][1]["content"][0]["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_a_server_that_tells_no_version_gets_openais_fields_alone(project, fake, tmp_path):
    fake.changed = lambda path, document: {} if path == "/version" else document
    assert evaluated(project, fake, tmp_path / "out") == 0
    assert {name for body in fake.bodies() for name in body} == {
        *("model", "messages", "max_tokens", "temperature")
    }
    run = record(tmp_path / "out/scores-site.json")["run"]
    assert run["server"]["version"] is None


def test_the_record_tells_who_was_asked_and_never_the_key(project, fake, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "a-secret")
    fake.api_key = "a-secret"
    assert evaluated(project, fake, tmp_path / "out") == 0
    run = record(tmp_path / "out/scores-site.json")["run"]
    assert run["server"] == {
        "host": fake.url.removeprefix("http://"),
        "model": "sft-9",
        "version": "0.32.0",
        "request": {"model": "sft-9", "max_tokens": 12, "temperature": 0.0} | PLAIN_SAMPLING,
    }
    assert not {*OF_ENGINE} & {*run["settings"]}
    for file in (tmp_path / "out").iterdir():
        assert b"a-secret" not in file.read_bytes()


# ---- several answers, other images ---------------------------------------------------------------
def test_votes_have_seeds_by_place_and_first_samples_that_do_not_depend_on_k(
    project, fake, tmp_path
):
    rows = {}
    for name, k, together in (("two", "2", "1"), ("three", "3", "4"), ("again", "3", "2")):
        more = ("--num_generations", k, "--per_device_eval_batch_size", together)
        before = len(fake.requests)
        assert evaluated(project, fake, tmp_path / name, *more) == 0
        rows[name] = lines(tmp_path / name / "samples-site.jsonl")
        seeds = [body["seed"] for verb, _, _, body in fake.requests[before:] if verb == "POST"]
        assert len(set(seeds)) == len(seeds) == IMAGES * int(k) and max(seeds) < 2**31
    assert rows["three"] == rows["again"]
    assert rows["two"] == [row for row in rows["three"] if row["sample"] < 2]
    assert [row["sample"] for row in rows["three"]] == [0, 1, 2] * IMAGES
    texts = {row["id"]: set() for row in rows["three"]}
    for row in rows["three"]:
        texts[row["id"]].add(row["completion"])
    assert any(len(own) > 1 for own in texts.values())
    body = fake.bodies()[-1]
    assert (body["temperature"], body["top_p"]) == (0.8, 0.95) and "n" not in body
    votes = lines(tmp_path / "three/predictions-site.jsonl")
    assert len(votes) == IMAGES and {row["num_generations"] for row in votes} == {3}
    request = record(tmp_path / "three/scores-site.json")["run"]["server"]["request"]
    assert (request["temperature"], request["top_p"], request["seed"]) == (0.8, 0.95, 0)


def test_swapped_images_are_the_engines_own(project, fake, tmp_path):
    assert evaluated(project, fake, tmp_path / "served", "--swap_images") == 0
    by_engine(project, tmp_path / "own", "--swap_images")
    served, own = (lines(tmp_path / name / "swapped-site.jsonl") for name in ("served", "own"))
    rows = lines(tmp_path / "served/predictions-site.jsonl")
    said = {row["id"]: row["completion"] for row in rows}
    for row, other in zip(served, own, strict=True):
        for name in ("id", "image_of", "completion", "completion_length"):
            assert row[name] == other[name]
        assert row["completion"] == said[row["image_of"]]
    assert len(set(said.values())) > 1
    both = [record(tmp_path / name / "scores-site.json") for name in ("served", "own")]
    assert both[0]["faithfulness"] == both[1]["faithfulness"]


# ---- what goes wrong -----------------------------------------------------------------------------
def answering(fake: FakeServer, count: int, then: Callable[[], None]) -> None:
    """Let the server write so many answers, and do something before the next."""
    write, written = fake.write, []

    def writes(body: Document) -> Document:
        if len(written) == count:
            then()
        written.append(body)
        return write(body)

    fake.write = writes


def test_a_server_that_ends_keeps_what_it_has_answered(project, fake, tmp_path, capsys):
    out, write = tmp_path / "out", fake.write
    answering(fake, 2, lambda: setattr(fake, "raw", b""))
    one = ("--per_device_eval_batch_size", "1")
    fake.changed = lambda path, document: document if fake.raw is None else b""
    assert evaluated(project, fake, out, *one) == 1
    told = capsys.readouterr().err
    partial = out / "predictions-site.partial.jsonl"
    assert f"the answers so far are kept in {partial}: the same command goes on from there" in told
    assert len([line for line in told.splitlines() if line.startswith("error: ")]) == 1
    assert f"error: POST {fake.url}/v1/chat/completions: " in told
    kept = lines(partial)
    assert len(kept) == 2

    # down at the start: nothing is lost, and nothing is asked
    assert evaluated(project, fake, out, *one) == 1
    assert f"error: GET {fake.url}/v1/models: " in capsys.readouterr().err
    assert lines(partial) == kept

    fake.raw, fake.write, fake.changed = None, write, lambda path, document: document
    before = len(fake.bodies())
    assert evaluated(project, fake, out) == 0
    assert len(fake.bodies()) - before == IMAGES - 2
    assert evaluated(project, fake, tmp_path / "straight") == 0
    name = "predictions-site.jsonl"
    assert (out / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert not partial.exists()


def test_without_an_output_dir_the_line_names_the_folder_to_go_on_in(
    project, fake, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    answering(fake, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    command = ["--vllm_server_base_url", fake.url, "--model_name_or_path", "sft-9"]
    command += ["--data_file", f"site={project / 'site.jsonl'}", "--prompt", "demo"]
    command += ["--max_completion_length", "12", "--per_device_eval_batch_size", "1"]
    assert main(command) == 130
    [folder] = Path("runs").iterdir()
    assert f"to go on there, give it --output_dir {folder}" in capsys.readouterr().err
    assert main([*command, "--output_dir", str(folder)]) == 0
    assert len(lines(folder / "predictions-site.jsonl")) == IMAGES


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_breaks_off_what_hangs_and_keeps_what_came(
    project, fake, tmp_path, capsys, stop, code
):
    def stopped() -> None:
        os.kill(os.getpid(), stop)
        fake.wait()  # this request is never answered

    answering(fake, 2, stopped)
    out = tmp_path / "out"
    assert evaluated(project, fake, out, "--per_device_eval_batch_size", "1") == code
    assert len(lines(out / "predictions-site.partial.jsonl")) == 2
    assert "the same command goes on from there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "more", "message"),
    [
        ({"version": "0.33.0"}, (), "another version of the server (0.32.0, now 0.33.0)"),
        ({}, ("--model_name_or_path", "base"), "another model_name_or_path (sft-9, now base)"),
        ({}, ("--temperature", "0.5"), "another temperature (0.0, now 0.5)"),
    ],
)
def test_another_server_or_request_does_not_go_on(
    project, fake, tmp_path, capsys, changed, more, message
):
    answering(fake, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    out = tmp_path / "out"
    assert evaluated(project, fake, out, "--per_device_eval_batch_size", "1") == 130
    fake.changed = lambda path, document: changed or document if path == "/version" else document
    assert evaluated(project, fake, out, *more) == 2
    assert f"was begun with {message}; finish that" in capsys.readouterr().err
    fake.changed = lambda path, document: document
    assert evaluated(project, fake, out) == 0  # at another address it would go on, too
    fake.changed = lambda path, document: changed or document if path == "/version" else document
    assert evaluated(project, fake, out, *more) == 2
    assert f"is finished, but with {message}" in capsys.readouterr().err


def test_an_engines_evaluation_does_not_go_on_with_a_server(project, fake, tmp_path, capsys):
    """Nor the other way round, where the server has the model under the base's own name."""
    base = str(project / "base")
    fake.adapters[base] = "/models/base"
    asked = ["--prompt", "demo", "--max_completion_length", "12", "--model_name_or_path", base]
    asked += ["--data_file", f"site={project / 'site.jsonl'}"]
    assert main([*asked, "--output_dir", str(tmp_path / "own")]) == 0
    assert evaluated(project, fake, tmp_path / "own", "--model_name_or_path", base) == 2
    assert "another model (the engine's own, now a server's); give" in capsys.readouterr().err
    assert evaluated(project, fake, tmp_path / "served", "--model_name_or_path", base) == 0
    assert main([*asked, "--output_dir", str(tmp_path / "served")]) == 2
    assert "another model (a server's, now the engine's own); give" in capsys.readouterr().err


def test_a_model_that_is_not_served_names_those_that_are(project, fake, tmp_path, capsys):
    assert evaluated(project, fake, tmp_path / "out", "--model_name_or_path", "sft-8") == 2
    assert (
        f"error: --vllm_server_base_url {fake.url} has no model of the name sft-8; it has 'base',"
        " 'sft-9'\n"
    ) in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not fake.bodies()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ([], "--vllm_server_base_url URL has no model of the name sft-9; it has none"),
        (5, "--vllm_server_base_url: GET URL/v1/models: no list of models came"),
    ],
)
def test_a_server_that_lists_no_model(project, fake, tmp_path, capsys, changed, says):
    fake.changed = lambda path, document: {"data": changed}
    assert evaluated(project, fake, tmp_path / "out") == 2
    assert f"error: {says.replace('URL', fake.url)}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "says"),
    [("a b", "the key in VLLM_API_KEY holds blanks"), ("wrong", "VLLM_API_KEY was sent")],
)
def test_a_key_that_is_wrong_can_be_corrected(
    project, fake, tmp_path, capsys, monkeypatch, key, says
):
    fake.api_key = "right"
    monkeypatch.setenv("VLLM_API_KEY", key)
    assert evaluated(project, fake, tmp_path / "out") == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_gateway_that_is_busy_but_for_chat_is_evaluated(project, fake, tmp_path, capsys):
    answer = fake.answer
    fake.answer = lambda verb, path, body: (
        (503, {"detail": "no backend"}) if path == "/version" else answer(verb, path, body)
    )
    assert evaluated(project, fake, tmp_path / "out") == 0
    assert "tells no version" in capsys.readouterr().out
    assert lines(tmp_path / "out/predictions-site.jsonl")


def test_a_key_that_is_said_back_is_in_no_file_and_not_on_the_console(
    project, fake, tmp_path, capsys, monkeypatch
):
    key = "sk-Secret_0123456789"
    monkeypatch.setenv("VLLM_API_KEY", key)

    def saying(path: str, document: Document) -> Document:
        if path == "/version":
            return {"version": key}
        if path != "/v1/chat/completions":
            return document
        choice = document["choices"][0] | {"message": {"content": f"it is {key}"}}
        return document | {"model": key, "choices": [choice]}

    fake.changed = saying
    assert evaluated(project, fake, tmp_path / "out") == 0
    told = capsys.readouterr()
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert files and not [file for file in files if key.encode() in file.read_bytes()]
    assert key not in told.out + told.err and "version ***" in told.out


@pytest.mark.parametrize(
    "changed",
    [
        {"usage": {"completion_tokens": 2_000_000_000}},
        {"choices": [{"index": 0, "message": {"content": "y" * 3_000_000}, "finish_reason": ""}]},
    ],
)
def test_what_could_not_be_read_back_is_refused_and_costs_no_other_answer(
    project, fake, tmp_path, capsys, changed
):
    out, one = tmp_path / "out", ("--per_device_eval_batch_size", "1")
    answering(fake, 2, lambda: setattr(fake, "changed", lambda path, document: document | changed))
    assert evaluated(project, fake, out, *one) == 1
    assert len(lines(out / "predictions-site.partial.jsonl")) == 2
    fake.changed = lambda path, document: document
    before = len(fake.bodies())
    assert evaluated(project, fake, out, *one) == 0
    assert len(fake.bodies()) - before == IMAGES - 2


def test_an_image_that_is_refused_stops_and_counts_as_failed_where_that_is_asked(
    project, fake, tmp_path, capsys
):
    out, answer = tmp_path / "out", fake.answer
    bad = picture_of(project, "image-2.png")

    def refusing(verb: str, path: str, body: Document) -> tuple[int, Document]:
        if body and "messages" in body and np.array_equal(picture(body), bad):
            return 400, {"error": {"message": "the content filter says no"}}
        return answer(verb, path, body)

    fake.answer = refusing  # type: ignore[method-assign]
    one = ("--per_device_eval_batch_size", "1")
    assert evaluated(project, fake, out, *one) == 1
    told = capsys.readouterr().err
    assert "error: image 'image-2.png' was refused: POST" in told
    assert "status 400: the content filter says no; where only some images are, give" in told
    assert len(lines(out / "predictions-site.partial.jsonl")) == 2

    assert evaluated(project, fake, out, *one, "--refused_images", "empty") == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith(f"site: of {IMAGES} answers ") and "1 refused by the server" in told
    row = lines(out / "predictions-site.jsonl")[2]
    assert (row["completion"], row["completion_length"], row["parsed"]) == ("", None, False)
    assert "the content filter says no" in row["refused"]
    assert record(out / "scores-site.json")["fail_rate"] == 1.0


def picture_of(project: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(project / name).convert("RGB"))


def test_empty_answers_and_other_names_are_told(project, fake, tmp_path, capsys):
    def named(path: str, document: Document) -> Document:
        if path != "/v1/chat/completions":
            return document
        choice = document["choices"][0] | {"message": {"content": None}, "finish_reason": "stop"}
        return document | {"model": "sft-9-2026", "choices": [choice], "usage": None}

    fake.changed = named
    assert evaluated(project, fake, tmp_path) == 0
    assert f"site: of {IMAGES} answers 5 empty, 5 by sft-9-2026\n" in capsys.readouterr().out
    rows = lines(tmp_path / "predictions-site.jsonl")
    assert {(row["completion"], row["completion_length"], row["model"]) for row in rows} == {
        ("", None, "sft-9-2026")
    }


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (
            ["--adapter_name_or_path", "run"],
            ["--adapter_name_or_path: has no place beside --vllm_server_base_url, which has"],
        ),
        (
            ["--min_visual_tokens", "4", "--bf16", "false", "--num_threads", "1"],
            [
                "--min_visual_tokens: has no place beside --vllm_server_base_url, which sizes",
                "--num_threads: has no place beside --vllm_server_base_url, since no model is",
                "--bf16: has no place beside --vllm_server_base_url, since no model is loaded here",
            ],
        ),
        (
            ["--vllm_server_base_url", "http://gpu.example.org:8000"],
            [
                "--vllm_server_base_url http://gpu.example.org:8000 is not this machine",
                "--vllm_server_base_url http://gpu.example.org:8000: another machine is asked by",
            ],
        ),
        (["--vllm_server_base_url", "here"], ["--vllm_server_base_url here is no address of a"]),
        (["--num_generations", "2", "--temperature", "0"], ["--temperature 0: greedy decoding"]),
        (["--vllm_server_timeout", "0"], ["--vllm_server_timeout: expected a number above 0"]),
    ],
)
def test_what_a_server_cannot_have_is_refused_before_it_is_asked(
    project, fake, tmp_path, capsys, changes, messages
):
    assert evaluated(project, fake, tmp_path / "out", *changes) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(messages)
    for error, message in zip(errors, messages, strict=True):
        assert error.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists() and not fake.requests


def test_a_server_has_no_place_where_none_is_asked(project, capsys):
    asked = ["--vllm_server_base_url", "http://127.0.0.1:1", "--data_file", "a=demo:test-a"]
    assert main(asked) == 2
    assert "--model_name_or_path is missing: give the name that the" in capsys.readouterr().err
    rows = ["--predictions", f"site={project / 'site.jsonl'}"]
    assert main([*rows, "--vllm_server_base_url", "http://127.0.0.1:1"]) == 2
    assert "--vllm_server_base_url: has no place beside --predict" in capsys.readouterr().err
    more = ["--allow_remote_server", "--refused_images", "empty", "--vllm_server_timeout", "9"]
    assert main([*rows, *more]) == 2
    told = capsys.readouterr().err
    for name in ("allow_remote_server", "refused_images", "vllm_server_timeout"):
        assert f"--{name}: goes with --vllm_server_base_url" in told


@pytest.mark.parametrize("command", ["evaluate", "matrix"])
def test_several_processes_do_not_ask(project, fake, tmp_path, capsys, monkeypatch, command):
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (ranks | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    run = evaluated if command == "evaluate" else matrix
    assert run(project, fake, tmp_path / "out") == 2
    assert "a server is asked by one process; start it without torchrun" in capsys.readouterr().err
    assert not fake.requests


# ---- a matrix, and reports -----------------------------------------------------------------------
def matrix(project: Path, fake: FakeServer, out: Path, *more: str) -> int:
    """Fill a matrix of two served models with one prompt -> the exit code."""
    command = ["--vllm_server_base_url", fake.url, "--prompt", "demo", "--output_dir", str(out)]
    command += ["--model", "served=served:sft-9", "other=served:base", "--max_completion_length"]
    command += ["12", "--data_file", f"site={project / 'site.jsonl'}", *more]
    return matrix_main(overriding(command))


def test_a_matrix_sets_served_models_beside_the_engines_own(project, fake, tmp_path, capsys):
    out = tmp_path / "matrix"
    own = [f"sft={project / 'run'}", "served=served:sft-9"]
    assert matrix(project, fake, out, "--model", *own, "--min_visual_tokens", "4") == 0
    told = capsys.readouterr().out
    assert "2 cells x 1 data sets, 2 to do" in told and "| model sft-9" in told
    served, engine = (lines(out / f"{n}.demo/predictions-site.jsonl") for n in ("served", "sft"))
    assert [row["completion"] for row in served] == [row["completion"] for row in engine]
    settings = record(out / "sft.demo/scores-site.json")["run"]["settings"]
    assert settings["vllm_server_base_url"]["value"] is None
    settings = record(out / "served.demo/scores-site.json")["run"]["settings"]
    assert settings["vllm_server_base_url"]["value"] == fake.url
    assert settings["model_name_or_path"]["value"] == "sft-9"

    before = len(fake.bodies())
    assert matrix(project, fake, out, "--model", *own, "--min_visual_tokens", "4") == 0
    assert "0 to do" in capsys.readouterr().out and len(fake.bodies()) == before
    folders = [f"sft={out / 'sft.demo'}", f"served={out / 'served.demo'}"]
    assert report_main([*folders, "--output_dir", str(tmp_path / "report"), "--cases", "0"]) == 0


def test_a_served_matrix_goes_on_where_the_server_ended(project, fake, tmp_path, capsys):
    out, write = tmp_path / "matrix", fake.write
    answering(fake, IMAGES + 2, lambda: setattr(fake, "raw", b""))
    fake.changed = lambda path, document: document if fake.raw is None else b""
    assert matrix(project, fake, out, "--per_device_eval_batch_size", "1") == 1
    assert "goes on from there" in capsys.readouterr().err
    fake.raw, fake.write, fake.changed = None, write, lambda path, document: document
    before = len(fake.bodies())
    assert matrix(project, fake, out) == 0
    assert len(fake.bodies()) - before == IMAGES - 2
    assert "2 cells x 1 data sets, 1 to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "a=served:"], "--model a=served:: give the name that the server has for the"),
        (["--model", "a=demo"], "--vllm_server_base_url: no --model is of a server; write NAME="),
        (["--bf16", "false"], "--bf16: has no place beside --vllm_server_base_url, since no model"),
        (["--vision_cache_gb", "1"], "--vision_cache_gb: has no place beside --vllm_server_base"),
        (["--model", "a=served:b"], "--vllm_server_base_url {url} has no model of the name b; it"),
    ],
)
def test_a_matrix_refuses_in_one_line(project, fake, tmp_path, capsys, more, message):
    assert matrix(project, fake, tmp_path / "out", *more) == 2
    assert f"error: {message.format(url=fake.url)}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not fake.bodies()


def test_a_matrix_names_every_model_that_is_not_served_once(project, fake, tmp_path, capsys):
    more = ("--model", "a=served:b", "c=served:d", "--prompt", "demo", "free_reasoning")
    assert matrix(project, fake, tmp_path / "out", *more) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    names = [line.partition("no model of the name ")[2].partition(";")[0] for line in errors]
    assert names == ["b", "d"]


def test_a_served_model_of_a_matrix_needs_the_address(project, tmp_path, capsys):
    command = ["--model", "a=served:b", "--prompt", "demo", "--output_dir", str(tmp_path / "out")]
    assert matrix_main([*command, "--data_file", f"site={project / 'site.jsonl'}"]) == 2
    assert "--model NAME=served:ITS_NAME: needs --vllm_server_base_url" in capsys.readouterr().err


def test_tables_and_reports_name_a_served_model_by_its_name(project, fake, tmp_path, capsys):
    fake.adapters["nvidia/NV-Reason-CXR-3B"] = "/models/nv"
    out = tmp_path / "out"
    assert evaluated(project, fake, out, "--model_name_or_path", "nvidia/NV-Reason-CXR-3B") == 0
    assert "\n  NV-Reason-CXR-3B" in capsys.readouterr().out
    assert load_entry("x", out).stage == "other"  # it may have been trained on anything
    by_engine(project, tmp_path / "own")
    both = [str(tmp_path / "own"), str(out)]
    assert report_main([*both, "--output_dir", str(tmp_path / "report"), "--cases", "0"]) == 0
    page = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert "nvidia/NV-Reason-CXR-3B" in page and "SFT" in page


# ---- nothing is loaded ---------------------------------------------------------------------------
PROGRAM = """
import atexit, json, runpy, sys
slow = ("torch", "transformers", "peft")
atexit.register(lambda: print(json.dumps([n for n in slow if n in sys.modules]), file=sys.stderr))
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("command", ["eval.evaluate", "eval.matrix"])
def test_neither_weights_nor_torch_are_loaded(project, fake, tmp_path, command):
    model = ["--model_name_or_path", "sft-9"]
    model = model if command == "eval.evaluate" else ["--model", "a=served:sft-9"]
    flags = ["--vllm_server_base_url", fake.url, "--output_dir", str(tmp_path / "out"), *model]
    flags += ["--prompt", "demo", "--data_file", f"site={project / 'site.jsonl'}"]
    flags += ["--max_completion_length", "12"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, command, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == []
    assert len(fake.bodies()) == IMAGES
